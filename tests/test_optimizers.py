"""Laws of the optimizers: equal to torch's, pure, and the same under transformations."""

import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import vmap

from purecnn import schedules, tree
from purecnn.optimizers import (
    Optimizer,
    adamw,
    clipped,
    from_transformation,
    lamb,
    lars,
    muon,
    partitioned,
    rmsprop,
    sgd,
)
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
fused = pytest.mark.parametrize("rule", RULES)

ALL: dict[str, tuple[Callable[..., Optimizer], dict[str, Any]]] = {
    **{rule: (ours, settings) for rule, (ours, _, settings) in RULES.items()},
    "rmsprop": (rmsprop, {"momentum": 0.9, "weight_decay": 1e-2}),
    "rmsprop_plain": (rmsprop, {}),
    "rmsprop_tensorflow": (rmsprop, {"tensorflow": True, "alpha": 0.9, "eps": 1e-3, "momentum": 0.9}),
    "rmsprop_tensorflow_plain": (rmsprop, {"tensorflow": True}),
    "lars": (lars, {"weight_decay": 1e-2}),
    "lars_partly": (lars, {"weight_decay": 1e-2, "decay": lambda path: path.endswith("weight")}),
    "lamb": (lamb, {}),
    "lamb_partly": (lamb, {"decay": lambda path: path.endswith("weight")}),
    "muon": (muon, {}),
    "clipped": (lambda rate, **settings: clipped(sgd(rate, **settings), 1.0), {"momentum": 0.9}),
    "partitioned": (lambda rate: partitioned(lambda path, _: "stem" in path, sgd(rate), adamw(rate)), {}),
}
rules = pytest.mark.parametrize("rule", ALL)


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


@fused
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
    ours, settings = ALL[rule]
    optimizer = ours(0.01, **settings)
    formula = kernel = (draw(0), optimizer.init(draw(0)))
    for grads in GRADS:
        formula = by_formula(optimizer, grads, formula[1], formula[0])
        kernel = by_kernel(optimizer, grads, kernel[1], kernel[0])
    close(formula[0], kernel[0])
    close(formula[1], kernel[1])


@rules
def test_update_leaves_its_inputs_alone(rule: str) -> None:
    ours, settings = ALL[rule]
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
    ours, settings = ALL[rule]
    optimizer = ours(0.01, **settings)
    params, grads = draw(0), draw(1)
    opt_state = optimizer.init(params)
    copied = optimizer.update(grads, opt_state, params)
    donated = optimizer.update(grads, opt_state, params, donate=True)
    assert all(equal(*pair) for pair in zip(copied, donated, strict=True))
    pointers = [[leaf.data_ptr() for leaf in tree.flatten(each).values()] for each in (params, donated[0])]
    assert pointers[0] == pointers[1]
    assert equal(grads, draw(1))


@pytest.mark.parametrize("rule", ["momentum", "rmsprop", "lars", "muon"])
def test_layouts_do_not_matter(rule: str) -> None:
    ours, settings = ALL[rule]
    optimizer = ours(0.1, **settings)
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
                close(found[0], expected[0], 2)


def test_leaves_that_share_memory_are_not_written_to() -> None:
    optimizer = sgd(0.1, momentum=0.9)
    ones = {"weight": torch.ones(()).expand(4, 3)}
    found = optimizer.update({"weight": torch.ones(4, 3)}, optimizer.init(ones), ones, donate=True)
    assert torch.equal(found[0]["weight"], torch.full((4, 3), 0.9))


@rules
def test_an_ensemble_is_its_members(rule: str) -> None:
    ours, settings = ALL[rule]
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
        # Muon computes in bfloat16, which under vmap rounds once more between a product and a sum.
        ulps = 64 if rule != "muon" else 2e5
        close(tree.map(lambda leaf, i=i: leaf[i], params), members[i], ulps)
        close(tree.map(lambda leaf, i=i: leaf[i], opt_state), states[i])


@pytest.mark.parametrize("rule", ["nesterov", "adamw", "rmsprop", "lars", "lamb", "muon", "clipped"])
def test_update_compiles_once_for_all_steps(rule: str) -> None:
    ours, settings = ALL[rule]
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


