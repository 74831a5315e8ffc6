"""Inception-ResNet: Inception modules as the branches of residual connections.

    Szegedy, Ioffe, Vanhoucke, Alemi. Inception-v4, Inception-ResNet and the Impact of Residual Connections on
    Learning. AAAI 2017, arXiv:1602.07261.

What this paper adds to ResNet: a 1x1 convolution without activation brings the concatenated branches back to the width
of the trunk, and the result is *scaled down* before it is added, because wide residual networks died in training
without scaling. Version 1 costs about as much as Inception v3, version 2 about as much as Inception v4.

All deviations from the paper are those of the published weights. Version 2 has the stem of Inception v3 followed by one
Inception module, instead of the stem of Inception v4, so its trunk is 320, 1088 and 2080 channels wide; and it has 10,
20 and 10 modules, while figure 15 has 5, 10 and 5 for both versions. Version 1 is pytorchcv's, which follows FaceNet: a
sixth module C, and a linear embedding of 512 features with normalisation before the head. In both versions, the last
module has no scaling and no ReLU.
"""

from collections.abc import Sequence

from purecnn import layers
from purecnn.layer import Layer, add, concat, numbered, serial
from purecnn.layers import batch_norm, conv, global_avg_pool, identity, linear, max_pool, relu, stateless
from purecnn.paper import Published, Variant
from purecnn.zoo.inception_v3 import COLUMN, ROW
from purecnn.zoo.inception_v4 import (
    PAPER,
    SHORT_COLUMN,
    SHORT_ROW,
    chain,
    conv_norm,
    he,
    pool_branch,
    shrinking,
    xavier,
)

Widths = Sequence[Sequence[int]]
"""Channels of each convolution of each branch, in the order of the figures."""


def scaled(layer: Layer, scale: float) -> Layer:
    """Section 3.3: the layer's output times a small constant."""
    return serial(layer, stateless(lambda x: x * scale))


def residual(branches: Layer, width: int, scale: float, act: Layer = relu) -> Layer:
    """Figure 20: branches, 1x1 to the trunk's width, scaling by a small constant; then the sum and a ReLU."""
    restore = serial(branches, restore=conv(width, 1, bias=True, init=he, bias_init=0.0))
    return serial(add(identity, scaled(restore, scale)), act)


def module_a(widths: Widths) -> Layer:
    """The branches of figures 10 and 16, at 35x35."""
    (c1,), (r3, c3), (r5, m5, c5) = widths
    return concat(
        branch1=conv_norm(c1, 1),
        branch3=chain((r3, 1), (c3, 3)),
        branch5=chain((r5, 1), (m5, 3), (c5, 3)),
    )


def reduction_a(widths: Widths) -> Layer:
    """Figure 7, from 35x35 to 17x17."""
    (c3,), (r5, m5, c5) = widths
    return concat(
        branch3=conv_norm(c3, 3, 2, 0),
        branch5=shrinking((r5, 1), (m5, 3), (c5, 3)),
        pool=max_pool(3, 2),
    )


def module_b(widths: Widths) -> Layer:
    """The branches of figures 11 and 17, at 17x17."""
    (c1,), (r7, m7, c7) = widths
    return concat(branch1=conv_norm(c1, 1), branch7=chain((r7, 1), (m7, ROW), (c7, COLUMN)))


def reduction_b(widths: Widths) -> Layer:
    """Figures 12 and 18, from 17x17 to 8x8."""
    (r1, c1), (r2, c2), (r5, m5, c5) = widths
    return concat(
        branch3a=shrinking((r1, 1), (c1, 3)),
        branch3b=shrinking((r2, 1), (c2, 3)),
        branch5=shrinking((r5, 1), (m5, 3), (c5, 3)),
        pool=max_pool(3, 2),
    )


def module_c(widths: Widths) -> Layer:
    """The branches of figures 13 and 19, at 8x8."""
    (c1,), (r3, m3, c3) = widths
    return concat(branch1=conv_norm(c1, 1), branch3=chain((r3, 1), (m3, SHORT_ROW), (c3, SHORT_COLUMN)))


