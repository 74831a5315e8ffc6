"""Data sets of real pictures, and how a picture becomes what a network reads.

Reading and augmenting are torchvision's work (``torchvision.datasets``, ``torchvision.transforms.v2``) and
scikit-learn's (the handwritten digits that it carries). This file adds what they leave open: one table of
settings for each data set, randomness that comes from a key alone, and errors that name the file.

Example::

    from purecnn import data, random

    digits = data.load("digits")
    prepare = digits.preprocessing.adapt(size=32)                    # what the network wants to see
    for epoch in range(2):
        key = random.fold_in(random.key(0), epoch)
        for images, labels in data.batches(digits.train, prepare.training(digits.augmentation), 64, key=key):
            ...                                                      # (64, 1, 32, 32) float32, (64,) int64
    for images, labels in data.batches(digits.test, prepare.evaluation(), 256):
        ...
"""

import difflib
import errno
import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets
from torchvision.transforms import InterpolationMode, v2

from purecnn import random

__all__ = [
    "Augmentation",
    "Batches",
    "DataError",
    "DataSet",
    "Examples",
    "Mix",
    "Preprocessing",
    "Resident",
    "batches",
    "load",
    "names",
    "read_image",
    "resident",
]

Transform = Callable[[Any], Tensor]


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


_LEFT_OUT = "--skip-bad, or skip_bad=True, leaves them out"


def read_example(source: str | os.PathLike[str] | BinaryIO, *, called: str | None = None) -> Image.Image:
    """`read_image` for a data set: what it raises tells how to do without such pictures.

    Raises:
        DataError: as from `read_image`, with a note.
    """
    try:
        return read_image(source, called=called)
    except DataError as error:
        error.add_note(_LEFT_OUT)
        raise


def _check_header(path: Path) -> None:
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


# Data sets -------------------------------------------------------------------------------------------------


