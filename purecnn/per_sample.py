"""Gradients of single images: the gradients themselves, their norms, and their sum after clipping.

`per_sample_gradients` is ``vmap`` of ``grad``. `per_sample_norms` and `clipped_gradient_sum` avoid computing them all:
one forward pass and one backward pass to the layers' outputs give each layer's input (``x``) and the derivative by its
output (``signal``). Together they determine the layer's gradients, image by image:

* *Ghost* norms: the squared norm of the weight's gradient ``sum_t signal_t x_t'`` is
  ``sum_st (x_s' x_t) (signal_s' signal_t)``, which does not need the gradient (Goodfellow, arXiv:1510.01799, for one
  position; Bu, Mao, Xu, arXiv:2205.10683, for convolutions). For few positions and large weights.
* *Direct*: the layer's gradients are computed, one for each image, and kept until they are summed.

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
from purecnn.layers import Convolution, Linear, has_statistics
from purecnn.model import Model
from purecnn.paper import Loss
from purecnn.record import Recorded, Statistics, Use, conv_weight, operands, record, rows
from purecnn.step import Batch, Trainable, loss_function, partition
from purecnn.tree import Tree

__all__ = ["Clipped", "clipped_gradient_sum", "per_sample_gradients", "per_sample_norms"]

_Leaves: TypeAlias = dict[str, Tensor]

# Writing an element of a gradient to memory and reading it back takes the time of about this many multiplications, on
# the CPU where it was measured (docs/per_sample.md) and according to the data sheets of GPUs.
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

    Without ``memory``, it works under ``torch.func`` and in compiled code.

    Args:
        model, params, state: the network.
        batch: images (batch, channels, height, width) and labels (batch,).
        train: as in `Model.apply`.
        key: for random draws in training. Image ``i`` draws with ``random.split(key, batch)[i]``.
        statistics: as in `Model.apply`; ``train=True, statistics="running"`` trains with frozen statistics.
        loss: of outputs and labels, the mean over a batch; by default ``model.loss``, or else
            `purecnn.training.loss_function`.
        trainable: which parameters, by path; by default all. The result contains no others.
        memory: the most bytes to use for the result and all intermediate tensors, not counting parameters and images.
            The batch is split accordingly, by the memory that one image takes; what operators use internally is
            estimated. By default the batch is not split.

    Raises:
        ValueError: if images have no gradients of their own, because batch normalisation uses the batch's statistics;
            or if ``memory`` is too small, or given under ``torch.func`` or in compiled code.

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
    if not len(images):  # a Poisson sample may be empty
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
        raise ValueError("with memory, per_sample_gradients writes in place: leave memory out under a transformation")
    size = _chunk_size(mapped, (trained, frozen, state, images, labels, keys), memory)
    # Each piece is written to its place at once: concatenating them later would take twice the memory.
    result = {path: leaf.new_empty((len(images), *leaf.shape)) for path, leaf in trained.items()}
    for start in range(0, len(images), size):
        rows = slice(start, start + size)
        own = None if keys is None else keys[rows]
        for path, piece in mapped(trained, frozen, state, images[rows], labels[rows], own).items():
            result[path][rows] = piece
    return tree.unflatten(result)


def mixes_images(model: Model) -> bool:
    """Whether batch normalisation uses the batch's statistics in training. Only shapes are computed."""
    found = False

    def around(layer: Layer, params: Tree, state: Tree, x: Any, mode: Mode) -> tuple[Any, Tree]:
        nonlocal found
        found = found or (mode.batch_statistics and has_statistics(layer))
        return layer.apply(params, state, x, mode)

    images = torch.empty(2, model.in_channels, model.image_size, model.image_size, device="meta")
    model.apply(*model.spec(), images, train=True, key=random.key(0).to("meta"), around=around)
    return found


def _check(model: Model, state: Tree, train: bool, statistics: Statistics) -> None:
    """Raise an error if batch normalisation would use the batch's statistics."""
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
    # Operators convert layouts internally, which is not seen here: the allowance is two copies of the largest gradient.
    result, single = len(images) * sum(sizes), used.peak + 2 * max(sizes)
    if memory < result + single:
        raise ValueError(
            f"memory of {memory:,} bytes is too little: the gradients of {len(images)} images take {result:,}, and one "
            f"image at a time takes {single:,} more; choose fewer parameters with trainable, or use "
            "clipped_gradient_sum"
        )
    return (memory - result) // single


class _Memory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Measures the most bytes held at one time by tensors that are created inside."""

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
    """The result of `clipped_gradient_sum`."""

    gradient: Tree
    """The sum of the images' clipped gradients: a tree like ``params``, with the trained parameters only."""
    norms: Tensor
    """The norm of each image's gradient before clipping: (batch,)."""
    losses: Tensor
    """The loss of each image: (batch,)."""
    outputs: Any
    """The network's outputs."""


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

    ``sum_i g_i min(1, clip / |g_i|)``, where the norm is that of all trained parameters together. Up to rounding, it
    equals what `per_sample_gradients` would give, at about the cost of an ordinary gradient. For each layer, the norms
    are computed by ghost norms or directly (see the module), whichever is cheaper.

    Works under ``torch.func`` and in compiled code. A layer may be used several times; a layer without a rule here,
    such as a user's own, is differentiated image by image. Every layer with parameters must be made by
    `purecnn.layers.parametric`, and the first axis of its input and output must be the batch.

    Args:
        model, params, state, batch, train, statistics, loss, trainable: see `per_sample_gradients`.
        clip: the largest norm; may be infinite.
        key: for random draws in training, made for the whole batch at once, as in `Model.apply`.

    Raises:
        ValueError: if images have no gradients of their own, as in `per_sample_gradients`; if ``clip`` is not positive;
            if a layer's output does not have the batch as its first axis; or if parameters are used outside of such
            layers.

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
    if not len(batch[0]):  # a Poisson sample may be empty
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
    """The Euclidean norm of each image's gradient by all trained parameters together: (batch,).

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
    """Gradients of single images, computed or not."""

    recorded: Recorded
    direct: _Leaves
    """Those that were computed, by path: (batch, ...)."""
    ghosts: dict[str, tuple[Use, Tensor]]
    """Weights whose gradients were not computed, by path: the run of the layer, and the weight."""

    def norms(self) -> Tensor:
        squares = torch.zeros_like(self.recorded.losses)
        for gradient in self.direct.values():
            # Row by row: over millions of elements at once torch's norm is too small, by 0.05 % for nine million.
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
    """Compute all gradients except those of weights whose ghost norms are cheaper."""
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
    """Whether the products of all pairs of positions are cheaper than computing the weight's gradients."""
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
    """The sum of the images' weight gradients, each multiplied by its scale."""
    signal = use.y * scale.reshape(-1, *[1] * (use.y.ndim - 1))
    if isinstance(use.layer.kind, Convolution):
        return conv_weight(use.layer.kind, use.x, weight, signal)
    return rows(signal).flatten(0, 1).mT @ rows(use.x).flatten(0, 1)
