"""A training run on one page: ``report.html``, which needs no other file and no internet connection."""

import base64
import html
import io
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from PIL import Image
from torch import Tensor

from purecnn import Model, data, pictures, tree
from purecnn.data import DataSet, Preprocessing
from purecnn.files import replacing
from purecnn.layer import Layer, Mode
from purecnn.layers import Convolution
from purecnn.training import Evaluation
from purecnn.tree import Tree

__all__ = ["Mistake", "first_filters", "mistakes", "write"]

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 66rem; margin: 2rem auto;
  padding: 0 1rem }
h1 { font-size: 1.7rem; margin-bottom: 0 } h2 { font-size: 1.25rem; margin: 2.5rem 0 .6rem }
p { margin: .3rem 0 } .quiet { color: #666 }
img { max-width: 100% } .sharp { image-rendering: pixelated }
table { border-collapse: collapse } th, td { text-align: left; vertical-align: top; padding: .15rem 1.2rem .15rem 0 }
th { font-weight: 600 } .number { text-align: right; font-variant-numeric: tabular-nums }
.bar { background: #e8eef2; width: 14rem; height: .8rem; margin-top: .35rem }
.bar div { background: #0072b2; height: 100% }
.facts { display: flex; flex-wrap: wrap; gap: .4rem 2.5rem; margin: 1.2rem 0 }
.facts b { display: block; font-size: 1.5rem; line-height: 1.2 }
.gallery { display: flex; flex-wrap: wrap; gap: 1.2rem 1rem }
figure { margin: 0; width: 9.5rem }
.gallery img { width: 9.5rem; height: 9.5rem; object-fit: contain; background: #f2f2f2 }
figcaption { font-size: .85rem; line-height: 1.35; overflow-wrap: anywhere }
.long { max-height: 30rem; overflow-y: auto } pre { background: #f4f4f4; padding: .7rem; white-space: pre-wrap;
  overflow-wrap: anywhere }
"""


class Mistake(NamedTuple):
    """An image that a network assigns to the wrong class."""

    image: Image.Image
    true: str
    predicted: str
    confidence: float
    """The probability of the predicted class, 0 to 1."""
    number: int
    """The image's index in the test split."""


def write(
    folder: Path,
    model: Model,
    params: Tree,
    state: Tree,
    dataset: DataSet,
    prepare: Preprocessing,
    rows: Sequence[Mapping[str, Any]],
    evaluation: Evaluation,
) -> None:
    """Write a run's ``report.html`` into its folder, which must contain the run's ``config.json``.

    Args:
        folder: the run's folder.
        model, params, state: the best network.
        dataset: the data set of the run; its test split is read once more to find the mistakes.
        prepare: the preprocessing of its images.
        rows: one row per epoch, as in ``metrics.csv``.
        evaluation: the best network's evaluation on the test split.
    """
    config = json.loads((folder / "config.json").read_text())
    title = f"{model.name} on {Path(dataset.name).name}"
    body = [
        f"<h1>{_escape(title)}</h1>",
        f"<p class=quiet>{_escape(model.paper.title)}, {model.paper.year}</p>",
        _facts(model, params, dataset, rows, evaluation),
        _section("Curves", _drawn(lambda path: pictures.curves(rows, path), "loss and accuracy over the epochs")),
        _section(
            "Confusion matrix",
            _drawn(lambda path: pictures.confusion(evaluation.confusion, dataset.classes, path), "confusion matrix"),
        ),
        _section("Accuracy of each class", _classes(dataset.classes, evaluation)),
        _section("Most confident mistakes", _gallery(mistakes(model, params, state, dataset, prepare))),
        _filters(first_filters(model, params, state)),
        _skipped(dataset),
        _section("Command", f"<pre>{_escape(config['command'])}</pre>"),
        _section("Configuration", "".join(_named_table(name, config[name]) for name in _CONFIGURATION)),
        _section("Environment", _table(config["versions"].items())),
    ]
    with replacing(folder / "report.html") as file:
        file.write_text(
            f"<!DOCTYPE html>\n<html lang=en><head><meta charset=utf-8><title>{_escape(title)}</title>"
            f'<meta name=viewport content="width=device-width"><style>{_STYLE}</style></head>\n<body>\n'
            + "\n".join(body)
            + "\n</body></html>\n",
            encoding="utf-8",
        )


_CONFIGURATION = ("options", "settings", "preprocessing", "augmentation")
"""The parts of ``config.json`` that say how the network was trained."""


_Row = TypeVar("_Row", bound=Mapping[str, Any])


def best_row(rows: Sequence[_Row]) -> _Row:
    """The row of the best epoch, chosen as `training.Fitted` does."""
    return max(rows, key=lambda row: (row["test_accuracy"], -row["test_loss"]))


def mistakes(
    model: Model, params: Tree, state: Tree, dataset: DataSet, prepare: Preprocessing, count: int = 24
) -> list[Mistake]:
    """The images of the test split that the network gets wrong, the most confident mistakes first."""
    device = tree.device(params)
    confidences, predictions, labels = [], [], []
    with torch.no_grad():
        for images, truth in data.batches(dataset.test, prepare.evaluation(), 64):
            logits = model.apply(params, state, images.to(device))[0].float()
            probabilities = model.probabilities(logits).cpu()
            confidence, prediction = probabilities.max(1)
            confidences.append(confidence)
            predictions.append(prediction)
            labels.append(truth)
    confidence, prediction, label = torch.cat(confidences), torch.cat(predictions), torch.cat(labels)
    wrong = (prediction != label).nonzero().flatten()
    order = wrong[confidence[wrong].argsort(descending=True, stable=True)][:count]
    names = dataset.classes
    return [
        Mistake(dataset.test[i][0], names[int(label[i])], names[int(prediction[i])], float(confidence[i]), i)
        for i in order.tolist()
    ]


def first_filters(model: Model, params: Tree, state: Tree) -> tuple[str, Tensor] | None:
    """Path and weights of the first convolution that the image reaches; None if the network has no convolution."""
    found: list[tuple[str, Tensor]] = []

    def around(layer: Layer, params: Tree, state: Tree, x: Any, mode: Mode) -> tuple[Any, Tree]:
        if isinstance(layer.kind, Convolution):
            found.append((mode.path, params["weight"]))
        return layer.apply(params, state, x, mode)

    device = tree.device(params)
    blank = torch.zeros(1, model.in_channels, model.image_size, model.image_size, device=device)
    with torch.no_grad():
        model.apply(params, state, blank, around=around)
    return found[0] if found else None


# Parts of the page -------------------------------------------------------------------------------------------


def _escape(value: Any) -> str:
    return html.escape(str(value))


def _section(title: str, body: str) -> str:
    return f"<section><h2>{_escape(title)}</h2>{body}</section>"


def _table(rows: Iterable[tuple[Any, Any]]) -> str:
    cells = (f"<tr><th>{_escape(name)}</th><td>{_escape(_plain(value))}</td></tr>" for name, value in rows)
    return f"<table>{''.join(cells)}</table>"


def _named_table(name: str, values: Mapping[str, Any]) -> str:
    return f"<h3>{_escape(name)}</h3>{_table(values.items())}" if values else ""


def _plain(value: Any) -> str:
    return "-" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _drawn(draw: Callable[[Path], None], alt: str) -> str:
    """An ``img`` element with the picture that ``draw`` writes into a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.png"
        draw(path)
        return _image(_uri(path.read_bytes(), "png"), alt)


def _image(uri: str, alt: str, sharp: bool = False) -> str:
    return f'<img src="{uri}" alt="{_escape(alt)}"{" class=sharp" if sharp else ""}>'


def _facts(
    model: Model, params: Tree, dataset: DataSet, rows: Sequence[Mapping[str, Any]], evaluation: Evaluation
) -> str:
    best = best_row(rows)
    facts = {
        "test accuracy": f"{evaluation.accuracy:.1%}",
        "test loss": f"{evaluation.loss:.3f}",
        "best epoch": f"{best['epoch']} of {len(rows)}",
        "training time": _duration(sum(row["seconds"] for row in rows)),
        "parameters": f"{tree.size(params):,}",
        "classes": f"{len(dataset.classes):,}",
        "training images, test images": f"{len(dataset.train):,}, {len(dataset.test):,}",
    }
    return f"<div class=facts>{''.join(f'<div><b>{value}</b>{name}</div>' for name, value in facts.items())}</div>"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _classes(names: Sequence[str], evaluation: Evaluation) -> str:
    """The accuracy of each class, from the worst to the best; classes without test images come last."""
    right, total = evaluation.confusion.diagonal().tolist(), evaluation.confusion.sum(1).tolist()
    shares = [found / count if count else 2.0 for found, count in zip(right, total, strict=True)]
    lines = []
    for i in sorted(range(len(names)), key=shares.__getitem__):
        share = f"{shares[i]:.1%}" if total[i] else "none"
        bar = f'<div class=bar><div style="width:{shares[i]:.1%}"></div></div>' if total[i] else ""
        lines.append(
            f"<tr><th>{_escape(names[i])}</th><td class=number>{share}</td><td>{bar}</td>"
            f"<td class=number>{right[i]:,} of {total[i]:,}</td></tr>"
        )
    return f"<div class=long><table>{''.join(lines)}</table></div>"


def _gallery(wrong: Sequence[Mistake]) -> str:
    if not wrong:
        return "<p>None: every image of the test split is classified correctly.</p>"
    figures = (
        f"<figure>{_thumbnail(each.image, f'test image {each.number}')}<figcaption><b>{_escape(each.predicted)}"
        f"</b> {each.confidence:.1%}<br>is {_escape(each.true)}<br><span class=quiet>image {each.number}</span>"
        f"</figcaption></figure>"
        for each in wrong
    )
    return f"<div class=gallery>{''.join(figures)}</div>"


def _thumbnail(image: Image.Image, alt: str) -> str:
    """Keep small images as they are, to be enlarged with sharp pixels; shrink larger ones to fit 300 x 300 pixels."""
    shown = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
    small = max(shown.size) <= 128
    shown.thumbnail((300, 300))
    content = io.BytesIO()
    shown.save(content, "PNG" if small else "JPEG", quality=85)
    return _image(_uri(content.getvalue(), "png" if small else "jpeg"), alt, sharp=small)


def _filters(found: tuple[str, Tensor] | None) -> str:
    if found is None:
        return ""
    path, weight = found
    shape = ", ".join(map(str, weight.shape))
    words = f"<p class=quiet>{_escape(path)}, shape ({shape}). Each filter has its own scale; zero is grey.</p>"
    drawn = _drawn(lambda file: pictures.filters(weight.cpu().numpy(), file), "first-layer filters")
    return _section("First-layer filters", words + drawn)


def _skipped(dataset: DataSet) -> str:
    if not dataset.skipped:
        return ""
    lines = "".join(f"<li>{_escape(path)}</li>" for path in dataset.skipped)
    return _section(f"Files that could not be read ({len(dataset.skipped)})", f"<ul class=long>{lines}</ul>")
