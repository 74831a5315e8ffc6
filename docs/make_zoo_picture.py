"""Draw ``zoo.png``: ImageNet accuracy as published by torchvision, against the number of multiplications."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torchvision.models import get_model_weights

import purecnn
from converters import torchvision as tv
from purecnn.model import find
from purecnn.summary import summarize

ACCENT = "#0072b2"
NAMED = {
    "alexnet": (6, -3), "vgg16": (6, -3), "googlenet": (-6, 6), "inception_v3": (6, 5), "resnet50": (4, -11),
    "squeezenet1_1": (0, 7), "densenet121": (-4, 6), "mobilenet_v2": (-6, -11), "shufflenet_v2_x1_0": (6, -8),
    "mnasnet1_0": (-48, 4), "mobilenet_v3_large": (-72, 5), "efficientnet_b0": (-60, 6), "efficientnet_b7": (-34, 9),
    "efficientnet_v2_s": (-40, 9), "regnet_y_16gf": (6, -10), "convnext_tiny": (-62, 6),
    "wide_resnet50_2": (6, -9), "efficientnet_v2_l": (-20, 8),
}  # fmt: skip


def main() -> None:
    figure = Figure(figsize=(10, 5.4), layout="constrained")
    axes = figure.subplots()
    names = [name for name in purecnn.list_models() if tv.has(purecnn.create(name))]
    families: dict[str, list[tuple[float, float, str]]] = {}
    for name in names:
        # Leave out SWAG's weights, which were trained on billions of additional images; regnet_y_128gf has only these.
        weights = [entry for entry in get_model_weights(name) if "SWAG" not in entry.name and tv.accuracies(entry)]
        if not weights:
            continue
        entry = max(weights, key=lambda entry: tv.accuracies(entry)["acc@1"])
        macs = summarize(purecnn.create(name), tv.preprocessing(entry).size)[0].macs / 1e9
        paper = find(name).paper
        label = f"{paper.title} ({paper.year})"
        families.setdefault(label, []).append((macs, tv.accuracies(entry)["acc@1"], name))
    for points in families.values():
        points.sort()
        macs, accuracies, _ = zip(*points, strict=True)
        axes.plot(macs, accuracies, "-o", color=ACCENT, linewidth=0.8, alpha=0.55, markersize=5, markeredgewidth=0)
        for x, y, name in points:
            if name in NAMED:
                axes.annotate(name, (x, y), NAMED[name], textcoords="offset points", fontsize=8, color="#333333")
    axes.set_xscale("log")
    axes.set_xticks([0.1, 0.3, 1, 3, 10, 30, 100], ["0.1", "0.3", "1", "3", "10", "30", "100"])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("billions of multiplications for one image")
    axes.set_ylabel("ImageNet top-1 accuracy, %")
    axes.grid(color="#ececec")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    count = sum(map(len, families.values()))
    axes.set_title(f"{count} networks of {len(families)} papers, 2014 to 2022", loc="left", fontsize=12)
    FigureCanvasAgg(figure).print_figure(Path(__file__).with_name("zoo.png"), dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
