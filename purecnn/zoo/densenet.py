"""DenseNet: every layer sees the feature maps of all layers before it.

    Huang, Liu, van der Maaten, Weinberger. Densely Connected Convolutional Networks. CVPR 2017, arXiv:1608.06993.

These are the variants with bottlenecks and compression (DenseNet-BC) for ImageNet, table 1.
"""

from collections.abc import Sequence

from purecnn import layers
from purecnn.initializers import kaiming_normal
from purecnn.layer import Layer, concat, numbered, serial
from purecnn.layers import avg_pool, batch_norm, conv, global_avg_pool, identity, linear, max_pool, relu
from purecnn.paper import Group, Paper, Published, Variant

PAPER = Paper(
    "Densely Connected Convolutional Networks",
    "Huang, Liu, van der Maaten, Weinberger",
    2016,
    "arXiv:1608.06993",
    groups=(Group.MULTI_PATH,),
    in_survey=True,
)

he = kaiming_normal("fan_in")


def dense_layer(growth: int, dropout: float) -> Layer:
    """Section 3: normalisation, ReLU, 1x1 to four times the growth; the same with 3x3; then concatenation."""
    return concat(
        identity,
        serial(
            norm1=batch_norm(), relu1=relu, conv1=conv(4 * growth, 1, init=he),
            norm2=batch_norm(), relu2=relu, conv2=conv(growth, 3, init=he),
            dropout=layers.dropout(dropout),
        ),
    )  # fmt: skip


def transition(width: int) -> Layer:
    """Between two dense blocks: changes to ``width`` channels and halves the image."""
    return serial(norm=batch_norm(), relu=relu, conv=conv(width, 1, init=he), pool=avg_pool(2, 2))


def densenet(
    depths: Sequence[int],
    *,
    growth: int = 32,
    stem_width: int = 64,
    num_classes: int = 1000,
    dropout: float = 0.0,
) -> Layer:
    """Table 1 of the paper.

    Args:
        depths: dense layers in each block.
        growth: number of channels that each layer adds, k in the paper.
        stem_width: channels of the first convolution.
        num_classes: outputs of the head.
        dropout: rate after each dense layer.
    """
    stages: dict[str, Layer] = {}
    width = stem_width
    for i, depth in enumerate(depths, start=1):
        block = numbered(*(dense_layer(growth, dropout) for _ in range(depth)))
        width += depth * growth
        if i < len(depths):
            width //= 2
            stages[f"stage{i}"] = serial(block, transition=transition(width))
        else:
            stages[f"stage{i}"] = serial(block, norm=batch_norm(), relu=relu)
    return serial(
        stem=serial(conv=conv(stem_width, 7, 2, init=he), norm=batch_norm(), relu=relu, pool=max_pool(3, 2, 1)),
        **stages,
        head=serial(global_avg_pool, linear=linear(num_classes, bias_init=0.0)),
    )


VARIANTS = {
    "densenet121": Variant(
        densenet,
        PAPER,
        {"depths": (6, 12, 24, 16)},
        published=Published(25.0, "top-1 error", "ImageNet", "authors' repository, one crop"),
    ),
    "densenet169": Variant(
        densenet,
        PAPER,
        {"depths": (6, 12, 32, 32)},
        published=Published(23.6, "top-1 error", "ImageNet", "authors' repository, one crop"),
    ),
    "densenet201": Variant(
        densenet,
        PAPER,
        {"depths": (6, 12, 48, 32)},
        published=Published(22.5, "top-1 error", "ImageNet", "authors' repository, one crop"),
    ),
    "densenet161": Variant(
        densenet,
        PAPER,
        {"depths": (6, 12, 36, 24), "growth": 48, "stem_width": 96},
        published=Published(22.2, "top-1 error", "ImageNet", "authors' repository, one crop"),
    ),
}
