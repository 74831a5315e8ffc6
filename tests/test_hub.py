"""Data sets of the Hugging Face Hub, from folders that are laid out as its are."""

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from purecnn import data, hub, random
from tests.test_cli import call

datasets = pytest.importorskip("datasets", reason="needs the package datasets")


@pytest.fixture(autouse=True)
def quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def encoded(color: tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (12, 10), color).save(file, "png")
    return file.getvalue()


def store(folder: Path, *, label: str = "label", halves: tuple[str, ...] = ("train", "test"), bad: bool = False) -> str:
    """A folder of Parquet files; with ``bad`` the second picture of each is none."""
    folder.mkdir()
    kinds = datasets.Features(
        {"name": datasets.Value("string"), "img": datasets.Image(), label: datasets.ClassLabel(names=["ant", "bee"])}
    )
    for half in halves:
        pictures: list[dict[str, Any]] = [{"bytes": encoded((20 * i, 0, 0)), "path": None} for i in range(6)]
        if bad:
            pictures[1]["bytes"] = b"no picture"
        columns = {"name": list("abcdef"), "img": pictures, label: [0, 1] * 3}
        datasets.Dataset.from_dict(columns, features=kinds).to_parquet(folder / f"{half}-00000.parquet")
    return str(folder)


def test_pictures_and_classes(tmp_path: Path) -> None:
    found = data.load("hf:" + store(tmp_path / "insects"), root=tmp_path / "cache", like="cifar10")
    assert found.classes == ("ant", "bee")
    assert (len(found.train), len(found.test)) == (6, 6)
    image, label = found.train[3]
    assert (image.size, image.getpixel((0, 0)), label) == ((12, 10), (60, 0, 0), 1)
    prepare = found.preprocessing.training(found.augmentation)
    images, labels = next(iter(data.batches(found.train, prepare, 4, key=random.key(0))))
    assert images.shape == (4, 3, 32, 32)
    assert labels.dtype == torch.int64
    others = next(iter(data.batches(found.train, prepare, 4, key=random.key(0), workers=1)))  # in a process of its own
    assert torch.equal(others[0], images)
    assert torch.equal(others[1], labels)


def test_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = "hf:" + store(tmp_path / "insects", halves=("train", "validation", "test"))
    words = ("train", "lenet5", "--data", name, "--like", "cifar10", "--epochs", "1", "--out", "run")
    result = call(*words, "--root", str(tmp_path / "cache"))
    assert result.exit_code == 0, result.output
    assert (tmp_path / "run" / "report.html").is_file()


def test_bad_pictures_are_named_or_left_out(tmp_path: Path) -> None:
    name = store(tmp_path / "insects", bad=True)
    found = hub.load(name, root=tmp_path / "cache")
    with pytest.raises(data.DataError, match=r"not an image that Pillow recognises: .*insects, train, row 1"):
        found.train[1]
    fewer = hub.load(name, root=tmp_path / "cache", skip_bad=True)
    assert (len(fewer.train), len(fewer.test)) == (5, 5)
    assert fewer.train[1][1] == 0
    assert fewer.skipped == (f"{name}, train, row 1", f"{name}, test, row 1")


def test_errors_say_what_is_there(tmp_path: Path) -> None:
    name = store(tmp_path / "half", halves=("train",))
    with pytest.raises(data.DataError, match=r"must have a split train and one of val, .*; it has train"):
        hub.load(name, root=tmp_path / "cache")
    table = tmp_path / "words"
    table.mkdir()
    for half in ("train", "test"):
        datasets.Dataset.from_dict({"text": ["a", "b"]}).to_parquet(table / f"{half}.parquet")
    with pytest.raises(data.DataError, match=r"no column of pictures \(Image\); its columns are text"):
        hub.load(str(table), root=tmp_path / "cache")
    with pytest.raises(data.DataError, match="datasets cannot load 'no/such'"):
        hub.load("no/such", root=tmp_path / "cache")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match="pip install datasets"):
        hub.load("ylecun/mnist")
