"""Gradients of single images: all of them, their norms, and the sum of them after clipping.

`per_sample_gradients` is ``vmap`` of ``grad``. `per_sample_norms` and `clipped_gradient_sum` never hold all gradients:
one forward pass and one backward pass to the layers' outputs give what each layer read (``x``) and the derivatives by
what it said (``signal``). Both together determine the layer's gradients, image by image:

* *Ghost* norms: of the weight ``sum_t signal_t x_t'`` the squared norm is ``sum_st (x_s' x_t) (signal_s' signal_t)``,
  without the weight's gradient (Goodfellow, arXiv:1510.01799, for one position; Bu, Mao, Xu, arXiv:2205.10683, for
  convolutions). For few positions and large weights.
* *Direct*: the layer's gradients are made, one for each image, and kept until they are summed.

The clipped sum is then an ordinary weight gradient with ``signal`` scaled for each image: no second backward pass.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from purecnn import random, tree
from purecnn.eager import is_transformed
from purecnn.layer import Layer, Mode, logits_of
from purecnn.layers import Convolution, Linear, Normalization
from purecnn.model import Model
from purecnn.paper import Loss
from purecnn.step import Batch, Trainable, loss_function, partition
from purecnn.tree import Tree

__all__ = ["Clipped", "clipped_gradient_sum", "per_sample_gradients", "per_sample_norms"]

Statistics: TypeAlias = Literal["batch", "running"] | None
_Leaves: TypeAlias = dict[str, Tensor]

# A number of a weight's gradient that goes to memory and comes back takes the time of about so many multiplications,
# on the CPU where it was measured (docs/per_sample.md) and by the data sheets of GPUs.
_TRAFFIC = 100


# All gradients -----------------------------------------------------------------------------------------------


def per_sample_gradients(
    model: Model,
    params: Tree,
    state: Tree,
    batch: Batch,
    *,
    train: bool = False,
    key: Tensor | None = None,
    statistics: Statistics = None,
    loss: Loss | None = None,
    trainable: Trainable | None = None,
    memory: int | None = None,
) -> Tree:
    """The gradient of each image's loss: a tree like ``params`` whose leaves have the batch as their first axis.

    Without ``memory``, works under ``torch.func`` and in compiled code.

    Args:
        model, params, state: the network.
        batch: images (batch, channels, height, width) and labels (batch,).
        train: as in `Model.apply`.
        key: of random draws in training. Image ``i`` draws with ``random.split(key, batch)[i]``.
        statistics: as in `Model.apply`; ``train=True, statistics="running"`` trains with frozen statistics.
        loss: of outputs and labels, the mean over a batch; by default ``model.loss``, or else
            `purecnn.training.loss_function`.
        trainable: which parameters, by path; by default all. The tree has no others.
        memory: at most so many bytes, for the result and all that is needed on the way, parameters and images aside.
            The batch is cut accordingly, by what one image takes. Of what operators use unseen, there is an estimate.
            By default the batch is one piece.

    Raises:
        ValueError: if images would not have gradients of their own, because batch normalisation uses the batch's
            statistics; or if ``memory`` is too little, or given under ``torch.func`` or to a compiler.

    >>> import purecnn
    >>> model = purecnn.create("lenet5")
    >>> params, state = model.init(random.key(0))
    >>> batch = torch.zeros(4, 1, 32, 32), torch.tensor([0, 1, 2, 3])
    >>> per_sample_gradients(model, params, state, batch)["head"]["linear"]["weight"].shape
    torch.Size([4, 10, 84])
    """
    _check(state, train, statistics)
    images, labels = batch
    trained, frozen = partition(params, trainable)
    criterion = loss or model.loss or loss_function
    if not len(images):  # as a Poisson sample may be
        return tree.unflatten({path: leaf.new_zeros((0, *leaf.shape)) for path, leaf in trained.items()})
    keys = None if key is None else random.split(key, len(images))

    def gradient(trained: _Leaves, frozen: _Leaves, state: Tree, image: Tensor, label: Tensor, key: Any) -> _Leaves:
        def objective(trained: _Leaves) -> Tensor:
            params = tree.unflatten({**frozen, **trained})
            outputs, _ = model.apply(params, state, image[None], train=train, key=key, statistics=statistics)
            return criterion(outputs, label[None])

        return torch.func.grad(objective)(trained)

    dims = None, None, None, 0, 0, None if keys is None else 0
    mapped = torch.func.vmap(gradient, in_dims=dims)
    if memory is None:
        return tree.unflatten(mapped(trained, frozen, state, images, labels, keys))
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        raise ValueError("per_sample_gradients fills memory piece by piece: leave memory out under a transformation")
    size = _chunk_size(mapped, (trained, frozen, state, images, labels, keys), memory)
    # Pieces go to their places at once: to put them together later would take the memory twice.
    result = {path: leaf.new_empty((len(images), *leaf.shape)) for path, leaf in trained.items()}
    for start in range(0, len(images), size):
        rows = slice(start, start + size)
        own = None if keys is None else keys[rows]
        for path, piece in mapped(trained, frozen, state, images[rows], labels[rows], own).items():
            result[path][rows] = piece
    return tree.unflatten(result)


def _check(state: Tree, train: bool, statistics: Statistics) -> None:
    """Refuses statistics of the batch, where there are any."""
    if statistics not in (None, "batch", "running"):
        raise ValueError(f"statistics is 'batch', 'running' or None, found {statistics!r}")
    if state and (train if statistics is None else statistics != "running"):
        raise ValueError(
            "batch normalisation with the batch's statistics mixes the images, so that none has a gradient of its own: "
            'freeze them with statistics="running", or build the network with purecnn.create(name, norm="group")'
        )


def _chunk_size(function: Callable[..., _Leaves], args: tuple[Any, ...], memory: int) -> int:
    """How many images fit at once: measured with one image, on meta tensors."""
    *trees, images, labels, keys = args
    rows = images[:1], labels[:1], None if keys is None else keys[:1]
    abstract = pytree.tree_map_only(Tensor, lambda leaf: torch.empty_like(leaf, device="meta"), (*trees, *rows))
    with _Memory(abstract) as used:
        function(*abstract)
    sizes = [leaf.nbytes for leaf in trees[0].values()]
    # Operators bring tensors into other layouts, unseen: the allowance is two copies of the largest gradient.
    result, single = len(images) * sum(sizes), used.peak + 2 * max(sizes)
    if memory < result + single:
        raise ValueError(
            f"memory of {memory:,} bytes is too little: the gradients of {len(images)} images take {result:,}, and one "
            f"image takes {single:,} on the way; choose fewer parameters with trainable, or use clipped_gradient_sum"
        )
    return (memory - result) // single


class _Memory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most bytes that were held at one time in tensors which were made inside."""

    def __init__(self, inputs: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._held = 0
        self._sizes: dict[int, int] = {}
        for leaf in pytree.tree_leaves(inputs):
            if isinstance(leaf, Tensor):
                self._sizes[leaf.untyped_storage()._cdata] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor) and (place := leaf.untyped_storage()._cdata) not in self._sizes:
                self._sizes[place] = leaf.untyped_storage().nbytes()
                self._held += self._sizes[place]
                self.peak = max(self.peak, self._held)
                weakref.finalize(leaf.untyped_storage(), self._free, place)
        return result

    def _free(self, place: int) -> None:
        self._held -= self._sizes.pop(place)


