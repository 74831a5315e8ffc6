"""ResNet-50 as in the paper: the stride is on the first 1x1 convolution.

    He, Zhang, Ren, Sun. Deep Residual Learning for Image Recognition. CVPR 2016, arXiv:1512.03385.

`purecnn.zoo.resnet` follows torchvision, which moved the stride to the 3x3 ("v1.5"); the parameters are the same. Here
the branch of a residual block, its end, and the stages are separate functions, so that other architectures can put a
gate on the branch: see `purecnn.zoo.senet` and `purecnn.zoo.cbam`. No deviations from the paper.
"""

from collections.abc import Callable, Sequence

from purecnn import layers
from purecnn.initializers import Initializer, kaiming_normal
from purecnn.layer import Layer, add, numbered, serial
from purecnn.layers import batch_norm, conv, global_avg_pool, linear, max_pool, relu
from purecnn.paper import Published, Variant
from purecnn.zoo.resnet import RESNET, projection

he = kaiming_normal("fan_in")


def bottleneck(
    widths: tuple[int, int, int], strides: tuple[int, int] = (1, 1), *, groups: int = 1, init: Initializer = he
) -> Layer:
    """The branch of figure 5, right: 1x1, 3x3, 1x1.

    Args:
        widths: output channels of the three convolutions.
        strides: strides of the first two.
        groups: groups of the 3x3.
        init: initialisation of the weights.
    """
    return serial(
        conv1=conv(widths[0], 1, strides[0], init=init), norm1=batch_norm(), relu1=relu,
        conv2=conv(widths[1], 3, strides[1], groups=groups, init=init), norm2=batch_norm(), relu2=relu,
        conv3=conv(widths[2], 1, init=init), norm3=batch_norm(),
    )  # fmt: skip


def residual(branch: Layer, shortcut: Layer) -> Layer:
    """The end of a block: the sum of branch and shortcut, then a ReLU."""
    return serial(add(branch, shortcut=shortcut), relu)


def stages(block: Callable[[int, int], Layer], depths: Sequence[int]) -> dict[str, Layer]:
    """Table 1: ``block(width, stride)``; the width starts at 64 and doubles where the image is halved."""
    return {
        f"stage{i + 1}": numbered(*(block(64 << i, 2 if i and not j else 1) for j in range(depth)))
        for i, depth in enumerate(depths)
    }


def stem() -> Layer:
    """Table 1: a 7x7 convolution and a pool, each with stride 2."""
    return serial(conv=conv(64, 7, 2, init=he), norm=batch_norm(), relu=relu, pool=max_pool(3, 2, 1))


def network(
    block: Callable[[int, int], Layer], depths: Sequence[int], *, num_classes: int = 1000, dropout: float = 0.0
) -> Layer:
    """The network of table 1 with blocks of any kind, so that a new residual network is one expression.

    >>> from purecnn.layers import stochastic_depth
    >>> from purecnn.zoo.senet import excited
    >>> def seresnext_with_stochastic_depth(w, stride):
    ...     branch = bottleneck((2 * w, 2 * w, 4 * w), (1, stride), groups=32)
    ...     return residual(stochastic_depth(excited(branch, 4 * w, 16), 0.2), projection(4 * w, stride))
    >>> layer = network(seresnext_with_stochastic_depth, (3, 4, 6, 3))

    Args:
        block: ``block(width, stride)``, with ``4 * width`` output channels.
        depths: blocks in each stage.
        num_classes: outputs of the head.
        dropout: rate before the head.
    """
    head = serial(global_avg_pool, layers.dropout(dropout), linear=linear(num_classes))
    return serial(stem=stem(), **stages(block, depths), head=head)


def block(width: int, stride: int) -> Layer:
    """Figure 5, right, with the stride on the first 1x1."""
    return residual(bottleneck((width, width, 4 * width), (stride, 1)), projection(4 * width, stride))


def resnet_v1(depths: Sequence[int], *, num_classes: int = 1000) -> Layer:
    """Table 1 of the paper, with bottlenecks.

    Args:
        depths: blocks in each stage.
        num_classes: outputs of the head.
    """
    return network(block, depths, num_classes=num_classes)


VARIANTS = {
    "resnet50_v1": Variant(
        resnet_v1,
        RESNET,
        {"depths": (3, 4, 6, 3)},
        published=Published(24.7, "top-1 error", "ImageNet", "authors' repository, one crop"),
    )
}
