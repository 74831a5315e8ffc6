"""GoogLeNet, the first Inception network, as in torchvision.

    Szegedy, Liu, Jia, Sermanet, Reed, Anguelov, Erhan, Vanhoucke, Rabinovich. Going Deeper with Convolutions.
    CVPR 2015, arXiv:1409.4842.

Deviations from the paper, all as in torchvision, which follows the published TensorFlow weights: convolutions
have batch normalisation instead of biases; the "5x5" branch has a 3x3 convolution; the fourth pool is 2x2; no local
response normalisation; auxiliary heads pool adaptively. A stage ends where the image shrinks or an auxiliary head
branches off: 3a-3b, 4a, 4b-4d, 4e, 5a-5b. 13,004,888 parameters, 6,624,904 without auxiliary heads.
"""

import torch
from torch import Tensor

from purecnn import layers
from purecnn.initializers import truncated_normal
from purecnn.layer import Layer, concat, fork, named, numbered, serial
from purecnn.layers import (
    adaptive_avg_pool,
    batch_norm,
    flatten,
    global_avg_pool,
    identity,
    linear,
    max_pool,
    relu,
    stateless,
)
from purecnn.paper import Group, Paper, Variant

PAPER = Paper(
    "Going Deeper with Convolutions",
    "Szegedy, Liu, Jia, Sermanet, Reed, Anguelov, Erhan, Vanhoucke, Rabinovich",
    2014,
    "arXiv:1409.4842",
    groups=(Group.SPATIAL,),
    in_survey=True,
)

narrow = truncated_normal(0.01)


def conv_norm(width: int, kernel: int, stride: int = 1) -> Layer:
    """Convolution, batch normalisation, ReLU."""
    return layers.conv_norm(width, kernel, stride, init=narrow, norm=batch_norm(eps=1e-3))


def inception(c1: int, r3: int, c3: int, r5: int, c5: int, cp: int) -> Layer:
    """Figure 2b: four parallel branches; r3 and r5 are the "reduce" columns of table 1, cp is "pool proj"."""
    return concat(
        branch1=conv_norm(c1, 1),
        branch3=serial(reduce=conv_norm(r3, 1), expand=conv_norm(c3, 3)),
        branch5=serial(reduce=conv_norm(r5, 1), expand=conv_norm(c5, 3)),
        pool=serial(max_pool(3, 1, 1), project=conv_norm(cp, 1)),
    )


def aux_head(num_classes: int, dropout: float) -> Layer:
    """Section 5: a small classifier on intermediate feature maps."""
    return serial(
        adaptive_avg_pool(4),
        reduce=conv_norm(128, 1), flatten=flatten,
        linear1=linear(1024, init=narrow), relu=relu, dropout=layers.dropout(dropout),
        linear=linear(num_classes, init=narrow),
    )  # fmt: skip


def to_half(x: Tensor) -> Tensor:
    """From normalisation by ImageNet's mean and deviation to normalisation by 0.5 and 0.5, in each channel.

    Raises:
        ValueError: unless there are three channels.
    """
    if x.shape[1] != 3:
        raise ValueError(f"transform_input is for images with 3 channels, found {tuple(x.shape)}")
    means, stds = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return torch.cat([x[:, i : i + 1] * (stds[i] / 0.5) + (means[i] - 0.5) / 0.5 for i in range(3)], dim=1)


def googlenet(
    *,
    num_classes: int = 1000,
    aux_logits: bool = True,
    transform_input: bool = False,
    dropout: float = 0.2,
    dropout_aux: float = 0.7,
) -> Layer:
    """Table 1 of the paper.

    Args:
        num_classes: outputs of the head and the auxiliary heads.
        aux_logits: add the auxiliary heads; then training returns `purecnn.Outputs`.
        transform_input: convert images normalised by ImageNet's mean and deviation to normalisation by 0.5 and 0.5,
            which torchvision's published weights expect.
        dropout: rate before the head.
        dropout_aux: rate in the auxiliary heads.
    """
    pool = max_pool(3, 2, ceil_mode=True)
    aux1, aux2 = ({name: aux_head(num_classes, dropout_aux)} if aux_logits else {} for name in ("aux1", "aux2"))
    deep = serial(
        stage4=serial(numbered(inception(256, 160, 320, 32, 128, 128)), max_pool(2, 2, ceil_mode=True)),
        stage5=numbered(inception(256, 160, 320, 32, 128, 128), inception(384, 192, 384, 48, 128, 128)),
        head=serial(global_avg_pool, layers.dropout(dropout), linear=linear(num_classes, init=narrow)),
    )
    middle = serial(
        named(
            "stage3",
            numbered(
                inception(160, 112, 224, 24, 64, 64),
                inception(128, 128, 256, 24, 64, 64),
                inception(112, 144, 288, 32, 64, 64),
            ),
        ),
        fork(deep, **aux2),
    )
    shallow = serial(
        stateless(to_half) if transform_input else identity,
        stem=serial(
            conv1=conv_norm(64, 7, 2), pool1=pool,
            reduce=conv_norm(64, 1), conv2=conv_norm(192, 3), pool2=pool,
        ),
        stage1=serial(numbered(inception(64, 96, 128, 16, 32, 32), inception(128, 128, 192, 32, 96, 64)), pool),
        stage2=numbered(inception(192, 96, 208, 16, 48, 64)),
    )  # fmt: skip
    return serial(shallow, fork(middle, **aux1))


VARIANTS = {"googlenet": Variant(googlenet, PAPER)}
