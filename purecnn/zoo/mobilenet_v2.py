"""MobileNet v2: residual blocks that are narrow at the ends and wide in the middle.

    Sandler, Howard, Zhu, Zhmoginov, Chen. MobileNetV2: Inverted Residuals and Linear Bottlenecks. CVPR 2018,
    arXiv:1801.04381.

The block of this paper has a depthwise 3x3 convolution and no activation after its last convolution. MnasNet, MobileNet
v3 and EfficientNet use it too. Deviation from the paper, as in torchvision: He initialisation.
"""

from collections.abc import Sequence

from purecnn import layers
from purecnn.initializers import kaiming_normal, normal
from purecnn.layer import Layer, add, numbered, serial
from purecnn.layers import batch_norm, conv_norm, global_avg_pool, identity, linear, relu6, stochastic_depth
from purecnn.paper import Group, Paper, Published, Variant

PAPER = Paper(
    "MobileNetV2: Inverted Residuals and Linear Bottlenecks",
    "Sandler, Howard, Zhu, Zhmoginov, Chen",
    2018,
    "arXiv:1801.04381",
    groups=(Group.MOBILE,),
)

he = kaiming_normal("fan_out")


def divisible(width: float, divisor: int = 8) -> int:
    """The multiple of ``divisor`` nearest to a width, but at most a tenth below it.

    >>> divisible(83), divisible(84.0), divisible(3)
    (80, 88, 8)
    """
    rounded = max(divisor, int(width + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * width else rounded + divisor


def inverted_residual(
    inputs: int,
    width: int,
    kernel: int,
    stride: int,
    expanded: int,
    *,
    norm: Layer,
    act: Layer,
    gate: Layer | None = None,
    drop: float = 0.0,
) -> Layer:
    """Figure 4d: 1x1 to ``expanded`` channels, depthwise convolution, 1x1 to ``width`` channels without activation.

    Args:
        inputs: input channels; if they equal ``width`` and the stride is 1, there is a residual connection.
        width: output channels.
        kernel: kernel size of the depthwise convolution, pixels.
        stride: stride of the depthwise convolution.
        expanded: channels in between; if they equal ``inputs``, the first convolution is left out.
        norm: normalisation after each convolution.
        act: activation after the first two.
        gate: a layer before the last convolution, such as `purecnn.layers.squeeze_excitation`.
        drop: rate of stochastic depth.
    """
    steps: dict[str, Layer] = {}
    if expanded != inputs:
        steps["expand"] = conv_norm(expanded, 1, init=he, norm=norm, act=act)
    steps["depthwise"] = conv_norm(expanded, kernel, stride, groups=expanded, init=he, norm=norm, act=act)
    if gate is not None:
        steps["gate"] = gate
    main = serial(**steps, project=conv_norm(width, 1, init=he, norm=norm, act=identity))
    return add(identity, stochastic_depth(main, drop)) if stride == 1 and inputs == width else main


def mobilenet_v2(
    *,
    stages: Sequence[tuple[int, int, int, int]] = (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
    ),
    width: float = 1.0,
    num_classes: int = 1000,
    dropout: float = 0.2,
) -> Layer:  # fmt: skip
    """Table 2 of the paper; the last 1x1 convolution is a stage.

    Args:
        stages: expansion, channels, number of blocks and first stride of each stage, the paper's t, c, n and s.
        width: factor for all channels (but the last convolution has at least 1280).
        num_classes: outputs of the head.
        dropout: rate before the head.
    """
    norm = batch_norm()
    inputs = divisible(32 * width)
    parts = {"stem": conv_norm(inputs, 3, 2, init=he, act=relu6)}
    for i, (expansion, channels, depth, stride) in enumerate(stages, start=1):
        blocks, out = [], divisible(channels * width)
        for j in range(depth):
            step = 1 if j else stride
            blocks.append(inverted_residual(inputs, out, 3, step, expansion * inputs, norm=norm, act=relu6))
            inputs = out
        parts[f"stage{i}"] = numbered(*blocks)
    parts[f"stage{len(stages) + 1}"] = conv_norm(divisible(1280 * max(1.0, width)), 1, init=he, act=relu6)
    linear_head = linear(num_classes, init=normal(0.01), bias_init=0.0)
    return serial(**parts, head=serial(global_avg_pool, layers.dropout(dropout), linear=linear_head))


VARIANTS = {
    "mobilenet_v2": Variant(
        mobilenet_v2, PAPER, published=Published(72.0, "top-1 accuracy", "ImageNet", "authors' repository")
    )
}