# Norms and clipped sums --------------------------------------------------------------------------------------


class Clipped(NamedTuple):
    """What `clipped_gradient_sum` finds."""

    gradient: Tree
    """The sum over the images of their clipped gradients: a tree like ``params``, of what is trained."""
    norms: Tensor
    """Of each image's gradient before clipping: (batch,)."""
    losses: Tensor
    """Of each image: (batch,)."""
    outputs: Any
    """The network's."""


def clipped_gradient_sum(
    model: Model,
    params: Tree,
    state: Tree,
    batch: Batch,
    *,
    clip: float | Tensor,
    train: bool = False,
    key: Tensor | None = None,
    statistics: Statistics = None,
    loss: Loss | None = None,
    trainable: Trainable | None = None,
) -> Clipped:
    """The sum of all images' gradients, each scaled down to a Euclidean norm of at most ``clip``.

    ``sum_i g_i min(1, clip / |g_i|)``, where the norm is that of all trained parameters together. It equals what
    `per_sample_gradients` would give, up to rounding, at about the cost of an ordinary gradient. The layers' norms come
    from the cheaper of the two ways above.

    Works under ``torch.func`` and in compiled code. A layer may be used several times; one that has no rule here, such
    as a user's own, is differentiated image by image. Every layer with tensors of its own must be made by
    `purecnn.layers.parametric`, and the first axis of what it reads and gives must be the batch.

    Args:
        model, params, state, batch, train, statistics, loss, trainable: see `per_sample_gradients`.
        clip: the largest norm; may be infinite.
        key: of random draws in training, made for the whole batch at once, as `Model.apply` makes them.

    Raises:
        ValueError: if images would not have gradients of their own, as in `per_sample_gradients`; if a layer's output
            does not have the batch as its first axis; or if parameters are used outside of such layers.

    >>> import purecnn
    >>> model = purecnn.create("lenet5")
    >>> params, state = model.init(random.key(0))
    >>> batch = torch.zeros(4, 1, 32, 32), torch.tensor([0, 1, 2, 3])
    >>> found = clipped_gradient_sum(model, params, state, batch, clip=0.1)
    >>> found.norms.shape, found.gradient["head"]["linear"]["weight"].shape
    (torch.Size([4]), torch.Size([10, 84]))
    """
    if not isinstance(clip, Tensor) and not clip > 0:
        raise ValueError(f"clip must be positive, found {clip}")
    _check(state, train, statistics)
    if not len(batch[0]):  # as a Poisson sample may be
        nothing = tree.map(torch.zeros_like, tree.unflatten(partition(params, trainable)[0]))
        outputs, _ = model.apply(params, state, batch[0], train=train, key=key, statistics=statistics)
        return Clipped(nothing, logits_of(outputs).new_zeros(0), logits_of(outputs).new_zeros(0), outputs)
    traced = _trace(model, params, state, batch, train, key, statistics, loss, trainable)
    norms = traced.norms()
    return Clipped(traced.weighted_sum((clip / norms).clamp(max=1)), norms, traced.losses, traced.outputs)


