"""Network in Network: small MLPs in place of linear filters, and no fully-connected layer.

    Lin, Chen, Yan. Network In Network. ICLR 2014, arXiv:1312.4400.

What it added: 1x1 convolutions, which turn a convolution into a multi-layer perceptron that slides over the image; and
global average pooling, which gives each class its own map. This is the network for CIFAR, 966,986 parameters.

Deviations from the paper, as in pytorchcv: pools have a padding of one pixel, whose zeros the average pool counts; He
initialisation. As in pytorchcv, the head ends in a ReLU, so with a high learning rate a new head can die.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from einops import rearrange

from purecnn import layers
from purecnn.initializers import kaiming_uniform
from purecnn.layer import Layer, serial
from purecnn.layers import avg_pool, conv, max_pool, relu, stateless
from purecnn.paper import Group, Paper, Published, Variant

PAPER = Paper("Network In Network", "Lin, Chen, Yan", 2013, "arXiv:1312.4400", groups=(Group.SPATIAL,))

he = kaiming_uniform("fan_in")

whole_avg_pool = stateless(lambda x: rearrange(F.avg_pool2d(x, x.shape[2:]), "b c 1 1 -> b c"))
"""`purecnn.layers.global_avg_pool`, but it sums in the order of pytorchcv's pools, so results are equal bit for bit."""


def mlpconv(kernel: int, widths: Sequence[int]) -> Layer:
    """Section 3.1: a convolution, then 1x1 convolutions, each followed by a ReLU."""
    steps: dict[str, Layer] = {}
    for i, width in enumerate(widths, start=1):
        steps[f"conv{i}"] = conv(width, kernel if i == 1 else 1, bias=True, init=he, bias_init=0.0)
        steps[f"relu{i}"] = relu
    return serial(**steps)


def nin_cifar(
    *,
    widths: Sequence[Sequence[int]] = ((192, 160, 96), (192, 192, 192), (192, 192)),
    num_classes: int = 10,
    dropout: float = 0.5,
) -> Layer:
    """Figure 2 of the paper; the last 1x1 convolution is the head.

    Args:
        widths: channels of the convolutions in each MLP.
        num_classes: outputs of the head.
        dropout: rate after the first and the second MLP.
    """
    first, second, third = (mlpconv(kernel, row) for kernel, row in zip((5, 5, 3), widths, strict=True))
    return serial(
        stem=serial(first, pool=max_pool(3, 2, 1), dropout=layers.dropout(dropout)),
        stage1=serial(second, pool=avg_pool(3, 2, 1), dropout=layers.dropout(dropout)),
        stage2=third,
        head=serial(conv=conv(num_classes, 1, bias=True, init=he, bias_init=0.0), relu=relu, pool=whole_avg_pool),
    )


VARIANTS = {
    "nin_cifar": Variant(
        nin_cifar,
        PAPER,
        image_size=32,
        published=Published(8.81, "test error", "CIFAR-10", "Table 1, with augmentation"),
    )
}
