"""Data sets of pictures, their preprocessing and augmentation, and batches of them.

torchvision (``torchvision.datasets``, ``torchvision.transforms.v2``) reads and augments pictures, and scikit-learn
contains the handwritten digits. This module adds a table with the settings of each data set, preprocessing that fits a
network's weights (``preprocessing.py``), randomness that depends only on a key (``loader.py``), and errors that name
the file.

Example::

    from purecnn import data, random

    digits = data.load("digits")
    prepare = digits.preprocessing.adapt(size=32)                    # the size that the network reads
    order_key, init_key = random.split(random.key(0))                # one key for each purpose
    for epoch in range(2):
        key = random.fold_in(order_key, epoch)
        for images, labels in data.batches(digits.train, prepare.training(digits.augmentation), 64, key=key):
            ...                                                      # (64, 1, 32, 32) float32, (64,) int64
    for images, labels in data.batches(digits.test, prepare.evaluation(), 256):
        ...
"""

import difflib
import errno
import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torchvision import datasets

from purecnn.loader import Batches, Examples, Mix, Resident, Transform, batches, resident
from purecnn.preprocessing import (
    LEFT_OUT,
    Augmentation,
    DataError,
    Preprocessing,
    check_header,
    read_example,
    read_image,
)

__all__ = [
    "Augmentation",
    "Batches",
    "DataError",
    "DataSet",
    "Examples",
    "Mix",
    "Preprocessing",
    "Resident",
    "Transform",
    "batches",
    "load",
    "names",
    "read_image",
    "resident",
]


