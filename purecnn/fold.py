"""Folding of batch normalisation into the convolutions before it: the same function in evaluation, in fewer passes.

    folded, params, state = fold(model, params, state)
    logits, _ = folded.apply(params, state, images)

With running statistics a normalisation is ``scale * x + shift`` for each channel, so the convolution before it can do
the same: ``scale * (w * x + b) + shift = (scale w) * x + (scale b + shift)`` (Jacob et al. 2017, arXiv:1712.05877,
section 3.2). A run on meta tensors shows which convolution's output goes to one normalisation and nowhere else, so no
knowledge of architectures is needed. `pack` then has oneDNN reorder the weights once, instead of in every call.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from purecnn import tree
from purecnn.eager import is_transformed
from purecnn.layer import Layer, Mode
from purecnn.layers import Convolution, has_statistics
from purecnn.model import Model
from purecnn.tree import Tree

__all__ = ["fold", "pack"]

_reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight  # torch's stub lacks an argument

# An alias, because the compiler cannot subscript types in nested functions.
_After: TypeAlias = tuple[Any, Tree]


def fold(model: Model, params: Tree, state: Tree) -> tuple[Model, Tree, Tree]:
    """Fold the batch normalisations that directly follow a convolution into that convolution, for faster evaluation.

    Other normalisations stay as they are: those after a sum, a concatenation or an activation (the first of a
    pre-activation block or a dense layer), and those after a convolution whose output something else reads, too.
    Auxiliary heads also stay as they are, since evaluation does not run them.

    Args:
        model, params, state: the network, with the running statistics to fold; they are not changed.

    Returns:
        The model to run the result with; its parameters, in which convolutions have a new weight and bias and the
        folded normalisations are missing; and the statistics of the normalisations that stay. Parameters and statistics
        are differentiable functions of ``params`` and ``state``. The logits in evaluation are equal up to rounding; the
        scale is computed in float64. Training the result needs ``statistics="running"``.

    Raises:
        ValueError: when the result is run with batch statistics.

    >>> import purecnn
    >>> model = purecnn.create("resnet18")
    >>> params, state = model.init(purecnn.random.key(0))
    >>> folded, fewer, none = fold(model, params, state)
    >>> sorted(fewer["stem"]), sorted(fewer["stem"]["conv"]), none
    (['conv'], ['bias', 'weight'], {})
    >>> x = torch.ones(1, 3, 64, 64)
    >>> torch.allclose(folded.apply(fewer, none, x)[0], model.apply(params, state, x)[0], rtol=1e-4, atol=1e-4)
    True
    """
    leaves, statistics = tree.flatten(params), tree.flatten(state)
    pairs = _pairs(model, params, state)
    for convolution, norm in pairs:
        scale, shift = _affine(norm, leaves, statistics)
        path = convolution.params["weight"]
        bias_path = f"{path.removesuffix('weight')}bias"
        weight, bias = leaves[path], leaves.get(bias_path)
        leaves[path] = (weight.double() * rearrange(scale, "c -> c 1 1 1")).to(weight.dtype)
        leaves[bias_path] = (shift if bias is None else bias.double() * scale + shift).to(weight.dtype)
        for path in norm.params.values():
            del leaves[path]
        for path in norm.state.values():
            del statistics[path]
    folded = {norm.path for _, norm in pairs}

    def without(layer: Layer, params: Tree, state: Tree, x: Any, mode: Mode) -> Any:
        if mode.path not in folded or not has_statistics(layer) or "mean" in state:
            return None
        if mode.batch_statistics:
            raise ValueError(
                'a folded network has no batch statistics: train it before folding, or with statistics="running"'
            )
        return x

    return _instead(model, without), tree.unflatten(leaves), tree.unflatten(statistics)


def pack(model: Model, params: Tree, state: Tree, images: Tensor) -> tuple[Model, Tree]:
    """Store the convolutions' weights in oneDNN's own layout, as ``torch.compile`` with freezing does, for a CPU.

    PyTorch's convolution reorders the weight in each call, and does not use oneDNN for some convolutions, such as those
    of one pixel on one thread. The result computes the same up to rounding, for inference only: it has no derivatives
    and cannot be saved.

    Args:
        model, params, state: the network, best after `fold`.
        images: a batch of the size that will be used; the layout is chosen for it, but other sizes work, too.

    Returns:
        The model to run the result with, and its parameters, in which packed weights are opaque tensors.

    Raises:
        ValueError: if torch has no oneDNN, or the parameters are not on the CPU.

    >>> import purecnn
    >>> model = purecnn.create("resnet18")
    >>> params, state = model.init(purecnn.random.key(0))
    >>> x = torch.ones(1, 3, 64, 64)
    >>> packed, own = pack(model, params, state, x)
    >>> torch.allclose(packed.apply(own, state, x)[0], model.apply(params, state, x)[0], rtol=1e-4, atol=1e-4)
    True
    """
    leaves = tree.flatten(params)
    if not torch._C._has_mkldnn or not all(leaf.is_cpu for leaf in leaves.values()):
        raise ValueError("packing weights needs parameters on the CPU, and a build of torch with oneDNN")
    places = {id(leaf): path for path, leaf in leaves.items()}

    def around(layer: Layer, params: Tree, state: Tree, x: Any, mode: Mode) -> _After:
        kind = layer.kind
        if isinstance(kind, Convolution) and (path := places.get(id(params["weight"]))) is not None:
            weight = params["weight"].detach().to_mkldnn()
            strides, dilations = [kind.stride] * 2, [kind.dilation] * 2
            leaves[path] = _reorder(weight, list(kind.padding), strides, dilations, kind.groups, list(x.shape))
        return layer.apply(params, state, x, mode)

    with torch.no_grad():
        model.apply(params, state, images, around=around)
    return _instead(model, _with_packed_weight), tree.unflatten(leaves)


class _Run(NamedTuple):
    """One run of a layer that has its own tensors."""

    layer: Layer
    path: str
    params: dict[str, str]
    """Its parameters' paths in the whole tree, by name. A layer may use those of another layer."""
    state: dict[str, str]
    x: Any
    y: Any


