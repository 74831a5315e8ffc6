"""DenseNet for CIFAR, with and without bottlenecks and compression.

    Huang, Liu, van der Maaten, Weinberger. Densely Connected Convolutional Networks. CVPR 2017, arXiv:1608.06993.

Three dense blocks work at 32, 16 and 8 pixels. The plain network has one 3x3 convolution per layer, a stem of 16
channels, and transitions that keep the width. DenseNet-BC has a 1x1 before the 3x3, a stem of twice the growth, and
transitions that halve the width. By default there is no dropout, as in the paper with augmented images. No deviations
from the paper. (pytorchcv's DenseNet of 40 layers without bottlenecks halves the width too, hence its 599,050
parameters.)
"""

from collections.abc import Sequence

from purecnn import layers
from purecnn.layer import Layer, concat, numbered, serial
from purecnn.layers import batch_norm, conv, global_avg_pool, identity, linear, relu
from purecnn.paper import Published, Variant
from purecnn.zoo.densenet import PAPER, dense_layer, he, transition


def plain_layer(growth: int, dropout: float) -> Layer:
    """Section 3: normalisation, ReLU, 3x3; then concatenation."""
    main = serial(
        norm1=batch_norm(), relu1=relu, conv1=conv(growth, 3, init=he), dropout=layers.dropout(dropout)
    )  # fmt: skip
    return concat(identity, main)


def densenet_cifar(
    depths: Sequence[int],
    *,
    growth: int = 12,
    bottlenecks: bool = False,
    num_classes: int = 10,
    dropout: float = 0.0,
) -> Layer:
    """Section 3, "Implementation Details".

    Args:
        depths: dense layers in each block.
        growth: number of channels that each layer adds, k in the paper.
        bottlenecks: use bottlenecks and compression (DenseNet-BC).
        num_classes: outputs of the head.
        dropout: rate after each dense layer.
    """
    layer = dense_layer if bottlenecks else plain_layer
    width = 2 * growth if bottlenecks else 16
    parts: dict[str, Layer] = {"stem": serial(conv=conv(width, 3, init=he))}
    for i, depth in enumerate(depths, start=1):
        block = numbered(*(layer(growth, dropout) for _ in range(depth)))
        width += depth * growth
        if i < len(depths):
            width //= 2 if bottlenecks else 1
            parts[f"stage{i}"] = serial(block, transition=transition(width))
        else:
            parts[f"stage{i}"] = serial(block, norm=batch_norm(), relu=relu)
    return serial(**parts, head=serial(global_avg_pool, linear=linear(num_classes, bias_init=0.0)))


VARIANTS = {
    "densenet40_k12_cifar": Variant(
        densenet_cifar,
        PAPER,
        {"depths": (12, 12, 12)},
        32,
        published=Published(5.24, "test error", "CIFAR-10", "authors' repository, with augmentation"),
    ),
    "densenetbc100_k12_cifar": Variant(
        densenet_cifar,
        PAPER,
        {"depths": (16, 16, 16), "bottlenecks": True},
        32,
        published=Published(4.51, "test error", "CIFAR-10", "authors' repository, with augmentation"),
    ),
}