class Examples(Protocol):
    """Half of a data set: pictures with the index of their class, by position."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Image.Image, int]: ...


@dataclass(frozen=True)
class DataSet:
    """Real pictures in classes, with settings that suit them.

    Attributes:
        name: a name of :func:`names`, or the folder.
        classes: class names; an example's label is an index into them.
        train, test: the two halves, each with ``len(half)`` and ``half[i] -> (PIL image, label)``.
        preprocessing: for the pictures' own size and channels; ``preprocessing.adapt(...)`` for others.
        augmentation: for training.
        skipped: the files that were left out because they are no pictures.
        digest: of what may change under one name. Of pictures in memory they and their classes, in order; of files
            their names, order and classes. Empty if nobody knows.
    """

    name: str
    classes: tuple[str, ...]
    train: Examples
    test: Examples
    preprocessing: Preprocessing
    augmentation: Augmentation
    skipped: tuple[Path | str, ...] = ()
    digest: str = ""


def digest(marks: Iterable[str]) -> str:
    """A short word for a list of words."""
    return hashlib.sha256("\0".join(marks).encode(errors="surrogateescape")).hexdigest()[:16]


class _InMemory:
    def __init__(self, images: Any, labels: Any) -> None:
        self.images, self.labels = np.asarray(images, dtype=np.uint8), [int(label) for label in labels]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), self.labels[index]

    def mark(self) -> str:
        """A word for all of it; CIFAR, 184 MB, takes a quarter of a second."""
        found = hashlib.sha256(str(self.labels).encode())
        for image in self.images:
            found.update(np.ascontiguousarray(image).data)
        return found.hexdigest()


class _Files:
    def __init__(self, files: Sequence[tuple[Path, int]]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        file, label = self.files[index]
        return read_example(file), label


def _square(size: int, mean: Sequence[float], std: Sequence[float]) -> Preprocessing:
    return Preprocessing(size=size, channels=len(mean), resize=size, mean=tuple(mean), std=tuple(std))


_HANDWRITING = Augmentation(rotate=10, shift=0.1, zoom=0.1)
_OBJECTS = Augmentation(padding=1 / 8, flip=True)
PHOTOGRAPHS = Augmentation(area=(0.08, 1.0), flip=True)
"""How pictures vary of which nothing is known."""

# Means and deviations are those of the training half.
_SETTINGS = {
    "digits": (_square(8, [0.3053], [0.3760]), _HANDWRITING),
    "mnist": (_square(28, [0.1307], [0.3081]), _HANDWRITING),
    "fashionmnist": (_square(28, [0.2860], [0.3530]), _OBJECTS),
    "cifar10": (_square(32, [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]), _OBJECTS),
    "cifar100": (_square(32, [0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762]), _OBJECTS),
}
_DOWNLOADS = {
    "mnist": datasets.MNIST,
    "fashionmnist": datasets.FashionMNIST,
    "cifar10": datasets.CIFAR10,
    "cifar100": datasets.CIFAR100,
}


_TEN_DIGITS = tuple("0123456789")


def names() -> tuple[str, ...]:
    """The names that :func:`load` knows, beside folders."""
    return tuple(_SETTINGS)


def load(
    name: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    skip_bad: bool = False,
    like: str | None = None,
) -> DataSet:
    """Loads a data set by its name, or from a folder of pictures.

    * ``digits``: 1,797 handwritten digits, 8 x 8, that come with scikit-learn (no network needed); split once
      and for all into 1,437 and 360, each class in proportion (``train_test_split`` with ``random_state=0``).
    * ``mnist``, ``fashionmnist``, ``cifar10``, ``cifar100``: torchvision downloads them into ``root``.
    * a folder with ``train/`` and one of ``val/``, ``valid/``, ``validation/``, ``test/`` (the first of them
      that there is), in both one folder for each class, with pictures at any depth. Hidden files and folders,
      and files beside the class folders, are passed over. Every other file must be one that Pillow recognises
      by its first bytes; its extension does not count.
    * ``hf:NAME``: one of the Hugging Face Hub, or a folder of Parquet files, by :mod:`purecnn.hub`.

    Args:
        name: a name of :func:`names`, a folder (one that is called like a data set: ``./digits``), or ``hf:NAME``.
        root: where downloads are kept; default ``purecnn`` in the user's cache folder.
        skip_bad: leave out files of a folder that are no pictures, instead of refusing the folder. Every file
            is then decoded once, so one that is cut short is found now and not in the middle of training.
        like: the name of a data set whose preprocessing and augmentation suit the pictures of a folder; by default
            they count as photographs.

    Raises:
        DataError: for an unknown name, a failed download, a folder with another layout, or bad files (all are
            counted, the first ten named).

    Example::

        photographs = data.load("photographs", skip_bad=True)
        print(photographs.classes, len(photographs.train), photographs.skipped)
    """
    if like is not None:
        if like not in _SETTINGS:
            raise DataError(f"pictures can be like those of {', '.join(names())}, not {like!r}")
        preprocessing, augmentation = _SETTINGS[like]
        found = load(name, root=root, skip_bad=skip_bad)
        return replace(found, preprocessing=preprocessing, augmentation=augmentation)
    if name == "digits":
        return _digits()
    if isinstance(name, str) and name in _DOWNLOADS:
        return _download(name, _cache() if root is None else Path(root).expanduser())
    if isinstance(name, str) and name.startswith("hf:"):
        from purecnn import hub  # which is built on this file

        return hub.load(name.removeprefix("hf:"), root=root, skip_bad=skip_bad)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _folder(folder, skip_bad)
    close = difflib.get_close_matches(str(name).lower(), names(), n=3)
    meant = f"; did you mean {' or '.join(close)}?" if close else ""
    raise DataError(f"{str(name)!r} is neither a folder nor a data set ({', '.join(names())}, hf:NAME){meant}")


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "purecnn"


def _digits() -> DataSet:
    from sklearn.datasets import load_digits  # takes a second to import, and only this function needs it
    from sklearn.model_selection import train_test_split

    bundle = load_digits()
    images = np.rint(bundle.images * (255 / 16)).astype(np.uint8)  # 17 grey levels, 0 to 16
    train, test = train_test_split(np.arange(len(images)), test_size=360, random_state=0, stratify=bundle.target)
    return _in_memory("digits", _TEN_DIGITS, *(_InMemory(images[half], bundle.target[half]) for half in (train, test)))


def _in_memory(name: str, classes: tuple[str, ...], train: _InMemory, test: _InMemory) -> DataSet:
    return DataSet(name, classes, train, test, *_SETTINGS[name], digest=digest([train.mark(), test.mark()]))


def _download(name: str, root: Path) -> DataSet:
    source = _DOWNLOADS[name]
    try:
        train, test = (source(str(root), train=train, download=True) for train in (True, False))
    except Exception as error:  # no network, a proxy's error page, no right to write, a damaged file
        if issubclass(source, datasets.MNIST):
            files, folder = [file for file, _ in source.resources], root / source.__name__ / "raw"
            addresses = source.mirrors
        else:
            files, folder, addresses = [source.filename], root, [source.url]
        reason = " ".join(str(error).split())
        raise DataError(
            f"{name} is not in {root} and could not be downloaded from {' or '.join(addresses)} ({reason}). "
            f"With the files at hand, put {', '.join(files)} into {folder}"
        ) from error
    classes = _TEN_DIGITS if name == "mnist" else tuple(train.classes)  # torchvision's are "0 - zero" and so on
    return _in_memory(name, classes, *(_InMemory(half.data, half.targets) for half in (train, test)))


HELD_OUT = ("val", "valid", "validation", "test")
"""What the half that is not trained on may be called; the first of them that there is."""


def _folder(folder: Path, skip_bad: bool) -> DataSet:
    test = next((folder / half for half in HELD_OUT if (folder / half).is_dir()), None)
    train = folder / "train"
    if test is None or not train.is_dir():
        found = ", ".join(sorted(f"{path.name}/" for path in folder.iterdir() if path.is_dir())) or "no folder"
        raise DataError(
            f"{folder} must hold train/ and one of {'/, '.join(HELD_OUT)}/, with class folders in both; "
            f"it holds {found}"
        )
    classes, test_classes = _class_folders(train), _class_folders(test)
    if classes != test_classes:
        only = [
            f"only in {half}: {', '.join(sorted(set(ours) - set(theirs)))}"
            for half, ours, theirs in ((train, classes, test_classes), (test, test_classes, classes))
            if set(ours) - set(theirs)
        ]
        raise DataError(f"the classes of {train} and {test} differ; {'; '.join(only)}")

    examples = {
        half: [(file, label) for label, title in enumerate(classes) for file in _visible_files(half / title)]
        for half in (train, test)
    }
    files = [file for half in examples.values() for file, _ in half]
    bad = _bad_files(files, read_image if skip_bad else _check_header)
    if bad and not skip_bad:
        shown = "".join(f"\n  {file}" for file in bad[:10]) + ("\n  ..." if len(bad) > 10 else "")
        raise DataError(f"{len(bad)} of {len(files)} files in {folder} are no pictures ({_LEFT_OUT}):{shown}")
    dropped = set(bad)
    for half, pairs in examples.items():
        examples[half] = [(file, label) for file, label in pairs if file not in dropped]
        empty = sorted(set(range(len(classes))) - {label for _, label in examples[half]})
        if empty:
            raise DataError(f"no pictures in {', '.join(str(half / classes[label]) for label in empty)}")
    return DataSet(
        str(folder),
        classes,
        _Files(examples[train]),
        _Files(examples[test]),
        Preprocessing(),
        PHOTOGRAPHS,
        tuple(bad),
        digest(str(file).removeprefix(str(folder)) for pairs in examples.values() for file, _ in pairs),
    )


def _class_folders(half: Path) -> tuple[str, ...]:
    classes = sorted(path.name for path in half.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not classes:
        raise DataError(f"{half} holds no folders: it needs one for each class, with the pictures of that class")
    if len(classes) == 1:
        raise DataError(f"{half} holds one class, {classes[0]}, and there is nothing to tell it from")
    for name in classes:
        if any("\ud800" <= letter <= "\udfff" for letter in name):  # how Python holds bytes that are no text
            raise DataError(f"the name of the folder {name!r} in {half} is not UTF-8: rename it")
    return tuple(classes)


def _visible_files(folder: Path) -> list[Path]:
    """Those in it at any depth. Links are followed, but not into a folder that they lie in, which has no end."""
    files: list[Path] = []
    parent = folder.parent.resolve()
    around = {folder: {parent, *parent.parents}}  # of each folder, all that it was reached through
    for name, folders, inside in os.walk(folder, followlinks=True):
        here = Path(name)
        reached, real = around.pop(here), here.resolve()
        if real in reached or here.name.startswith("."):
            folders.clear()  # os.walk then stays out of them
            continue
        around |= {here / name: {*reached, real} for name in folders}
        files += [here / name for name in inside if not name.startswith(".")]
    return sorted(files)


def _bad_files(files: Sequence[Path], check: Callable[[Path], object]) -> list[Path]:
    def is_bad(file: Path) -> bool:
        try:
            check(file)
        except DataError as error:
            broken_link = (None, errno.ENOENT, errno.ELOOP)
            if isinstance(error.__cause__, OSError) and error.__cause__.errno not in broken_link:
                raise  # the system failed (no permission, a lost disk): that says nothing about the file
            return True
        return False

    with ThreadPoolExecutor() as pool:  # Pillow lets go of the interpreter lock while it reads and decodes
        return [file for file, bad in zip(files, pool.map(is_bad, files), strict=True) if bad]


# Batches ---------------------------------------------------------------------------------------------------


Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From images and labels of a batch to mixed images and shares of the classes: ``v2.MixUp``, ``v2.CutMix``."""


