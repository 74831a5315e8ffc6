"""Results as PNG files: learning curves, confusion matrices, predictions, explanations, filters, paired trials.

They are drawn with matplotlib's objects: no window, no ``pyplot``, no global state. A file is written under another
name and then moved into place, so neither a killed run nor a viewer ever meets an incomplete picture.
"""

import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps, font_manager, rcParams
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from purecnn.files import replacing

__all__ = ["confusion", "curves", "explanations", "filters", "paired", "prediction"]

# Two of the colours of Okabe and Ito (https://jfly.uni-koeln.de/color/), distinct for colour-blind readers, too
_BLUE, _ORANGE = "#0072b2", "#d55e00"
_GREY = "#777777"

_MORE_FONTS = (
    *(
        f"Noto Sans {script}"
        for script in ("CJK JP", "CJK SC", "JP", "SC", "KR", "Arabic", "Hebrew", "Devanagari", "Thai")
    ),
    *("Hiragino Sans", "PingFang SC", "Apple SD Gothic Neo", "Arial Unicode MS"),
    *("Yu Gothic", "Microsoft YaHei", "Malgun Gothic", "WenQuanYi Zen Hei", "Droid Sans Fallback", "IPAGothic"),
)
"""Fonts for class names in scripts that matplotlib's own font lacks; those that are installed are used."""


