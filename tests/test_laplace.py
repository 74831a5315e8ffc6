"""Laws of the last-layer Laplace approximation, beside the cases whose answer is known in closed form."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap

import purecnn
from purecnn import random, tree
from purecnn.curvature import frozen, ggn_product, ravel, restrict, unravel
from purecnn.laplace import Posterior, laplace, log_evidence, predictive, probit, sample
from purecnn.tree import Tree

NOISE, PRIOR = 0.3, 2.0


def affine(params: Tree, x: Tensor) -> Tensor:
    return x.flatten(1) @ params["weight"].T + params["bias"]


X = random.normal(random.key(0), (12, 1, 2, 2), torch.float64)
TARGETS = random.normal(random.key(1), (12, 1), torch.float64)
DESIGN = torch.cat([X.flatten(1), torch.ones(12, 1, dtype=torch.float64)], 1)


def half_squares(y: Tensor, target: Tensor) -> Tensor:
    density = torch.distributions.Normal(target, NOISE)
    return -density.log_prob(y).sum()


def regression(prior_precision: float) -> tuple[Posterior, Tensor]:
    """The posterior of linear regression, and its exact covariance."""
    covariance = torch.linalg.inv(DESIGN.T @ DESIGN / NOISE**2 + prior_precision * torch.eye(5, dtype=torch.float64))
    mean = (covariance @ DESIGN.T @ TARGETS / NOISE**2)[:, 0]
    params = {"weight": mean[None, :4], "bias": mean[4:]}
    return laplace(affine, half_squares, params, X, TARGETS, prior_precision=prior_precision, chunk_size=5), covariance


def test_linear_regression_is_exact() -> None:
    """Bishop, Pattern Recognition and Machine Learning, 2006, equations 3.53, 3.54 and 3.59."""
    posterior, covariance = regression(PRIOR)
    factor = posterior.precision_factor
    torch.testing.assert_close(factor @ factor.T, torch.linalg.inv(covariance))
    new = random.normal(random.key(2), (3, 1, 2, 2), torch.float64)
    design = torch.cat([new.flatten(1), torch.ones(3, 1, dtype=torch.float64)], 1)
    mean, spread = predictive(affine, posterior, new)
    torch.testing.assert_close(mean[:, 0], design @ ravel(posterior.mean))
    torch.testing.assert_close(spread[:, 0, 0], ((design @ covariance) * design).sum(1))


@pytest.mark.parametrize("prior_precision", [0.1, 2.0, 50.0])
def test_evidence_of_linear_regression_is_exact(prior_precision: float) -> None:
    """All targets together are normal with covariance ``noise^2 I + X X^T / precision``."""
    posterior, _ = regression(prior_precision)
    covariance = NOISE**2 * torch.eye(12, dtype=torch.float64) + DESIGN @ DESIGN.T / prior_precision
    exact = torch.distributions.MultivariateNormal(torch.zeros(12, dtype=torch.float64), covariance)
    torch.testing.assert_close(log_evidence(posterior), exact.log_prob(TARGETS[:, 0]))


def test_many_prior_precisions_at_once() -> None:
    posterior, _ = regression(PRIOR)
    grid = torch.tensor([0.5, 2.0, 8.0], dtype=torch.float64)
    together = vmap(lambda precision: log_evidence(posterior._replace(prior_precision=precision)))(grid)
    for precision, found in zip(grid, together, strict=True):
        torch.testing.assert_close(found, log_evidence(posterior._replace(prior_precision=float(precision))))


def test_samples_have_the_posteriors_moments() -> None:
    posterior, covariance = regression(PRIOR)
    draws = vmap(ravel)(sample(posterior, random.key(3), 20_000))
    deviation = covariance.diagonal().sqrt()
    assert ((draws.mean(0) - ravel(posterior.mean)).abs() < 4 * deviation / math.sqrt(20_000)).all()
    scale = deviation[:, None] * deviation
    assert ((draws.T.cov() - covariance).abs() < 4 * scale * math.sqrt(2 / 20_000)).all()


def logistic(params: Tree, x: Tensor) -> Tensor:
    """Two classes, one weight."""
    return torch.cat([torch.zeros_like(x.flatten(1)), x.flatten(1) * params["w"]], 1)


def test_logistic_regression_tends_to_the_integral() -> None:
    """Evidence and probabilities of numerical integration over the weight; the error falls as one over the examples."""
    grid = torch.linspace(-10, 14, 200_001, dtype=torch.float64)
    new = torch.tensor([0.7, 2.5], dtype=torch.float64).reshape(2, 1, 1, 1)
    errors = []
    for copies in (10, 100, 1000):
        x = torch.tensor([-2.0, -1.0, 0.5, 1.0, 2.0, 3.0] * copies, dtype=torch.float64).reshape(-1, 1, 1, 1)
        labels = torch.tensor([0, 0, 1, 0, 1, 1] * copies)
        signs = (2 * labels - 1).reshape(copies, 6)[0] * x.flatten()[:6]
        log_prior = 0.5 * math.log(PRIOR / math.tau) - PRIOR / 2 * grid**2
        log_joint = copies * F.logsigmoid(grid[:, None] * signs).sum(1) + log_prior
        top = log_joint.max()
        log_integral = top + torch.trapezoid((log_joint - top).exp(), grid).log()
        density = (log_joint - log_integral).exp()
        exact = torch.trapezoid(density * (grid * new.reshape(2, 1)).sigmoid(), grid)

        mode = {"w": grid[log_joint.argmax()]}
        posterior = laplace(logistic, F.cross_entropy, mode, x, labels, prior_precision=PRIOR)
        normal = torch.distributions.Normal(mode["w"], 1 / posterior.precision_factor[0, 0])
        approximate = torch.trapezoid(normal.log_prob(grid).exp() * (grid * new.reshape(2, 1)).sigmoid(), grid)
        drawn = vmap(logistic, (0, None))(sample(posterior, random.key(4), 20_000), new).softmax(-1)[..., 1]
        assert ((drawn.mean(0) - approximate).abs() < 4 * drawn.std(0) / math.sqrt(20_000)).all()
        errors.append(torch.stack([(log_evidence(posterior) - log_integral).abs(), (approximate - exact).abs().max()]))
    assert (errors[0] < 0.01).all()
    assert (errors[1] < errors[0] / 5).all()
    assert (errors[2] < errors[1] / 5).all()


def test_probit_is_the_mean_of_the_softmax_and_tends_to_uniform() -> None:
    mean = torch.tensor([[1.0, -0.5, 0.2]], dtype=torch.float64)
    unit = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(probit(mean, 0 * unit[None]), mean.softmax(-1))
    assert probit(mean, 1e9 * unit[None]).max() < 0.334
    draws = mean + random.normal(random.key(5), (50_000, 3), torch.float64)
    torch.testing.assert_close(probit(mean, unit[None])[0], draws.softmax(-1).mean(0), rtol=0, atol=0.03)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_head_of_a_network(chunk_size: int | None) -> None:
    """The Gauss-Newton matrix is that of products, also of the convolutional head of a SqueezeNet."""
    model = purecnn.create("squeezenet1_1", num_classes=2)
    params, state = model.init(random.key(0))
    params = tree.map(Tensor.double, params)
    images, labels = random.normal(random.key(1), (3, 3, 48, 48), torch.float64), torch.tensor([0, 1, 1])
    head, network = restrict(frozen(model, state), params, lambda path: path.startswith("head."))
    posterior = laplace(network, F.cross_entropy, head, images, labels, prior_precision=1.0, chunk_size=chunk_size)
    v = random.normal(random.key(2), (tree.size(head),), torch.float64)
    product = ggn_product(
        lambda p: network(p, images), lambda y: F.cross_entropy(y, labels, reduction="sum"), head, unravel(v, head)
    )
    torch.testing.assert_close(posterior.ggn @ v, ravel(product))
    torch.testing.assert_close(
        posterior.log_likelihood, -F.cross_entropy(network(head, images), labels, reduction="sum")
    )
    mean, covariance = predictive(network, posterior, images)
    assert torch.linalg.eigvalsh(covariance).min() > 0
    probabilities = probit(mean, covariance)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(3, dtype=torch.float64))
    assert (probabilities.max(1).values < mean.softmax(1).max(1).values).all()