@pytest.mark.parametrize("way", [by_formula, by_kernel, by_kernel_donating])
def test_a_schedule_is_asked_once_for_an_update(way: Callable[..., Any]) -> None:
    asked = []

    def schedule(step: Tensor) -> Tensor:
        asked.append(step)
        return torch.full_like(step, 0.1, dtype=torch.float32)

    optimizer, params = sgd(schedule), draw(0)
    way(optimizer, draw(1), optimizer.init(params), params)
    assert len(asked) == 1


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
        lambda: rmsprop(alpha=1.0),
        lambda: rmsprop(momentum=-0.1),
        lambda: lars(0.1, trust=0.0),
        lambda: lars(0.1, weight_decay=-1.0),
        lambda: lamb(beta2=1.0),
        lambda: muon(adjust="adam"),  # type: ignore[arg-type]
        lambda: clipped(sgd(0.1), 0.0),
    ):
        with pytest.raises(ValueError, match=r"found|needs"):
            wrong()


class Muon:
    """torch.optim.Muon, which takes matrices alone, beside torch's AdamW."""

    def __init__(self, params: list[Tensor], lr: float, **settings: Any) -> None:
        self.params = [param for param in params if param.ndim > 1]
        self.matrices = [param.detach().flatten(1).requires_grad_() for param in self.params]
        self.muon = torch.optim.Muon(self.matrices, lr=lr, weight_decay=0.1, **settings)
        rest = [param for param in params if param.ndim == 1]
        self.adamw = torch.optim.AdamW(rest, lr=lr, weight_decay=0.1, foreach=False)

    def step(self) -> None:
        for param, matrix in zip(self.params, self.matrices, strict=True):
            matrix.grad = None if param.grad is None else param.grad.flatten(1)
        self.muon.step()
        self.adamw.step()


class Lars:
    """Algorithm 1 of arXiv:1708.03888 with equation 6's trust coefficient."""

    def __init__(self, params: list[Tensor], lr: float, *, momentum: float, beta: float, eta: float) -> None:
        self.params, self.lr, self.momentum, self.beta, self.eta = params, lr, momentum, beta, eta
        self.v = [torch.zeros_like(param) for param in params]

    @torch.no_grad()
    def step(self) -> None:
        for i, w in enumerate(self.params):
            assert w.grad is not None
            local = self.eta * w.norm() / (w.grad.norm() + self.beta * w.norm())
            self.v[i] = self.momentum * self.v[i] + self.lr * local * (w.grad + self.beta * w)
            w -= self.v[i]


class Lamb:
    """Algorithm 2 of arXiv:1904.00962."""

    def __init__(self, params: list[Tensor], lr: float, *, decay: float) -> None:
        self.params, self.lr, self.decay, self.t = params, lr, decay, 0
        self.m, self.v = ([torch.zeros_like(param) for param in params] for _ in range(2))

    @torch.no_grad()
    def step(self) -> None:
        self.t += 1
        for i, x in enumerate(self.params):
            assert x.grad is not None
            self.m[i] = 0.9 * self.m[i] + 0.1 * x.grad
            self.v[i] = 0.999 * self.v[i] + 0.001 * x.grad**2
            r = self.m[i] / (1 - 0.9**self.t) / ((self.v[i] / (1 - 0.999**self.t)).sqrt() + 1e-6)
            r += self.decay * x
            x -= self.lr * x.norm() / r.norm() * r


def timm_rmsprop(params: list[Tensor], **settings: Any) -> Any:
    timm = pytest.importorskip("timm.optim", reason="timm is not installed")
    return timm.RMSpropTF(params, **settings)


TF = {"alpha": 0.9, "eps": 1e-3}
PEERS: dict[str, tuple[Callable[..., Optimizer], dict[str, Any], Callable[..., Any], dict[str, Any], int, int]] = {
    # How far formula and kernel may be after 100 steps, in units of the last place; 0 is bit for bit.
    "rmsprop": (rmsprop, {}, torch.optim.RMSprop, {"foreach": False}, 0, 4),
    "rmsprop_momentum": (rmsprop, {"momentum": 0.9}, torch.optim.RMSprop, {"momentum": 0.9, "foreach": False}, 0, 4),
    "rmsprop_decay": (rmsprop, {"weight_decay": 0.01}, torch.optim.RMSprop, {"weight_decay": 0.01}, 0, 4),
    "tensorflow": (rmsprop, {**TF, "tensorflow": True}, timm_rmsprop, TF, 8, 8),
    "tensorflow_full": (
        rmsprop,
        {**TF, "tensorflow": True, "momentum": 0.9, "weight_decay": 0.01},
        timm_rmsprop,
        {**TF, "momentum": 0.9, "weight_decay": 0.01},
        8,
        8,
    ),
    "lars": (lars, {"trust": 0.1, "weight_decay": 0.01}, Lars, {"momentum": 0.9, "beta": 0.01, "eta": 0.1}, 8, 8),
    "lamb": (lamb, {"weight_decay": 0.1}, Lamb, {"decay": 0.1}, 8, 8),
    "muon": (muon, {}, Muon, {"adjust_lr_fn": "match_rms_adamw"}, 0, 4),
    "muon_original": (muon, {"adjust": "original"}, Muon, {"adjust_lr_fn": "original"}, 0, 4),
    "muon_heavy_ball": (muon, {"adjust": "original", "nesterov": False}, Muon, {"nesterov": False}, 0, 4),
}


