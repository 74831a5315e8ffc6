"""Laws of per-sample gradients, their norms and their clipped sums; Opacus and BackPACK as peers."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import vmap

import purecnn
from purecnn import Layer, Mode, random, serial, tree
from purecnn.layers import Leaf, conv, flatten, global_avg_pool, layer_norm, linear, parametric, relu, stateless
from purecnn.model import Model
from purecnn.paper import Paper
from purecnn.per_sample import _Gradients, _gradients, clipped_gradient_sum, per_sample_gradients, per_sample_norms
from purecnn.record import Recorded, record
from purecnn.training import Batch, loss_function
from purecnn.tree import Tree
from tests import table

FROZEN: dict[str, Any] = {"train": True, "statistics": "running"}
FAMILIES = [family for family, case in table.CASES.items() if case.name in table.PEERS]


def model_of(layer: Layer, channels: int = 2) -> Model:
    return Model("tiny", layer, {}, Paper("", "", 2000, ""), channels, 8)


def batch(model: Model, size: int = 3, side: int = 8, seed: int = 1) -> Batch:
    images = random.normal(random.key(seed), (size, model.in_channels, side, side))
    return images, torch.arange(size) % 3


def one_by_one(model: Model, params: Tree, state: Tree, data: Batch, **settings: Any) -> Tree:
    """The slow way: a loop over the images, with torch.autograd."""
    criterion = model.loss or loss_function
    found = []
    for image, label in zip(*data, strict=True):
        own = tree.map(lambda leaf: leaf.clone().requires_grad_(), params)
        outputs, _ = model.apply(own, state, image[None], **settings)
        leaves = tree.flatten(own)
        grads = torch.autograd.grad(criterion(outputs, label[None]), list(leaves.values()), materialize_grads=True)
        found.append(tree.unflatten(dict(zip(leaves, grads, strict=True))))
    return table.stack(found)


def norms_of(gradients: Tree) -> Tensor:
    """In double precision: torch loses four digits of the norm of 40 million numbers."""
    norms = [leaf.flatten(1).double().norm(dim=1) for leaf in tree.flatten(gradients).values()]
    return torch.stack(norms).norm(dim=0).float()


def clipped(gradients: Tree, clip: float) -> Tree:
    scale = (clip / norms_of(gradients)).clamp(max=1)
    return tree.map(lambda leaf: torch.tensordot(scale, leaf, 1), gradients)


def largest(values: Tree) -> float:
    return max(float(leaf.abs().max()) for leaf in tree.flatten(values).values())


def assert_all_close(found: Tree, expected: Tree, tolerance: float = 1e-5) -> None:
    """Relative to the largest number of the whole tree: where terms cancel, a leaf has no digits of its own."""
    table.assert_close(found, expected, rtol=0, atol=tolerance * max(largest(expected), 1e-30))


def assert_clipping_is_right(model: Model, params: Tree, state: Tree, data: Batch, **settings: Any) -> None:
    gradients = per_sample_gradients(model, params, state, data, **settings)
    norms = norms_of(gradients)
    clip = float(norms.median())  # some are clipped
    found = clipped_gradient_sum(model, params, state, data, clip=clip, **settings)
    torch.testing.assert_close(found.norms, norms, rtol=1e-5, atol=0)
    torch.testing.assert_close(per_sample_norms(model, params, state, data, **settings), found.norms, rtol=0, atol=0)
    assert_all_close(found.gradient, clipped(gradients, clip))


# Against a loop ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_a_loop(family: str) -> None:
    """In evaluation and in training with frozen statistics; without statistics these are the same."""
    case = table.CASES[family]
    model = case.quiet()
    params, state = model.init(random.key(0))
    state = table.unsettled(state)
    data = case.images(2), torch.tensor([0, 1])
    for settings in ({}, FROZEN) if state else (FROZEN,):
        gradients = per_sample_gradients(model, params, state, data, **settings)
        assert list(tree.flatten(gradients)) == list(tree.flatten(params))
        expected = one_by_one(model, params, state, data, **settings)
        # Each leaf relative to its own largest number.
        table.assert_close(gradients, expected, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("family", table.CASES)
def test_clipped_sum_equals_the_materialised_one(family: str) -> None:
    case = table.CASES[family]
    model = case.quiet()
    params, state = model.init(random.key(0))
    data = case.images(2), torch.tensor([0, 1])
    assert_clipping_is_right(model, params, table.unsettled(state), data, **FROZEN)


@pytest.mark.parametrize("family", ["lenet", "resnet_cifar", "regnet", "convnext"])
def test_training_mode_without_batch_statistics(family: str) -> None:
    """With group normalisation in place of the batch's, training mode has gradients of single images."""
    case = table.CASES[family]
    model = case.quiet(norm="group")
    params, state = model.init(random.key(0))
    assert state == {}
    data = case.images(2), torch.tensor([0, 1])
    assert_all_close(
        per_sample_gradients(model, params, state, data, train=True),
        one_by_one(model, params, state, data, train=True),
    )
    assert_clipping_is_right(model, params, state, data, train=True)


