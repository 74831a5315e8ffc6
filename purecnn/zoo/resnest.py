"""ResNeSt: several versions of each channel compete for their weight in a sum.

    Zhang, Wu, Zhang, Zhu, Lin, Zhang, Sun, He, Mueller, Manmatha, Li, Smola. ResNeSt: Split-Attention Networks. 2020,
    arXiv:2004.08955.

Squeeze-and-excitation weights each channel by itself. Here the 3x3 convolution of a bottleneck makes each channel
``radix`` times, in groups that do not see each other, and a softmax weights these versions against each other. The rest
is ResNet-D: the stem has three 3x3 convolutions, and where the image shrinks, it is averaged instead of subsampled, on
the branch and on the shortcut.

Weights are drawn as in the authors' PyTorch code. The published weights were trained in Gluon from another
initialisation, in which the last normalisation of each block starts at zero: see `paper_law`. Deviation from the paper,
as in timm: no DropBlock.

The gate normalises vectors with one value per channel, so a batch of one image cannot be trained with its own
statistics.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

from purecnn.initializers import Initializer, kaiming_normal
from purecnn.layer import Layer, multiply, serial
from purecnn.layers import (
    avg_pool,
    batch_norm,
    conv,
    conv_norm,
    global_avg_pool,
    identity,
    linear,
    max_pool,
    relu,
    sigmoid,
    stateless,
)
from purecnn.paper import Group, Paper, Published, Variant
from purecnn.zoo.resnet import he, projection, residual, stages

PAPER = Paper(
    "ResNeSt: Split-Attention Networks",
    "Zhang, Wu, Zhang, Zhu, Lin, Zhang, Sun, He, Mueller, Manmatha, Li, Smola",
    2020,
    "arXiv:2004.08955",
    groups=(Group.MULTI_PATH, Group.ATTENTION),
)


def shares(radix: int, groups: int) -> Layer:
    """A softmax over the splits of each channel; with a single split, a sigmoid as in SENet."""

    def softmax(x: Tensor) -> Tensor:
        splits = rearrange(x, "b (group split c) 1 1 -> b split (group c) 1 1", group=groups, split=radix)
        return rearrange(splits.softmax(dim=1), "b split c 1 1 -> b (split c) 1 1")

    return sigmoid if radix == 1 else stateless(softmax)


def split_attention(width: int, radix: int, groups: int) -> Layer:
    """Figure 2: a 3x3 convolution to ``radix`` splits of ``width`` channels, and their weighted sum.

    Args:
        width: channels of each split, and of the output.
        radix: number of splits.
        groups: cardinality; each group has its own splits.
    """
    squeeze = max(width * radix // 4, 32)
    add_splits = stateless(lambda x: reduce(x, "b (split c) h w -> b c h w", "sum", split=radix))
    weights = serial(
        add_splits, stateless(lambda x: reduce(x, "b c h w -> b c 1 1", "mean")),
        squeeze=conv(squeeze, 1, groups=groups, bias=True, init=he), norm=batch_norm(groups=1), relu=relu,
        expand=conv(radix * width, 1, groups=groups, bias=True, init=he), shares=shares(radix, groups),
    )  # fmt: skip
    return serial(
        conv=conv(radix * width, 3, groups=radix * groups, init=he), norm=batch_norm(), relu=relu,
        gate=multiply(identity, weights), sum=add_splits,
    )  # fmt: skip


def shortcut(width: int, stride: int) -> Layer:
    """The shortcut of ResNet-D: 2x2 average pooling where the image shrinks, then the 1x1 convolution."""
    means = stateless(lambda x: F.avg_pool2d(x, 2, 2, ceil_mode=True, count_include_pad=False))
    return serial(means, projection(width, 1)) if stride == 2 else projection(width, 1)


def resnest(
    depths: Sequence[int],
    *,
    radix: int = 2,
    groups: int = 1,
    width_per_group: int = 64,
    stem_width: int = 32,
    num_classes: int = 1000,
) -> Layer:
    """ResNet-D with split attention in its bottlenecks.

    Args:
        depths: blocks in each stage.
        radix: number of splits of each channel.
        groups: cardinality.
        width_per_group: channels of a group in the first stage's bottleneck.
        stem_width: channels of the first two convolutions; the third has twice as many.
        num_classes: outputs of the head.
    """

    def block(width: int, stride: int) -> Layer:
        inner = width * width_per_group // 64 * groups
        branch = serial(
            conv1=conv(inner, 1, init=he), norm1=batch_norm(), relu1=relu,
            attention=split_attention(inner, radix, groups), pool=avg_pool(3, 2, 1) if stride == 2 else identity,
            conv3=conv(4 * width, 1, init=he), norm3=batch_norm(),
        )  # fmt: skip
        return residual(branch, shortcut(4 * width, stride))

    return serial(
        stem=serial(
            conv1=conv_norm(stem_width, 3, 2, init=he), conv2=conv_norm(stem_width, 3, init=he),
            conv3=conv_norm(2 * stem_width, 3, init=he), pool=max_pool(3, 2, 1),
        ),
        **stages(block, depths),
        head=serial(global_avg_pool, linear=linear(num_classes)),
    )  # fmt: skip


def paper_law(path: str, shape: tuple[int, ...]) -> Initializer | float | None:
    """The authors' training script: He initialisation with fan-in; biases and each block's last scale are zero."""
    if path.endswith((".norm3.weight", ".bias")):
        return 0.0
    return kaiming_normal("fan_in") if len(shape) > 1 else None


VARIANTS = {
    "resnest50": Variant(
        resnest,
        PAPER,
        {"depths": (3, 4, 6, 3)},
        paper_law=paper_law,
        published=Published(81.03, "top-1 accuracy", "ImageNet", "authors' repository, one crop"),
    ),
    "resnest101": Variant(
        resnest,
        PAPER,
        {"depths": (3, 4, 23, 3), "stem_width": 64},
        image_size=256,
        paper_law=paper_law,
        published=Published(82.83, "top-1 accuracy", "ImageNet", "authors' repository, one crop, 256 pixels"),
    ),
}
