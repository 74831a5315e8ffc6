"""Kronecker-factored curvature: the Fisher information of a whole network, in a form that can be inverted.

    curvature = ekfac(model, params, state, batches, key=key)
    direction = solve(curvature, grad(measure)(params), damping=1e-3)      # a tree like params

Only the blocks of the Fisher information within each layer are kept. The gradient of a layer's weight is a sum over
positions, ``sum_t s_t x_t'``, where ``s`` is the gradient by the layer's output and ``x`` its input. *K-FAC* assumes
that the two are independent, and positions, too, so that the layer's block is the Kronecker product of their second
moments, ``E[x x'] (x) E[s s']`` (Martens and Grosse, arXiv:1503.05671; convolutions: Grosse and Martens,
arXiv:1602.01407). *EK-FAC* keeps the eigenvectors, and uses as eigenvalues the gradients' actual second moments along
them, which is the best possible choice (George et al., arXiv:1806.03884). Uses: influence functions of whole networks
(Grosse et al., arXiv:2308.03296), preconditioning, Laplace's approximation.

For layers other than convolutions and linear maps, such as normalisations, only the diagonal is kept.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from purecnn import random, tree
from purecnn.eager import is_transformed
from purecnn.layer import logits_of
from purecnn.layers import Convolution, Linear
from purecnn.model import Model
from purecnn.paper import Loss, softmax
from purecnn.record import Recorded, Use, operands, record
from purecnn.step import Batch, Trainable, loss_function, partition
from purecnn.tree import Tree

__all__ = ["Block", "Fisher", "eigenvalues", "ekfac", "kfac", "matrix_function", "product", "solve"]

Fisher: TypeAlias = Literal["sampled", "expected", "empirical"]
"""Which labels the gradients use: ``"sampled"``, one drawn from the model's own distribution for each image;
``"expected"``, all classes, weighted by that distribution, which takes a pass for each class; or ``"empirical"``, the
data's labels, which give a different matrix (arXiv:1905.12558)."""


class Block(NamedTuple):
    """The block of the matrix for one layer's weight and bias, as its eigenvectors and eigenvalues.

    Each group of a convolution's channels has its own block. The bias, if there is one, is the last of the inputs.
    """

    outputs: Tensor
    """Eigenvectors, in columns, of the second moments of the gradients by the output: (groups, outputs, outputs)."""
    inputs: Tensor
    """Those of the second moments of the inputs: (groups, inputs, inputs)."""
    values: Tensor
    """Eigenvalues: (groups, outputs, inputs)."""


def kfac(
    model: Model,
    params: Tree,
    state: Tree,
    batches: Iterable[Batch],
    *,
    fisher: Fisher = "sampled",
    key: Tensor | None = None,
    loss: Loss | None = None,
    trainable: Trainable | None = None,
) -> Tree:
    """The Fisher information, averaged over images, with Kronecker-factored blocks.

    The network runs in evaluation mode. Memory grows with the square of a layer's inputs (for a convolution,
    ``channels * height * width`` of its kernel), so layers with tens of thousands of inputs are best left out by
    ``trainable``.

    Args:
        model, params, state: the network.
        batches: images (batch, channels, height, width) and labels (batch,), read once.
        fisher: which labels to use; see `Fisher`.
        key: for drawing labels.
        loss: of outputs and labels, the mean over a batch, for ``fisher="empirical"``; by default ``model.loss``, or
            else `purecnn.training.loss_function`. The other kinds use cross-entropy.
        trainable: which parameters, by path; by default all.

    Returns:
        A tree like ``params``, where a convolution or linear layer has a `Block` in place of its weight, which
        includes its bias, and all other parameters have the diagonal. Use it with `product`, `solve`,
        `matrix_function` and `eigenvalues`.

    Raises:
        ValueError: if there are no images, labels are to be drawn without a key, a loss is given without
            ``fisher="empirical"``, or as from `purecnn.per_sample.clipped_gradient_sum`.

    >>> import purecnn
    >>> model = purecnn.create("lenet5")
    >>> params, state = model.init(random.key(0))
    >>> batches = [(random.normal(random.key(1), (4, 1, 32, 32)), torch.tensor([0, 1, 2, 3]))]
    >>> curvature = kfac(model, params, state, batches, key=random.key(2))
    >>> curvature["head"]["linear"]["weight"].values.shape
    torch.Size([1, 10, 85])
    """
    return _factored(model, params, state, batches, fisher, key, loss, trainable)