def per_sample_norms(
    model: Model,
    params: Tree,
    state: Tree,
    batch: Batch,
    *,
    train: bool = False,
    key: Tensor | None = None,
    statistics: Statistics = None,
    loss: Loss | None = None,
    trainable: Trainable | None = None,
) -> Tensor:
    """The Euclidean norm of each image's gradient, of all trained parameters together: (batch,).

    Args:
        model, params, state, batch, train, key, statistics, loss, trainable: see `clipped_gradient_sum`.

    Raises:
        ValueError: as from `clipped_gradient_sum`.

    >>> import purecnn
    >>> model = purecnn.create("lenet5")
    >>> params, state = model.init(random.key(0))
    >>> per_sample_norms(model, params, state, (torch.zeros(2, 1, 32, 32), torch.tensor([3, 3]))).diff()
    tensor([0.])
    """
    _check(state, train, statistics)
    if not len(batch[0]):
        return next(iter(partition(params, trainable)[0].values())).new_zeros(0)
    return _trace(model, params, state, batch, train, key, statistics, loss, trainable).norms()


class _Use(NamedTuple):
    """One run of a layer that is trained."""

    layer: Layer
    mode: Mode
    paths: dict[str, str]
    """Where in the whole tree its parameters are, by name. A layer may borrow those of another."""
    names: tuple[str, ...]
    """Of what is trained."""
    x: Tensor
    y: Tensor
    """Its output; and later what flows back to it."""


