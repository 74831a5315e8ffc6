"""Dual Path Network: each block adds to some channels, as in ResNet, and appends new ones, as in DenseNet.

    Chen, Li, Xiao, Jin, Yan, Feng. Dual Path Networks. NIPS 2017, arXiv:1707.01629.

A sum reuses features without more width; appended channels are new features that no sum blurs. Here a pre-activated
ResNeXt bottleneck outputs a few channels more than the sum takes, and these are appended. A feature map consists of the
residual channels, whose number is constant within a stage, followed by the dense channels, whose number grows; a block
sees both.

No deviations from the authors' code in MXNet. It does not specify the initialisation; here it is He initialisation with
fan-in. The head is a 1x1 convolution of the pooled features, as in timm and pytorchcv.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from purecnn.initializers import kaiming_normal
from purecnn.layer import Layer, Mode, named, numbered, serial
from purecnn.layers import adaptive_avg_pool, batch_norm, conv, flatten, identity, max_pool, relu
from purecnn.paper import Group, Paper, Published, Variant
from purecnn.tree import Tree

PAPER = Paper(
    "Dual Path Networks",
    "Chen, Li, Xiao, Jin, Yan, Feng",
    2017,
    "arXiv:1707.01629",
    groups=(Group.MULTI_PATH,),
)

he = kaiming_normal("fan_in")


def norm() -> Layer:
    """Batch normalisation."""
    return batch_norm(eps=1e-3)


def dual(shortcut: Layer, branch: Layer, width: int) -> Layer:
    """The end of a block: the first ``width`` channels of both outputs are added, the others are concatenated."""

    def join(x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([x[:, :width] + y[:, :width], x[:, width:], y[:, width:]], dim=1)

    def init(x: Tensor, mode: Mode) -> tuple[Tree, Tree, Tensor]:
        p1, s1, y1 = shortcut.init(x, mode)
        p2, s2, y2 = branch.init(x, mode)
        return {**p1, **p2}, {**s1, **s2}, join(y1, y2)

    def apply(params: Tree, state: Tree, x: Tensor, mode: Mode) -> tuple[Tensor, Tree]:
        y1, state = shortcut.apply(params, state, x, mode)
        y2, state = branch.apply(params, state, x, mode)
        return join(y1, y2), state

    return Layer(init, apply, shortcut.names | branch.names)


def block(width: int, growth: int, inner: int, groups: int, stride: int = 1, *, first: bool = False) -> Layer:
    """Figure 2d: a pre-activated bottleneck sees both paths; in a stage's first block a 1x1 convolution makes both.

    Args:
        width: channels of the residual path.
        growth: channels that the block adds to the dense path; the first block also starts it with twice as many.
        inner: channels of the 3x3 convolution.
        groups: groups of the 3x3 convolution.
        stride: stride of the 3x3 convolution.
        first: whether this is the first block of a stage.
    """
    start = serial(norm=norm(), relu=relu, conv=conv(width + 2 * growth, 1, stride, init=he))
    branch = serial(
        norm1=norm(), relu1=relu, conv1=conv(inner, 1, init=he),
        norm2=norm(), relu2=relu, conv2=conv(inner, 3, stride, groups=groups, init=he),
        norm3=norm(), relu3=relu, conv3=conv(width + growth, 1, init=he),
    )  # fmt: skip
    return dual(named("shortcut", start) if first else identity, branch, width)


def dpn(
    depths: Sequence[int],
    growths: Sequence[int],
    *,
    width: int = 256,
    inner: int = 96,
    groups: int = 32,
    stem_width: int = 64,
    stem_kernel: int = 7,
    num_classes: int = 1000,
) -> Layer:
    """Table 1 of the paper.

    Args:
        depths: blocks of each stage.
        growths: channels that each block of a stage adds to the dense path.
        width: channels of the residual path in the first stage; each stage doubles them.
        inner: channels of the 3x3 convolutions in the first stage; each stage doubles them.
        groups: groups of the 3x3 convolutions.
        stem_width: channels of the first convolution.
        stem_kernel: kernel size of the first convolution, pixels.
        num_classes: outputs of the head.
    """
    stages: dict[str, Layer] = {}
    for i, (depth, growth) in enumerate(zip(depths, growths, strict=True)):
        row = (width << i, growth, inner << i, groups)
        begin = block(*row, 2 if i else 1, first=True)
        stages[f"stage{i + 1}"] = numbered(begin, *(block(*row) for _ in range(depth - 1)))
    last = f"stage{len(depths)}"
    stages[last] = serial(stages[last], norm=norm(), relu=relu)
    stem = serial(conv=conv(stem_width, stem_kernel, 2, init=he), norm=norm(), relu=relu, pool=max_pool(3, 2, 1))
    head = serial(adaptive_avg_pool(1), conv=conv(num_classes, 1, bias=True, init=he, bias_init=0.0), flatten=flatten)
    return serial(stem=stem, **stages, head=head)


def _variant(error: float, note: str = "", **settings: int | Sequence[int]) -> Variant:
    source = f"authors' repository, one crop{note}"
    return Variant(dpn, PAPER, settings, published=Published(error, "top-1 error", "ImageNet", source))


VARIANTS = {
    "dpn68": _variant(
        23.57, depths=(3, 4, 12, 3), growths=(16, 32, 32, 64), width=64, inner=128, stem_width=10, stem_kernel=3
    ),
    "dpn92": _variant(20.73, depths=(3, 4, 20, 3), growths=(16, 32, 24, 128)),
    "dpn98": _variant(
        20.15, depths=(3, 6, 20, 3), growths=(16, 32, 32, 128), inner=160, groups=40, stem_width=96
    ),
    "dpn131": _variant(
        19.93, depths=(4, 8, 28, 3), growths=(16, 32, 32, 128), inner=160, groups=40, stem_width=128
    ),
    "dpn107": _variant(
        19.75, ", first trained on ImageNet-5k",
        depths=(4, 8, 20, 3), growths=(20, 64, 64, 128), inner=200, groups=50, stem_width=128,
    ),
}  # fmt: skip
