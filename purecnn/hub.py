"""Data sets of pictures from the Hugging Face Hub, or with the same layout, through the package ``datasets``.

    mnist = data.load("hf:ylecun/mnist")

A data set must have a column of pictures and one of classes; the first of each kind is used, others are ignored.
"""

import io
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

from purecnn.data import HELD_OUT, PHOTOGRAPHS, DataError, DataSet, Preprocessing, digest
from purecnn.preprocessing import read_example

__all__ = ["load"]


def load(name: str, *, root: str | os.PathLike[str] | None = None, skip_bad: bool = False) -> DataSet:
    """Loads a data set by its name on the Hub, such as ``"ylecun/mnist"``, or from a folder of Parquet files.

    Args:
        name: name of the data set; of several configurations, the default one is loaded.
        root: where downloads are kept; by default where ``datasets`` keeps them.
        skip_bad: leave out pictures that do not decode, instead of failing during training. All pictures are decoded
            once to find them.

    Raises:
        ModuleNotFoundError: if the package ``datasets`` is not installed.
        DataError: if the data set cannot be loaded, lacks a training split, a held-out split, pictures or classes, or
            has rows without a class.
    """
    try:
        import datasets
    except ImportError:
        raise ModuleNotFoundError("data sets of the Hugging Face Hub need a package: pip install datasets") from None
    try:
        splits = datasets.load_dataset(name, cache_dir=None if root is None else str(Path(root).expanduser()))
    except Exception as error:  # no network, no such name, a configuration to choose, a damaged file
        reason = " ".join(str(error).split())
        raise DataError(f"datasets cannot load {name!r}: {reason}") from error
    held_out = next((split for split in HELD_OUT if split in splits), None)
    if held_out is None or "train" not in splits:
        found = ", ".join(splits)
        raise DataError(f"{name} must have a split train and one of {', '.join(HELD_OUT)}; it has {found}")
    features = splits["train"].features
    picture = _column(name, features, datasets.Image, "pictures (Image)")
    label = _column(name, features, datasets.ClassLabel, "classes (ClassLabel)")
    # Take the files' bytes: the package's own decoding ignores EXIF data and raises other errors.
    train, test = (
        _Rows(splits[split].cast_column(picture, datasets.Image(decode=False)), f"{name}, {split}", picture, label)
        for split in ("train", held_out)
    )
    for split in (train, test):
        if min(split.rows[label]) < 0:  # the Hub marks secret labels by -1
            raise DataError(f"{split.where}: there are rows without a class")
    skipped: list[str] = []
    if skip_bad:
        (train, bad), (test, bad_too) = train.without_bad(), test.without_bad()
        skipped = [*bad, *bad_too]
    classes = tuple(features[label].names)
    word = digest(str(value) for split in (train, test) for value in split.rows[label])
    return DataSet(f"hf:{name}", classes, train, test, Preprocessing(), PHOTOGRAPHS, tuple(skipped), word)


def _column(name: str, features: Mapping[str, Any], kind: type, what: str) -> str:
    """The name of the first column of a kind."""
    for column, feature in features.items():
        if isinstance(feature, kind):
            return column
    raise DataError(f"{name} has no column of {what}; its columns are {', '.join(features)}")


class _Rows:
    """One split, as a sequence of examples."""

    def __init__(self, rows: Any, where: str, picture: str, label: str) -> None:
        self.rows, self.where, self.picture, self.label = rows, where, picture, label

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        row = self.rows[index]
        file = row[self.picture]
        source = io.BytesIO(file["bytes"]) if file["bytes"] is not None else file["path"]
        return read_example(source, called=self.called(index)), row[self.label]

    def called(self, index: int) -> str:
        return f"{self.where}, row {index}"

    def without_bad(self) -> tuple["_Rows", list[str]]:
        """The same split without the pictures that do not decode, and the names of those."""

        def is_good(index: int) -> bool:
            try:
                self[index]
            except DataError:
                return False
            return True

        with ThreadPoolExecutor() as pool:  # Pillow releases the GIL while it decodes
            good = list(pool.map(is_good, range(len(self))))
        kept = self.rows.select([index for index, fine in enumerate(good) if fine])
        bad = [self.called(index) for index, fine in enumerate(good) if not fine]
        return _Rows(kept, self.where, self.picture, self.label), bad
