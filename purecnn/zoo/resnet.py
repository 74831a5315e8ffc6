"""ResNet, and its wider and grouped descendants Wide ResNet and ResNeXt.

    He, Zhang, Ren, Sun. Deep Residual Learning for Image Recognition. CVPR 2016, arXiv:1512.03385.
    Xie, Girshick, Dollar, Tu, He. Aggregated Residual Transformations for Deep Neural Networks. CVPR 2017,
    arXiv:1611.05431.
    Zagoruyko, Komodakis. Wide Residual Networks. BMVC 2016, arXiv:1605.07146.

One function builds all three, because ResNeXt and the ImageNet Wide ResNet differ from ResNet only in the width
and the groups of a bottleneck's middle convolution.

Deviations from the paper, as in torchvision: the stride of a bottleneck is on the 3x3 convolution ("v1.5"), in the
paper on the first 1x1; He initialisation uses the fan-out, in the paper the fan-in (see `paper_law`).
"""

from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor

from purecnn import layers
from purecnn.initializers import Initializer, kaiming_normal
from purecnn.layer import Layer, Mode, add, numbered, serial
from purecnn.layers import batch_norm, conv, global_avg_pool, linear, max_pool, relu
from purecnn.paper import Group, Paper, Published, Variant
from purecnn.tree import Tree

RESNET = Paper(
    "Deep Residual Learning for Image Recognition",
    "He, Zhang, Ren, Sun",
    2015,
    "arXiv:1512.03385",
    groups=(Group.DEPTH, Group.MULTI_PATH),
    in_survey=True,
)
RESNEXT = Paper(
    "Aggregated Residual Transformations for Deep Neural Networks",
    "Xie, Girshick, Dollar, Tu, He",
    2016,
    "arXiv:1611.05431",
    groups=(Group.DEPTH, Group.WIDTH),
    in_survey=True,
)
WIDE = Paper(
    "Wide Residual Networks", "Zagoruyko, Komodakis", 2016, "arXiv:1605.07146", groups=(Group.WIDTH,), in_survey=True
)

he = kaiming_normal("fan_out")


def projection(width: int, stride: int, init: Initializer = he) -> Layer:
    """The shortcut of section 3.3, option B: the identity, or a 1x1 convolution where the shape changes."""
    change = serial(conv=conv(width, 1, stride, init=init), norm=batch_norm())

    def start(x: Tensor, mode: Mode) -> tuple[Tree, Tree, Tensor]:
        return ({}, {}, x) if stride == 1 and x.shape[1] == width else change.init(x, mode)

    def apply(params: Tree, state: Tree, x: Tensor, mode: Mode) -> tuple[Tensor, Tree]:
        return change.apply(params, state, x, mode) if params else (x, state)

    return Layer(start, apply, change.names)


def bottleneck(
    widths: tuple[int, int, int], strides: tuple[int, int] = (1, 1), *, groups: int = 1, init: Initializer = he
) -> Layer:
    """The branch of figure 5, right: 1x1, 3x3, 1x1.

    Args:
        widths: output channels of the three convolutions.
        strides: strides of the first two.
        groups: groups of the 3x3.
        init: initialisation of the weights.
    """
    return serial(
        conv1=conv(widths[0], 1, strides[0], init=init), norm1=batch_norm(), relu1=relu,
        conv2=conv(widths[1], 3, strides[1], groups=groups, init=init), norm2=batch_norm(), relu2=relu,
        conv3=conv(widths[2], 1, init=init), norm3=batch_norm(),
    )  # fmt: skip


def residual(branch: Layer, shortcut: Layer) -> Layer:
    """The end of a block: the sum of branch and shortcut, then a ReLU."""
    return serial(add(branch, shortcut=shortcut), relu)


def stages(block: Callable[[int, int], Layer], depths: Sequence[int]) -> dict[str, Layer]:
    """Table 1: ``block(width, stride)``; the width starts at 64 and doubles where the image is halved."""
    return {
        f"stage{i + 1}": numbered(*(block(64 << i, 2 if i and not j else 1) for j in range(depth)))
        for i, depth in enumerate(depths)
    }


def stem(init: Initializer = he) -> Layer:
    """Table 1: a 7x7 convolution and a pool, each with stride 2."""
    return serial(conv=conv(64, 7, 2, init=init), norm=batch_norm(), relu=relu, pool=max_pool(3, 2, 1))