# By names, because the compiler cannot subscript types in functions inside of functions.
_Tensors: TypeAlias = list[Tensor]
_Uses: TypeAlias = list[_Use]
_Ran: TypeAlias = tuple[Any, list[_Use]]
_After: TypeAlias = tuple[Any, Tree]
_Objective: TypeAlias = tuple[Tensor, tuple[list[Tensor], Tensor, Any]]
_Hook: TypeAlias = Callable[[Tree, tuple[str, ...], int], tuple[Tree, Tensor | None]]
"""``hook(params, names, number) -> (params, shift)``: what a layer is to read, and what is added to its output."""


class _Traced(NamedTuple):
    """One pass forward and backward."""

    trained: _Leaves
    direct: _Leaves
    """Gradients of single images, by path: (batch, ...)."""
    ghosts: dict[str, tuple[_Use, Tensor]]
    """Weights whose gradients were not made, by path: the run of the layer, and the weight."""
    losses: Tensor
    outputs: Any

    def norms(self) -> Tensor:
        squares = torch.zeros_like(self.losses)
        for gradient in self.direct.values():
            squares = squares + torch.linalg.vector_norm(gradient.flatten(1), dim=1).square()
        for use, weight in self.ghosts.values():
            squares = squares + _ghost(use, weight)
        return squares.clamp(min=0).sqrt()

    def weighted_sum(self, scale: Tensor) -> Tree:
        def total(path: str, leaf: Tensor) -> Tensor:
            if path in self.direct:
                return torch.tensordot(scale, self.direct[path], 1)
            if path in self.ghosts:
                use, weight = self.ghosts[path]
                return _weight_sum(use, weight, scale)
            return torch.zeros_like(leaf)

        return tree.unflatten({path: total(path, leaf) for path, leaf in self.trained.items()})


def _trace(
    model: Model,
    params: Tree,
    state: Tree,
    batch: Batch,
    train: bool,
    key: Tensor | None,
    statistics: Statistics,
    loss: Loss | None,
    trainable: Trainable | None,
) -> _Traced:
    images, labels = batch
    trained, frozen = partition(params, trainable)
    criterion = loss or model.loss or loss_function

    def forward(params: Tree, state: Tree, images: Tensor, key: Any, hook: _Hook) -> _Ran:
        uses: _Uses = []
        leaves = tree.flatten(params)

        def place(name: str, leaf: Tensor, path: str) -> str:
            """Where in the whole tree a layer's parameter is: at the layer's path, or where it is borrowed from."""
            own = f"{path}.{name}" if path else name
            if leaves.get(own) is leaf:
                return own
            for other, each in leaves.items():
                if each is leaf:
                    return other
            raise ValueError(f"the layer {path!r} computes with other parameters than those of the tree")

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
            uses.append(_Use(layer, mode._replace(key=None, tap=None), paths, names, x, y))
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
            # Layers see copies of what is trained. So what reaches the originals came around the layers.
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

    direct: _Leaves = {}
    ghosts: dict[str, tuple[_Use, Tensor]] = {}
    often = Counter(use.paths[name] for use in uses for name in use.names)
    leaves = {**trained, **frozen}
    for use in uses:
        own, names = {name: leaves[path] for name, path in use.paths.items()}, use.names
        if "weight" in names and often[use.paths["weight"]] == 1 and _is_ghost(use, own["weight"]):
            ghosts[use.paths["weight"]] = use, own["weight"]
            names = tuple(name for name in names if name != "weight")
        for name, gradient in _direct(use, names, own, _at(state, use.mode.path)).items():
            path = use.paths[name]
            direct[path] = direct[path] + gradient if path in direct else gradient
    return _Traced(trained, direct, ghosts, losses, outputs)


def _own(params: Tree, names: tuple[str, ...], number: int) -> tuple[Tree, None]:
    return {**params, **{name: params[name].detach().requires_grad_() for name in names}}, None


def _transformed(
    forward: Callable[..., _Ran],
    losses_of: Callable[[Any], Tensor],
    params: Tree,
    state: Tree,
    images: Tensor,
    key: Tensor | None,
) -> tuple[list[_Use], Tensor, Any]:
    """Under ``torch.func``: the derivatives by zeros that are added to the outputs, whose shapes come first."""

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


