"""Random numbers as pure functions of a key, as in ``jax.random``.

A draw is ``draw(key, ...) -> Tensor``: the same key gives the same numbers, on a CPU and on a GPU, in eager
mode and compiled, alone and under ``torch.func.vmap``. There is no global state and no ``torch.Generator``,
which does not work under ``vmap`` and breaks ``torch.compile(fullgraph=True)``. To make two different draws,
make two keys with :func:`split` or :func:`fold_in`. Use only one of the two functions on any one key, because,
as in JAX, ``split(key, n)[i]`` equals ``fold_in(key, i)``.

A key is an int64 tensor of shape ``(2,)`` that holds two uint32 words, each as a value in ``[0, 2**32)``.
It is not a uint32 tensor, because torch implements few operations for that type, while int64 works with
indexing, ``vmap``, ``compile`` and safetensors. A batch of keys is a tensor of shape ``(n, 2)``; use ``vmap``
to map over it.

The words come from the counter-based generator Threefry-2x32 with 20 rounds, as in ``jax.random`` with
its default ``jax_threefry_partitionable=True``. Keys, bits, standard uniform numbers and Bernoulli draws equal
JAX's bit for bit; normal numbers equal JAX's up to the rounding of ``erfinv``.

References:
    Salmon, Moraes, Dror, Shaw. Parallel random numbers: as easy as 1, 2, 3. SC 2011.
    JAX, https://docs.jax.dev/en/latest/jep/263-prng.html
"""

import math
import operator
from collections.abc import Callable, Sequence
from typing import SupportsIndex, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from purecnn.eager import is_transformed

__all__ = [
    "bernoulli",
    "bits",
    "fold_in",
    "key",
    "normal",
    "permutation",
    "split",
    "truncated_normal",
    "uniform",
]

_Words: TypeAlias = npt.NDArray[np.uint32]

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
# How far to shift a word left and right; as arrays, because NumPy would convert numbers at each call.
_SHIFTS = {r: (np.array(r, np.uint32), np.array(32 - r, np.uint32)) for row in _ROTATIONS for r in row}
_PARITY = 0x1BD11BDA
_WORD = 0xFFFFFFFF
# The hundred steps of Threefry are limited by memory bandwidth, so on a CPU a draw is made in pieces that fit into the
# cache. This size was the fastest of 2**13 to 2**18 numbers in a trial.
_PIECE = 1 << 16


def key(seed: SupportsIndex, device: torch.device | str | None = None) -> Tensor:
    """Makes a key from an integer.

    Args:
        seed: an integer in ``[0, 2**64)``; the high and low 32 bits become the two words. (JAX keeps the low
            32 bits only, unless ``jax_enable_x64`` is set.)
        device: where the key lives, and with it everything drawn from it.

    Returns:
        A key: int64, shape ``(2,)``.

    Raises:
        TypeError: ``seed`` is not an int.
        ValueError: ``seed`` is out of range.

    >>> key(42)
    tensor([ 0, 42])
    """
    if not isinstance(seed, SupportsIndex):
        raise TypeError(f"seed must be an int, got {type(seed).__name__}")
    seed = operator.index(seed)  # accepts NumPy's integers, too
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be in [0, 2**64), got {seed}")
    return torch.tensor([seed >> 32, seed & _WORD], dtype=torch.int64, device=device)


def split(key: Tensor, num: int = 2) -> Tensor:
    """Makes ``num`` new keys, shape ``(num, 2)``. The old key should not be used again.

    Raises:
        TypeError: ``key`` or ``num`` is of the wrong type.
        ValueError: ``key`` has the wrong shape, or ``num`` is negative.

    >>> split(key(42))
    tensor([[1832780943,  270669613],
            [  64467757, 2916123636]])
    """
    return _generate(key, (num,), _pair)


def fold_in(key: Tensor, data: int | Tensor) -> Tensor:
    """Makes a new key from a key and an integer, such as a member's index, a step, or a hash of a layer's name.

    Args:
        key: a key.
        data: an int in ``[0, 2**32)``, or an integer tensor of any shape, which is taken modulo ``2**32``.

    Returns:
        A key for every element of ``data``: int64, shape ``(*data.shape, 2)``; for an int, ``(2,)``.
        Many keys at once cost about as much as one.

    Raises:
        TypeError: ``key`` or ``data`` is of the wrong type.
        ValueError: ``key`` has the wrong shape, or ``data`` is an int out of range.

    >>> fold_in(key(42), 7)
    tensor([2547012911, 1371500959])
    >>> fold_in(key(42), torch.tensor([6, 7]))[1]
    tensor([2547012911, 1371500959])
    """
    _check_key(key)
    if isinstance(data, Tensor):
        if data.is_floating_point() or data.is_complex() or data.dtype == torch.bool:
            raise TypeError(f"data must be an integer tensor, got {data.dtype}")
        count = data.to(torch.int32)
    elif isinstance(data, (int, torch.SymInt)):
        if not 0 <= data <= _WORD:
            raise ValueError(f"data must be in [0, 2**32), got {data}")
        if _is_plain(key):
            k0, k1 = key.tolist()
            # The same result as below, twenty times faster.
            return torch.tensor(_threefry_of_ints(k0, k1, int(data)), device=key.device)
        count = torch.full((), data, dtype=torch.int64, device=key.device).to(torch.int32)
    else:
        raise TypeError(f"data must be an int or an integer tensor, got {type(data).__name__}")
    return _pair(*_threefry(key, count))


