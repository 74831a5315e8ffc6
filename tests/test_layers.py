"""Each layer against torch's own module, and what each refuses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import grad, jvp, vmap

from purecnn import Layer, Mode, layers, random, tree
from purecnn.layers import Leaf, avg_pool, batch_norm, conv, dropout, linear, max_pool
from tests.table import assert_close, to

KEY = random.key(2)
TRAIN = Mode(train=True, batch_statistics=True, key=KEY)


def images(*shape: int, seed: int = 0) -> Tensor:
    return random.normal(random.key(seed), shape)


def run(layer: Layer, x: Tensor, mode: Mode = TRAIN) -> tuple[Tensor, dict[str, Any], dict[str, Any]]:
    params, state, y = layer.init(x.to("meta"), TRAIN)
    output, new_state = layer.apply(params, state, x, mode)
    assert output.shape == y.shape
    assert y.is_meta
    return output, params, new_state


@pytest.mark.parametrize("layer", [lambda **each: conv(3, 1, bias=True, **each), lambda **each: linear(3, **each)])
@pytest.mark.parametrize("value", [0, 0.0, 1, -0.5])
def test_parameters_filled_with_a_number(layer: Callable[..., Layer], value: float) -> None:
    output, params, _ = run(layer(init=value, bias_init=value), torch.ones(2, 3, 3, 3))
    for leaf in params.values():
        assert leaf.dtype == torch.float32
        assert (leaf == value).all()
    torch.testing.assert_close(output, torch.full_like(output, 4 * value))


@given(
    groups=st.integers(1, 3),
    per_group=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    padding=st.none() | st.integers(0, 2),
    dilation=st.integers(1, 2),
    bias=st.booleans(),
    size=st.tuples(st.integers(7, 9), st.integers(7, 9)),
)
def test_conv_is_torchs(
    groups: int,
    per_group: tuple[int, int],
    kernel: int,
    stride: int,
    padding: int | None,
    dilation: int,
    bias: bool,
    size: tuple[int, int],
) -> None:
    inputs, features = (groups * count for count in per_group)
    x = images(2, inputs, *size)
    y, params, _ = run(conv(features, kernel, stride, padding, groups=groups, dilation=dilation, bias=bias), x)
    pad = dilation * (kernel - 1) // 2 if padding is None else padding
    module = nn.Conv2d(inputs, features, kernel, stride, pad, dilation, groups=groups, bias=bias)
    module.load_state_dict(params)
    assert torch.equal(y, module(x))


def test_dilation_is_positive() -> None:
    with pytest.raises(ValueError, match="dilation of a convolution is at least 1, found 0"):
        conv(2, 3, dilation=0)


@given(st.integers(1, 5), st.integers(1, 5), st.booleans())
def test_linear_is_torchs(inputs: int, features: int, bias: bool) -> None:
    x = images(3, inputs)
    y, params, _ = run(linear(features, bias=bias), x)
    module = nn.Linear(inputs, features, bias)
    module.load_state_dict(params)
    assert torch.equal(y, module(x))


def test_default_initialisation_is_torchs_law() -> None:
    """Uniform on +-1 / sqrt(fan_in), for the bias too."""
    for layer, x, fan_in in (
        (conv(64, 3, groups=2, bias=True), images(1, 8, 4, 4), 36),
        (linear(64), images(1, 49), 49),
    ):
        _, params, _ = run(layer, x)
        for leaf in params.values():
            assert leaf.abs().max() <= fan_in**-0.5
            assert leaf.abs().max() > 0.9 * fan_in**-0.5
            assert abs(float(leaf.mean())) < 0.2 * fan_in**-0.5


@given(
    batch=st.integers(1, 4),
    channels=st.integers(1, 4),
    size=st.tuples(st.integers(1, 5), st.integers(2, 5)),
    eps=st.sampled_from([1e-5, 1e-3]),
    momentum=st.sampled_from([0.1, 0.01, 3e-4]),
    steps=st.integers(1, 3),
)
def test_batch_norm_is_torchs(
    batch: int, channels: int, size: tuple[int, int], eps: float, momentum: float, steps: int
) -> None:
    layer, module = batch_norm(eps, momentum), nn.BatchNorm2d(channels, eps, momentum)
    params, state, _ = layer.init(torch.empty(batch, channels, *size, device="meta"), TRAIN)
    params = {name: leaf + images(channels, seed=i) / 4 for i, (name, leaf) in enumerate(params.items())}
    module.load_state_dict(params, strict=False)
    for step in range(steps):
        x = 2 * images(batch, channels, *size, seed=step) + 1
        y, state = layer.apply(params, state, x, TRAIN)
        assert torch.equal(y, module(x))
    names = {"mean": "running_mean", "var": "running_var", "count": "num_batches_tracked"}
    assert list(state) == list(names)
    assert all(torch.equal(state[name], getattr(module, theirs)) for name, theirs in names.items())
    assert state["count"].dtype == torch.int64
    y, same = layer.apply(params, state, x, Mode())
    assert same is state
    assert torch.equal(y, module.eval()(x))


@given(scale=st.sampled_from([1e-4, 1e-2, 1.0, 1e3]), shift=st.sampled_from([0.0, 1.0, 10.0]), double=st.booleans())
def test_mapped_batch_norm_equals_a_loop(scale: float, shift: float, double: bool) -> None:
    """Under vmap another operator does the work, whose running variance comes from the deviation."""
    layer = batch_norm()
    params, state, _ = layer.init(torch.empty(3, 2, 4, 4, device="meta"), TRAIN)
    x = scale * images(5, 3, 2, 4, 4) + shift * scale
    if double:
        params, state, x = to(torch.float64, params), to(torch.float64, state), x.double()
    y, new_state = vmap(lambda x: layer.apply(params, state, x, TRAIN))(x)
    for i in range(5):
        expected, statistics = layer.apply(params, state, x[i], TRAIN)
        assert_close(y[i], expected)
        assert_close(tree.map(lambda leaf, i=i: leaf[i], new_state), statistics, rtol=1e-5, atol=1e-12)
    assert {leaf.dtype for leaf in (new_state["mean"], new_state["var"])} == {x.dtype}


def test_running_statistics_carry_no_derivative() -> None:
    layer = batch_norm()
    x = images(3, 2, 4, 4)
    params, state, _ = layer.init(x.to("meta"), TRAIN)

    def moments(x: Tensor) -> Tensor:
        _, new_state = layer.apply(params, state, x, TRAIN)
        return new_state["mean"] + new_state["var"]

    def backward(x: Tensor) -> Tensor:
        return grad(lambda x: moments(x).sum() + 0 * x.sum())(x)

    def forward(x: Tensor) -> Tensor:
        return jvp(lambda x: moments(x) + 0 * x.sum(), (x,), (torch.ones_like(x),))[1]

    for derivative in (backward, forward):
        assert not derivative(x).any()
        assert not vmap(derivative)(torch.stack([x, 2 * x])).any()


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (1, 1, 1, 1)])
def test_batch_norm_of_one_value(shape: tuple[int, ...]) -> None:
    layer = batch_norm()
    params, state, _ = layer.init(torch.empty(2, *shape[1:], device="meta"), TRAIN)
    with pytest.raises(ValueError, match="more than one value per channel"):
        layer.apply(params, state, torch.zeros(shape), TRAIN)
    with pytest.raises(ValueError, match="more than one value per channel"):
        vmap(lambda x: layer.apply(params, state, x, TRAIN))(torch.zeros(4, *shape))
    layer.apply(params, state, torch.zeros(shape), Mode())


@given(rate=st.floats(0, 0.9), seed=st.integers(0, 99))
def test_dropout_zeroes_or_scales(rate: float, seed: int) -> None:
    x = images(4, 5, 6, 7) + 10
    y, _, _ = run(dropout(rate), x, TRAIN._replace(key=random.key(seed)))
    kept = y != 0
    torch.testing.assert_close(y[kept], (x / (1 - rate))[kept])
    share = 1 - float(kept.float().mean())
    assert abs(share - rate) < 0.09  # five deviations of the mean of 840 draws
    same, _ = dropout(rate).apply({}, {}, x, Mode())
    assert same is x


def test_dropout_of_nothing_wants_no_key() -> None:
    x = images(1, 2)
    assert dropout(0).apply({}, {}, x, Mode(train=True))[0] is x


def test_dropout_keeps_the_type() -> None:
    x = images(2, 3).bfloat16()
    assert dropout(0.5).apply({}, {}, x, TRAIN)[0].dtype == torch.bfloat16


@given(
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    padding=st.integers(0, 1),
    ceil_mode=st.booleans(),
    size=st.integers(3, 9),
)
def test_max_pool_is_torchs(kernel: int, stride: int, padding: int, ceil_mode: bool, size: int) -> None:
    padding = min(padding, kernel // 2)
    layer, module = (pool(kernel, stride, padding, ceil_mode=ceil_mode) for pool in (max_pool, nn.MaxPool2d))
    x = images(2, 3, size, size)
    y, _, _ = run(layer, x)
    assert torch.equal(y, module(x))
    for dtype in (torch.float32, torch.float64):
        # Rounded, so that windows have several largest values; negative ones, so that padding would show.
        x = (images(2, 3, size, size, seed=1).to(dtype) * 2).round() - 5
        weight = images(*y.shape, seed=2).to(dtype)
        expected = grad(lambda x: (module(x) * weight).sum())(x)  # noqa: B023
        torch.testing.assert_close(grad(lambda x: (run(layer, x)[0] * weight).sum())(x), expected)  # noqa: B023
        leaf = x.clone().requires_grad_()
        (run(layer, leaf)[0] * weight).sum().backward()
        torch.testing.assert_close(leaf.grad, expected)


@pytest.mark.parametrize(
    ("layer", "module"),
    [
        (avg_pool(2, 2), nn.AvgPool2d(2, 2)),
        (layers.adaptive_avg_pool(3), nn.AdaptiveAvgPool2d(3)),
        (layers.global_avg_pool, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())),
        (layers.flatten, nn.Flatten()),
        (layers.relu, nn.ReLU()),
        (layers.identity, nn.Identity()),
    ],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_layers_without_parameters_are_torchs(layer: Layer, module: nn.Module, layout: torch.memory_format) -> None:
    x = images(2, 3, 7, 6).to(memory_format=layout)
    y, params, state = run(layer, x)
    assert not params
    assert not state
    assert torch.equal(y, module(x))


@pytest.mark.parametrize(
    ("make", "shape"),
    [(lambda: conv(4, 3, bias=True), (2, 3, 5, 5)), (lambda: linear(4), (2, 3)), (batch_norm, (2, 3, 5, 5))],
    ids=["conv", "linear", "batch_norm"],
)
def test_init_without_a_key_gives_meta_tensors(make: Callable[[], Layer], shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, device="meta")
    drawn, abstract = make().init(x, TRAIN), make().init(x, Mode(train=True, batch_statistics=True))
    for a, b in zip(drawn[:2], abstract[:2], strict=True):
        assert {name: (leaf.shape, leaf.dtype) for name, leaf in a.items()} == {
            name: (leaf.shape, leaf.dtype) for name, leaf in b.items()
        }
        assert all(leaf.is_meta for leaf in b.values())
        assert not any(leaf.is_meta for leaf in a.values())
    names = make().names
    assert names == drawn[0].keys() | drawn[1].keys()


def test_leaf_is_drawn_by_its_name_or_filled() -> None:
    def draw(name: str) -> Tensor:
        return Leaf((3,), random.normal).draw(name, TRAIN)

    assert torch.equal(draw("a"), draw("a"))
    assert not torch.equal(draw("a"), draw("b"))
    assert torch.equal(Leaf((2,), 0.5).draw("a", TRAIN), torch.full((2,), 0.5))


def test_a_layer_is_a_value() -> None:
    layer: Any = conv(2, 1)
    with pytest.raises(AttributeError):
        layer.names = frozenset()


@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 4, 4)])
def test_statistics_of_all_processes_where_there_is_one(shape: tuple[int, ...]) -> None:
    x = images(*shape)
    y, _, state = run(batch_norm(), x)
    found, _, found_state = run(batch_norm(), x, TRAIN._replace(synchronized=True))
    assert_close({"y": found, **found_state}, {"y": y, **state})


def test_no_images_have_no_statistics() -> None:
    module = nn.BatchNorm2d(3)
    nothing = torch.zeros(0, 3, 4, 4)
    y, _, state = run(batch_norm(), nothing)
    assert torch.equal(y, module(nothing))
    names = {"running_mean": "mean", "running_var": "var", "num_batches_tracked": "count"}
    assert all(torch.equal(buffer, state[names[name]]) for name, buffer in module.named_buffers())


def test_images_longer_than_the_statistics() -> None:
    params, state, _ = batch_norm().init(torch.empty(1, 3, 4, 4, device="meta"), Mode(key=KEY))
    with pytest.raises(ValueError, match=r"images in torch.float64 need statistics .*found torch.float32"):
        batch_norm().apply(to(torch.float64, params), state, images(2, 3, 4, 4).double(), TRAIN)


def test_normalisation_without_scale() -> None:
    x = images(2, 6, 4, 4)
    for kind in (batch_norm, layers.group_norm):
        y, params, state = run(kind(scale=False), x)
        assert list(params) == ["bias"]
        expected, _, expected_state = run(kind(), x)
        assert torch.equal(y, expected)
        assert_close(state, expected_state)


def test_a_layer_makes_what_it_declares() -> None:
    layer = layers.parametric(lambda x: ({"weight": Leaf((1,), 0.0)}, {}), lambda p, s, x, m: (x, s), "alpha")
    with pytest.raises(ValueError, match=r"declares the tensors \['alpha'\], but makes \['weight'\]"):
        layer.init(torch.empty(1, device="meta"), Mode())


def test_a_layers_apply_gives_a_pair() -> None:
    layer = layers.parametric(lambda x: ({"weight": Leaf((1,), 0.0)}, {}), lambda p, s, x, m: x, "weight")  # type: ignore[arg-type, return-value]
    with pytest.raises(TypeError, match=r"must return \(output, state\), found Tensor"):
        layer.init(torch.empty(2, device="meta"), Mode())
