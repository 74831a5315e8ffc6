"""Keys and draws: recorded and live comparison with JAX, and the laws which hold for every key."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from purecnn import random

KEY = random.key(42)
LARGE = random._PIECE
keys = st.integers(0, 2**64 - 1).map(random.key)
sizes = st.integers(0, 6)
shapes = st.lists(sizes, max_size=3).map(tuple)

# Every kind of draw, with a small result.
DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "split": lambda key: random.split(key, 3),
    "fold_in": lambda key: random.fold_in(key, 7),
    "bits": lambda key: random.bits(key, (2, 3)),
    "uniform": lambda key: random.uniform(key, (5,), minval=-0.1, maxval=0.3),
    "uniform64": lambda key: random.uniform(key, (5,), torch.float64),
    "normal": lambda key: random.normal(key, (5,), mean=1.0, std=2.0),
    "normal16": lambda key: random.normal(key, (5,), torch.bfloat16),
    "bernoulli": lambda key: random.bernoulli(key, 0.3, (4, 4)),
    "truncated_normal": lambda key: random.truncated_normal(key, -1.0, 2.0, (5,)),
    "permutation": lambda key: random.permutation(key, 9),
}
draws = pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())


# Recorded from jax.random 0.10 with jax_threefry_partitionable=True.


def test_recorded_keys() -> None:
    assert random.key(42).tolist() == [0, 42]
    assert random.key(2**40 + 5).tolist() == [256, 5]
    assert random.split(KEY).tolist() == [[1832780943, 270669613], [64467757, 2916123636]]
    assert random.split(KEY, 3)[2].tolist() == [2465931498, 255383827]
    assert random.fold_in(KEY, 0).tolist() == [1832780943, 270669613]
    assert random.fold_in(KEY, 7).tolist() == [2547012911, 1371500959]
    assert random.fold_in(KEY, 2**32 - 1).tolist() == [2398536845, 3890976714]


def test_recorded_bits() -> None:
    words = [2098992034, 2919706841, 2646866425, 2409546199, 1935504149]
    assert random.bits(KEY, (5,)).tolist() == words
    assert random.bits(KEY, ()).item() == words[0]
    far = random.bits(KEY, (1_000_000,))[[65536, 524287, 524288, 999999]]
    assert far.tolist() == [1508273704, 2955418270, 2577090294, 3264656773]


def test_recorded_floats() -> None:
    def exact(digits: str) -> list[float]:
        return [float.fromhex(d) for d in digits.split()]

    uniform = exact("0x1.f47048p-2 0x1.5c0e60p-1 0x1.3b87f0p-1 0x1.1f3d80p-1 0x1.cd75c8p-2")
    assert random.uniform(KEY, (5,)).tolist() == uniform
    signed = exact("-0x1.71f7p-6 0x1.70398p-2 0x1.dc3f8p-3")
    assert random.uniform(KEY, (3,), minval=-1, maxval=1).tolist() == signed
    double = exact("0x1.b4f8123c40884p-2 0x1.ebd996d6e8400p-7 0x1.25f641d41e71ap-1")
    assert random.uniform(KEY, (3,), torch.float64).tolist() == double
    assert random.bernoulli(KEY, 0.5, (8,)).int().tolist() == [1, 0, 0, 0, 1, 0, 1, 0]
    normal = [-0.02830461598932743, 0.4671318531036377, 0.2957029640674591, 0.15354591608047485]
    assert random.normal(KEY, (4,)).tolist() == pytest.approx(normal, rel=1e-5)
    double = [-0.18471174528191162, -2.169824560397754, 0.18693555179382582]
    assert random.normal(KEY, (3,), torch.float64).tolist() == pytest.approx(double, rel=1e-12)
    cut = [-0.027016498148441315, 0.44438081979751587, 0.2818770706653595, 0.14650805294513702]
    assert random.truncated_normal(KEY, -2, 2, (4,)).tolist() == pytest.approx(cut, rel=1e-5)


# Compared with an installed JAX.


@pytest.fixture(scope="module")
def jax() -> Any:
    return pytest.importorskip("jax", reason="JAX is not installed")


def words(jax_keys: Any) -> list[int]:
    import jax

    return jax.random.key_data(jax_keys).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("seed", [0, 1, 42, 2**31 - 1, 2**32 - 1])
def test_equals_jax(jax: Any, seed: int) -> None:
    ours, theirs = random.key(seed), jax.random.key(seed)
    assert ours.tolist() == words(theirs)
    assert random.split(ours, 5).tolist() == words(jax.random.split(theirs, 5))
    for data in (0, 1, 2**32 - 1):
        assert random.fold_in(ours, data).tolist() == words(jax.random.fold_in(theirs, data))
    for name in ("bits", "uniform", "bernoulli"):  # a single one, without more words
        assert getattr(random, name)(ours).tolist() == getattr(jax.random, name)(theirs).tolist()
    shape = (7, 11, 1000)
    assert random.bits(ours, shape).tolist() == jax.random.bits(theirs, shape).tolist()
    assert random.uniform(ours, shape).tolist() == jax.random.uniform(theirs, shape).tolist()
    for p in (0.0, 0.1, 0.8, 1.0):
        assert random.bernoulli(ours, p, shape).tolist() == jax.random.bernoulli(theirs, p, shape).tolist()
    expected = torch.tensor(jax.random.normal(theirs, shape).tolist())
    torch.testing.assert_close(random.normal(ours, shape), expected, rtol=1e-5, atol=1e-6)
    expected = torch.tensor(jax.random.truncated_normal(theirs, -2, 2, shape).tolist())
    torch.testing.assert_close(random.truncated_normal(ours, -2, 2, shape), expected, rtol=1e-5, atol=1e-6)


# Laws of keys.


@given(keys, st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_fold_in_is_a_function(key: Tensor, a: int, b: int) -> None:
    one, other = random.fold_in(key, a), random.fold_in(key, b)
    assert torch.equal(one, other) == (a == b)
    assert torch.equal(one, random.fold_in(key, torch.tensor(a)))
    assert torch.equal(random.fold_in(key, torch.tensor([[a], [b]])), torch.stack([one, other])[:, None])


def test_a_seed_may_be_numpys() -> None:
    assert torch.equal(random.key(np.int64(3)), random.key(3))


def test_keys_stay_on_their_device() -> None:
    key = random.key(1)
    with torch.device("meta"):
        assert random.fold_in(key, 1).is_cpu
        assert random.split(key).is_cpu
        assert random.uniform(key, (3,)).is_cpu


def test_fold_in_takes_tensors_modulo_32_bits() -> None:
    for data in (torch.tensor(-1), torch.tensor(-1, dtype=torch.int32), torch.tensor(2**33 - 1)):
        assert torch.equal(random.fold_in(KEY, data), random.fold_in(KEY, 2**32 - 1))


@given(keys, st.integers(0, 50))
def test_split_keys_are_distinct(key: Tensor, num: int) -> None:
    new = random.split(key, num)
    assert new.shape == (num, 2)
    assert new.dtype == torch.int64
    assert len({tuple(k) for k in [*new.tolist(), key.tolist()]}) == num + 1
    assert torch.equal(new, random.fold_in(key, torch.arange(num)))


def test_a_draw_does_not_change_the_key() -> None:
    key = random.key(7)
    for draw in DRAWS.values():
        draw(key)
    random.normal(key, (LARGE + 1,))
    assert key.tolist() == [0, 7]


def test_draws_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    for draw in DRAWS.values():
        draw(KEY)
    assert torch.equal(before, torch.get_rng_state())


# Laws of draws.


@given(keys, shapes)
def test_a_shape_only_arranges_the_numbers(key: Tensor, shape: tuple[int, ...]) -> None:
    flat = random.bits(key, (math.prod(shape),))
    assert torch.equal(random.bits(key, shape), flat.reshape(shape))
    assert torch.equal(random.bits(key, (100,))[: len(flat)], flat[:100])
    assert not flat.numel() or (flat.min() >= 0 and flat.max() < 2**32)


@given(keys, st.floats(-10, 10, width=32), st.floats(0, 10, width=32))
def test_uniform_lies_in_its_range(key: Tensor, low: float, width: float) -> None:
    x = random.uniform(key, (500,), minval=low, maxval=low + width)
    assert x.min() >= torch.tensor(low)
    assert x.max() <= torch.tensor(low + width)
    assert random.uniform(key, (500,)).max() < 1


@given(keys, st.integers(0, 200))
def test_permutation_is_a_permutation(key: Tensor, n: int) -> None:
    order = random.permutation(key, n)
    assert order.dtype == torch.int64
    assert order.sort().values.tolist() == list(range(n))


@given(keys, st.floats(-4, 3.9), st.floats(0.05, 4))
def test_truncated_normal_lies_in_its_interval(key: Tensor, lower: float, width: float) -> None:
    x = random.truncated_normal(key, lower, lower + width, (500,))
    assert x.min() >= torch.tensor(lower)
    assert x.max() <= torch.tensor(lower + width)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_unlimited_truncation_stays_finite(dtype: torch.dtype) -> None:
    x = random.truncated_normal(KEY, -math.inf, math.inf, (1000,), dtype)
    torch.testing.assert_close(x, random.normal(KEY, (1000,), dtype), rtol=1e-4, atol=1e-6)
    # The lowest word of all, which the inverse would send to the bound.
    one = random._below_one(dtype)
    assert torch.tensor([-one, one], dtype=dtype).erfinv().isfinite().all()


def test_half_precision_is_a_rounded_draw() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        for draw in (random.uniform, random.normal):
            assert torch.equal(draw(KEY, (100,), dtype), draw(KEY, (100,)).to(dtype))


def test_moments() -> None:
    n = 1_000_000
    x = random.normal(KEY, (n,), mean=3.0, std=2.0).double()
    assert abs(x.mean() - 3) < 5 * 2 / math.sqrt(n)
    assert abs(x.var() - 4) < 5 * 4 * math.sqrt(2 / n)
    assert abs(((x - 3) / 2).pow(4).mean() - 3) < 5 * math.sqrt(96 / n)
    u = random.uniform(KEY, (n,)).double()
    assert abs(u.mean() - 0.5) < 5 / math.sqrt(12 * n)
    assert abs(u.var() - 1 / 12) < 5 / math.sqrt(180 * n)
    assert abs(random.bernoulli(KEY, 0.3, (n,)).double().mean() - 0.3) < 5 * math.sqrt(0.21 / n)
    both = random.uniform(random.fold_in(KEY, 1), (n,)).double()
    assert abs(torch.corrcoef(torch.stack([u, both]))[0, 1]) < 5 / math.sqrt(n)


def test_permutations_are_equally_likely() -> None:
    n = 6000
    orders = torch.vmap(lambda key: random.permutation(key, 3))(random.split(KEY, n))
    counts = (orders * torch.tensor([9, 3, 1])).sum(1).unique(return_counts=True)[1].double()
    assert len(counts) == 6
    assert ((counts - n / 6) ** 2 / (n / 6)).sum() < 25.7  # chi-squared, 5 degrees of freedom, p = 1e-4


def test_bernoulli_takes_a_tensor_of_probabilities() -> None:
    p = torch.tensor([0.0, 0.5, 1.0])
    kept = random.bernoulli(KEY, p, (1000, 3))
    assert kept.dtype == torch.bool
    assert kept.sum(0)[[0, 2]].tolist() == [0, 1000]
    assert 400 < kept.sum(0)[1] < 600


# One result, however it is computed.


@pytest.mark.parametrize("size", [1, LARGE, LARGE + 1, 2 * LARGE + 3])
def test_pieces_equal_the_whole(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> list[Tensor]:
        return [random.bits(KEY, (size,)), random.normal(KEY, (size,)), random.split(KEY, size)]

    pieces = run()
    monkeypatch.setattr(random, "_PIECE", 1 << 30)
    for in_pieces, whole in zip(pieces, run(), strict=True):
        # erfinv differs by a rounding between the vector and the scalar part of a kernel
        torch.testing.assert_close(in_pieces, whole, rtol=1e-5 if whole.is_floating_point() else 0, atol=0)


@draws
def test_vmap_equals_a_loop(draw: Callable[[Tensor], Tensor]) -> None:
    many = random.split(KEY, 4)
    assert torch.equal(torch.vmap(draw)(many), torch.stack([draw(key) for key in many]))


def test_vmap_of_large_draws_and_nested() -> None:
    many = random.split(KEY, 4)

    def draw(key: Tensor) -> Tensor:
        return random.bits(key, (LARGE + 1,))

    expected = torch.stack([draw(key) for key in many])
    assert torch.equal(torch.vmap(draw)(many), expected)
    assert torch.equal(torch.vmap(torch.vmap(draw))(many.view(2, 2, 2)).flatten(0, 1), expected)


def test_vmap_over_data_and_probability() -> None:
    folded = torch.vmap(random.fold_in, in_dims=(None, 0))(KEY, torch.arange(3))
    assert torch.equal(folded, random.split(KEY, 3))
    p = torch.tensor([0.0, 1.0])
    kept = torch.vmap(lambda p: random.bernoulli(KEY, p, (4,)))(p)
    assert kept.tolist() == [[False] * 4, [True] * 4]


def test_grad_passes_a_draw() -> None:
    def loss(x: Tensor, key: Tensor) -> Tensor:
        return (x * random.bernoulli(key, 0.5, x.shape)).sum()

    many = random.split(KEY, 3)
    slopes = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(torch.ones(5), many)
    assert torch.equal(slopes, torch.stack([random.bernoulli(key, 0.5, (5,)) for key in many]).float())


def test_compiled_equals_eager() -> None:
    def several(key: Tensor) -> list[Tensor]:
        names = ("fold_in", "uniform", "bernoulli", "truncated_normal", "permutation")
        return [DRAWS[name](key) for name in names] + [random.normal(key, (LARGE + 1,)), random.key(3)]

    compiled = torch.compile(several, fullgraph=True, backend="aot_eager")
    for eager, graph in zip(several(KEY), compiled(KEY), strict=True):
        assert torch.equal(eager, graph)


@draws
def test_a_trace_holds_the_draw(draw: Callable[[Tensor], Tensor]) -> None:
    """Not the numbers that its key happened to give."""
    other = random.key(7)
    assert torch.equal(make_fx(draw)(KEY)(other), draw(other))
    with FakeTensorMode() as mode:
        shape_only = draw(mode.from_tensor(KEY))
    assert isinstance(shape_only, FakeTensor)
    assert shape_only.shape == draw(KEY).shape


def test_export_with_an_open_batch_size() -> None:
    class Mask(torch.nn.Module):
        def forward(self, key: Tensor, x: Tensor) -> Tensor:
            return x * random.bernoulli(key, 0.5, x.shape)

    dynamic = (None, {0: torch.export.Dim("batch")})
    program = torch.export.export(Mask(), (KEY, torch.ones(4, 3)), dynamic_shapes=dynamic)
    assert torch.equal(program.module()(KEY, torch.ones(7, 3)), random.bernoulli(KEY, 0.5, (7, 3)).float())


@draws
def test_meta_keys_give_shapes(draw: Callable[[Tensor], Tensor]) -> None:
    real, shape_only = draw(KEY), draw(random.key(42, device="meta"))
    assert shape_only.device.type == "meta"
    assert (shape_only.shape, shape_only.dtype) == (real.shape, real.dtype)


@draws
def test_small_draws_change_nothing_in_place(draw: Callable[[Tensor], Tensor]) -> None:
    class Scan(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert not func._schema.is_mutable, func
            return func(*args, **(kwargs or {}))

    with Scan():
        draw(KEY)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", DRAWS)
def test_gpu_equals_cpu(name: str) -> None:
    expected, actual = DRAWS[name](KEY), DRAWS[name](KEY.cuda())
    assert actual.is_cuda
    tolerance = 1e-5 if "normal" in name else 0.0  # erfinv
    torch.testing.assert_close(actual.cpu(), expected, rtol=tolerance, atol=tolerance)


# Errors.


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: random.key(-1), ValueError, r"\[0, 2\*\*64\)"),
        (lambda: random.key(1 << 64), ValueError, r"\[0, 2\*\*64\)"),
        (lambda: random.key(1.0), TypeError, "int"),
        (lambda: random.bits(42, ()), TypeError, "purecnn.random.key"),
        (lambda: random.bits(KEY.int(), ()), TypeError, "int64"),
        (lambda: random.bits(random.split(KEY, 3), ()), ValueError, r"\(3, 2\).*vmap"),
        (lambda: random.fold_in(KEY, -1), ValueError, r"\[0, 2\*\*32\)"),
        (lambda: random.fold_in(KEY, 1 << 32), ValueError, r"\[0, 2\*\*32\)"),
        (lambda: random.fold_in(KEY, "a"), TypeError, "str"),
        (lambda: random.fold_in(KEY, torch.tensor(1.0)), TypeError, "float32"),
        (lambda: random.split(KEY, -1), ValueError, "negative"),
        (lambda: random.bits(KEY, (2, -1)), ValueError, "negative"),
        (lambda: random.bits(KEY, 3), TypeError, "sequence of ints"),
        (lambda: random.bits(KEY, (2.0,)), TypeError, "sequence of ints"),
        (lambda: random.bits(random.key(0, "meta"), (1 << 16, 1 << 15)), ValueError, "split the key"),
        (lambda: random.uniform(KEY, (), torch.int32), TypeError, "floating"),
        (lambda: random.normal(KEY, (), torch.int32), TypeError, "floating"),
        (lambda: random.uniform(KEY, (), minval=1.0, maxval=0.0), ValueError, "exceed"),
        (lambda: random.bernoulli(KEY, 1.5, ()), ValueError, r"\[0, 1\]"),
        (lambda: random.bernoulli(KEY, math.nan, ()), ValueError, r"\[0, 1\]"),
        (lambda: random.truncated_normal(KEY, 1.0, 1.0, ()), ValueError, "below"),
        (lambda: random.truncated_normal(KEY, 7.0, 8.0, ()), ValueError, "resolve"),
    ],
)
def test_wrong_input_raises(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
