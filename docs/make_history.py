"""Fill in the tables of ``history.md`` from the code, and draw ``timeline.png``."""

import re
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import purecnn
from converters.cli import timeline
from purecnn.paper import Group

PAGE = Path(__file__).with_name("history.md")
TABLE = re.compile(r"(<!-- (\d{4}) -->\n).*?(<!-- end -->)", re.DOTALL)
HEAD = "| groups | network | parameters | published, % | on | source |\n|---|---|---:|---|---|---|\n"

SURVEY, OURS = "#0072b2", "#d55e00"
"""Two colours that colour-blind readers can tell apart."""
NAMED = {
    "alexnet_2012": (8, -3), "zfnetb": (9, -3), "vgg19": (10, -4), "alexnet": (8, -3), "bn_inception": (8, -3),
    "inception_v3": (7, 5), "resnet152": (8, -7), "squeezenet1_0": (8, -3), "densenet161": (10, -11),
    "xception": (12, -4), "polynet": (10, 3), "mobilenet_v1": (8, -3), "senet154": (10, -10),
    "nasnet_a_large": (-10, 11), "mobilenet_v2": (8, -3), "cbam_resnet50": (8, -4), "mnasnet_a1": (8, -4),
    "shufflenet_v2_x1_0": (8, -3), "efficientnet_b7": (9, -4), "mobilenet_v3_large": (8, -4),
    "regnet_y_32gf": (11, -3), "resnest101": (9, -3), "amoebanet_d": (10, -2),
    "efficientnet_v2_l": (-40, 12), "convnext_large": (13, -3),
}  # fmt: skip


def line(row: Mapping[str, Any]) -> str:
    """A network's row in the table of its year."""
    star = "" if row["in_survey"] else " *"
    result = row["published"] or {"metric": "", "data": "", "source": ""}
    score = f"{result['value']} {result['metric']}" if row["published"] else ""
    cells = (
        ", ".join(row["groups"]),
        f"`{row['name']}`{star}",
        f"{row['parameters']:,}",
        score,
        result["data"],
        result["source"],
    )
    return f"| {' | '.join(cells)} |\n"


def filled(page: str, rows: Iterable[Mapping[str, Any]]) -> str:
    """The page with its tables filled in.

    Raises:
        ValueError: if a year of the history has no place in the page.
    """
    years = {year: "".join(map(line, part)) for year, part in groupby(rows, key=lambda row: str(row["year"]))}
    if missing := years.keys() - {year for _, year, _ in TABLE.findall(page)}:
        raise ValueError(f"the page has no table for {', '.join(sorted(missing))}")
    return TABLE.sub(lambda found: f"{found[1]}\n{HEAD}{years[found[2]]}\n{found[3]}", page)


def accuracy(row: Mapping[str, Any]) -> float | None:
    """The published top-1 accuracy on ImageNet in percent; None if another result was published."""
    result = row["published"]
    if result is None or result["data"] != "ImageNet" or not result["metric"].startswith("top-1"):
        return None
    return 100 - result["value"] if result["metric"].endswith("error") else result["value"]


def draw(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Draw accuracy by year; the area of a point is proportional to the number of parameters."""
    figure = Figure(figsize=(10, 5.4), layout="constrained")
    axes = figure.subplots()
    # Leave out SWAG's weights, which were trained on billions of additional images.
    scored = [(row, score) for row in rows if (score := accuracy(row)) and "SWAG" not in row["published"]["source"]]
    for in_survey, colour, label in ((True, SURVEY, "groups of the survey"), (False, OURS, "groups of our own")):
        part = [(row, score) for row, score in scored if Group(row["groups"][0]).in_survey == in_survey]
        years, scores = [row["year"] for row, _ in part], [score for _, score in part]
        areas = [row["parameters"] / 4e5 for row, _ in part]
        axes.scatter(years, scores, areas, color=colour, alpha=0.4, linewidths=0, label=label)
        axes.scatter(years, scores, 5, color=colour, linewidths=0)
    for row, score in scored:
        if row["name"] in NAMED:
            place = {"xytext": NAMED[row["name"]], "textcoords": "offset points"}
            axes.annotate(row["name"], (row["year"], score), fontsize=8, color="#333333", **place)
    axes.set_xlim(2011.5, 2023.4)
    axes.set_xticks(range(2012, 2023))
    axes.set_ylabel("ImageNet top-1 accuracy as published, %")
    axes.grid(color="#ececec")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    legend = axes.legend(frameon=False, loc="lower right")
    for handle in legend.legend_handles:
        handle.set_sizes([60])
    axes.set_title("Accuracy by year; a point's area is its parameters", loc="left", fontsize=12)
    FigureCanvasAgg(figure).print_figure(path, dpi=110, metadata={"Software": None})


def main() -> None:
    rows = timeline(purecnn.list_models())
    PAGE.write_text(filled(PAGE.read_text(), rows))
    draw(rows, PAGE.with_name("timeline.png"))


if __name__ == "__main__":
    main()
