"""Draw ``growth.png``: how time and memory of a training step grow, compared with torchvision.

    python docs/make_growth_picture.py

One network of each kind: plain (VGG), residual (ResNet), dense (DenseNet), depthwise (MobileNet v2), each with batch
normalisation. Times are medians of CPU time on one thread, measured alternately; memory is the peak of what tensors
made in a pass hold, counted operator by operator, so it is the same on every machine.
"""

import statistics
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.densenet import DenseNet
from torchvision.models.mobilenetv2 import MobileNetV2
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.vgg import VGG, make_layers

import purecnn
from converters import torchvision as tv
from purecnn import ensembles, tree
from purecnn.tree import Tree

Twin = tuple[purecnn.Model, Tree, Tree, nn.Module]
COLORS = {"VGG": "#0072b2", "ResNet": "#d55e00", "DenseNet": "#009e73", "MobileNet v2": "#cc79a7"}
BATCH, SIZE, DEPTH = 4, 64, 2
CLASSES = 10


def twin(kind: str, depth: int) -> Twin:
    """Our network and torchvision's, with ``depth`` layers or blocks in a stage (DenseNet: three times as many)."""
    module: nn.Module
    if kind == "VGG":
        widths = (64, 128, 256)
        layers = make_layers([width for w in widths for width in ([w] * depth + ["M"])], batch_norm=True)
        module = VGG(layers, CLASSES, dropout=0.0)
        model = purecnn.create("vgg11_bn", num_classes=CLASSES, widths=widths, depths=(depth,) * 3, dropout=0.0)
        # torchvision's first linear layer expects 512 channels.
        module.classifier[0] = nn.Linear(widths[-1] * 49, 4096)
    elif kind == "ResNet":
        module = ResNet(BasicBlock, [depth] * 4, CLASSES)
        model = purecnn.create("resnet18", num_classes=CLASSES, depths=(depth,) * 4)
    elif kind == "DenseNet":
        module = DenseNet(32, (3 * depth,) * 4, 64, num_classes=CLASSES)
        model = purecnn.create("densenet121", num_classes=CLASSES, depths=(3 * depth,) * 4)
    else:
        stages = ((1, 16, 1, 1), (6, 24, depth, 2), (6, 32, depth, 2), (6, 64, depth, 2), (6, 160, depth, 2))
        module = MobileNetV2(CLASSES, inverted_residual_setting=[list(stage) for stage in stages], dropout=0.0)
        model = purecnn.create("mobilenet_v2", num_classes=CLASSES, stages=stages, dropout=0.0)
    return model, *tv.from_state_dict(model, module.state_dict()), module.train()


def runs(kind: str, batch: int, size: int, depth: int, members: int = 1) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Functions that run ours and theirs: the gradient, or for several members their evaluation under ``vmap``."""
    model, params, state, module = twin(kind, depth)
    x, labels = torch.randn(batch, 3, size, size), torch.randint(CLASSES, (batch,))
    if members > 1:
        module.eval()
        trees = ensembles.stack([(params, state)] * members)
        stacked = stack_module_state([module] * members)

        def both(params: Any, buffers: Any) -> Any:
            return functional_call(module, (params, buffers), (x,))

        return (
            torch.no_grad()(lambda: vmap(lambda p, s: model.apply(p, s, x)[0])(*trees)),
            torch.no_grad()(lambda: vmap(both)(*stacked)),
        )
    leaves = {path: leaf.requires_grad_() for path, leaf in tree.flatten(params).items()}

    def ours() -> Any:
        logits, _ = model.apply(tree.unflatten(leaves), state, x, train=True)
        return torch.autograd.grad(F.cross_entropy(logits, labels), list(leaves.values()))

    def theirs() -> Any:
        return torch.autograd.grad(F.cross_entropy(module(x), labels), list(module.parameters()))

    return ours, theirs


class Memory(TorchDispatchMode):
    """Records the peak number of bytes held in storages that are made inside the context."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.held = 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {leaf.untyped_storage()._cdata for leaf in pytree.tree_leaves((args, kwargs)) if _is_tensor(leaf)}
        for leaf in filter(_is_tensor, pytree.tree_leaves(result)):
            place = leaf.untyped_storage()._cdata
            if place not in known and place not in self.sizes:
                self.sizes[place] = leaf.untyped_storage().nbytes()
                self.held += self.sizes[place]
                self.peak = max(self.peak, self.held)
                weakref.finalize(leaf.untyped_storage(), self.free, place)
        return result

    def free(self, place: int) -> None:
        self.held -= self.sizes.pop(place)


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)


def measure(kind: str, seconds: float, **where: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """Median milliseconds of ours and theirs, and peak megabytes of ours and theirs."""
    both = runs(kind, **{"batch": BATCH, "size": SIZE, "depth": DEPTH, **where})
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    for run in both:
        run()
    while time.perf_counter() < end or len(times[0]) < 3:
        for run, own in zip(both, times, strict=True):
            begin = time.process_time()
            run()
            own.append((time.process_time() - begin) * 1e3)
    peaks = []
    for run in both:
        with Memory() as memory:
            run()
        peaks.append(memory.peak / 2**20)
    return (statistics.median(times[0]), statistics.median(times[1])), (peaks[0], peaks[1])


AXES: dict[str, tuple[str, tuple[int, ...]]] = {
    "batch": ("images in the batch", (1, 2, 4, 8, 16)),
    "size": ("side of the images, pixels", (32, 64, 96, 128)),
    "depth": ("layers or blocks in a stage (DenseNet: thirds)", (1, 2, 3, 4)),
    "members": ("members of an ensemble, evaluation", (2, 4, 8)),
}


def main(seconds: float = 1.0) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    figure = Figure(figsize=(13, 6), layout="constrained")
    grid = figure.subplots(2, len(AXES), sharey="row")
    for column, (name, (label, values)) in enumerate(AXES.items()):
        for kind, color in COLORS.items():
            found = [measure(kind, seconds, **{name: value}) for value in values]
            for row in range(2):
                ours, theirs = zip(*(each[row] for each in found), strict=True)
                axes = grid[row][column]
                axes.plot(values, theirs, "--", color=color, linewidth=2.6, alpha=0.4)
                axes.plot(values, ours, "-o", color=color, linewidth=1.0, markersize=3.5, label=kind)
        for row, what in enumerate(("milliseconds, one thread", "megabytes at the most")):
            axes = grid[row][column]
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(values, [str(value) for value in values])
            axes.set_xticks([], minor=True)
            axes.grid(color="#ececec", which="major")
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            if column == 0:
                axes.set_ylabel(what)
        grid[1][column].set_xlabel(label)
    grid[0][0].legend(frameon=False, fontsize=8)
    figure.suptitle(
        f"Forward and backward pass, and torchvision's (dashed); else batch {BATCH}, {SIZE} pixels, depth {DEPTH}",
        x=0.01,
        ha="left",
        fontsize=11,
    )
    FigureCanvasAgg(figure).print_figure(Path(__file__).with_name("growth.png"), dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    main()
