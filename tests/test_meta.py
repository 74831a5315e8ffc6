"""Laws of learning to learn."""

import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import typer
from torch import Tensor
from torch.func import grad, grad_and_value, vmap
from typer.testing import CliRunner

import purecnn
from converters.recipes import few_shot_digits
from purecnn import random, serial, tree
from purecnn.layer import Mode
from purecnn.layers import linear, stateless
from purecnn.meta import Tasks, adapt, classification_loss, learned_rates, maml_loss, unroll
from purecnn.optimizers import Optimizer, adamw, lamb, lars, rmsprop, sgd
from purecnn.tree import Tree
from tests.table import CASES

CURVE = serial(
    first=linear(16), act=stateless(torch.tanh), second=linear(16), act2=stateless(torch.tanh), last=linear(1)
)


def start(layer: purecnn.Layer = CURVE, dtype: torch.dtype = torch.float64) -> Tree:
    params, _, _ = layer.init(torch.empty(2, 1, device="meta"), Mode(key=random.key(0)))
    return tree.map(lambda leaf: leaf.to(dtype), params)


def squared_error(params: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return F.mse_loss(CURVE.apply(params, {}, x, Mode())[0], y)


def sines(key: Tensor, count: int, points: int = 10, dtype: torch.dtype = torch.float64) -> Tasks:
    """Section 5.1 of the MAML paper: amplitudes 0.1 to 5, phases 0 to pi, x from -5 to 5."""
    amplitude_key, phase_key, x_key = random.split(key, 3)
    amplitude = random.uniform(amplitude_key, (count, 1, 1), dtype, 0.1, 5.0)
    phase = random.uniform(phase_key, (count, 1, 1), dtype, 0.0, math.pi)
    x = random.uniform(x_key, (count, 2 * points, 1), dtype, -5.0, 5.0)
    y = amplitude * torch.sin(x - phase)
    return Tasks((x[:, :points], y[:, :points]), (x[:, points:], y[:, points:]))


def dot(a: Tree, b: Tree) -> Tensor:
    return sum((tree.flatten(tree.map(lambda x, y: (x * y).sum(), a, b)).values()), torch.zeros(()))


def central(function: Any, params: Tree, direction: Tree, step: float = 1e-5) -> Tensor:
    """The derivative along a direction, by differences."""
    ahead, behind = (tree.map(lambda p, d, s=s: p + s * d, params, direction) for s in (step, -step))
    return (function(ahead) - function(behind)) / (2 * step)


def close(a: Tree, b: Tree, **tolerances: float) -> None:
    tree.map(lambda x, y: torch.testing.assert_close(x, y, **tolerances), a, b)


PARAMS = start()
DIRECTION = tree.map(lambda leaf: random.normal(random.key(leaf.numel()), leaf.shape, leaf.dtype), PARAMS)
TASKS = sines(random.key(1), 3)


def test_adapt_is_gradient_descent() -> None:
    support = tree.map(lambda leaf: leaf[0], {"x": TASKS.support[0], "y": TASKS.support[1]})
    batch = support["x"], support["y"]
    expected = PARAMS
    for _ in range(3):
        gradient = grad(squared_error)(expected, batch)
        expected = tree.map(lambda p, g: p - 0.1 * g, expected, gradient)
    for rates in 0.1, torch.tensor(0.1), learned_rates(PARAMS, 0.1), learned_rates(PARAMS, 0.1, per="parameter"):
        close(adapt(squared_error, PARAMS, batch, rates, steps=3), expected)
    close(adapt(squared_error, PARAMS, batch, 0.1, steps=3, first_order=True), expected)
    close(adapt(squared_error, PARAMS, batch, 0.1, steps=0), PARAMS)


@pytest.mark.parametrize("steps", [1, 3])
def test_gradient_of_maml_is_the_finite_difference(steps: int) -> None:
    def objective(params: Tree) -> Tensor:
        return maml_loss(squared_error, params, TASKS, 0.05, steps=steps)

    expected = central(objective, PARAMS, DIRECTION)
    torch.testing.assert_close(dot(grad(objective)(PARAMS), DIRECTION), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("per", ["leaf", "parameter"])
def test_gradient_of_learned_rates_is_the_finite_difference(per: Any) -> None:
    rates = learned_rates(PARAMS, 0.05, per=per)
    direction = tree.map(lambda leaf: random.normal(random.key(leaf.numel()), leaf.shape, leaf.dtype), rates)

    def objective(rates: Tree) -> Tensor:
        return maml_loss(squared_error, PARAMS, TASKS, rates, steps=2)

    expected = central(objective, rates, direction)
    torch.testing.assert_close(dot(grad(objective)(rates), direction), expected, rtol=1e-6, atol=0)


def test_first_order_drops_second_derivatives() -> None:
    """Its gradient is the mean of the queries' gradients at the adapted parameters."""

    def at_the_end(support: Any, query: Any) -> Tree:
        return grad(squared_error)(adapt(squared_error, PARAMS, support, 0.05, steps=3), query)

    expected = tree.map(lambda leaf: leaf.mean(0), vmap(at_the_end)(*TASKS))
    first, second = (
        grad(lambda params, flag=flag: maml_loss(squared_error, params, TASKS, 0.05, steps=3, first_order=flag))(PARAMS)
        for flag in (True, False)
    )
    close(first, expected)
    assert (first["last"]["weight"] - second["last"]["weight"]).abs().max() > 1e-3
    # It still learns learning rates.
    rates = learned_rates(PARAMS, 0.05)
    found = grad(lambda rates: maml_loss(squared_error, PARAMS, TASKS, rates, first_order=True))(rates)
    close(found, grad(lambda rates: maml_loss(squared_error, PARAMS, TASKS, rates))(rates))


def test_tasks_are_the_mean_of_single_ones() -> None:
    single = []
    for i in range(3):
        support, query = (tuple(leaf[i] for leaf in part) for part in TASKS)
        single.append(squared_error(adapt(squared_error, PARAMS, support, 0.05, steps=2), query))
    torch.testing.assert_close(maml_loss(squared_error, PARAMS, TASKS, 0.05, steps=2), torch.stack(single).mean())


def outer_step(optimizer: Optimizer) -> Any:
    def step(params: Tree, opt_state: Tree, tasks: Tasks) -> tuple[Tree, Tree, Tensor]:
        def objective(params: Tree) -> Tensor:
            return maml_loss(squared_error, params, tasks, 0.05)

        gradients, value = grad_and_value(objective)(params)
        params, opt_state = optimizer.update(gradients, opt_state, params)
        return params, opt_state, value

    return step


def test_outer_step_compiles() -> None:
    optimizer = adamw(1e-2)
    step = outer_step(optimizer)
    params, tasks = start(dtype=torch.float32), sines(random.key(1), 3, dtype=torch.float32)
    eager = step(params, optimizer.init(params), tasks)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(params, optimizer.init(params), tasks)
    close(compiled[0], eager[0])
    torch.testing.assert_close(compiled[2], eager[2])


def test_sine_regression_beats_training_from_scratch() -> None:
    """After one step on ten points of a new curve, against twenty steps from scratch."""
    optimizer = adamw(1e-2, weight_decay=0.0)
    step = outer_step(optimizer)
    first = params = start(dtype=torch.float32)
    opt_state = optimizer.init(params)
    for i in range(250):
        params, opt_state, _ = step(params, opt_state, sines(random.fold_in(random.key(2), i), 16, dtype=torch.float32))
    new = sines(random.key(3), 200, dtype=torch.float32)
    learned = maml_loss(squared_error, params, new, 0.05)
    scratch = min(maml_loss(squared_error, first, new, rate, steps=20) for rate in (0.01, 0.05, 0.1))
    assert learned < 0.7 * scratch


@pytest.mark.parametrize("optimizer", [sgd(0.1, momentum=0.9), adamw(0.01)], ids=["sgd", "adamw"])
def test_unrolled_training(optimizer: Optimizer) -> None:
    """The same as a loop of steps, and its derivatives are finite differences."""
    support, query = ([tuple(leaf[i] for leaf in part) for i in range(3)] for part in TASKS)
    params, opt_state = PARAMS, optimizer.init(PARAMS)
    for batch in support:
        params, opt_state = optimizer.update(grad(squared_error)(params, batch), opt_state, params)
    found, found_state = unroll(squared_error, optimizer, PARAMS, support)
    close(found, params)
    assert found_state["step"] == 3
    again, _ = unroll(squared_error, optimizer, PARAMS, support[:2])
    assert not torch.equal(again["last"]["bias"], found["last"]["bias"])

    def by_rate(rate: Tensor) -> Tensor:
        return squared_error(unroll(squared_error, optimizer, PARAMS, support, learning_rate=rate)[0], query[0])

    def by_params(params: Tree) -> Tensor:
        return squared_error(unroll(squared_error, optimizer, params, support)[0], query[0])

    rate = torch.tensor(0.02, dtype=torch.float64)
    difference = (by_rate(rate + 1e-6) - by_rate(rate - 1e-6)) / 2e-6
    torch.testing.assert_close(grad(by_rate)(rate), difference, rtol=1e-5, atol=0)
    expected = central(by_params, PARAMS, DIRECTION, 1e-6)
    torch.testing.assert_close(dot(grad(by_params)(PARAMS), DIRECTION), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("optimizer", [lamb(0.1), lars(0.1)], ids=["lamb", "lars"])
def test_what_gets_no_gradient_spoils_no_derivative(optimizer: Optimizer) -> None:
    def loss(params: Tree, target: Tensor) -> Tensor:
        return ((params["w"] * torch.tensor([1.0, 0.0])).sum() - target) ** 2

    def trained(rate: Tensor) -> Tensor:
        start = {"w": torch.ones(2), "unused": torch.zeros(3)}
        after, _ = unroll(loss, optimizer, start, torch.zeros(2), learning_rate=rate)
        return after["w"].sum()

    rate = torch.tensor(0.01)
    slope = grad(trained)(rate)
    assert slope == pytest.approx(float(trained(rate + 1e-3) - trained(rate - 1e-3)) / 2e-3, rel=0.02)


def test_unrolled_training_goes_on() -> None:
    optimizer = adamw(0.01)
    batches = [tuple(leaf[i] for leaf in TASKS.support) for i in range(3)]
    whole = unroll(squared_error, optimizer, PARAMS, batches)
    params, opt_state = unroll(squared_error, optimizer, PARAMS, batches[:1])
    close(unroll(squared_error, optimizer, params, batches[1:], opt_state=opt_state)[0], whole[0])


def test_weights_of_data_are_learnt() -> None:
    """Examples with wrong labels get the larger derivative of the validation loss: descent takes weight from them."""
    x = torch.linspace(-2, 2, 12, dtype=torch.float64)[:, None]
    y = x.square() / 4
    wrong = torch.arange(12) % 4 == 0
    spoilt = torch.where(wrong[:, None], y + 2, y)

    def validation(weights: Tensor) -> Tensor:
        def weighted(params: Tree, _: Any) -> Tensor:
            return (weights[:, None] * (CURVE.apply(params, {}, x, Mode())[0] - spoilt).square()).mean()

        return squared_error(unroll(weighted, sgd(0.1), PARAMS, range(5))[0], (x, y))

    derivative = grad(validation)(torch.ones(12, dtype=torch.float64))
    assert derivative[wrong].mean() > derivative[~wrong].mean()
    direction = wrong.double()
    difference = (validation(1 + 1e-6 * direction) - validation(1 - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close(derivative @ direction, difference, rtol=1e-5, atol=0)


# Networks ----------------------------------------------------------------------------------------------------------


def images(case: Any, tasks: int = 2, size: int = 4) -> Tasks:
    x = case.images(2 * tasks * size).unflatten(0, (2, tasks, size))
    labels = torch.arange(size).expand(tasks, -1)
    return Tasks((x[0], labels), (x[1], labels))


@pytest.mark.parametrize("statistics", ["batch", "running"])
def test_networks_with_batch_normalisation(statistics: Any) -> None:
    case = CASES["resnet_cifar"]
    model = case.quiet()
    params, state = model.init(random.key(0))
    tasks = images(case)
    loss = classification_loss(model, state, statistics=statistics)
    before = {path: leaf.clone() for path, leaf in tree.flatten(state).items()}
    found, value = grad_and_value(lambda params: maml_loss(loss, params, tasks, 0.1, steps=2))(params)
    assert value.isfinite()
    assert all(leaf.isfinite().all() for leaf in tree.flatten(found).values())
    assert all(torch.equal(before[path], leaf) for path, leaf in tree.flatten(state).items())
    # An image's logits depend on its companions if the batch's statistics are used, and only then.
    one, labels = tasks.query[0][0], tasks.query[1][0]
    alone, together = loss(params, (one[:2], labels[:2])), loss(params, (one, labels))
    rest = loss(params, (one[2:], labels[2:]))
    assert torch.allclose((alone + rest) / 2, together, rtol=1e-4) == (statistics == "running")


def test_pure() -> None:
    case = CASES["lenet"]
    params, state = case.model().init(random.key(0))
    before = tree.map(torch.clone, params)
    loss, tasks = classification_loss(case.model(), state), images(case)
    first = maml_loss(loss, params, tasks, 0.1)
    assert torch.equal(first, maml_loss(loss, params, tasks, 0.1))
    assert not first.requires_grad
    close(params, before, rtol=0, atol=0)


def test_the_networks_own_loss() -> None:
    model = purecnn.create("lecun1989")
    params, state = model.init(random.key(0))
    x, labels = random.normal(random.key(1), (2, 1, 16, 16)), torch.tensor([3, 8])
    expected = model.loss(model.apply(params, state, x)[0], labels)
    assert torch.equal(classification_loss(model, state)(params, (x, labels)), expected)


def test_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="'leaf' or 'parameter', found 'layer'"):
        learned_rates(PARAMS, 0.1, per="layer")
    with pytest.raises(ValueError, match="the trees differ"):
        adapt(squared_error, PARAMS, tuple(leaf[0] for leaf in TASKS.support), {"first": torch.tensor(0.1)}, steps=1)


def test_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it prints, after too few steps to say anything."""
    monkeypatch.setattr(few_shot_digits, "SCRATCH", [(0.1, 5)])
    app = typer.Typer()
    app.command()(few_shot_digits.run)
    words = ["--iterations", "2", "--test-tasks", "4", "--learn-rates", "--first-order", "--unseen", "4"]
    report = json.loads(CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False).stdout)
    assert [row["steps"] for row in report["results"]] == [5, 0, 3, 10]
    assert all(0 <= row["accuracy"] <= 1 for row in report["results"])
    assert report["rates"]["head"]["linear"]["weight"] != pytest.approx(0.1, abs=1e-6)
    monkeypatch.setattr(few_shot_digits, "pool", lambda: torch.rand(10, 20, 1, 32, 32))
    assert "digits that MAML never saw" in CliRunner().invoke(app, words, catch_exceptions=False).stdout
    for wrong in ["--unseen", "2"], ["--shots", "200"]:
        assert CliRunner().invoke(app, wrong).exit_code == 2


@pytest.mark.parametrize("optimizer", [adamw(0.1), rmsprop(0.1)], ids=["adamw", "rmsprop"])
def test_unrolled_training_with_a_gradient_that_is_always_zero(optimizer: Optimizer) -> None:
    def loss(params: Tree, batch: Tensor) -> Tensor:
        return ((params["w"] * batch).sum() - 1) ** 2

    def after(params: Tree) -> Tensor:
        trained, _ = unroll(loss, optimizer, params, [torch.tensor([1.0, 0.0])] * 3)
        return trained["w"].square().sum()

    assert torch.func.grad(after)({"w": torch.tensor([0.5, 2.0])})["w"].isfinite().all()
