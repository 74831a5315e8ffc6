"""Influence functions: predict what would change if a training example were left out, without retraining.

    product = lambda v: hvp(objective, params, v)
    influence(product, train_losses, test_loss, params).changes    # (training examples,)

Koh and Liang 2017, "Understanding Black-box Predictions via Influence Functions", arXiv:1703.04730. The theory holds at
a minimum of a strictly convex objective, such as that of a regularised linear head on frozen features. For whole
networks it predicts something other than the effect of retraining (Bae et al. 2022, arXiv:2209.05364), and needs the
Gauss-Newton matrix or damping, because the Hessian has negative eigenvalues.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad, jvp

from purecnn.curvature import Loss, Product, dot, ordered, ravel, unravel
from purecnn.eager import is_mapped
from purecnn.tree import Tree

__all__ = ["Influence", "Solution", "conjugate_gradient", "influence"]


class Solution(NamedTuple):
    """The result of `conjugate_gradient`, and how good it is."""

    x: Tree
    residual: Tensor
    """``|b - (A + damping) x| / |b|``, from a separate product after the last iteration."""
    iterations: Tensor
    """Number of products taken, not counting that one: int64."""
    converged: Tensor
    """Whether the residual is at most the tolerance. If not, there were too few iterations, the matrix is not positive
    in some direction (more damping helps), or the tolerance is below the precision of the number type."""


def conjugate_gradient(
    product: Product,
    b: Tree,
    *,
    damping: float = 0.0,
    tolerance: float = 1e-5,
    max_iterations: int = 100,
    preconditioner: Product | None = None,
) -> Solution:
    """Solve ``(A + damping I) x = b`` for a positive definite ``A``, given by products (Hestenes and Stiefel 1952).

    Args:
        product: the matrix ``A``.
        b: the right-hand side. ``vmap`` over it solves for several at once, but always runs ``max_iterations``.
        damping: added to the diagonal.
        tolerance: the relative residual at which to stop.
        max_iterations: the most iterations. A direction of zero or negative curvature also ends the iteration.
        preconditioner: an approximate inverse of ``A + damping I``, symmetric and positive definite: the better it is,
            the fewer iterations are needed. By default the identity.

    Returns:
        The last iterate. `Solution.converged` says whether it solves the equation: no error is raised if not.

    >>> solution = conjugate_gradient(lambda v: {"w": torch.tensor([1.0, 4.0]) * v["w"]}, {"w": torch.ones(2)})
    >>> solution.x, int(solution.iterations), bool(solution.converged)
    ({'w': tensor([1.0000, 0.2500])}, 2, True)
    """
    right = ravel(b)
    largest = right.abs().max()
    scale = torch.where(largest > 0, largest, 1)  # the square of a small vector may underflow
    right = right / scale

    def apply(v: Tensor) -> Tensor:
        return ravel(ordered(b, product(unravel(v, b)))) + damping * v

    def inverse(v: Tensor) -> Tensor:
        return v if preconditioner is None else ravel(ordered(b, preconditioner(unravel(v, b))))

    x = torch.zeros_like(right)
    residual = right
    direction = inverse(residual)
    square = dot(residual, direction)
    target = tolerance**2 * dot(right, right)
    iterations = torch.zeros((), dtype=torch.int64, device=right.device)
    going = dot(right, right) > target
    for _ in range(max_iterations):
        # Under vmap and the compiler the loop cannot end early, so what is solved already does not change.
        if not is_mapped() and not going:
            break
        curved = apply(direction)
        curvature = dot(direction, curved)
        iterations = iterations + going
        going = going & (curvature > 0)
        step = torch.where(going, square / curvature, 0)
        x = x + step * direction
        residual = residual - step * curved
        nearer = inverse(residual)
        before, square = square, dot(residual, nearer)
        direction = torch.where(going, nearer + square / before * direction, direction)
        going = going & (dot(residual, residual) > target)
    left = right - apply(x)
    size = dot(right, right)
    relative = torch.where(size > 0, (dot(left, left) / size).sqrt(), 0)
    return Solution(unravel(x * scale, b), relative, iterations, relative <= tolerance)


class Influence(NamedTuple):
    """The result of `influence`."""

    changes: Tensor
    """(examples,): how much the measure would grow if the example had been left out. For a test loss, helpful examples
    have positive changes and harmful ones negative changes."""
    solution: Solution
    """The solution of the linear system: check whether it converged."""


def influence(
    product: Product,
    train_losses: Callable[[Tree], Tensor],
    measure: Loss,
    params: Tree,
    *,
    damping: float = 0.0,
    tolerance: float = 1e-5,
    max_iterations: int = 100,
    preconditioner: Product | None = None,
) -> Influence:
    """Predict how a measure changes when each training example is left out in turn.

    If the objective is the mean of ``n`` losses (and any regulariser), leaving out example ``i``, whose loss has the
    gradient ``g_i``, moves the minimum by ``H^-1 g_i / n`` to first order, and so the measure by
    ``(d measure) . H^-1 g_i / n``. One linear system is solved, and one forward derivative gives the products with all
    ``g_i``; no single example's gradient is computed.

    Args:
        product: the objective's Hessian ``H``, as ``lambda v: hvp(objective, params, v)``, or its Gauss-Newton matrix.
        train_losses: from parameters to the loss of each of the ``n`` training examples, (n,).
        measure: from parameters to a scalar, such as the loss of a test image.
        params: the objective's minimum.
        damping, tolerance, max_iterations, preconditioner: see `conjugate_gradient`.

    >>> x = torch.tensor([1.0, 2.0, 6.0])  # their mean minimises the squared error
    >>> squares = lambda p: (p["mean"] - x) ** 2 / 2
    >>> influence(lambda v: v, squares, lambda p: p["mean"], {"mean": torch.tensor(3.0)}).changes
    tensor([ 0.6667,  0.3333, -1.0000])
    """
    solution = conjugate_gradient(
        product,
        grad(measure)(params),
        damping=damping,
        tolerance=tolerance,
        max_iterations=max_iterations,
        preconditioner=preconditioner,
    )
    slopes = jvp(train_losses, (params,), (solution.x,))[1]
    return Influence(slopes / len(slopes), solution)
