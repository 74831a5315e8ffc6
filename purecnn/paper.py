"""What a family's table says of each network: how to build it, and where it comes from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from purecnn.layer import Law, Layer


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
