"""Curvature of a loss as a function of the parameters: products, Fisher information, trace and spectrum.

    network = frozen(model, state)
    loss = lambda params: F.cross_entropy(network(params, images), labels)
    product = lambda v: hvp(loss, params, v)              # never the matrix
    lanczos(product, params, key, steps=30).values[-1]    # the largest eigenvalue

The functions take functions of the parameters; ``vmap``, ``jvp`` and ``torch.compile`` apply to all of them. To look at
a part of the parameters, choose it with `restrict` before differentiating.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, jacrev, jvp, vjp, vmap

from purecnn import random, tree
from purecnn.layer import logits_of
from purecnn.model import Model
from purecnn.step import partition
from purecnn.tree import Tree

__all__ = [
    "Estimate",
    "Spectrum",
    "fisher_blocks",
    "fisher_diagonal",
    "frozen",
    "ggn_product",
    "hutchinson_trace",
    "hvp",
    "lanczos",
    "rademacher",
    "ravel",
    "restrict",
    "spectral_density",
    "unravel",
]

Loss: TypeAlias = Callable[[Tree], Tensor]
"""From parameters to a scalar."""
Network: TypeAlias = Callable[[Tree, Tensor], Tensor]
"""From parameters and images (batch, channels, height, width) to logits (batch, classes)."""
Product: TypeAlias = Callable[[Tree], Tree]
"""A symmetric matrix as its product with a vector: from a tree to a tree of the same names and shapes."""


# Functions of parameters ---------------------------------------------------------------------------------------


def frozen(model: Model, state: Tree, *, train: bool = False, key: Tensor | None = None) -> Network:
    """The network as a function of parameters and images, normalised by the running statistics.

    Args:
        model: the network.
        state: its running statistics, which do not change.
        train: use dropout, drawn from ``key``: the same mask at each call.
        key: see `Model.apply`.

    >>> import purecnn
    >>> model = purecnn.create("lenet5")
    >>> params, state = model.init(random.key(0))
    >>> frozen(model, state)(params, torch.zeros(2, 1, 32, 32)).shape
    torch.Size([2, 10])
    """

    def network(params: Tree, images: Tensor) -> Tensor:
        outputs, _ = model.apply(params, state, images, train=train, key=key, statistics="running")
        return logits_of(outputs)

    return network


def restrict(
    function: Callable[..., Any], params: Tree, chosen: Callable[[str], bool]
) -> tuple[Tree, Callable[..., Any]]:
    """Choose some of the parameters, and make ``function`` a function of these, with the others fixed.

    Args:
        function: of parameters and any further arguments.
        params: all parameters.
        chosen: whether the parameter at a path stays variable.

    Returns:
        The chosen parameters, and ``function`` with a tree of these as its first argument.

    Raises:
        ValueError: if no parameter is chosen.

    >>> params = {"stem": torch.tensor(2.0), "head": torch.tensor(3.0)}
    >>> head, f = restrict(lambda params: params["stem"] * params["head"], params, lambda path: path == "head")
    >>> hvp(lambda head: f(head) ** 2, head, {"head": torch.tensor(1.0)})
    {'head': tensor(8.)}
    """
    leaves = tree.flatten(params)
    part, _ = partition(params, chosen)

    def of_part(part: Tree, *args: Any, **named: Any) -> Any:
        return function(tree.unflatten({**leaves, **tree.flatten(part)}), *args, **named)

    return tree.unflatten(part), of_part


def ravel(params: Tree) -> Tensor:
    """Concatenate all leaves of a tree into one vector, in the tree's order.

    >>> ravel({"weight": torch.ones(2, 1), "bias": torch.zeros(())})
    tensor([1., 1., 0.])
    """
    return torch.cat([leaf.reshape(-1) for leaf in tree.flatten(params).values()])


def unravel(vector: Tensor, like: Tree) -> Tree:
    """The inverse of `ravel`: the tree with the names and shapes of ``like`` and the values of ``vector``."""
    leaves = tree.flatten(like)
    pieces = torch.split(vector, [leaf.numel() for leaf in leaves.values()])
    return tree.unflatten(
        {path: piece.reshape(leaf.shape) for (path, leaf), piece in zip(leaves.items(), pieces, strict=True)}
    )


def dot(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of two long vectors. On a CPU, ``a @ b`` and ``norm`` lose digits: with 25 million elements in
    single precision, a sum of squares was off by 1e-4 and 3e-3 (PyTorch 2.14.1), and this one by 5e-8."""
    return (a * b).sum()


