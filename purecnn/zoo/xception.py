"""Xception: an extreme Inception module, in which each channel is convolved separately.

    Chollet. Xception: Deep Learning with Depthwise Separable Convolutions. CVPR 2017, arXiv:1610.02357.

The step beyond Inception: correlations between channels and spatial correlations are modelled separately, by a 1x1
convolution and a depthwise 3x3 convolution (here in the opposite order, and without activation between them). The
modules are residual, and a sequence of 36 convolutions replaces the many kinds of branches. Deviation: batch
normalisation has PyTorch's eps. The paper does not specify the initialisation; here it is He initialisation.
"""

from collections.abc import Sequence
from itertools import pairwise

from purecnn import layers
from purecnn.layer import Layer, add, numbered, serial
from purecnn.layers import batch_norm, conv, conv_norm, global_avg_pool, linear, max_pool, relu
from purecnn.paper import Group, Paper, Published, Variant
from purecnn.zoo.resnet import he, projection

PAPER = Paper(
    "Xception: Deep Learning with Depthwise Separable Convolutions",
    "Chollet",
    2016,
    "arXiv:1610.02357",
    groups=(Group.WIDTH,),
    in_survey=True,
)


def separable(inputs: int, width: int) -> Layer:
    """A depthwise 3x3 convolution, then 1x1; there is one normalisation, at the end."""
    return serial(
        depthwise=conv(inputs, 3, groups=inputs, init=he), pointwise=conv(width, 1, init=he), norm=batch_norm()
    )


def module(widths: Sequence[int], stride: int, *, rectify: bool = True) -> Layer:
    """Figure 5: separable convolutions, each after a ReLU; then a pool, and the sum with the shortcut.

    Args:
        widths: input channels, then the output channels of each convolution.
        stride: stride of the pool; with 1 there is no pool.
        rectify: whether there is a ReLU before the first convolution.
    """
    steps: dict[str, Layer] = {}
    for i, (inputs, width) in enumerate(pairwise(widths), start=1):
        if i > 1 or rectify:
            steps[f"relu{i}"] = relu
        steps[f"conv{i}"] = separable(inputs, width)
    if stride > 1:
        steps["pool"] = max_pool(3, stride, 1)
    return add(serial(**steps), shortcut=projection(widths[-1], stride))


def xception(
    *,
    stem_widths: Sequence[int] = (32, 64),
    entry_widths: Sequence[int] = (128, 256, 728),
    middle: int = 8,
    exit_widths: Sequence[int] = (1024, 1536, 2048),
    num_classes: int = 1000,
    dropout: float = 0.5,
) -> Layer:
    """Figure 5 of the paper: the entry flow, the middle flow (the end of stage 3), the exit flow.

    Args:
        stem_widths: channels of the two convolutions before the modules.
        entry_widths: channels of each module of the entry flow.
        middle: modules of the middle flow.
        exit_widths: channels of the exit flow's module and of the two convolutions after it.
        num_classes: outputs of the head.
        dropout: rate before the head.
    """
    first, inputs = stem_widths
    parts = {"stem": serial(conv1=conv_norm(first, 3, 2, 0, init=he), conv2=conv_norm(inputs, 3, 1, 0, init=he))}
    for i, width in enumerate(entry_widths, start=1):
        down = module((inputs, width, width), 2, rectify=i > 1)
        repeats = middle if i == len(entry_widths) else 0
        parts[f"stage{i}"] = numbered(down, *(module([width] * 4, 1) for _ in range(repeats)))
        inputs = width
    wide, wider, widest = exit_widths
    parts[f"stage{len(entry_widths) + 1}"] = serial(
        numbered(module((inputs, inputs, wide), 2)),
        conv1=separable(wide, wider), relu1=relu,
        conv2=separable(wider, widest), relu2=relu,
    )  # fmt: skip
    return serial(**parts, head=serial(global_avg_pool, layers.dropout(dropout), linear=linear(num_classes)))


VARIANTS = {
    "xception": Variant(
        xception,
        PAPER,
        image_size=299,
        published=Published(
            79.0,
            "top-1 accuracy",
            "ImageNet",
            "author's weights in Keras, one crop",
        ),
    )
}
