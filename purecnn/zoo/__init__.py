"""The architectures: one paper, one file. `VARIANTS` is the table of all, in the order of their history."""

from purecnn.paper import Variant
from purecnn.zoo import (
    airbench,
    alexnet,
    alexnet_2012,
    bn_inception,
    cbam,
    cmpe_se,
    convnext,
    densenet,
    densenet_cifar,
    efficientnet,
    fractalnet,
    googlenet,
    googlenet_2014,
    highway,
    inception_resnet,
    inception_v3,
    inception_v4,
    lecun1989,
    lenet,
    lenet5_1998,
    mnasnet,
    mnasnet_a1,
    mobilenet_v1,
    mobilenet_v2,
    mobilenet_v3,
    nasnet,
    nin,
    pnasnet,
    polynet,
    preactresnet,
    pyramidnet,
    regnet,
    resattnet,
    resnet,
    resnet_cifar,
    resnet_v1,
    senet,
    shufflenet_v1,
    shufflenet_v2,
    squeezenet,
    vgg,
    vgg_2014,
    wideresnet_cifar,
    xception,
    zfnet,
)

VARIANTS: dict[str, Variant] = {
    name: variant
    for family in (
        lecun1989, lenet5_1998, lenet, alexnet_2012, zfnet, nin, alexnet, vgg, vgg_2014, googlenet_2014, googlenet,
        bn_inception, highway, inception_v3, resnet_cifar, resnet_v1, resnet, inception_v4, inception_resnet,
        preactresnet, squeezenet, fractalnet, wideresnet_cifar, densenet_cifar, densenet, xception, pyramidnet, polynet,
        mobilenet_v1, resattnet, shufflenet_v1, nasnet, senet, pnasnet, mobilenet_v2, cbam, shufflenet_v2, cmpe_se,
        mnasnet, mnasnet_a1, mobilenet_v3, efficientnet, regnet, convnext, airbench,
    )
    for name, variant in family.VARIANTS.items()
}  # fmt: skip