@pytest.mark.parametrize("way", [by_formula, by_kernel])
@pytest.mark.parametrize("peer", PEERS)
def test_trajectory_is_the_peers(peer: str, way: Callable[..., Any]) -> None:
    ours, settings, theirs, their_settings, of_formula, of_kernel = PEERS[peer]
    optimizer = ours(0.01, **settings)
    params = draw(0)
    module = [leaf.clone().requires_grad_() for leaf in tree.flatten(params).values()]
    reference = theirs(module, lr=0.01, **their_settings)
    opt_state = optimizer.init(params)
    for grads in GRADS:
        for leaf, grad in zip(module, tree.flatten(grads).values(), strict=True):
            leaf.grad = grad.clone()
        reference.step()
        params, opt_state = way(optimizer, grads, opt_state, params)
    expected = dict(zip(tree.flatten(params), (leaf.detach() for leaf in module), strict=True))
    ulps = of_formula if way is by_formula else of_kernel
    if ulps:
        close(tree.flatten(params), expected, ulps)
    else:
        assert equal(tree.flatten(params), expected)


def test_muon_directions_are_orthogonal() -> None:
    optimizer = muon(1.0, adjust="original", weight_decay=0.0)
    params = {"kernel": torch.zeros(16, 8, 3, 3)}
    new, _ = optimizer.update(
        {"kernel": torch.randn(16, 8, 3, 3, generator=torch.Generator().manual_seed(0))}, optimizer.init(params), params
    )
    singular = torch.linalg.svdvals(new["kernel"].flatten(1))
    assert singular.min() > 0.6
    assert singular.max() < 1.3


def test_muon_leaves_what_is_not_hidden_to_the_others() -> None:
    params, grads = draw(0), draw(1)
    optimizer = muon(0.1, hidden=lambda path: path.startswith("stem."), others=sgd(0.1))
    new, _ = optimizer.update(grads, optimizer.init(params), params)
    plain, _ = sgd(0.1).update(grads, sgd(0.1).init(params), params)
    assert torch.equal(new["head"]["weight"], plain["head"]["weight"])
    assert torch.equal(new["stem"]["conv"]["bias"], plain["stem"]["conv"]["bias"])
    assert not torch.equal(new["stem"]["conv"]["weight"], plain["stem"]["conv"]["weight"])
    assert list(tree.flatten(new)) == list(tree.flatten(params))


@pytest.mark.parametrize("rule", ["rmsprop", "rmsprop_tensorflow"])
def test_large_parameters_go_through_the_cache_in_blocks(rule: str) -> None:
    ours, settings = ALL[rule]
    optimizer = ours(0.1, **settings)
    params, grads = (
        {"weight": torch.randn(4, 300, 12, 12, generator=torch.Generator().manual_seed(i))} for i in (0, 1)
    )
    for layout in (torch.contiguous_format, torch.channels_last):
        laid = tree.map(lambda leaf, layout=layout: leaf.to(memory_format=layout), params)
        new, _ = by_kernel(optimizer, grads, optimizer.init(laid), laid)
        expected, _ = by_formula(optimizer, grads, optimizer.init(params), params)
        close(new, expected, 4)


# Options and combinations ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [rule for rule in ALL if rule != "partitioned"])  # whose parts have their own scales
@pytest.mark.parametrize("way", [by_formula, by_kernel])
def test_scale_multiplies_the_learning_rate(rule: str, way: Callable[..., Any]) -> None:
    ours, settings = ALL[rule]
    params, grads = draw(0), draw(1)
    scaled = ours(0.1, **settings, scale=lambda path: 0.25 if path.startswith("stem.") else 1.0)
    results = {}
    for name, optimizer in {"scaled": scaled, "slow": ours(0.025, **settings), "fast": ours(0.1, **settings)}.items():
        results[name], opt_state = params, optimizer.init(params)
        for _ in range(2):
            results[name], opt_state = way(optimizer, grads, opt_state, results[name])
    close(results["scaled"]["stem"], results["slow"]["stem"], 4)
    close(results["scaled"]["head"], results["fast"]["head"], 4)
    assert not equal(results["scaled"], params)