def batches(
    examples: Examples,
    transform: Transform,
    batch_size: int,
    *,
    key: Tensor | None = None,
    workers: int = 0,
    drop_last: bool = False,
    mix: Mix | None = None,
    part: tuple[int, int] = (0, 1),
) -> "Batches":
    """Batches of pictures, once through ``examples``.

    With a key the order is shuffled, and what ``transform`` draws for a picture depends on the key and the
    picture's index alone: not on ``workers`` or ``batch_size``, nor on torch's global generator, which is
    left as it was, nor on threads that go through other batches. Going through the same object twice gives the
    same batches: give every epoch its own key.
    Without a key the order is that of ``examples``, for transforms that draw nothing.

    Args:
        examples: one half of a :class:`DataSet`, or anything alike.
        transform: from a PIL image to a tensor (channels, height, width), the same shape for every picture.
        batch_size: the last batch may be smaller, unless ``drop_last`` leaves it out.
        workers: processes that prepare batches in advance; 0 prepares them in this one, when asked for.
        mix: mixes each batch's images; its draws depend on the key and the batch's number.
        part: ``(i, n)`` gives every n-th picture of each batch, from the i-th on, to the i-th of n processes. A batch
            of fewer pictures than processes is given to all if there is a key, since training steps are made together.

    Returns:
        An iterable with a ``len``, of images (batch, channels, height, width) and labels (batch,) int64; with
        ``mix``, of shares (batch, classes).

    Raises:
        DataError: when there would be no batch at all, or (while iterating, and from a worker too) when a
            picture cannot be read, naming its file.

    Example::

        for images, labels in data.batches(digits.train, transform, 64, key=random.fold_in(key, epoch)):
            ...
    """
    if workers < 0:
        raise DataError(f"workers must be at least 0, not {workers}")
    if mix is not None and key is None:
        raise DataError("to mix pictures is to draw: it needs a key")
    order = _Order(len(examples), batch_size, key, drop_last, part)
    return Batches(examples, transform, order, workers, mix)


