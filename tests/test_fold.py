"""Batch normalisation folded into convolutions: the same function, on every family's network."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

import purecnn
from purecnn import random, tree
from purecnn.fold import fold, pack
from purecnn.layer import Layer, Mode, add, concat, serial
from purecnn.layers import batch_norm, conv, global_avg_pool, identity, linear, relu
from purecnn.model import Model
from purecnn.tree import Tree
from tests.table import CASES, Case, assert_close, differences, to, unsettled


def started(model: Model, dtype: torch.dtype = torch.float64) -> tuple[Tree, Tree]:
    """Parameters and statistics as training could have left them."""
    params, state = model.init(random.key(0))
    return to(dtype, params), to(dtype, unsettled(state))


def norms(state: Tree) -> int:
    """How many batch normalisations there are."""
    return sum(path.endswith("var") for path in tree.flatten(state))


def small(**layers: Layer) -> Model:
    head = serial(global_avg_pool, linear=linear(3))
    return Model.of(serial(**layers, head=head), num_classes=3, image_size=8)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_same_function(case: Case) -> None:
    """In double precision, so that rounding hides nothing."""
    model = case.quiet()
    params, state = started(model)
    x = case.images().double()
    folded, fewer, rest = fold(model, params, state)
    assert_close(folded.apply(fewer, rest, x)[0], model.apply(params, state, x)[0], rtol=1e-9, atol=1e-12)
    assert tree.flatten(fewer).keys() <= tree.flatten(params).keys() | {
        f"{path.rpartition('.')[0]}.bias" for path in tree.flatten(params)
    }


# The first normalisation of a pre-activation block or a dense layer, and the last of such a network.
LEFT = {
    "vgg": 0, "resnet": 0, "inception_v3": 0, "xception": 0, "shufflenet_v2": 0, "mobilenet_v3": 0, "efficientnet": 0,
    "regnet": 0, "preactresnet": 4, "densenet": 5,
    "airbench": 2,  # where a pool stands between
    "googlenet": 2,  # of the auxiliary heads
}  # fmt: skip


@pytest.mark.parametrize(("name", "left"), LEFT.items(), ids=LEFT)
def test_what_is_left(name: str, left: int) -> None:
    model = CASES[name].quiet()
    assert norms(fold(model, *started(model))[2]) == left


def test_single_precision() -> None:
    case = CASES["resnet"]
    model, x = case.quiet(), case.images()
    params, state = started(model, torch.float32)
    folded, fewer, rest = fold(model, params, state)
    assert all(leaf.dtype == torch.float32 for leaf in tree.flatten(fewer).values())
    assert_close(folded.apply(fewer, rest, x)[0], model.apply(params, state, x)[0])


def test_inputs_stay() -> None:
    model = CASES["resnet"].quiet()
    params, state = started(model)
    before = tree.map(torch.clone, {"params": params, "state": state})
    fold(model, params, state)
    assert differences({"params": params, "state": state}, before) == []


class TestOnlyWhatFollowsDirectly:
    """A normalisation is folded if it alone reads the convolution's output."""

    @staticmethod
    def left(**layers: Layer) -> int:
        model = small(**layers)
        params, state = started(model)
        x = random.normal(random.key(1), (2, 3, 8, 8), dtype=torch.float64)
        folded, fewer, rest = fold(model, params, state)
        assert_close(folded.apply(fewer, rest, x)[0], model.apply(params, state, x)[0], rtol=1e-9, atol=1e-12)
        return norms(rest)

    def test_directly(self) -> None:
        assert self.left(conv=conv(4, 3), norm=batch_norm()) == 0
        assert self.left(conv=conv(4, 3, groups=1, bias=True), norm=batch_norm(eps=1e-3), relu=relu) == 0

    def test_after_an_activation(self) -> None:
        assert self.left(conv=conv(4, 3), relu=relu, norm=batch_norm()) == 1

    def test_output_read_by_a_shortcut(self) -> None:
        assert self.left(conv=conv(4, 3), block=add(identity, serial(norm=batch_norm(), relu=relu))) == 1
        assert self.left(conv=conv(4, 3), block=concat(serial(norm=batch_norm()), identity)) == 1

    def test_two_norms_of_one_output(self) -> None:
        assert self.left(conv=conv(4, 3), block=add(a=batch_norm(), b=batch_norm())) == 2

    def test_a_second_norm(self) -> None:
        assert self.left(conv=conv(4, 3), norm1=batch_norm(), norm2=batch_norm()) == 1

    def test_a_norm_around_another(self) -> None:
        """Transparent layers share a level of names: the folded one finds the other's statistics there."""
        inner = serial(relu, norm=batch_norm())
        assert self.left(block=serial(serial(conv=conv(8, 3)), batch_norm(), inner=inner)) == 1

    def test_convolution_used_twice(self) -> None:
        shared = serial(conv=conv(3, 3))

        def apply(params: Tree, state: Tree, x: Any, mode: Mode) -> tuple[Any, Tree]:
            y, _ = shared.apply(params, {}, x, mode)
            y, state = norm.apply(params, state, y, mode)
            return shared.apply(params, {}, y, mode)[0], state

        norm = serial(norm=batch_norm())
        both = serial(shared, norm)
        assert self.left(block=Layer(both.init, apply, both.names)) == 1


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_group_normalisation_stays(case: Case) -> None:
    model = case.quiet(norm="group")
    params, state = model.init(random.key(0))
    assert not state
    folded, same, _ = fold(model, params, state)
    assert tree.flatten(same).keys() == tree.flatten(params).keys()
    x = case.images()
    assert torch.equal(folded.apply(same, {}, x)[0], model.apply(params, state, x)[0])


