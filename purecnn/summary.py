"""What a network is made of: shapes, parameters and multiplications, layer by layer."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from purecnn import tree
from purecnn.layer import Layer, Mode
from purecnn.model import Model
from purecnn.tree import Tree


@dataclass(frozen=True, slots=True)
class Row:
    """One named layer, with all layers inside it."""

    path: str
    """Empty for the whole network."""
    output: tuple[int, ...]
    """Shape of what it gives for one image, without the batch: channels, height, width."""
    parameters: int
    macs: int
    """Multiplications of convolutions and linear layers for one image; auxiliary heads do not count."""


def summarize(model: Model, image_size: int | None = None) -> list[Row]:
    """The whole network first, then every named layer as it ends: stem, stages, head and what is in them.

    Nothing is computed but shapes.

    Args:
        model: the network.
        image_size: side of the image, pixels; by default the model's.

    Raises:
        RuntimeError: if the image is too small for the network.

    >>> import purecnn
    >>> summarize(purecnn.create("lenet5"))[0]
    Row(path='', output=(10,), parameters=61706, macs=416520)
    """
    size = image_size or model.image_size
    params, state = model.spec()
    ends: list[tuple[str, tuple[int, ...] | None, int]] = []
    """Of each layer, and of each tensor's user without a name of its own, which then has no shape."""
    with FlopCounterMode(display=False) as counter:

        def tap(path: str, x: Any, y: Tensor) -> Tensor:
            ends.append((path, tuple(y.shape[1:]), counter.get_total_flops()))
            return y

        def around(layer: Layer, params: Tree, state: Tree, x: Any, mode: Mode) -> tuple[Any, Tree]:
            y, after = layer.apply(params, state, x, mode)
            ends.append((mode.path, None, counter.get_total_flops()))
            return y, after

        x = torch.empty(1, model.in_channels, size, size, device="meta")
        y, _ = model.apply(params, state, x, tap=tap, around=around)
        total = counter.get_total_flops()

    rows = [Row("", tuple(y.shape[1:]), tree.size(params), total // 2)]
    for i, (path, shape, flops) in enumerate(ends):
        if shape is None:
            continue
        # A layer's own layers end just before it does: what ended before them is what it began from.
        before = next((f for other, _, f in reversed(ends[:i]) if not f"{other}.".startswith(f"{path}.")), 0)
        rows.append(Row(path, shape, tree.size(_inside(params, path)), (flops - before) // 2))
    return rows


def _inside(params: Tree, path: str) -> Tree:
    for name in path.split("."):
        params = params.get(name, {})
    return params
