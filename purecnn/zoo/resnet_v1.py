"""ResNet-50 as in the paper: the stride is on the first 1x1 convolution.

    He, Zhang, Ren, Sun. Deep Residual Learning for Image Recognition. CVPR 2016, arXiv:1512.03385.

`purecnn.zoo.resnet` follows torchvision, which moved the stride to the 3x3 ("v1.5"); the parameters are the same. No
deviations from the paper.
"""

from collections.abc import Sequence

from purecnn.initializers import kaiming_normal
from purecnn.layer import Layer
from purecnn.paper import Published, Variant
from purecnn.zoo.resnet import RESNET, bottleneck, network, projection, residual

he = kaiming_normal("fan_in")


def block(width: int, stride: int) -> Layer:
    """Figure 5, right; the stride is on the first 1x1."""
    branch = bottleneck((width, width, 4 * width), (stride, 1), init=he)
    return residual(branch, projection(4 * width, stride, he))


def resnet_v1(depths: Sequence[int], *, num_classes: int = 1000) -> Layer:
    """Table 1 of the paper, with bottlenecks.

    Args:
        depths: blocks in each stage.
        num_classes: outputs of the head.
    """
    return network(block, depths, num_classes=num_classes, init=he)


VARIANTS = {
    "resnet50_v1": Variant(
        resnet_v1,
        RESNET,
        {"depths": (3, 4, 6, 3)},
        published=Published(24.7, "top-1 error", "ImageNet", "authors' repository, one crop"),
    )
}