@dataclass(frozen=True)
class DataSet:
    """A data set of pictures in classes, with settings that suit it.

    Attributes:
        name: a name of :func:`names`, the folder, or ``hf:NAME``.
        classes: class names; an example's label is an index into them.
        train, test: the two splits, each with ``len(split)`` and ``split[i] -> (PIL image, label)``.
        preprocessing: for the pictures' own size and channels; ``preprocessing.adapt(...)`` for others.
        augmentation: for training.
        skipped: the files that were left out because they are not pictures.
        digest: a hash that shows whether data of the same name have changed. Of data in memory it covers pictures and
            labels, in order; of a folder the files' names, order and classes; of the Hub the labels, in order. Empty if
            unknown.
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
    """A short hash of a list of strings."""
    return hashlib.sha256("\0".join(marks).encode(errors="surrogateescape")).hexdigest()[:16]


class _InMemory:
    def __init__(self, images: Any, labels: Any) -> None:
        self.images, self.labels = np.asarray(images, dtype=np.uint8), [int(label) for label in labels]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), self.labels[index]

    def mark(self) -> str:
        """A hash of all pictures and labels; it takes a quarter of a second for CIFAR, 184 MB."""
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
"""The augmentation for pictures of unknown kind."""

# Means and deviations are computed from the training split.
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
    """The names of the data sets that :func:`load` knows; it also takes folders and ``hf:NAME``."""
    return tuple(_SETTINGS)


def load(
    name: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    skip_bad: bool = False,
    like: str | None = None,
) -> DataSet:
    """Loads a data set by its name, or from a folder of pictures.

    * ``digits``: 1,797 handwritten digits of 8 x 8 pixels, which come with scikit-learn (no network needed). The
      split is fixed: 1,437 for training and 360 for testing, stratified (``train_test_split`` with
      ``random_state=0``).
    * ``mnist``, ``fashionmnist``, ``cifar10``, ``cifar100``: torchvision downloads them into ``root``.
    * a folder with ``train/`` and one of ``val/``, ``valid/``, ``validation/``, ``test/`` (the first that exists).
      Both contain one folder for each class, with pictures at any depth. Hidden files and folders, and files beside
      the class folders, are ignored. Pillow must recognise every other file by its first bytes; extensions do not
      matter.
    * ``hf:NAME``: a data set of the Hugging Face Hub, or a folder of Parquet files, loaded by :mod:`purecnn.hub`.

    Args:
        name: a name of :func:`names`, a folder (write ``./digits`` if it has the name of a data set), or ``hf:NAME``.
        root: where downloads are kept; by default ``purecnn`` in the user's cache folder.
        skip_bad: leave out files that are not pictures, instead of refusing the folder. Every file is then decoded
            once, so a truncated file is found now and not during training.
        like: the name of a data set whose preprocessing and augmentation to use; by default, pictures of a folder are
            treated as photographs.

    Raises:
        DataError: for an unknown name, a failed download, a folder with another layout, or bad files (all of them are
            counted, and the first ten are named).

    Example::

        photographs = data.load("photographs", skip_bad=True)
        print(photographs.classes, len(photographs.train), photographs.skipped)
    """
    if like is not None:
        if like not in _SETTINGS:
            raise DataError(f"like must be one of {', '.join(names())}, not {like!r}")
        preprocessing, augmentation = _SETTINGS[like]
        found = load(name, root=root, skip_bad=skip_bad)
        return replace(found, preprocessing=preprocessing, augmentation=augmentation)
    if name == "digits":
        return _digits()
    if isinstance(name, str) and name in _DOWNLOADS:
        return _download(name, _cache() if root is None else Path(root).expanduser())
    if isinstance(name, str) and name.startswith("hf:"):
        from purecnn import hub  # imported here, because it imports this module

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
    from sklearn.datasets import load_digits  # the import takes a second, and only this function needs it
    from sklearn.model_selection import train_test_split

    bundle = load_digits()
    images = np.rint(bundle.images * (255 / 16)).astype(np.uint8)  # 17 grey levels, 0 to 16
    train, test = train_test_split(np.arange(len(images)), test_size=360, random_state=0, stratify=bundle.target)
    return _in_memory(
        "digits", _TEN_DIGITS, *(_InMemory(images[split], bundle.target[split]) for split in (train, test))
    )


def _in_memory(name: str, classes: tuple[str, ...], train: _InMemory, test: _InMemory) -> DataSet:
    return DataSet(name, classes, train, test, *_SETTINGS[name], digest=digest([train.mark(), test.mark()]))


def _download(name: str, root: Path) -> DataSet:
    source = _DOWNLOADS[name]
    try:
        train, test = (source(str(root), train=train, download=True) for train in (True, False))
    except Exception as error:  # no network, a proxy's error page, no permission to write, a damaged file
        if issubclass(source, datasets.MNIST):
            files, folder = [file for file, _ in source.resources], root / source.__name__ / "raw"
            addresses = source.mirrors
        else:
            files, folder, addresses = [source.filename], root, [source.url]
        reason = " ".join(str(error).split())
        raise DataError(
            f"{name} is not in {root} and could not be downloaded from {' or '.join(addresses)} ({reason}). "
            f"If you have the files, put {', '.join(files)} into {folder}"
        ) from error
    classes = _TEN_DIGITS if name == "mnist" else tuple(train.classes)  # torchvision's are "0 - zero" and so on
    return _in_memory(name, classes, *(_InMemory(split.data, split.targets) for split in (train, test)))


HELD_OUT = ("val", "valid", "validation", "test")
"""The names that the held-out split may have; the first one that exists is used."""


def _folder(folder: Path, skip_bad: bool) -> DataSet:
    test = next((folder / split for split in HELD_OUT if (folder / split).is_dir()), None)
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
            f"only in {split}: {', '.join(sorted(set(ours) - set(theirs)))}"
            for split, ours, theirs in ((train, classes, test_classes), (test, test_classes, classes))
            if set(ours) - set(theirs)
        ]
        raise DataError(f"the classes of {train} and {test} differ; {'; '.join(only)}")

    examples = {
        split: [(file, label) for label, title in enumerate(classes) for file in _visible_files(split / title)]
        for split in (train, test)
    }
    files = [file for split in examples.values() for file, _ in split]
    bad = _bad_files(files, read_image if skip_bad else check_header)
    if bad and not skip_bad:
        shown = "".join(f"\n  {file}" for file in bad[:10]) + ("\n  ..." if len(bad) > 10 else "")
        raise DataError(f"{len(bad)} of {len(files)} files in {folder} are no pictures ({LEFT_OUT}):{shown}")
    dropped = set(bad)
    for split, pairs in examples.items():
        examples[split] = [(file, label) for file, label in pairs if file not in dropped]
        empty = sorted(set(range(len(classes))) - {label for _, label in examples[split]})
        if empty:
            raise DataError(f"no pictures in {', '.join(str(split / classes[label]) for label in empty)}")
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


def _class_folders(split: Path) -> tuple[str, ...]:
    classes = sorted(path.name for path in split.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not classes:
        raise DataError(f"{split} holds no folders: it needs one for each class, with the pictures of that class")
    if len(classes) == 1:
        raise DataError(f"{split} holds one class, {classes[0]}, but at least two are needed")
    for name in classes:
        if any("\ud800" <= letter <= "\udfff" for letter in name):  # Python's surrogates for bytes that are not UTF-8
            raise DataError(f"the name of the folder {name!r} in {split} is not UTF-8: rename it")
    return tuple(classes)


def _visible_files(folder: Path) -> list[Path]:
    """The files in a folder, at any depth. Links are followed, except to a folder that contains them (endless)."""
    files: list[Path] = []
    parent = folder.parent.resolve()
    around = {folder: {parent, *parent.parents}}  # for each folder, all folders that it was reached through
    for name, folders, inside in os.walk(folder, followlinks=True):
        here = Path(name)
        reached, real = around.pop(here), here.resolve()
        if real in reached or here.name.startswith("."):
            folders.clear()  # so that os.walk does not enter them
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
                raise  # the system failed (no permission, a lost disk), so the file is not to blame
            return True
        return False

    with ThreadPoolExecutor() as pool:  # Pillow releases the GIL while it reads and decodes
        return [file for file, bad in zip(files, pool.map(is_bad, files), strict=True) if bad]
