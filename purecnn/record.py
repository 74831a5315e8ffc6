"""Recording of each layer's input and of the gradient at its output: one forward pass, one backward pass.

Together they determine the gradients of a layer's tensors image by image (`purecnn.per_sample`), and the Kronecker
factors of its curvature (`purecnn.kfac`), for any architecture.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.utils import _pytree as pytree

from purecnn import tree
from purecnn.eager import is_transformed
from purecnn.layer import Layer, Mode
from purecnn.layers import Convolution, Linear, Normalization
from purecnn.model import Model
from purecnn.paper import Loss
from purecnn.step import Batch, Trainable, loss_function, partition
from purecnn.tree import Tree

__all__ = ["Recorded", "Statistics", "Use", "conv_weight", "operands", "record", "rows"]

Statistics: TypeAlias = Literal["batch", "running"] | None
"""As in `Model.apply`."""
_Leaves: TypeAlias = dict[str, Tensor]


class Use(NamedTuple):
    """One run of a layer that is trained."""

    layer: Layer
    mode: Mode
    paths: dict[str, str]
    """Its parameters' paths in the whole tree, by name. A layer may use those of another layer."""
    names: tuple[str, ...]
    """The names of the parameters that are trained."""
    x: Tensor
    y: Tensor
    """Its output; in the result of `record`, the gradient with respect to its output."""


# Aliases, because the compiler cannot subscript types in nested functions.
_Tensors: TypeAlias = list[Tensor]
_Uses: TypeAlias = list[Use]
_Ran: TypeAlias = tuple[Any, list[Use]]
_After: TypeAlias = tuple[Any, Tree]
_Objective: TypeAlias = tuple[Tensor, tuple[list[Tensor], Tensor, Any]]
_Hook: TypeAlias = Callable[[Tree, tuple[str, ...], int], tuple[Tree, Tensor | None]]
"""``hook(params, names, number) -> (params, shift)``: the parameters for a layer, and what is added to its output."""


class Recorded(NamedTuple):
    """The result of `record`."""

    trained: _Leaves
    """The parameters that are trained, by path."""
    frozen: _Leaves
    """The other parameters, by path."""
    state: Tree
    """The network's statistics before the run."""
    uses: list[Use]
    """In the order in which the layers ran; ``y`` is the gradient of the sum of the losses at the output."""
    losses: Tensor
    """The loss of each image: (batch,)."""
    outputs: Any
    """The network's outputs."""

    def parameters(self, use: Use) -> _Leaves:
        """A layer's parameters by name, trained or not."""
        return {name: (self.trained if path in self.trained else self.frozen)[path] for name, path in use.paths.items()}

    def gradients(self, use: Use, names: tuple[str, ...]) -> _Leaves:
        """The per-sample gradients of some of a layer's tensors: (batch, ...)."""
        return _gradients(use, names, self.parameters(use), _at(self.state, use.mode.path))


def record(
    model: Model,
    params: Tree,
    state: Tree,
    batch: Batch,
    train: bool,
    key: Tensor | None,
    statistics: Statistics,
    loss: Loss | None,
    trainable: Trainable | None,
) -> Recorded:
    """Run the network forward, and backward only as far as the layers' outputs, and record both.

    This works under ``torch.func`` and in compiled code.

    Args:
        model, params, state, batch, train, key, statistics, loss, trainable: see
            `purecnn.per_sample.clipped_gradient_sum`.

    Raises:
        ValueError: if the first axis of a layer's input or output is not the batch, if a layer computes with parameters
            that are not in the tree, or if parameters are used outside of layers made by `purecnn.layers.parametric`.
    """
    images, labels = batch
    trained, frozen = partition(params, trainable)
    criterion = loss or model.loss or loss_function

    def forward(params: Tree, state: Tree, images: Tensor, key: Any, hook: _Hook) -> _Ran:
        uses: _Uses = []
        leaves = tree.flatten(params)

        def place(name: str, leaf: Tensor, path: str) -> str:
            """A parameter's path in the whole tree: at the layer's own path, or where the layer took it from."""
            own = f"{path}.{name}" if path else name
            if leaves.get(own) is leaf:
                return own
            for other, each in leaves.items():
                if each is leaf:
                    return other
            raise ValueError(f"the layer {path!r} computes with a parameter {name!r} that is not in the tree")

        def around(layer: Layer, params: Tree, state: Tree, x: Any, mode: Mode) -> _After:
            paths = {name: place(name, leaf, mode.path) for name, leaf in params.items() if name in layer.names}
            names = tuple(name for name, path in paths.items() if path in trained)
            if not names:
                return layer.apply(params, state, x, mode)
            params, shift = hook(params, names, len(uses))
            y, state = layer.apply(params, state, x, mode)
            if not len(x) == len(y) == len(images):
                raise ValueError(
                    f"the layer {mode.path!r} turns {tuple(x.shape)} into {tuple(y.shape)}, but the first axis must be "
                    f"the batch of {len(images)} images"
                )
            y = y if shift is None else y + shift
            uses.append(Use(layer, mode._replace(key=None, tap=None), paths, names, x, y))
            return y, state

        outputs, _ = model.apply(params, state, images, train=train, key=key, statistics=statistics, around=around)
        return outputs, uses

    def losses_of(outputs: Any) -> Tensor:
        def single(output: Any, label: Tensor) -> Tensor:
            return criterion(pytree.tree_map(lambda leaf: leaf[None], output), label[None])

        return torch.func.vmap(single)(outputs, labels)

    inputs = images, labels, *trained.values(), *frozen.values(), *tree.flatten(state).values()
    if is_transformed(*inputs) or torch.is_inference_mode_enabled():
        uses, losses, outputs = _transformed(forward, losses_of, params, state, images, key)
    else:
        with torch.enable_grad():
            # Layers get copies of the trained parameters. So a gradient at an original comes from a use outside layers.
            outer = {path: leaf.detach().requires_grad_() for path, leaf in trained.items()}
            outputs, uses = forward(tree.unflatten({**frozen, **outer}), state, images, key, _own)
            losses = losses_of(outputs)
            uses = [use for use in uses if use.y.requires_grad]
            flowing = [*(use.y for use in uses), *outer.values()]
            found = torch.autograd.grad(losses.sum(), flowing, allow_unused=True)
        for path, grad in zip(outer, found[len(uses) :], strict=True):
            if grad is not None:
                raise ValueError(f"{path!r} is used outside of the layers made by purecnn.layers.parametric")
        uses = [
            use._replace(x=use.x.detach(), y=torch.zeros_like(use.y) if grad is None else grad)
            for use, grad in zip(uses, found[: len(uses)], strict=True)
        ]
        losses, outputs = losses.detach(), pytree.tree_map(torch.detach, outputs)
    return Recorded(trained, frozen, state, uses, losses, outputs)


