"""Convolutions mapped over their weights equal a loop, whichever way they run, with derivatives of any order."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap

import purecnn
from purecnn import convolution, random
from purecnn.convolution import conv2d
from tests import table
from tests.table import pick, stack

MEMBERS = 3
WAYS = pytest.mark.parametrize("way", ["one by one", "grouped", "pixel"])


def assert_close(a: Any, b: Any) -> None:
    """In double precision."""
    table.assert_close(a, b, rtol=1e-12, atol=1e-12)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return random.normal(random.key(seed), shape, dtype=torch.float64)


def arguments(way: str, shared: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Images, weights and biases of members; a shape in which no two sizes are the same by chance."""
    size, kernel = ((1, 1), (1, 1)) if way == "pixel" else ((6, 7), (3, 2))
    images = draw(2, 4, *size) if shared else draw(MEMBERS, 2, 4, *size)
    return images, draw(MEMBERS, 6, 4, *kernel, seed=1), draw(MEMBERS, 6, seed=2)


def go(way: str, patch: pytest.MonkeyPatch) -> None:
    """Go one way: by the number of pixels that is many."""
    patch.setattr(convolution, "MANY_PIXELS", 0 if way == "one by one" else 1 << 60)


def loss(way: str, convolve: Callable[..., Tensor]) -> Callable[..., Tensor]:
    padding = (0, 0) if way == "pixel" else (1, 0)
    return lambda x, weight, bias: convolve(x, weight, bias, 2, padding).tanh().square().sum()


def ours(way: str) -> Callable[..., Tensor]:
    return loss(way, lambda x, weight, bias, stride, padding: conv2d(x, weight, bias, stride, padding, 1))


def torchs(way: str) -> Callable[..., Tensor]:
    return loss(way, torch.conv2d)


def loop(function: Callable[..., Any], dims: tuple[int | None, ...], *inputs: Tensor) -> Any:
    """What ``vmap(function, dims)`` gives, member by member."""
    results = []
    for i in range(MEMBERS):
        results.append(function(*(t if d is None else t.select(d, i) for t, d in zip(inputs, dims, strict=True))))
    return stack([{"": result} if isinstance(result, Tensor) else dict(enumerate(result)) for result in results])


def equals_loop(function: Any, reference: Any, dims: tuple[int | None, ...], *inputs: Tensor) -> None:
    found = vmap(function, in_dims=dims)(*inputs)
    found = {"": found} if isinstance(found, Tensor) else dict(enumerate(found))
    assert_close(found, loop(reference, dims, *inputs))


def gradient(f: Callable[..., Tensor]) -> Callable[..., Any]:
    return grad(f, argnums=(0, 1, 2))


def hessian_forward(f: Callable[..., Tensor]) -> Callable[..., Any]:
    return lambda *inputs: jvp(gradient(f), inputs[:3], inputs[3:])[1]


def hessian_reverse(f: Callable[..., Tensor]) -> Callable[..., Any]:
    return lambda *inputs: vjp(gradient(f), *inputs[:3])[1](inputs[3:])


def twice_forward(f: Callable[..., Tensor]) -> Callable[..., Any]:
    def along(*inputs: Tensor) -> Any:
        return jvp(lambda *here: jvp(f, here, inputs[3:])[1], inputs[:3], inputs[3:])[1]

    return along


