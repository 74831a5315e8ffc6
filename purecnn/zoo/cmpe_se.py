"""CMPE-SE: squeeze-and-excitation whose gate also sees the shortcut.

    Hu, Wen, Luo, Dai, Ma, Yu. Competitive Inner-Imaging Squeeze and Excitation for Residual Network. 2018,
    arXiv:1807.08920.

A residual block's gate sees the channel means of both the branch and the shortcut, so the two compete for how much the
branch adds. Of the paper's variants this is the "1x1 pair-view" on WRN-28-10: the two vectors of means are the columns
of a small picture, which a 1x1 convolution turns into ``channels / 16`` pictures; their mean goes through two
fully-connected layers. As in the authors' code, neither the convolution nor the fully-connected layers of the gate have
a bias. With 10 classes there are 36,883,234 parameters; the authors' table
(github.com/scut-aitcm/Competitive-Inner-Imaging-SENet) has 36.9 M for this variant, and the survey arXiv:1901.06032,
which has 36.92 M, prints the error of this variant.
"""

from collections.abc import Sequence
from functools import partial

import torch
from einops import rearrange, reduce
from torch import Tensor

from purecnn.layer import Layer, Mode, named, serial
from purecnn.layers import batch_norm, conv, global_avg_pool, identity, linear, relu, sigmoid, stateless
from purecnn.paper import Group, Paper, Published, Variant
from purecnn.tree import Tree
from purecnn.zoo.preactresnet import he, stages
from purecnn.zoo.wideresnet_cifar import branch

PAPER = Paper(
    "Competitive Inner-Imaging Squeeze and Excitation for Residual Network",
    "Hu, Wen, Luo, Dai, Ma, Yu",
    2018,
    "arXiv:1807.08920",
    groups=(Group.FEATURE_MAPS,),
    in_survey=True,
)


def gate(width: int, reduction: int) -> Layer:
    """A factor for each channel, from the picture of means, ``(b, 1, width, 2)``."""
    return serial(
        draw=conv(width // reduction, 1, init=he), norm=batch_norm(),
        mean=stateless(lambda x: reduce(x, "b drawing c pair -> b (c pair)", "mean")),
        squeeze=linear(width // reduction, bias=False, init=he), act=relu,
        expand=linear(width, bias=False, init=he), gate=sigmoid,
        as_image=stateless(lambda x: rearrange(x, "b c -> b c 1 1")),
    )  # fmt: skip


def competing(branch: Layer, shortcut: Layer, width: int, reduction: int) -> Layer:
    """``gate(means of branch, means of shortcut) * branch + shortcut``.

    Not series-parallel, since both the gate and the sum use the branch and the shortcut.
    """
    decide = named("gate", gate(width, reduction))

    def picture(y: Tensor, x: Tensor) -> Tensor:
        means = [reduce(image, "b c h w -> b 1 c", "mean") for image in (y, x)]
        return torch.stack(means, dim=-1)

    def init(x: Tensor, mode: Mode) -> tuple[Tree, Tree, Tensor]:
        p1, s1, y = branch.init(x, mode)
        p2, s2, x = shortcut.init(x, mode)
        p3, s3, factor = decide.init(picture(y, x), mode)
        return {**p1, **p2, **p3}, {**s1, **s2, **s3}, factor * y + x

    def apply(params: Tree, state: Tree, x: Tensor, mode: Mode) -> tuple[Tensor, Tree]:
        y, state = branch.apply(params, state, x, mode)
        x, state = shortcut.apply(params, state, x, mode)
        factor, state = decide.apply(params, state, picture(y, x), mode)
        return factor * y + x, state

    return Layer(init, apply, branch.names | shortcut.names | decide.names)


def residual(inputs: int, width: int, stride: int, branch: Layer, reduction: int) -> Layer:
    """`purecnn.zoo.preactresnet.residual` with competition between branch and shortcut."""
    first = serial(norm1=batch_norm(), relu1=relu)
    if stride == 1 and inputs == width:
        return competing(serial(first, branch), identity, width, reduction)
    return serial(first, competing(branch, named("shortcut", conv(width, 1, stride, init=he)), width, reduction))


def cmpe_se_wideresnet_cifar(
    depths: Sequence[int],
    *,
    widths: Sequence[int] = (16, 32, 64),
    width: int = 10,
    reduction: int = 16,
    num_classes: int = 10,
    dropout: float = 0.0,
) -> Layer:
    """Wide ResNet with competition in every block.

    Args:
        depths: blocks of each stage.
        widths: channels of each stage, before the factor; the first is also the stem's.
        width: factor for the channels, k in the Wide ResNet paper.
        reduction: ratio of a block's channels to its gate's hidden units, and to the number of pictures.
        num_classes: outputs of the head.
        dropout: rate between the two convolutions of a block.
    """
    inputs, widths = widths[0], [width * channels for channels in widths]
    block = partial(residual, reduction=reduction)
    return serial(
        stem=serial(conv=conv(inputs, 3, init=he)),
        **stages(partial(branch, dropout=dropout), inputs, widths, depths, block),
        head=serial(global_avg_pool, linear=linear(num_classes)),
    )


VARIANTS = {
    "cmpe_se_wideresnet28_10_cifar": Variant(
        cmpe_se_wideresnet_cifar,
        PAPER,
        {"depths": (4, 4, 4)},
        32,
        published=Published(3.58, "test error", "CIFAR-10", "authors' repository, 1x1 pair-view"),
    ),
}
