"""Preprocessing: from a picture's file to the tensor that a network reads.

Pillow reads the files; torchvision (``torchvision.transforms.v2``) resizes and augments. This file adds errors that
name the file, and one object that states how pictures are prepared and can be stored with weights. Import the public
names from `purecnn.data`.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2


class DataError(ValueError):
    """The data cannot be used: a missing file, a damaged picture, an unknown name, or a setting that does not fit."""


# One picture -----------------------------------------------------------------------------------------------


def read_image(source: str | os.PathLike[str] | BinaryIO, *, called: str | None = None) -> Image.Image:
    """Reads one image file completely, and turns it upright.

    Args:
        source: the file's path, or an open file.
        called: its name in errors; by default the path.

    Returns:
        A PIL image of mode ``"L"`` (grey) or ``"RGB"``, with 8 bits per channel, rotated as its EXIF data say; for an
        animation, the first frame.

    Raises:
        DataError: if the file does not exist or does not decode to a picture; names the file.

    Example::

        tensor = data.Preprocessing().evaluation()(data.read_image("ant.jpg"))       # (3, 224, 224)
    """
    with _naming(called or str(source)), Image.open(source) as file:
        image = ImageOps.exif_transpose(file)
        if image.mode in ("RGB", "L"):
            return image
        # Pillow versions differ in whether they clip or scale here. A PGM's 16 bits arrive as 32-bit integers.
        if image.mode.startswith("I;16") or (image.mode == "I" and file.format == "PPM"):
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode in ("I", "F"):
            raise DataError(f"its pixels (mode {image.mode}) have no fixed range: store it with 8 or 16 bits")
        if image.mode == "P":  # a palette may contain transparency; only converting to RGBA gives no warning then
            image = image.convert("RGBA")
        return image.convert("L" if image.mode in ("1", "LA", "La") else "RGB")


LEFT_OUT = "--skip-bad, or skip_bad=True, leaves them out"


def read_example(source: str | os.PathLike[str] | BinaryIO, *, called: str | None = None) -> Image.Image:
    """`read_image` for a data set: its errors say how to leave out pictures that cannot be read.

    Raises:
        DataError: as from `read_image`, with a note.
    """
    try:
        return read_image(source, called=called)
    except DataError as error:
        error.add_note(LEFT_OUT)
        raise


def check_header(path: Path) -> None:
    """Raises DataError unless the file begins like an image. It decodes no pixels and takes 0.1 ms."""
    with _naming(str(path)), Image.open(path):
        pass


@contextmanager
def _naming(file: str) -> Iterator[None]:
    """Turns whatever a decoder raises into a DataError that names the file."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"no such image file: {file}") from error
    except UnidentifiedImageError as error:
        raise DataError(f"not an image that Pillow recognises: {file}") from error
    except Exception as error:  # on damaged bytes Pillow's decoders raise nearly every kind of exception
        raise DataError(f"cannot read the image {file}: {error}") from error


# From a picture to a tensor --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Augmentation:
    """How training pictures are augmented. By default, they are not.

    Attributes:
        area: smallest and largest share of the picture's area: a random rectangle of such an area, with an aspect ratio
            between 3:4 and 4:3, is cut out and scaled (Szegedy et al., "Going deeper with convolutions", 2015).
        padding: the picture is padded by this share of its side, then cropped at a random place (He et al., "Deep
            residual learning", 2016: 4 of 32 pixels).
        rotate: largest rotation in either direction, degrees.
        shift: largest shift in every direction, as a share of the side.
        zoom: largest change of scale: 0.1 scales by 0.9 to 1.1.
        flip: mirror each picture left to right with probability 1/2.

    Example::

        dataclasses.replace(data.load("cifar10").augmentation, flip=False)
    """

    area: tuple[float, float] | None = None
    padding: float = 0.0
    rotate: float = 0.0
    shift: float = 0.0
    zoom: float = 0.0
    flip: bool = False


_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")  # those of Pillow
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601: Pillow's weights for converting RGB to grey


