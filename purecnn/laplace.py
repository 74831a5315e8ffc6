"""Last-layer Laplace approximation: a normal distribution over the head's weights of a trained network.

    head, network = restrict(frozen(model, state), params, lambda path: path.startswith("head."))
    posterior = laplace(network, F.cross_entropy, head, images, labels, prior_precision=1.0)
    probabilities = probit(*predictive(network, posterior, new_images))

The posterior is approximated around its maximum by a normal distribution, whose precision is the Gauss-Newton matrix of
the whole head plus the prior's precision (MacKay 1992, Neural Computation 4:448; Kristiadi et al. 2020,
arXiv:2002.10118; Daxberger et al. 2021, "Laplace Redux", arXiv:2106.14806). Memory grows with the square of the number
of the head's parameters.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import hessian, vmap

from purecnn import random
from purecnn.curvature import Network, ravel, unravel
from purecnn.kernels import jacobian
from purecnn.tree import Tree

__all__ = ["Posterior", "laplace", "log_evidence", "predictive", "probit", "sample"]


class Posterior(NamedTuple):
    """A normal distribution of parameters: mean, and precision ``ggn + prior_precision I``."""

    mean: Tree
    ggn: Tensor
    """Gauss-Newton matrix of the negative log-likelihood, summed over examples: (parameters, parameters)."""
    log_likelihood: Tensor
    """The log-likelihood of all examples, at the mean."""
    prior_precision: float | Tensor
    """The precision of the prior, a normal distribution around zero. May be replaced later: see `log_evidence`."""

    @property
    def precision_factor(self) -> Tensor:
        """The lower triangular ``L`` with precision ``L L^T``."""
        eye = torch.eye(len(self.ggn), dtype=self.ggn.dtype, device=self.ggn.device)
        return torch.linalg.cholesky(self.ggn + self.prior_precision * eye)


def laplace(
    network: Network,
    negative_log_likelihood: Callable[[Tensor, Tensor], Tensor],
    params: Tree,
    images: Tensor,
    labels: Tensor,
    *,
    prior_precision: float | Tensor,
    chunk_size: int | None = None,
) -> Posterior:
    """Approximate the posterior of parameters by a normal distribution.

    Args:
        network: from parameters and images to outputs (batch, outputs), independently for each image; see
            `purecnn.curvature.restrict`.
        negative_log_likelihood: of one example, from its outputs (outputs,) and label: ``F.cross_entropy``, or
            ``lambda y, t: ((y - t) ** 2).sum() / (2 * noise**2)`` for regression (up to its constant).
        params: the maximum of the posterior: trained with weight decay ``prior_precision / examples`` on the mean loss.
        images: (batch, channels, height, width).
        labels: (batch, ...).
        prior_precision: one over the prior's variance.
        chunk_size: number of images at a time; by default all. Memory grows with ``chunk_size * outputs * parameters``.

    Raises:
        ValueError: if ``chunk_size`` is less than 1.

    >>> import torch.nn.functional as F
    >>> linear = lambda params, images: images.flatten(1) @ params["weight"].T
    >>> images, labels = torch.ones(4, 1, 1, 1), torch.tensor([0, 1, 0, 1])
    >>> laplace(linear, F.cross_entropy, {"weight": torch.zeros(2, 1)}, images, labels, prior_precision=1.0).ggn
    tensor([[ 1., -1.],
            [-1.,  1.]])
    """
    ggn = log_likelihood = torch.zeros_like(ravel(params)[0])
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, found {chunk_size}")
    size = chunk_size or len(images)
    for part, targets in zip(torch.split(images, size), torch.split(labels, size), strict=True):
        rows, outputs = jacobian(network, params, part), network(params, part)
        curved = vmap(hessian(negative_log_likelihood))(outputs, targets) @ rows
        ggn = ggn + rows.flatten(0, 1).T @ curved.flatten(0, 1)
        log_likelihood = log_likelihood - vmap(negative_log_likelihood)(outputs, targets).sum()
    return Posterior(params, (ggn + ggn.T) / 2, log_likelihood, prior_precision)


def predictive(network: Network, posterior: Posterior, images: Tensor) -> tuple[Tensor, Tensor]:
    """The normal distribution of the outputs, with the network linearised around the mean.

    Args:
        network: the one that the posterior was made with.
        posterior: from `laplace`.
        images: (batch, channels, height, width).

    Returns:
        Means (batch, outputs), and covariances ``J precision^-1 J^T`` (batch, outputs, outputs), which do not include
        the noise of a regression.
    """
    rows = jacobian(network, posterior.mean, images)
    whitened = torch.linalg.solve_triangular(posterior.precision_factor, rows.flatten(0, 1).T, upper=False)
    batch, outputs, _ = rows.shape
    halves = whitened.T.reshape(batch, outputs, -1)
    return network(posterior.mean, images), halves @ halves.transpose(1, 2)


def probit(mean: Tensor, covariance: Tensor) -> Tensor:
    """Class probabilities for normally distributed logits: ``softmax(mean / sqrt(1 + pi / 8 variance))``.

    MacKay's approximation of the integral (1992, Neural Computation 4:720), class by class. The more uncertain the
    logits, the closer the probabilities are to uniform.

    Args:
        mean: (..., classes).
        covariance: (..., classes, classes).

    >>> probit(torch.tensor([2.0, 0.0]), 4 * torch.eye(2))
    tensor([0.7768, 0.2232])
    """
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    return (mean / (1 + math.pi / 8 * variance).sqrt()).softmax(-1)


def sample(posterior: Posterior, key: Tensor, count: int) -> Tree:
    """Draw parameters from the posterior: a tree of stacked leaves, for ``vmap(network, (0, None))``.

    Args:
        posterior: from `laplace`.
        key: for the draws.
        count: number of draws.

    Returns:
        The tree of the posterior's mean with a first axis, (count, ...), on each leaf.

    >>> posterior = Posterior({"w": torch.zeros(2)}, torch.zeros(2, 2), torch.tensor(0.0), prior_precision=100.0)
    >>> sample(posterior, random.key(0), 3)["w"].shape
    torch.Size([3, 2])
    """
    mean = ravel(posterior.mean)
    noise = random.normal(key, (len(mean), count), mean.dtype)
    draws = mean + torch.linalg.solve_triangular(posterior.precision_factor.T, noise, upper=True).T
    return vmap(lambda draw: unravel(draw, posterior.mean))(draws)


def log_evidence(posterior: Posterior) -> Tensor:
    """The log marginal likelihood, by Laplace's method; the best prior precision maximises it.

    ``log p(data | mean) - precision / 2 |mean|^2 + parameters / 2 log precision - log det(L)``, with the prior's
    precision and `Posterior.precision_factor` (MacKay 1992). The mean was found for one prior precision; to compare
    others, use ``posterior._replace(prior_precision=...)``, as far as the mean would stay the same.

    >>> posterior = Posterior({"w": torch.zeros(2)}, torch.zeros(2, 2), torch.tensor(-3.0), prior_precision=100.0)
    >>> log_evidence(posterior)  # nothing was learned about the parameters
    tensor(-3.)
    """
    mean = ravel(posterior.mean)
    precision = torch.as_tensor(posterior.prior_precision).to(mean)
    prior = len(mean) / 2 * precision.log() - precision / 2 * mean @ mean
    return posterior.log_likelihood + prior - posterior.precision_factor.diagonal().log().sum()
