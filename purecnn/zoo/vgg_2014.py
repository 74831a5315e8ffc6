"""VGG's configurations A-LRN and C: the two columns of the paper's table that torchvision leaves out.

    Simonyan, Zisserman. Very Deep Convolutional Networks for Large-Scale Image Recognition. ICLR 2015,
    arXiv:1409.1556.

What they showed: A-LRN shows that AlexNet's local response normalisation does not improve a deep network; C shows that
depth helps even if the additional layers see only one pixel, but less than with 3x3 convolutions (D, which is VGG-16).
They have 132,863,336 and 133,638,952 parameters.

Deviations from the paper are those of `purecnn.zoo.vgg`: He initialisation of the convolutions, and an adaptive average
pool that accepts images of any size from 32 pixels up.
"""

from collections.abc import Sequence

from purecnn import layers
from purecnn.layer import Layer, serial
from purecnn.layers import adaptive_avg_pool, conv, flatten, linear, max_pool, relu
from purecnn.paper import Variant
from purecnn.zoo.alexnet_2012 import local_response_norm
from purecnn.zoo.vgg import PAPER, gauss, he, one_scale, paper_law


def block(width: int, kernels: Sequence[int], lrn: bool) -> Layer:
    """Convolutions with these kernel sizes, then a pool that halves the image; ``lrn`` normalises before the pool."""
    steps: dict[str, Layer] = {}
    for i, kernel in enumerate(kernels, start=1):
        steps[f"conv{i}"] = conv(width, kernel, bias=True, init=he, bias_init=0.0)
        steps[f"relu{i}"] = relu
    if lrn:
        steps["norm"] = local_response_norm()
    return serial(**steps, pool=max_pool(2, 2))


def vgg_2014(
    kernels: Sequence[Sequence[int]],
    *,
    lrn: bool = False,
    widths: Sequence[int] = (64, 128, 256, 512, 512),
    hidden_width: int = 4096,
    num_classes: int = 1000,
    dropout: float = 0.5,
) -> Layer:
    """Table 1 of the paper. The first block is the stem; the two hidden fully-connected layers are a stage.

    Args:
        kernels: kernel sizes of the convolutions in each block, pixels.
        lrn: add local response normalisation in the first block.
        widths: channels of each block.
        hidden_width: units of each hidden fully-connected layer.
        num_classes: outputs of the head.
        dropout: rate before the second and the third fully-connected layer.
    """
    stem, *stages = (
        block(width, sides, lrn and not i) for i, (width, sides) in enumerate(zip(widths, kernels, strict=True))
    )
    hidden = serial(
        adaptive_avg_pool(7), flatten,
        linear1=linear(hidden_width, init=gauss, bias_init=0.0), relu1=relu, dropout1=layers.dropout(dropout),
        linear2=linear(hidden_width, init=gauss, bias_init=0.0), relu2=relu,
    )  # fmt: skip
    return serial(
        stem=stem,
        **{f"stage{i}": stage for i, stage in enumerate([*stages, hidden], start=1)},
        head=serial(layers.dropout(dropout), linear=linear(num_classes, init=gauss, bias_init=0.0)),
    )


A = ((3,), (3,), (3, 3), (3, 3), (3, 3))
C = ((3, 3), (3, 3), (3, 3, 1), (3, 3, 1), (3, 3, 1))

VARIANTS = {
    "vgg11_lrn": Variant(vgg_2014, PAPER, {"kernels": A, "lrn": True}, paper_law=paper_law, published=one_scale(29.7)),
    "vgg16_1x1": Variant(vgg_2014, PAPER, {"kernels": C}, paper_law=paper_law, published=one_scale(27.3)),
}