@pytest.mark.parametrize("function", [per_sample_gradients, per_sample_norms, clipped_gradient_sum])
def test_batch_statistics_are_refused(function: Any) -> None:
    model = table.CASES["resnet_cifar"].model()
    params, state = model.init(random.key(0))
    more = {"clip": 1.0} if function is clipped_gradient_sum else {}
    for settings in ({"train": True}, {"statistics": "batch"}):
        with pytest.raises(ValueError, match=r'statistics="running".*norm="group"'):
            function(model, params, state, batch(model), **settings, **more)


def test_keys_are_per_sample() -> None:
    case = table.CASES["convnext"]  # with stochastic depth
    model = case.model()
    params, state = model.init(random.key(0))
    data = case.images(4), torch.tensor([0, 1, 2, 3])
    key = random.key(3)
    gradients = per_sample_gradients(model, params, state, data, train=True, key=key)
    for i, own in enumerate(random.split(key, 4)):
        alone = one_by_one(model, params, state, (data[0][i : i + 1], data[1][i : i + 1]), train=True, key=own)
        assert_all_close(tree.map(lambda leaf, i=i: leaf[i : i + 1], gradients), alone)


def test_losses_and_outputs_are_those_of_the_network() -> None:
    case = table.CASES["convnext"]
    model = case.model()
    params, state = model.init(random.key(0))
    images, labels = case.images(4), torch.tensor([0, 1, 2, 3])
    found = clipped_gradient_sum(model, params, state, (images, labels), clip=1.0, train=True, key=random.key(3))
    outputs, _ = model.apply(params, state, images, train=True, key=random.key(3))
    torch.testing.assert_close(found.outputs, outputs, rtol=0, atol=0)
    torch.testing.assert_close(found.losses, F.cross_entropy(outputs, labels, reduction="none"))


def test_auxiliary_heads_and_other_losses() -> None:
    case = table.CASES["googlenet_2014"]
    model = case.quiet()
    params, state = model.init(random.key(0))
    data = case.images(2), torch.tensor([0, 1])

    def loss(outputs: Any, labels: Tensor) -> Tensor:
        return loss_function(outputs, labels, label_smoothing=0.2, aux_weight=1.0)

    usual = per_sample_norms(model, params, state, data, train=True)
    assert not torch.allclose(usual, per_sample_norms(model, params, state, data, train=True, loss=loss), rtol=1e-2)
    assert_clipping_is_right(model, params, state, data, train=True, loss=loss)


def test_subtrees() -> None:
    case = table.CASES["resnet_cifar"]
    model = case.quiet()
    params, state = model.init(random.key(0))
    data = case.images(2), torch.tensor([0, 1])

    def chosen(path: str) -> bool:
        return path.startswith("head.") or path.endswith("norm1.bias")

    gradients = per_sample_gradients(model, params, state, data, trainable=chosen)
    whole = tree.flatten(per_sample_gradients(model, params, state, data))
    assert_all_close(gradients, tree.unflatten({path: leaf for path, leaf in whole.items() if chosen(path)}))
    assert_clipping_is_right(model, params, state, data, trainable=chosen)
    with pytest.raises(ValueError, match="no parameter is chosen"):
        per_sample_norms(model, params, state, data, trainable=lambda path: False)


