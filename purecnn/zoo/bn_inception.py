"""BN-Inception, also called Inception v2: the network that introduced batch normalisation.

    Ioffe, Szegedy. Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift.
    ICML 2015, arXiv:1502.03167.

What it added: batch normalisation, which allows high learning rates. The network is GoogLeNet with two 3x3 convolutions
instead of each 5x5, one more module at 28x28 pixels, and modules that halve the image instead of most pools. 11,295,240
parameters. (Another network, that of arXiv:1512.00567, is also called Inception v2.)

Deviations from the paper, as in pytorchcv, which follows the published Caffe weights: the convolutions keep their
biases, though the normalisation cancels them; He initialisation; no auxiliary heads. A stage ends where the image
shrinks: 3a-3c, 4a-4e, 5a-5b.
"""

from purecnn.layer import Layer, concat, numbered, serial
from purecnn.layers import avg_pool, batch_norm, conv, linear, max_pool, relu
from purecnn.paper import Group, Paper, Published, Variant
from purecnn.zoo.nin import he, whole_avg_pool

PAPER = Paper(
    "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift",
    "Ioffe, Szegedy",
    2015,
    "arXiv:1502.03167",
    groups=(Group.DEPTH, Group.WIDTH),
)


def conv_norm(width: int, kernel: int, stride: int = 1) -> Layer:
    """Convolution with biases, batch normalisation, ReLU."""
    return serial(
        conv=conv(width, kernel, stride, bias=True, init=he, bias_init=0.0), norm=batch_norm(), act=relu
    )  # fmt: skip


def branch3(reduce: int, width: int, stride: int = 1) -> Layer:
    """1x1, then 3x3."""
    return serial(reduce=conv_norm(reduce, 1), expand=conv_norm(width, 3, stride))


def branch5(reduce: int, width: int, stride: int = 1) -> Layer:
    """1x1, then two 3x3, which have the receptive field of one 5x5."""
    return serial(reduce=conv_norm(reduce, 1), conv=conv_norm(width, 3), expand=conv_norm(width, 3, stride))


def inception(c1: int, r3: int, c3: int, r5: int, c5: int, cp: int, pool: Layer | None = None) -> Layer:
    """Four parallel branches; a row of the paper's figure 5. By default the pool is an average pool."""
    return concat(
        branch1=conv_norm(c1, 1),
        branch3=branch3(r3, c3),
        branch5=branch5(r5, c5),
        pool=serial(pool or avg_pool(3, 1, 1), project=conv_norm(cp, 1)),
    )


def reduction(r3: int, c3: int, r5: int, c5: int) -> Layer:
    """Halves the image: no 1x1 branch, and no convolution after the pool."""
    return concat(branch3=branch3(r3, c3, 2), branch5=branch5(r5, c5, 2), pool=max_pool(3, 2, ceil_mode=True))


def bn_inception(*, num_classes: int = 1000) -> Layer:
    """Figure 5 of the paper's appendix.

    Args:
        num_classes: outputs of the head.
    """
    pool = max_pool(3, 2, ceil_mode=True)
    return serial(
        stem=serial(
            conv1=conv_norm(64, 7, 2), pool1=pool,
            reduce=conv_norm(64, 1), conv2=conv_norm(192, 3), pool2=pool,
        ),
        stage1=numbered(
            inception(64, 64, 64, 64, 96, 32),
            inception(64, 64, 96, 64, 96, 64),
            reduction(128, 160, 64, 96),
        ),
        stage2=numbered(
            inception(224, 64, 96, 96, 128, 128),
            inception(192, 96, 128, 96, 128, 128),
            inception(160, 128, 160, 128, 160, 128),
            inception(96, 128, 192, 160, 192, 128),
            reduction(128, 192, 192, 256),
        ),
        stage3=numbered(
            inception(352, 192, 320, 160, 224, 128),
            inception(352, 192, 320, 192, 224, 128, pool=max_pool(3, 1, 1)),
        ),
        head=serial(whole_avg_pool, linear=linear(num_classes)),
    )  # fmt: skip


VARIANTS = {
    "bn_inception": Variant(
        bn_inception, PAPER, published=Published(25.2, "top-1 error", "ImageNet", "Figure 4, one crop")
    )
}
