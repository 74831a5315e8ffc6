"""Augmentation of whole batches as pure functions, for images that are kept in memory as bytes.

    augment = chain(crop(4), flip, normalize(mean, std))
    step = make_step(model, optimizer, augment=augment)      # part of the step, and compiled with it

`purecnn.data` augments pictures one by one as they are read, which photographs need. These functions run on the device
of the images, including a GPU.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from purecnn import random

__all__ = ["Augment", "chain", "crop", "cutout", "flip", "normalize"]

Augment = Callable[[Tensor, Tensor], Tensor]
"""``augment(images, key) -> images``, both of shape (batch, channels, height, width)."""


def chain(*steps: Augment) -> Augment:
    """Apply augmentations one after the other, each with its own key."""

    def augment(images: Tensor, key: Tensor) -> Tensor:
        for i, step in enumerate(steps):
            images = step(images, random.fold_in(key, i))
        return images

    return augment


def flip(images: Tensor, key: Tensor) -> Tensor:
    """Mirror each image left to right with probability 1/2.

    >>> images = torch.arange(4.0).reshape(2, 1, 1, 2)
    >>> flip(images, random.key(1)).flatten(1).tolist()
    [[1.0, 0.0], [2.0, 3.0]]
    """
    mirrored = random.bernoulli(key, 0.5, (images.shape[0],))
    return torch.where(rearrange(mirrored, "b -> b 1 1 1"), images.flip(-1), images)


def crop(padding: int, mode: str = "constant") -> Augment:
    """Pad each image and crop it at a random place to its own size (He et al., arXiv:1512.03385, section 4.2).

    Args:
        padding: pixels added on each side.
        mode: their values: ``"constant"`` for zeros, ``"reflect"`` for the mirrored image.
    """

    def augment(images: Tensor, key: Tensor) -> Tensor:
        batch, _, height, width = images.shape
        # torch cannot reflect integers. These types hold them exactly, except 64-bit integers beyond 2**53.
        exact = torch.float32 if images.dtype.itemsize <= 2 or images.dtype == torch.float32 else torch.float64
        wide = F.pad(images.to(exact), (padding,) * 4, mode=mode).to(images.dtype)
        top, left = (_integers(random.fold_in(key, i), batch, 2 * padding + 1) for i in range(2))
        rows = rearrange(top, "b -> b 1 1 1") + torch.arange(height, device=images.device)[:, None]
        columns = rearrange(left, "b -> b 1 1 1") + torch.arange(width, device=images.device)
        wide = torch.take_along_dim(wide, rows, 2)
        return torch.take_along_dim(wide, columns, 3)

    return augment


def cutout(size: int) -> Augment:
    """Set a square with a random centre in each image to zero (DeVries and Taylor, arXiv:1708.04552).

    Args:
        size: side of the square, pixels; parts of it may lie outside the image.
    """

    def augment(images: Tensor, key: Tensor) -> Tensor:
        batch, _, *sides = images.shape
        inside = [
            (
                torch.arange(side, device=images.device)
                - _integers(random.fold_in(key, i), batch, side)[:, None]
                + size // 2
            )
            for i, side in enumerate(sides)
        ]
        rows, columns = ((place >= 0) & (place < size) for place in inside)
        hidden = rearrange(rows, "b h -> b 1 h 1") & rearrange(columns, "b w -> b 1 1 w")
        return images.masked_fill(hidden, 0)

    return augment


def normalize(mean: Sequence[float], std: Sequence[float]) -> Augment:
    """Convert bytes to ``(byte / 255 - mean) / std``, float32; it draws no random numbers.

    Args:
        mean, std: of each channel, as in the ``preprocessing`` of a data set or of weights.

    Raises:
        ValueError: if there are not as many deviations as means; when it is called, if the images have another number
            of channels.
        TypeError: when it is called, if the images are not uint8.
    """
    if len(mean) != len(std):
        raise ValueError(f"each mean needs one deviation, found {len(mean)} means and {len(std)} deviations")

    def augment(images: Tensor, key: Tensor) -> Tensor:
        if images.dtype != torch.uint8:
            raise TypeError(f"normalize takes uint8 images, found {images.dtype}")
        if images.shape[1] != len(mean):
            raise ValueError(f"normalize has {len(mean)} means, and the images have {images.shape[1]} channels")
        m, s = (
            # Created on the images' device: torch.tensor of a list would copy from the host at every call.
            torch.stack([torch.full((1, 1), value, dtype=torch.float32, device=images.device) for value in each])
            for each in (mean, std)
        )
        return (images.float() / 255 - m) / s

    return augment


def _integers(key: Tensor, count: int, below: int) -> Tensor:
    """Integers from 0 to ``below - 1``, all equally likely."""
    return (random.uniform(key, (count,)) * below).to(torch.int64).clamp(max=below - 1)
