"""Summaries of networks: output shapes, parameters and multiplications, layer by layer."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from purecnn import tree
from purecnn.layer import Layer, Mode
from purecnn.layers import Normalization
from purecnn.model import Model
from purecnn.tree import Tree


@dataclass(frozen=True, slots=True)
class Row:
    """One named layer, with all layers inside it."""

    path: str
    """Empty for the whole network."""
    output: tuple[int, ...]
    """Shape of its output for one image, without the batch axis: channels, height, width."""
    parameters: int
    macs: int
    """Multiplications in convolutions and linear layers for one image; auxiliary heads do not count."""


def summarize(model: Model, image_size: int | None = None) -> list[Row]:
    """One row for the whole network, then one for each named layer (stem, stages, head and their parts) as it ends.

    Only shapes are computed.

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
    # Path, output shape and operations so far, of each named layer; and with None for the shape, of each layer that has
    # tensors, which may have no name.
    ends: list[tuple[str, tuple[int, ...] | None, int]] = []
    with _Counter() as counter:

        def tap(path: str, x: Any, y: Tensor) -> Tensor:
            ends.append((path, tuple(y.shape[1:]), counter.flops))
            return y

        def around(layer: Layer, params: Tree, state: Tree, x: Any, mode: Mode) -> tuple[Any, Tree]:
            if isinstance(layer.kind, Normalization):  # it multiplies, too, but torch's formulas do not count that
                return x, state
            y, after = layer.apply(params, state, x, mode)
            ends.append((mode.path, None, counter.flops))
            return y, after

        x = torch.empty(1, model.in_channels, size, size, device="meta")
        y, _ = model.apply(params, state, x, tap=tap, around=around)
        total = counter.flops

    rows = [Row("", tuple(y.shape[1:]), tree.size(params), total // 2)]
    for i, (path, shape, flops) in enumerate(ends):
        if shape is None:
            continue
        # The layers inside a layer end just before it does, so it started at the count of the last one outside of it.
        before = next((f for other, _, f in reversed(ends[:i]) if not f"{other}.".startswith(f"{path}.")), 0)
        rows.append(Row(path, shape, tree.size(_inside(params, path)), (flops - before) // 2))
    return rows


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts by torch's formulas. ``FlopCounterMode`` also tries to decompose each operator, which doubles the time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        return result


def _inside(params: Tree, path: str) -> Tree:
    for name in path.split("."):
        params = params.get(name, {})
    return params
