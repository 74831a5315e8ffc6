"""MnasNet-A1: the network found when the search could also choose squeeze-and-excitation.

    Tan, Chen, Pang, Vasudevan, Sandler, Howard, Le. MnasNet: Platform-Aware Neural Architecture Search for Mobile.
    CVPR 2019, arXiv:1807.11626.

`purecnn.zoo.mnasnet` has B1, without it. Squeeze-and-excitation is used in three of the seven stages and squeezes to a
quarter of the block's *input* channels; kernels, expansions and depths differ between stages, as the search chose them.
Deviations from the paper, as in B1: He initialisation, and momentum and eps of batch normalisation.
"""

from collections.abc import Sequence

from purecnn import layers
from purecnn.initializers import variance_scaling
from purecnn.layer import Layer, numbered, serial
from purecnn.layers import batch_norm, conv_norm, global_avg_pool, identity, linear, relu, squeeze_excitation
from purecnn.paper import Published, Variant
from purecnn.zoo.mnasnet import PAPER
from purecnn.zoo.mobilenet_v2 import divisible, he, inverted_residual

Stage = tuple[int, int, int, int, int, bool]
"""Expansion, kernel, channels, number of blocks, first stride, and whether blocks have squeeze-and-excitation."""

A1: Sequence[Stage] = (
    (6, 3, 24, 2, 2, False), (3, 5, 40, 3, 2, True), (6, 3, 80, 4, 2, False),
    (6, 3, 112, 2, 1, True), (6, 5, 160, 3, 2, True), (6, 3, 320, 1, 1, False),
)  # fmt: skip


def mnasnet_a1(
    *, stages: Sequence[Stage] = A1, width: float = 1.0, num_classes: int = 1000, dropout: float = 0.2
) -> Layer:
    """Figure 7 of the paper: a separable convolution, then six searched stages; the last 1x1 is a stage.

    Args:
        stages: see `Stage`.
        width: factor for all channels except those of the last convolution.
        num_classes: outputs of the head.
        dropout: rate before the head.
    """
    norm = batch_norm(momentum=1 - 0.9997)
    stem, inputs = divisible(32 * width), divisible(16 * width)
    parts = {
        "stem": conv_norm(stem, 3, 2, init=he, norm=norm),
        "stage1": serial(
            depthwise=conv_norm(stem, 3, groups=stem, init=he, norm=norm),
            project=conv_norm(inputs, 1, init=he, norm=norm, act=identity),
        ),
    }
    for i, (expansion, kernel, channels, depth, stride, excite) in enumerate(stages, start=2):
        blocks, out = [], divisible(channels * width)
        for j in range(depth):
            step, expanded = 1 if j else stride, expansion * inputs
            gate = squeeze_excitation(expanded, max(1, inputs // 4), init=he) if excite else None
            blocks.append(inverted_residual(inputs, out, kernel, step, expanded, norm=norm, act=relu, gate=gate))
            inputs = out
        parts[f"stage{i}"] = numbered(*blocks)
    parts[f"stage{len(stages) + 2}"] = conv_norm(1280, 1, init=he, norm=norm)
    draw = variance_scaling(1.0, "fan_out", "uniform")
    linear_head = linear(num_classes, init=draw, bias_init=0.0)
    return serial(**parts, head=serial(global_avg_pool, layers.dropout(dropout), linear=linear_head))


VARIANTS = {
    "mnasnet_a1": Variant(
        mnasnet_a1, PAPER, published=Published(75.2, "top-1 accuracy", "ImageNet", "authors' repository")
    )
}