def _rows(x: Tensor) -> Tensor:
    """What a linear layer sees, (batch, ..., c) -> (batch, positions, c)."""
    return x[:, None] if x.ndim == 2 else x.flatten(1, -2)


def _is_ghost(use: _Use, weight: Tensor) -> bool:
    """Whether the products of all pairs of positions are cheaper than to make the weight's gradients."""
    match use.layer.kind:
        case Convolution():
            positions = use.y.shape[2] * use.y.shape[3]
            outputs, inputs = len(weight) // use.layer.kind.groups, weight[0].numel()
        case Linear():
            positions = _rows(use.y).shape[1]
            outputs, inputs = weight.shape
        case _:
            return False
    return positions**2 * (outputs + inputs) < _TRAFFIC * outputs * inputs


def _ghost(use: _Use, weight: Tensor) -> Tensor:
    """The squared norms of the weight's gradients, without the gradients: (batch,)."""
    kind = use.layer.kind
    if isinstance(kind, Convolution):
        patches = F.unfold(use.x, weight.shape[2:], padding=kind.padding, stride=kind.stride)
        rows, signals = (
            rearrange(values, "n (g c) t -> (n g) t c", g=kind.groups) for values in (patches, use.y.flatten(2))
        )
    else:
        rows, signals = _rows(use.x), _rows(use.y)
    products = (rows @ rows.mT) * (signals @ signals.mT)
    return products.reshape(len(use.y), -1).sum(1)


def _conv_weight(kind: Convolution, x: Tensor, weight: Tensor, signal: Tensor) -> Tensor:
    """The gradient of a convolution's weight, summed over the images."""
    stride, padding, dilation = [kind.stride] * 2, list(kind.padding), [1, 1]
    _, gradient, _ = torch.ops.aten.convolution_backward(
        signal, x, weight, None, stride, padding, dilation, False, [0, 0], kind.groups, [False, True, False]
    )
    return gradient


def _weight_sum(use: _Use, weight: Tensor, scale: Tensor) -> Tensor:
    """The weight's gradient, each image's times its scale."""
    signal = use.y * scale.reshape(-1, *[1] * (use.y.ndim - 1))
    if isinstance(use.layer.kind, Convolution):
        return _conv_weight(use.layer.kind, use.x, weight, signal)
    return _rows(signal).flatten(0, 1).mT @ _rows(use.x).flatten(0, 1)


def _direct(use: _Use, names: tuple[str, ...], params: Tree, state: Tree) -> _Leaves:
    """The gradients of a layer's tensors, image by image: (batch, ...)."""
    layer, mode, x, signal = use.layer, use.mode, use.x, use.y
    rules: dict[str, Callable[[], Tensor]]
    match layer.kind:
        case Convolution():
            rules = {
                # Under vmap this is one grouped convolution.
                "weight": lambda: torch.func.vmap(
                    lambda x, signal: _conv_weight(layer.kind, x[None], params["weight"], signal[None])
                )(x, signal),
                "bias": lambda: signal.sum((2, 3)),
            }
        case Linear():
            rules = {"weight": lambda: _rows(signal).mT @ _rows(x), "bias": lambda: _rows(signal).sum(1)}
        case Normalization(axis):
            plain = {name: torch.full_like(leaf, float(name == "weight")) for name, leaf in params.items()}
            rules = {
                "weight": lambda: _rows((signal * layer.apply(plain, state, x, mode)[0]).movedim(axis, -1)).sum(1),
                "bias": lambda: _rows(signal.movedim(axis, -1)).sum(1),
            }
        case _:

            def pull(x: Tensor, signal: Tensor) -> _Leaves:
                def output(own: _Leaves) -> Tensor:
                    return layer.apply({**params, **own}, state, x[None], mode)[0]

                return torch.func.vjp(output, {name: params[name] for name in names})[1](signal[None])[0]

            return torch.func.vmap(pull)(x, signal) if names else {}
    return {name: rules[name]() for name in names}
