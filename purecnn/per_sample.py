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
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from purecnn import random, tree
from purecnn.layer import Layer, Mode, logits_of
from purecnn.layers import Convolution, Linear
from purecnn.model import Model
from purecnn.paper import Loss
from purecnn.record import Recorded, Statistics, Use, conv_weight, operands, record, rows
from purecnn.step import Batch, Trainable, loss_function, partition
from purecnn.tree import Tree

__all__ = ["Clipped", "clipped_gradient_sum", "per_sample_gradients", "per_sample_norms"]

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
    _check(model, state, train, statistics)
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


def mixes_images(model: Model) -> bool:
    """Whether it has batch normalisation by the batch's statistics in training. Nothing is computed but shapes."""
    found = False

    def around(layer: Layer, params: Tree, state: Tree, x: Any, mode: Mode) -> tuple[Any, Tree]:
        nonlocal found
        found = found or (mode.batch_statistics and {"mean", "var"} <= {*layer.names})
        return layer.apply(params, state, x, mode)

    images = torch.empty(2, model.in_channels, model.image_size, model.image_size, device="meta")
    model.apply(*model.spec(), images, train=True, key=random.key(0).to("meta"), around=around)
    return found


def _check(model: Model, state: Tree, train: bool, statistics: Statistics) -> None:
    """Refuses statistics of the batch, where there are any."""
    if statistics not in (None, "batch", "running"):
        raise ValueError(f"statistics is 'batch', 'running' or None, found {statistics!r}")
    if state and (train if statistics is None else statistics != "running") and mixes_images(model):
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
    _check(model, state, train, statistics)
    if not len(batch[0]):  # as a Poisson sample may be
        nothing = tree.map(torch.zeros_like, tree.unflatten(partition(params, trainable)[0]))
        outputs, _ = model.apply(params, state, batch[0], train=train, key=key, statistics=statistics)
        return Clipped(nothing, logits_of(outputs).new_zeros(0), logits_of(outputs).new_zeros(0), outputs)
    recorded = record(model, params, state, batch, train, key, statistics, loss, trainable)
    found = _gradients(recorded)
    norms = found.norms()
    return Clipped(found.weighted_sum((clip / norms).clamp(max=1)), norms, recorded.losses, recorded.outputs)


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
    _check(model, state, train, statistics)
    if not len(batch[0]):
        return next(iter(partition(params, trainable)[0].values())).new_zeros(0)
    recorded = record(model, params, state, batch, train, key, statistics, loss, trainable)
    return _gradients(recorded).norms()


class _Gradients(NamedTuple):
    """Of single images, made or not."""

    recorded: Recorded
    direct: _Leaves
    """Those that were made, by path: (batch, ...)."""
    ghosts: dict[str, tuple[Use, Tensor]]
    """Weights whose gradients were not made, by path: the run of the layer, and the weight."""

    def norms(self) -> Tensor:
        squares = torch.zeros_like(self.recorded.losses)
        for gradient in self.direct.values():
            # Row by row: of millions of numbers at once torch's norm is too small, by 0.05 % of nine million.
            parts = gradient.flatten(2) if gradient.ndim > 2 else gradient[..., None]
            squares = squares + torch.linalg.vector_norm(parts, dim=-1).square().reshape(len(gradient), -1).sum(1)
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

        return tree.unflatten({path: total(path, leaf) for path, leaf in self.recorded.trained.items()})


def _gradients(recorded: Recorded) -> _Gradients:
    """Makes those that are not cheaper unmade."""
    direct: _Leaves = {}
    ghosts: dict[str, tuple[Use, Tensor]] = {}
    often = Counter(use.paths[name] for use in recorded.uses for name in use.names)
    for use in recorded.uses:
        names = use.names
        if "weight" in names and often[use.paths["weight"]] == 1:
            weight = recorded.parameters(use)["weight"]
            if _is_ghost(use, weight):
                ghosts[use.paths["weight"]] = use, weight
                names = tuple(name for name in names if name != "weight")
        for name, gradient in recorded.gradients(use, names).items():
            path = use.paths[name]
            direct[path] = direct[path] + gradient if path in direct else gradient
    return _Gradients(recorded, direct, ghosts)


# One layer ---------------------------------------------------------------------------------------------------


def _is_ghost(use: Use, weight: Tensor) -> bool:
    """Whether the products of all pairs of positions are cheaper than to make the weight's gradients."""
    match use.layer.kind:
        case Convolution():
            positions = use.y.shape[2] * use.y.shape[3]
            outputs, inputs = len(weight) // use.layer.kind.groups, weight[0].numel()
        case Linear():
            positions = rows(use.y).shape[1]
            outputs, inputs = weight.shape
        case _:
            return False
    return positions**2 * (outputs + inputs) < _TRAFFIC * outputs * inputs


def _ghost(use: Use, weight: Tensor) -> Tensor:
    """The squared norms of the weight's gradients, without the gradients: (batch,)."""
    read, signal = operands(use, weight)
    return ((read @ read.mT) * (signal @ signal.mT)).flatten(1).sum(1)


def _weight_sum(use: Use, weight: Tensor, scale: Tensor) -> Tensor:
    """The weight's gradient, each image's times its scale."""
    signal = use.y * scale.reshape(-1, *[1] * (use.y.ndim - 1))
    if isinstance(use.layer.kind, Convolution):
        return conv_weight(use.layer.kind, use.x, weight, signal)
    return rows(signal).flatten(0, 1).mT @ rows(use.x).flatten(0, 1)
