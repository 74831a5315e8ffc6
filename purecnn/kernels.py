"""The network's Jacobian: neural tangent kernel, tangent features, and the linearised network.

    empirical_ntk(network, params, images)            # (images, images, classes, classes)

``network(params, images)`` returns logits and treats each image independently; see `purecnn.curvature.frozen` for that
of a model, and `purecnn.curvature.restrict` for a part of the parameters.
"""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.func import jacrev, jvp, vjp, vmap

from purecnn import random, tree
from purecnn.curvature import Network, rademacher, ravel
from purecnn.tree import Tree

__all__ = ["empirical_ntk", "jacobian", "linearize", "tangent_features"]

_BUDGET = 1 << 30  # bytes of Jacobians up to which they are computed


def jacobian(network: Network, params: Tree, images: Tensor) -> Tensor:
    """The derivative of each image's logits by all parameters: (batch, classes, parameters), in the order of `ravel`.

    Args:
        network: from parameters and images to logits; it must treat each image independently.
        params: where it is taken.
        images: (batch, channels, height, width).

    >>> linear = lambda params, images: images.flatten(1) @ params["weight"].T
    >>> jacobian(linear, {"weight": torch.zeros(2, 1)}, torch.full((1, 1, 1, 1), 3.0))
    tensor([[[3., 0.],
             [0., 3.]]])
    """
    rows = vmap(jacrev(lambda params, image: network(params, image[None])[0]), (None, 0))(params, images)
    return torch.cat([leaf.flatten(2) if leaf.ndim > 2 else leaf[..., None] for leaf in tree.flatten(rows).values()], 2)


def empirical_ntk(
    network: Network,
    params: Tree,
    images: Tensor,
    others: Tensor | None = None,
    *,
    method: Literal["jacobian", "products"] | None = None,
) -> Tensor:
    """The empirical neural tangent kernel ``J(x) J(x')^T`` (Jacot et al. 2018, arXiv:1806.07572).

    Args:
        network: from parameters and images to logits.
        params: where it is taken.
        images: (n, channels, height, width).
        others: (m, channels, height, width); by default ``images``.
        method: ``"jacobian"`` computes both Jacobians, ``(n + m) x classes x parameters`` numbers, and multiplies them.
            ``"products"`` holds one row of a Jacobian at a time, and takes the derivative of ``others``' logits along
            it, ``n x classes`` times (Novak et al. 2022, arXiv:2206.08720, sections 3.1 and 3.2). By default the first
            if the Jacobians take no more than 1 GiB.

    Returns:
        (n, m, classes, classes).

    Raises:
        ValueError: if ``method`` is not one of these.

    >>> linear = lambda params, images: images.flatten(1) @ params["weight"].T
    >>> empirical_ntk(linear, {"weight": torch.zeros(2, 1)}, torch.tensor([2.0, 3.0]).reshape(2, 1, 1, 1))[0, 1]
    tensor([[6., 0.],
            [0., 6.]])
    """
    if method not in (None, "jacobian", "products"):
        raise ValueError(f"method is 'jacobian', 'products' or None, found {method!r}")
    same = others is None
    second = images if others is None else others
    if method is None:
        vector = ravel(params)
        classes = network(params, images[:1]).shape[1]
        rows = (len(images) + (0 if same else len(second))) * classes
        method = "jacobian" if rows * vector.numel() * vector.element_size() <= _BUDGET else "products"
    if method == "jacobian":
        left = jacobian(network, params, images)
        right = left if same else jacobian(network, params, second)
        return torch.einsum("ncp,mdp->nmcd", left, right)

    def column(image: Tensor) -> Tensor:
        logits, pull = vjp(lambda params: network(params, image[None])[0], params)[:2]

        def row(basis: Tensor) -> Tensor:
            return jvp(lambda params: network(params, second), (params,), pull(basis))[1]

        return torch.stack([row(basis) for basis in torch.eye(len(logits), dtype=logits.dtype, device=logits.device)])

    return torch.stack([column(image).transpose(0, 1) for image in images])


def linearize(network: Network, params: Tree) -> Network:
    """The network linearised in its parameters: ``f(params) + J (params' - params)``, its first-order Taylor series.

    The training of a wide network follows it (Lee et al. 2019, arXiv:1902.06720). A value costs one forward derivative.

    Args:
        network: from parameters and images to logits.
        params: the point of the expansion.

    >>> square = lambda params, images: params["w"] ** 2 * images.flatten(1)
    >>> linear = linearize(square, {"w": torch.tensor(3.0)})
    >>> linear({"w": torch.tensor(4.0)}, torch.ones(1, 1, 1, 1))  # 9 + 6 (4 - 3)
    tensor([[15.]])
    """

    def linear(other: Tree, images: Tensor) -> Tensor:
        step = tree.map(torch.sub, other, params)
        logits, slope = jvp(lambda params: network(params, images), (params,), (step,))[:2]
        return logits + slope

    return linear


def tangent_features(network: Network, params: Tree, images: Tensor, key: Tensor, count: int) -> Tensor:
    """Jacobian-vector products with random directions: ``J(x) [v1 ... vk] / sqrt(k)``, where ``v`` are random signs.

    A sketch of the tangent kernel: ``features(x) . features(x')`` is an unbiased estimate of `empirical_ntk`, with a
    standard error that falls as ``1 / sqrt(count)``; it takes ``count`` forward derivatives instead of the Jacobians
    (gradients as features: Mu et al. 2020, arXiv:2004.05529; random projections: Park et al. 2023, arXiv:2303.14186).

    Args:
        network: from parameters and images to logits; it need not treat images independently.
        params: where it is taken.
        images: (batch, channels, height, width).
        key: for the directions; features are comparable only if they have the same key.
        count: number of directions.

    Returns:
        (batch, classes, count).

    >>> linear = lambda params, images: images.flatten(1) @ params["weight"].T
    >>> features = tangent_features(linear, {"weight": torch.zeros(2, 1)}, torch.ones(1, 1, 1, 1), random.key(0), 4)
    >>> features.square().sum(-1)
    tensor([[1., 1.]])
    """

    def feature(key: Tensor) -> Tensor:
        return jvp(lambda params: network(params, images), (params,), (rademacher(key, params),))[1]

    return torch.stack([feature(each) for each in random.split(key, count)], dim=-1) / math.sqrt(count)
