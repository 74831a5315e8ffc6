"""GoogLeNet as published: the network that won ImageNet in 2014.

    Szegedy, Liu, Jia, Sermanet, Reed, Anguelov, Erhan, Vanhoucke, Rabinovich. Going Deeper with Convolutions.
    CVPR 2015, arXiv:1409.4842.

What it added: the inception module, which applies kernels of several sizes to its input in parallel, and 1x1
convolutions that reduce the channels before the large kernels. It has 22 layers and about a ninth of AlexNet's
parameters: 6,998,552, or 13,378,280 with the two auxiliary heads used in training.

`purecnn.zoo.googlenet` is torchvision's network of that name, with batch normalisation and without true 5x5
convolutions. This one follows the paper in everything. What the paper does not specify follows Caffe's replication,
``bvlc_googlenet``: the constants of local response normalisation, pools whose last window reaches over the border, and
the initial values (the original's were Gaussian, as the authors of the replication say). A stage ends where the image
shrinks or an auxiliary head branches off: 3a-3b, 4a, 4b-4d, 4e, 5a-5b.
"""

from purecnn import layers
from purecnn.initializers import variance_scaling
from purecnn.layer import Layer, concat, fork, named, numbered, serial
from purecnn.layers import avg_pool, flatten, global_avg_pool, linear, max_pool, relu
from purecnn.paper import Published, Variant
from purecnn.zoo.alexnet_2012 import local_response_norm
from purecnn.zoo.googlenet import PAPER

xavier = variance_scaling(1.0, "fan_in", "uniform")
"""What Caffe calls "xavier"."""


def conv(width: int, kernel: int, stride: int = 1) -> Layer:
    """Convolution, ReLU."""
    return serial(layers.conv(width, kernel, stride, bias=True, init=xavier, bias_init=0.2), relu)


def inception(c1: int, r3: int, c3: int, r5: int, c5: int, cp: int) -> Layer:
    """Figure 2b: four parallel branches; r3 and r5 are the "reduce" columns of table 1, cp is "pool proj"."""
    return concat(
        branch1=conv(c1, 1),
        branch3=serial(reduce=conv(r3, 1), expand=conv(c3, 3)),
        branch5=serial(reduce=conv(r5, 1), expand=conv(c5, 5)),
        pool=serial(max_pool(3, 1, 1), project=conv(cp, 1)),
    )


def aux_head(num_classes: int, dropout: float) -> Layer:
    """Section 5: a small classifier on intermediate feature maps."""
    return serial(
        avg_pool(5, 3), reduce=conv(128, 1), flatten=flatten,
        linear1=linear(1024, init=xavier, bias_init=0.2), relu=relu, dropout=layers.dropout(dropout),
        linear=linear(num_classes, init=xavier, bias_init=0.0),
    )  # fmt: skip


def googlenet_2014(
    *,
    num_classes: int = 1000,
    aux_logits: bool = True,
    dropout: float = 0.4,
    dropout_aux: float = 0.7,
) -> Layer:
    """Table 1 of the paper.

    Args:
        num_classes: outputs of the head and the auxiliary heads.
        aux_logits: add the auxiliary heads; then training returns `purecnn.Outputs`. The paper weights their losses
            by 0.3.
        dropout: rate before the head.
        dropout_aux: rate in the auxiliary heads.
    """
    norm, pool = local_response_norm(alpha=1e-4 / 5, k=1.0), max_pool(3, 2, ceil_mode=True)
    aux1, aux2 = ({name: aux_head(num_classes, dropout_aux)} if aux_logits else {} for name in ("aux1", "aux2"))
    shallow = serial(
        stem=serial(
            conv1=conv(64, 7, 2), pool1=pool, norm1=norm,
            reduce=conv(64, 1), conv2=conv(192, 3), norm2=norm, pool2=pool,
        ),
        stage1=serial(numbered(inception(64, 96, 128, 16, 32, 32), inception(128, 128, 192, 32, 96, 64)), pool),
        stage2=numbered(inception(192, 96, 208, 16, 48, 64)),
    )  # fmt: skip
    middle = named(
        "stage3",
        numbered(
            inception(160, 112, 224, 24, 64, 64),
            inception(128, 128, 256, 24, 64, 64),
            inception(112, 144, 288, 32, 64, 64),
        ),
    )
    deep = serial(
        stage4=serial(numbered(inception(256, 160, 320, 32, 128, 128)), pool),
        stage5=numbered(inception(256, 160, 320, 32, 128, 128), inception(384, 192, 384, 48, 128, 128)),
        head=serial(
            global_avg_pool, layers.dropout(dropout), linear=linear(num_classes, init=xavier, bias_init=0.0)
        ),
    )  # fmt: skip
    return serial(shallow, fork(serial(middle, fork(deep, **aux2)), **aux1))


VARIANTS = {
    "googlenet_2014": Variant(
        googlenet_2014, PAPER, published=Published(10.07, "top-5 error", "ImageNet", "Table 3, one network, one crop")
    )
}