def stages(
    first: Layer,
    width: int,
    a: Widths,
    between_ab: Widths,
    b: Widths,
    between_bc: Widths,
    c: Widths,
    depths: Sequence[int],
    scales: Sequence[float],
) -> dict[str, Layer]:
    """The three resolutions of figure 15; each reduction adds its branches' channels to the width of its input."""
    width_b = width + sum(branch[-1] for branch in between_ab)
    width_c = width_b + sum(branch[-1] for branch in between_bc)
    depth_a, depth_b, depth_c = depths
    scale_a, scale_b, scale_c = scales
    modules_a = [residual(module_a(a), width, scale_a) for _ in range(depth_a)]
    modules_b = [residual(module_b(b), width_b, scale_b) for _ in range(depth_b)]
    modules_c = [residual(module_c(c), width_c, scale_c) for _ in range(depth_c - 1)]
    last = residual(module_c(c), width_c, 1.0, identity)
    return {
        "stage1": serial(first, numbered(*modules_a)),
        "stage2": numbered(reduction_a(between_ab), *modules_b),
        "stage3": numbered(reduction_b(between_bc), *modules_c, last),
    }


def to_71() -> Layer:
    """The beginning of figure 14, also that of Inception v3: to 71x71 pixels with 192 channels."""
    return serial(
        conv1=conv_norm(32, 3, 2, 0), conv2=conv_norm(32, 3, 1, 0), conv3=conv_norm(64, 3), pool1=max_pool(3, 2),
        reduce=conv_norm(80, 1), conv4=conv_norm(192, 3, 1, 0),
    )  # fmt: skip


def inception_resnet_v1(
    *,
    depths: Sequence[int] = (5, 10, 6),
    scales: Sequence[float] = (0.17, 0.1, 0.2),
    embedding: int = 512,
    num_classes: int = 1000,
    dropout: float = 0.2,
) -> Layer:
    """Figures 10 to 15 of the paper; the embedding is a stage.

    Args:
        depths: number of modules A, B and C.
        scales: factor for the branches of modules A, B and C, except the last module's.
        embedding: size of the embedding, which is the head's input.
        num_classes: outputs of the head.
        dropout: rate before the embedding.
    """
    body = stages(
        identity, 256,
        a=((32,), (32, 32), (32, 32, 32)), between_ab=((384,), (192, 192, 256)),
        b=((128,), (128, 128, 128)), between_bc=((256, 384), (256, 256), (256, 256, 256)),
        c=((192,), (192, 192, 192)), depths=depths, scales=scales,
    )  # fmt: skip
    embed = linear(embedding, bias=False, init=xavier)
    return serial(
        stem=serial(to_71(), conv5=conv_norm(256, 3, 2, 0)),
        **body,
        stage4=serial(global_avg_pool, layers.dropout(dropout), linear=embed, norm=batch_norm(eps=1e-3)),
        head=serial(linear=linear(num_classes, init=xavier, bias_init=0.0)),
    )


def inception_resnet_v2(
    *,
    depths: Sequence[int] = (10, 20, 10),
    scales: Sequence[float] = (0.17, 0.1, 0.2),
    num_classes: int = 1000,
    dropout: float = 0.2,
) -> Layer:
    """Figures 15 to 19 of the paper; the last 1x1 convolution is a stage.

    Args:
        depths: number of modules A, B and C.
        scales: factor for the branches of modules A, B and C, except the last module's.
        num_classes: outputs of the head.
        dropout: rate before the head.
    """
    mixed = concat(
        branch1=conv_norm(96, 1),
        branch5=chain((48, 1), (64, 5)),
        branch3=chain((64, 1), (96, 3), (96, 3)),
        pool=pool_branch(64),
    )
    body = stages(
        serial(mixed=mixed), 320,
        a=((32,), (32, 32), (32, 48, 64)), between_ab=((384,), (256, 256, 384)),
        b=((192,), (128, 160, 192)), between_bc=((256, 384), (256, 288), (256, 288, 320)),
        c=((192,), (192, 224, 256)), depths=depths, scales=scales,
    )  # fmt: skip
    return serial(
        stem=serial(to_71(), pool2=max_pool(3, 2)),
        **body,
        stage4=conv_norm(1536, 1),
        head=serial(global_avg_pool, layers.dropout(dropout), linear=linear(num_classes, init=xavier, bias_init=0.0)),
    )


VARIANTS = {
    "inception_resnet_v1": Variant(
        inception_resnet_v1,
        PAPER,
        image_size=299,
        published=Published(21.3, "top-1 error", "ImageNet", "Table 2, one crop"),
    ),
    "inception_resnet_v2": Variant(
        inception_resnet_v2,
        PAPER,
        image_size=299,
        published=Published(19.9, "top-1 error", "ImageNet", "Table 2, one crop"),
    ),
}
