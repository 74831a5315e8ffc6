"""Inception v4: a more uniform Inception network, freed from earlier constraints of distributed training.

    Szegedy, Ioffe, Vanhoucke, Alemi. Inception-v4, Inception-ResNet and the Impact of Residual Connections on
    Learning. AAAI 2017, arXiv:1602.07261.

The paper asks whether residual connections help an Inception network. This is the network without them; those with
them are in `purecnn.zoo.inception_resnet`. New here: a stem that already has parallel branches, and a single kind of
module for each resolution. The average pools do not count the zeros of the padding. A stage begins where the image
shrinks: 4 A (35x35), 7 B (17x17), 3 C (8x8). The paper does not specify the initialisation; here it follows the
authors' code, TensorFlow-Slim.
"""

from collections.abc import Sequence
from functools import partial

import torch.nn.functional as F

from purecnn import layers
from purecnn.initializers import variance_scaling, xavier_uniform
from purecnn.layer import Layer, concat, numbered, serial
from purecnn.layers import Pair, batch_norm, global_avg_pool, linear, max_pool, stateless
from purecnn.paper import Group, Paper, Published, Variant
from purecnn.zoo import inception_v3
from purecnn.zoo.inception_v3 import COLUMN, ROW

PAPER = Paper(
    "Inception-v4, Inception-ResNet and the Impact of Residual Connections on Learning",
    "Szegedy, Ioffe, Vanhoucke, Alemi",
    2016,
    "arXiv:1602.07261",
    groups=(Group.DEPTH, Group.MULTI_PATH, Group.WIDTH),
    in_survey=True,
)

SHORT_ROW, SHORT_COLUMN = (1, 3), (3, 1)

he = variance_scaling(2.0, "fan_in", "truncated_normal")
xavier = xavier_uniform()

mean_pool = stateless(lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))


def conv_norm(width: int, kernel: Pair, stride: int = 1, padding: Pair | None = None) -> Layer:
    """Convolution, batch normalisation, ReLU."""
    return layers.conv_norm(width, kernel, stride, padding, init=he, norm=batch_norm(eps=1e-3))


chain = partial(inception_v3.chain, unit=conv_norm)
shrinking = partial(chain, stride=2, padding=0)
"""A chain whose last convolution has stride 2 and no padding ("V" in the figures)."""


def pool_branch(width: int) -> Layer:
    """3x3 average pooling, then 1x1."""
    return serial(mean_pool, project=conv_norm(width, 1))


def stem() -> Layer:
    """Figure 3: to 35x35 pixels with 384 channels; it splits into two parallel branches three times."""
    return serial(
        conv1=conv_norm(32, 3, 2, 0), conv2=conv_norm(32, 3, 1, 0), conv3=conv_norm(64, 3),
        split1=concat(pool=max_pool(3, 2), branch3=conv_norm(96, 3, 2, 0)),
        split2=concat(
            branch3=chain((64, 1), (96, 3), padding=0),
            branch9=chain((64, 1), (64, ROW), (64, COLUMN), (96, 3), padding=0),
        ),
        split3=concat(branch3=conv_norm(192, 3, 2, 0), pool=max_pool(3, 2)),
    )  # fmt: skip


def module_a() -> Layer:
    """Figure 4, at 35x35."""
    return concat(
        branch1=conv_norm(96, 1),
        branch3=chain((64, 1), (96, 3)),
        branch5=chain((64, 1), (96, 3), (96, 3)),
        pool=pool_branch(96),
    )


def reduction_a() -> Layer:
    """Figure 7, from 35x35 to 17x17."""
    return concat(
        branch3=conv_norm(384, 3, 2, 0),
        branch5=shrinking((192, 1), (224, 3), (256, 3)),
        pool=max_pool(3, 2),
    )


def module_b() -> Layer:
    """Figure 5, at 17x17."""
    return concat(
        branch1=conv_norm(384, 1),
        branch7=chain((192, 1), (224, ROW), (256, COLUMN)),
        branch13=chain((192, 1), (192, COLUMN), (224, ROW), (224, COLUMN), (256, ROW)),
        pool=pool_branch(128),
    )


def reduction_b() -> Layer:
    """Figure 8, from 17x17 to 8x8."""
    return concat(
        branch3=shrinking((192, 1), (192, 3)),
        branch9=shrinking((256, 1), (256, ROW), (320, COLUMN), (320, 3)),
        pool=max_pool(3, 2),
    )


def module_c() -> Layer:
    """Figure 6, at 8x8: a row and a column in parallel."""

    def cross() -> Layer:
        return concat(row=conv_norm(256, SHORT_ROW), column=conv_norm(256, SHORT_COLUMN))

    return concat(
        branch1=conv_norm(256, 1),
        branch3=serial(reduce=conv_norm(384, 1), expand=cross()),
        branch5=serial(
            reduce=conv_norm(384, 1), column=conv_norm(448, SHORT_COLUMN), row=conv_norm(512, SHORT_ROW),
            expand=cross(),
        ),
        pool=pool_branch(256),
    )  # fmt: skip


def inception_v4(*, depths: Sequence[int] = (4, 7, 3), num_classes: int = 1000, dropout: float = 0.2) -> Layer:
    """Figure 9 of the paper.

    Args:
        depths: number of modules A, B and C.
        num_classes: outputs of the head.
        dropout: rate before the head.
    """
    a, b, c = depths
    return serial(
        stem=stem(),
        stage1=numbered(*(module_a() for _ in range(a))),
        stage2=numbered(reduction_a(), *(module_b() for _ in range(b))),
        stage3=numbered(reduction_b(), *(module_c() for _ in range(c))),
        head=serial(global_avg_pool, layers.dropout(dropout), linear=linear(num_classes, init=xavier, bias_init=0.0)),
    )


VARIANTS = {
    "inception_v4": Variant(
        inception_v4, PAPER, image_size=299, published=Published(20.0, "top-1 error", "ImageNet", "Table 2, one crop")
    )
}