def bits(key: Tensor, shape: Sequence[int] = ()) -> Tensor:
    """Draws words of 32 random bits, as int64 values in ``[0, 2**32)``.

    Raises:
        TypeError: ``key`` or ``shape`` is of the wrong type.
        ValueError: ``key`` has the wrong shape, a size is negative, or there are ``2**31`` words or more.

    >>> bits(key(42), (2,))
    tensor([2098992034, 2919706841])
    """
    return _generate(key, shape, lambda high, low: _unsigned(high ^ low))


def uniform(
    key: Tensor,
    shape: Sequence[int] = (),
    dtype: torch.dtype = torch.float32,
    minval: float = 0.0,
    maxval: float = 1.0,
) -> Tensor:
    """Draws from the uniform distribution on ``[minval, maxval)``.

    float32 has 23 random bits and float64 has 52, as in JAX. Other types are rounded float32 draws, so a float16
    or bfloat16 draw is the float32 draw in fewer digits, and rounding can reach ``maxval``. The numbers are
    ``minval + (maxval - minval) * u`` with ``u`` uniform on ``[0, 1)``, rounded twice. A compiler that fuses the
    two steps (JAX's does, Triton may) changes the last digit, unless ``maxval - minval`` is a power of two.

    Args:
        key: a key.
        shape: the shape of the result.
        dtype: a floating-point type.
        minval: lower bound, included.
        maxval: upper bound, excluded except for that rounding; not less than ``minval``.

    Raises:
        TypeError: ``key``, ``shape`` or ``dtype`` is of the wrong type.
        ValueError: as from :func:`bits`, or ``minval > maxval``.

    >>> uniform(key(42), (3,))
    tensor([0.4887, 0.6798, 0.6163])
    """
    if not minval <= maxval:
        raise ValueError(f"minval must not exceed maxval, got {minval} and {maxval}")
    return _floats(key, shape, dtype, minval, maxval, lambda u: u)


def normal(
    key: Tensor,
    shape: Sequence[int] = (),
    dtype: torch.dtype = torch.float32,
    mean: float = 0.0,
    std: float = 1.0,
) -> Tensor:
    """Draws from the normal distribution: ``mean + std * sqrt(2) * erfinv(u)``, ``u`` uniform on ``(-1, 1)``.

    The uniform number is the same everywhere; ``erfinv`` may differ in the last digits between devices and from
    JAX. Values lie within 5.5 standard deviations in float32 (8.3 in float64). For dtypes see :func:`uniform`.

    Args:
        key: a key.
        shape: the shape of the result.
        dtype: a floating-point type.
        mean: the mean.
        std: the standard deviation.

    Raises:
        TypeError: ``key``, ``shape`` or ``dtype`` is of the wrong type.
        ValueError: as from :func:`bits`.

    >>> normal(key(42), (3,))
    tensor([-0.0283,  0.4671,  0.2957])
    """
    scale = math.sqrt(2) * std

    def law(u: Tensor) -> Tensor:
        x = u.erfinv() * scale
        return x + mean if mean else x

    return _floats(key, shape, dtype, -_below_one(dtype), 1.0, law)


