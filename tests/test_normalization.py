"""Laws of normalisation under ``torch.func``, beside the formulas, in double precision."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jvp, vmap

from purecnn import normalization, random, tree
from purecnn.ensembles import unstack
from purecnn.layer import Layer, Mode
from purecnn.layers import batch_norm, group_norm, layer_norm
from purecnn.normalization import batch_normalize
from purecnn.tree import Tree
from tests.table import assert_close

MEMBERS, EPS = 3, 1e-3
SHAPES = (4, 2, 3, 3), (2,), (2,)  # images, weight, bias
KEYS = random.split(random.key(0), 7)
MAPPED = tuple(random.normal(key, (MEMBERS, *shape)).double() for key, shape in zip(KEYS[:3], SHAPES, strict=True))
DIRECTIONS = tuple(random.normal(key, (MEMBERS, *shape)).double() for key, shape in zip(KEYS[3:6], SHAPES, strict=True))
TARGET = random.normal(KEYS[6], SHAPES[0]).double()

Normal = Callable[[Tensor, Tensor, Tensor], Tensor]


def formula(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    m = x.mean((0, 2, 3), keepdim=True)
    v = (x - m).square().mean((0, 2, 3), keepdim=True)
    return (x - m) / (v + EPS).sqrt() * weight[:, None, None] + bias[:, None, None]


def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return batch_normalize(x, weight, bias, EPS)[0]


def loss(normal: Normal) -> Callable[..., Tensor]:
    return lambda *inputs: (normal(*inputs).sin() * TARGET).sum()


def slopes(f: Callable[..., Tensor]) -> Callable[..., Any]:
    return grad(f, (0, 1, 2))


def bend(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of a function's gradients."""
    return lambda *inputs: sum(((leaf.cos() * leaf).sum() for leaf in slopes(f)(*inputs)), torch.zeros(()))


def _through_autograd(normal: Normal) -> Any:
    inputs = [each.clone().requires_grad_() for each in MAPPED]
    first = torch.autograd.grad(vmap(normal)(*inputs).square().sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum(each.sin().sum() for each in first), inputs)
    return tuple(each.detach() for each in (*first, *second))


DERIVATIVES: dict[str, Callable[[Normal], Any]] = {
    "value": lambda normal: vmap(normal)(*MAPPED),
    "gradient": lambda normal: vmap(slopes(loss(normal)))(*MAPPED),
    "gradient, shared images": lambda normal: vmap(slopes(loss(normal)), (None, 0, 0))(MAPPED[0][0], *MAPPED[1:]),
    "gradient, shared weights": lambda normal: vmap(slopes(loss(normal)), (0, None, None))(
        MAPPED[0], MAPPED[1][0], MAPPED[2][0]
    ),
    "second": lambda normal: vmap(slopes(bend(loss(normal))))(*MAPPED),
    "third": lambda normal: vmap(slopes(bend(bend(loss(normal)))))(*MAPPED),
    "forward": lambda normal: vmap(lambda *i: jvp(loss(normal), i[:3], i[3:]))(*MAPPED, *DIRECTIONS),
    "forward over reverse": lambda normal: vmap(lambda *i: jvp(slopes(loss(normal)), i[:3], i[3:]))(
        *MAPPED, *DIRECTIONS
    ),
    "reverse over forward": lambda normal: vmap(
        lambda *i: slopes(lambda *inputs: jvp(loss(normal), inputs, i[3:])[1])(*i[:3])
    )(*MAPPED, *DIRECTIONS),
    "hessian": lambda normal: vmap(hessian(loss(normal), (0, 1)))(*MAPPED),
    "maps in maps": lambda normal: vmap(lambda x: vmap(slopes(loss(normal)), (None, 0, 0))(x, *MAPPED[1:]))(MAPPED[0]),
    "around the map": lambda normal: slopes(lambda *inputs: vmap(normal)(*inputs).square().sum())(*MAPPED),
    "by autograd, twice": _through_autograd,
}