class _Uses(TorchFunctionMode):
    """Records which run reads which tensor; None stands for everything that happens between the runs."""

    def __init__(self) -> None:
        super().__init__()
        self.running: int | None = None
        self.readers: dict[int, set[int | None]] = {}
        self._kept: list[Tensor] = []  # while a tensor is alive, no other tensor has its id

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") != "__get__":  # getting an attribute, such as the shape, is not reading
            self.read((args, kwargs))
        return func(*args, **(kwargs or {}))

    def read(self, values: Any) -> None:
        for leaf in pytree.tree_leaves(values):
            if isinstance(leaf, Tensor):
                self.readers.setdefault(id(leaf), set()).add(self.running)
                self._kept.append(leaf)


def _pairs(model: Model, params: Tree, state: Tree) -> list[tuple[_Run, _Run]]:
    """The convolutions whose output only one batch normalisation reads, each with that normalisation."""
    params, state = (
        tree.map(lambda leaf: torch.empty(leaf.shape, dtype=leaf.dtype, device="meta"), each)
        for each in (params, state)
    )
    places = [{id(leaf): path for path, leaf in tree.flatten(each).items()} for each in (params, state)]
    dtype = next(iter(tree.flatten(params).values())).dtype
    images = torch.empty(2, model.in_channels, model.image_size, model.image_size, dtype=dtype, device="meta")
    uses = _Uses()
    runs: list[_Run] = []

    def around(layer: Layer, params: Tree, state: Tree, x: Any, mode: Mode) -> tuple[Any, Tree]:
        uses.running = len(runs)
        y, after = layer.apply(params, state, x, mode)
        uses.running = None
        own, kept = (
            {name: place[id(leaf)] for name, leaf in each.items() if name in layer.names and id(leaf) in place}
            for each, place in zip((params, state), places, strict=True)
        )
        runs.append(_Run(layer, mode.path, own, kept, x, y))
        return y, after

    with uses:
        logits, _ = model.apply(params, state, images, around=around)
        uses.read(logits)
    users = Counter(path for run in runs for path in (*run.params.values(), *run.state.values()))
    made = {id(run.y): run for run in runs if isinstance(run.layer.kind, Convolution) and "weight" in run.params}
    pairs = [(made[id(run.x)], run) for run in runs if has_statistics(run.layer) and id(run.x) in made]
    return [
        (convolution, norm)
        for convolution, norm in pairs
        if len(uses.readers[id(norm.x)]) == 1
        and norm.state.keys() >= {"mean", "var"}
        and all(
            users[path] == 1 for path in (*convolution.params.values(), *norm.params.values(), *norm.state.values())
        )
    ]


def _affine(norm: _Run, leaves: dict[str, Tensor], statistics: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Scale and shift of each channel in float64, found from the normalisation's outputs for 0 and for 1."""
    params = {name: leaves[path].double() for name, path in norm.params.items()}
    state = {name: statistics[path].double() for name, path in norm.state.items()}
    values = torch.tensor([0.0, 1.0], dtype=torch.float64, device=state["mean"].device)
    y, _ = norm.layer.apply(params, state, repeat(values, "two -> two c 1 1", c=len(state["mean"])), Mode())
    shift, top = rearrange(y, "two c 1 1 -> two c")
    return top - shift, shift


def _with_packed_weight(layer: Layer, params: Tree, state: Tree, x: Any, mode: Mode) -> Any:
    kind = layer.kind
    if not isinstance(kind, Convolution) or not params["weight"].is_mkldnn:
        return None
    if is_transformed(x) and not torch.compiler.is_compiling():
        raise ValueError("a packed network has no derivatives and cannot be mapped: use it as it was before pack")
    weight, bias, strides, dilations = params["weight"], params.get("bias"), [kind.stride] * 2, [kind.dilation] * 2
    return torch.ops.mkldnn._convolution_pointwise(
        x, weight, bias, kind.padding, strides, dilations, kind.groups, "none", [], ""
    )


def _instead(model: Model, replacement: Callable[[Layer, Tree, Tree, Any, Mode], Any]) -> Model:
    """The model with each layer's output replaced by that of ``replacement``, unless it returns None."""
    layer = model.layer

    def apply(params: Tree, state: Tree, x: Any, mode: Mode) -> tuple[Any, Tree]:
        def around(inner: Layer, params: Tree, state: Tree, x: Any, inside: Mode) -> _After:
            y = replacement(inner, params, state, x, inside)
            if y is not None:
                return y, state
            if mode.around is not None:
                return mode.around(inner, params, state, x, inside)
            return inner.apply(params, state, x, inside)

        return layer.apply(params, state, x, mode._replace(around=around))

    return dataclasses.replace(model, layer=Layer(layer.init, apply, layer.names))