@pytest.mark.parametrize("rule", ["lars", "lamb"])
@pytest.mark.parametrize("way", [by_formula, by_kernel])
def test_a_parameter_that_is_not_pulled_is_not_adapted(rule: str, way: Callable[..., Any]) -> None:
    params, grads = draw(0), draw(1)
    if rule == "lars":
        optimizer, plain = lars(0.1, weight_decay=0.5, decay=lambda path: "head" in path), sgd(0.1, momentum=0.9)
    else:
        optimizer, plain = lamb(0.1, eps=1e-8, decay=lambda path: "head" in path), adamw(0.1, weight_decay=0.0)
    new, _ = way(optimizer, grads, optimizer.init(params), params)
    expected, _ = way(plain, grads, plain.init(params), params)
    close(new["stem"], expected["stem"], 4)
    assert not torch.equal(new["head"]["weight"], expected["head"]["weight"])


@pytest.mark.parametrize("ours", [lars, lamb])
@pytest.mark.parametrize("way", [by_formula, by_kernel])
def test_zeros_are_not_adapted(ours: Callable[..., Optimizer], way: Callable[..., Any]) -> None:
    zeros, ones = {"w": torch.zeros(3)}, {"w": torch.ones(3)}
    optimizer = ours(0.5, weight_decay=0.0)
    new, _ = way(optimizer, ones, optimizer.init(zeros), zeros)
    close(new, {"w": torch.full((3,), -0.5)}, 16)
    new, _ = way(optimizer, zeros, optimizer.init(ones), ones)
    assert torch.equal(new["w"], ones["w"])


@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e6])
def test_clipping_is_torchs_and_leaves_the_gradients_alone(max_norm: float) -> None:
    params, grads = draw(0), draw(1)
    plain = sgd(0.1)
    optimizer = clipped(plain, max_norm)
    module = [leaf.clone().requires_grad_() for leaf in tree.flatten(params).values()]
    for leaf, grad in zip(module, tree.flatten(grads).values(), strict=True):
        leaf.grad = grad.clone()
    torch.nn.utils.clip_grad_norm_(module, max_norm)
    shortened = tree.unflatten(dict(zip(tree.flatten(params), (leaf.grad for leaf in module), strict=True)))
    new, _ = optimizer.update(grads, optimizer.init(params), params)
    expected, _ = plain.update(shortened, plain.init(params), params)
    assert equal(new, expected)
    assert equal(grads, draw(1))


@pytest.mark.parametrize("optimizer", [sgd(0.1, momentum=0.9), adamw(0.1)], ids=["sgd", "adamw"])
def test_trees_keep_their_form_with_and_without_transformations(optimizer: Optimizer) -> None:
    params, grads = (tree.flatten(draw(i)) for i in range(2))
    eager = optimizer.update(grads, optimizer.init(params), params)
    mapped = vmap(optimizer.update)(*(tree.map(lambda x: x[None], t) for t in (grads, optimizer.init(params), params)))
    for found, expected in zip(mapped, eager, strict=True):
        assert str(tree.map(lambda leaf: leaf[0].shape, found)) == str(tree.map(lambda leaf: leaf.shape, expected))
    assert list(eager[0]) == list(params)


def test_parts_have_their_own_rules() -> None:
    params, grads = draw(0), draw(1)
    optimizer = partitioned(lambda path, _: path.startswith("head."), adamw(0.1), sgd(0.5))
    new, opt_state = optimizer.update(grads, optimizer.init(params), params)
    for part, rule in (("head", adamw(0.1)), ("stem", sgd(0.5))):
        expected, _ = rule.update({part: grads[part]}, rule.init({part: params[part]}), {part: params[part]})
        assert equal({part: new[part]}, expected)
    assert list(new) == list(params)
    assert optimizer.rate(opt_state) == 0.1
    with pytest.raises(ValueError, match=r"different names: head\.weight"):
        optimizer.update({"stem": grads["stem"]}, opt_state, params)
    loose = partitioned(lambda path, _: re.match("head", path), adamw(0.1), sgd(0.5))
    assert equal(loose.update(grads, loose.init(params), params)[0], new)  # an answer is anything true or false


