"""From a picture's file to the tensor that a network reads.

Reading is Pillow's work, resizing and varying torchvision's (``torchvision.transforms.v2``). This file adds errors that
name the file, and one object that says how pictures are prepared and can be kept beside weights. All public names are
those of `purecnn.data`.
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
    """The data are not what they should be: a missing file, a bad picture, an unknown name."""


# One picture -----------------------------------------------------------------------------------------------


def read_image(source: str | os.PathLike[str] | BinaryIO, *, called: str | None = None) -> Image.Image:
    """Reads one image file, upright and whole.

    Args:
        source: the file's path, or the file.
        called: its name in errors; by default the path.

    Returns:
        A PIL image of mode ``"L"`` (grey) or ``"RGB"``, 8 bits a channel, turned as its EXIF data say; of an
        animation, the first frame.

    Raises:
        DataError: naming the file, when there is no such file, or when it does not decode to a picture.

    Example::

        tensor = data.Preprocessing().evaluation()(data.read_image("ant.jpg"))       # (3, 224, 224)
    """
    with _naming(called or str(source)), Image.open(source) as file:
        image = ImageOps.exif_transpose(file)
        if image.mode in ("RGB", "L"):
            return image
        # Pillow's own conversion has changed between clipping and scaling. A PGM's 16 bits come in 32.
        if image.mode.startswith("I;16") or (image.mode == "I" and file.format == "PPM"):
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode in ("I", "F"):
            raise DataError(f"its pixels (mode {image.mode}) have no fixed range: store it with 8 or 16 bits")
        if image.mode == "P":  # a palette may hold transparency, which only RGBA takes over without a warning
            image = image.convert("RGBA")
        return image.convert("L" if image.mode in ("1", "LA", "La") else "RGB")


LEFT_OUT = "--skip-bad, or skip_bad=True, leaves them out"


def read_example(source: str | os.PathLike[str] | BinaryIO, *, called: str | None = None) -> Image.Image:
    """`read_image` for a data set: what it raises tells how to do without such pictures.

    Raises:
        DataError: as from `read_image`, with a note.
    """
    try:
        return read_image(source, called=called)
    except DataError as error:
        error.add_note(LEFT_OUT)
        raise


def check_header(path: Path) -> None:
    """Raises DataError unless the file begins like an image. Decodes no pixel: 0.1 ms."""
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
    """How training pictures are varied. Every field's default means: not at all.

    Attributes:
        area: a rectangle of that share of the picture, from least to most, of a random shape between 3:4 and
            4:3, is cut and scaled (Szegedy et al., "Going deeper with convolutions", 2015).
        padding: the picture is padded by this share of its side and a crop taken at a random place (He et
            al., "Deep residual learning", 2016: 4 of 32 pixels).
        rotate: degrees, to either side.
        shift: share of the side, in every direction.
        zoom: 0.1 scales by 0.9 to 1.1.
        flip: half of the pictures are mirrored left to right.

    Example::

        dataclasses.replace(data.load("cifar10").augmentation, flip=False)
    """

    area: tuple[float, float] | None = None
    padding: float = 0.0
    rotate: float = 0.0
    shift: float = 0.0
    zoom: float = 0.0
    flip: bool = False


_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")  # those that Pillow has
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, the weights by which Pillow makes RGB grey


@dataclass(frozen=True)
class Preprocessing:
    """All that must be known to show a picture to a trained network the way evaluation did.

    Plain numbers and words, so a checkpoint can store it (:meth:`to_dict`). The defaults are ImageNet's.

    Attributes:
        size: height and width, in pixels, of what the network reads.
        channels: 1 (grey) or 3 (RGB); pictures are converted.
        resize: the picture's shorter side is scaled to this many pixels, then the middle ``size`` x ``size``
            is cut out; None: cut without scaling (and padded with black where the picture is too small).
        mean, std: for each channel, of intensities in 0 to 1.
        interpolation: "nearest", "bilinear", "bicubic", "box", "hamming" or "lanczos".

    Raises:
        DataError: when the fields do not fit together.
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
            raise DataError(f"no {self.size} x {self.size} crop in a shorter side of {self.resize} pixels")
        if self.interpolation not in _INTERPOLATIONS:
            raise DataError(f"interpolation {self.interpolation!r}: one of {', '.join(_INTERPOLATIONS)}")

    def adapt(self, *, size: int | None = None, channels: int | None = None) -> "Preprocessing":
        """The same for a network that reads another size or number of channels.

        ``resize`` keeps its proportion to ``size``. Means and deviations are carried over: to three equal
        channels, or to grey by the weights with which Pillow mixes RGB (exact for the mean; for the deviation
        as if the channels varied together, which they nearly do).

        Args:
            size: height and width, in pixels; None keeps them.
            channels: 1 (grey) or 3 (RGB); None keeps them.

        Raises:
            DataError: for another number of channels, or a size below 1.

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
        """The same with other numbers for black and white.

        >>> Preprocessing().between(-1.0, 1.0).mean
        (0.5, 0.5, 0.5)
        """
        std = 1 / (white - black)
        return replace(self, mean=(0.0 - black * std,) * self.channels, std=(std,) * self.channels)

    def evaluation(self) -> v2.Compose:
        """The transform from a PIL image (or a uint8 array or tensor) to a float32 (channels, size, size)."""
        return v2.Compose([_Mode(self.channels), *self._middle(), *self._to_tensor()])

    def bytes(self) -> v2.Compose:
        """As :meth:`evaluation`, but to uint8, and without mean and deviation."""
        return v2.Compose([_Mode(self.channels), *self._middle(), v2.ToImage(), v2.ToPureTensor()])

    def training(self, augmentation: Augmentation) -> v2.Compose:
        """As :meth:`evaluation`, varied at random; the draws are from torch's global generator.

        :func:`batches` seeds that generator for each picture and puts it back.
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
        """The fields as values that JSON can hold."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Preprocessing":
        """The inverse of :meth:`to_dict`.

        Raises:
            DataError: when a field is missing or unknown: a guess here would spoil predictions silently.
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
    """From bytes to 0 to 1, divided as torchvision's presets do; ``v2.ToDtype`` multiplies by the reciprocal."""
    return image.float() / 255


def _three_equal(grey: tuple[float, ...]) -> tuple[float, ...]:
    return grey * 3


def _luminance(rgb: tuple[float, ...]) -> tuple[float, ...]:
    return (sum(weight * value for weight, value in zip(_LUMA, rgb, strict=True)),)


@dataclass(frozen=True)
class _Mode:
    """Converts to grey or RGB. A class, not a closure, so that worker processes can be sent it."""

    channels: int

    def __call__(self, image: Any) -> Image.Image:
        # v2.RGB would turn RGBA into three equal greys; and a tensor is not scaled quite like a PIL image
        if not isinstance(image, Image.Image):
            image = v2.functional.to_pil_image(image)
        return image.convert("L" if self.channels == 1 else "RGB")
