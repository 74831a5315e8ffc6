"""Laws of conjugate gradients, and influence functions beside training again without an example."""

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, hessian, jvp, vmap

import purecnn
from converters.recipes import influential_digits as recipe
from purecnn import data, random, tree
from purecnn.curvature import frozen, ggn_product, hvp, ravel, unravel
from purecnn.influence import conjugate_gradient, influence
from purecnn.tree import Tree


def positive(seed: int, n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    root = random.normal(random.key(seed), (n, n + 2), dtype)
    return root @ root.T / n + torch.eye(n, dtype=dtype)


def product_of(a: Tensor) -> Callable[[Tree], Tree]:
    return lambda v: unravel(a @ ravel(v), v)


@given(
    st.integers(1, 12), st.integers(0, 99), st.sampled_from([0.0, 0.5]), st.sampled_from([torch.float32, torch.float64])
)
def test_conjugate_gradients_solve(n: int, seed: int, damping: float, dtype: torch.dtype) -> None:
    a = positive(seed, n, dtype)
    b = random.normal(random.key(seed + 100), (n,), dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    solution = conjugate_gradient(product_of(a), {"b": b}, damping=damping, tolerance=tolerance)
    damped = a + damping * torch.eye(n, dtype=dtype)
    assert solution.converged
    assert solution.residual <= tolerance
    assert solution.iterations <= n + 10
    torch.testing.assert_close(
        solution.x["b"], torch.linalg.solve(damped, b), rtol=100 * tolerance, atol=100 * tolerance
    )


def test_conjugate_gradients_say_when_they_fail() -> None:
    a, b = torch.diag(torch.tensor([1.0, 10.0, 100.0, 1000.0])), {"b": torch.ones(4)}
    short = conjugate_gradient(product_of(a), b, max_iterations=2)
    assert not short.converged
    assert short.iterations == 2
    assert short.residual == pytest.approx(float((b["b"] - a @ short.x["b"]).norm() / 2))
    indefinite = torch.diag(torch.tensor([1.0, -1.0]))
    stopped = conjugate_gradient(product_of(indefinite), {"b": torch.tensor([1.0, 2.0])})
    assert not stopped.converged
    assert stopped.iterations == 1
    assert torch.isfinite(stopped.x["b"]).all()
    assert conjugate_gradient(product_of(indefinite), {"b": torch.tensor([1.0, 2.0])}, damping=2.0).converged
    beyond = conjugate_gradient(product_of(positive(0, 30, torch.float32)), {"b": torch.ones(30)}, tolerance=1e-12)
    assert not beyond.converged
    assert beyond.residual < 1e-5


def test_nothing_to_solve() -> None:
    solution = conjugate_gradient(product_of(positive(0, 3)), {"b": torch.zeros(3, dtype=torch.float64)})
    assert solution.converged
    assert solution.iterations == 0
    assert torch.equal(solution.x["b"], torch.zeros(3, dtype=torch.float64))


def test_conjugate_gradients_of_many_right_hand_sides() -> None:
    a, b = positive(1, 6), random.normal(random.key(2), (4, 6), torch.float64)
    solve = partial(conjugate_gradient, product_of(a), max_iterations=15, tolerance=1e-9)
    together = vmap(solve)({"b": b})
    for i in range(4):
        alone = solve({"b": b[i]})
        assert together.converged[i]
        assert together.iterations[i] == alone.iterations
        torch.testing.assert_close(together.x["b"][i], alone.x["b"])


def test_influence_on_a_mean_is_exact() -> None:
    """Without one of n, the mean moves by (mean - x_i) / (n - 1); to first order, by (mean - x_i) / n."""
    x = random.normal(random.key(0), (9,), torch.float64)
    found = influence(lambda v: v, lambda p: (p["m"] - x) ** 2 / 2, lambda p: p["m"], {"m": x.mean()})
    assert found.solution.converged
    exact = torch.stack([torch.cat([x[:i], x[i + 1 :]]).mean() for i in range(9)]) - x.mean()
    torch.testing.assert_close(found.changes, exact * 8 / 9)


# A convex head over frozen features ------------------------------------------------------------------------------


class Head(NamedTuple):
    """A linear head on the features of 60 digits, and the loss of 40 others."""

    objective: recipe.Objective
    losses: Callable[[Tree], Tensor]
    measure: Callable[[Tree], Tensor]
    best: Tree

    def product(self, v: Tree) -> Tree:
        return hvp(lambda head: self.objective(head, torch.ones(60, dtype=torch.float64)), self.best, v)


@cache
def small_head() -> Head:
    model = purecnn.create("lenet5")
    params, state = model.init(random.key(0))
    digits = data.load("digits")
    batches = data.batches(digits.train, digits.preprocessing.adapt(size=32).evaluation(), 100)
    images, labels = next(iter(batches))
    features = model.features(params, state, images)["stage2"].double()
    objective = recipe.head_objective(features[:60], labels[:60], decay=1e-2)
    start = tree.map(Tensor.double, params["head"])
    return Head(
        objective,
        lambda head: recipe.losses(head, features[:60], labels[:60]),
        lambda head: recipe.losses(head, features[60:], labels[60:]).mean(),
        recipe.minimum(lambda head: objective(head, torch.ones(60, dtype=torch.float64)), start),
    )


def test_influence_predicts_leaving_one_out() -> None:
    head = small_head()
    found = influence(head.product, head.losses, head.measure, head.best, tolerance=1e-8)
    assert found.solution.converged
    left_out = torch.arange(0, 60, 2)
    heads = recipe.minima_without(head.objective, head.best, left_out, 60)
    actual = vmap(head.measure)(heads) - head.measure(head.best)
    assert recipe.correlation(found.changes[left_out], actual) > 0.95
    assert recipe.without_largest(found.changes[left_out], actual) > 0.95


def test_leaving_out_is_fitting_without() -> None:
    """Chords from the minimum with all lead where Newton's method leads that never saw the digit."""
    head = small_head()
    together = recipe.minima_without(head.objective, head.best, torch.tensor([3, 17]), 60)
    for i, left_out in enumerate((3, 17)):
        weights = torch.ones(60, dtype=torch.float64)
        weights[left_out] = 0
        alone = recipe.minimum(partial(head.objective, weights=weights), tree.map(torch.zeros_like, head.best))
        torch.testing.assert_close(
            ravel(tree.map(lambda leaf, i=i: leaf[i], together)), ravel(alone), atol=1e-6, rtol=0
        )


def test_influence_is_what_explicit_matrices_give() -> None:
    head = small_head()
    ones = torch.ones(60, dtype=torch.float64)
    dense = hessian(lambda x: head.objective(unravel(x, head.best), ones))(ravel(head.best))
    gradients = torch.func.jacrev(lambda x: head.losses(unravel(x, head.best)))(ravel(head.best))
    expected = gradients @ torch.linalg.solve(dense, ravel(grad(head.measure)(head.best))) / 60
    found = influence(head.product, head.losses, head.measure, head.best, tolerance=1e-10)
    torch.testing.assert_close(found.changes, expected, rtol=1e-6, atol=1e-10)
    inverse = torch.linalg.inv(dense)
    known = influence(
        head.product,
        head.losses,
        head.measure,
        head.best,
        tolerance=1e-10,
        preconditioner=lambda v: unravel(inverse @ ravel(v), head.best),
    )
    torch.testing.assert_close(known.changes, expected, rtol=1e-6, atol=1e-10)
    assert known.solution.iterations <= 2 < found.solution.iterations


@pytest.mark.slow
def test_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe.run(out=tmp_path, epochs=1, limit=24, as_json=True)
    results = json.loads((tmp_path / "results.json").read_text())
    assert json.loads(capsys.readouterr().out) == results
    assert {file.name for file in tmp_path.iterdir()} == {"digits.png", "influence.png", "results.json"}
    assert results["left out"] == 24
    for row in results["measures"].values():
        assert row["converged"]
        assert row["correlation"] > 0.95


def test_pictures_are_written(tmp_path: Path) -> None:
    numbers = torch.linspace(-1, 1, 5, dtype=torch.float64)
    recipe.scatter({"one": (numbers, numbers), "other": (numbers, -numbers)}, tmp_path / "scatter.png")
    digit = (torch.rand(8, 8), "a 3")
    recipe.gallery(digit, {"helpful": [digit] * 3, "harmful": [digit]}, tmp_path / "gallery.png")
    for name in ("scatter.png", "gallery.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_influence_on_a_whole_network_with_damping() -> None:
    """The Gauss-Newton matrix of all parameters, damped: the prediction is that of a network made linear."""
    model = purecnn.create("lenet5")
    params, state = model.init(random.key(3))
    images, labels = random.normal(random.key(4), (6, 1, 32, 32)), torch.arange(6)
    network = frozen(model, state)

    def losses(params: Tree) -> Tensor:
        return F.cross_entropy(network(params, images), labels, reduction="none")

    def product(v: Tree) -> Tree:
        return ggn_product(lambda p: network(p, images), lambda y: F.cross_entropy(y, labels), params, v)

    def measure(params: Tree) -> Tensor:
        return losses(params)[0]

    found = influence(product, losses, measure, params, damping=0.1, tolerance=1e-4)
    assert found.solution.converged
    assert found.changes.argmax() == 0  # to leave an image out hurts itself most
    slope = jvp(measure, (params,), (found.solution.x,))[1]
    torch.testing.assert_close(found.changes[0], slope / 6)


def test_small_vectors_are_no_zeros() -> None:
    small = conjugate_gradient(lambda v: {"w": torch.tensor([1.0, 4.0]) * v["w"]}, {"w": torch.full((2,), 1e-25)})
    torch.testing.assert_close(small.x["w"] * 1e25, torch.tensor([1.0, 0.25]))
    assert small.converged


def test_products_may_be_in_another_order() -> None:
    b = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([1.0, 5.0, 3.0])}
    solution = conjugate_gradient(
        lambda v: {"b": 3 * v["b"], "a": 2 * v["a"]}, b, preconditioner=lambda v: {"b": v["b"] / 3, "a": v["a"] / 2}
    )
    assert (int(solution.iterations), bool(solution.converged)) == (1, True)
    torch.testing.assert_close(solution.x["b"], b["b"] / 3)
