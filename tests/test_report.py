"""A run's page: whole, self-contained, and right about what it shows. How it looks, only eyes can check."""

import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import purecnn
from converters import report
from purecnn import data, pictures, random, training, tree
from purecnn.data import DataSet, Preprocessing

CLASSES = ("<b>ants</b>", "bees & co", "$x_1$", "none")
ROWS = [
    {"epoch": 1, "train_loss": 2.0, "train_accuracy": 0.5, "test_loss": 1.0, "test_accuracy": 0.6, "seconds": 31.0},
    {"epoch": 2, "train_loss": 1.0, "train_accuracy": 0.7, "test_loss": 0.9, "test_accuracy": 0.5, "seconds": 32.0},
]


class Page(HTMLParser):
    """Text, pictures and structure of a page."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.titles: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.names: set[str] = set()
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.names.add(tag)
        assert "href" not in values
        if tag == "img":
            self.images.append(values)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "h2":
            self.titles.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data
        if "h2" in self.open:
            self.titles[-1] += data


def picture(values: dict[str, str | None]) -> Image.Image:
    assert values["alt"]
    kind, content = (values["src"] or "").removeprefix("data:image/").split(";base64,")
    image = Image.open(io.BytesIO(base64.b64decode(content, validate=True)))
    image.load()
    assert image.format == kind.upper()
    return image


class Pictures:
    """Noise, of the first three classes."""

    def __init__(self, count: int, mode: str, size: tuple[int, int]) -> None:
        self.count, self.mode, self.size = count, mode, size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        noise = np.random.default_rng(index).integers(0, 256, (*self.size, 3), dtype=np.uint8)
        return Image.fromarray(noise).convert(self.mode), index % 3


def run(folder: Path, channels: int = 1, size: tuple[int, int] = (32, 32)) -> tuple[Any, ...]:
    """What a run hands over to its page."""
    folder.mkdir(exist_ok=True)
    model = purecnn.create("lenet5", num_classes=4, in_channels=channels)
    params, state = model.init(random.key(0))
    params["head"]["linear"]["weight"] = 20 * params["head"]["linear"]["weight"]
    prepare = Preprocessing(size=32, channels=channels, resize=32, mean=(0.5,) * channels, std=(0.5,) * channels)
    half = Pictures(40, "L" if channels == 1 else "RGB", size)
    dataset = DataSet("<data>", CLASSES, half, half, prepare, data.Augmentation(), (Path("a<b>.gif"),))
    config = {
        "command": "purecnn train lenet5 --data '<data>'",
        "options": {"model": "lenet5", "epochs": 2, "source": None, "root": "<script>alert(1)</script>"},
        "settings": dict(model.settings),
        "preprocessing": prepare.to_dict(),
        "augmentation": {},
        "versions": {"purecnn": purecnn.__version__, "torch": torch.__version__},
    }
    (folder / "config.json").write_text(json.dumps(config))
    found = training.evaluate(model, params, state, data.batches(half, prepare.evaluation(), 64))
    return folder, model, params, state, dataset, prepare, ROWS, found


def written(*parts: Any) -> Page:
    report.write(*parts)
    assert sorted(path.name for path in parts[0].iterdir()) == ["config.json", "report.html"]
    return Page((parts[0] / "report.html").read_text(encoding="utf-8"))


SECTIONS = [
    "Curves",
    "Confusion matrix",
    "Accuracy of each class",
    "Most confident mistakes",
    "First-layer filters",
    "Files that could not be read (1)",
    "Command",
    "Configuration",
    "Environment",
]


@pytest.mark.parametrize(("channels", "size"), [(1, (32, 32)), (3, (200, 300))])
def test_a_page_holds_all_parts_and_no_link(tmp_path: Path, channels: int, size: tuple[int, int]) -> None:
    parts = run(tmp_path, channels, size)
    page = written(*parts)
    assert page.titles == SECTIONS
    wrong = 40 - int(parts[-1].confusion.diagonal().sum())
    shown = [picture(values) for values in page.images]
    assert len(shown) == 2 + min(wrong, 24) + 1
    assert all(image.size == size[::-1] for image in shown[2:-1])
    assert {image.format for image in shown[2:-1]} == ({"PNG"} if channels == 1 else {"JPEG"})
    assert {values.get("class") for values in page.images[2:-1]} == ({"sharp"} if channels == 1 else {None})
    assert shown[-1].mode == ("L" if channels == 1 else "RGB")
    for words in ("lenet5 on <data>", "1 of 2", "1 min 3 s", f"{parts[-1].accuracy:.1%}", "61,", "a<b>.gif"):
        assert words in page.text
    for words in ("purecnn train lenet5 --data '<data>'", "<script>alert(1)</script>", torch.__version__):
        assert words in page.text
    assert not page.names & {"script", "link", "iframe", "b>ants"}
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "http" not in text
    assert "url(" not in text
    assert "<b>ants" not in text


def test_classes_come_from_the_worst_to_the_best(tmp_path: Path) -> None:
    *parts, _ = run(tmp_path)
    confusion = torch.tensor([[9, 1, 0, 0], [5, 5, 0, 0], [0, 0, 10, 0], [0, 0, 0, 0]])
    text = written(*parts, training.Evaluation(0.5, 0.8, confusion)).text
    part = text[text.index("Accuracy of each class") : text.index("Most confident mistakes")]
    places = [part.index(words) for words in ("bees & co50.0%5 of 10", "ants</b>90.0%", "$x_1$100.0%", "none0 of 0")]
    assert places == sorted(places)


def test_mistakes_are_the_most_confident_ones(tmp_path: Path) -> None:
    _, model, params, state, dataset, prepare, _, _ = run(tmp_path)
    found = report.mistakes(model, params, state, dataset, prepare, 5)
    images = torch.stack([prepare.evaluation()(dataset.test[i][0]) for i in range(40)])
    probabilities = model.apply(params, state, images)[0].softmax(1)
    labels = torch.arange(40) % 3
    wrong = probabilities.argmax(1) != labels
    expected = probabilities.max(1).values[wrong].sort(descending=True).values[:5]
    assert [each.confidence for each in found] == pytest.approx(expected.tolist(), abs=1e-5)
    for each in found:
        assert each.true == CLASSES[each.number % 3]
        assert each.predicted == CLASSES[int(probabilities[each.number].argmax())]
        assert np.array_equal(np.asarray(each.image), np.asarray(dataset.test[each.number][0]))


def test_a_network_that_errs_nowhere(tmp_path: Path) -> None:
    folder, model, params, state, dataset, *rest = run(tmp_path)
    params = tree.map(torch.zeros_like, params)  # the first class always
    half = Pictures(1, "L", (32, 32))
    dataset = DataSet("one", CLASSES, half, half, dataset.preprocessing, dataset.augmentation)
    page = written(folder, model, params, state, dataset, *rest)
    assert "every image of the test split is classified correctly" in page.text
    assert [title for title in SECTIONS if "Files" not in title] == page.titles
    assert len(page.images) == 3


def test_the_first_filters_are_those_that_see_the_picture() -> None:
    for name, path in (("resnet20_cifar", "stem"), ("lenet5", "stem")):
        model = purecnn.create(name)
        params, state = model.init(random.key(0))
        # In another order, as from a file.
        shuffled = tree.unflatten(dict(sorted(tree.flatten(params).items())))
        found = report.first_filters(model, shuffled, state)
        assert found is not None
        assert found[0].startswith(path)
        assert torch.equal(found[1], tree.flatten(params)[f"{found[0]}.weight"])
    model = purecnn.create("lecun1989")
    assert report.first_filters(model, *model.init(random.key(0))) is None


@pytest.mark.parametrize("shape", [(6, 1, 5, 5), (64, 3, 7, 7), (96, 3, 11, 11), (5, 24, 3, 3), (1, 3, 1, 1)])
def test_filters(tmp_path: Path, shape: tuple[int, ...]) -> None:
    pictures.filters(torch.randn(shape, generator=torch.Generator().manual_seed(0)), tmp_path / "filters.png")
    assert list(tmp_path.iterdir()) == [tmp_path / "filters.png"]
    with Image.open(tmp_path / "filters.png") as image:
        assert image.mode == ("RGB" if shape[1] == 3 else "L")
        assert max(image.size) <= 1200


def test_filters_are_stretched_and_zero_is_grey(tmp_path: Path) -> None:
    weight = np.zeros((2, 1, 1, 2))
    weight[0, 0, 0] = 0.01, -0.005
    pictures.filters(weight, tmp_path / "filters.png")
    with Image.open(tmp_path / "filters.png") as image:
        assert set(np.unique(np.asarray(image))) == {255, 64, 128}
    for wrong in (np.zeros((3, 3)), np.zeros((0, 3, 3, 3))):
        with pytest.raises(ValueError, match="filters have four axes"):
            pictures.filters(wrong, tmp_path / "x.png")