@WAYS
@pytest.mark.parametrize("shared", [False, True], ids=["own images", "shared images"])
@pytest.mark.parametrize("derivative", [lambda f: f, gradient, hessian_forward, hessian_reverse, twice_forward])
def test_mapped_derivatives_equal_a_loop(
    derivative: Any, shared: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(way, monkeypatch)
    inputs, dims = arguments(way, shared), (None if shared else 0, 0, 0)
    if derivative in (hessian_forward, hessian_reverse, twice_forward):
        inputs, dims = (*inputs, *(0.5 * t.flip(-1) for t in inputs)), (*dims, *dims)  # type: ignore[assignment]
    equals_loop(derivative(ours(way)), derivative(torchs(way)), dims, *inputs)


@WAYS
def test_derivatives_of_the_map_equal_torchs(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other order: a derivative outside, the map inside."""
    go(way, monkeypatch)
    inputs = arguments(way)
    directions = tuple(0.5 * t.flip(-1) for t in inputs)

    def total(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *inputs: vmap(f)(*inputs).sum()

    for of in (gradient, hessian_forward, hessian_reverse):
        more = directions if of is not gradient else ()
        assert_close(of(total(ours(way)))(*inputs, *more), of(total(torchs(way)))(*inputs, *more))
    assert_close(jvp(total(ours(way)), inputs, directions), jvp(total(torchs(way)), inputs, directions))
    weight = inputs[1].clone().requires_grad_()
    (plain,) = torch.autograd.grad(total(ours(way))(inputs[0], weight, inputs[2]), weight)
    assert_close(plain, gradient(total(torchs(way)))(*inputs)[1])


@WAYS
def test_maps_in_maps_equal_torchs(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    go(way, monkeypatch)
    x, weight, bias = arguments(way)
    more = torch.stack([weight, 2 * weight])
    for outer, inner, inputs in (
        ((None, 0, None), (0, 0, 0), (x, more, bias)),
        ((0, None, None), (None, 0, 0), (x, weight, bias)),
        ((None, 0, 0), (0, None, None), (x, weight, bias)),
    ):
        found, expected = (
            vmap(vmap(gradient(f), in_dims=inner), in_dims=outer)(*inputs) for f in (ours(way), torchs(way))
        )
        assert_close(found, expected)


@pytest.mark.parametrize("derivative", [gradient, hessian_forward, hessian_reverse])
def test_own_gradients_of_images_by_few_pixels(derivative: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One weight for all, and a gradient of each image: the matrices' way, inside and outside of the map."""
    monkeypatch.setattr(convolution, "LARGE_WEIGHT", 0)
    calls = 0
    products = convolution._weights

    def spy(*args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return products(*args)

    monkeypatch.setattr(convolution, "_weights", spy)
    inputs, dims = (draw(MEMBERS, 1, 4, 3, 3), draw(6, 4, 3, 2, seed=1), draw(6, seed=2)), (0, None, None)
    if derivative is not gradient:
        inputs, dims = (*inputs, *(0.5 * t.flip(-1) for t in inputs)), (*dims, *dims)  # type: ignore[assignment]
    equals_loop(derivative(ours("")), derivative(torchs("")), dims, *inputs)
    assert calls > 0

    def total(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *inputs: vmap(f, in_dims=(0, None, None))(*inputs).sum()

    assert_close(derivative(total(ours("")))(*inputs), derivative(total(torchs("")))(*inputs))


@pytest.mark.parametrize("way", ["one by one", "grouped"])
@given(
    groups=st.integers(1, 2),
    per_group=st.tuples(st.integers(1, 5), st.integers(1, 3)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 3),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.integers(1, 2),
    bias=st.booleans(),
    size=st.sampled_from([(5, 4), (3, 3), (1, 1)]),
    dim=st.integers(0, 4),
)
def test_any_geometry(
    way: str,
    groups: int,
    per_group: tuple[int, int],
    kernel: tuple[int, int],
    stride: int,
    padding: tuple[int, int],
    dilation: int,
    bias: bool,
    size: tuple[int, int],
    dim: int,
) -> None:
    assume(all(n + 2 * p > dilation * (k - 1) for n, p, k in zip(size, padding, kernel, strict=True)))
    inputs, features = (groups * count for count in per_group)
    x, weight = draw(MEMBERS, 2, inputs, *size).movedim(0, dim), draw(MEMBERS, features, per_group[0], *kernel, seed=1)
    biases = draw(MEMBERS, features, seed=2) if bias else None

    def objective(convolve: Callable[..., Tensor]) -> Callable[..., Any]:
        return grad(lambda x, weight, bias: convolve(x, weight, bias).square().sum(), argnums=(0, 1))

    with pytest.MonkeyPatch.context() as patch:
        go(way, patch)
        mapped = vmap(
            objective(lambda x, w, b: conv2d(x, w, b, stride, padding, groups, dilation)),
            in_dims=(dim, 0, 0 if bias else None),
        )
        found = mapped(x, weight, biases)
    for i in range(MEMBERS):
        expected = objective(lambda x, w, b: torch.conv2d(x, w, b, stride, padding, dilation, groups))(
            x.select(dim, i), weight[i], biases[i] if biases is not None else None
        )
        assert_close(tuple(t[i] for t in found), expected)


def test_the_way_follows_from_the_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch is called once for all members, or once for each."""
    calls: list[tuple[int, ...]] = []
    plain = torch.conv2d

    def spy(x: Tensor, *rest: Any) -> Tensor:
        calls.append(tuple(x.shape))
        return plain(x, *rest)

    monkeypatch.setattr(torch, "conv2d", spy)
    for x, weight, groups, expected in (
        ((2, 64, 6, 14, 14), (2, 16, 6, 5, 5), 1, 2),  # LeNet's second: one by one
        ((2, 1, 6, 14, 14), (2, 16, 6, 5, 5), 1, 1),  # one image is too few
        ((2, 64, 16, 14, 14), (2, 16, 16, 3, 3), 1, 1),  # channels that torch likes
        ((2, 64, 6, 14, 14), (2, 6, 1, 3, 3), 6, 1),  # groups of its own
        ((2, 1, 256, 1, 1), (2, 64, 256, 1, 1), 1, 0),  # matrices
    ):
        calls.clear()
        pad = weight[-1] // 2
        vmap(lambda x, weight, groups=groups, pad=pad: conv2d(x, weight, None, 1, (pad, pad), groups))(
            torch.zeros(x), torch.zeros(weight)
        )
        assert len(calls) == expected


def test_elsewhere_torch_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing stands between the caller and torch: not for plain calls, nor for gradients by small weights."""

    def refuse(*_: Any) -> Tensor:
        raise AssertionError("this is for mapped weights and large ones")

    monkeypatch.setattr(convolution._Product, "apply", refuse)
    x, weight, bias = (t[0] for t in arguments("grouped"))
    mine, plain = ours("grouped"), torchs("grouped")
    assert torch.equal(mine(x, weight, bias), plain(x, weight, bias))
    per_sample = vmap(grad(lambda weight, image: mine(image[None], weight, bias)), in_dims=(None, 0))
    expected = vmap(grad(lambda weight, image: plain(image[None], weight, bias)), in_dims=(None, 0))
    assert torch.equal(per_sample(weight, x), expected(weight, x))
    directions = torch.stack([weight, -weight])
    vmap(lambda direction: jvp(lambda weight: mine(x, weight, bias), (weight,), (direction,))[1])(directions)


def test_each_operand_has_a_forward_derivative_of_its_own() -> None:
    inputs = arguments("grouped")
    for i, direction in enumerate(inputs):

        def along(f: Callable[..., Tensor], *inputs: Tensor, i: int = i) -> Tensor:
            return jvp(lambda t: f(*inputs[:i], t, *inputs[i + 1 : 3]), (inputs[i],), (inputs[3],))[1]

        found, expected = (
            vmap(along, in_dims=(None, 0, 0, 0, 0))(f("grouped"), *inputs, direction) for f in (ours, torchs)
        )
        assert_close(found, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@WAYS
def test_on_a_gpu(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    go(way, monkeypatch)
    inputs = tuple(t.cuda() for t in arguments(way))
    equals_loop(gradient(ours(way)), gradient(torchs(way)), (0, 0, 0), *inputs)


def test_a_network_uses_it() -> None:
    model = purecnn.create("mobilenet_v3_small", num_classes=3)
    params, state = vmap(model.init)(random.split(random.key(0), 2))
    x = random.normal(random.key(1), (2, 3, 64, 64))
    logits, _ = vmap(model.apply, in_dims=(0, 0, None))(params, state, x)
    for i in range(2):
        table.assert_close(logits[i], model.apply(pick(params, i), pick(state, i), x)[0])
