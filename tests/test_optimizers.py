"""Laws of the optimizers: equal to torch's, pure, and the same under transformations."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import vmap

from purecnn import schedules, tree
from purecnn.optimizers import Optimizer, adamw, sgd
from purecnn.tree import Tree

SHAPES = {"stem": {"conv": {"weight": (5, 3, 3, 3), "bias": (5,)}}, "head": {"weight": (67, 20)}}

RULES: dict[str, tuple[Callable[..., Optimizer], type[torch.optim.Optimizer], dict[str, Any]]] = {
    "plain": (sgd, torch.optim.SGD, {}),
    "decay": (sgd, torch.optim.SGD, {"weight_decay": 1e-2}),
    "momentum": (sgd, torch.optim.SGD, {"momentum": 0.9}),
    "momentum_decay": (sgd, torch.optim.SGD, {"momentum": 0.9, "weight_decay": 1e-2}),
    "nesterov": (sgd, torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}),
    "adamw": (adamw, torch.optim.AdamW, {}),
    "adamw_no_decay": (adamw, torch.optim.AdamW, {"weight_decay": 0.0}),
}
rules = pytest.mark.parametrize("rule", RULES)


def draw(seed: int, *batch: int) -> Tree:
    generator = torch.Generator().manual_seed(seed)
    return map_shapes(lambda shape: torch.randn(*batch, *shape, generator=generator), SHAPES)


def map_shapes(function: Callable[[tuple[int, ...]], Tensor], shapes: dict[str, Any]) -> Tree:
    return {k: map_shapes(function, v) if isinstance(v, dict) else function(v) for k, v in shapes.items()}


GRADS = [draw(step) for step in range(1, 101)]


def equal(a: Tree, b: Tree) -> bool:
    return all(torch.equal(*pair) for pair in zip(*(tree.flatten(each).values() for each in (a, b)), strict=True))


def close(a: Tree, b: Tree, ulps: float = 64) -> None:
    tree.map(lambda x, y: torch.testing.assert_close(x, y, rtol=ulps * 1.2e-7, atol=ulps * 1.2e-7), a, b)


def by_formula(optimizer: Optimizer, grads: Tree, opt_state: Tree, params: Tree) -> tuple[Tree, Tree]:
    """An update whose derivative may be asked for: the kernels have none, so it goes by the formula."""
    result = optimizer.update(tree.map(lambda g: g.clone().requires_grad_(), grads), opt_state, params)
    return tree.map(torch.detach, result[0]), tree.map(torch.detach, result[1])


def by_kernel(optimizer: Optimizer, grads: Tree, opt_state: Tree, params: Tree) -> tuple[Tree, Tree]:
    return optimizer.update(grads, opt_state, params)


def by_kernel_donating(optimizer: Optimizer, grads: Tree, opt_state: Tree, params: Tree) -> tuple[Tree, Tree]:
    return optimizer.update(grads, opt_state, params, donate=True)


@rules
@pytest.mark.parametrize(
    ("way", "peer"),
    [(by_formula, {"foreach": False}), (by_kernel, {"fused": True}), (by_kernel_donating, {"fused": True})],
)
def test_trajectory_is_torchs_bit_for_bit(rule: str, way: Callable[..., Any], peer: dict[str, bool]) -> None:
    ours, theirs, settings = RULES[rule]
    optimizer = ours(0.01, **settings)
    params = draw(0)
    module = [leaf.clone().requires_grad_() for leaf in tree.flatten(params).values()]
    reference = theirs(module, lr=0.01, **settings, **peer)
    opt_state = optimizer.init(params)
    for grads in GRADS:
        for leaf, grad in zip(module, tree.flatten(grads).values(), strict=True):
            leaf.grad = grad.clone()
        reference.step()
        params, opt_state = way(optimizer, grads, opt_state, params)
    assert opt_state["step"] == 100
    for leaf, expected in zip(tree.flatten(params).values(), module, strict=True):
        assert torch.equal(leaf, expected)


@rules
def test_formula_and_kernel_agree_in_rounding(rule: str) -> None:
    ours, _, settings = RULES[rule]
    optimizer = ours(0.01, **settings)
    formula = kernel = (draw(0), optimizer.init(draw(0)))
    for grads in GRADS:
        formula = by_formula(optimizer, grads, formula[1], formula[0])
        kernel = by_kernel(optimizer, grads, kernel[1], kernel[0])
    close(formula[0], kernel[0])
    close(formula[1], kernel[1])


@rules
def test_update_leaves_its_inputs_alone(rule: str) -> None:
    ours, _, settings = RULES[rule]
    optimizer = ours(schedules.cosine(0.1, 10), **settings)
    inputs = grads, opt_state, params = draw(1), optimizer.init(draw(0)), draw(0)
    before = [tree.map(torch.clone, each) for each in inputs]
    versions = [tree.map(lambda leaf: leaf._version, each) for each in inputs]
    first = optimizer.update(grads, opt_state, params)
    second = optimizer.update(grads, opt_state, params)
    assert versions == [tree.map(lambda leaf: leaf._version, each) for each in inputs]
    assert all(equal(*pair) for pair in zip(before, inputs, strict=True))
    assert all(equal(*pair) for pair in zip(first, second, strict=True))
    assert list(tree.flatten(first[0])) == list(tree.flatten(params))


@rules
def test_donated_buffers_are_reused_and_the_result_is_the_same(rule: str) -> None:
    ours, _, settings = RULES[rule]
    optimizer = ours(0.01, **settings)
    params, grads = draw(0), draw(1)
    opt_state = optimizer.init(params)
    copied = optimizer.update(grads, opt_state, params)
    donated = optimizer.update(grads, opt_state, params, donate=True)
    assert all(equal(*pair) for pair in zip(copied, donated, strict=True))
    pointers = [[leaf.data_ptr() for leaf in tree.flatten(each).values()] for each in (params, donated[0])]
    assert pointers[0] == pointers[1]
    assert equal(grads, draw(1))


def test_layouts_do_not_matter() -> None:
    optimizer = sgd(0.1, momentum=0.9)
    params, grads = draw(0), draw(1)
    expected = optimizer.update(grads, optimizer.init(params), params)

    def last(leaf: Tensor) -> Tensor:
        return leaf.to(memory_format=torch.channels_last) if leaf.ndim == 4 else leaf

    def strided(leaf: Tensor) -> Tensor:
        return torch.stack([leaf, leaf], -1)[..., 0]

    for of_params in (lambda leaf: leaf, last, strided):
        for of_grads in (lambda leaf: leaf, last, strided):
            p, g = tree.map(of_params, params), tree.map(of_grads, grads)
            for donate in (False, True):
                given = tree.map(lambda leaf, lay=of_params: lay(leaf.clone()), params)
                found = optimizer.update(g, optimizer.init(p), given, donate=donate)
                close(found[0], expected[0], 1)
    # Leaves that share memory must not be written to, donated or not.
    ones = {"weight": torch.ones(()).expand(4, 3)}
    found = optimizer.update({"weight": torch.ones(4, 3)}, optimizer.init(ones), ones, donate=True)
    assert torch.equal(found[0]["weight"], torch.full((4, 3), 0.9))


@rules
def test_an_ensemble_is_its_members(rule: str) -> None:
    ours, _, settings = RULES[rule]
    optimizer = ours(0.5, **settings)
    rates = torch.tensor([0.1, 0.01, 0.001])
    params = draw(0, 3)
    opt_state = vmap(optimizer.init)(params)
    members = [tree.map(lambda leaf, i=i: leaf[i].clone(), params) for i in range(3)]
    states = [optimizer.init(member) for member in members]
    for step in range(1, 4):
        grads = draw(step, 3)
        params, opt_state = vmap(optimizer.update)(grads, opt_state, params, rates)
        for i in range(3):
            grad = tree.map(lambda leaf, i=i: leaf[i], grads)
            members[i], states[i] = optimizer.update(grad, states[i], members[i], float(rates[i]))
    for i in range(3):
        close(tree.map(lambda leaf, i=i: leaf[i], params), members[i])
        close(tree.map(lambda leaf, i=i: leaf[i], opt_state), states[i])


@pytest.mark.parametrize("rule", ["nesterov", "adamw"])
def test_update_compiles_once_for_all_steps(rule: str) -> None:
    ours, _, settings = RULES[rule]
    optimizer = ours(schedules.warmup(2, schedules.cosine(0.1, 10)), **settings)
    torch.compiler.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    update = torch.compile(optimizer.update, fullgraph=True, backend=graphs)
    ours_result = theirs_result = (draw(0), optimizer.init(draw(0)))
    for step in range(3):
        ours_result = update(draw(step), ours_result[1], ours_result[0])
        theirs_result = optimizer.update(draw(step), theirs_result[1], theirs_result[0])
    assert graphs.frame_count == 1
    close(ours_result[0], theirs_result[0])


def test_the_learning_rate_can_be_learned() -> None:
    """An update is differentiable, as a formula is."""

    def after(rate: Tensor) -> Tensor:
        optimizer = sgd(rate)
        params, _ = optimizer.update({"w": torch.tensor([3.0])}, optimizer.init({}), {"w": torch.tensor([1.0])})
        return params["w"].sum()

    assert torch.func.grad(after)(torch.tensor(0.1)) == -3
    rate = torch.tensor(0.1, requires_grad=True)
    after(rate).backward()
    assert rate.grad == -3


def test_decay_is_for_chosen_parameters() -> None:
    params = draw(0)
    zero = tree.map(torch.zeros_like, params)
    for optimizer in (
        sgd(0.1, weight_decay=0.5, decay=lambda path: path.endswith("weight")),
        adamw(0.1, weight_decay=0.5, decay=lambda path: path.endswith("weight")),
    ):
        for way in (by_formula, by_kernel):
            new, _ = way(optimizer, zero, optimizer.init(params), params)
            close(new["head"], tree.map(lambda leaf: leaf * 0.95, params["head"]), 1)
            assert torch.equal(new["stem"]["conv"]["bias"], params["stem"]["conv"]["bias"])


def test_a_schedule_sets_the_rate_of_each_step() -> None:
    optimizer = sgd(schedules.step_decay(1.0, every=2, factor=0.5))
    params, opt_state, ones = {"w": torch.zeros(())}, optimizer.init({"w": torch.zeros(())}), {"w": torch.ones(())}
    seen = []
    for _ in range(5):
        seen.append(optimizer.rate(opt_state))
        params, opt_state = optimizer.update(ones, opt_state, params)
    assert seen == [1.0, 1.0, 0.5, 0.5, 0.25]
    assert float(params["w"]) == -sum(seen)


def test_errors_say_what_is_wrong() -> None:
    params = draw(0)
    optimizer = sgd(0.1, momentum=0.9)
    with pytest.raises(ValueError, match=r"different names: head\.weight"):
        optimizer.update({"stem": params["stem"]}, optimizer.init(params), params)
    with pytest.raises(ValueError, match=r"a learning rate is a scalar, found shape \(3,\)"):
        optimizer.update(params, optimizer.init(params), params, torch.ones(3))
    for wrong in (
        lambda: sgd(-0.1),
        lambda: sgd(0.1, momentum=1.0),
        lambda: sgd(0.1, nesterov=True),
        lambda: sgd(0.1, weight_decay=-1.0),
        lambda: adamw(beta1=1.0),
        lambda: adamw(eps=0.0),
    ):
        with pytest.raises(ValueError, match=r"found|needs"):
            wrong()


# Schedules ---------------------------------------------------------------------------------------------------


def values(schedule: schedules.Schedule, steps: int) -> list[float]:
    return [float(schedule(torch.tensor(step))) for step in range(steps)]


@pytest.mark.parametrize(
    ("schedule", "peer"),
    [
        (schedules.constant(0.5), lambda opt: torch.optim.lr_scheduler.ConstantLR(opt, 1.0)),
        (schedules.step_decay(0.5, 7, 0.3), lambda opt: torch.optim.lr_scheduler.StepLR(opt, 7, 0.3)),
        (schedules.cosine(0.5, 39, 0.01), lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 39, 0.01)),
        (schedules.one_cycle(0.5, 40), lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, 0.5, total_steps=40)),
        (
            schedules.warmup(10, schedules.cosine(0.5, 29), start=0.05),
            lambda opt: torch.optim.lr_scheduler.SequentialLR(
                opt,
                [
                    torch.optim.lr_scheduler.LinearLR(opt, 0.1, total_iters=10),
                    torch.optim.lr_scheduler.CosineAnnealingLR(opt, 29),
                ],
                [10],
            ),
        ),
    ],
    ids=["constant", "step_decay", "cosine", "one_cycle", "warmup"],
)
@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")  # torch's SequentialLR, of itself
def test_schedules_are_torchs(schedule: schedules.Schedule, peer: Callable[..., Any]) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    scheduler = peer(optimizer)
    expected = []
    for _ in range(40):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert values(schedule, 40) == pytest.approx(expected, rel=1e-5, abs=1e-7)
    together = vmap(schedule)(torch.arange(40))
    assert together.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert together.dtype == torch.float32


def test_schedules_stay_where_they_end() -> None:
    late = torch.tensor(1000)
    assert float(schedules.cosine(1.0, 10, 0.25)(late)) == 0.25
    assert float(schedules.one_cycle(1.0, 10)(late)) == pytest.approx(1 / 25e4)
    assert float(schedules.warmup(5, 0.5)(late)) == 0.5


def test_schedules_refuse_no_time() -> None:
    for wrong in (
        lambda: schedules.step_decay(1.0, 0),
        lambda: schedules.cosine(1.0, 0),
        lambda: schedules.warmup(0, 1.0),
        lambda: schedules.one_cycle(1.0, 3),
    ):
        with pytest.raises(ValueError, match=r"at least 1|cannot rise"):
            wrong()
