"""BAM: attention over channels and positions, between the stages of a network.

    Park, Woo, Lee, Kweon. BAM: Bottleneck Attention Module. BMVC 2018, arXiv:1807.06514.

The predecessor of CBAM: one module at the end of every stage except the last, just before the image shrinks, instead of
two gates in every block. An MLP weights the channels, dilated convolutions with a large receptive field weight the
pixels, and together they give each value a factor between 1 and 2. Any network with stages can use it: see `bam`.

Deviations: the paper adds the two maps and normalises at the end of each; the authors' code, and this one, multiplies
them and normalises before each ReLU. So the channel map normalises vectors, with one value per channel, and a batch of
one image cannot be trained with its own statistics. The convolutions use He initialisation, like the surrounding ones.
"""

from collections.abc import Sequence

from einops import rearrange

from purecnn.layer import Layer, multiply, serial
from purecnn.layers import batch_norm, conv, global_avg_pool, identity, linear, relu, sigmoid, stateless
from purecnn.paper import Group, Paper, Published, Variant
from purecnn.zoo.resnet import bottleneck, projection, residual, stages, stem
from purecnn.zoo.resnet_v1 import he

PAPER = Paper(
    "BAM: Bottleneck Attention Module",
    "Park, Woo, Lee, Kweon",
    2018,
    "arXiv:1807.06514",
    groups=(Group.ATTENTION,),
)


def channel_map(width: int, reduction: int) -> Layer:
    """Section 3.1: one number for each channel, from the means of all channels, ``(b, c, h, w) -> (b, c, 1, 1)``."""
    return serial(
        global_avg_pool,
        squeeze=linear(width // reduction), norm=batch_norm(groups=1), relu=relu,
        expand=linear(width), as_image=stateless(lambda x: rearrange(x, "b c -> b c 1 1")),
    )  # fmt: skip


def spatial_map(width: int, reduction: int, dilation: int) -> Layer:
    """Section 3.1: 1x1, two dilated 3x3, then 1x1 to one number for each pixel, ``(b, c, h, w) -> (b, 1, h, w)``."""
    inner = width // reduction
    return serial(
        reduce=conv(inner, 1, bias=True, init=he), norm=batch_norm(), relu=relu,
        conv1=conv(inner, 3, dilation=dilation, bias=True, init=he), norm1=batch_norm(), relu1=relu,
        conv2=conv(inner, 3, dilation=dilation, bias=True, init=he), norm2=batch_norm(), relu2=relu,
        project=conv(1, 1, bias=True, init=he),
    )  # fmt: skip


def bam(width: int, reduction: int = 16, dilation: int = 4) -> Layer:
    """Figure 2: the input times ``1 + sigmoid(channel map * spatial map)``.

    Args:
        width: channels of the input.
        reduction: ratio of the input's channels to those inside the two maps, r in the paper.
        dilation: dilation of the 3x3 convolutions, d in the paper.
    """
    maps = multiply(channel=channel_map(width, reduction), spatial=spatial_map(width, reduction, dilation))
    return multiply(identity, serial(maps, gate=sigmoid, more=stateless(lambda x: 1 + x)))


def bam_resnet(depths: Sequence[int], *, reduction: int = 16, dilation: int = 4, num_classes: int = 1000) -> Layer:
    """ResNet with bottlenecks, and BAM after every stage except the last.

    Args:
        depths: blocks in each stage.
        reduction: ratio of a stage's channels to those inside its module's maps.
        dilation: dilation of the modules' 3x3 convolutions.
        num_classes: outputs of the head.
    """

    def block(width: int, stride: int) -> Layer:
        branch = bottleneck((width, width, 4 * width), (1, stride), init=he)
        return residual(branch, projection(4 * width, stride, he))

    trunk = stages(block, depths)
    *attended, last = trunk
    return serial(
        stem=stem(he),
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
