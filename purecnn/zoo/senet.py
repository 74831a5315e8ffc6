"""SENet: a residual block that weights its channels.

    Hu, Shen, Albanie, Sun, Wu. Squeeze-and-Excitation Networks. CVPR 2018, arXiv:1709.01507.

Squeeze: average each channel. Excite: two small layers give each channel a factor between 0 and 1. The gate is on the
branch, before the sum, and any residual block can use it: see `excited`. SENet-154, with which the authors won ILSVRC
2017, is a wide ResNeXt-152 with a stem of three 3x3 convolutions, half as many channels in the first 1x1 of each block,
3x3 convolutions in the shortcuts that shrink the image, and dropout.

Deviations: as in timm and pytorchcv, the stride of a bottleneck is on the 3x3 and the stem's pool has padding; in the
authors' Caffe files the stride of SE-ResNet-50 is on the first 1x1, and the pool reaches over the border instead.
"""

from collections.abc import Sequence

from purecnn import layers
from purecnn.layer import Layer, serial
from purecnn.layers import (
    batch_norm,
    conv,
    conv_norm,
    global_avg_pool,
    linear,
    max_pool,
    squeeze_excitation,
)
from purecnn.paper import Group, Paper, Published, Variant
from purecnn.zoo.resnet import bottleneck, he, network, projection, residual, stages

PAPER = Paper(
    "Squeeze-and-Excitation Networks",
    "Hu, Shen, Albanie, Sun, Wu",
    2017,
    "arXiv:1709.01507",
    groups=(Group.FEATURE_MAPS,),
    in_survey=True,
)


def excited(branch: Layer, width: int, reduction: int) -> Layer:
    """Figure 3: a residual block's branch, whose ``width`` channels a gate of ``width / reduction`` units scales."""
    return serial(branch, gate=squeeze_excitation(width, width // reduction))


def seresnet(
    depths: Sequence[int],
    *,
    groups: int = 1,
    width_per_group: int = 64,
    reduction: int = 16,
    num_classes: int = 1000,
    dropout: float = 0.0,
) -> Layer:
    """Table 1 of the paper, middle and right columns.

    Args:
        depths: blocks in each stage.
        groups: cardinality.
        width_per_group: channels of a group in the first stage's bottlenecks.
        reduction: ratio of a block's channels to its gate's hidden units, r in the paper.
        num_classes: outputs of the head.
        dropout: rate before the head; in the paper only SENet-154 has dropout.
    """

    def block(width: int, stride: int) -> Layer:
        inner = width * width_per_group // 64 * groups
        branch = bottleneck((inner, inner, 4 * width), (1, stride), groups=groups)
        return residual(excited(branch, 4 * width, reduction), projection(4 * width, stride))

    return network(block, depths, num_classes=num_classes, dropout=dropout)


def senet(
    depths: Sequence[int],
    *,
    groups: int = 64,
    reduction: int = 16,
    num_classes: int = 1000,
    dropout: float = 0.2,
) -> Layer:
    """SENet-154.

    Args:
        depths: blocks in each stage.
        groups: cardinality.
        reduction: ratio of a block's channels to its gate's hidden units.
        num_classes: outputs of the head.
        dropout: rate before the head.
    """

    def block(width: int, stride: int) -> Layer:
        branch = bottleneck((2 * width, 4 * width, 4 * width), (1, stride), groups=groups)
        wide = serial(conv=conv(4 * width, 3, stride, init=he), norm=batch_norm())
        return residual(excited(branch, 4 * width, reduction), projection(4 * width, 1) if stride == 1 else wide)

    return serial(
        stem=serial(
            conv1=conv_norm(64, 3, 2, init=he), conv2=conv_norm(64, 3, init=he), conv3=conv_norm(128, 3, init=he),
            pool=max_pool(3, 2, 1),
        ),
        **stages(block, depths),
        head=serial(global_avg_pool, layers.dropout(dropout), linear=linear(num_classes)),
    )  # fmt: skip


VARIANTS = {
    "seresnet50": Variant(
        seresnet,
        PAPER,
        {"depths": (3, 4, 6, 3)},
        published=Published(23.29, "top-1 error", "ImageNet", "Table 2, one crop"),
    ),
    "seresnext50_32x4d": Variant(
        seresnet,
        PAPER,
        {"depths": (3, 4, 6, 3), "groups": 32, "width_per_group": 4},
        published=Published(21.1, "top-1 error", "ImageNet", "Table 2, one crop"),
    ),
    "senet154": Variant(
        senet,
        PAPER,
        {"depths": (3, 8, 36, 3)},
        published=Published(18.68, "top-1 error", "ImageNet", "Table 8, one crop, 224 pixels"),
    ),
}
