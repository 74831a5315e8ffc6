"""What a family's table says of each network: how to build it, and where it comes from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from purecnn.layer import Law, Layer

Loss = Callable[[Any, Tensor], Tensor]
"""``loss(outputs, labels) -> scalar``: from logits or `purecnn.Outputs`, and the index of each image's class, to the
mean over the batch."""


@dataclass(frozen=True, slots=True)
class Paper:
    """Where an architecture comes from."""

    title: str
    authors: str
    year: int
    """Of its first appearance in public."""
    reference: str
    """arXiv id or DOI."""


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
    pixels: tuple[float, float] | None = None
    """What black and white are for this network, where its paper says so and the usual normalisation will not do."""
