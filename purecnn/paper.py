"""What a family's table says of each network: how to build it, where it comes from, and what it was published with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from torch import Tensor

from purecnn.layer import Law, Layer

Loss = Callable[[Any, Tensor], Tensor]
"""``loss(outputs, labels) -> scalar``: from logits or `purecnn.Outputs`, and the index of each image's class, to the
mean over the batch."""


def softmax(logits: Tensor) -> Tensor:
    """Of logits (batch, classes), the probabilities (batch, classes).

    >>> softmax(Tensor([[0, 0]]))
    tensor([[0.5000, 0.5000]])
    """
    return logits.softmax(1)


class Group(StrEnum):
    """What a paper explores, in the order in which the story is told.

    The first seven are the taxonomy of Khan, Sohail, Zahoora, Qureshi. A Survey of the Recent Architectures of Deep
    Convolutional Neural Networks. Artificial Intelligence Review 53, 2020, arXiv:1901.06032. It ends in 2018; the
    others are ours.

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
        """Whether the survey has the group."""
        groups = list(Group)
        return groups.index(self) <= groups.index(Group.ATTENTION)


@dataclass(frozen=True, slots=True)
class Paper:
    """Where an architecture comes from."""

    title: str
    authors: str
    year: int
    """Of its first appearance in public."""
    reference: str
    """arXiv id or DOI."""
    groups: tuple[Group, ...] = ()
    """What it explores."""
    in_survey: bool = False
    """Whether the survey has the paper, in its table or its sections 4.1 to 4.7; where not, the groups are ours."""


@dataclass(frozen=True, slots=True)
class Published:
    """A result as it was printed."""

    value: float
    """Percent."""
    metric: str
    """What was measured, such as "top-1 error" or "test accuracy"."""
    data: str
    """What it was measured on; ImageNet is the validation set of ILSVRC 2012."""
    source: str
    """Where it is printed: a table or section of the network's paper, or who else prints it."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One row of a family's table."""

    build: Callable[..., Layer]
    """The family's function; its keyword arguments are the settings that a user may override."""
    paper: Paper
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What this variant sets."""
    image_size: int = 224
    in_channels: int = 3
    paper_law: Law | None = None
    """How the paper draws the parameters, where it says so and the default is another law."""
    loss: Loss | None = None
    """What the paper minimises, where that is not cross-entropy."""
    probabilities: Callable[[Tensor], Tensor] = softmax
    """How outputs (batch, classes) are read as probabilities, where they are no logits."""
    pixels: tuple[float, float] | None = None
    """What black and white are for this network, where its paper says so and the usual normalisation will not do."""
    published: Published | None = None
    """How well it did; None where only torchvision's weights were measured, or none."""
