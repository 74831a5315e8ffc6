"""Initializers: functions that draw the initial values of parameters.

An initializer maps a key and a shape to a tensor: ``init(key, shape, dtype=torch.float32)``. It is pure, so it can be
mapped over a batch of keys. Shapes are torch's: ``(out, in / groups, height, width)`` for a convolution and
``(out, in)`` for a linear layer; :func:`fans` counts the connections of a unit in both.
"""

import math
from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from purecnn import random

__all__ = [
    "Initializer",
    "constant",
    "fan_in_uniform",
    "fans",
    "kaiming_normal",
    "kaiming_uniform",
    "lecun_normal",
    "normal",
    "ones",
    "truncated_normal",
    "uniform",
    "variance_scaling",
    "xavier_normal",
    "xavier_uniform",
    "zeros",
]

Mode = Literal["fan_in", "fan_out", "fan_avg"]
Distribution = Literal["normal", "uniform", "truncated_normal"]

# The standard deviation of a standard normal variable, conditional on lying in (-2, 2).
_TRUNCATED_STD = 0.87962566103423978


class Initializer(Protocol):
    """A function from a key and a shape to a tensor on the key's device."""

    def __call__(self, key: Tensor, shape: tuple[int, ...], /, dtype: torch.dtype = torch.float32) -> Tensor: ...


def fans(shape: Sequence[int]) -> tuple[int, int]:
    """The numbers of inputs and outputs of a unit, (fan-in, fan-out), for a weight of this shape.

    ``fan_in = shape[1] * prod(shape[2:])`` and ``fan_out = shape[0] * prod(shape[2:])``, as torch.nn.init counts them.
    So the fan-out of a grouped convolution is that of all its groups together.

    Raises:
        ValueError: if the shape has fewer than two dimensions.

    >>> fans((64, 3, 7, 7))
    (147, 3136)
    """
    if len(shape) < 2:
        raise ValueError(f"fan-in and fan-out need a weight of two or more dimensions, got shape {tuple(shape)}")
    area = math.prod(shape[2:])
    return shape[1] * area, shape[0] * area


def constant(value: float) -> Initializer:
    """Every element is ``value``.

    >>> constant(0.5)(random.key(0), (3,))
    tensor([0.5000, 0.5000, 0.5000])
    """

    def init(key: Tensor, shape: tuple[int, ...], /, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full(shape, value, dtype=dtype, device=key.device)

    return init


zeros: Initializer = constant(0.0)
"""Every element is 0."""
ones: Initializer = constant(1.0)
"""Every element is 1."""


def normal(std: float, mean: float = 0.0) -> Initializer:
    """The normal distribution ``N(mean, std**2)``.

    Raises:
        ValueError: unless ``std`` is positive.

    >>> normal(0.01)(random.key(0), (2, 3)).shape
    torch.Size([2, 3])
    """
    _check_std(std)

    def init(key: Tensor, shape: tuple[int, ...], /, dtype: torch.dtype = torch.float32) -> Tensor:
        return random.normal(key, shape, dtype, mean, std)

    return init


def uniform(low: float, high: float) -> Initializer:
    """The uniform distribution on ``[low, high)``.

    Raises:
        ValueError: if ``low`` exceeds ``high``.
    """
    if not low <= high:
        raise ValueError(f"low must not exceed high, got {low} and {high}")

    def init(key: Tensor, shape: tuple[int, ...], /, dtype: torch.dtype = torch.float32) -> Tensor:
        return random.uniform(key, shape, dtype, low, high)

    return init


def truncated_normal(std: float, mean: float = 0.0, lower: float = -2.0, upper: float = 2.0) -> Initializer:
    """The normal distribution ``N(mean, std**2)``, conditional on ``lower <= x <= upper``.

    The bounds are values, not multiples of ``std``, as in ``torch.nn.init.trunc_normal_(std=std, a=lower, b=upper)``:
    with a small ``std`` the default bounds cut nothing off. torchvision's GoogLeNet uses ``truncated_normal(0.01)``.
    To cut at two standard deviations, use ``truncated_normal(std, lower=-2 * std, upper=2 * std)``.

    Raises:
        ValueError: unless ``std`` is positive and ``lower < upper``.
    """
    _check_std(std)
    if not lower < upper:
        raise ValueError(f"lower must be below upper, got {lower} and {upper}")

    def init(key: Tensor, shape: tuple[int, ...], /, dtype: torch.dtype = torch.float32) -> Tensor:
        drawn = torch.promote_types(dtype, torch.float32)  # so that scaling does not round twice
        x = random.truncated_normal(key, (lower - mean) / std, (upper - mean) / std, shape, drawn)
        # Rounding may exceed a bound, and the type may be unable to represent a bound.
        return (x * std + mean).to(dtype).clamp(-_below(-lower, dtype), _below(upper, dtype))

    return init


def variance_scaling(scale: float, mode: Mode, distribution: Distribution) -> Initializer:
    r"""A distribution of mean 0 and variance ``scale / fan``, which keeps the size of activations or gradients.

    With :math:`\sigma^2 = \mathrm{scale} / n`, where ``n`` is the fan-in, the fan-out or their mean:
    ``normal`` is :math:`N(0, \sigma^2)`; ``uniform`` is :math:`U(-\sqrt 3 \sigma, \sqrt 3 \sigma)`;
    ``truncated_normal`` is a normal distribution cut at two of its standard deviations, then rescaled to the
    standard deviation :math:`\sigma`.

    The distributions are those of ``jax.nn.initializers.variance_scaling``.

    Args:
        scale: the variance times ``n``.
        mode: what ``n`` is: ``"fan_in"``, ``"fan_out"`` or ``"fan_avg"``.
        distribution: ``"normal"``, ``"uniform"`` or ``"truncated_normal"``.

    Raises:
        ValueError: unless ``scale`` is positive and the other two are among those above; when the initializer is
            called, as from `fans`.

    >>> w = variance_scaling(1.0, "fan_in", "uniform")(random.key(0), (64, 300))
    >>> bool(w.abs().max() <= 0.1)
    True
    """
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    if mode not in ("fan_in", "fan_out", "fan_avg"):
        raise ValueError(f"mode must be 'fan_in', 'fan_out' or 'fan_avg', got {mode!r}")
    if distribution not in ("normal", "uniform", "truncated_normal"):
        raise ValueError(f"distribution must be 'normal', 'uniform' or 'truncated_normal', got {distribution!r}")

    def init(key: Tensor, shape: tuple[int, ...], /, dtype: torch.dtype = torch.float32) -> Tensor:
        fan_in, fan_out = fans(shape)
        fan = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}[mode]
        std = math.sqrt(scale / max(fan, 1))  # the fan of an empty weight may be 0
        if distribution == "uniform":
            bound = math.sqrt(3) * std
            return random.uniform(key, shape, dtype, -bound, bound)
        if distribution == "normal":
            return random.normal(key, shape, dtype, std=std)
        drawn = torch.promote_types(dtype, torch.float32)  # so that scaling does not round twice
        return (random.truncated_normal(key, -2.0, 2.0, shape, drawn) * (std / _TRUNCATED_STD)).to(dtype)

    return init