@dataclass(frozen=True, eq=False)
class _Order:
    """Which pictures are in which batch."""

    count: int
    batch_size: int
    key: Tensor | None
    drop_last: bool
    part: tuple[int, int]
    first: int = 0
    """Batches to leave out at the beginning."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise DataError(f"batch_size must be at least 1, not {self.batch_size}")
        if self.count < (self.batch_size if self.drop_last else 1):
            raise DataError(f"{self.count} pictures make no batch of {self.batch_size}")

    def __len__(self) -> int:
        full, rest = divmod(self.count, self.batch_size)
        return max(0, full + (rest > 0 and not self.drop_last) - self.first)

    def groups(self) -> list[list[int]]:
        order = list(range(self.count))
        if self.key is not None:
            order = random.permutation(random.split(self.key)[0], self.count).tolist()
        begins = range(self.first * self.batch_size, self.count, self.batch_size)
        whole = [order[begin : begin + self.batch_size] for begin in begins][: len(self)]
        index, parts = self.part
        if self.key is None:  # to evaluate: each picture once, and nobody waits for a batch
            return [group[index::parts] for group in whole if group[index::parts]]
        return [group[index::parts] if len(group) >= parts else group for group in whole]


@dataclass(frozen=True, eq=False)
class Batches:
    """What :func:`batches` returns."""

    examples: Examples
    transform: Transform
    order: _Order
    workers: int
    mix: Mix | None

    def __len__(self) -> int:
        return len(self.order)

    def skip(self, count: int) -> "Batches":
        """The same without its first ``count`` batches, whose pictures are not read."""
        return replace(self, order=replace(self.order, first=self.order.first + count))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        key, seeds, mixing = self.order.key, None, None
        if key is not None:
            seeds = random.bits(random.split(key)[1], (len(self.examples),)).tolist()
            if self.mix is not None:
                mixing = random.bits(random.split(key, 3)[2], (self.order.first + len(self),)).tolist()
        loader: Iterable[tuple[Tensor, Tensor] | DataError] = DataLoader(
            _Prepared(self.examples, self.transform, seeds),
            batch_sampler=self.order.groups(),
            num_workers=self.workers,
            collate_fn=_collate,
            generator=torch.Generator(),  # else a loader draws from the global generator
        )
        started = _apart(lambda: iter(loader)) if self.workers else iter(loader)
        for number, batch in enumerate(started, self.order.first):
            if isinstance(batch, DataError):
                raise batch
            if mixing is not None and self.mix is not None:
                with _seeded(mixing[number]):
                    batch = self.mix(*batch)
            yield batch


_Result = TypeVar("_Result")


def _apart(start: Callable[[], _Result]) -> _Result:
    """What starts processes, run by a thread that belongs to no pool.

    A process that a thread of a ThreadPoolExecutor forks fails at its end: Python has it wait for all threads of pools,
    its own among them. torch then raises in the main thread, wherever that is.
    """
    if threading.current_thread() is threading.main_thread():
        return start()
    found: Future[_Result] = Future()

    def run() -> None:
        try:
            found.set_result(start())
        except BaseException as error:
            found.set_exception(error)

    with _STARTING:
        threading.Thread(target=run).start()
        return found.result()


_STARTING = threading.Lock()
"""Held by who starts processes from a thread: filelock, which torch brings along, lets two of them not fork at once."""


_GENERATOR = threading.RLock()
"""Held by the thread that draws from torch's global generator: torchvision's transforms know no other."""
if hasattr(os, "register_at_fork"):  # a worker's process must not begin with a lock that no thread of its own holds
    os.register_at_fork(
        before=_GENERATOR.acquire, after_in_parent=_GENERATOR.release, after_in_child=_GENERATOR.release
    )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """torch's global generator, begun anew from a seed, and afterwards as it was."""
    with _GENERATOR:
        before = torch.get_rng_state()
        # not torch.manual_seed, which seeds accelerators as well and is ten times slower
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            torch.set_rng_state(before)


