"""Inception v3: large kernels factorised into small ones, and into rows and columns.

    Szegedy, Vanhoucke, Ioffe, Shlens, Wojna. Rethinking the Inception Architecture for Computer Vision. CVPR 2016,
    arXiv:1512.00567.

Deviations from the paper, as in torchvision, which follows the published TensorFlow weights: the numbers of filters;
one auxiliary head; the average pools count the zeros of the padding. torchvision's code sets a deviation of 0.01 for
the auxiliary head's convolution, but draws it with 0.1 like all others; so does this one. A stage ends where the image
shrinks or the auxiliary head branches off: 5b-5d (35x35), 6a-6e (17x17), 7a-7c (8x8).
"""

from collections.abc import Callable
from functools import partial

from purecnn import layers
from purecnn.initializers import truncated_normal
from purecnn.layer import Layer, concat, fork, numbered, serial
from purecnn.layers import (
    Pair,
    avg_pool,
    batch_norm,
    global_avg_pool,
    identity,
    linear,
    max_pool,
    stateless,
)
from purecnn.paper import Group, Paper, Published, Variant
from purecnn.zoo.googlenet import to_half

PAPER = Paper(
    "Rethinking the Inception Architecture for Computer Vision",
    "Szegedy, Vanhoucke, Ioffe, Shlens, Wojna",
    2015,
    "arXiv:1512.00567",
    groups=(Group.DEPTH, Group.WIDTH),
    in_survey=True,
)

ROW, COLUMN = (1, 7), (7, 1)


def conv_norm(width: int, kernel: Pair, stride: int = 1, padding: Pair | None = None) -> Layer:
    """Convolution, batch normalisation, ReLU."""
    norm = batch_norm(eps=1e-3)
    return layers.conv_norm(width, kernel, stride, padding, init=truncated_normal(0.1), norm=norm)


def chain(
    *steps: tuple[int, Pair], stride: int = 1, padding: Pair | None = None, unit: Callable[..., Layer] = conv_norm
) -> Layer:
    """A chain of convolutions.

    Args:
        steps: width and kernel of each convolution.
        stride, padding: stride and padding of the last convolution.
        unit: ``unit(width, kernel, stride, padding)`` builds a convolution with its normalisation and activation.
    """
    *inner, (width, kernel) = steps
    return numbered(*(unit(width, kernel) for width, kernel in inner), unit(width, kernel, stride, padding))


shrinking = partial(chain, stride=2, padding=0)


def pool_branch(width: int) -> Layer:
    """3x3 average pooling, then 1x1."""
    return serial(avg_pool(3, 1, 1), project=conv_norm(width, 1))


def module_a(pool: int) -> Layer:
    """Figure 5: two 3x3 convolutions instead of a 5x5 (though one 5x5 remains)."""
    return concat(
        branch1=conv_norm(64, 1),
        branch5=chain((48, 1), (64, 5)),
        branch3=chain((64, 1), (96, 3), (96, 3)),
        pool=pool_branch(pool),
    )


def module_b() -> Layer:
    """Figure 10: from 35x35 to 17x17."""
    return concat(
        branch3=conv_norm(384, 3, 2, 0),
        branch5=shrinking((64, 1), (96, 3), (96, 3)),
        pool=max_pool(3, 2),
    )


def module_c(width: int) -> Layer:
    """Figure 6: 7x7 convolutions factorised into a row and a column."""
    return concat(
        branch1=conv_norm(192, 1),
        branch7=chain((width, 1), (width, ROW), (192, COLUMN)),
        branch13=chain((width, 1), (width, COLUMN), (width, ROW), (width, COLUMN), (192, ROW)),
        pool=pool_branch(192),
    )


def module_d() -> Layer:
    """From 17x17 to 8x8."""
    return concat(
        branch3=shrinking((192, 1), (320, 3)),
        branch7=shrinking((192, 1), (192, ROW), (192, COLUMN), (192, 3)),
        pool=max_pool(3, 2),
    )


def module_e() -> Layer:
    """Figure 7: a row and a column in parallel."""

    def cross() -> Layer:
        return concat(row=conv_norm(384, (1, 3)), column=conv_norm(384, (3, 1)))

    return concat(
        branch1=conv_norm(320, 1),
        branch3=serial(reduce=conv_norm(384, 1), expand=cross()),
        branch5=serial(reduce=conv_norm(448, 1), conv=conv_norm(384, 3), expand=cross()),
        pool=pool_branch(192),
    )


def inception_v3(
    *, num_classes: int = 1000, aux_logits: bool = True, transform_input: bool = False, dropout: float = 0.5
) -> Layer:
    """Table 1 of the paper.

    Args:
        num_classes: outputs of the head and the auxiliary head.
        aux_logits: add the auxiliary head; then training returns `purecnn.Outputs`.
        transform_input: convert images normalised by ImageNet's mean and deviation to normalisation by 0.5 and 0.5,
            which torchvision's published weights expect.
        dropout: rate before the head.
    """
    head = truncated_normal(0.1)
    aux = serial(
        avg_pool(5, 3), reduce=conv_norm(128, 1), conv=conv_norm(768, 5, padding=0), pool=global_avg_pool,
        linear=linear(num_classes, init=truncated_normal(0.001)),
    )  # fmt: skip
    deep = serial(
        stage3=numbered(module_d(), module_e(), module_e()),
        head=serial(global_avg_pool, layers.dropout(dropout), linear=linear(num_classes, init=head)),
    )
    shallow = serial(
        stateless(to_half) if transform_input else identity,
        stem=serial(
            conv1=conv_norm(32, 3, 2, 0), conv2=conv_norm(32, 3, 1, 0), conv3=conv_norm(64, 3), pool1=max_pool(3, 2),
            reduce=conv_norm(80, 1), conv4=conv_norm(192, 3, 1, 0), pool2=max_pool(3, 2),
        ),
        stage1=numbered(module_a(32), module_a(64), module_a(64)),
        stage2=numbered(module_b(), module_c(128), module_c(160), module_c(160), module_c(192)),
    )  # fmt: skip
    return serial(shallow, fork(deep, **({"aux1": aux} if aux_logits else {})))


VARIANTS = {
    "inception_v3": Variant(
        inception_v3, PAPER, image_size=299, published=Published(21.2, "top-1 error", "ImageNet", "the paper, one crop")
    )
}
