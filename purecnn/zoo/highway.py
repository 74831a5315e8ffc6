"""Highway networks: gates let a signal pass through many layers unchanged.

    Srivastava, Greff, Schmidhuber. Highway Networks. 2015, arXiv:1505.00387.
    Srivastava, Greff, Schmidhuber. Training Very Deep Networks. NIPS 2015, arXiv:1507.06228.

What it added: ``y = T * H(x) + (1 - T) * x``. The transform gate T is learned, and its biases start at -2, so at first
every layer passes its input on almost unchanged. Plain gradient descent could thus train tens of layers. A residual
network is a highway network without gates.

This is the 19-layer network for CIFAR, 2,256,838 parameters, from the authors' Caffe files
(github.com/flukeskywalker/highway-networks). What these call "xavier" is He initialisation in their version of Caffe.
Their first convolution sets 0.05 in a field that the Gaussian filler does not read, while the last layer sets it as the
standard deviation; here it is the standard deviation in both.
"""

from collections.abc import Sequence

from purecnn import layers
from purecnn.initializers import kaiming_normal, normal
from purecnn.layer import Layer, add, multiply, numbered, serial
from purecnn.layers import conv, global_avg_pool, identity, linear, max_pool, relu, sigmoid, stateless
from purecnn.paper import Group, Paper, Published, Variant

PAPER = Paper(
    "Highway Networks",
    "Srivastava, Greff, Schmidhuber",
    2015,
    "arXiv:1505.00387",
    groups=(Group.DEPTH, Group.MULTI_PATH),
    in_survey=True,
)

he = kaiming_normal("fan_in")

negative = stateless(lambda x: -x)


def highway(transform: Layer, gate: Layer) -> Layer:
    """Equation 3, ``T * H(x) + (1 - T) * x``, written as ``x + T * (H(x) - x)``: a residual connection with a gate.

    Args:
        transform: H, which keeps the shape.
        gate: T, with values between 0 and 1.
    """
    return add(identity, multiply(add(negative, transform=transform), gate=gate))


def block(width: int) -> Layer:
    """H is a 3x3 convolution and a ReLU, T a 3x3 convolution and a sigmoid."""
    return highway(
        serial(conv(width, 3, bias=True, init=he, bias_init=0.0), relu),
        serial(conv(width, 3, bias=True, init=he, bias_init=-2.0), sigmoid),
    )


def highway_cifar(
    *,
    widths: Sequence[int] = (32, 80, 128),
    depths: Sequence[int] = (4, 5, 5),
    last_width: int = 100,
    num_classes: int = 10,
    dropout: float = 0.2,
) -> Layer:
    """The authors' network for CIFAR: plain convolutions change the width, and highway layers follow each.

    Args:
        widths: channels of the stem and each stage.
        depths: highway layers in the stem and each stage.
        last_width: channels of the 1x1 convolution at the end.
        num_classes: outputs of the head.
        dropout: rate before each plain 3x3 convolution, so also on the images, and before the head.
    """
    last = serial(reduce=conv(last_width, 1, bias=True, init=he, bias_init=0.0), relu_last=relu)
    parts: dict[str, Layer] = {}
    for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        plain = conv(width, 3, bias=True, init=he if i else normal(0.05), bias_init=0.0)
        first = serial(layers.dropout(dropout), conv=plain, relu=relu)
        end = max_pool(2, 2) if i < len(widths) - 1 else last
        parts[f"stage{i}" if i else "stem"] = serial(first, numbered(*(block(width) for _ in range(depth))), end)
    return serial(
        **parts,
        head=serial(
            global_avg_pool,
            layers.dropout(dropout),
            linear=linear(num_classes, init=normal(0.05), bias_init=0.0),
        ),
    )


VARIANTS = {
    "highway19_cifar": Variant(
        highway_cifar,
        PAPER,
        image_size=32,
        published=Published(92.46, "test accuracy", "CIFAR-10", "arXiv:1507.06228, Highway B, best run"),
    )
}