def resident(
    examples: Examples,
    batch_size: int,
    *,
    preprocessing: Preprocessing,
    device: torch.device | str = "cpu",
) -> "Resident":
    """All pictures in memory, on a device: for small data sets, whose reading would take longer than the training.

    They are scaled and cropped as ``preprocessing`` says, and kept as bytes. Its mean and deviation are left to
    `purecnn.augment`, which works on whole batches, inside of the training step.

    Args:
        examples: one half of a :class:`DataSet`.
        batch_size: the last batch may be smaller.
        preprocessing: of the pictures.
        device: where to keep them.

    Raises:
        DataError: when there would be no batch at all, or a picture cannot be read, naming its file.
    """
    order = _Order(len(examples), batch_size, None, False, (0, 1))
    keep = preprocessing.bytes()
    images, labels = zip(*(examples[i] for i in range(len(examples))), strict=True)
    stored = torch.stack([keep(image) for image in images]).to(device)
    return Resident(stored, torch.tensor(labels).to(device), order)


@dataclass(frozen=True, eq=False)
class Resident:
    """What :func:`resident` returns: batches of images (batch, channels, height, width), uint8, and labels."""

    images: Tensor
    labels: Tensor
    order: _Order

    def __len__(self) -> int:
        return len(self.order)

    def skip(self, count: int) -> "Resident":
        """The same without its first ``count`` batches."""
        return replace(self, order=replace(self.order, first=self.order.first + count))

    def shuffled(self, key: Tensor, *, part: tuple[int, int] = (0, 1)) -> "Resident":
        """In a key's order; ``part`` as in :func:`batches`.

        Args:
            key: of the order; give every epoch its own.
            part: this process's, and of how many.
        """
        return replace(self, order=replace(self.order, key=key, part=part))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        groups = self.order.groups()
        # All at once: to bring each group to a GPU would be to wait for the step before.
        order = torch.tensor([i for group in groups for i in group], dtype=torch.int64, device=self.labels.device)
        for chosen in torch.split(order, [len(group) for group in groups]):
            yield self.images[chosen], self.labels[chosen]


@dataclass(frozen=True)
class _Prepared(Dataset[tuple[Tensor, int] | DataError]):
    """Examples, transformed. An error is a value: a worker's exception would arrive as a traceback."""

    examples: Examples
    transform: Transform
    seeds: Sequence[int] | None

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | DataError:
        try:
            image, label = self.examples[index]
        except DataError as error:
            return error
        if self.seeds is None:
            return self.transform(image), label
        with _seeded(self.seeds[index]):
            return self.transform(image), label


def _collate(examples: Sequence[tuple[Tensor, int] | DataError]) -> tuple[Tensor, Tensor] | DataError:
    for example in examples:
        if isinstance(example, DataError):
            return example
    images, labels = zip(*examples, strict=True)
    return torch.stack(images), torch.tensor(labels)