def ekfac(
    model: Model,
    params: Tree,
    state: Tree,
    batches: Iterable[Batch],
    *,
    fisher: Fisher = "sampled",
    key: Tensor | None = None,
    loss: Loss | None = None,
    trainable: Trainable | None = None,
) -> Tree:
    """EK-FAC: `kfac` with the second moments of the gradients along its eigenvectors as eigenvalues.

    Of all matrices with these eigenvectors it is the nearest to each layer's own block, and its trace is that of the
    Fisher information. Memory must hold the gradients of all images of a batch.

    Args:
        model, params, state, fisher, key, loss, trainable: see `kfac`.
        batches: as for `kfac`, but read twice: a list, or what `purecnn.data.batches` returns.

    Raises:
        ValueError: as from `kfac`, or if ``batches`` can be read only once.

    >>> import purecnn
    >>> model = purecnn.create("lenet5")
    >>> params, state = model.init(random.key(0))
    >>> batches = [(random.normal(random.key(1), (4, 1, 32, 32)), torch.tensor([0, 1, 2, 3]))]
    >>> curvature = ekfac(model, params, state, batches, key=random.key(2))
    >>> solve(curvature, params, damping=0.1)["head"]["linear"]["weight"].shape
    torch.Size([10, 84])
    """
    if iter(batches) is batches:
        raise ValueError("the batches are read twice, but this is an iterator: give a list")
    factored = _factored(model, params, state, batches, fisher, key, loss, trainable)
    leaves = tree.flatten(factored)
    moments = {path: torch.zeros_like(leaf.values) for path, leaf in leaves.items() if isinstance(leaf, Block)}
    count = 0
    for recorded, first in _passes(model, params, state, batches, fisher, key, loss, trainable):
        count += len(recorded.losses) * first
        joint = _joint(recorded.uses)
        rotated: dict[str, Tensor] = {}
        for use in recorded.uses:
            if path := _block(use):
                read, signal = _operands(recorded, use, path in joint)
                gradient = (signal @ leaves[path].outputs).mT @ (read @ leaves[path].inputs)
                rotated[path] = rotated[path] + gradient if path in rotated else gradient
        for path, gradient in rotated.items():
            moments[path] = moments[path] + gradient.square().sum(0)
    exact = {path: leaves[path]._replace(values=values / count) for path, values in moments.items()}
    return tree.unflatten({**leaves, **exact})


def product(curvature: Tree, v: Tree) -> Tree:
    """The matrix times a vector.

    Args:
        curvature: from `kfac` or `ekfac`.
        v: a tree with the same parameters.

    Raises:
        ValueError: as from `matrix_function`.

    >>> product({"scale": torch.tensor([2.0])}, {"scale": torch.tensor([3.0])})  # of this layer there is the diagonal
    {'scale': tensor([6.])}
    """
    return matrix_function(curvature, lambda values: values, v)


def solve(curvature: Tree, v: Tree, damping: float | Tensor) -> Tree:
    """The inverse of the matrix, with ``damping`` added to its diagonal, times a vector.

    Args:
        curvature: from `kfac` or `ekfac`.
        v: a tree with the same parameters.
        damping: positive (not checked for a tensor). A tenth of the mean eigenvalue is a usual choice
            (arXiv:2308.03296); block by block, this is
            ``matrix_function(curvature, lambda values: 1 / (values + values.mean() / 10), v)``.

    Raises:
        ValueError: if the damping is not positive, or as from `matrix_function`.

    >>> solve({"scale": torch.tensor([2.0])}, {"scale": torch.tensor([3.0])}, damping=1.0)
    {'scale': tensor([1.])}
    """
    if not isinstance(damping, Tensor) and not damping > 0:
        raise ValueError(f"damping must be positive, found {damping}")
    return matrix_function(curvature, lambda values: 1 / (values + damping), v)


