"""Convolution that is fast under ``vmap``, too: over weights, as in ensembles, and for per-sample gradients.

Torch turns the convolutions of an ensemble's members into one convolution with a group for each member, and does the
same with their derivatives and with per-sample gradients of the weight. This is usually fast, with three exceptions.
Images of one pixel form a matrix, so their convolution is computed as a matrix product. If torch has no fast kernel for
the groups, members are convolved one after the other. The gradients of large weights from few pixels are computed as a
matrix product, too. See ``docs/ensembles.md`` and ``docs/per_sample.md`` for figures.
"""

import functools
import math
import operator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch._C import _functorch
from torch.nn.grad import conv2d_input, conv2d_weight

from purecnn.eager import derivatives

__all__ = ["conv2d"]

MANY_PIXELS = 1 << 16
"""If one member's input or output has at least this many elements, a separate convolution for each member pays off."""

LARGE_WEIGHT = 1 << 16
"""If a weight has at least this many elements, a separate method for its gradients from few pixels pays off."""


class Geometry(NamedTuple):
    """What a convolution and its derivatives need to know in addition to their operands."""

    stride: int
    padding: tuple[int, int]
    dilation: int
    groups: int
    image: tuple[int, int]
    """Height and width of the input, pixels."""
    kernel: tuple[int, int]
    """Height and width of the kernel, pixels."""
    channels: int
    """Channels of the input."""


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: tuple[int, int],
    groups: int,
    dilation: int = 1,
) -> Tensor:
    """``torch.conv2d``, but under ``vmap`` the fastest of several methods that compute the same.

    Args:
        x: images, ``(b, c, h, w)``.
        weight: ``(features, c / groups, *kernel)``.
        bias: ``(features,)``, or None.
        stride: step of the kernel, pixels.
        padding: zeros on each side of the height and of the width, pixels.
        groups: channels are convolved in this many separate groups.
        dilation: step from one of the kernel's weights to the next, pixels.

    >>> x, weights = torch.ones(1, 1, 4, 4), torch.ones(5, 2, 1, 3, 3)
    >>> torch.func.vmap(lambda weight: conv2d(x, weight, None, 1, (0, 0), 1))(weights).shape
    torch.Size([5, 1, 2, 2, 2])
    """
    # Compiled code cannot find out whether vmap is active, and the compiler chooses its own kernels.
    if torch.compiler.is_compiling() or not (_is_mapped(weight) or (weight.requires_grad and _is_mapped(x))):
        return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)
    if derivatives().forward > 1:  # torch cannot differentiate a Function's jvp in forward mode: it returns zero
        return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)
    height, width, rows, columns = *x.shape[-2:], *weight.shape[-2:]
    geometry = Geometry(stride, padding, dilation, groups, (height, width), (rows, columns), x.shape[1])
    if not _is_mapped(weight):
        if not x.is_cpu or weight.numel() < LARGE_WEIGHT or not _few_pixels(len(x), len(weight), geometry):
            return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)
        result: Tensor = _Product.apply(x, weight, None, bias, geometry)
        return result
    if groups == 1 and geometry.image == geometry.kernel == (1, 1) and padding == (0, 0):
        return F.linear(x[..., 0, 0], weight[..., 0, 0], bias)[..., None, None]
    # For images that all members share, torch already runs one convolution with many output channels.
    if not _is_mapped(x) or not x.is_cpu or not _one_by_one(x.shape, weight.shape, geometry):
        return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)
    result = _Product.apply(x, weight, None, bias, geometry)
    return result


