"""BAM: between the stages of a network, a map of what to look at, and where.

    Park, Woo, Lee, Kweon. BAM: Bottleneck Attention Module. BMVC 2018, arXiv:1807.06514.

CBAM's elder sibling: one module for each stage but the last, where the image is about to shrink, instead of two gates
in every block. A perceptron decides on channels, dilated convolutions that see far decide on pixels, and both together
make one factor between 1 and 2 for each number. Any network of stages can take it: see `bam`.

Deviations: where the paper adds the two maps and has a normalisation at the end of both, the authors' code, and this,
multiplies them and normalises before each rectifier. So a vector is normalised, of one value per channel, and a batch
of one image cannot be trained with its own statistics. Weights are drawn by He's rule, like the network around them.
"""

from collections.abc import Sequence

from einops import rearrange

from purecnn.layer import Layer, multiply, serial
from purecnn.layers import batch_norm, conv, global_avg_pool, identity, linear, relu, sigmoid, stateless
from purecnn.paper import Group, Paper, Published, Variant
from purecnn.zoo.resnet import projection
from purecnn.zoo.resnet_v1 import bottleneck, he, residual, stages, stem

PAPER = Paper(
    "BAM: Bottleneck Attention Module",
    "Park, Woo, Lee, Kweon",
    2018,
    "arXiv:1807.06514",
    groups=(Group.ATTENTION,),
)


def channel_map(width: int, reduction: int) -> Layer:
    """Section 3.1: from the mean of each channel to a number for it, ``(b, c, h, w) -> (b, c, 1, 1)``."""
    return serial(
        global_avg_pool,
        squeeze=linear(width // reduction), norm=batch_norm(groups=1), relu=relu,
        expand=linear(width), as_image=stateless(lambda x: rearrange(x, "b c -> b c 1 1")),
    )  # fmt: skip


def spatial_map(width: int, reduction: int, dilation: int) -> Layer:
    """Section 3.1: fewer channels, two dilated 3x3, one number for each pixel, ``(b, c, h, w) -> (b, 1, h, w)``."""
    inner = width // reduction
    return serial(
        reduce=conv(inner, 1, bias=True, init=he), norm=batch_norm(), relu=relu,
        conv1=conv(inner, 3, dilation=dilation, bias=True, init=he), norm1=batch_norm(), relu1=relu,
        conv2=conv(inner, 3, dilation=dilation, bias=True, init=he), norm2=batch_norm(), relu2=relu,
        project=conv(1, 1, bias=True, init=he),
    )  # fmt: skip


def bam(width: int, reduction: int = 16, dilation: int = 4) -> Layer:
    """Figure 2: the image times ``1 + sigmoid(channel map * spatial map)``.

    Args:
        width: channels of the image.
        reduction: channels of the image to those within the two maps, r in the paper.
        dilation: of the 3x3 convolutions, d in the paper.
    """
    maps = multiply(channel=channel_map(width, reduction), spatial=spatial_map(width, reduction, dilation))
    return multiply(identity, serial(maps, gate=sigmoid, more=stateless(lambda x: 1 + x)))


def bam_resnet(depths: Sequence[int], *, reduction: int = 16, dilation: int = 4, num_classes: int = 1000) -> Layer:
    """ResNet with bottlenecks, and BAM after every stage but the last.

    Args:
        depths: blocks in each stage.
        reduction: channels of a stage to those within its module's maps.
        dilation: of the modules' 3x3 convolutions.
        num_classes: outputs of the head.
    """

    def block(width: int, stride: int) -> Layer:
        return residual(bottleneck((width, width, 4 * width), (1, stride)), projection(4 * width, stride))

    trunk = stages(block, depths)
    *attended, last = trunk
    return serial(
        stem=stem(),
        **{name: serial(trunk[name], bam=bam(256 << i, reduction, dilation)) for i, name in enumerate(attended)},
        **{last: trunk[last]},
        head=serial(global_avg_pool, linear=linear(num_classes)),
    )


VARIANTS = {
    "bam_resnet50": Variant(
        bam_resnet,
        PAPER,
        {"depths": (3, 4, 6, 3)},
        published=Published(23.14, "top-1 error", "ImageNet", "authors' repository"),
    )
}