def kaiming_normal(mode: Mode = "fan_out") -> Initializer:
    """He's normal initialisation for layers before a ReLU: variance ``2 / fan``.

    ``"fan_out"`` keeps the size of the gradients (torchvision's ResNet, VGG, MobileNet, EfficientNet), ``"fan_in"``
    that of the activations (DenseNet).

    Raises:
        ValueError: as from `variance_scaling`.

    References:
        He, Zhang, Ren, Sun. Delving Deep into Rectifiers. arXiv:1502.01852
    """
    return variance_scaling(2.0, mode, "normal")


def kaiming_uniform(mode: Mode = "fan_out") -> Initializer:
    """He's uniform initialisation for layers before a ReLU: ``U(-b, b)`` with ``b = sqrt(6 / fan)``.

    Raises:
        ValueError: as from `variance_scaling`.

    References:
        He, Zhang, Ren, Sun. Delving Deep into Rectifiers. arXiv:1502.01852
    """
    return variance_scaling(2.0, mode, "uniform")


def lecun_normal() -> Initializer:
    """LeCun's initialisation: variance ``1 / fan_in``, normal and cut at two standard deviations, as in JAX and Flax.

    References:
        LeCun, Bottou, Orr, Müller. Efficient BackProp. 1998
        Klambauer, Unterthiner, Mayr, Hochreiter. Self-Normalizing Neural Networks. arXiv:1706.02515
    """
    return variance_scaling(1.0, "fan_in", "truncated_normal")


def xavier_uniform() -> Initializer:
    """Glorot's uniform initialisation: ``U(-b, b)`` with ``b = sqrt(6 / (fan_in + fan_out))``.

    References:
        Glorot, Bengio. Understanding the difficulty of training deep feedforward neural networks. AISTATS 2010
    """
    return variance_scaling(1.0, "fan_avg", "uniform")


def xavier_normal() -> Initializer:
    """Glorot's normal initialisation: variance ``2 / (fan_in + fan_out)``.

    References:
        Glorot, Bengio. Understanding the difficulty of training deep feedforward neural networks. AISTATS 2010
    """
    return variance_scaling(1.0, "fan_avg", "normal")


def fan_in_uniform(fan_in: int | None = None) -> Initializer:
    """The default of ``torch.nn.Conv2d`` and ``torch.nn.Linear``: ``U(-b, b)`` with ``b = 1 / sqrt(fan_in)``.

    In torch it is ``kaiming_uniform_(weight, a=sqrt(5))``. A bias has the same bound as its weight, which cannot be
    found from the shape of the bias.

    Args:
        fan_in: the fan-in of the layer; None computes it from the shape, which must then be that of a weight.

    Raises:
        ValueError: if ``fan_in`` is less than 1.

    >>> weight = fan_in_uniform()(random.key(0), (64, 16, 3, 3))
    >>> bias = fan_in_uniform(fan_in=16 * 3 * 3)(random.key(1), (64,))
    >>> bool(bias.abs().max() <= 1 / 12)
    True
    """
    if fan_in is not None and fan_in < 1:
        raise ValueError(f"fan_in must be positive, got {fan_in}")

    def init(key: Tensor, shape: tuple[int, ...], /, dtype: torch.dtype = torch.float32) -> Tensor:
        bound = 1 / math.sqrt(max(fans(shape)[0], 1) if fan_in is None else fan_in)
        return random.uniform(key, shape, dtype, -bound, bound)

    return init


def _below(bound: float, dtype: torch.dtype) -> float:
    """The largest number of a type that is at most ``bound``; for a bound out of its range, the number at the end."""
    info = torch.finfo(dtype)
    if abs(bound) > info.max:
        return math.copysign(info.max, bound)
    unit = max(math.ldexp(info.eps, math.frexp(bound)[1] - 1), info.smallest_normal * info.eps)
    return math.floor(bound / unit) * unit


def _check_std(std: float) -> None:
    if not std > 0:
        raise ValueError(f"std must be positive, got {std}")
