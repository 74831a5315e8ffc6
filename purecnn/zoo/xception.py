"""Xception: an Inception module taken to its extreme, in which each channel is convolved by itself.

    Chollet. Xception: Deep Learning with Depthwise Separable Convolutions. CVPR 2017, arXiv:1610.02357.

The step beyond Inception: correlations between channels and those in space are looked at apart, by a 1x1 convolution
and a depthwise 3x3 one (here in the other order, and without activation between them). The modules are residual, and
36 convolutions in a row replace the zoo of branches. Deviations: He's initialisation, which the paper leaves open;
batch normalisation with PyTorch's eps.
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
    """A 3x3 convolution of each channel by itself, then 1x1; normalised once, at the end."""
    return serial(
        depthwise=conv(inputs, 3, groups=inputs, init=he), pointwise=conv(width, 1, init=he), norm=batch_norm()
    )


def module(widths: Sequence[int], stride: int, *, rectify: bool = True) -> Layer:
    """Figure 5: separable convolutions from width to width, rectified before each; then a pool, and the sum.

    Args:
        widths: the channels that come in, then those that each convolution gives.
        stride: of the pool; at 1 there is none.
        rectify: before the first convolution.
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
