"""EfficientNet: one searched network, scaled in width, depth and resolution together; and version 2.

    Tan, Le. EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks. ICML 2019, arXiv:1905.11946.
    Tan, Le. EfficientNetV2: Smaller Models and Faster Training. ICML 2021, arXiv:2104.00298.

One function builds both: version 2 has "fused" blocks in its early stages, in which one full convolution replaces the
expansion and the depthwise convolution. Squeeze-and-excitation squeezes to a quarter of the block's *input* channels.
Deviations, as in torchvision: stochastic depth rescales in training; B0 to B4 use PyTorch's defaults for eps and
momentum of batch normalisation.
"""

import math
from collections.abc import Sequence
from typing import Literal

from purecnn import layers
from purecnn.initializers import variance_scaling
from purecnn.layer import Layer, add, numbered, serial
from purecnn.layers import batch_norm, conv_norm, global_avg_pool, identity, linear, silu, squeeze_excitation
from purecnn.paper import Group, Paper, Published, Variant
from purecnn.zoo.mobilenet_v2 import divisible, he, inverted_residual

V1 = Paper(
    "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks",
    "Tan, Le",
    2019,
    "arXiv:1905.11946",
    groups=(Group.SEARCH, Group.SCALING),
)
V2 = Paper(
    "EfficientNetV2: Smaller Models and Faster Training",
    "Tan, Le",
    2021,
    "arXiv:2104.00298",
    groups=(Group.SEARCH, Group.SCALING, Group.TRAINING_SPEED),
)

Stage = tuple[Literal["mb", "fused"], int, int, int, int, int]
"""Kind of block, expansion, kernel, first stride, channels and number of blocks: a row of the papers' tables."""

B: Sequence[Stage] = (
    ("mb", 1, 3, 1, 16, 1), ("mb", 6, 3, 2, 24, 2), ("mb", 6, 5, 2, 40, 2), ("mb", 6, 3, 2, 80, 3),
    ("mb", 6, 5, 1, 112, 3), ("mb", 6, 5, 2, 192, 4), ("mb", 6, 3, 1, 320, 1),
)  # fmt: skip
S: Sequence[Stage] = (
    ("fused", 1, 3, 1, 24, 2), ("fused", 4, 3, 2, 48, 4), ("fused", 4, 3, 2, 64, 4),
    ("mb", 4, 3, 2, 128, 6), ("mb", 6, 3, 1, 160, 9), ("mb", 6, 3, 2, 256, 15),
)  # fmt: skip
M: Sequence[Stage] = (
    ("fused", 1, 3, 1, 24, 3), ("fused", 4, 3, 2, 48, 5), ("fused", 4, 3, 2, 80, 5),
    ("mb", 4, 3, 2, 160, 7), ("mb", 6, 3, 1, 176, 14), ("mb", 6, 3, 2, 304, 18), ("mb", 6, 3, 1, 512, 5),
)  # fmt: skip
L: Sequence[Stage] = (
    ("fused", 1, 3, 1, 32, 4), ("fused", 4, 3, 2, 64, 7), ("fused", 4, 3, 2, 96, 7),
    ("mb", 4, 3, 2, 192, 10), ("mb", 6, 3, 1, 224, 19), ("mb", 6, 3, 2, 384, 25), ("mb", 6, 3, 1, 640, 7),
)  # fmt: skip


def compound_scaling(
    phi: float, *, depth: float = 1.2, width: float = 1.1, resolution: float = 1.15
) -> tuple[float, float, float]:
    """Section 3.3: factors for width, depth and image size; each step of ``phi`` about doubles the multiplications.

    ``depth * width**2 * resolution**2`` is about 2. The published B1 to B7 follow this rule only loosely: they were
    rounded by hand.

    >>> width, depth, resolution = compound_scaling(2)
    >>> round(width, 2), round(depth, 2), round(224 * resolution)
    (1.21, 1.44, 296)
    """
    return width**phi, depth**phi, resolution**phi


def fused(inputs: int, width: int, kernel: int, stride: int, expanded: int, *, norm: Layer, drop: float) -> Layer:
    """Figure 2 of version 2: a full convolution expands, a 1x1 projects; without expansion, one full convolution."""
    if expanded == inputs:
        main = serial(expand=conv_norm(width, kernel, stride, init=he, norm=norm, act=silu))
    else:
        main = serial(
            expand=conv_norm(expanded, kernel, stride, init=he, norm=norm, act=silu),
            project=conv_norm(width, 1, init=he, norm=norm, act=identity),
        )
    return add(identity, layers.stochastic_depth(main, drop)) if stride == 1 and inputs == width else main