@pytest.fixture(autouse=True, params=[0, normalization.MANY], ids=["one pass", "torch's rule"])
def always(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(normalization, "MANY", request.param)


@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_every_derivative_is_the_formulas(derivative: str) -> None:
    of = DERIVATIVES[derivative]
    assert_close(of(ours), of(formula), rtol=1e-11, atol=0)


@pytest.mark.parametrize("train", [True, False], ids=["batch", "running"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("images", [MAPPED[0], MAPPED[0][..., 0, 0]], ids=["images", "vectors"])
def test_members_are_normalised_as_if_alone(train: bool, dtype: torch.dtype, images: Tensor) -> None:
    layer, mode = batch_norm(), Mode(train=train, batch_statistics=train)
    params = {"weight": MAPPED[1], "bias": MAPPED[2]}
    state = {"mean": MAPPED[2], "var": MAPPED[1].square() + 0.1, "count": torch.zeros(MEMBERS, dtype=torch.int64)}
    if dtype != torch.float64:
        params, state = (
            tree.map(lambda leaf: leaf.float() if leaf.is_floating_point() else leaf, each) for each in (params, state)
        )
    given = params, state, images.to(dtype)
    found = vmap(lambda params, state, x: layer.apply(params, state, x, mode))(*given)
    for member, mine in zip(unstack(found), unstack(given), strict=True):
        expected = layer.apply(*mine, mode)
        assert member[0].dtype == dtype
        assert_close(member, expected, rtol=1e-12 if dtype == torch.float64 else 1e-2, atol=0)


def by_layer(layer: Layer, state: Tree) -> Normal:
    mode = Mode(train=True, batch_statistics=True)
    return lambda x, weight, bias: layer.apply({"weight": weight, "bias": bias}, state, x, mode)[0]


def along_channels(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * weight + bias


def last(normal: Normal) -> Normal:
    """Of images with the channels last, on images with the channels first."""
    return lambda x, weight, bias: normal(x.movedim(1, -1), weight, bias).movedim(-1, 1)


STATE = {"mean": MAPPED[2][0], "var": MAPPED[1][0].square(), "count": torch.zeros((), dtype=torch.int64)}
LAYERS: dict[str, tuple[Normal, Normal]] = {
    "batch": (
        by_layer(batch_norm(EPS), {"mean": MAPPED[2][0], "var": MAPPED[1][0] ** 2, "count": KEYS[0, 0]}),
        formula,
    ),
    "layer": (last(by_layer(layer_norm(EPS), {})), last(along_channels)),
    "group": (by_layer(group_norm(1, EPS), {}), lambda x, weight, bias: one_group(x, weight, bias)),
}


def one_group(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean((1, 2, 3), keepdim=True)
    normal = centred / (centred.square().mean((1, 2, 3), keepdim=True) + EPS).sqrt()
    return normal * weight[:, None, None] + bias[:, None, None]


ALONE = tuple(each[0] for each in MAPPED)
AHEAD = tuple(each[0] for each in DIRECTIONS)
ORDERS: dict[str, Callable[[Callable[..., Tensor]], Any]] = {
    "first": lambda f: slopes(f)(*ALONE),
    "second": lambda f: slopes(bend(f))(*ALONE),
    "third": lambda f: slopes(bend(bend(f)))(*ALONE),
    "forward": lambda f: jvp(f, ALONE, AHEAD),
    "forward twice": lambda f: jvp(lambda *i: jvp(f, i, AHEAD)[1], ALONE, AHEAD),
    "forward over reverse": lambda f: jvp(slopes(f), ALONE, AHEAD),
    "reverse over forward": lambda f: slopes(lambda *i: jvp(f, i, AHEAD)[1])(*ALONE),
    "hessian": lambda f: hessian(f, (0, 1))(*ALONE),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("layer", LAYERS)
def test_derivatives_of_layers(layer: str, order: str) -> None:
    """Those of torch's own operators are wrong for some orders, silently."""
    mine, theirs = LAYERS[layer]
    assert_close(ORDERS[order](loss(mine)), ORDERS[order](loss(theirs)), rtol=1e-10, atol=0)