def curves(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draws loss and accuracy over the epochs, for training and test data, and marks the best epoch.

    Args:
        rows: one mapping for each epoch, with ``epoch``, ``train_loss``, ``train_accuracy``, ``test_loss`` and
            ``test_accuracy``: numbers, or strings as ``csv.DictReader`` returns them. Accuracies are from 0 to 1. A
            value that is missing, empty or not finite leaves a gap.
        path: the PNG file to write.

    Raises:
        ValueError: if there are no rows.

    Example::

        with open("metrics.csv", newline="") as file:
            pictures.curves(list(csv.DictReader(file)), "curves.png")
    """
    if not rows:
        raise ValueError("no epochs to draw")
    epochs, scores, losses = (_column(rows, name) for name in ("epoch", "test_accuracy", "test_loss"))
    # The epoch with the highest accuracy; among equals, the one with the lowest loss.
    finite = np.flatnonzero(np.isfinite(scores))
    best = max(finite, key=lambda i: (scores[i], -np.nan_to_num(losses[i], nan=np.inf)), default=None)
    marker = "o" if len(rows) <= 30 else ""  # a single epoch has no line, and markers would hide a long one
    figure = _figure(10, 4.2)
    for axes, what in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for half, color, line in (("train", _BLUE, "--"), ("test", _ORANGE, "-")):
            values = _column(rows, f"{half}_{what}")
            axes.plot(epochs, values, color=color, linestyle=line, marker=marker, markersize=4, label=half)
        if best is not None:
            axes.axvline(epochs[best], color=_GREY, linestyle=":", linewidth=1.2, zorder=1)
        axes.set_title(what, loc="left", fontsize=13, fontweight="bold")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(color="#e4e4e4")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if what == "accuracy":
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
            if len(rows) == 1:  # otherwise the axis would span hundredths of a percent
                axes.set_ylim(0, 1)
            if best is not None:
                ring: dict[str, Any] = {"markersize": 11, "markeredgewidth": 1.8, "markerfacecolor": "none"}
                axes.plot(epochs[best], scores[best], "o", color=_ORANGE, **ring)
                text = f"best test: {_percent(scores[best])} at epoch {epochs[best]:g}"
                axes.set_title(text, loc="right", fontsize=11, color=_ORANGE)
        axes.legend(frameon=False, loc="best")
    _save(figure, path)


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> NDArray[np.float64]:
    values = np.array([math.nan if row.get(name) in (None, "") else float(row[name]) for row in rows])
    return np.where(np.isfinite(values), values, math.nan)


def confusion(matrix: ArrayLike, classes: Sequence[str], path: str | os.PathLike[str]) -> None:
    """Draws a confusion matrix: the colour is the share of the true class, and for up to 20 classes counts are written.

    For up to 20 classes, the recall of each class is written beside its row.

    Args:
        matrix: (classes, classes) counts; rows are the true classes, columns the predicted ones.
        classes: their names.
        path: the PNG file to write.

    Raises:
        ValueError: if the matrix is not square with one row for each class.

    Example::

        pictures.confusion([[9, 1], [0, 10]], ["ants", "bees"], "confusion.png")
    """
    counts = np.asarray(matrix, dtype=np.int64)
    n = len(classes)
    if n == 0 or counts.shape != (n, n):
        raise ValueError(f"a confusion matrix of {n} classes cannot have shape {counts.shape}")
    totals = counts.sum(axis=1)
    shares = counts / np.maximum(totals, 1)[:, None]
    right, total = int(counts.trace()), int(totals.sum())
    few = n <= 20

    side = min(max(0.5 * n, 1.6), 7.0)
    figure = _figure(side + 3.0, side + 2.0)
    axes = figure.subplots()
    shown = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest" if n <= 100 else "auto")
    ticks = range(0, n, math.ceil(n / 20))
    labels = [_fit(classes[tick], 24) for tick in ticks]
    level = max(map(len, labels)) * 0.1 <= side / len(ticks)  # about 0.1 inches per letter
    axes.set_xticks(ticks, labels)
    if not level:
        axes.tick_params(axis="x", labelrotation=45)
        for label in axes.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
    axes.set_yticks(ticks, labels)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.tick_params(length=0 if few else 3)
    axes.spines[:].set_color("#bbbbbb")
    if few:
        digits = len(str(counts.max()))
        for row, column in np.ndindex(n, n):
            if counts[row, column]:
                color = "white" if shares[row, column] > 0.55 else "#333333"
                size = min(11.0, 36 / digits)
                text = str(counts[row, column])
                axes.text(column, row, text, ha="center", va="center", color=color, fontsize=size)
        recalls = [f"{shares[row, row]:.0%}" if totals[row] else "none" for row in range(n)]
        right_axis = axes.secondary_yaxis("right")
        right_axis.set_yticks(ticks, recalls, color=_GREY)
        right_axis.tick_params(length=0)
        right_axis.spines[:].set_visible(False)
        right_axis.set_ylabel("recognised", color=_GREY)
    else:
        figure.colorbar(shown, ax=axes, shrink=0.8, format=PercentFormatter(1.0), label="share of the true class")
    share = f" ({_percent(right / total)})" if total else ""
    figure.suptitle(f"{right:,} of {total:,} right{share}", fontsize=13, fontweight="bold")
    _save(figure, path)


def paired(values: Mapping[str, Sequence[float]], path: str | os.PathLike[str]) -> None:
    """Draws the differences between the arms of an experiment and its first arm, in paired trials.

    A bar is the mean difference, its error bar one standard error to each side, and each dot is a trial.

    Args:
        values: for each arm, what was measured in each trial, such as accuracies in percent; the others are compared
            with the first arm.
        path: the PNG file to write.

    Raises:
        ValueError: if there are fewer than two arms, or they do not have the same number of trials.

    Example::

        pictures.paired({"plain": [57.0, 58.1], "boosted": [59.2, 60.0]}, "boosting.png")
    """
    names, lengths = list(values), {len(numbers) for numbers in values.values()}
    if len(names) < 2 or len(lengths) != 1 or 0 in lengths:
        raise ValueError("paired needs at least two arms, each with the same number of trials")
    base, *arms = names
    reference = np.asarray(values[base], dtype=np.float64)
    count = len(reference)
    figure = _figure(9, 0.6 * len(arms) + 1.6)
    axes = figure.subplots()
    for row, arm in enumerate(arms):
        gains = np.asarray(values[arm], dtype=np.float64) - reference
        error = gains.std(ddof=1) / math.sqrt(count) if count > 1 else None
        color = _BLUE if gains.mean() > 0 else _ORANGE
        axes.barh(row, gains.mean(), xerr=error, height=0.6, color=color, alpha=0.55, error_kw={"capsize": 4})
        axes.plot(gains, row + np.linspace(-0.2, 0.2, count + 2)[1:-1], "o", color=color, markersize=5)
    axes.axvline(0, color=_GREY, linewidth=1.2)
    axes.set_yticks(range(len(arms)), [f"{_fit(arm, 40)}: {np.mean(values[arm]):.1f}" for arm in arms])
    axes.invert_yaxis()
    axes.set_xlabel(f"difference to {_fit(base, 40)} ({reference.mean():.1f}), {count} paired trial{'s' * (count > 1)}")
    axes.grid(axis="x", color="#e4e4e4")
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    _save(figure, path)


def prediction(image: Image.Image, answers: Sequence[tuple[str, float]], path: str | os.PathLike[str]) -> None:
    """Draws a picture with the prediction above it and the most probable classes beside it.

    Args:
        image: the picture, of any size; small ones are enlarged with sharp pixels.
        answers: pairs (class name, probability), the most probable first.
        path: the PNG file to write.

    Raises:
        ValueError: if there are no answers.

    Example::

        pictures.prediction(data.read_image("ant.jpg"), [("ant", 0.87), ("bee", 0.13)], "answer.png")
    """
    if not answers:
        raise ValueError("no answers to draw")
    slots = max(5, len(answers))  # keeps few bars from becoming thick
    sharp = max(image.size) <= 128
    shown = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
    shown.thumbnail((1200, 1200))  # pixels that would not be drawn anyway cost seconds

    figure = _figure(10, 0.65 * slots + 1.4)
    left, bars = figure.subplots(1, 2, width_ratios=(1, 1))
    left.imshow(np.asarray(shown), cmap="gray", vmin=0, vmax=255, interpolation="nearest" if sharp else "auto")
    left.set_axis_off()

    for row, (name, probability) in enumerate(answers):
        color = _BLUE if row == 0 else "#9ab8cc"
        bars.barh(row, probability, height=0.34, color=color)
        bars.text(0, row - 0.26, _fit(name, 44), va="bottom", fontweight="bold" if row == 0 else "normal")
        bars.text(probability + 0.015, row, _percent(probability), va="center", fontsize=9, color="#444444")
    bars.set_xlim(0, 1.16)  # room for "100.0%"
    bars.set_ylim(slots - 0.5, -0.75)
    bars.set_axis_off()

    name, probability = answers[0]
    title = "\n".join(textwrap.wrap(f"{_fit(name, 110)}: {_percent(probability)}", 60))
    figure.suptitle(title, fontsize=15, fontweight="bold")
    _save(figure, path)


def explanations(
    rows: Sequence[tuple[Image.Image, str, Mapping[str, ArrayLike]]], path: str | os.PathLike[str]
) -> None:
    """Draws pictures, one per row, and beside each its heat maps over the darkened picture.

    The brightness of a map goes from 0 to its 99.5th percentile, so that single pixels do not dominate (Smilkov et al.
    2017, arXiv:1706.03825, section 3.1, cap outliers in the same way).

    Args:
        rows: tuples of a picture, its caption, and its heat maps by name: arrays (height, width), at least 0, of any
            resolution, which cover the whole picture.
        path: the PNG file to write.

    Raises:
        ValueError: if there are no rows, or a map is not an array with two axes.

    Example::

        pictures.explanations([(data.read_image("ant.jpg"), "ant: 98.6%", {"Grad-CAM": heat})], "why.png")
    """
    if not rows:
        raise ValueError("no explanations to draw")
    columns = 1 + max(len(maps) for _, _, maps in rows)
    figure = _figure(3.4 * columns, 3.7 * len(rows))
    for row, (image, caption, maps) in zip(figure.subplots(len(rows), columns, squeeze=False), rows, strict=True):
        shown = image.convert("RGB")
        shown.thumbnail((600, 600))
        sharp = max(shown.size) <= 128
        pixels = np.asarray(shown) / 255
        luma = pixels @ (0.299, 0.587, 0.114)
        for axes in row:
            axes.set_axis_off()
        row[0].imshow(pixels, interpolation="nearest" if sharp else "auto")
        row[0].set_title("\n".join(textwrap.wrap(_fit(caption, 60), 34)), fontsize=12, fontweight="bold")
        for axes, (name, heat) in zip(row[1:], maps.items(), strict=False):
            strength = _stretched(heat, shown.size)
            glow = colormaps["inferno"](strength)[..., :3]
            axes.imshow(np.maximum(glow, 0.45 * luma[..., None]), interpolation="nearest" if sharp else "auto")
            axes.set_title(name, fontsize=12)
    _save(figure, path)


def _stretched(heat: ArrayLike, size: tuple[int, int]) -> NDArray[np.float64]:
    """A heat map, resized to a picture's (width, height) and scaled to 0 to 1."""
    values = np.asarray(heat, dtype=np.float32)
    if values.ndim != 2:
        raise ValueError(f"a heat map has two axes, found shape {values.shape}")
    large = np.asarray(Image.fromarray(values).resize(size, Image.Resampling.BICUBIC), dtype=np.float64)
    top = np.percentile(large, 99.5)
    return np.clip(large / top, 0, 1) if top > 0 else np.zeros_like(large)


def filters(weight: ArrayLike, path: str | os.PathLike[str]) -> None:
    """Draws a convolution's filters as tiles, enlarged with sharp pixels, and in colour if they have three channels.

    Each tile has its own scale: its largest absolute value is black or white (in its colour channel), and zero is
    middle grey. For any other number of channels, each channel of each filter is a grey tile.

    Args:
        weight: (filters, channels, height, width).
        path: the PNG file to write.

    Raises:
        ValueError: if there are no filters, or the array does not have four axes.

    Example::

        pictures.filters(params["stem"]["conv1"]["weight"], "filters.png")
    """
    values = np.asarray(weight, dtype=np.float64)
    if values.ndim != 4 or values.size == 0:
        raise ValueError(f"filters have four axes (filters, channels, height, width), found shape {values.shape}")
    if values.shape[1] != 3:
        values = values.reshape(-1, 1, *values.shape[2:])
    largest = np.abs(values).max(axis=(1, 2, 3), keepdims=True)
    tiles = np.moveaxis(128 + 127 * values / np.where(largest > 0, largest, 1), 1, -1).round().astype(np.uint8)
    count, height, width, channels = tiles.shape
    columns = min(count, max(8, 2 * math.ceil(math.sqrt(count / 2))))  # about twice as wide as high
    zoom = max(1, min(12, round(80 / max(height, width)), 1100 // (columns * (width + 1))))
    gap = 4
    rows = math.ceil(count / columns)
    sheet = np.full((rows * (height * zoom + gap) + gap, columns * (width * zoom + gap) + gap, channels), 255, np.uint8)
    for i, tile in enumerate(tiles.repeat(zoom, axis=1).repeat(zoom, axis=2)):
        top, left = (gap + k * (side * zoom + gap) for k, side in zip(divmod(i, columns), (height, width), strict=True))
        sheet[top : top + height * zoom, left : left + width * zoom] = tile
    with replacing(path) as file:
        Image.fromarray(sheet.squeeze(-1) if channels == 1 else sheet).save(file, format="PNG")


def _figure(width: float, height: float) -> Figure:
    margin = 0.12
    layout = ConstrainedLayoutEngine(w_pad=margin, h_pad=margin, wspace=0.04)
    return Figure(figsize=(width, height), layout=layout)


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _fit(name: str, width: int) -> str:
    """Truncates a long name, and keeps matplotlib from interpreting dollar signs as formulas."""
    cut = name if len(name) <= width else name[: width - 1] + "…"
    return cut.replace("$", r"\$")


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    installed = set(font_manager.get_font_names())
    if more := [name for name in _MORE_FONTS if name in installed]:
        for text in figure.findobj(Text):
            text.set_fontfamily([*rcParams["font.family"], *more])
    with replacing(path) as file:
        # otherwise matplotlib writes its version into the file
        FigureCanvasAgg(figure).print_figure(file, format="png", dpi=130, metadata={"Software": None})
