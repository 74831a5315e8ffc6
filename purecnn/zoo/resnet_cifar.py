"""ResNet for CIFAR: the network on which the paper shows that plain depth fails, and that shortcuts fix this.

    He, Zhang, Ren, Sun. Deep Residual Learning for Image Recognition. CVPR 2016, arXiv:1512.03385, section 4.2.

Three stages of ``n`` blocks each make ``6n + 2`` layers. Shortcuts are the paper's option A, without parameters;
libraries that use option B here have other parameter counts (272,474 for ResNet-20). No deviations from the paper.
"""

import itertools
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor

from purecnn.initializers import kaiming_normal
from purecnn.layer import Layer, add, numbered, serial
from purecnn.layers import batch_norm, conv, global_avg_pool, linear, relu, stateless
from purecnn.paper import Published, Variant
from purecnn.zoo.resnet import RESNET

he = kaiming_normal("fan_in")


def zero_pad(width: int, stride: int) -> Layer:
    """The shortcut of option A: every ``stride``-th pixel, with channels of zeros before and after the input's own."""

    def shortcut(x: Tensor) -> Tensor:
        missing = width - x.shape[1]
        if stride == 1 and missing == 0:
            return x
        return F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, missing // 2, missing - missing // 2))

    return stateless(shortcut)


def branch(width: int, stride: int) -> Layer:
    """Figure 2: two 3x3 convolutions."""
    return serial(
        conv1=conv(width, 3, stride, init=he), norm1=batch_norm(), relu1=relu,
        conv2=conv(width, 3, init=he), norm2=batch_norm(),
    )  # fmt: skip


def network(
    block: Callable[[int, int, int], Layer], depths: Sequence[int], widths: Sequence[int], num_classes: int
) -> Layer:
    """The network in the table of section 4.2, with blocks of any kind.

    Args:
        block: ``block(width, stride, place)``; ``place`` is the block's index in the network, from 0.
        depths: blocks of each stage.
        widths: channels of each stage; the first is also the stem's.
        num_classes: outputs of the head.
    """
    places = itertools.count()
    stages = {
        f"stage{i + 1}": numbered(*(block(width, 2 if i and not j else 1, next(places)) for j in range(depth)))
        for i, (depth, width) in enumerate(zip(depths, widths, strict=True))
    }
    return serial(
        stem=serial(conv=conv(widths[0], 3, init=he), norm=batch_norm(), relu=relu),
        **stages,
        head=serial(global_avg_pool, linear=linear(num_classes)),
    )


def block(width: int, stride: int, place: int = 0) -> Layer:
    """Figure 2: the sum of branch and shortcut, then a ReLU."""
    return serial(add(branch(width, stride), zero_pad(width, stride)), relu)


def resnet_cifar(depths: Sequence[int], *, widths: Sequence[int] = (16, 32, 64), num_classes: int = 10) -> Layer:
    """The network in the table of section 4.2.

    Args:
        depths: blocks of each stage, all ``n`` in the paper.
        widths: channels of each stage; the first is also the stem's.
        num_classes: outputs of the head.
    """
    return network(block, depths, widths, num_classes)


VARIANTS = {
    f"resnet{6 * n + 2}_cifar": Variant(
        resnet_cifar, RESNET, {"depths": (n, n, n)}, 32, published=Published(error, "test error", "CIFAR-10", "Table 6")
    )
    for n, error in ((3, 8.75), (5, 7.51), (7, 7.17), (9, 6.97), (18, 6.43))
}