def matrix_function(curvature: Tree, function: Callable[[Tensor], Tensor], v: Tree) -> Tree:
    """A function of the matrix times a vector: the function is applied to the eigenvalues.

    With ``lambda values: (images * values + prior).rsqrt()`` and a standard normal ``v``, the result is distributed as
    the parameters' deviations from their mean in Laplace's approximation.

    Args:
        curvature: from `kfac` or `ekfac`.
        function: from the eigenvalues of one block to a tensor of the same shape.
        v: a tree with the same parameters.

    Raises:
        ValueError: if ``v`` has other parameters.

    >>> matrix_function({"scale": torch.tensor([4.0])}, torch.sqrt, {"scale": torch.tensor([3.0])})
    {'scale': tensor([6.])}
    """
    result: Tree = {}
    for name, own in curvature.items():
        if name not in v:
            continue
        if isinstance(own, Tensor):
            _check_fits(name, own.shape, v[name].shape)
            result[name] = function(own).to(v[name].dtype) * v[name]
        elif not isinstance(own, Block):
            result[name] = matrix_function(own, function, v[name])
        else:
            groups, outputs, inputs = own.values.shape
            names = [name, "bias"] if "bias" in v and "bias" not in curvature else [name]
            columns = [v[each].reshape(len(v[each]), -1) for each in names]
            matrix = torch.cat(columns, 1).to(own.values.dtype)
            _check_fits(name, (groups * outputs, inputs), matrix.shape)
            matrix = matrix.reshape(own.values.shape)
            turned = function(own.values) * (own.outputs.mT @ matrix @ own.inputs)
            matrix = (own.outputs @ turned @ own.inputs.mT).reshape(groups * outputs, inputs)
            for each, piece in zip(names, torch.split(matrix, [part.shape[1] for part in columns], 1), strict=True):
                result[each] = piece.reshape(v[each].shape).to(v[each].dtype)
    if result.keys() != v.keys():
        raise ValueError(f"curvature and vector have different parameters: {sorted(curvature)} and {sorted(v)}")
    return {name: result[name] for name in v}


def _check_fits(name: str, expected: tuple[int, ...], found: tuple[int, ...]) -> None:
    if found != expected:
        raise ValueError(
            f"curvature and vector have different parameters: at {name!r} expected {tuple(expected)}, "
            f"found {tuple(found)}"
        )


def eigenvalues(curvature: Tree) -> Tensor:
    """All eigenvalues, (parameters,), at least 0, in no particular order.

    The sum of ``log(values + damping)`` is the logarithm of the damped matrix's determinant.

    Args:
        curvature: from `kfac` or `ekfac`.

    >>> eigenvalues({"scale": torch.tensor([2.0, 1.0])})
    tensor([2., 1.])
    """
    leaves = tree.flatten(curvature).values()
    return torch.cat([(leaf.values if isinstance(leaf, Block) else leaf).flatten() for leaf in leaves])


# One pass, one layer -----------------------------------------------------------------------------------------


def _factored(
    model: Model,
    params: Tree,
    state: Tree,
    batches: Iterable[Batch],
    fisher: Fisher,
    key: Tensor | None,
    loss: Loss | None,
    trainable: Trainable | None,
) -> Tree:
    """The curvature before its eigenvalues are corrected."""
    reads: dict[str, Tensor] = {}
    signals: dict[str, Tensor] = {}
    positions: dict[str, int] = {}
    diagonal = {path: _long(torch.zeros_like(leaf)) for path, leaf in partition(params, trainable)[0].items()}
    count = 0
    for recorded, first in _passes(model, params, state, batches, fisher, key, loss, trainable):
        count += len(recorded.losses) * first
        joint = _joint(recorded.uses)
        single: dict[str, Tensor] = {}
        for use in recorded.uses:
            names = use.names
            if path := _block(use):
                read, signal = _operands(recorded, use, path in joint)
                if first:  # inputs are the same in every pass over the same images
                    reads[path] = _moments(read) + reads.get(path, 0)
                    positions[path] = len(read) * read.shape[2] + positions.get(path, 0)
                signals[path] = _moments(signal) + signals.get(path, 0)
                own = ("weight", "bias") if path in joint else ("weight",)
                for name in own:
                    diagonal.pop(use.paths[name], None)
                names = tuple(name for name in names if name not in own)
            for name, gradient in recorded.gradients(use, names).items():
                place = use.paths[name]
                single[place] = single[place] + gradient if place in single else gradient
        for place, gradient in single.items():
            diagonal[place] = diagonal[place] + _long(gradient).square().sum(0)
    if not count:
        raise ValueError("there are no images to take the curvature of")
    found: dict[str, Any] = {place: square / count for place, square in diagonal.items()}
    for path, moments in reads.items():
        inner, inputs = _eigen(moments / count, path)
        outer, outputs = _eigen(signals[path] / positions[path], path)
        found[path] = Block(outputs, inputs, outer[:, :, None] * inner[:, None])
    return tree.unflatten({path: found[path] for path in tree.flatten(params) if path in found})


