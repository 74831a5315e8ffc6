"""DelugeNet: a layer sees all earlier layers of its block, with one weight for each of their channels.

    Kuen, Kong, Wang, Tan. DelugeNets: Deep Networks with Efficient and Flexible Cross-layer Information Inflows. ICCV
    Workshops 2017, arXiv:1611.05552.

A residual network adds up the outputs of earlier layers; a dense network concatenates them, so its inputs widen. Here
each layer begins with a cross-layer depthwise convolution, a weighted sum: channel ``c`` of the sum combines the
channels ``c`` of all earlier outputs, so the sum is only as wide as one of them. The outputs are concatenated as in a
dense block, by ``concat(identity, f)``, and a 3x3 convolution connects one block to the next.

As in the authors' code (github.com/xternalz/DelugeNets), each channel is normalised before it is weighted, so the
cross-layer convolution is batch normalisation followed by a sum. Its weights start as those of a mean. The only
deviation: in the authors' code, the newest output comes first in the concatenation.
"""

from collections.abc import Sequence

from einops import reduce

from purecnn.initializers import kaiming_normal
from purecnn.layer import Layer, concat, drawn, numbered, serial
from purecnn.layers import batch_norm, conv, global_avg_pool, identity, linear, relu, stateless
from purecnn.paper import Group, Paper, Published, Variant

PAPER = Paper(
    "DelugeNets: Deep Networks with Efficient and Flexible Cross-layer Information Inflows",
    "Kuen, Kong, Wang, Tan",
    2016,
    "arXiv:1611.05552",
    groups=(Group.MULTI_PATH,),
)

he = kaiming_normal("fan_out")


def cross_layer(layers: int, width: int) -> Layer:
    """The weighted sum of the outputs of several layers, ``(b, layers * width, h, w) -> (b, width, h, w)``."""
    if layers == 1:
        return identity
    mean = drawn(batch_norm(), lambda path, shape: 1 / layers if path.endswith("weight") else None)
    total = stateless(lambda x: reduce(x, "b (layer c) h w -> b c h w", "sum", c=width))
    return serial(inflow=mean, total=total)


def bottleneck(width: int) -> Layer:
    """1x1 to half of the width, 3x3, 1x1, each after normalisation and ReLU."""
    return serial(
        norm1=batch_norm(), relu1=relu, conv1=conv(width // 2, 1, init=he),
        norm2=batch_norm(), relu2=relu, conv2=conv(width // 2, 3, init=he),
        norm3=batch_norm(), relu3=relu, conv3=conv(width, 1, init=he),
    )  # fmt: skip


def composite(layers: int, width: int) -> Layer:
    """A layer that reads the outputs of several layers and appends its own to them."""
    return concat(identity, serial(cross_layer(layers, width), bottleneck(width)))


def transition(layers: int, width: int) -> Layer:
    """Between two blocks: halves the image and doubles the width."""
    return serial(cross_layer(layers, width), norm=batch_norm(), conv=conv(2 * width, 3, 2, init=he))


def delugenet_cifar(depths: Sequence[int], *, width: int = 64, num_classes: int = 10) -> Layer:
    """The network for CIFAR: a convolution, then three blocks.

    Args:
        depths: composite layers of each block; the first layer of the first block widens the stem's output instead.
        width: channels of a layer's output in the first block; the stem has half as many.
        num_classes: outputs of the head.
    """
    parts: dict[str, Layer] = {"stem": serial(conv=conv(width // 2, 3, init=he))}
    for i, depth in enumerate(depths, start=1):
        # The first output is that of the first layer in the first block, and that of the transition in the others.
        outputs = depth if i == 1 else depth + 1
        first = [bottleneck(width)] if i == 1 else []
        block = numbered(*first, *(composite(layers, width) for layers in range(1, outputs)))
        if i < len(depths):
            parts[f"stage{i}"] = serial(block, transition=transition(outputs, width))
            width *= 2
        else:
            parts[f"stage{i}"] = serial(block, cross_layer(outputs, width), norm=batch_norm(), relu=relu)
    return serial(**parts, head=serial(global_avg_pool, linear=linear(num_classes, bias_init=0.0)))


def _variant(depth: int, error: float, width: int = 64) -> Variant:
    published = Published(error, "test error", "CIFAR-10", "authors' repository")
    return Variant(
        delugenet_cifar, PAPER, {"depths": (depth, 2 * depth, 3 * depth), "width": width}, 32, published=published
    )


VARIANTS = {
    "delugenet146_cifar": _variant(8, 3.98),
    "delugenet218_cifar": _variant(12, 3.88),
    "wide_delugenet146_cifar": _variant(8, 3.76, width=112),
}