def ordered(params: Tree, v: Tree) -> Tree:
    """The tree ``v`` in the order of ``params``, which ``torch.func`` requires."""
    return tree.map(lambda _, leaf: leaf, params, v)


# Products ------------------------------------------------------------------------------------------------------


def hvp(loss: Loss, params: Tree, v: Tree) -> Tree:
    """The Hessian-vector product of a loss: the derivative of the gradient along ``v``.

    Forward-over-reverse differentiation (Pearlmutter 1994, Neural Computation 6:147), at the cost of a few gradients.

    Args:
        loss: from parameters to a scalar.
        params: where the Hessian is taken.
        v: a tree like ``params``.

    >>> hvp(lambda p: (p["w"] ** 3).sum(), {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([1.0, 1.0])})
    {'w': tensor([ 6., 12.])}
    """
    return jvp(grad(loss), (params,), (ordered(params, v),))[1]


def ggn_product(outputs: Callable[[Tree], Tensor], loss: Callable[[Tensor], Tensor], params: Tree, v: Tree) -> Tree:
    """The generalised Gauss-Newton matrix times a vector: ``J^T H J v``.

    ``J`` is the network's Jacobian and ``H`` the Hessian of the loss as a function of its outputs (Schraudolph 2002,
    Neural Computation 14:1723). It would be the loss's Hessian if the network were linear in its parameters. With
    cross-entropy it is the Fisher information (Martens 2014, arXiv:1412.1193, section 9.2).

    Args:
        outputs: from parameters to the network's outputs.
        loss: from these outputs to a scalar; where it is convex, the matrix has no negative eigenvalue.
        params: where the matrix is taken.
        v: a tree like ``params``.

    >>> w = {"w": torch.tensor([1.0, 2.0])}
    >>> ggn_product(lambda p: p["w"] ** 2, lambda y: (y**2).sum() / 2, w, {"w": torch.ones(2)})  # J = diag(2 w), H = I
    {'w': tensor([ 4., 16.])}
    """
    at, pull = vjp(outputs, params)[:2]
    along = jvp(outputs, (params,), (ordered(params, v),))[1]
    curved = jvp(grad(loss), (at,), (along,))[1]
    return pull(curved)[0]


# Fisher information --------------------------------------------------------------------------------------------


def fisher_diagonal(
    network: Network, params: Tree, images: Tensor, labels: Tensor | None = None, *, chunk_size: int | None = None
) -> Tree:
    """The diagonal of a classifier's Fisher information, averaged over images.

    Without labels it is the true Fisher information, ``sum_c p(c|x) (d log p(c|x))^2``: the expectation over the
    *model's* distribution of classes, which is the Gauss-Newton matrix of cross-entropy. With labels it is the
    *empirical* one, ``(d log p(label|x))^2``, which is a different matrix (Kunstner et al. 2019, arXiv:1905.12558).

    Args:
        network: from parameters and images to logits; it must treat each image independently, see `frozen`.
        params: where it is taken.
        images: (batch, channels, height, width).
        labels: (batch,), int64.
        chunk_size: number of images at a time; by default all. Memory grows with ``chunk_size * classes * parameters``
            (``chunk_size * parameters`` with labels).

    Raises:
        ValueError: if there are not as many labels as images, or ``chunk_size`` is less than 1.

    >>> linear = lambda params, images: images.flatten(1) @ params["weight"].T
    >>> fisher_diagonal(linear, {"weight": torch.zeros(2, 1)}, torch.full((5, 1, 1, 1), 2.0))  # p (1 - p) x^2
    {'weight': tensor([[1.0000],
            [1.0000]])}
    """
    return _fisher(lambda scores: scores.square().sum((0, 1)), network, params, images, labels, chunk_size)


def fisher_blocks(
    network: Network, params: Tree, images: Tensor, labels: Tensor | None = None, *, chunk_size: int | None = None
) -> Tree:
    """The diagonal blocks of the Fisher information, (size, size), one for each (flattened) leaf.

    Arguments and errors are those of `fisher_diagonal`; choose leaves with `restrict`.

    >>> linear = lambda params, images: images.flatten(1) @ params["weight"].T
    >>> fisher_blocks(linear, {"weight": torch.zeros(2, 1)}, torch.full((5, 1, 1, 1), 2.0))
    {'weight': tensor([[ 1.0000, -1.0000],
            [-1.0000,  1.0000]])}
    """

    def outer(scores: Tensor) -> Tensor:
        rows = scores.reshape(scores.shape[0] * scores.shape[1], -1)
        return rows.T @ rows

    return _fisher(outer, network, params, images, labels, chunk_size)