def test_infinite_clip_is_the_gradient_of_the_sum() -> None:
    model = purecnn.create("resnet18", num_classes=10)
    params, state = model.init(random.key(0))
    images, labels = batch(model, size=4, side=64)

    def total(params: Tree) -> Tensor:
        return F.cross_entropy(model.apply(params, state, images)[0], labels, reduction="sum")

    found = clipped_gradient_sum(model, params, state, (images, labels), clip=math.inf)
    assert_all_close(found.gradient, torch.func.grad(total)(params))


# Layers ------------------------------------------------------------------------------------------------------


@given(
    kernel=st.sampled_from([1, 2, 3]),
    stride=st.sampled_from([1, 2]),
    padding=st.sampled_from([0, 1]),
    groups=st.sampled_from([1, 2, 4]),
    bias=st.booleans(),
    side=st.sampled_from([3, 9]),
    seed=st.integers(0, 100),
)
def test_ghost_and_direct_agree(
    kernel: int, stride: int, padding: int, groups: int, bias: bool, side: int, seed: int
) -> None:
    """Few positions and large weights make ghosts, many positions and small weights do not."""
    model = model_of(
        serial(
            stem=conv(32, kernel, stride, padding, groups=groups, bias=bias),
            head=serial(relu1=relu, conv=conv(3, 1, bias=bias), pool=global_avg_pool, linear=linear(3, bias=bias)),
        ),
        channels=8,
    )
    params, state = model.init(random.key(seed))
    assert_clipping_is_right(model, params, state, batch(model, side=side, seed=seed))


def test_norms_of_millions_of_numbers() -> None:
    """Torch's own norm of so many numbers is 0.05 % too small on a CPU, and a clipped sum would be too large by it."""
    recorded = Recorded({}, {}, {}, [], torch.zeros(2), None)
    found = _Gradients(recorded, {"weight": torch.full((2, 1000, 8000), 0.01)}, {}).norms()
    torch.testing.assert_close(found, torch.full((2,), 0.01 * 8e6**0.5), rtol=1e-5, atol=0)


def test_both_ways_are_taken() -> None:
    model = table.CASES["lenet"].model()
    params, state = model.init(random.key(0))
    traced = _gradients(record(model, params, state, batch(model, side=32), False, None, None, None, None))
    assert set(traced.ghosts) == {f"{path}.weight" for path in ("stage2.linear1", "stage2.linear2", "head.linear")}
    assert traced.direct.keys() == tree.flatten(params).keys() - traced.ghosts.keys()


def test_linear_and_norm_of_higher_rank() -> None:
    last = stateless(lambda x: x.movedim(1, -1))
    model = model_of(
        serial(stem=serial(last=last, linear=linear(5), norm=layer_norm(), relu=relu), head=linear(3, bias=False))
    )
    mean = stateless(lambda x: x.mean((1, 2)))
    model = model_of(serial(main=model.layer, mean=mean))
    params, state = model.init(random.key(0))
    assert_clipping_is_right(model, params, state, batch(model))


def test_any_layer_of_a_user() -> None:
    def leaves(x: Tensor) -> Any:
        return {"slope": Leaf((x.shape[1], 1, 1), 0.3)}, {}

    def apply(params: Tree, state: Tree, x: Tensor, mode: Mode) -> tuple[Tensor, Tree]:
        return torch.where(x > 0, x, params["slope"] * x), state

    model = model_of(serial(prelu=parametric(leaves, apply, "slope"), flat=flatten, linear=linear(3)))
    params, state = model.init(random.key(0))
    assert_clipping_is_right(model, params, state, batch(model))


def test_a_layer_used_twice() -> None:
    twice = purecnn.named("same", linear(6))

    def apply(params: Tree, state: Tree, x: Tensor, mode: Mode) -> tuple[Tensor, Tree]:
        x, state = twice.apply(params, state, x, mode)
        return twice.apply(params, state, torch.tanh(x), mode)

    def init(x: Tensor, mode: Mode) -> tuple[Tree, Tree, Tensor]:
        return twice.init(x, mode)

    model = model_of(
        serial(flat=flatten, into=linear(6), middle=Layer(init, apply, twice.names), act=relu, head=linear(3))
    )
    params, state = model.init(random.key(0))
    assert_clipping_is_right(model, params, state, batch(model))


