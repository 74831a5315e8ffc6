"""pytorchcv's names and modules for the networks before residual connections.

In each rule pytorchcv's name is on the left, ours on the right. pytorchcv is imported only to build a module.
"""

from torch import nn

from converters.families import BASIC, Pairs, under
from converters.library import Family
from converters.rules import Rules
from purecnn import Model


def _zfnet_rules(model: Model) -> Rules:
    return Rules(
        ("features.stage1.unit1.conv", "stem.conv"),
        ("features.stage2.unit1.conv", "stage1.conv"),
        ("features.stage3.unit{i}.conv", "stage2.conv{i}"),
        ("output.fc1.fc", "stage3.linear1"),
        ("output.fc2.fc", "stage3.linear2"),
        ("output.fc3", "head.linear"),
    )


def _zfnet(model: Model) -> nn.Module:
    from pytorchcv.models.alexnet import AlexNet

    first, second, *rest = model.settings["widths"]
    module: nn.Module = AlexNet(
        channels=[[first], [second], rest],
        kernel_sizes=[[7], [5], [3, 3, 3]],
        strides=[[2], [2], [1, 1, 1]],
        paddings=[[1], [0], [1, 1, 1]],
        use_lrn=True,
        in_channels=model.in_channels,
        num_classes=model.num_classes,
    )
    return module


def _nin_rules(model: Model) -> Rules:
    return Rules(
        ("features.stage1.unit{i}.conv", "stem.conv{i}"),
        ("features.stage2.unit{i}.conv", "stage1.conv{i}"),
        ("features.stage3.unit{i}.conv", "stage2.conv{i}"),
        ("output.final_conv.conv", "head.conv"),
    )


def _nin(model: Model) -> nn.Module:
    from pytorchcv.models.nin_cifar import CIFARNIN

    widths = [list(row) for row in model.settings["widths"]]
    module: nn.Module = CIFARNIN(widths, [5, 5, 3], in_channels=model.in_channels, num_classes=model.num_classes)
    return module


_BRANCH3 = (("conv1", "reduce"), ("conv2", "expand"))
_BRANCH5 = (("conv1", "reduce"), ("conv2", "conv"), ("conv3", "expand"))
_MODULE = [
    ("branch1", "branch1"),
    *under("branch2", "branch3", _BRANCH3),
    *under("branch3", "branch5", _BRANCH5),
    ("branch4.conv", "pool.project"),
]
_REDUCTION = [*under("branch1", "branch3", _BRANCH3), *under("branch2", "branch5", _BRANCH5)]
_MODULES = {
    "stage1.unit1": ("stage1.0", _MODULE), "stage1.unit2": ("stage1.1", _MODULE),
    "stage2.unit1": ("stage1.2", _REDUCTION),
    "stage2.unit2": ("stage2.0", _MODULE), "stage2.unit3": ("stage2.1", _MODULE),
    "stage2.unit4": ("stage2.2", _MODULE), "stage2.unit5": ("stage2.3", _MODULE),
    "stage3.unit1": ("stage2.4", _REDUCTION),
    "stage3.unit2": ("stage3.0", _MODULE), "stage3.unit3": ("stage3.1", _MODULE),
}  # fmt: skip
"""pytorchcv's stages begin with the module that halves the image; ours end with it."""


def _bn_inception_rules(model: Model) -> Rules:
    blocks: Pairs = [
        ("features.init_block.conv1", "stem.conv1"),
        ("features.init_block.conv2.conv1", "stem.reduce"),
        ("features.init_block.conv2.conv2", "stem.conv2"),
    ]
    for theirs, (ours, names) in _MODULES.items():
        blocks += under(f"features.{theirs}.branches", ours, names)
    pairs = [pair for left, right in blocks for pair in under(left, right, BASIC)]
    return Rules(*pairs, ("output", "head.linear"))


def _bn_inception(model: Model) -> nn.Module:
    from pytorchcv.models.bninception import bninception

    module: nn.Module = bninception(in_channels=model.in_channels, num_classes=model.num_classes)
    return module


PYTORCHCV = {
    "zfnet": Family(_zfnet_rules, _zfnet),
    "zfnetb": Family(_zfnet_rules, _zfnet),
    "nin_cifar": Family(_nin_rules, _nin),
    "bn_inception": Family(_bn_inception_rules, _bn_inception),
}
"""pytorchcv's families by the name of the model."""

TIMM: dict[str, Family] = {}
"""timm has none of them."""