def _own(params: Tree, names: tuple[str, ...], number: int) -> tuple[Tree, None]:
    return {**params, **{name: params[name].detach().requires_grad_() for name in names}}, None


def _transformed(
    forward: Callable[..., _Ran],
    losses_of: Callable[[Any], Tensor],
    params: Tree,
    state: Tree,
    images: Tensor,
    key: Tensor | None,
) -> tuple[list[Use], Tensor, Any]:
    """Under ``torch.func``: differentiate with respect to zeros added to the outputs; a meta run finds their shapes."""

    def meta(leaf: Tensor) -> Tensor:
        return torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")

    abstract = tree.map(meta, params), tree.map(meta, state), meta(images), None if key is None else meta(key)
    _, uses = forward(*abstract, lambda params, names, number: (params, None))
    zeros = [torch.zeros(use.y.shape, dtype=use.y.dtype, device=images.device) for use in uses]

    def objective(shifts: _Tensors) -> _Objective:
        outputs, uses = forward(params, state, images, key, lambda params, names, number: (params, shifts[number]))
        losses = losses_of(outputs)
        return losses.sum(), ([use.x for use in uses], losses, outputs)

    signals, (xs, losses, outputs) = torch.func.grad(objective, has_aux=True)(zeros)
    uses = [use._replace(x=x, y=signal) for use, x, signal in zip(uses, xs, signals, strict=True)]
    return uses, losses, outputs


def _at(values: Mapping[str, Any], path: str) -> Tree:
    """The sub-tree at a path; empty if there is none."""
    for name in path.split(".") if path else ():
        values = values.get(name, {})
    return dict(values)


# One layer ---------------------------------------------------------------------------------------------------


def rows(x: Tensor) -> Tensor:
    """The input or output of a linear layer with one axis of positions: (batch, ..., c) -> (batch, positions, c)."""
    return x[:, None] if x.ndim == 2 else x.flatten(1, -2)


def operands(use: Use, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The matrices whose product over positions is the gradient of the weight of a convolution or a linear layer.

    Returns:
        The input patches ``x`` (batch, groups, positions, inputs), and the gradient at the output, ``signal`` (batch,
        groups, positions, outputs). The gradient of a group's weight is ``signal' x``.
    """
    kind = use.layer.kind
    if not isinstance(kind, Convolution):
        return rows(use.x)[:, None], rows(use.y)[:, None]
    patches = F.unfold(use.x, weight.shape[2:], kind.dilation, kind.padding, kind.stride)
    read, signal = (rearrange(values, "n (g c) t -> n g t c", g=kind.groups) for values in (patches, use.y.flatten(2)))
    return read, signal


def conv_weight(kind: Convolution, x: Tensor, weight: Tensor, signal: Tensor) -> Tensor:
    """The gradient of a convolution's weight, summed over the images."""
    stride, padding, dilation = [kind.stride] * 2, list(kind.padding), [kind.dilation] * 2
    _, gradient, _ = torch.ops.aten.convolution_backward(
        signal, x, weight, None, stride, padding, dilation, False, [0, 0], kind.groups, [False, True, False]
    )
    return gradient


def _gradients(use: Use, names: tuple[str, ...], params: Tree, state: Tree) -> _Leaves:
    """The per-sample gradients of a layer's tensors: (batch, ...)."""
    layer, mode, x, signal = use.layer, use.mode, use.x, use.y
    rules: dict[str, Callable[[], Tensor]]
    match layer.kind:
        case Convolution():
            rules = {
                # Under vmap this is one grouped convolution.
                "weight": lambda: torch.func.vmap(
                    lambda x, signal: conv_weight(layer.kind, x[None], params["weight"], signal[None])
                )(x, signal),
                "bias": lambda: signal.sum((2, 3)),
            }
        case Linear():
            rules = {"weight": lambda: rows(signal).mT @ rows(x), "bias": lambda: rows(signal).sum(1)}
        case Normalization(axis):
            plain = {name: torch.full_like(leaf, float(name == "weight")) for name, leaf in params.items()}
            rules = {
                "weight": lambda: rows((signal * layer.apply(plain, state, x, mode)[0]).movedim(axis, -1)).sum(1),
                "bias": lambda: rows(signal.movedim(axis, -1)).sum(1),
            }
        case _:

            def pull(x: Tensor, signal: Tensor) -> _Leaves:
                def output(own: _Leaves) -> Tensor:
                    return layer.apply({**params, **own}, state, x[None], mode)[0]

                return torch.func.vjp(output, {name: params[name] for name in names})[1](signal[None])[0]

            return torch.func.vmap(pull)(x, signal) if names else {}
    return {name: rules[name]() for name in names}