def test_one_tensor_in_two_places() -> None:
    """Each place has a gradient of its own."""
    model = model_of(serial(flat=flatten, into=linear(6), first=linear(6), act=relu, second=linear(6), head=linear(3)))
    params, state = model.init(random.key(0))
    params["second"] = params["first"]
    assert_clipping_is_right(model, params, state, batch(model))


def test_what_goes_around_the_layers_is_refused() -> None:
    plain = linear(3)

    def bare(params: Tree, state: Tree, x: Tensor, mode: Mode) -> tuple[Tensor, Tree]:
        return F.linear(x, params["weight"], params["bias"]), state

    def standardised(params: Tree, state: Tree, x: Tensor, mode: Mode) -> tuple[Tensor, Tree]:
        return plain.apply({**params, "weight": params["weight"] - params["weight"].mean()}, state, x, mode)

    def transposed(params: Tree, state: Tree, x: Tensor, mode: Mode) -> tuple[Tensor, Tree]:
        y, state = plain.apply(params, state, x.repeat_interleave(2, 0), mode)
        return y[::2], state

    for apply, message in (
        (bare, r"'head.weight' is used outside of the layers"),
        (standardised, r"'head' computes with a parameter 'weight' that is not in the tree"),
        (transposed, r"'head' turns \(6, 128\) into \(6, 3\).*batch of 3"),
    ):
        model = model_of(serial(flat=flatten, head=Layer(plain.init, apply, plain.names)))
        params, state = model.init(random.key(0))
        with pytest.raises(ValueError, match=message):
            per_sample_norms(model, params, state, batch(model))


# Purity, transformations, memory -----------------------------------------------------------------------------

GROUPED = purecnn.create("resnet20_cifar", norm="group", depths=(1, 1), widths=(4, 6), num_classes=3)


def test_nothing_is_changed() -> None:
    params, state = GROUPED.init(random.key(0))
    data = batch(GROUPED, side=16)
    inputs = [*tree.flatten(params).values(), *data]
    before, versions = [leaf.clone() for leaf in inputs], [leaf._version for leaf in inputs]
    found = clipped_gradient_sum(GROUPED, params, state, data, clip=1.0)
    gradients = per_sample_gradients(GROUPED, params, state, data)
    assert versions == [leaf._version for leaf in inputs]
    assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True))
    results = [*tree.flatten(found.gradient).values(), *tree.flatten(gradients).values(), *found[1:]]
    assert not any(leaf.requires_grad for leaf in [*inputs, *results])


def test_mapped_over_members() -> None:
    params, _ = vmap(GROUPED.init)(random.split(random.key(0), 2))
    data = batch(GROUPED, side=16)

    def run(params: Tree) -> tuple[Tree, Tensor]:
        found = clipped_gradient_sum(GROUPED, params, {}, data, clip=1.0, train=True)
        return found.gradient, found.norms

    gradients, norms = vmap(run)(params)
    for i in range(2):
        gradient, norm = run(table.pick(params, i))
        torch.testing.assert_close(norms[i], norm)
        assert_all_close(table.pick(gradients, i), gradient)


def test_differentiated_again() -> None:
    """The gradient of the norms' sum, by ghosts and by definition."""
    params, state = GROUPED.init(random.key(0))
    data = batch(GROUPED, side=16)

    def by_definition(params: Tree) -> Tensor:
        return norms_of(per_sample_gradients(GROUPED, params, state, data)).sum()

    def by_ghosts(params: Tree) -> Tensor:
        return per_sample_norms(GROUPED, params, state, data).sum()

    assert_all_close(torch.func.grad(by_ghosts)(params), torch.func.grad(by_definition)(params), 1e-4)


def test_compiled_as_one_graph() -> None:
    model = purecnn.create("resnet20_cifar", norm="group", depths=(1,), widths=(4,), num_classes=3)
    params, state = model.init(random.key(0))
    data = batch(model)

    def run(params: Tree) -> tuple[Tree, Tensor, Tree]:
        found = clipped_gradient_sum(model, params, state, data, clip=1.0, train=True)
        return found.gradient, found.norms, per_sample_gradients(model, params, state, data, train=True)

    gradient, norms, gradients = torch.compile(run, fullgraph=True, backend="eager")(params)
    expected = run(params)
    assert_all_close(gradient, expected[0])
    torch.testing.assert_close(norms, expected[1])
    assert_all_close(gradients, expected[2])