def network(
    block: Callable[[int, int], Layer],
    depths: Sequence[int],
    *,
    num_classes: int = 1000,
    dropout: float = 0.0,
    init: Initializer = he,
) -> Layer:
    """The network of table 1 with blocks of any kind, so that a new residual network is one expression.

    >>> from purecnn.layers import stochastic_depth
    >>> from purecnn.zoo.senet import excited
    >>> def seresnext_with_stochastic_depth(w, stride):
    ...     branch = bottleneck((2 * w, 2 * w, 4 * w), (1, stride), groups=32)
    ...     return residual(stochastic_depth(excited(branch, 4 * w, 16), 0.2), projection(4 * w, stride))
    >>> layer = network(seresnext_with_stochastic_depth, (3, 4, 6, 3))

    Args:
        block: ``block(width, stride)``.
        depths: blocks in each stage.
        num_classes: outputs of the head.
        dropout: rate before the head.
        init: initialisation of the stem's weights.
    """
    head = serial(global_avg_pool, layers.dropout(dropout), linear=linear(num_classes))
    return serial(stem=stem(init), **stages(block, depths), head=head)


def resnet(
    block: Literal["basic", "bottleneck"],
    depths: Sequence[int],
    *,
    num_classes: int = 1000,
    groups: int = 1,
    width_per_group: int = 64,
) -> Layer:
    """Table 1 of the paper.

    Args:
        block: of figure 5: ``"basic"`` on the left, for ResNet-18 and 34, or ``"bottleneck"`` on the right.
        depths: blocks in each stage.
        num_classes: outputs of the head.
        groups: cardinality (ResNeXt); of bottlenecks only.
        width_per_group: channels of a group in the first stage's bottlenecks; 128 doubles the width (Wide ResNet).

    Raises:
        ValueError: if there is no such block, or basic blocks are to have other groups or widths.
    """
    if block == "basic" and (groups, width_per_group) != (1, 64):
        raise ValueError(f"a basic block has groups=1 and width_per_group=64, found {groups} and {width_per_group}")

    def basic(width: int, stride: int) -> Layer:
        branch = serial(
            conv1=conv(width, 3, stride, init=he), norm1=batch_norm(), relu1=relu,
            conv2=conv(width, 3, init=he), norm2=batch_norm(),
        )  # fmt: skip
        return residual(branch, projection(width, stride))

    def deep(width: int, stride: int) -> Layer:
        inner = width * width_per_group // 64 * groups
        branch = bottleneck((inner, inner, 4 * width), (1, stride), groups=groups)
        return residual(branch, projection(4 * width, stride))

    blocks = {"basic": basic, "bottleneck": deep}
    if block not in blocks:
        raise ValueError(f"block is 'basic' or 'bottleneck', found {block!r}")
    return network(blocks[block], depths, num_classes=num_classes)


def paper_law(path: str, shape: tuple[int, ...]) -> Initializer | float | None:
    """Section 3.4 of the paper: He initialisation with fan-in; torchvision uses the fan-out."""
    return kaiming_normal("fan_in") if len(shape) == 4 else None


def _variant(block: str, *depths: int, paper: Paper = RESNET, error: float | None = None, **settings: int) -> Variant:
    published = Published(error, "top-1 error", "ImageNet", "authors' repository, one crop") if error else None
    all_settings = {"block": block, "depths": depths, **settings}
    return Variant(resnet, paper, all_settings, paper_law=paper_law, published=published)


VARIANTS = {
    "resnet18": _variant("basic", 2, 2, 2, 2),
    "resnet34": _variant("basic", 3, 4, 6, 3),
    "resnet50": _variant("bottleneck", 3, 4, 6, 3),
    "resnet101": _variant("bottleneck", 3, 4, 23, 3),
    "resnet152": _variant("bottleneck", 3, 8, 36, 3),
    "wide_resnet50_2": _variant("bottleneck", 3, 4, 6, 3, paper=WIDE, error=21.9, width_per_group=128),
    "wide_resnet101_2": _variant("bottleneck", 3, 4, 23, 3, paper=WIDE, width_per_group=128),
    "resnext50_32x4d": _variant("bottleneck", 3, 4, 6, 3, paper=RESNEXT, error=22.2, groups=32, width_per_group=4),
    "resnext101_32x8d": _variant("bottleneck", 3, 4, 23, 3, paper=RESNEXT, groups=32, width_per_group=8),
    "resnext101_64x4d": _variant("bottleneck", 3, 4, 23, 3, paper=RESNEXT, error=20.4, groups=64, width_per_group=4),
}