def _passes(
    model: Model,
    params: Tree,
    state: Tree,
    batches: Iterable[Batch],
    fisher: Fisher,
    key: Tensor | None,
    loss: Loss | None,
    trainable: Trainable | None,
) -> Iterator[tuple[Recorded, bool]]:
    """The record of each pass over a batch, and whether it is the batch's first pass.

    The gradients' outer products, summed over passes and images, are the Fisher information times the number of
    images.
    """
    if fisher not in ("sampled", "expected", "empirical"):
        raise ValueError(f"fisher is 'sampled', 'expected' or 'empirical', found {fisher!r}")
    if fisher == "sampled" and key is None:
        raise ValueError("labels are drawn from the model's distribution: pass key=purecnn.random.key(seed)")
    if fisher != "empirical" and loss is not None:
        raise ValueError(f"{fisher!r} Fisher information uses cross-entropy: give a loss only with fisher='empirical'")
    if fisher != "empirical" and model.probabilities is not softmax:
        raise ValueError(f"{model.name} gives no logits, so it has no {fisher} Fisher information: use 'empirical'")
    criterion = (loss or model.loss or loss_function) if fisher == "empirical" else loss_function
    device = tree.device(params)
    params, state = tree.map(torch.detach, params), tree.map(torch.detach, state)
    for number, (images, labels) in enumerate(batch for batch in batches if len(batch[0])):
        images, labels = images.to(device), labels.to(device)

        def pass_of(labels: Tensor, images: Tensor = images) -> Recorded:
            return record(model, params, state, (images, labels), False, None, None, criterion, trainable)

        if fisher == "empirical":
            yield pass_of(labels), True
            continue
        with torch.no_grad():
            shares = _long(logits_of(model.apply(params, state, images)[0])).softmax(1)
        if key is not None and fisher == "sampled":
            drawn = random.uniform(random.fold_in(key, number).to(device), (len(images), 1))
            yield pass_of((shares.cumsum(1) < drawn).sum(1).clamp(max=shares.shape[1] - 1)), True
            continue
        for label in range(shares.shape[1]):
            recorded = pass_of(torch.full((len(images),), label, device=device))
            roots = shares[:, label].sqrt()
            uses = [use._replace(y=use.y * roots.reshape(-1, *[1] * (use.y.ndim - 1))) for use in recorded.uses]
            yield recorded._replace(uses=uses), not label


def _block(use: Use) -> str | None:
    """The path of the weight whose block this layer belongs to; None if it has no block."""
    if "weight" in use.names and isinstance(use.layer.kind, Convolution | Linear):
        return use.paths["weight"]
    return None


def _joint(uses: list[Use]) -> set[str]:
    """The paths of the weights whose block includes a bias: one that is trained and lies beside the weight in every use
    of it."""
    found: dict[str, bool] = {}
    for use in uses:
        if path := _block(use):
            beside = "bias" in use.names and use.paths["bias"].rpartition(".")[0] == path.rpartition(".")[0]
            found[path] = found.get(path, True) and beside
    return {path for path, joint in found.items() if joint}


def _operands(recorded: Recorded, use: Use, joint: bool) -> tuple[Tensor, Tensor]:
    """Inputs (with ones for a bias) and gradients by the output: (batch, groups, positions, inputs or outputs)."""
    read, signal = operands(use, recorded.parameters(use)["weight"])
    if joint:
        read = torch.cat([read, torch.ones_like(read[..., :1])], -1)
    return _long(read), _long(signal)


def _long(x: Tensor) -> Tensor:
    """At least in single precision: long sums in float16 or bfloat16 stop growing."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _moments(x: Tensor) -> Tensor:
    """Second moments, summed over images and positions: (groups, size, size)."""
    columns = x.movedim(1, 0).flatten(1, 2)
    return columns.mT @ columns


def _eigen(moments: Tensor, path: str) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of each group, in double precision; those that rounding made negative become 0."""
    if not is_transformed() and not moments.isfinite().all():
        raise ValueError(f"the inputs or gradients of {path!r} are not finite")
    values, vectors = torch.linalg.eigh(moments.double())
    return values.clamp(min=0).to(moments.dtype), vectors.to(moments.dtype)