def test_memory_cuts_the_batch() -> None:
    params, state = GROUPED.init(random.key(0))
    data = batch(GROUPED, size=8, side=16)
    whole = per_sample_gradients(GROUPED, params, state, data)
    result = sum(leaf.nbytes for leaf in tree.flatten(whole).values())
    calls: list[int] = []

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        calls.append(1)
        return loss_function(outputs, labels)

    def pieces(memory: int) -> int:
        calls.clear()
        found = per_sample_gradients(GROUPED, params, state, data, memory=memory, loss=loss)
        assert_all_close(found, whole)
        return len(calls) - 1  # one is the measurement

    assert pieces(10**9) == 1
    fewer = [pieces(result + extra) for extra in (250_000, 400_000)]
    assert 1 < fewer[1] < fewer[0] <= 8
    with pytest.raises(ValueError, match=f"take {result:,}, and one"):
        per_sample_gradients(GROUPED, params, state, data, memory=result)

    def mapped(images: Tensor) -> Tree:
        return per_sample_gradients(GROUPED, params, state, (images, data[1]), memory=10**9)

    with pytest.raises(ValueError, match="leave memory out under a transformation"):
        torch.func.vmap(mapped)(data[0][None])


# Peers -------------------------------------------------------------------------------------------------------


@contextmanager
def quiet_peer() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Block(nn.Module):
    """The basic block of `purecnn.zoo.resnet_cifar` without a change of shape, with group normalisation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = (nn.GroupNorm(width, width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(x + self.norm2(self.conv2(y)))


class Net(nn.Module):
    """``purecnn.create("resnet20_cifar", norm="group", depths=(1,), widths=(width,))``, all names the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.ModuleDict({"conv": nn.Conv2d(3, width, 3, padding=1, bias=False)})
        self.stem["norm"] = nn.GroupNorm(width, width)
        self.stage1 = nn.Sequential(Block(width))
        self.head = nn.ModuleDict({"linear": nn.Linear(width, 3)})

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem["norm"](self.stem["conv"](x)))
        return self.head["linear"](self.stage1(x).mean((2, 3)))


def twins(width: int = 8) -> tuple[Model, Tree, Net, Batch]:
    model = purecnn.create("resnet20_cifar", norm="group", depths=(1,), widths=(width,), num_classes=3)
    params, _ = model.init(random.key(0))
    module = Net(width)
    module.load_state_dict(tree.flatten(params))
    return model, params, module, batch(model, size=5, side=12)


def test_opacus_hooks() -> None:
    with quiet_peer():
        opacus = pytest.importorskip("opacus", reason="Opacus is not installed")
        model, params, module, (images, labels) = twins()
        hooked = opacus.GradSampleModule(module)
        F.cross_entropy(hooked(images), labels).backward()
    theirs = {name.removeprefix("_module."): p.grad_sample for name, p in hooked.named_parameters()}
    mine = tree.flatten(per_sample_gradients(model, params, {}, (images, labels), train=True))
    assert mine.keys() == theirs.keys()
    for path, leaf in mine.items():
        table.assert_close(leaf, theirs[path], rtol=1e-5, atol=1e-6)


def test_opacus_ghost_clipping() -> None:
    with quiet_peer():
        pytest.importorskip("opacus", reason="Opacus is not installed")
        from opacus.grad_sample import GradSampleModuleFastGradientClipping
        from opacus.optimizers import DPOptimizerFastGradientClipping
        from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

        model, params, module, (images, labels) = twins()
        found = clipped_gradient_sum(model, params, {}, (images, labels), clip=1.0, train=True)
        clip = float(found.norms.median())
        found = clipped_gradient_sum(model, params, {}, (images, labels), clip=clip, train=True)
        ghost = GradSampleModuleFastGradientClipping(
            module, max_grad_norm=clip, use_ghost_clipping=True, loss_reduction="mean"
        )
        optimizer = DPOptimizerFastGradientClipping(
            torch.optim.SGD(ghost.parameters(), lr=1.0),
            noise_multiplier=0.0, max_grad_norm=clip, expected_batch_size=len(labels), loss_reduction="mean",
        )  # fmt: skip
        loss = DPLossFastGradientClipping(ghost, optimizer, nn.CrossEntropyLoss(), "mean")
        loss(ghost(images), labels).backward()
    theirs = {name.removeprefix("_module."): p.grad for name, p in ghost.named_parameters()}
    assert_all_close(found.gradient, tree.unflatten({path: theirs[path] for path in tree.flatten(params)}))


