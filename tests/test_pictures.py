"""Every picture is drawn from ordinary and from awkward results. How it looks, only eyes can check."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from purecnn import pictures


def drawn(path: Path) -> np.ndarray[Any, Any]:
    """The pixels of the only file in the folder: temporary files are gone."""
    assert list(path.parent.iterdir()) == [path]
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def rows(count: int) -> list[dict[str, Any]]:
    names = ("train_loss", "train_accuracy", "test_loss", "test_accuracy", "learning_rate")
    return [{"epoch": i + 1, **{name: 1 - math.exp(-i / 10) for name in names}} for i in range(count)]


@pytest.mark.parametrize("count", [1, 2, 30, 100])
def test_curves(tmp_path: Path, count: int) -> None:
    pictures.curves(rows(count), tmp_path / "new" / "curves.png")
    assert drawn(tmp_path / "new" / "curves.png").std() > 10


def test_curves_of_text_and_with_gaps(tmp_path: Path) -> None:
    text = [{name: str(value) for name, value in row.items()} for row in rows(5)]
    pictures.curves(rows(5), tmp_path / "a.png")
    expected = (tmp_path / "a.png").read_bytes()
    pictures.curves(text, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == expected
    text[2] |= {"test_loss": "nan", "test_accuracy": "", "train_loss": "inf"}
    pictures.curves(text, tmp_path / "a.png")
    for row in text:
        row["test_accuracy"] = ""
    pictures.curves(text, tmp_path / "a.png")
    drawn(tmp_path / "a.png")


@pytest.mark.parametrize("classes", [1, 2, 10, 20, 21, 120])
def test_confusion(tmp_path: Path, classes: int) -> None:
    matrix = torch.eye(classes, dtype=torch.int64) * 7
    names = [f"a class with quite a long name and a number, {i}" for i in range(classes)]
    pictures.confusion(matrix, names, tmp_path / "confusion.png")
    assert drawn(tmp_path / "confusion.png").std() > 10


def test_confusion_with_an_empty_class_and_with_nothing_at_all(tmp_path: Path) -> None:
    pictures.confusion([[3, 1], [0, 0]], ["$5", "$10 {^"], tmp_path / "confusion.png")
    pictures.confusion(np.zeros((2, 2)), ["ants", "bees"], tmp_path / "confusion.png")
    drawn(tmp_path / "confusion.png")


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "1", "P"])
@pytest.mark.parametrize("size", [(8, 8), (640, 200), (60, 400)])
def test_prediction(tmp_path: Path, mode: str, size: tuple[int, int]) -> None:
    answers = [("a name, a long name, " * 8, 0.9), ("$x_1$", 0.1), ("bee", 0.0)]
    pictures.prediction(Image.new(mode, size), answers, tmp_path / "answer.png")
    drawn(tmp_path / "answer.png")


def test_scripts_that_the_font_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Boxes and a warning, unless there is a font that has them."""
    monkeypatch.setattr(pictures, "_MORE_FONTS", ())
    with pytest.warns(UserWarning, match="missing from font"):
        pictures.confusion([[3, 1], [0, 2]], ["\ue000", "bees"], tmp_path / "x.png")
    monkeypatch.setattr(pictures, "_MORE_FONTS", ("STIXNonUnicode",))
    pictures.confusion([[3, 1], [0, 2]], ["\ue000", "bees"], tmp_path / "x.png")


def test_small_pictures_are_enlarged_with_sharp_pixels(tmp_path: Path) -> None:
    board = Image.fromarray((np.indices((8, 8)).sum(0) % 2 * 255).astype(np.uint8))
    pictures.prediction(board, [("chess", 1.0)], tmp_path / "answer.png")
    pixels = drawn(tmp_path / "answer.png")
    left = pixels[pixels.shape[0] // 4 : -pixels.shape[0] // 4, : pixels.shape[1] // 3, 0]
    assert np.isin(left, [0, 255]).mean() > 0.99
    assert 0.3 < (left == 0).mean() < 0.6


def test_the_picture_that_is_shown_is_not_changed(tmp_path: Path) -> None:
    image = Image.new("RGB", (3000, 2000))
    pictures.prediction(image, [("night", 1.0)], tmp_path / "answer.png")
    assert image.size == (3000, 2000)


def test_a_failure_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "curves.png"
    pictures.curves(rows(2), path)
    before = path.read_bytes()

    def half_written(_: Any, file: Path, **__: Any) -> None:
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("matplotlib.backends.backend_agg.FigureCanvasAgg.print_figure", half_written)
    with pytest.raises(OSError, match="disk full"):
        pictures.curves(rows(3), path)
    assert path.read_bytes() == before
    drawn(path)


def test_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no epochs"):
        pictures.curves([], tmp_path / "x.png")
    with pytest.raises(ValueError, match="no answers"):
        pictures.prediction(Image.new("L", (8, 8)), [], tmp_path / "x.png")
    for matrix, classes in ([[1]], ["a", "b"]), ([[1, 2]], ["a"]), (np.zeros((0, 0)), []):
        with pytest.raises(ValueError, match="cannot have shape"):
            pictures.confusion(matrix, classes, tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("trials", [1, 5])
def test_paired(tmp_path: Path, trials: int) -> None:
    values = {f"an arm that costs ${arm}": [50 + arm + i**2 / 9 for i in range(trials)] for arm in range(4)}
    pictures.paired(values, tmp_path / "paired.png")
    assert drawn(tmp_path / "paired.png").std() > 10


@pytest.mark.parametrize("values", [{}, {"a": [1.0]}, {"a": [1.0], "b": [1.0, 2.0]}, {"a": [], "b": []}])
def test_paired_of_what_is_no_pair(tmp_path: Path, values: dict[str, list[float]]) -> None:
    with pytest.raises(ValueError, match="at least two arms, each with the same number of trials"):
        pictures.paired(values, tmp_path / "paired.png")
