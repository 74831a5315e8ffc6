"""The architectures: one paper, one file. `VARIANTS` is the table of all, in the order of their history."""

from purecnn.paper import Variant
from purecnn.zoo import (
    alexnet,
    convnext,
    densenet,
    efficientnet,
    googlenet,
    inception_v3,
    lenet,
    mnasnet,
    mobilenet_v2,
    mobilenet_v3,
    regnet,
    resnet,
    shufflenet_v2,
    squeezenet,
    vgg,
)

VARIANTS: dict[str, Variant] = {
    name: variant
    for family in (
        lenet, alexnet, vgg, googlenet, inception_v3, resnet, squeezenet, densenet, mobilenet_v2, shufflenet_v2,
        mnasnet, mobilenet_v3, efficientnet, regnet, convnext,
    )
    for name, variant in family.VARIANTS.items()
}  # fmt: skip