def _fisher(
    contract: Callable[[Tensor], Tensor],
    network: Network,
    params: Tree,
    images: Tensor,
    labels: Tensor | None,
    chunk_size: int | None,
) -> Tree:
    """The mean over images of ``contract``, which takes each leaf's scores (images, classes, *leaf). The outer products
    of the scores sum to the Fisher information."""
    if labels is not None and labels.shape != images.shape[:1]:
        raise ValueError(f"labels must be one for each of {len(images)} images, found {tuple(labels.shape)}")

    def expected(image: Tensor) -> Tree:
        def log_probabilities(params: Tree) -> tuple[Tensor, Tensor]:
            found = F.log_softmax(network(params, image[None])[0], dim=0)
            return found, found

        scores, found = jacrev(log_probabilities, has_aux=True)(params)
        roots = (found / 2).exp()
        return tree.map(lambda leaf: leaf * roots.reshape(-1, *(1 for _ in leaf.shape[1:])), scores)

    def empirical(image: Tensor, label: Tensor) -> Tree:
        scores = grad(lambda params: F.cross_entropy(network(params, image[None]), label[None]))(params)
        return tree.map(lambda leaf: leaf[None], scores)

    batch = (images,) if labels is None else (images, labels)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, found {chunk_size}")
    size = chunk_size or len(images)
    sums = [
        tree.map(contract, vmap(expected if labels is None else empirical)(*part))
        for part in zip(*(torch.split(each, size) for each in batch), strict=True)
    ]
    return tree.map(lambda *parts: sum(parts) / len(images), *sums)


# Trace and spectrum --------------------------------------------------------------------------------------------


class Estimate(NamedTuple):
    """A mean of random draws."""

    mean: Tensor
    standard_error: Tensor
    """The standard error of the mean; NaN for a single draw."""


def rademacher(key: Tensor, like: Tree) -> Tree:
    """A tree with the names, shapes and types of ``like`` whose elements are 1 or -1, both equally likely.

    >>> rademacher(random.key(0), {"w": torch.zeros(4)})
    {'w': tensor([-1.,  1.,  1.,  1.])}
    """
    signs = [
        random.bernoulli(random.fold_in(key, i), 0.5, leaf.shape).to(leaf.dtype) * 2 - 1
        for i, leaf in enumerate(tree.flatten(like).values())
    ]
    return tree.unflatten(dict(zip(tree.flatten(like), signs, strict=True)))


def hutchinson_trace(product: Product, params: Tree, key: Tensor, samples: int) -> Estimate:
    """Estimate the trace of a matrix from products with random signs: the mean of ``v . A v`` (Hutchinson 1990).

    Args:
        product: the matrix.
        params: the tree that it acts on, for its shapes.
        key: for the signs.
        samples: number of products.

    Returns:
        The mean, and its standard error: NaN for a single product.

    Raises:
        ValueError: if ``samples`` is less than 1.

    >>> hutchinson_trace(lambda v: {"w": 3 * v["w"]}, {"w": torch.zeros(5)}, random.key(0), 2)
    Estimate(mean=tensor(15.), standard_error=tensor(0.))
    """
    if samples < 1:
        raise ValueError(f"a trace takes at least one product, found {samples}")

    def draw(key: Tensor) -> Tensor:
        v = rademacher(key, params)
        return dot(ravel(v), ravel(product(v)))

    draws = torch.stack([draw(each) for each in random.split(key, samples)])
    error = (draws - draws.mean()).square().sum() / (samples - 1) / samples if samples > 1 else draws[0] * math.nan
    return Estimate(draws.mean(), error.sqrt())


class Spectrum(NamedTuple):
    """Approximate eigenvalues of a matrix, from `lanczos`."""

    values: Tensor
    """Ritz values, ascending, (steps,): they lie within the spectrum; the outermost converge first."""
    weights: Tensor
    """(steps,), at least 0, with sum 1: with the values, the Gauss quadrature of the matrix's spectral density."""
    residuals: Tensor
    """(steps,): each value has an eigenvalue at most this far away, apart from rounding errors of the products.
    Infinite for placeholders, see `lanczos`."""