@dataclass(frozen=True)
class Preprocessing:
    """How a picture is prepared for a network, in evaluation and prediction.

    All fields are plain numbers and strings, so a checkpoint can store them (:meth:`to_dict`). The defaults are
    ImageNet's.

    Attributes:
        size: height and width of the network's input, pixels.
        channels: 1 (grey) or 3 (RGB); pictures are converted.
        resize: the picture's shorter side is scaled to this many pixels, then the central ``size`` x ``size`` pixels
            are cut out. None cuts without scaling, and pads a picture that is too small with black.
        mean, std: mean and standard deviation of each channel, for intensities from 0 to 1.
        interpolation: "nearest", "bilinear", "bicubic", "box", "hamming" or "lanczos".

    Raises:
        DataError: if the fields do not fit together.
    """

    size: int = 224
    channels: int = 3
    resize: int | None = 256
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise DataError(f"channels must be 1 or 3, not {self.channels}")
        if not len(self.mean) == len(self.std) == self.channels:
            raise DataError(f"{self.channels} channels need as many means and stds: {self.mean}, {self.std}")
        if min(self.std) <= 0:
            raise DataError(f"std must be positive: {self.std}")
        if self.size < 1 or (self.resize is not None and self.resize < self.size):
            raise DataError(
                f"cannot crop {self.size} x {self.size} pixels from a picture with a shorter side of {self.resize}"
            )
        if self.interpolation not in _INTERPOLATIONS:
            raise DataError(f"interpolation must be one of {', '.join(_INTERPOLATIONS)}, not {self.interpolation!r}")

    def adapt(self, *, size: int | None = None, channels: int | None = None) -> "Preprocessing":
        """The same preprocessing for a network that reads another size or number of channels.

        ``resize`` keeps its ratio to ``size``. Means and standard deviations are converted: from grey to three equal
        channels, or from RGB to grey by Pillow's weights (exact for the mean; for the deviation, exact if the channels
        are fully correlated, which they nearly are).

        Args:
            size: height and width, in pixels; None keeps them.
            channels: 1 (grey) or 3 (RGB); None keeps them.

        Raises:
            DataError: if ``channels`` is neither 1 nor 3, or ``size`` is below 1.

        Example::

            data.load("digits").preprocessing.adapt(size=224, channels=3)  # for a ResNet
        """
        if channels not in (None, 1, 3):
            raise DataError(f"pictures are grey or RGB: channels must be 1 or 3, not {channels}")
        adapted = self
        if size is not None and size != self.size:
            resize = None if self.resize is None else max(size, round(self.resize * size / self.size))
            adapted = replace(adapted, size=size, resize=resize)
        if channels and channels != self.channels:
            convert = _three_equal if channels == 3 else _luminance
            mean, std = convert(self.mean), convert(self.std)
            adapted = replace(adapted, channels=channels, mean=mean, std=std)
        return adapted

    def between(self, black: float, white: float) -> "Preprocessing":
        """The same preprocessing with mean and deviation such that black and white pixels get these values.

        >>> Preprocessing().between(-1.0, 1.0).mean
        (0.5, 0.5, 0.5)
        """
        std = 1 / (white - black)
        return replace(self, mean=(0.0 - black * std,) * self.channels, std=(std,) * self.channels)

    def evaluation(self) -> v2.Compose:
        """The transform from a PIL image (or a uint8 array or tensor) to a float32 tensor (channels, size, size)."""
        return v2.Compose([_Mode(self.channels), *self._middle(), *self._to_tensor()])

    def bytes(self) -> v2.Compose:
        """The transform :meth:`evaluation` without its normalisation: to a uint8 tensor."""
        return v2.Compose([_Mode(self.channels), *self._middle(), v2.ToImage(), v2.ToPureTensor()])

    def training(self, augmentation: Augmentation) -> v2.Compose:
        """The transform :meth:`evaluation` with random augmentation, drawn from torch's global generator.

        :func:`batches` seeds that generator for each picture and restores it afterwards.
        """
        a = augmentation
        interpolation = InterpolationMode(self.interpolation)
        steps: list[Callable[[Any], Any]] = [_Mode(self.channels)]
        if a.area:
            steps += [v2.RandomResizedCrop(self.size, scale=a.area, interpolation=interpolation)]
        else:
            steps += self._middle()
        if a.padding:
            steps += [v2.RandomCrop(self.size, padding=round(a.padding * self.size))]
        if a.rotate or a.shift or a.zoom:
            zoom = (1 - a.zoom, 1 + a.zoom)
            smooth = InterpolationMode.BILINEAR
            steps += [v2.RandomAffine(a.rotate, (a.shift, a.shift), zoom, interpolation=smooth)]
        if a.flip:
            steps += [v2.RandomHorizontalFlip()]
        return v2.Compose([*steps, *self._to_tensor()])

    def to_dict(self) -> dict[str, Any]:
        """The fields, as values that JSON can represent."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Preprocessing":
        """The inverse of :meth:`to_dict`.

        Raises:
            DataError: if a field is missing or unknown; a guess would silently make predictions wrong.
        """
        wrong = {field.name for field in fields(cls)} ^ set(values)
        if wrong:
            raise DataError(f"preprocessing has missing or unknown fields: {', '.join(sorted(wrong))}")
        return cls(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})

    def _middle(self) -> list[Callable[[Any], Any]]:
        crop = v2.CenterCrop(self.size)
        if self.resize is None:
            return [crop]
        return [v2.Resize(self.resize, interpolation=InterpolationMode(self.interpolation)), crop]

    def _to_tensor(self) -> list[Callable[[Any], Any]]:
        return [v2.functional.pil_to_tensor, _unit, v2.Normalize(self.mean, self.std)]


def _unit(image: Tensor) -> Tensor:
    """Scale bytes to 0 to 1 by a division, as torchvision's presets do; ``v2.ToDtype`` multiplies by the reciprocal."""
    return image.float() / 255


def _three_equal(grey: tuple[float, ...]) -> tuple[float, ...]:
    return grey * 3


def _luminance(rgb: tuple[float, ...]) -> tuple[float, ...]:
    return (sum(weight * value for weight, value in zip(_LUMA, rgb, strict=True)),)


@dataclass(frozen=True)
class _Mode:
    """Converts to grey or RGB. It is a class and not a closure, so that it can be sent to worker processes."""

    channels: int

    def __call__(self, image: Any) -> Image.Image:
        # v2.RGB would turn RGBA into three equal grey channels; and torchvision resizes a tensor slightly differently
        if not isinstance(image, Image.Image):
            image = v2.functional.to_pil_image(image)
        return image.convert("L" if self.channels == 1 else "RGB")