def test_backpack() -> None:
    with quiet_peer():
        backpack = pytest.importorskip("backpack", reason="BackPACK is not installed")
        from backpack import extensions

        model = purecnn.create("lenet5")
        params, state = model.init(random.key(0))
        c1, c2, l1, l2, l3 = nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5), *map(nn.Linear, (400, 120, 84), (120, 84, 10))
        module = nn.Sequential(
            c1, nn.ReLU(), nn.MaxPool2d(2), c2, nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), l1, nn.ReLU(), l2, nn.ReLU(), l3,
        )  # fmt: skip
        for p, leaf in zip(module.parameters(), tree.flatten(params).values(), strict=True):
            p.data = leaf.clone()
        module, loss = backpack.extend(module), backpack.extend(nn.CrossEntropyLoss(reduction="sum"))
        images, labels = batch(model, size=4, side=32)
        with backpack.backpack(extensions.BatchGrad(), extensions.BatchL2Grad(), extensions.SumGradSquared()):
            loss(module(images), labels).backward()
    mine = tree.flatten(per_sample_gradients(model, params, state, (images, labels)))
    theirs = list(module.parameters())
    for (path, leaf), p in zip(mine.items(), theirs, strict=True):
        table.assert_close(leaf, p.grad_batch, rtol=1e-4, atol=0)
        squares = per_sample_norms(model, params, state, (images, labels), trainable=path.__eq__).square()
        torch.testing.assert_close(squares, p.batch_l2, rtol=1e-4, atol=0)
        table.assert_close(leaf.square().sum(0), p.sum_grad_squared, rtol=1e-4, atol=0)
    norms = per_sample_norms(model, params, state, (images, labels))
    torch.testing.assert_close(norms, sum(p.batch_l2 for p in theirs).sqrt(), rtol=1e-4, atol=0)


def test_inference_mode_changes_no_norm() -> None:
    table.need_derivatives_in_inference_mode()
    model = purecnn.create("lenet5")
    params, state = model.init(random.key(0))
    expected = per_sample_norms(model, params, state, batch(model, side=32))
    with torch.inference_mode():
        norms = per_sample_norms(model, params, state, batch(model, side=32))
        total = clipped_gradient_sum(model, params, state, batch(model, side=32), clip=0.1)
    torch.testing.assert_close(norms, expected)
    torch.testing.assert_close(total.norms, expected)
    assert all(leaf.count_nonzero() for leaf in tree.flatten(total.gradient).values())


@pytest.mark.parametrize("clip", [0.0, -1.0, math.nan])
def test_a_norm_to_clip_to_is_positive(clip: float) -> None:
    model = purecnn.create("lenet5")
    params, state = model.init(random.key(0))
    with pytest.raises(ValueError, match="clip must be positive, found"):
        clipped_gradient_sum(model, params, state, batch(model, side=32), clip=clip)


def test_there_may_be_no_image() -> None:
    model = purecnn.create("resnet18", num_classes=3)
    params, state = model.init(random.key(0))
    nothing = torch.zeros(0, 3, 64, 64), torch.zeros(0, dtype=torch.int64)
    gradients = per_sample_gradients(model, params, state, nothing, **FROZEN)
    assert gradients["head"]["linear"]["weight"].shape == (0, 3, 512)
    assert per_sample_norms(model, params, state, nothing, **FROZEN).shape == (0,)
    found = clipped_gradient_sum(model, params, state, nothing, clip=1.0, **FROZEN)
    assert found.norms.shape == found.losses.shape == (0,)
    assert found.outputs.shape == (0, 3)
    assert not any(leaf.count_nonzero() for leaf in tree.flatten(found.gradient).values())
