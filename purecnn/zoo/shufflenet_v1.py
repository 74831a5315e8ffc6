"""ShuffleNet: grouped 1x1 convolutions, and a channel shuffle that exchanges information between the groups.

    Zhang, Zhou, Lin, Sun. ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices. CVPR
    2018, arXiv:1707.01083.

In a bottleneck with a depthwise 3x3 convolution, nearly all multiplications are in the 1x1 convolutions. Groups make
these cheaper, so a network of the same cost can be wider. But grouped convolutions alone would make as many separate
networks as there are groups: hence the shuffle.
"""

from collections.abc import Sequence

from einops import rearrange

from purecnn.layer import Layer, add, concat, numbered, serial
from purecnn.layers import avg_pool, conv_norm, global_avg_pool, identity, linear, max_pool, relu, stateless
from purecnn.paper import Group, Paper, Published, Variant

PAPER = Paper(
    "ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices",
    "Zhang, Zhou, Lin, Sun",
    2017,
    "arXiv:1707.01083",
    groups=(Group.MOBILE,),
)


def shuffle(groups: int) -> Layer:
    """Figure 1c: each group passes an equal part of its channels to every group."""
    return stateless(lambda x: rearrange(x, "b (g c) h w -> b (c g) h w", g=groups))


def branch(width: int, inner: int, stride: int, groups: int, first_groups: int) -> Layer:
    """Grouped 1x1, shuffle, depthwise 3x3, grouped 1x1; only the first has a ReLU."""
    return serial(
        reduce=conv_norm(inner, 1, groups=first_groups), shuffle=shuffle(groups),
        depthwise=conv_norm(inner, 3, stride, groups=inner, act=identity),
        expand=conv_norm(width, 1, groups=groups, act=identity),
    )  # fmt: skip


def unit(width: int, groups: int) -> Layer:
    """Figure 2b: a unit with a residual connection."""
    return serial(add(identity, branch(width, width // 4, 1, groups, groups)), relu)


def downsampling(inputs: int, width: int, groups: int, first_groups: int) -> Layer:
    """Figure 2c: the pooled input is concatenated instead of added."""
    main = branch(width - inputs, width // 4, 2, groups, first_groups)
    return serial(concat(main, avg_pool(3, 2, 1)), relu)


def shufflenet_v1(
    groups: int,
    widths: Sequence[int],
    *,
    depths: Sequence[int] = (4, 8, 4),
    stem_width: int = 24,
    num_classes: int = 1000,
) -> Layer:
    """Table 1 of the paper. The first 1x1 convolution of stage 1 is not grouped, as its input has few channels.

    Args:
        groups: groups of the 1x1 convolutions.
        widths: channels of each stage; a quarter of each must be divisible by ``groups``.
        depths: units of each stage.
        stem_width: channels of the first convolution.
        num_classes: outputs of the head.
    """
    parts = {"stem": serial(conv_norm(stem_width, 3, 2), pool=max_pool(3, 2, 1))}
    inputs = stem_width
    for i, (width, depth) in enumerate(zip(widths, depths, strict=True), start=1):
        first = downsampling(inputs, width, groups, 1 if i == 1 else groups)
        parts[f"stage{i}"] = numbered(first, *(unit(width, groups) for _ in range(depth - 1)))
        inputs = width
    return serial(**parts, head=serial(global_avg_pool, linear=linear(num_classes)))


VARIANTS = {
    "shufflenet_g3": Variant(
        shufflenet_v1,
        PAPER,
        {"groups": 3, "widths": (240, 480, 960)},
        published=Published(32.6, "top-1 error", "ImageNet", "quoted in arXiv:1709.01507, Table 3"),
    )
}
