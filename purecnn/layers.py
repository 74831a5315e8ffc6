"""Layers: the building blocks that the combinators of `purecnn.layer` compose.

Images are ``(batch, channels, height, width)``. Parameters are called ``weight`` and ``bias``, in the layouts
of torch; running statistics are ``mean``, ``var`` and ``count``.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

from purecnn import distributed, initializers
from purecnn.convolution import conv2d
from purecnn.eager import derivatives, is_mapped, is_mapped_or_nested, is_transformed
from purecnn.initializers import Initializer
from purecnn.layer import DRAW, Apply, Layer, Mode, multiply, serial
from purecnn.normalization import batch_normalize
from purecnn.tree import Tree


class Leaf(NamedTuple):
    """A tensor to create: its shape, and the distribution to draw it from or the number to fill it with."""

    shape: tuple[int, ...]
    fill: Initializer | float
    dtype: torch.dtype = torch.float32
    """The type of a tensor that is filled. One that is drawn is float32, whatever torch's default type is."""

    def draw(self, name: str, mode: Mode) -> Tensor:
        """Create the tensor, on the key's device; without a key, a meta tensor."""
        inner, fill = mode.enter(name), self.fill
        if mode.law is not None and (chosen := mode.law(inner.path, self.shape)) is not None:
            fill = chosen
        if callable(fill) and mode.key is not None:
            return fill(inner.draw_key(), self.shape)
        value = 0.0 if callable(fill) else fill
        return torch.full(self.shape, value, dtype=self.dtype, device="meta" if mode.key is None else mode.key.device)


# An alias, because the compiler cannot subscript types in nested functions.
_Trees: TypeAlias = list[Tree]

Leaves = tuple[dict[str, Leaf], dict[str, Leaf]]
"""The parameters and the statistics of one layer, by name."""


class Convolution(NamedTuple):
    """The `Layer.kind` of a convolution."""

    stride: int
    padding: tuple[int, int]
    groups: int
    dilation: int = 1


class Linear(NamedTuple):
    """The `Layer.kind` of an affine map along the last axis."""


class Normalization(NamedTuple):
    """The `Layer.kind` of ``weight * f(x) + bias`` with one weight and one bias for each channel."""

    axis: int
    """The axis of the channels."""


def parametric(
    leaves: Callable[[Any], Leaves], apply: Apply, *names: str, keeps_shape: bool = False, kind: Any = None
) -> Layer:
    """Make a layer that has its own tensors.

    Args:
        leaves: maps the (meta) input to the layer's parameters and statistics.
        apply: the function for `Layer.apply`; it is run on meta tensors to find the shape of the output.
        names: the names of all its parameters and statistics.
        keeps_shape: the output has the input's shape, so nothing needs to be run to find it.
        kind: see `Layer.kind`.

    Raises:
        ValueError: from `Layer.init`, if ``leaves`` returns other names than ``names``.
        TypeError: from `Layer.init`, if ``apply`` does not return a pair.
    """

    def init(x: Any, mode: Mode) -> tuple[Tree, Tree, Any]:
        found = leaves(x)
        if (made := {*found[0], *found[1]}) != set(names):
            raise ValueError(f"a layer declares the tensors {sorted(names)}, but makes {sorted(made)}")

        def draw(mode: Mode) -> _Trees:
            # A law applies to the parameters, not to the statistics.
            modes = mode, mode._replace(law=None)
            return [
                {name: leaf.draw(name, own) for name, leaf in part.items()}
                for part, own in zip(found, modes, strict=True)
            ]

        if keeps_shape:
            return *draw(mode), x
        abstract = mode._replace(key=None, law=None)
        params, state = draw(abstract)
        after = apply(params, state, x, abstract)
        if not isinstance(after, tuple) or len(after) != 2:
            raise TypeError(f"a layer's apply must return (output, state), found {type(after).__name__}")
        y = after[0]
        if mode.key is not None:
            params, state = draw(mode)
        return params, state, y

    own = Layer(init, apply, frozenset(names), kind)

    def run(params: Tree, state: Tree, x: Any, mode: Mode) -> tuple[Any, Tree]:
        if mode.around is None:
            return apply(params, state, x, mode)
        # Layers inside this one are not passed to ``around``.
        return mode.around(own, params, state, x, mode._replace(around=None))

    return Layer(init, run, frozenset(names), kind)


