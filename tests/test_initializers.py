"""Initial values: the moments and bounds of each law, and its agreement with torch.nn.init and JAX."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from purecnn import initializers, random

KEY = random.key(3)
CONV = (128, 64, 5, 5)
FAN_IN, FAN_OUT = 64 * 25, 128 * 25
N = math.prod(CONV)

# name: (initializer, mean, standard deviation, bounds)
LAWS: dict[str, tuple[initializers.Initializer, float, float, tuple[float, float]]] = {
    "normal": (initializers.normal(0.02, mean=0.5), 0.5, 0.02, (0.35, 0.65)),
    "uniform": (initializers.uniform(-1, 3), 1, 4 / math.sqrt(12), (-1, 3)),
    "truncated_normal": (initializers.truncated_normal(0.01), 0, 0.01, (-0.07, 0.07)),
    "truncated_normal, cut": (
        initializers.truncated_normal(2, mean=1, lower=-3, upper=5),
        1,
        2 * initializers._TRUNCATED_STD,
        (-3, 5),
    ),
    "kaiming_normal": (initializers.kaiming_normal(), 0, math.sqrt(2 / FAN_OUT), (-1, 1)),
    "kaiming_normal, fan_in": (initializers.kaiming_normal("fan_in"), 0, math.sqrt(2 / FAN_IN), (-1, 1)),
    "kaiming_uniform": (
        initializers.kaiming_uniform("fan_in"),
        0,
        math.sqrt(2 / FAN_IN),
        (-math.sqrt(6 / FAN_IN), math.sqrt(6 / FAN_IN)),
    ),
    "lecun_normal": (
        initializers.lecun_normal(),
        0,
        math.sqrt(1 / FAN_IN),
        (-2 * 0.025 / 0.8796, 2 * 0.025 / 0.8796),
    ),
    "xavier_uniform": (
        initializers.xavier_uniform(),
        0,
        math.sqrt(2 / (FAN_IN + FAN_OUT)),
        (-math.sqrt(6 / (FAN_IN + FAN_OUT)), math.sqrt(6 / (FAN_IN + FAN_OUT))),
    ),
    "xavier_normal": (initializers.xavier_normal(), 0, math.sqrt(2 / (FAN_IN + FAN_OUT)), (-1, 1)),
    "fan_in_uniform": (initializers.fan_in_uniform(), 0, 1 / 40 / math.sqrt(3), (-1 / 40, 1 / 40)),
    "fan_in_uniform, given": (initializers.fan_in_uniform(100), 0, 0.1 / math.sqrt(3), (-0.1, 0.1)),
}
laws = pytest.mark.parametrize("name", LAWS)


@laws
def test_moments_and_bounds(name: str) -> None:
    init, mean, std, (low, high) = LAWS[name]
    x = init(KEY, CONV)
    assert x.shape == CONV
    assert x.dtype == torch.float32
    assert low <= x.min()
    assert x.max() <= high
    # Five standard errors; the variance of the square is largest for the normal law.
    assert abs(x.double().mean() - mean) < 5 * std / math.sqrt(N)
    assert abs(x.double().std() / std - 1) < 5 / math.sqrt(2 * N)


@laws
def test_vmap_equals_a_loop(name: str) -> None:
    init = LAWS[name][0]
    keys = random.split(KEY, 3)
    assert torch.equal(
        torch.vmap(lambda key: init(key, (4, 3)))(keys), torch.stack([init(key, (4, 3)) for key in keys])
    )


@laws
def test_other_types_are_the_rounded_draw(name: str) -> None:
    init = LAWS[name][0]
    assert torch.equal(init(KEY, (4, 3), dtype=torch.bfloat16), init(KEY, (4, 3)).bfloat16())
    assert init(KEY, (4, 3), dtype=torch.float64).dtype == torch.float64


def test_constants() -> None:
    assert torch.equal(initializers.zeros(KEY, (2, 3)), torch.zeros(2, 3))
    assert torch.equal(initializers.ones(KEY, (2,), dtype=torch.float64), torch.ones(2, dtype=torch.float64))
    assert torch.equal(initializers.constant(-1.5)(KEY, ()), torch.tensor(-1.5))
    assert torch.vmap(lambda key: initializers.ones(key, (2,)))(random.split(KEY, 3)).shape == (3, 2)


@pytest.mark.parametrize("shape", [(10, 7), (64, 3, 7, 7), (32, 1, 3, 3), (8, 4, 2, 3, 5), (4, 5, 6)])
def test_fans_are_those_of_torch(shape: tuple[int, ...]) -> None:
    assert initializers.fans(shape) == torch.nn.init._calculate_fan_in_and_fan_out(torch.empty(shape))


def torch_draw(name: str, **arguments: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return getattr(torch.nn.init, name)(torch.empty(CONV), generator=generator, **arguments)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("init", "expected"),
    [
        (initializers.kaiming_normal(), ("kaiming_normal_", {"mode": "fan_out", "nonlinearity": "relu"})),
        (initializers.kaiming_uniform("fan_in"), ("kaiming_uniform_", {})),
        (initializers.xavier_uniform(), ("xavier_uniform_", {})),
        (initializers.xavier_normal(), ("xavier_normal_", {})),
        (initializers.fan_in_uniform(), ("kaiming_uniform_", {"a": math.sqrt(5)})),
        (initializers.truncated_normal(0.01), ("trunc_normal_", {"std": 0.01})),
        (initializers.truncated_normal(1.5), ("trunc_normal_", {"std": 1.5})),
        (initializers.truncated_normal(1, 0.5, -1, 3), ("trunc_normal_", {"mean": 0.5, "a": -1, "b": 3})),
    ],
)
def test_law_is_that_of_torch(init: initializers.Initializer, expected: tuple[str, dict[str, Any]]) -> None:
    name, arguments = expected
    ours, theirs = init(KEY, CONV).flatten().sort().values, torch_draw(name, **arguments).flatten().sort().values
    # Two-sample Kolmogorov-Smirnov: the largest distance between the two distribution functions.
    rank = torch.searchsorted(theirs, ours).double() / N
    distance = (rank - torch.arange(N) / N).abs().max()
    assert distance < 2.0 * math.sqrt(2 / N)  # p = 7e-4


@pytest.mark.parametrize("mode", ["fan_in", "fan_out", "fan_avg"])
@pytest.mark.parametrize("distribution", ["normal", "uniform", "truncated_normal"])
def test_variance_scaling_equals_jax(mode: Any, distribution: Any) -> None:
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    theirs = jax.nn.initializers.variance_scaling(1.5, mode, distribution, in_axis=1, out_axis=0)
    shape = (8, 16, 3, 3)
    expected = torch.tensor(theirs(jax.random.key(3), shape).tolist())
    actual = initializers.variance_scaling(1.5, mode, distribution)(KEY, shape)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


def test_a_small_deviation_is_never_cut_to_the_bound() -> None:
    # With bounds 200 deviations away the lowest random word must not become a weight of -2.
    lowest = torch.tensor(-random._below_one(torch.float32)).erfinv() * math.sqrt(2) * 0.01
    assert -0.06 < lowest < -0.05
    assert initializers.truncated_normal(0.01)(KEY, (1_000_000,)).abs().max() < 0.06


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("lower", "upper"), [(-0.3, 0.3), (0.1, 0.3), (-0.3, -0.1), (-math.inf, 1e-7), (-1e6, 0.0)])
def test_bounds_hold_in_every_type(dtype: torch.dtype, lower: float, upper: float) -> None:
    """As numbers, not as the type rounds them: 0.3 is 0.30078125 in bfloat16."""
    x = initializers.truncated_normal(1.0, lower=lower, upper=upper)(KEY, (100_000,), dtype)
    assert x.dtype == dtype
    assert x.isfinite().all()
    assert lower <= float(x.min())
    assert float(x.max()) <= upper


@given(
    bound=st.floats(-65504, 65503), dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])
)
def test_the_largest_number_below_a_bound(bound: float, dtype: torch.dtype) -> None:
    below = initializers._below(bound, dtype)
    number = torch.tensor(below, dtype=dtype)
    assert float(number) == below <= bound < float(number.nextafter(torch.tensor(math.inf, dtype=dtype)))


def test_empty_weights() -> None:
    assert initializers.kaiming_normal()(KEY, (0, 3, 1, 1)).shape == (0, 3, 1, 1)
    assert initializers.fan_in_uniform()(KEY, (3, 0)).shape == (3, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: initializers.fans((3,)), "two or more"),
        (lambda: initializers.kaiming_normal()(KEY, (3,)), "two or more"),
        (lambda: initializers.fan_in_uniform()(KEY, (3,)), "two or more"),
        (lambda: initializers.fan_in_uniform(0), "positive"),
        (lambda: initializers.normal(0.0), "positive"),
        (lambda: initializers.truncated_normal(-1.0), "positive"),
        (lambda: initializers.truncated_normal(1.0, lower=1.0, upper=1.0), "below"),
        (lambda: initializers.uniform(1.0, 0.0), "exceed"),
        (lambda: initializers.variance_scaling(0.0, "fan_in", "normal"), "scale"),
        (lambda: initializers.variance_scaling(1.0, "fan", "normal"), "mode"),  # type: ignore[arg-type]
        (lambda: initializers.variance_scaling(1.0, "fan_in", "cauchy"), "distribution"),  # type: ignore[arg-type]
    ],
)
def test_wrong_input_raises(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
