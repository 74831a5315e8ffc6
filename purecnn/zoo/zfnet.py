"""ZFNet: AlexNet, improved by visualising its features.

    Zeiler, Fergus. Visualizing and Understanding Convolutional Networks. ECCV 2014, arXiv:1311.2901.

What it added: a deconvolutional network that shows which input activates a feature map. It revealed dead filters and
aliasing in AlexNet's first layers, so ZFNet has smaller kernels and strides there: 7x7 with stride two instead of 11x11
with stride four. There is one tower, so no groups. 62,357,608 parameters; the variant with wider last convolutions has
107,627,624.

The paper says "all weights are initialized to 10^-2"; equal weights would stay equal, so this is taken to be the
standard deviation of a normal distribution, as in AlexNet. Biases start at zero, as in the paper.

Deviations from the paper, as in pytorchcv: normalisation is across channels as in AlexNet, but alpha multiplies the
mean of the squares; the first convolution has a padding of one pixel, the second has none, and the pools' last window
reaches over the border.
"""

from collections.abc import Sequence

from purecnn.layer import Layer, serial
from purecnn.layers import conv, linear, max_pool, relu
from purecnn.paper import Group, Paper, Published, Variant
from purecnn.zoo.alexnet_2012 import gauss, hidden, local_response_norm

PAPER = Paper(
    "Visualizing and Understanding Convolutional Networks",
    "Zeiler, Fergus",
    2013,
    "arXiv:1311.2901",
    groups=(Group.SPATIAL,),
    in_survey=True,
)


def zfnet(
    *,
    widths: Sequence[int] = (96, 256, 384, 384, 256),
    hidden_width: int = 4096,
    num_classes: int = 1000,
    dropout: float = 0.5,
) -> Layer:
    """Figure 3 of the paper; the last layer is the head.

    Args:
        widths: channels of each convolution.
        hidden_width: units of each hidden fully-connected layer.
        num_classes: outputs of the head.
        dropout: rate after each hidden fully-connected layer.
    """

    def convolution(i: int, kernel: int, stride: int, padding: int) -> Layer:
        return conv(widths[i], kernel, stride, padding, bias=True, init=gauss, bias_init=0.0)

    norm, pool = local_response_norm(alpha=1e-4 / 5), max_pool(3, 2, ceil_mode=True)
    return serial(
        stem=serial(conv=convolution(0, 7, 2, 1), relu=relu, norm=norm, pool=pool),
        stage1=serial(conv=convolution(1, 5, 2, 0), relu=relu, norm=norm, pool=pool),
        stage2=serial(
            conv1=convolution(2, 3, 1, 1), relu1=relu,
            conv2=convolution(3, 3, 1, 1), relu2=relu,
            conv3=convolution(4, 3, 1, 1), relu3=relu, pool=pool,
        ),
        stage3=hidden(hidden_width, dropout, 0.0),
        head=serial(linear=linear(num_classes, init=gauss, bias_init=0.0)),
    )  # fmt: skip


VARIANTS = {
    "zfnet": Variant(zfnet, PAPER, published=Published(38.4, "top-1 error", "ImageNet", "Table 2, one network")),
    "zfnetb": Variant(
        zfnet,
        PAPER,
        {"widths": (96, 256, 512, 1024, 512)},
        published=Published(37.5, "top-1 error", "ImageNet", "Table 2, one network"),
    ),
}
