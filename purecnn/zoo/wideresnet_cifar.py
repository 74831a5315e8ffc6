"""Wide ResNet for CIFAR: sixteen wide layers do as well as a thousand thin ones.

    Zagoruyko, Komodakis. Wide Residual Networks. BMVC 2016, arXiv:1605.07146.

WRN-d-k has pre-activation blocks of two 3x3 convolutions, ``k`` times as wide as in the ResNet for CIFAR, with dropout
in between. The depth ``d = 6n + 4`` includes the three convolutions in shortcuts. By default dropout is off, as in most
of the paper's tables. No deviations from the paper.
"""

from collections.abc import Sequence
from functools import partial

from purecnn import layers
from purecnn.layer import Layer, serial
from purecnn.layers import batch_norm, conv, global_avg_pool, linear, relu
from purecnn.paper import Published, Variant
from purecnn.zoo.preactresnet import he, stages
from purecnn.zoo.resnet import WIDE


def branch(width: int, stride: int, dropout: float) -> Layer:
    """Figure 1d, without its first normalisation and ReLU."""
    return serial(
        conv1=conv(width, 3, stride, init=he), norm2=batch_norm(), relu2=relu, dropout=layers.dropout(dropout),
        conv2=conv(width, 3, init=he),
    )  # fmt: skip


def wideresnet_cifar(
    depths: Sequence[int],
    *,
    widths: Sequence[int] = (16, 32, 64),
    width: int = 1,
    num_classes: int = 10,
    dropout: float = 0.0,
) -> Layer:
    """Table 1 of the paper.

    Args:
        depths: blocks of each stage.
        widths: channels of each stage, before the factor; the first is also the stem's.
        width: factor for the channels, k in the paper.
        num_classes: outputs of the head.
        dropout: rate between the two convolutions of a block.
    """
    block = partial(branch, dropout=dropout)
    return serial(
        stem=serial(conv=conv(widths[0], 3, init=he)),
        **stages(block, widths[0], [width * channels for channels in widths], depths),
        head=serial(global_avg_pool, linear=linear(num_classes)),
    )


VARIANTS = {
    f"wideresnet{6 * n + 4}_{k}_cifar": Variant(
        wideresnet_cifar,
        WIDE,
        {"depths": (n, n, n), "width": k},
        32,
        published=Published(error, "test error", "CIFAR-10", "without dropout, median of five"),
    )
    for n, k, error in ((4, 10, 4.00), (6, 4, 4.53))
}
