"""Batch normalisation under ``torch.func``: correct in derivatives of all orders, and in one pass for many members.

Torch's own third derivatives are wrong, and so are its derivatives of forward derivatives and its Hessians: they treat
the batch's mean and variance as constants (https://github.com/pytorch/pytorch/issues/186256 and 196699). So if
derivatives are nested, the formula is written out. Torch's ``vmap`` rule is correct, but it normalises, multiplies and
adds in separate passes, and recomputes the normalised images in the backward pass. If images are large, a CPU is faster
with the members' channels side by side in one tensor (``docs/ensembles.md``).
"""

from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor
from torch._C import _functorch

from purecnn.eager import derivatives

__all__ = ["batch_normalize"]

MANY = 1 << 19
"""If all members' images together have at least this many elements, fewer passes are worth 1.4 ms of Python."""


def batch_normalize(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise by the batch's own statistics; for use under ``torch.func``.

    Args:
        x: images ``(b, c, h, w)``, or vectors ``(b, c)``.
        weight, bias: ``(c,)``.
        eps: keeps the division finite.

    Returns:
        The normalised images; and the mean and ``1 / sqrt(variance + eps)`` of each channel, constants for derivatives.
    """
    images = x if x.ndim == 4 else x[..., None, None]
    # The compiler fuses passes by itself, and only supports torch's own rules. A forward derivative needs a jvp, which
    # _Normalize does not have.
    plain = torch.compiler.is_compiling() or derivatives().forward or not x.is_cpu or _size(x) < MANY
    if derivatives().nested:
        normal, deviation = _normal(images, eps)
        y, mean, inverse = _broad(weight) * normal + _broad(bias), images.mean((0, 2, 3)), deviation.flatten()
    elif plain:
        y, mean, inverse = torch.ops.aten._native_batch_norm_legit.no_stats(images, weight, bias, True, 0.0, eps)
    else:
        y, mean, inverse = _Normalize.apply(images, weight, bias, eps)
    return y.reshape(x.shape), mean, inverse


def _size(x: Tensor) -> int:
    """The number of elements of all members together."""
    while _functorch.is_functorch_wrapped_tensor(x):
        x = _functorch.get_unwrapped(x)
    return x.numel()


def _broad(channels: Tensor) -> Tensor:
    return channels[:, None, None]


def _mean(x: Tensor) -> Tensor:
    return _broad(reduce(x, "b c h w -> c", "mean"))


def _normal(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Images with mean 0 and variance 1, and the inverse deviation they were multiplied by, both differentiable."""
    centred = x - _mean(x)
    inverse = (_mean(centred.square()) + eps).rsqrt()
    return centred * inverse, inverse


def _moved(normal: Tensor, inverse: Tensor, direction: Tensor) -> Tensor:
    """The derivative of the normalised images in a direction of the images; this linear map is its own adjoint."""
    return inverse * (direction - _mean(direction) - normal * _mean(normal * direction))


def _side_by_side(batch_size: int, dims: tuple[int | None, ...], tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """All members' channels in one tensor: images as ``(b, members * c, h, w)``, vectors as ``(members * c,)``."""
    folded = []
    for dim, tensor in zip(dims, tensors, strict=True):
        axis = 0 if tensor.ndim - (dim is not None) == 1 else 1
        if dim is None:
            shape = [*tensor.shape[:axis], batch_size, *tensor.shape[axis:]]
            tensor = tensor.unsqueeze(axis).expand(shape)
        else:
            tensor = tensor.movedim(dim, axis)
        folded.append(tensor.flatten(axis, axis + 1))
    return folded


def _apart(members: int, tensors: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The outputs with a separate axis of members, and the position of that axis in each."""
    patterns = ("(m c) -> m c" if tensor.ndim == 1 else "b (m c) h w -> b m c h w" for tensor in tensors)
    apart = tuple(rearrange(tensor, pattern, m=members) for tensor, pattern in zip(tensors, patterns, strict=True))
    return apart, tuple(0 if tensor.ndim == 1 else 1 for tensor in tensors)


class _Normalize(torch.autograd.Function):
    """Returns ``weight * normal(x) + bias``, the mean and the inverse deviation."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, inverse = torch.ops.aten._native_batch_norm_legit.no_stats(x, weight, bias, True, 0.0, eps)
        return y, mean, inverse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, _, ctx.eps = inputs
        _, mean, inverse = output
        ctx.mark_non_differentiable(mean, inverse)
        ctx.save_for_backward(x, weight, mean, inverse)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
        return *_Gradients.apply(cotangents[0], *ctx.saved_tensors, ctx.eps), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
        *tensors, eps = inputs
        folded = _side_by_side(info.batch_size, in_dims[:-1], tuple(tensors))
        return _apart(info.batch_size, _Normalize.apply(*folded, eps))


class _Gradients(torch.autograd.Function):
    """The gradients of images, weight and bias from ``g``, the gradient of the output.

    ``(weight * inverse * (g - mean(g) - normal * mean(g * normal)), sum(g * normal), sum(g))``. Mean and inverse
    deviation are passed in to save computing them again; derivatives still treat them as functions of ``x``.
    """

    @staticmethod
    def forward(
        g: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        of_x, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            g, x, weight, None, None, mean, inverse, True, eps, [True, True, True]
        )
        return of_x, of_weight, of_bias

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        g, x, weight, _, _, ctx.eps = inputs
        ctx.save_for_backward(g, x, weight)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
        g, x, weight = ctx.saved_tensors
        u, of_weight, of_bias = cotangents
        normal, inverse = _normal(x, ctx.eps)
        weight, of_weight, of_bias = map(_broad, (weight, of_weight, of_bias))
        # Derivatives of the scalar product of cotangents and gradients, by g, by weight, and by x through both normal
        # and inverse.
        by_inverse = _mean(u * g) - _mean(u) * _mean(g) - _mean(u * normal) * _mean(g * normal)
        by_normal = of_weight * g - weight * inverse * (_mean(g * normal) * u + _mean(u * normal) * g)
        by_g = weight * _moved(normal, inverse, u) + of_weight * normal + of_bias
        by_x = _moved(normal, inverse, by_normal) - inverse.square() * weight * by_inverse * normal
        by_weight = (inverse * by_inverse).flatten() * (x.numel() // x.shape[1])
        return by_g, by_x, by_weight, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
        *tensors, eps = inputs
        folded = _side_by_side(info.batch_size, in_dims[:-1], tuple(tensors))
        return _apart(info.batch_size, _Gradients.apply(*folded, eps))
