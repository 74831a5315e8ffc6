"""MobileNet v3: a searched network, trimmed by hand, with a cheaper swish activation.

    Howard, Sandler, Chu, Chen, Chen, Tan, Wang, Zhu, Pang, Vasudevan, Le, Adam. Searching for MobileNetV3. ICCV 2019,
    arXiv:1905.02244.

Deviations from the paper, as in torchvision: batch normalisation has eps 1e-3 and momentum 0.01; squeeze-and-excitation
squeezes to a quarter of the expanded channels, rounded to a multiple of 8; He initialisation.
"""

from collections.abc import Sequence

from purecnn import layers
from purecnn.initializers import normal
from purecnn.layer import Layer, numbered, serial
from purecnn.layers import batch_norm, conv_norm, global_avg_pool, hardsigmoid, hardswish, linear, relu
from purecnn.paper import Group, Paper, Published, Variant
from purecnn.zoo.mobilenet_v2 import divisible, he, inverted_residual

PAPER = Paper(
    "Searching for MobileNetV3",
    "Howard, Sandler, Chu, Chen, Chen, Tan, Wang, Zhu, Pang, Vasudevan, Le, Adam",
    2019,
    "arXiv:1905.02244",
    groups=(Group.MOBILE, Group.SEARCH),
)

Block = tuple[int, int, int, bool, str, int]
"""Kernel, expanded and output channels, squeeze-and-excitation, nonlinearity, stride: a row of tables 1 and 2."""

LARGE: Sequence[Sequence[Block]] = (
    ((3, 16, 16, False, "RE", 1),),
    ((3, 64, 24, False, "RE", 2), (3, 72, 24, False, "RE", 1)),
    ((5, 72, 40, True, "RE", 2), (5, 120, 40, True, "RE", 1), (5, 120, 40, True, "RE", 1)),
    (
        (3, 240, 80, False, "HS", 2), (3, 200, 80, False, "HS", 1), (3, 184, 80, False, "HS", 1),
        (3, 184, 80, False, "HS", 1), (3, 480, 112, True, "HS", 1), (3, 672, 112, True, "HS", 1),
    ),
    ((5, 672, 160, True, "HS", 2), (5, 960, 160, True, "HS", 1), (5, 960, 160, True, "HS", 1)),
)  # fmt: skip
SMALL: Sequence[Sequence[Block]] = (
    ((3, 16, 16, True, "RE", 2),),
    ((3, 72, 24, False, "RE", 2), (3, 88, 24, False, "RE", 1)),
    (
        (5, 96, 40, True, "HS", 2), (5, 240, 40, True, "HS", 1), (5, 240, 40, True, "HS", 1),
        (5, 120, 48, True, "HS", 1), (5, 144, 48, True, "HS", 1),
    ),
    ((5, 288, 96, True, "HS", 2), (5, 576, 96, True, "HS", 1), (5, 576, 96, True, "HS", 1)),
)  # fmt: skip


def mobilenet_v3(
    stages: Sequence[Sequence[Block]],
    hidden: int,
    *,
    width: float = 1.0,
    num_classes: int = 1000,
    dropout: float = 0.2,
) -> Layer:
    """Tables 1 and 2 of the paper; a new stage begins where the image shrinks.

    Args:
        stages: the blocks of each stage.
        hidden: outputs of the last stage: a 1x1 convolution, a global pool and a fully-connected layer.
        width: factor for all channels.
        num_classes: outputs of the head.
        dropout: rate before the head.
    """
    norm = batch_norm(eps=1e-3, momentum=0.01)
    inputs = divisible(16 * width)
    parts = {"stem": conv_norm(inputs, 3, 2, init=he, norm=norm, act=hardswish)}
    for i, rows in enumerate(stages, start=1):
        blocks = []
        for kernel, expansion, channels, excite, nonlinearity, stride in rows:
            expanded, out = divisible(expansion * width), divisible(channels * width)
            act, gate = {"RE": relu, "HS": hardswish}[nonlinearity], None
            if excite:
                reduced = divisible(expanded // 4)
                gate = layers.squeeze_excitation(expanded, reduced, gate=hardsigmoid, init=he, bias_init=0.0)
            blocks.append(inverted_residual(inputs, out, kernel, stride, expanded, norm=norm, act=act, gate=gate))
            inputs = out
        parts[f"stage{i}"] = numbered(*blocks)
    gauss = normal(0.01)
    parts[f"stage{len(stages) + 1}"] = serial(
        last=conv_norm(6 * inputs, 1, init=he, norm=norm, act=hardswish), pool=global_avg_pool,
        linear=linear(divisible(hidden * width), init=gauss, bias_init=0.0), act=hardswish,
    )  # fmt: skip
    return serial(**parts, head=serial(layers.dropout(dropout), linear=linear(num_classes, init=gauss, bias_init=0.0)))


VARIANTS = {
    "mobilenet_v3_large": Variant(
        mobilenet_v3,
        PAPER,
        {"stages": LARGE, "hidden": 1280},
        published=Published(75.2, "top-1 accuracy", "ImageNet", "authors' repository"),
    ),
    "mobilenet_v3_small": Variant(
        mobilenet_v3,
        PAPER,
        {"stages": SMALL, "hidden": 1024},
        published=Published(67.5, "top-1 accuracy", "ImageNet", "authors' repository"),
    ),
}
