"""Rows as ``docs/races.png``: every ratio, as it was measured last."""

from collections.abc import Iterable
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tests.benchmarks.race import Row

MET, MISSED, NONE = "#0072b2", "#d55e00", "#999999"
PICTURE = Path(__file__).parents[2] / "docs" / "races.png"


def latest(rows: Iterable[Row]) -> list[Row]:
    """One row for each comparison, the newest."""
    found: dict[tuple[str, str, str], Row] = {}
    for row in sorted(rows, key=lambda row: row.date):
        if row.ratio is not None:
            found[row.race, row.what, row.peer] = row
    return list(found.values())


def draw(rows: Iterable[Row], file: Path = PICTURE) -> None:
    """A strip for each race and peer, a point for each comparison."""
    rows = latest(rows)
    strips = sorted({(row.race, row.peer) for row in rows}, key=lambda strip: (strip[0], strip[1].lower()))
    figure = Figure(figsize=(10, 0.3 * len(strips) + 1.6), layout="constrained")
    axes = figure.subplots()
    axes.axvline(1, color="#333333", linewidth=0.8)
    for color, label in ((MET, "goal met"), (MISSED, "goal missed"), (NONE, "no goal set")):
        axes.plot([], [], "o", color=color, markersize=6, markeredgewidth=0, label=label)
    for y, (race, peer) in enumerate(strips):
        for row in rows:
            if (row.race, row.peer) == (race, peer) and row.ratio is not None:
                color = NONE if row.goal is None else MET if row.ratio <= row.goal else MISSED
                axes.plot(row.ratio, y, "o", color=color, markersize=6, markeredgewidth=0, alpha=0.6)
        if y and strips[y - 1][0] != race:
            axes.axhline(y - 0.5, color="#cccccc", linewidth=0.8)
    axes.set_yticks(range(len(strips)), [f"{race}  {peer}" for race, peer in strips], fontsize=9)
    axes.set_ylim(len(strips) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.set_xticks([0.1, 0.2, 0.5, 1, 2, 5], ["0.1", "0.2", "0.5", "1", "2", "5"])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("our time / theirs, one comparison a point: to the left we are faster")
    axes.grid(color="#ececec", axis="x")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=9)
    FigureCanvasAgg(figure).print_figure(file, dpi=100, metadata={"Software": None})