def _output(geometry: Geometry) -> int:
    """The number of output pixels of one image."""
    sides = zip(geometry.image, geometry.padding, geometry.kernel, strict=True)
    reach = ((n + 2 * pad, geometry.dilation * (k - 1) + 1) for n, pad, k in sides)
    return math.prod((n - k) // geometry.stride + 1 for n, k in reach)


def _few_pixels(batch: int, features: int, geometry: Geometry) -> bool:
    """Whether a matrix product suits the weight's gradient: the matrix of patches is no larger than the gradient."""
    return geometry.groups == 1 and batch * _output(geometry) <= features


def _one_by_one(x: torch.Size, weight: torch.Size, geometry: Geometry) -> bool:
    """Whether to convolve members one after the other; the shapes are those of one member.

    On a CPU torch has no fast kernel for groups whose channels are not a multiple of eight, the numbers in a register.
    This method costs about a millisecond of Python, for the convolution and for each of its derivatives.
    """
    batch, features = x[0], weight[0]
    output = batch * features * _output(geometry)
    odd = geometry.channels % 8 > 0 or features % 8 > 0
    return odd and geometry.groups == 1 and max(x.numel(), output) >= MANY_PIXELS


def _is_mapped(tensor: Tensor) -> bool:
    """Whether a ``vmap`` maps over the tensor."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            return True
        tensor = _functorch.get_unwrapped(tensor)
    return False


def _product(x: Any, weight: Any, signal: Any, bias: Any, geometry: Geometry) -> Tensor:
    """Compute whichever of the three is None, see `_Product`; without a signal, this is the convolution."""
    stride, padding, dilation, groups, image, kernel, channels = geometry
    if signal is None:
        return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)
    if x is None:
        shape = [len(signal), channels, *image]
        return conv2d_input(shape, weight, signal, stride, padding, dilation, groups)  # type: ignore[no-untyped-call]
    shape = [signal.shape[1], channels // groups, *kernel]
    return conv2d_weight(x, shape, signal, stride, padding, dilation, groups)  # type: ignore[no-untyped-call]


def _weights(x: Tensor, signal: Tensor, geometry: Geometry) -> Tensor:
    """The gradients of the members' weights, by matrix products: (members, features, channels, *kernel)."""
    stride, padding, dilation, *_ = geometry
    patches = F.unfold(x.flatten(0, 1), geometry.kernel, dilation, padding, stride)
    patches = rearrange(patches, "(m b) weight pixels -> m weight (b pixels)", m=len(x))
    signals = rearrange(signal, "m b features h w -> m features (b h w)")
    rows, columns = geometry.kernel
    return rearrange(signals @ patches.mT, "m features (c h w) -> m features c h w", h=rows, w=columns)


class _Product(torch.autograd.Function):
    """The gradient of ``sum(signal * conv2d(x, weight))`` with respect to the one of the three that is None.

    The sum is linear in each of the three. Without a signal, the gradient is the convolution itself, plus a bias if
    there is one. The derivative of each such product with respect to an operand is another such product, so this one
    function has derivatives of all orders.
    """

    @staticmethod
    def forward(x: Any, weight: Any, signal: Any, bias: Any, geometry: Geometry) -> Tensor:
        return _product(x, weight, signal, bias, geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, weight, signal, _, ctx.geometry = inputs
        ctx.shape = output.shape
        ctx.save_for_backward(x, weight, signal)
        ctx.save_for_forward(x, weight, signal)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
        (cotangent,) = cotangents
        operands = [cotangent if operand is None else operand for operand in ctx.saved_tensors]
        grads: list[Any] = [None] * 5
        for i, operand in enumerate(ctx.saved_tensors):
            if operand is not None and ctx.needs_input_grad[i]:
                grads[i] = _Product.apply(*operands[:i], None, *operands[i + 1 :], None, ctx.geometry)
        if ctx.needs_input_grad[3]:
            grads[3] = cotangent.sum((0, 2, 3))
        return tuple(grads)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        operands = ctx.saved_tensors
        *directions, bias, _ = tangents
        terms = [
            _Product.apply(*operands[:i], direction, *operands[i + 1 :], None, ctx.geometry)
            for i, direction in enumerate(directions)
            if direction is not None
        ]
        if bias is not None:
            terms.append(bias[:, None, None].expand(ctx.shape))
        return functools.reduce(operator.add, terms)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
        *operands, geometry = inputs
        dims = in_dims[:-1]
        x, weight, signal, _ = operands
        if weight is None and dims[0] is not None and dims[2] is not None:
            x, signal = x.movedim(dims[0], 0), signal.movedim(dims[2], 0)
            if x.is_cpu and _few_pixels(x.shape[1], signal.shape[2], geometry):
                return _weights(x, signal, geometry), 0
        # For a single member, the gradient of images with few channels is just as slow, and in the weights' gradient
        # the threads that sum it wait for each other.
        slow_alone = operands[1] is None or (operands[0] is None and geometry.channels < 4)
        if slow_alone or sum(dim is not None for dim in dims[:3]) < 2:
            run = torch.vmap(lambda x, weight, signal, bias: _product(x, weight, signal, bias, geometry), dims)
            return run(*operands), 0
        columns = [
            [operand] * info.batch_size if dim is None else operand.unbind(dim)
            for operand, dim in zip(operands, dims, strict=True)
        ]
        return torch.stack([_Product.apply(*own, geometry) for own in zip(*columns, strict=True)]), 0