def test_normalisations_that_stay_are_not_left_out() -> None:
    model = CASES["densenet"].quiet()
    params, state = started(model)
    x = CASES["densenet"].images().double()
    folded, fewer, some = fold(model, params, state)
    with pytest.raises(KeyError, match="mean"):
        folded.apply(fewer, {}, x)
    with pytest.raises(ValueError, match="has no batch statistics"):
        folded.apply(fewer, some, x, train=True)
    logits, _ = folded.apply(fewer, some, x, train=True, statistics="running")
    torch.testing.assert_close(logits, model.apply(params, state, x)[0])


def test_model_still_runs_unfolded_trees() -> None:
    model = CASES["resnet"].quiet()
    params, state = started(model)
    x = CASES["resnet"].images().double()
    folded, _, _ = fold(model, params, state)
    assert torch.equal(folded.apply(params, state, x)[0], model.apply(params, state, x)[0])


def test_around_sees_what_is_left() -> None:
    model = small(conv=conv(4, 3), norm=batch_norm())
    folded, params, state = fold(model, *started(model))
    seen = []

    def around(layer: Layer, params: Tree, state: Tree, x: Any, mode: Mode) -> tuple[Any, Tree]:
        seen.append(mode.path)
        return layer.apply(params, state, x, mode)

    folded.apply(params, state, torch.ones(1, 3, 8, 8, dtype=torch.float64), around=around)
    assert seen == ["conv", "head.linear"]


def test_transformations() -> None:
    """Members of an ensemble fold at once, and the folded logits have the unfolded ones' gradient."""
    model = small(conv=conv(4, 3), norm=batch_norm(), relu=relu)
    x = random.normal(random.key(1), (2, 3, 8, 8))
    params, state = vmap(model.init)(random.split(random.key(0), 2))

    def unfolded(params: Tree, state: Tree) -> Tensor:
        return model.apply(params, state, x)[0]

    def through(params: Tree, state: Tree) -> Tensor:
        folded, fewer, rest = fold(model, params, state)
        return folded.apply(fewer, rest, x)[0]

    assert_close(vmap(through)(params, state), vmap(unfolded)(params, state))
    gradients = [vmap(grad(lambda p, s, f=f: f(p, s).square().sum()))(params, state) for f in (through, unfolded)]
    assert_close(*gradients)


def test_compiles() -> None:
    model = small(conv=conv(4, 3), norm=batch_norm(), relu=relu)
    folded, params, state = fold(model, *started(model))
    x = torch.ones(1, 3, 8, 8, dtype=torch.float64)
    run = torch.compile(lambda p, s, x: folded.apply(p, s, x)[0], fullgraph=True, backend="eager")
    assert_close(run(params, state, x), folded.apply(params, state, x)[0])


needs_onednn = pytest.mark.skipif(not torch._C._has_mkldnn, reason="torch was built without oneDNN")


@needs_onednn
@pytest.mark.parametrize(
    "name", ["resnet", "mobilenet_v3", "shufflenet_v2", "densenet", "convnext", "polynet", "lenet"]
)
def test_packed_weights(name: str) -> None:
    case = CASES[name]
    model, x = case.quiet(), case.images()
    params, state = started(model, torch.float32)
    folded, fewer, rest = fold(model, params, state)
    packed, own = pack(folded, fewer, rest, x)
    assert any(leaf.is_mkldnn for leaf in tree.flatten(own).values())
    assert not any(leaf.is_mkldnn for leaf in tree.flatten(fewer).values())
    for images in (x, x[:1]):
        assert_close(packed.apply(own, rest, images)[0], model.apply(params, state, images)[0], rtol=1e-3)


@needs_onednn
def test_pack_refuses_another_device() -> None:
    model = purecnn.create("lenet5")
    params, state = model.spec()
    with pytest.raises(ValueError, match="on the CPU"):
        pack(model, params, state, torch.zeros(1, 1, 32, 32))


def test_packed_weights_have_no_derivatives() -> None:
    model = purecnn.create("lenet5")
    x = torch.zeros(1, 1, 32, 32)
    params, state = model.init(random.key(0))
    packed, own = pack(model, params, state, x)
    with pytest.raises(ValueError, match="a packed network has no derivatives"):
        torch.func.grad(lambda x: packed.apply(own, state, x)[0].sum())(x)
    with pytest.raises(ValueError, match="a packed network has no derivatives"):
        packed.apply(own, state, x.requires_grad_())
