"""MnasNet: an architecture found by a search that measures latency on a phone.

    Tan, Chen, Pang, Vasudevan, Sandler, Howard, Le. MnasNet: Platform-Aware Neural Architecture Search for Mobile.
    CVPR 2019, arXiv:1807.11626.

This is MnasNet-B1, without squeeze-and-excitation, as in torchvision. Deviations from the paper, as in torchvision: the
momentum of batch normalisation is 0.0003 (0.01 in the paper and its authors' code, written there as 0.99), and its eps
is PyTorch's default (0.001 in that code); the last convolution keeps its 1280 channels at every width; and the head's
weights are drawn from a uniform distribution.
"""

from purecnn import layers
from purecnn.initializers import variance_scaling
from purecnn.layer import Layer, numbered, serial
from purecnn.layers import batch_norm, conv_norm, global_avg_pool, identity, linear, relu
from purecnn.paper import Group, Paper, Variant
from purecnn.zoo.mobilenet_v2 import divisible, he, inverted_residual

PAPER = Paper(
    "MnasNet: Platform-Aware Neural Architecture Search for Mobile",
    "Tan, Chen, Pang, Vasudevan, Sandler, Howard, Le",
    2018,
    "arXiv:1807.11626",
    groups=(Group.MOBILE, Group.SEARCH),
)

# Expansion, kernel, channels, blocks and first stride of each stage after the first.
STAGES = ((3, 3, 24, 3, 2), (3, 5, 40, 3, 2), (6, 5, 80, 3, 2), (6, 3, 96, 2, 1), (6, 5, 192, 4, 2), (6, 3, 320, 1, 1))


def mnasnet(*, width: float = 1.0, num_classes: int = 1000, dropout: float = 0.2) -> Layer:
    """Figure 7 of the paper, without squeeze-and-excitation: a separable convolution, then six searched stages.

    Args:
        width: factor for all channels except those of the last convolution.
        num_classes: outputs of the head.
        dropout: rate before the head.
    """
    norm = batch_norm(momentum=1 - 0.9997)
    stem, inputs = divisible(32 * width), divisible(16 * width)
    stages = {
        "stage1": serial(
            depthwise=conv_norm(stem, 3, groups=stem, init=he, norm=norm),
            project=conv_norm(inputs, 1, init=he, norm=norm, act=identity),
        )
    }
    for i, (expansion, kernel, channels, depth, stride) in enumerate(STAGES, start=2):
        blocks, out = [], divisible(channels * width)
        for j in range(depth):
            step = 1 if j else stride
            blocks.append(inverted_residual(inputs, out, kernel, step, expansion * inputs, norm=norm, act=relu))
            inputs = out
        stages[f"stage{i}"] = numbered(*blocks)
    draw = variance_scaling(1.0, "fan_out", "uniform")
    return serial(
        stem=conv_norm(stem, 3, 2, init=he, norm=norm),
        **stages,
        stage8=conv_norm(1280, 1, init=he, norm=norm),
        head=serial(global_avg_pool, layers.dropout(dropout), linear=linear(num_classes, init=draw, bias_init=0.0)),
    )


VARIANTS = {
    f"mnasnet{name}": Variant(mnasnet, PAPER, {"width": width})
    for name, width in {"0_5": 0.5, "0_75": 0.75, "1_0": 1.0, "1_3": 1.3}.items()
}