class Trace(NamedTuple):
    """State of Optax's kind: a named tuple, here with a counter and a tree."""

    count: Tensor
    trace: Tree


def momentum_pair(rate: float, momentum: float) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def init(params: Tree) -> tuple[Trace, tuple[()]]:
        return Trace(torch.zeros((), dtype=torch.int64), tree.map(torch.zeros_like, params)), ()

    def update(grads: Tree, state: tuple[Trace, tuple[()]], params: Tree) -> tuple[Tree, tuple[Trace, tuple[()]]]:
        trace = tree.map(lambda kept, grad: momentum * kept + grad, state[0].trace, grads)
        return tree.map(lambda leaf: -rate * leaf, trace), (Trace(state[0].count + 1, trace), ())

    return init, update


def test_a_pair_of_optaxs_kind_plugs_in() -> None:
    optimizer = from_transformation(*momentum_pair(0.1, 0.9))
    twin = sgd(0.1, momentum=0.9)
    params = expected = draw(0)
    opt_state, twin_state = optimizer.init(params), twin.init(params)
    torch.compiler.reset()
    update = torch.compile(optimizer.update, fullgraph=True, backend="aot_eager")
    for i, grads in enumerate(GRADS[:10]):
        params, opt_state = (update if i % 2 else optimizer.update)(grads, opt_state, params)
        expected, twin_state = twin.update(grads, twin_state, expected)
    close(params, expected, 8)
    assert opt_state["step"] == 10
    assert opt_state["inner"]["0"] == 10
    many = draw(0, 3)
    together, _ = vmap(optimizer.update)(draw(1, 3), vmap(optimizer.init)(many), many, torch.tensor([0.0, 1.0, 2.0]))
    assert torch.equal(together["head"]["weight"][0], many["head"]["weight"][0])
    close(
        together["head"],
        tree.map(lambda w, g: w - torch.tensor([0.0, 0.1, 0.2])[:, None, None] * g, many["head"], draw(1, 3)["head"]),
        8,
    )


def test_torchopts_pairs_plug_in() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchopt = pytest.importorskip("torchopt", reason="TorchOpt is not installed")
        adam = torchopt.adamw(0.01, weight_decay=0.01)

    def update(grads: Tree, state: Any, params: Tree) -> tuple[Tree, Any]:
        return adam.update(grads, state, params=params, inplace=False)

    optimizer, twin = from_transformation(adam.init, update), adamw(0.01)
    params = expected = draw(0)
    opt_state, twin_state = optimizer.init(params), twin.init(params)
    for grads in GRADS[:10]:
        params, opt_state = optimizer.update(grads, opt_state, params)
        expected, twin_state = twin.update(grads, twin_state, expected)
    close(params, expected)


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


@pytest.mark.parametrize(("one", "other"), [(adamw(0.1), sgd(0.1)), (sgd(0.1), sgd(0.1, momentum=0.9))])
def test_another_optimizers_state(one: Optimizer, other: Optimizer) -> None:
    params = {"weight": torch.ones(2)}
    with pytest.raises(ValueError, match=r"the optimizer keeps \[.*\], but its state has \["):
        other.update(params, one.init(params), params)


def test_gradients_of_another_type() -> None:
    params = {"weight": torch.ones(2)}
    for optimizer in (sgd(0.1, momentum=0.9), adamw(0.1), rmsprop(0.1), lars(0.1), lamb(0.1), muon(0.1)):
        short, long = (
            optimizer.update({"weight": grad}, optimizer.init(params), params)[0]["weight"]
            for grad in (torch.ones(2, dtype=torch.bfloat16), torch.ones(2))
        )
        assert torch.equal(short, long)


@pytest.mark.parametrize("rule", [sgd, adamw, rmsprop, lamb, lars])
def test_a_scalar_parameter_keeps_its_type(rule: Any) -> None:
    optimizer = rule(0.1)
    params = {"factor": torch.tensor(2.0, requires_grad=True), "weight": torch.ones(3, requires_grad=True)}
    grads, opt_state = tree.map(lambda leaf: leaf.detach() / 2, params), optimizer.init(params)
    for _ in range(2):
        params, opt_state = optimizer.update(grads, opt_state, params)
    assert {leaf.dtype for leaf in params.values()} == {torch.float32}