def efficientnet(
    width: float = 1.0,
    depth: float = 1.0,
    *,
    stages: Sequence[Stage] = B,
    stem_width: int = 32,
    last_width: int | None = None,
    num_classes: int = 1000,
    dropout: float = 0.2,
    stochastic_depth: float = 0.2,
    norm_eps: float = 1e-5,
    norm_momentum: float = 0.1,
) -> Layer:
    """Table 1 of the paper (table 4 of version 2); the last 1x1 convolution is a stage.

    Args:
        width: factor for all channels; see `compound_scaling`.
        depth: factor for the number of blocks.
        stages: see `Stage`.
        stem_width: channels of the first convolution, before the factor.
        last_width: channels of the last 1x1 convolution; by default four times those of the stage before.
        num_classes: outputs of the head.
        dropout: rate before the head.
        stochastic_depth: block ``i`` of ``n``, counted from 0, drops its branch with rate ``stochastic_depth * i / n``.
        norm_eps, norm_momentum: eps and momentum of batch normalisation.
    """
    norm = batch_norm(norm_eps, norm_momentum)
    inputs = divisible(stem_width * width)
    depths = [math.ceil(count * depth) for *_, count in stages]
    parts = {"stem": conv_norm(inputs, 3, 2, init=he, norm=norm, act=silu)}
    done = 0
    for i, (kind, expansion, kernel, first_stride, channels, _) in enumerate(stages):
        blocks, out = [], divisible(channels * width)
        for j in range(depths[i]):
            stride, drop = 1 if j else first_stride, stochastic_depth * done / sum(depths)
            expanded = divisible(inputs * expansion)
            if kind == "fused":
                blocks.append(fused(inputs, out, kernel, stride, expanded, norm=norm, drop=drop))
            else:
                gate = squeeze_excitation(expanded, max(1, inputs // 4), act=silu, init=he, bias_init=0.0)
                blocks.append(
                    inverted_residual(
                        inputs, out, kernel, stride, expanded, norm=norm, act=silu, gate=gate, drop=drop
                    )
                )  # fmt: skip
            inputs, done = out, done + 1
        parts[f"stage{i + 1}"] = numbered(*blocks)
    parts[f"stage{len(stages) + 1}"] = conv_norm(last_width or 4 * inputs, 1, init=he, norm=norm, act=silu)
    draw = variance_scaling(1 / 3, "fan_out", "uniform")
    linear_head = linear(num_classes, init=draw, bias_init=0.0)
    return serial(**parts, head=serial(global_avg_pool, layers.dropout(dropout), linear=linear_head))


def _b(
    accuracy: float,
    width: float,
    depth: float,
    image_size: int,
    dropout: float,
    eps: float = 1e-5,
    momentum: float = 0.1,
) -> Variant:
    settings = {
        "width": width, "depth": depth, "dropout": dropout, "norm_eps": eps, "norm_momentum": momentum,
    }  # fmt: skip
    published = Published(accuracy, "top-1 accuracy", "ImageNet", "Table 2, last version")
    return Variant(efficientnet, V1, settings, image_size, published=published)


def _v2(accuracy: float, stages: Sequence[Stage], image_size: int, dropout: float) -> Variant:
    settings = {
        "stages": stages, "stem_width": stages[0][4], "last_width": 1280, "dropout": dropout, "norm_eps": 1e-3,
    }  # fmt: skip
    published = Published(accuracy, "top-1 accuracy", "ImageNet", "authors' repository")
    return Variant(efficientnet, V2, settings, image_size, published=published)


VARIANTS = {
    "efficientnet_b0": _b(77.1, 1.0, 1.0, 224, 0.2),
    "efficientnet_b1": _b(79.1, 1.0, 1.1, 240, 0.2),
    "efficientnet_b2": _b(80.1, 1.1, 1.2, 260, 0.3),
    "efficientnet_b3": _b(81.6, 1.2, 1.4, 300, 0.3),
    "efficientnet_b4": _b(82.9, 1.4, 1.8, 380, 0.4),
    "efficientnet_b5": _b(83.6, 1.6, 2.2, 456, 0.4, 1e-3, 0.01),
    "efficientnet_b6": _b(84.0, 1.8, 2.6, 528, 0.5, 1e-3, 0.01),
    "efficientnet_b7": _b(84.3, 2.0, 3.1, 600, 0.5, 1e-3, 0.01),
    "efficientnet_v2_s": _v2(83.9, S, 384, 0.2),
    "efficientnet_v2_m": _v2(85.2, M, 480, 0.3),
    "efficientnet_v2_l": _v2(85.7, L, 480, 0.4),
}