def lanczos(product: Product, params: Tree, key: Tensor, steps: int) -> Spectrum:
    """Eigenvalues of a symmetric matrix from its products (Lanczos 1950), with full reorthogonalisation.

    Each step takes one product and keeps one vector of the size of ``params``. If the vectors span an invariant
    subspace before the last step, placeholders from within the spectrum, with weight 0, fill the remaining steps.

    Args:
        product: the matrix.
        params: the tree that it acts on, for its shapes.
        key: for the first vector, which is normally distributed.
        steps: number of steps; at most the number of the matrix's rows.

    Raises:
        ValueError: if ``steps`` is less than 1.

    >>> diagonal = {"w": torch.tensor([1.0, 2.0, 5.0])}
    >>> lanczos(lambda v: {"w": diagonal["w"] * v["w"]}, diagonal, random.key(0), 3).values
    tensor([1.0000, 2.0000, 5.0000])
    """
    if steps < 1:
        raise ValueError(f"Lanczos' method makes at least one step, found {steps}")
    like = ravel(params)
    v = random.normal(key, like.shape, like.dtype)
    v = v / dot(v, v).sqrt()
    basis = [v]
    alive = torch.ones((), dtype=torch.bool, device=v.device)
    scale = torch.zeros_like(v[0])
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    made: list[Tensor] = []
    for _ in range(min(steps, len(like))):
        made.append(alive)
        w = ravel(product(unravel(v, params)))
        # When all directions are used up, no vector is left. A value from within the spectrum, with weight 0, is a
        # placeholder for each missing one, because a loop under vmap cannot end early.
        alphas.append(torch.where(alive, dot(v, w), alphas[0] if alphas else 0))
        for _ in range(2):  # one pass leaves rounding errors that grow
            for q in basis:
                w = w - dot(q, w) * q
        beta = dot(w, w).sqrt()
        scale = torch.maximum(scale, alphas[-1].abs() + beta)
        alive = alive & (beta > 10 * torch.finfo(v.dtype).eps * scale)
        betas.append(torch.where(alive, beta, 0))
        v = torch.where(alive, w / beta, 0)
        basis.append(v)
    side = torch.stack(betas[:-1]) if betas[1:] else v[:0]
    values, vectors = torch.linalg.eigh(torch.diag(torch.stack(alphas)) + torch.diag(side, 1) + torch.diag(side, -1))
    substituted = (vectors.square() * ~torch.stack(made)[:, None]).sum(0) > 0.5
    residuals = torch.where(substituted, math.inf, betas[-1] * vectors[-1].abs())
    return Spectrum(values, vectors[0].square(), residuals)


def spectral_density(spectrum: Spectrum, points: int = 512, width: float = 0.01) -> tuple[Tensor, Tensor]:
    """The density of a matrix's eigenvalues, each smoothed to a normal distribution.

    Ghorbani et al. 2019, arXiv:1901.10159, section 3.

    Args:
        spectrum: from one run of `lanczos`, or from several, stacked: ``vmap`` over keys averages over first vectors.
        points: number of points; fewer than ``3 / width`` may miss narrow peaks.
        width: standard deviation of the smoothing, as a share of the spectrum's range.

    Returns:
        ``points`` places and the density at each, with integral 1.

    >>> spectrum = Spectrum(torch.tensor([0.0, 1.0]), torch.tensor([0.75, 0.25]), torch.zeros(2))
    >>> places, density = spectral_density(spectrum)
    >>> torch.trapezoid(density, places), torch.trapezoid(density * places, places)
    (tensor(1.0000), tensor(0.2500))
    """
    values, weights = spectrum.values.flatten(), spectrum.weights.flatten()
    info = torch.finfo(values.dtype)
    low, high = values.min(), values.max()
    # The extent of equal eigenvalues is 0; a value from their size, or a tiny number, takes its place.
    extent = (high - low).clamp(min=info.eps * max(1.0, 1 / width) * values.abs().max() + info.tiny * 1e6)
    sigma = width * extent
    places = (
        low
        - 5 * sigma
        + torch.linspace(0, 1, points, dtype=values.dtype, device=values.device) * (high - low + 10 * sigma)
    )
    bells = (-((places - values[:, None]) / sigma).square() / 2).exp() / (sigma * math.sqrt(2 * math.pi))
    return places, weights @ bells / weights.sum()
