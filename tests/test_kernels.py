"""Laws of Jacobians, tangent kernels and linear networks; jax beside them."""

import warnings
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import vmap

import purecnn
from purecnn import random, tree
from purecnn.curvature import Network, frozen, ravel, restrict, unravel
from purecnn.kernels import empirical_ntk, jacobian, linearize, tangent_features
from purecnn.tree import Tree


def lenet() -> tuple[Network, Tree]:
    model = purecnn.create("lenet5", num_classes=3)
    params, state = model.init(random.key(0))
    return frozen(model, state), tree.map(Tensor.double, params)


NETWORK, PARAMS = lenet()
X = random.normal(random.key(1), (4, 1, 32, 32), torch.float64)
Y = random.normal(random.key(2), (2, 1, 32, 32), torch.float64)


def test_jacobian_is_the_derivative_of_all_logits() -> None:
    rows = jacobian(NETWORK, PARAMS, X)
    assert rows.shape == (4, 3, tree.size(PARAMS))
    v = random.normal(random.key(3), (tree.size(PARAMS),), torch.float64)
    step = 1e-6
    ahead, behind = (NETWORK(unravel(ravel(PARAMS) + sign * step * v, PARAMS), X) for sign in (1, -1))
    torch.testing.assert_close(rows @ v, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("others", [None, Y])
def test_both_ways_give_the_kernel(others: Tensor | None) -> None:
    second = X if others is None else others
    expected = torch.einsum("ncp,mdp->nmcd", jacobian(NETWORK, PARAMS, X), jacobian(NETWORK, PARAMS, second))
    for method in ("jacobian", "products", None):
        found = empirical_ntk(NETWORK, PARAMS, X, others, method=method)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_kernel_is_symmetric_and_positive() -> None:
    kernel = empirical_ntk(NETWORK, PARAMS, X)
    assert kernel.shape == (4, 4, 3, 3)
    square = kernel.transpose(1, 2).reshape(12, 12)
    torch.testing.assert_close(square, square.T)
    assert torch.linalg.eigvalsh(square).min() > 0


def test_kernel_of_a_linear_head_is_of_its_features() -> None:
    """For logits W f + b it is (f . f' + 1) times the identity."""
    model = purecnn.create("lenet5", num_classes=3)
    _, state = model.init(random.key(0))
    head, network = restrict(NETWORK, PARAMS, lambda path: path.startswith("head."))
    features = model.features(PARAMS, state, X)["stage2"]
    expected = torch.einsum("nm,cd->nmcd", features @ features.T + 1, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(empirical_ntk(network, head, X), expected)


@pytest.mark.parametrize("train", [False, True])
def test_kernel_of_a_network_with_batch_normalisation(train: bool) -> None:
    model = purecnn.create("mobilenet_v3_small", num_classes=2)
    params, state = model.init(random.key(0))
    network = frozen(model, state, train=train, key=random.key(1))
    x = random.normal(random.key(2), (2, 3, 64, 64))
    both = [empirical_ntk(network, params, x[:1], x[1:], method=method) for method in ("jacobian", "products")]
    torch.testing.assert_close(*both, rtol=1e-3, atol=1e-3)


def test_no_such_method() -> None:
    with pytest.raises(ValueError, match="found 'ntk'"):
        empirical_ntk(NETWORK, PARAMS, X, method="ntk")  # type: ignore[arg-type]


def test_kernels_of_an_ensemble() -> None:
    model = purecnn.create("lenet5", num_classes=3)
    members, _ = vmap(model.init)(random.split(random.key(4), 2))
    kernel = partial(empirical_ntk, NETWORK, images=X.float())
    together = vmap(lambda params: kernel(params))(members)
    for i in range(2):
        alone = kernel(tree.map(lambda leaf, i=i: leaf[i], members))
        torch.testing.assert_close(together[i], alone, rtol=1e-4, atol=1e-4)


def test_linear_network_touches_and_is_linear() -> None:
    linear = linearize(NETWORK, PARAMS)
    torch.testing.assert_close(linear(PARAMS, X), NETWORK(PARAMS, X))
    v = unravel(random.normal(random.key(5), (tree.size(PARAMS),), torch.float64), PARAMS)

    def at(step: float) -> Tensor:
        return linear(tree.map(lambda p, d: p + step * d, PARAMS, v), X)

    torch.testing.assert_close(at(2.0) - at(0.0), 2 * (at(1.0) - at(0.0)))
    torch.testing.assert_close(at(1.0) - at(0.0), jacobian(NETWORK, PARAMS, X) @ ravel(v))


def test_tangent_features_sketch_the_kernel() -> None:
    kernel = empirical_ntk(NETWORK, PARAMS, X)
    features = tangent_features(NETWORK, PARAMS, X, random.key(6), 100)
    assert features.shape == (4, 3, 100)
    sketch = torch.einsum("nck,mdk->nmcd", features, features)
    # The variance of an entry is at most (K_aa K_bb + K_ab^2) / count.
    sizes = torch.einsum("nncc->nc", kernel)
    error = ((sizes[:, None, :, None] * sizes[None, :, None, :] + kernel.square()) / 100).sqrt()
    assert ((sketch - kernel).abs() < 4 * error).all()
    again = tangent_features(NETWORK, PARAMS, X[:1], random.key(6), 100)
    torch.testing.assert_close(again, features[:1])


def test_kernel_equals_jax() -> None:
    """The same LeNet, written again in jax."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jax = pytest.importorskip("jax", reason="jax is not installed")
        jnp, lax = jax.numpy, jax.lax
        weights = {path: np.asarray(leaf) for path, leaf in tree.flatten(PARAMS).items()}

        def network(weights: dict[str, Any], x: Any) -> Any:
            for name in ("stem.conv", "stage1.conv"):
                x = lax.conv_general_dilated(x, weights[f"{name}.weight"], (1, 1), "VALID")
                x = jnp.maximum(x + weights[f"{name}.bias"][None, :, None, None], 0)
                x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
            x = x.reshape(len(x), -1)
            for name in ("stage2.linear1", "stage2.linear2"):
                x = jnp.maximum(x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"], 0)
            return x @ weights["head.linear.weight"].T + weights["head.linear.bias"]

        with jax.enable_x64(True):
            np.testing.assert_allclose(jax.jit(network)(weights, X.numpy()), NETWORK(PARAMS, X).numpy(), rtol=1e-8)
            rows = jax.jit(jax.jacrev(network))(weights, X.numpy())
            flat = jnp.concatenate([rows[path].reshape(4, 3, -1) for path in weights], axis=2)
            theirs = np.asarray(jnp.einsum("ncp,mdp->nmcd", flat, flat))
    np.testing.assert_allclose(empirical_ntk(NETWORK, PARAMS, X).numpy(), theirs, rtol=1e-8)
