"""MobileNet: a plain chain of depthwise separable convolutions, small and fast enough for a phone.

    Howard, Zhu, Chen, Kalenichenko, Wang, Weyand, Andreetto, Adam. MobileNets: Efficient Convolutional Neural Networks
    for Mobile Vision Applications. arXiv:1704.04861, 2017.

A 3x3 convolution costs eight to nine times as much as its depthwise and 1x1 parts together. Two factors, for the width
and for the image size, trade accuracy for speed. Unlike in Xception, both parts are followed by normalisation and ReLU.
The paper does not specify the initialisation; here it is He initialisation.
"""

from collections.abc import Sequence

from purecnn.initializers import normal
from purecnn.layer import Layer, numbered, serial
from purecnn.layers import conv_norm, global_avg_pool, linear
from purecnn.paper import Group, Paper, Published, Variant
from purecnn.zoo.mobilenet_v2 import he

PAPER = Paper(
    "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications",
    "Howard, Zhu, Chen, Kalenichenko, Wang, Weyand, Andreetto, Adam",
    2017,
    "arXiv:1704.04861",
    groups=(Group.MOBILE,),
)


def separable(inputs: int, width: int, stride: int) -> Layer:
    """Figure 3, right: a depthwise 3x3 convolution, then 1x1."""
    return serial(
        depthwise=conv_norm(inputs, 3, stride, groups=inputs, init=he), pointwise=conv_norm(width, 1, init=he)
    )


def mobilenet_v1(
    *,
    widths: Sequence[int] = (64, 128, 256, 512, 1024),
    depths: Sequence[int] = (1, 2, 2, 6, 2),
    width: float = 1.0,
    num_classes: int = 1000,
) -> Layer:
    """Table 1 of the paper.

    Args:
        widths: channels of each stage.
        depths: blocks of each stage; all stages except the first begin with stride 2.
        width: factor for all channels, the paper's alpha.
        num_classes: outputs of the head.
    """
    inputs = max(8, int(32 * width))
    parts = {"stem": conv_norm(inputs, 3, 2, init=he)}
    for i, (channels, depth) in enumerate(zip(widths, depths, strict=True), start=1):
        blocks, out = [], max(8, int(channels * width))
        for j in range(depth):
            blocks.append(separable(inputs, out, 2 if i > 1 and not j else 1))
            inputs = out
        parts[f"stage{i}"] = numbered(*blocks)
    linear_head = linear(num_classes, init=normal(0.01), bias_init=0.0)
    return serial(**parts, head=serial(global_avg_pool, linear=linear_head))


VARIANTS = {
    "mobilenet_v1": Variant(mobilenet_v1, PAPER, published=Published(70.6, "top-1 accuracy", "ImageNet", "Table 6"))
}
