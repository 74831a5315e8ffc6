"""VGG: depth from 3x3 convolutions alone.

    Simonyan, Zisserman. Very Deep Convolutional Networks for Large-Scale Image Recognition. ICLR 2015,
    arXiv:1409.1556.

Deviations from the paper, as in torchvision: the convolutions use He initialisation instead of starting from a
trained shallower network; they keep their biases in the variants with batch normalisation (which are not in the
paper); an adaptive average pool before the first fully-connected layer accepts images of any size from 32 pixels
up.
"""

from collections.abc import Sequence

from purecnn import layers
from purecnn.initializers import Initializer, kaiming_normal, normal
from purecnn.layer import Layer, serial
from purecnn.layers import adaptive_avg_pool, conv, flatten, linear, max_pool, relu
from purecnn.paper import Group, Paper, Published, Variant

PAPER = Paper(
    "Very Deep Convolutional Networks for Large-Scale Image Recognition",
    "Simonyan, Zisserman",
    2014,
    "arXiv:1409.1556",
    groups=(Group.SPATIAL,),
    in_survey=True,
)

he = kaiming_normal("fan_out")
gauss = normal(0.01)


def block(depth: int, width: int, batch_norm: bool) -> Layer:
    """``depth`` 3x3 convolutions, then a pool that halves the image."""
    steps: dict[str, Layer] = {}
    for i in range(1, depth + 1):
        steps[f"conv{i}"] = conv(width, 3, bias=True, init=he, bias_init=0.0)
        if batch_norm:
            steps[f"norm{i}"] = layers.batch_norm()
        steps[f"relu{i}"] = relu
    return serial(**steps, pool=max_pool(2, 2))


def vgg(
    depths: Sequence[int],
    *,
    widths: Sequence[int] = (64, 128, 256, 512, 512),
    batch_norm: bool = False,
    num_classes: int = 1000,
    dropout: float = 0.5,
) -> Layer:
    """Table 1 of the paper. The first block is the stem; the two hidden fully-connected layers are a stage.

    Args:
        depths: convolutions in each block.
        widths: channels of each block.
        batch_norm: add batch normalisation after each convolution.
        num_classes: outputs of the head.
        dropout: rate before the second and the third fully-connected layer.
    """
    stem, *stages = (block(depth, width, batch_norm) for depth, width in zip(depths, widths, strict=True))
    hidden = serial(
        adaptive_avg_pool(7), flatten,
        linear1=linear(4096, init=gauss, bias_init=0.0), relu1=relu, dropout1=layers.dropout(dropout),
        linear2=linear(4096, init=gauss, bias_init=0.0), relu2=relu,
    )  # fmt: skip
    return serial(
        stem=stem,
        **{f"stage{i}": stage for i, stage in enumerate([*stages, hidden], start=1)},
        head=serial(layers.dropout(dropout), linear=linear(num_classes, init=gauss, bias_init=0.0)),
    )


def paper_law(path: str, shape: tuple[int, ...]) -> Initializer | float | None:
    """Section 3.1 of the paper: weights from a normal distribution of variance 0.01, biases zero."""
    return None if ".norm" in path else normal(0.1) if len(shape) > 1 else 0.0


DEPTHS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


def one_scale(error: float) -> Published:
    """A result of Table 3: the best of a configuration when tested at a single scale."""
    return Published(error, "top-1 error", "ImageNet", "Table 3, one scale")


ERRORS = {11: 29.6, 13: 28.7, 16: 25.6, 19: 25.5}

VARIANTS = {
    f"vgg{number}{suffix}": Variant(
        vgg,
        PAPER,
        {"depths": depths, "batch_norm": bool(suffix)},
        paper_law=paper_law,
        published=None if suffix else one_scale(ERRORS[number]),
    )
    for number, depths in DEPTHS.items()
    for suffix in ("", "_bn")
}