def stateless(function: Callable[[Any], Any], *, keeps_shape: bool = False) -> Layer:
    """Make a layer without parameters from a function of its input.

    Args:
        function: maps the input to the output.
        keeps_shape: the output has the input's shape and type, so nothing needs to be run to find them.

    >>> double = stateless(lambda x: 2 * x)
    >>> double.apply({}, {}, torch.ones(1), Mode())[0]
    tensor([2.])
    """

    def init(x: Any, mode: Mode) -> tuple[Tree, Tree, Any]:
        return {}, {}, x if keeps_shape else function(x)

    def apply(params: Tree, state: Tree, x: Any, mode: Mode) -> tuple[Any, Tree]:
        return function(x), state

    return Layer(init, apply)


identity = stateless(lambda x: x)
"""Returns its input: ``f(x) = x``."""
relu = stateless(torch.relu, keeps_shape=True)
"""``max(x, 0)`` (Nair and Hinton 2010)."""
relu6 = stateless(F.relu6, keeps_shape=True)
"""``min(max(x, 0), 6)`` (Krizhevsky 2010, Convolutional deep belief networks on CIFAR-10)."""
sigmoid = stateless(torch.sigmoid, keeps_shape=True)
"""``1 / (1 + exp(-x))``."""
silu = stateless(F.silu, keeps_shape=True)
"""``x * sigmoid(x)`` (Elfwing et al. 2017, arXiv:1702.03118), also called swish."""
gelu = stateless(F.gelu, keeps_shape=True)
"""``x * Phi(x)``, exact, with the normal distribution's ``Phi`` (Hendrycks and Gimpel 2016, arXiv:1606.08415)."""
hardswish = stateless(F.hardswish, keeps_shape=True)
"""``x * relu6(x + 3) / 6`` (Howard et al. 2019, arXiv:1905.02244, section 5.2)."""


def _bias(bias: bool, features: int, fan_in: int, init: Initializer | float | None) -> dict[str, Leaf]:
    if not bias:
        return {}
    return {"bias": Leaf((features,), initializers.fan_in_uniform(fan_in) if init is None else init)}


Pair: TypeAlias = int | tuple[int, int]
"""One number for both height and width, or one for each."""