def truncated_normal(
    key: Tensor,
    lower: float,
    upper: float,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draws from the standard normal distribution, conditional on ``lower < x < upper``.

    It inverts the distribution function: ``sqrt(2) * erfinv(u)`` with ``u`` uniform between
    ``erf(lower / sqrt(2))`` and ``erf(upper / sqrt(2))``, clipped to the open interval. Bounds may be infinite.
    float32 resolves the tails up to about 5 standard deviations: no draw reaches a bound that lies further out (in
    JAX, one of eight million does). A float16 or bfloat16 draw is rounded, which can move it to the number next to
    a bound, on either side.

    Args:
        key: a key.
        lower, upper: the bounds.
        shape: the shape of the result.
        dtype: a floating-point type.

    Raises:
        TypeError: ``key``, ``shape`` or ``dtype`` is of the wrong type.
        ValueError: as from :func:`bits`; or if ``lower`` is not below ``upper``, or the probability between them is
            too small for ``dtype`` to resolve.

    >>> bool(truncated_normal(key(42), -1.0, 2.0, (1000,)).min() > -1)
    True
    """
    if not lower < upper:
        raise ValueError(f"lower must be below upper, got {lower} and {upper}")
    one = _below_one(dtype)
    low, high = (min(max(math.erf(bound / math.sqrt(2)), -one), one) for bound in (lower, upper))
    if not low < high:
        raise ValueError(f"{dtype} cannot resolve the probability between {lower} and {upper}")
    _check_key(key)
    first = torch.full((), lower, dtype=_drawn(dtype), device=key.device)
    last = torch.full((), upper, dtype=_drawn(dtype), device=key.device)
    first, last = first.nextafter(last), last.nextafter(first)
    return _floats(key, shape, dtype, low, high, lambda u: (u.erfinv() * math.sqrt(2)).clamp(first, last))


def bernoulli(key: Tensor, p: float | Tensor = 0.5, shape: Sequence[int] = ()) -> Tensor:
    """Draws booleans that are True with probability ``p``: ``uniform(key, shape) < p``.

    Args:
        key: a key.
        p: a number in ``[0, 1]``, or a tensor of such numbers that broadcasts to ``shape`` (not checked).
        shape: the shape of the result.

    Raises:
        TypeError: ``key`` or ``shape`` is of the wrong type.
        ValueError: as from :func:`bits`, or ``p`` is a number outside ``[0, 1]``.

    >>> bernoulli(key(42), 0.5, (4,))
    tensor([ True, False, False, False])
    """
    if not isinstance(p, Tensor) and not 0 <= p <= 1:
        raise ValueError(f"p must be in [0, 1], got {p}")
    return uniform(key, shape) < p


def permutation(key: Tensor, n: int) -> Tensor:
    """Draws a permutation of ``0 .. n-1``, int64: the sorting order of ``n`` random words of 64 bits.

    The sort is stable, so the result is the same on every device. It does not equal JAX's permutation.

    Raises:
        TypeError: ``key`` or ``n`` is of the wrong type.
        ValueError: as from :func:`bits`.

    >>> permutation(key(42), 5)
    tensor([2, 4, 3, 1, 0])
    """
    return _generate(key, (n,), _join).argsort(stable=True)


def _threefry(key: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Encrypts the 64-bit counters ``(0, count)`` with Threefry-2x32-20.

    Words are int32 here: addition wraps as for uint32, and only half as many bytes are moved as with int64.
    """
    k0, k1 = key.to(torch.int32).unbind()
    schedule = (k0, k1, k0 ^ k1 ^ _PARITY)
    # This includes the first addition of the loop below.
    high, low = count + (k0 + k1), count + k1
    for i in range(5):
        for j, r in enumerate(_ROTATIONS[i % 2]):
            if i or j:
                high = high + low
            # Rotate low by r bits. The right shift of a signed word copies its sign, hence the mask; adding
            # alpha * low is a left shift and a bitwise or in a single pass.
            low = ((low >> (32 - r)) & ((1 << r) - 1)).add(low, alpha=1 << r) ^ high
        high = high + schedule[(i + 1) % 3]
        low = low + (schedule[(i + 2) % 3] + (i + 1))
    return high, low


def _threefry_in_place(k0: int, k1: int, count: _Words) -> tuple[_Words, _Words]:
    """`_threefry` in NumPy, which has unsigned words and takes at most half of torch's time on a CPU."""
    schedule = (k0, k1, k0 ^ k1 ^ _PARITY)
    high, low = count + np.uint32((k0 + k1) & _WORD), count + np.uint32(k1)
    left = np.empty_like(low)
    for i in range(5):
        for j, r in enumerate(_ROTATIONS[i % 2]):
            if i or j:
                high += low
            by, back = _SHIFTS[r]
            np.left_shift(low, by, left)
            np.right_shift(low, back, low)
            low |= left
            low ^= high
        high += np.uint32(schedule[(i + 1) % 3])
        low += np.uint32((schedule[(i + 2) % 3] + i + 1) & _WORD)
    return high, low


def _threefry_of_ints(k0: int, k1: int, count: int) -> tuple[int, int]:
    """`_threefry` of a single counter, in Python's integers."""
    schedule = (k0, k1, k0 ^ k1 ^ _PARITY)
    high, low = k0, (count + k1) & _WORD
    for i in range(5):
        for r in _ROTATIONS[i % 2]:
            high = (high + low) & _WORD
            low = ((low << r | low >> (32 - r)) & _WORD) ^ high
        high = (high + schedule[(i + 1) % 3]) & _WORD
        low = (low + schedule[(i + 2) % 3] + i + 1) & _WORD
    return high, low


def _generate(key: Tensor, shape: Sequence[int], finish: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Applies ``finish`` to the pairs of words numbered ``0 .. prod(shape) - 1`` and reshapes the result.

    ``finish`` maps two int32 tensors of shape ``(n,)`` to one of shape ``(n, ...)``, element by element.
    """
    _check_key(key)
    if isinstance(shape, int):
        raise TypeError(f"shape must be a sequence of ints, got {shape}")
    for d in shape:
        if not isinstance(d, (int, torch.SymInt)):
            raise TypeError(f"shape must be a sequence of ints, got {tuple(shape)}")
        if d < 0:
            raise ValueError(f"shape must not have negative sizes, got {tuple(shape)}")
    size = math.prod(shape)

    if not torch.compiler.is_compiling() and size >= 1 << 31:  # when compiled, this would bound a dynamic size
        raise ValueError(f"one key draws fewer than 2**31 numbers, got shape {tuple(shape)}; split the key")

    if _is_plain(key):
        k0, k1 = key.tolist()
        parts = [range(start, min(start + _PIECE, size)) for start in range(0, size, _PIECE)] or [range(0)]
        words = (_threefry_in_place(k0, k1, np.arange(part.start, part.stop, dtype=np.uint32)) for part in parts)
        pieces = [finish(*(torch.from_numpy(word.view(np.int32)) for word in pair)) for pair in words]
        flat = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    else:
        # A compiler fuses the steps by itself, and a GPU is faster with few large kernels.
        flat = finish(*_threefry(key, torch.arange(size, dtype=torch.int32, device=key.device)))
    return flat.reshape((*shape, *flat.shape[1:]))


def _is_plain(key: Tensor) -> bool:
    """Whether the key's values can be read, and no tracer or transform needs to record the draw."""
    return (
        not is_transformed(key)
        and type(key) is Tensor
        and key.is_cpu
        and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is None
    )


def _floats(
    key: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    minval: float,
    maxval: float,
    law: Callable[[Tensor], Tensor],
) -> Tensor:
    """Applies ``law`` to uniform numbers of ``[minval, maxval)``, piece by piece, and casts to ``dtype``."""
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating type, got {dtype}")
    _check_key(key)
    drawn = _drawn(dtype)
    low = torch.full((), minval, dtype=drawn, device=key.device)
    span = torch.full((), maxval, dtype=drawn, device=key.device) - low

    def finish(high_word: Tensor, low_word: Tensor) -> Tensor:
        # JAX puts the top bits of a word into the mantissa of a number in [1, 2) and subtracts 1. The same
        # bits, taken as an integer and scaled by a power of two, give the same number in fewer steps.
        if drawn == torch.float64:
            unit, mantissa = 2.0**-52, (_join(high_word, low_word) >> 12) & ((1 << 52) - 1)
        else:
            unit, mantissa = 2.0**-23, ((high_word ^ low_word) >> 9) & ((1 << 23) - 1)
        u = mantissa.to(drawn) * (span * unit)
        return law(u + low if minval else u).to(dtype)

    return _generate(key, shape, finish)


def _drawn(dtype: torch.dtype) -> torch.dtype:
    """The type in which numbers are drawn before they are rounded to ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _below_one(dtype: torch.dtype) -> float:
    """The largest number below 1 of the drawn type; ``erfinv`` is finite there."""
    return 1 - torch.finfo(_drawn(dtype)).eps / 2


def _pair(high: Tensor, low: Tensor) -> Tensor:
    """Two words as a key, shape ``(..., 2)``."""
    return torch.stack([_unsigned(high), _unsigned(low)], dim=-1)


def _unsigned(word: Tensor) -> Tensor:
    """int32 bits as an int64 value in ``[0, 2**32)``."""
    return word.to(torch.int64) & _WORD


def _join(high: Tensor, low: Tensor) -> Tensor:
    """Two words as the 64 bits of one int64."""
    return (high.to(torch.int64) << 32) | _unsigned(low)


def _check_key(key: Tensor) -> None:
    if not isinstance(key, Tensor):
        raise TypeError(f"key must be a tensor made by purecnn.random.key, got {type(key).__name__}")
    if key.dtype != torch.int64:
        raise TypeError(f"key must be an int64 tensor made by purecnn.random.key, got {key.dtype}")
    if key.shape != (2,):
        raise ValueError(f"key must have shape (2,), got {tuple(key.shape)}; map over several keys with vmap")
