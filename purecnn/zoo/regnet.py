"""RegNet: a family of networks described by four numbers, found by designing a space instead of one network.

    Radosavovic, Prateek Kosaraju, Girshick, He, Dollar. Designing Network Design Spaces. CVPR 2020, arXiv:2003.13678.

The widths of the blocks grow linearly and are rounded to a geometric sequence. RegNetY is RegNetX with
squeeze-and-excitation, which squeezes to a quarter of the block's *input* channels.
"""

import math
from itertools import groupby

from purecnn.initializers import normal
from purecnn.layer import Layer, add, numbered, serial
from purecnn.layers import conv_norm, global_avg_pool, identity, linear, relu, squeeze_excitation
from purecnn.paper import Group, Paper, Published, Variant
from purecnn.zoo.mobilenet_v2 import divisible
from purecnn.zoo.resnet import he, projection

PAPER = Paper(
    "Designing Network Design Spaces",
    "Radosavovic, Prateek Kosaraju, Girshick, He, Dollar",
    2020,
    "arXiv:2003.13678",
    groups=(Group.DESIGN,),
)


def quantized_linear(depth: int, w0: int, wa: float, wm: float) -> list[tuple[int, int]]:
    """Equations 2 to 4: width and number of blocks of each stage.

    Block ``j`` should have ``w0 + wa * j`` channels. It gets ``w0 * wm**s`` with the nearest integer ``s``, rounded to
    a multiple of 8.

    Args:
        depth: number of blocks.
        w0: channels of the first block.
        wa: slope of the line.
        wm: ratio of successive allowed widths.

    >>> quantized_linear(16, 48, 27.89, 2.09)
    [(48, 1), (104, 3), (208, 6), (440, 6)]

    Raises:
        ValueError: if ``depth`` < 1, ``w0`` is not a positive multiple of 8, ``wa`` < 0 or ``wm`` <= 1.
    """
    if depth < 1 or wa < 0 or w0 <= 0 or w0 % 8 or wm <= 1:
        raise ValueError(
            "RegNet wants depth >= 1, a multiple of 8 as w0, wa >= 0 and wm > 1, "
            f"found depth={depth}, w0={w0}, wa={wa}, wm={wm}"
        )
    steps = [round(math.log((w0 + wa * j) / w0) / math.log(wm)) for j in range(depth)]
    widths = [round(w0 * wm**step / 8) * 8 for step in steps]
    return [(width, len(list(blocks))) for width, blocks in groupby(widths)]


def block(inputs: int, width: int, stride: int, group_width: int, se_ratio: float) -> Layer:
    """Figure 4: ResNeXt's block, but its middle is as wide as its ends."""
    steps = {
        "conv1": conv_norm(width, 1, init=he),
        "conv2": conv_norm(width, 3, stride, groups=width // group_width, init=he),
    }
    if se_ratio:
        steps["gate"] = squeeze_excitation(width, round(se_ratio * inputs), init=he)
    main = serial(**steps, conv3=conv_norm(width, 1, init=he, act=identity))
    return serial(add(main, shortcut=projection(width, stride)), relu)


def regnet(
    depth: int,
    w0: int,
    wa: float,
    wm: float,
    group_width: int,
    *,
    se_ratio: float = 0.0,
    stem_width: int = 32,
    num_classes: int = 1000,
) -> Layer:
    """Figure 3 of the paper.

    Args:
        depth, w0, wa, wm: see `quantized_linear`.
        group_width: channels of a group in the 3x3 convolutions; a stage's width is rounded to a multiple of it.
        se_ratio: squeeze-and-excitation squeezes to this share of a block's input channels; 0 for none.
        stem_width: channels of the first convolution.
        num_classes: outputs of the head.
    """
    inputs, stages = stem_width, {}
    for i, (channels, count) in enumerate(quantized_linear(depth, w0, wa, wm), start=1):
        group = min(group_width, channels)
        width, blocks = divisible(channels, group), []
        for j in range(count):
            blocks.append(block(inputs, width, 1 if j else 2, group, se_ratio))
            inputs = width
        stages[f"stage{i}"] = numbered(*blocks)
    return serial(
        stem=conv_norm(stem_width, 3, 2, init=he),
        **stages,
        head=serial(global_avg_pool, linear=linear(num_classes, init=normal(0.01), bias_init=0.0)),
    )


def _variant(
    error: float | None, depth: int, w0: int, wa: float, wm: float, group_width: int, se_ratio: float
) -> Variant:
    settings = {"depth": depth, "w0": w0, "wa": wa, "wm": wm, "group_width": group_width, "se_ratio": se_ratio}
    published = Published(error, "top-1 error", "ImageNet", "authors' repository") if error is not None else None
    return Variant(regnet, PAPER, settings, published=published)


VARIANTS = {
    "regnet_x_400mf": _variant(27.3, 22, 24, 24.48, 2.54, 16, 0.0),
    "regnet_x_800mf": _variant(24.8, 16, 56, 35.73, 2.28, 16, 0.0),
    "regnet_x_1_6gf": _variant(23.0, 18, 80, 34.01, 2.25, 24, 0.0),
    "regnet_x_3_2gf": _variant(21.7, 25, 88, 26.31, 2.25, 48, 0.0),
    "regnet_x_8gf": _variant(20.7, 23, 80, 49.56, 2.88, 120, 0.0),
    "regnet_x_16gf": _variant(20.0, 22, 216, 55.59, 2.1, 128, 0.0),
    "regnet_x_32gf": _variant(19.5, 23, 320, 69.86, 2.0, 168, 0.0),
    "regnet_y_400mf": _variant(25.9, 16, 48, 27.89, 2.09, 8, 0.25),
    "regnet_y_800mf": _variant(23.7, 14, 56, 38.84, 2.4, 16, 0.25),
    "regnet_y_1_6gf": _variant(22.0, 27, 48, 20.71, 2.65, 24, 0.25),
    "regnet_y_3_2gf": _variant(21.0, 21, 80, 42.63, 2.66, 24, 0.25),
    "regnet_y_8gf": _variant(20.1, 17, 192, 76.82, 2.19, 56, 0.25),
    "regnet_y_16gf": _variant(19.6, 18, 200, 106.23, 2.48, 112, 0.25),
    "regnet_y_32gf": _variant(19.0, 20, 232, 115.89, 2.53, 232, 0.25),
    "regnet_y_128gf": _variant(None, 27, 456, 160.83, 2.52, 264, 0.25),
}