def _pair(value: Pair) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def conv(
    features: int,
    kernel: Pair,
    stride: int = 1,
    padding: Pair | None = None,
    *,
    groups: int = 1,
    dilation: int = 1,
    bias: bool = False,
    init: Initializer | float | None = None,
    bias_init: Initializer | float | None = None,
) -> Layer:
    """Two-dimensional convolution, ``(b, c, h, w) -> (b, features, h', w')``.

    Args:
        features: output channels.
        kernel: height and width of the kernel, pixels.
        stride: step of the kernel, pixels.
        padding: zeros on each side, pixels; by default ``dilation * (kernel - 1) // 2``, which at stride 1 keeps the
            size of an image, except for an even kernel with an odd dilation: then it is one pixel smaller.
        groups: channels are convolved in this many separate groups.
        dilation: step from one of the kernel's weights to the next, pixels.
        bias: add a learned number to each output channel.
        init: how to draw the weight ``(features, c / groups, *kernel)``; by default uniform on
            ``+-1 / sqrt(fan_in)``.
        bias_init: how to draw the bias ``(features,)``; the default is the same.

    Raises:
        ValueError: if ``dilation`` is below 1.
    """
    if dilation < 1:
        raise ValueError(f"the dilation of a convolution is at least 1, found {dilation}")
    height, width = _pair(kernel)
    pad = _pair((dilation * (height - 1) // 2, dilation * (width - 1) // 2) if padding is None else padding)
    draw = initializers.fan_in_uniform() if init is None else init

    def leaves(x: Tensor) -> Leaves:
        fan_in = x.shape[1] // groups * height * width
        weight = Leaf((features, x.shape[1] // groups, height, width), draw)
        return {"weight": weight, **_bias(bias, features, fan_in, bias_init)}, {}

    def apply(params: Tree, state: Tree, x: Tensor, mode: Mode) -> tuple[Tensor, Tree]:
        return conv2d(x, params["weight"], params.get("bias"), stride, pad, groups, dilation), state

    kind = Convolution(stride, pad, groups, dilation)
    return parametric(leaves, apply, "weight", *(["bias"] if bias else []), kind=kind)


def linear(
    features: int,
    *,
    bias: bool = True,
    init: Initializer | float | None = None,
    bias_init: Initializer | float | None = None,
) -> Layer:
    """Affine map along the last axis, ``(b, ..., c) -> (b, ..., features)``.

    Args:
        features: number of outputs.
        bias: add a learned number to each output.
        init: how to draw the weight ``(features, c)``; by default uniform on ``+-1 / sqrt(c)``.
        bias_init: how to draw the bias ``(features,)``; the default is the same.
    """
    draw = initializers.fan_in_uniform() if init is None else init

    def leaves(x: Tensor) -> Leaves:
        inputs = x.shape[-1]
        return {"weight": Leaf((features, inputs), draw), **_bias(bias, features, inputs, bias_init)}, {}

    def apply(params: Tree, state: Tree, x: Tensor, mode: Mode) -> tuple[Tensor, Tree]:
        # One matrix: for a batch of matrices torch sums in another order under torch.func than without it.
        rows = x.flatten(0, -2) if x.ndim > 2 else x
        y = F.linear(rows, params["weight"], params.get("bias"))
        return y.reshape(*x.shape[:-1], features) if x.ndim > 2 else y, state

    return parametric(leaves, apply, "weight", *(["bias"] if bias else []), kind=Linear())


def _hardsigmoid(x: Tensor) -> Tensor:
    # F.hardsigmoid has no second derivative. It divides by 6, but its gradient multiplies by 1/6 in float32, even for
    # float64 images. This function does the same.
    if not is_transformed(x):
        return F.hardsigmoid(x)
    exact = x if x.dtype.itemsize > 2 else x.float()  # torch computes float16 and bfloat16 in float32, too
    rising = F.relu6(exact + 3)
    y = rising * 0.1666666716337204
    return (y + (rising / 6 - y).detach()).to(x.dtype)


hardsigmoid = stateless(_hardsigmoid, keeps_shape=True)
"""``relu6(x + 3) / 6``, with derivatives of every order (Howard et al. 2019, arXiv:1905.02244)."""


def _affine(shape: tuple[int, ...], scale: bool = True) -> dict[str, Leaf]:
    """The parameters of a normalisation."""
    return {**({"weight": Leaf(shape, 1.0)} if scale else {}), "bias": Leaf(shape, 0.0)}


def _along(values: Tensor, x: Tensor) -> Tensor:
    """One value for each channel, shaped to broadcast with images or vectors ``x``."""
    return values.view(-1, *(1,) * (x.ndim - 2))


def has_statistics(layer: Layer) -> bool:
    """Whether the layer keeps a running mean and variance, as batch normalisation does."""
    return layer.names >= {"mean", "var"}


def batch_norm(eps: float = 1e-5, momentum: float = 0.1, *, scale: bool = True, groups: int = 32) -> Layer:
    """Batch normalisation of each channel (Ioffe and Szegedy 2015, arXiv:1502.03167, algorithm 1).

    ``(b, c, h, w) -> (b, c, h, w)``.

    It computes ``y = weight * (x - m) / sqrt(v + eps) + bias``. With ``Mode.batch_statistics``, ``m`` and ``v`` are the
    batch's mean and variance, and the running ones are updated: ``mean += momentum * (m - mean)``, and the variance
    likewise, unbiased. Without it, ``m`` and ``v`` are the running ones. If ``Mode.norm`` is "group", the layer is
    `group_norm` instead.

    Args:
        eps: keeps the division finite.
        momentum: the share of the running statistics that each batch replaces.
        scale: whether there is a weight; if not, it is 1.
        groups: groups of the `group_norm` that may replace it; 1 suits vectors, whose channels have one value each.

    Raises:
        ValueError: with batch statistics, if a channel has only one value; if the images have a higher precision than
            the statistics.
    """
    group = group_norm(groups, eps, scale=scale)

    def leaves(x: Tensor) -> Leaves:
        shape = (x.shape[1],)
        return _affine(shape, scale), {
            "mean": Leaf(shape, 0.0),
            "var": Leaf(shape, 1.0),
            "count": Leaf((), 0, torch.int64),
        }

    def apply(params: Tree, state: Tree, x: Tensor, mode: Mode) -> tuple[Tensor, Tree]:
        bias, mean, var = params["bias"], state["mean"], state["var"]
        weight = params["weight"] if scale else torch.ones_like(bias)
        dtype = x.dtype
        if dtype != mean.dtype:  # images of lower precision than the statistics
            if dtype.itemsize > mean.dtype.itemsize:
                raise ValueError(f"images in {dtype} need statistics of at least that precision, found {mean.dtype}")
            weight, bias = weight.to(mean.dtype), bias.to(mean.dtype)
            if is_mapped_or_nested():  # torch cannot mix types here
                x = x.to(mean.dtype)
        if mode.batch_statistics and x.shape[0] == 0 and not mode.synchronized:
            # An empty batch has no statistics, but it is counted, as in torch.nn.
            mode, state = mode._replace(batch_statistics=False), {**state, "count": state["count"] + 1}
        if not mode.batch_statistics:
            if is_mapped() and not torch.compiler.is_compiling():
                # One pass over the images; torch's vmap rule makes three.
                slope = weight * (var + eps).rsqrt()
                y = torch.addcmul(_along(bias - mean * slope, x), x, _along(slope, x))
                return y if y.dtype == dtype else y.to(dtype), state
            # F.batch_norm without its Python overhead; the last argument allows cuDNN.
            y = torch.batch_norm(x, weight, bias, mean, var, False, momentum, eps, True)
            return y if y.dtype == dtype else y.to(dtype), state
        values: int | Tensor = x.numel() // x.shape[1]
        if values == 1 and not (mode.synchronized and distributed.world_size() > 1):
            raise ValueError(f"a batch's statistics need more than one value per channel, found {tuple(x.shape)}")
        if mode.synchronized:
            y, m, v, values = _normalized_over_processes(x.to(mean.dtype), eps)
            y = y * _along(weight, x) + _along(bias, x)
        elif is_mapped_or_nested():
            # The operator below has no vmap rule and lacks some derivatives. This one has all of them, but returns the
            # inverse standard deviation in place of the variance.
            y, m, inverse = batch_normalize(x, weight, bias, eps)
            m, v = m.detach(), inverse.detach().square().reciprocal() - eps
        else:
            # What F.batch_norm does, without writing into the running statistics.
            y, _, _, _, mean, var = torch.ops.aten._batch_norm_with_update_functional(
                x, weight, bias, mean, var, momentum, eps
            )
            return y, {**state, "mean": mean, "var": var, "count": state["count"] + 1}
        v = v * (values / (values - 1))
        mean, var = momentum * m + (1 - momentum) * mean, momentum * v + (1 - momentum) * var
        return y.to(dtype), {**state, "mean": mean, "var": var, "count": state["count"] + 1}

    names = (*(["weight"] if scale else []), "bias", "mean", "var", "count")
    batch = parametric(leaves, apply, *names, keeps_shape=True, kind=Normalization(1))

    def init(x: Any, mode: Mode) -> tuple[Tree, Tree, Any]:
        return (group if mode.norm == "group" else batch).init(x, mode)

    def run(params: Tree, state: Tree, x: Any, mode: Mode) -> tuple[Any, Tree]:
        return (group if mode.norm == "group" else batch).apply(params, state, x, mode)

    return Layer(init, run, batch.names)


def _normalized_over_processes(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalise by the statistics of all processes' batches; also their mean, variance and values per channel."""
    values = distributed.total({"": torch.full((), float(x.numel() // x.shape[1]), device=x.device)})[""]
    m = distributed.total_flowing(reduce(x, "b c ... -> c", "sum")) / values
    centred = x - _along(m, x)
    v = distributed.total_flowing(reduce(centred.square(), "b c ... -> c", "sum")) / values
    return centred * _along((v + eps).rsqrt(), x), m.detach(), v.detach(), values


def group_norm(groups: int = 32, eps: float = 1e-5, *, scale: bool = True) -> Layer:
    """Normalise groups of channels of each image by their own mean and variance (Wu and He 2018, arXiv:1803.08494).

    ``(b, c, h, w) -> (b, c, h, w)``. Images do not depend on each other, so it works with batches of one image, and
    each image has its own gradient.

    Args:
        groups: at most this many; the largest such number that divides the number of channels is used.
        eps: keeps the division finite.
        scale: whether there is a weight; if not, it is 1.
    """

    def leaves(x: Tensor) -> Leaves:
        return _affine((x.shape[1],), scale), {}

    def apply(params: Tree, state: Tree, x: Tensor, mode: Mode) -> tuple[Tensor, Tree]:
        count = next(n for n in range(min(groups, x.shape[1]), 0, -1) if x.shape[1] % n == 0)
        weight = params["weight"] if scale else torch.ones_like(params["bias"])
        return F.group_norm(x, count, weight, params["bias"], eps), state

    names = ("weight", "bias") if scale else ("bias",)
    return parametric(leaves, apply, *names, keeps_shape=True, kind=Normalization(1))


def conv_norm(
    features: int,
    kernel: Pair,
    stride: int = 1,
    padding: Pair | None = None,
    *,
    groups: int = 1,
    init: Initializer | None = None,
    norm: Layer | None = None,
    act: Layer = relu,
) -> Layer:
    """Convolution, normalisation and activation, in this order: what most networks since 2015 are made of.

    ``(b, c, h, w) -> (b, features, h', w')``.

    Args:
        features, kernel, stride, padding, groups, init: see `conv`.
        norm: the normalisation; by default `batch_norm`.
        act: the activation, a layer without parameters; `identity` for none.
    """
    convolution = conv(features, kernel, stride, padding, groups=groups, init=init)
    return serial(conv=convolution, norm=norm or batch_norm(), act=act)


def layer_norm(eps: float = 1e-5) -> Layer:
    """Layer normalisation along the last axis (Ba et al. 2016, arXiv:1607.06450), ``(b, ..., c) -> (b, ..., c)``.

    ``y = weight * (x - m) / sqrt(v + eps) + bias`` with the mean and variance of the c values.
    """

    def leaves(x: Tensor) -> Leaves:
        return _affine((x.shape[-1],)), {}

    def apply(params: Tree, state: Tree, x: Tensor, mode: Mode) -> tuple[Tensor, Tree]:
        weight, bias = params["weight"], params["bias"]
        if not derivatives().nested:
            return F.layer_norm(x, x.shape[-1:], weight, bias, eps), state
        # In derivatives of the derivative, torch treats mean and variance as constants.
        centred = x - x.mean(-1, keepdim=True)
        return centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt() * weight + bias, state

    return parametric(leaves, apply, "weight", "bias", keeps_shape=True, kind=Normalization(-1))


def squeeze_excitation(
    width: int,
    squeeze: int,
    *,
    act: Layer = relu,
    gate: Layer = sigmoid,
    init: Initializer | float | None = None,
    bias_init: Initializer | float | None = None,
) -> Layer:
    """Scale each channel by a number computed from all channels' means (Hu et al. 2017, arXiv:1709.01507, figure 1).

    ``(b, width, h, w) -> (b, width, h, w)``.

    Args:
        width: channels of the image.
        squeeze: channels between the two convolutions.
        act: activation between the two convolutions.
        gate: activation after them.
        init: how to draw both weights.
        bias_init: how to draw both biases.
    """
    return multiply(
        identity,
        serial(
            adaptive_avg_pool(1),
            squeeze=conv(squeeze, 1, bias=True, init=init, bias_init=bias_init), act=act,
            expand=conv(width, 1, bias=True, init=init, bias_init=bias_init), gate=gate,
        ),
    )  # fmt: skip


def _noise(rate: float, shape: Callable[[torch.Size], tuple[int, ...]]) -> Layer:
    """Multiply by 0 with probability ``rate``, else by ``1 / (1 - rate)``; ``shape`` maps x's shape to the mask's."""
    if not 0 <= rate < 1:
        raise ValueError(f"a drop rate must be at least 0 and below 1, found {rate}")
    if rate == 0:
        return identity

    def init(x: Tensor, mode: Mode) -> tuple[Tree, Tree, Tensor]:
        return {}, {}, x

    def apply(params: Tree, state: Tree, x: Tensor, mode: Mode) -> tuple[Tensor, Tree]:
        if not mode.train:
            return x, state
        kept = mode.bernoulli(1 - rate, shape(x.shape))
        return x * (kept.to(x.dtype) / (1 - rate)), state

    return Layer(init, apply, frozenset((DRAW,)))


def dropout(rate: float) -> Layer:
    """Zero each value with probability ``rate`` in training, and scale the others by ``1 / (1 - rate)``.

    Srivastava et al. 2014, JMLR 15:1929. The mask is drawn from the run's key and the layer's path.

    Raises:
        ValueError: unless ``rate`` is at least 0 and below 1.
    """
    return _noise(rate, tuple)


def stochastic_depth(layer: Layer, rate: float, mode: Literal["row", "batch"] = "row") -> Layer:
    """In training, zero the layer's output with probability ``rate``, and scale it by ``1 / (1 - rate)`` otherwise.

    Huang et al. 2016, arXiv:1603.09382, but scaled in training instead of in evaluation, as in torchvision. It is used
    on the branch of a residual connection: ``add(identity, stochastic_depth(branch, 0.2))``.

    Args:
        layer: the branch.
        rate: probability of dropping it.
        mode: ``"row"`` draws for each image of the batch, ``"batch"`` once for all of them.

    Raises:
        ValueError: unless ``rate`` is at least 0 and below 1, and ``mode`` is one of these.
    """
    if mode not in ("row", "batch"):
        raise ValueError(f"mode is 'row' or 'batch', found {mode!r}")
    return serial(layer, _noise(rate, lambda shape: (shape[0] if mode == "row" else 1, *(1 for _ in shape[1:]))))


def max_pool(kernel: int, stride: int, padding: int = 0, *, ceil_mode: bool = False) -> Layer:
    """The largest value in each window, ``(b, c, h, w) -> (b, c, h', w')``.

    Args:
        kernel: side of the window, pixels.
        stride: from one window to the next, pixels.
        padding: pixels on each side, which count as minus infinity; at most half of the kernel.
        ceil_mode: let the last window reach beyond the border, instead of leaving out pixels.
    """

    def pool(x: Tensor) -> Tensor:
        # In float16 and bfloat16, torch sums the derivatives in another order than the code below.
        if kernel < 3 or not x.is_cpu or is_mapped() or not x.is_contiguous() or x.dtype.itemsize < 4:
            return torch.max_pool2d(x, kernel, stride, padding, 1, ceil_mode)
        # On a CPU torch pools channels-last images four times faster, but the backward pass takes longer in that
        # layout. So the maxima are located in channels-last images, and gathered from the given ones if derivatives are
        # needed.
        last = x.detach().contiguous(memory_format=torch.channels_last)
        y, places = torch.ops.aten.max_pool2d_with_indices(last, *map(_pair, (kernel, stride, padding, 1)), ceil_mode)
        if not is_transformed(x):
            # Not y.contiguous(): it keeps the strides of one-pixel images, and convolutions then sum in another order.
            return y.clone(memory_format=torch.contiguous_format)
        return x.flatten(2).gather(2, places.contiguous().flatten(2)).view(places.shape)

    return stateless(pool)


def avg_pool(kernel: int, stride: int, padding: int = 0) -> Layer:
    """The mean of each window, ``(b, c, h, w) -> (b, c, h', w')``.

    Args:
        kernel: side of the window, pixels.
        stride: from one window to the next, pixels.
        padding: zeros on each side, pixels; they count in the mean. At most half of the kernel.
    """
    return stateless(lambda x: F.avg_pool2d(x, kernel, stride, padding))


def adaptive_avg_pool(size: int) -> Layer:
    """The means of ``size x size`` windows that cover the image, ``(b, c, h, w) -> (b, c, size, size)``."""
    return stateless(lambda x: F.adaptive_avg_pool2d(x, size))


channels_last = stateless(lambda x: rearrange(x, "b c h w -> b h w c"))
"""``(b, c, h, w) -> (b, h, w, c)``."""
channels_first = stateless(lambda x: rearrange(x, "b h w c -> b c h w"))
"""``(b, h, w, c) -> (b, c, h, w)``."""
flatten = stateless(lambda x: rearrange(x, "b c h w -> b (c h w)"))
"""All values of an image as one vector: ``(b, c, h, w) -> (b, c h w)``."""
global_avg_pool = stateless(lambda x: reduce(x, "b c h w -> b c", "mean"))
"""The mean of each channel, ``(b, c, h, w) -> (b, c)`` (Lin et al. 2013, arXiv:1312.4400, section 3.2)."""
