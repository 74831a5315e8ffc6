"""CBAM: a gate for the channels, then a gate for the pixels.

    Woo, Park, Lee, Kweon. CBAM: Convolutional Block Attention Module. ECCV 2018, arXiv:1807.06521.

To squeeze-and-excitation it adds the channels' maxima beside their means, and a map of which positions matter. Both
gates are on the branch of a residual block, before the sum; any residual block can use them: see `attended`. As in the
authors' code, the 7x7 convolution has no bias, but is followed by batch normalisation with momentum 0.01, and the
stride of a bottleneck is on the 3x3. No further deviations from the paper.
"""

from collections.abc import Sequence

import torch
from einops import reduce
from torch import Tensor

from purecnn.layer import Layer, multiply, serial
from purecnn.layers import batch_norm, conv, identity, linear, relu, sigmoid, stateless
from purecnn.paper import Group, Paper, Published, Variant
from purecnn.zoo.resnet import bottleneck, he, network, projection, residual

PAPER = Paper(
    "CBAM: Convolutional Block Attention Module",
    "Woo, Park, Lee, Kweon",
    2018,
    "arXiv:1807.06521",
    groups=(Group.ATTENTION,),
    in_survey=True,
)


def mean_and_max(x: Tensor) -> Tensor:
    """Mean and maximum of each channel's pixels, ``(b, c, h, w) -> (b, 2, c)``."""
    return torch.stack([reduce(x, "b c h w -> b c", way) for way in ("mean", "max")], dim=1)


def channel_gate(width: int, reduction: int) -> Layer:
    """Equation 2: one MLP is applied to the means and to the maxima; the sum of both outputs gates each channel."""
    gate = serial(
        stateless(mean_and_max),
        squeeze=linear(width // reduction), act=relu, expand=linear(width),
        sum=stateless(lambda x: reduce(x, "b two c -> b c 1 1", "sum")), gate=sigmoid,
    )  # fmt: skip
    return multiply(identity, gate)


def max_and_mean(x: Tensor) -> Tensor:
    """Maximum and mean of the channels at each pixel, ``(b, c, h, w) -> (b, 2, h, w)``."""
    return torch.stack([reduce(x, "b c h w -> b h w", way) for way in ("max", "mean")], dim=1)


def spatial_gate() -> Layer:
    """Equation 3: a 7x7 convolution of the channels' maximum and mean gates each pixel."""
    gate = serial(stateless(max_and_mean), conv=conv(1, 7, init=he), norm=batch_norm(momentum=0.01), gate=sigmoid)
    return multiply(identity, gate)


def attended(branch: Layer, width: int, reduction: int) -> Layer:
    """Figure 3: a residual block's branch with both gates on its output of ``width`` channels."""
    return serial(branch, channel=channel_gate(width, reduction), spatial=spatial_gate())


def cbam_resnet(depths: Sequence[int], *, reduction: int = 16, num_classes: int = 1000) -> Layer:
    """ResNet with bottlenecks and CBAM.

    Args:
        depths: blocks in each stage.
        reduction: ratio of a block's channels to its channel gate's hidden units, r in the paper.
        num_classes: outputs of the head.
    """

    def block(width: int, stride: int) -> Layer:
        branch = bottleneck((width, width, 4 * width), (1, stride))
        return residual(attended(branch, 4 * width, reduction), projection(4 * width, stride))

    return network(block, depths, num_classes=num_classes)


VARIANTS = {
    "cbam_resnet50": Variant(
        cbam_resnet,
        PAPER,
        {"depths": (3, 4, 6, 3)},
        published=Published(22.66, "top-1 error", "ImageNet", "the paper, one crop"),
    )
}
