"""AlexNet with its two towers: the network that won ImageNet in 2012.

    Krizhevsky, Sutskever, Hinton. ImageNet Classification with Deep Convolutional Neural Networks. NIPS 2012,
    doi:10.1145/3065386.

What it added: ReLU, dropout, and a size that needed two GPUs. Each GPU holds one tower, with half the channels of
every convolution; the towers are connected in the third convolution and in the fully-connected layers. So the second,
fourth and fifth convolutions have two groups. 60,965,224 parameters.

Deviation from the paper: images of 224 pixels are padded by two, because the paper's numbers are inconsistent without
it (224 pixels, but 55 outputs per side of the first convolution). Local response normalisation crosses the border
between the towers, as in the paper's formula. `purecnn.zoo.alexnet` is the later network for one GPU.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from purecnn import layers
from purecnn.initializers import normal
from purecnn.layer import Layer, serial
from purecnn.layers import conv, flatten, linear, max_pool, relu, stateless
from purecnn.paper import Group, Paper, Published, Variant

PAPER = Paper(
    "ImageNet Classification with Deep Convolutional Neural Networks",
    "Krizhevsky, Sutskever, Hinton",
    2012,
    "doi:10.1145/3065386",
    groups=(Group.SPATIAL,),
    in_survey=True,
)

gauss = normal(0.01)


def local_response_norm(alpha: float = 1e-4, k: float = 2.0) -> Layer:
    """Section 3.3: ``x[i] / (k + alpha * s) ** 0.75``, where s is the sum of the squares of the five channels around i.

    In torch's `local_response_norm`, alpha multiplies the mean of the squares; in the paper, their sum. Apart from that
    both are equal bit for bit, but torch's does not support half precision on a CPU.
    """

    def normalise(x: Tensor) -> Tensor:
        mean = F.avg_pool2d(rearrange(x * x, "b c h w -> b 1 c (h w)"), (5, 1), 1, (2, 0))
        return x / (5 * alpha * mean.reshape(x.shape) + k) ** 0.75

    return stateless(normalise)


def hidden(width: int, dropout: float, bias: float) -> Layer:
    """Two fully-connected layers; ``bias`` is the initial value of their biases."""
    return serial(
        flatten,
        linear1=linear(width, init=gauss, bias_init=bias), relu1=relu, dropout1=layers.dropout(dropout),
        linear2=linear(width, init=gauss, bias_init=bias), relu2=relu, dropout2=layers.dropout(dropout),
    )  # fmt: skip


def alexnet_2012(
    *,
    widths: Sequence[int] = (96, 256, 384, 384, 256),
    hidden_width: int = 4096,
    num_classes: int = 1000,
    dropout: float = 0.5,
) -> Layer:
    """Figure 2 of the paper; the last layer is the head. Initial values are those of section 5.

    Args:
        widths: channels of each convolution, in both towers together.
        hidden_width: units of each hidden fully-connected layer.
        num_classes: outputs of the head.
        dropout: rate after each hidden fully-connected layer.
    """

    def convolution(i: int, kernel: int, bias: float, towers: int) -> Layer:
        return conv(widths[i], kernel, groups=towers, bias=True, init=gauss, bias_init=bias)

    first = conv(widths[0], 11, 4, 2, bias=True, init=gauss, bias_init=0.0)
    norm, pool = local_response_norm(), max_pool(3, 2)
    return serial(
        stem=serial(conv=first, relu=relu, norm=norm, pool=pool),
        stage1=serial(conv=convolution(1, 5, 1.0, towers=2), relu=relu, norm=norm, pool=pool),
        stage2=serial(
            conv1=convolution(2, 3, 0.0, towers=1), relu1=relu,
            conv2=convolution(3, 3, 1.0, towers=2), relu2=relu,
            conv3=convolution(4, 3, 1.0, towers=2), relu3=relu, pool=pool,
        ),
        stage3=hidden(hidden_width, dropout, 1.0),
        head=serial(linear=linear(num_classes, init=gauss, bias_init=0.0)),
    )  # fmt: skip


VARIANTS = {
    "alexnet_2012": Variant(
        alexnet_2012, PAPER, published=Published(40.7, "top-1 error", "ImageNet", "Table 2, one network")
    )
}
