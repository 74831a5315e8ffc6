"""DelugeNet: a layer sees all earlier layers of its block, by one weight for each of their channels.

    Kuen, Kong, Wang, Tan. DelugeNets: Deep Networks with Efficient and Flexible Cross-layer Information Inflows. ICCV
    Workshops 2017, arXiv:1611.05552.

A residual network adds up what earlier layers gave; a dense network hands on all of it, to ever wider inputs. Here a
layer begins with a cross-layer depthwise convolution, a weighted sum: channel ``c`` of the sum is made of the channels
``c`` of all earlier outputs, so the sum is no wider than one of them. The outputs are joined as in a dense block, by
``concat(identity, f)``, and a 3x3 convolution leads from block to block.

As in the authors' code (github.com/xternalz/DelugeNets), each channel is normalised before it is weighed, so the
cross-layer convolution is batch normalisation and a sum. Its weights begin as those of a mean. There, the newest output
comes first in the joined image; no other deviations.
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
    """From the outputs of several layers, ``(b, layers * width, h, w)``, to ``(b, width, h, w)``."""
    if layers == 1:
        return identity
    mean = drawn(batch_norm(), lambda path, shape: 1 / layers if path.endswith("weight") else None)
    total = stateless(lambda x: reduce(x, "b (layer c) h w -> b c h w", "sum", c=width))
    return serial(inflow=mean, total=total)


def bottleneck(width: int) -> Layer:
    """Normalise and rectify before each of 1x1 to half of the width, 3x3, 1x1."""
    return serial(
        norm1=batch_norm(), relu1=relu, conv1=conv(width // 2, 1, init=he),
        norm2=batch_norm(), relu2=relu, conv2=conv(width // 2, 3, init=he),
        norm3=batch_norm(), relu3=relu, conv3=conv(width, 1, init=he),
    )  # fmt: skip


def composite(layers: int, width: int) -> Layer:
    """A layer whose input is the outputs of several, and its own beside them."""
    return concat(identity, serial(cross_layer(layers, width), bottleneck(width)))


def transition(layers: int, width: int) -> Layer:
    """From a block to the next: half the size, twice the width."""
    return serial(cross_layer(layers, width), norm=batch_norm(), conv=conv(2 * width, 3, 2, init=he))


def delugenet_cifar(depths: Sequence[int], *, width: int = 64, num_classes: int = 10) -> Layer:
    """The network for CIFAR: a convolution, then three blocks.

    Args:
        depths: composite layers of each block; in the first block one of them widens the stem's output.
        width: channels of a layer's output in the first block; half of them are the stem's.
        num_classes: outputs of the head.
    """
    parts: dict[str, Layer] = {"stem": serial(conv=conv(width // 2, 3, init=he))}
    for i, depth in enumerate(depths, start=1):
        # The first output of a block is its first layer's in the first block, and the transition's in the others.
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
