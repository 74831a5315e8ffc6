"""The rows of the families' tables: how each network is built, which paper it comes from, and its published result."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from torch import Tensor

from purecnn.layer import Law, Layer

Loss = Callable[[Any, Tensor], Tensor]
"""``loss(outputs, labels) -> scalar``: the mean over the batch, from logits or `purecnn.Outputs`, and the index of each
image's class."""


def softmax(logits: Tensor) -> Tensor:
    """The probabilities (batch, classes) for logits (batch, classes).

    >>> softmax(Tensor([[0, 0]]))
    tensor([[0.5000, 0.5000]])
    """
    return logits.softmax(1)


class Group(StrEnum):
    """What a paper explores, in order of presentation.

    The first seven are the taxonomy of Khan, Sohail, Zahoora, Qureshi. A Survey of the Recent Architectures of Deep
    Convolutional Neural Networks. Artificial Intelligence Review 53, 2020, arXiv:1901.06032. It ends in 2018; the
    other groups are ours.

    >>> [group.value for group in Group if not group.in_survey][:2]
    ['mobile', 'architecture search']
    """

    SPATIAL = "spatial exploitation"
    DEPTH = "depth"
    MULTI_PATH = "multi-path"
    WIDTH = "width"
    FEATURE_MAPS = "feature-map exploitation"
    CHANNEL_BOOSTING = "channel boosting"
    ATTENTION = "attention"
    MOBILE = "mobile"
    SEARCH = "architecture search"
    SCALING = "compound scaling"
    DESIGN = "design studies"
    TRAINING_SPEED = "training speed"

    @property
    def in_survey(self) -> bool:
        """Whether the group is one of the survey's."""
        groups = list(Group)
        return groups.index(self) <= groups.index(Group.ATTENTION)


@dataclass(frozen=True, slots=True)
class Paper:
    """Where an architecture comes from."""

    title: str
    authors: str
    year: int
    """The year of its first public appearance."""
    reference: str
    """arXiv id or DOI."""
    groups: tuple[Group, ...] = ()
    """What it explores."""
    in_survey: bool = False
    """Whether the survey has the paper, in its table or its sections 4.1 to 4.7; if not, its groups are our choice."""


@dataclass(frozen=True, slots=True)
class Published:
    """A result as published."""

    value: float
    """Percent."""
    metric: str
    """What was measured, such as "top-1 error" or "test accuracy"."""
    data: str
    """The data it was measured on; ImageNet is the validation set of ILSVRC 2012."""
    source: str
    """Where it is published: a table or section of the network's paper, or another source."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One row of a family's table."""

    build: Callable[..., Layer]
    """The family's function; its keyword arguments are the settings that a user may override."""
    paper: Paper
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The values that this variant sets."""
    image_size: int = 224
    in_channels: int = 3
    paper_law: Law | None = None
    """How the paper draws the parameters, if it says so and the default differs."""
    loss: Loss | None = None
    """What the paper minimises, if it is not cross-entropy."""
    probabilities: Callable[[Tensor], Tensor] = softmax
    """Converts outputs (batch, classes) to probabilities; not the softmax if the outputs are not logits."""
    pixels: tuple[float, float] | None = None
    """The values of black and white pixels for this network, if its paper states them and the usual normalisation does
    not fit."""
    published: Published | None = None
    """Its published result; None if only torchvision's weights were measured, or none."""
