"""torchvision's names and modules, family by family.

Each family has a table of rules (torchvision's names on the left, ours on the right) and a function that builds the
torchvision module for a model's settings. Where torchvision numbers its layers consecutively, the rules count them.
"""

import math
from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import nn
from torchvision import models

from converters.library import Family
from converters.rules import ConversionError, Rules
from purecnn import Model
from purecnn.zoo.mobilenet_v2 import divisible

Pairs = list[tuple[str, str]]

BASIC = (("conv", "conv"), ("bn", "norm"))
"""In torchvision's and timm's ``BasicConv2d``, and in pytorchcv's ``ConvBlock``."""
CONV_NORM = (("0", "conv"), ("1", "norm"))
"""In torchvision's ``Conv2dNormActivation``."""
GATE = (("fc1", "squeeze"), ("fc2", "expand"))
"""In torchvision's ``SqueezeExcitation``."""


def under(theirs: str, ours: str, pairs: Iterable[tuple[str, str]]) -> Pairs:
    """The rules of a layer, with its path put in front on both sides."""
    return [(f"{theirs}.{left}", f"{ours}.{right}") for left, right in pairs]


def steps(theirs: str, ours: str, names: Sequence[str]) -> Pairs:
    """The rules of a block whose steps torchvision numbers."""
    return [
        pair
        for i, name in enumerate(names)
        for pair in under(f"{theirs}.{i}", f"{ours}.{name}", GATE if name == "gate" else CONV_NORM)
    ]


def _alexnet_rules(model: Model) -> Rules:
    return Rules(
        ("features.0", "stem.conv"),
        ("features.3", "stage1.conv"),
        ("features.6", "stage2.conv1"),
        ("features.8", "stage2.conv2"),
        ("features.10", "stage2.conv3"),
        ("classifier.1", "stage3.linear1"),
        ("classifier.4", "stage3.linear2"),
        ("classifier.6", "head.linear"),
    )


def _alexnet(model: Model) -> nn.Module:
    return models.AlexNet(model.settings["num_classes"], model.settings["dropout"])


def _vgg_rules(model: Model) -> Rules:
    """torchvision numbers all layers of the trunk consecutively, including ReLUs and pools."""
    pairs, position = [], 0
    for block, depth in enumerate(model.settings["depths"]):
        stage = f"stage{block}" if block else "stem"
        for i in range(1, depth + 1):
            pairs.append((f"features.{position}", f"{stage}.conv{i}"))
            if model.settings["batch_norm"]:
                position += 1
                pairs.append((f"features.{position}", f"{stage}.norm{i}"))
            position += 2
        position += 1
    hidden = f"stage{len(model.settings['depths'])}"
    return Rules(
        *pairs,
        ("classifier.0", f"{hidden}.linear1"),
        ("classifier.3", f"{hidden}.linear2"),
        ("classifier.6", "head.linear"),
    )


def _vgg(model: Model) -> nn.Module:
    s = model.settings
    plan = [step for depth, width in zip(s["depths"], s["widths"], strict=True) for step in (*[width] * depth, "M")]
    trunk = models.vgg.make_layers(plan, s["batch_norm"])
    module = models.VGG(trunk, s["num_classes"], init_weights=False, dropout=s["dropout"])
    if s["widths"][-1] != 512:  # torchvision assumes 512
        module.classifier[0] = nn.Linear(s["widths"][-1] * 49, 4096)
    return module


def _resnet_rules(model: Model) -> Rules:
    return Rules(
        ("conv1", "stem.conv"),
        ("bn1", "stem.norm"),
        ("layer{s}.{b}.conv{i}", "stage{s}.{b}.conv{i}"),
        ("layer{s}.{b}.bn{i}", "stage{s}.{b}.norm{i}"),
        ("layer{s}.{b}.downsample.0", "stage{s}.{b}.shortcut.conv"),
        ("layer{s}.{b}.downsample.1", "stage{s}.{b}.shortcut.norm"),
        ("fc", "head.linear"),
    )


def _resnet(model: Model) -> nn.Module:
    s = model.settings
    if len(s["depths"]) != 4:
        raise ConversionError(f"torchvision's ResNet has 4 stages, found {len(s['depths'])}")
    block = {"basic": models.resnet.BasicBlock, "bottleneck": models.resnet.Bottleneck}[s["block"]]
    return models.ResNet(block, s["depths"], s["num_classes"], groups=s["groups"], width_per_group=s["width_per_group"])


def _squeezenet_rules(model: Model) -> Rules:
    """torchvision's numbers also count the stem's ReLU and the pools."""
    pairs, position = [("features.0", "stem.conv")], 2
    for stage, depth in enumerate(model.settings["depths"], start=1):
        for i in range(depth):
            fire = f"features.{position + 1 + i}"
            pairs += [
                (f"{fire}.squeeze", f"stage{stage}.{i}.squeeze"),
                (f"{fire}.expand1x1", f"stage{stage}.{i}.expand.expand1"),
                (f"{fire}.expand3x3", f"stage{stage}.{i}.expand.expand3"),
            ]
        position += 1 + depth
    return Rules(*pairs, ("classifier.1", "head.conv"))


def _squeezenet(model: Model) -> nn.Module:
    s = model.settings
    version = {"squeezenet1_0": "1_0", "squeezenet1_1": "1_1"}[model.name]
    return models.SqueezeNet(version, s["num_classes"], s["dropout"])


def _densenet_rules(model: Model) -> Rules:
    last = len(model.settings["depths"])
    return Rules(
        ("features.conv0", "stem.conv"),
        ("features.norm0", "stem.norm"),
        ("features.denseblock{s}.denselayer{b+1}.norm{i}", "stage{s}.{b}.norm{i}"),
        ("features.denseblock{s}.denselayer{b+1}.conv{i}", "stage{s}.{b}.conv{i}"),
        ("features.transition{s}.norm", "stage{s}.transition.norm"),
        ("features.transition{s}.conv", "stage{s}.transition.conv"),
        ("features.norm5", f"stage{last}.norm"),
        ("classifier", "head.linear"),
    )


_DENSENET_LEGACY = Rules(
    ("features.denseblock{s}.denselayer{b}.norm.{i}", "features.denseblock{s}.denselayer{b}.norm{i}"),
    ("features.denseblock{s}.denselayer{b}.conv.{i}", "features.denseblock{s}.denselayer{b}.conv{i}"),
)


def _densenet(model: Model) -> nn.Module:
    s = model.settings
    return models.DenseNet(
        s["growth"], s["depths"], s["stem_width"], drop_rate=s["dropout"], num_classes=s["num_classes"]
    )


_INCEPTIONS = {
    "3a": "1.0", "3b": "1.1",
    "4a": "2.0", "4b": "3.0", "4c": "3.1", "4d": "3.2", "4e": "4.0",
    "5a": "5.0", "5b": "5.1",
}  # fmt: skip


def _googlenet_rules(model: Model) -> Rules:
    stem = [("conv1", "stem.conv1"), ("conv2", "stem.reduce"), ("conv3", "stem.conv2")]
    blocks = [*stem, ("aux{i}.conv", "aux{i}.reduce")]
    for theirs, ours in _INCEPTIONS.items():
        blocks += [
            (f"inception{theirs}.branch1", f"stage{ours}.branch1"),
            (f"inception{theirs}.branch2.0", f"stage{ours}.branch3.reduce"),
            (f"inception{theirs}.branch2.1", f"stage{ours}.branch3.expand"),
            (f"inception{theirs}.branch3.0", f"stage{ours}.branch5.reduce"),
            (f"inception{theirs}.branch3.1", f"stage{ours}.branch5.expand"),
            (f"inception{theirs}.branch4.1", f"stage{ours}.pool.project"),
        ]
    pairs = [pair for left, right in blocks for pair in under(left, right, BASIC)]
    return Rules(*pairs, ("aux{i}.fc1", "aux{i}.linear1"), ("aux{i}.fc2", "aux{i}.linear"), ("fc", "head.linear"))


def _googlenet(model: Model) -> nn.Module:
    s = model.settings
    return models.GoogLeNet(
        s["num_classes"],
        s["aux_logits"],
        s["transform_input"],
        init_weights=False,
        dropout=s["dropout"],
        dropout_aux=s["dropout_aux"],
    )


INCEPTION_V3 = {
    "Conv2d_1a_3x3": "stem.conv1", "Conv2d_2a_3x3": "stem.conv2", "Conv2d_2b_3x3": "stem.conv3",
    "Conv2d_3b_1x1": "stem.reduce", "Conv2d_4a_3x3": "stem.conv4",
    "AuxLogits.conv0": "aux1.reduce", "AuxLogits.conv1": "aux1.conv",
}  # fmt: skip
_A = {"branch1x1": "branch1", "branch5x5_{i+1}": "branch5.{i}", "branch3x3dbl_{i+1}": "branch3.{i}"}
_B = {"branch3x3": "branch3", "branch3x3dbl_{i+1}": "branch5.{i}"}
_C = {"branch1x1": "branch1", "branch7x7_{i+1}": "branch7.{i}", "branch7x7dbl_{i+1}": "branch13.{i}"}
_D = {"branch3x3_{i+1}": "branch3.{i}", "branch7x7x3_{i+1}": "branch7.{i}"}
_E = {
    "branch1x1": "branch1",
    "branch3x3_1": "branch3.reduce", "branch3x3_2a": "branch3.expand.row", "branch3x3_2b": "branch3.expand.column",
    "branch3x3dbl_1": "branch5.reduce", "branch3x3dbl_2": "branch5.conv",
    "branch3x3dbl_3a": "branch5.expand.row", "branch3x3dbl_3b": "branch5.expand.column",
}  # fmt: skip
_MIXED = {
    "5b": ("1.0", _A), "5c": ("1.1", _A), "5d": ("1.2", _A), "6a": ("2.0", _B),
    "6b": ("2.1", _C), "6c": ("2.2", _C), "6d": ("2.3", _C), "6e": ("2.4", _C),
    "7a": ("3.0", _D), "7b": ("3.1", _E), "7c": ("3.2", _E),
}  # fmt: skip


def _inception_v3_rules(model: Model) -> Rules:
    layers = dict(INCEPTION_V3)
    for theirs, (ours, branches) in _MIXED.items():
        branches = {**branches, "branch_pool": "pool.project"}
        layers |= {f"Mixed_{theirs}.{left}": f"stage{ours}.{right}" for left, right in branches.items()}
    pairs = [pair for left, right in layers.items() for pair in under(left, right, BASIC)]
    return Rules(*pairs, ("AuxLogits.fc", "aux1.linear"), ("fc", "head.linear"))


def _inception_v3(model: Model) -> nn.Module:
    s = model.settings
    return models.Inception3(
        s["num_classes"], s["aux_logits"], s["transform_input"], init_weights=False, dropout=s["dropout"]
    )


def _mobilenet_v2_rules(model: Model) -> Rules:
    """torchvision numbers the blocks consecutively; a block's last convolution is not in a sequence of its own."""
    pairs, position = under("features.0", "stem", CONV_NORM), 1
    for i, (expansion, _, depth, _) in enumerate(model.settings["stages"], start=1):
        names = ["depthwise"] if expansion == 1 else ["expand", "depthwise"]
        for j in range(depth):
            theirs, ours = f"features.{position + j}.conv", f"stage{i}.{j}"
            end = ((f"{len(names)}", "project.conv"), (f"{len(names) + 1}", "project.norm"))
            pairs += [*steps(theirs, ours, names), *under(theirs, ours, end)]
        position += depth
    last = f"stage{len(model.settings['stages']) + 1}"
    return Rules(*pairs, *under(f"features.{position}", last, CONV_NORM), ("classifier.1", "head.linear"))


def _mobilenet_v2(model: Model) -> nn.Module:
    s = model.settings
    return models.MobileNetV2(s["num_classes"], s["width"], [list(row) for row in s["stages"]], dropout=s["dropout"])


def _shufflenet_v2_rules(model: Model) -> Rules:
    """torchvision numbers the stages from 2, as the paper does."""
    last = len(model.settings["widths"])
    pairs = [*under("conv1", "stem", CONV_NORM), *under(f"conv{last + 1}", f"stage{last}", CONV_NORM)]
    for branch, name, at in (
        (1, "shortcut.depthwise", 0), (1, "shortcut.project", 2),
        (2, "main.reduce", 0), (2, "main.depthwise", 3), (2, "main.project", 5),
    ):  # fmt: skip
        here = ((f"{at}", "conv"), (f"{at + 1}", "norm"))
        pairs += under(f"stage{{s+1}}.{{b}}.branch{branch}", f"stage{{s}}.{{b}}.{name}", here)
    return Rules(*pairs, ("fc", "head.linear"))


def _shufflenet_v2(model: Model) -> nn.Module:
    s = model.settings
    if len(s["depths"]) != 3:
        raise ConversionError(f"torchvision's ShuffleNet v2 has 3 stages of units, found {len(s['depths'])}")
    return models.ShuffleNetV2(list(s["depths"]), [s["stem_width"], *s["widths"]], s["num_classes"])


def _mnasnet_rules(model: Model) -> Rules:
    """torchvision numbers all layers consecutively, including ReLUs."""
    pairs: Pairs = []
    for at, name in ((0, "stem"), (3, "stage1.depthwise"), (6, "stage1.project"), (14, "stage8")):
        pairs += under("layers", name, ((f"{at}", "conv"), (f"{at + 1}", "norm")))
    for at, name in ((0, "expand"), (3, "depthwise"), (6, "project")):
        here = ((f"{at}", "conv"), (f"{at + 1}", "norm"))
        pairs += under("layers.{s+6}.{b}.layers", f"stage{{s}}.{{b}}.{name}", here)
    return Rules(*pairs, ("classifier.1", "head.linear"))


def _mnasnet(model: Model) -> nn.Module:
    s = model.settings
    return models.MNASNet(s["width"], s["num_classes"], s["dropout"])


def _mobilenet_v3_rules(model: Model) -> Rules:
    """torchvision numbers the blocks consecutively, and within a block only the steps that it has."""
    width, stages = model.settings["width"], model.settings["stages"]
    pairs, position, inputs = under("features.0", "stem", CONV_NORM), 1, divisible(16 * width)
    for i, rows in enumerate(stages, start=1):
        for j, (_, expanded, channels, excite, *_) in enumerate(rows):
            there = {
                "expand": divisible(expanded * width) != inputs,
                "depthwise": True,
                "gate": excite,
                "project": True,
            }
            names = [name for name, is_there in there.items() if is_there]
            pairs += steps(f"features.{position}.block", f"stage{i}.{j}", names)
            position, inputs = position + 1, divisible(channels * width)
    last = f"stage{len(stages) + 1}"
    pairs += [*under(f"features.{position}", f"{last}.last", CONV_NORM), ("classifier.0", f"{last}.linear")]
    return Rules(*pairs, ("classifier.3", "head.linear"))


def _mobilenet_v3(model: Model) -> nn.Module:
    s, rows, inputs = model.settings, [], 16
    for kernel, expanded, channels, excite, act, stride in (row for stage in s["stages"] for row in stage):
        row = (inputs, kernel, expanded, channels, excite, act, stride, 1, s["width"])
        rows.append(models.mobilenetv3.InvertedResidualConfig(*row))
        inputs = channels
    return models.MobileNetV3(rows, divisible(s["hidden"] * s["width"]), s["num_classes"], dropout=s["dropout"])


def _efficientnet_rules(model: Model) -> Rules:
    """Within a block torchvision numbers only the steps that it has: no expansion where its factor is 1."""
    pairs = under("features.0", "stem", CONV_NORM)
    for i, (kind, expansion, *_) in enumerate(model.settings["stages"], start=1):
        names = ["expand", "project"] if kind == "fused" else ["expand", "depthwise", "gate", "project"]
        if expansion == 1:
            names.remove("project" if kind == "fused" else "expand")
        pairs += steps(f"features.{i}.{{b}}.block", f"stage{i}.{{b}}", names)
    last = len(model.settings["stages"]) + 1
    return Rules(*pairs, *under(f"features.{last}", f"stage{last}", CONV_NORM), ("classifier.1", "head.linear"))


def _efficientnet(model: Model) -> nn.Module:
    """torchvision's fused blocks have no factors for width and depth, so both are multiplied out here."""
    s, net = model.settings, models.efficientnet
    rows, inputs = [], divisible(s["stem_width"] * s["width"])
    for kind, expansion, kernel, stride, channels, depth in s["stages"]:
        out = divisible(channels * s["width"])
        row = (expansion, kernel, stride, inputs, out, math.ceil(depth * s["depth"]))
        rows.append({"mb": net.MBConvConfig, "fused": net.FusedMBConvConfig}[kind](*row))
        inputs = out
    norm = partial(nn.BatchNorm2d, eps=s["norm_eps"], momentum=s["norm_momentum"])
    return models.EfficientNet(rows, s["dropout"], s["stochastic_depth"], s["num_classes"], norm, s["last_width"])


def _regnet_rules(model: Model) -> Rules:
    theirs, ours = "trunk_output.block{s}.block{s}-{b}", "stage{s}.{b}"
    names = {"f.a": "conv1", "f.b": "conv2", "f.c": "conv3", "proj": "shortcut"}
    pairs = [p for left, right in names.items() for p in under(f"{theirs}.{left}", f"{ours}.{right}", CONV_NORM)]
    gate = under(f"{theirs}.f.se", f"{ours}.gate", GATE)
    return Rules(*under("stem", "stem", CONV_NORM), *pairs, *gate, ("fc", "head.linear"))


def _regnet(model: Model) -> nn.Module:
    s = model.settings
    with torch.device("cpu"):  # torchvision computes the widths with tensors
        plan = models.regnet.BlockParams.from_init_params(
            s["depth"], s["w0"], s["wa"], s["wm"], s["group_width"], se_ratio=s["se_ratio"] or None
        )
    return models.RegNet(plan, s["num_classes"], s["stem_width"])


def _convnext_rules(model: Model) -> Rules:
    """torchvision's stages have odd numbers; the even numbers are the downsampling layers between them."""
    pairs: Pairs = under("features.0", "stem", CONV_NORM)
    block = (("0", "depthwise"), ("2", "norm"), ("3", "expand"), ("5", "project"))
    last = len(model.settings["depths"])
    for i in range(1, last + 1):
        theirs, ours = f"features.{2 * i - 1}.{{b}}", f"stage{i}.{{b}}"
        pairs += [(theirs, ours), *under(f"{theirs}.block", ours, block)]
        if i > 1:
            pairs += under(f"features.{2 * i - 2}", f"stage{i}", (("0", "norm"), ("1", "conv")))
    return Rules(*pairs, ("classifier.0", f"stage{last + 1}.norm"), ("classifier.2", "head.linear"))


def _convnext(model: Model) -> nn.Module:
    s = model.settings
    if sum(s["depths"]) == 1:
        raise ConversionError("torchvision's ConvNeXt has at least 2 blocks, found 1")
    rows = [
        models.convnext.CNBlockConfig(width, after, depth)
        for width, after, depth in zip(s["widths"], (*s["widths"][1:], None), s["depths"], strict=True)
    ]
    return models.ConvNeXt(rows, s["stochastic_depth"], s["layer_scale"], s["num_classes"])


FAMILIES = {
    "alexnet": Family(_alexnet_rules, _alexnet),
    "vgg": Family(_vgg_rules, _vgg),
    "googlenet": Family(_googlenet_rules, _googlenet),
    "inception_v3": Family(_inception_v3_rules, _inception_v3),
    "resnet": Family(_resnet_rules, _resnet),
    "squeezenet": Family(_squeezenet_rules, _squeezenet),
    "densenet": Family(_densenet_rules, _densenet, _DENSENET_LEGACY),
    "mobilenet_v2": Family(_mobilenet_v2_rules, _mobilenet_v2),
    "shufflenet_v2": Family(_shufflenet_v2_rules, _shufflenet_v2),
    "mnasnet": Family(_mnasnet_rules, _mnasnet),
    "mobilenet_v3": Family(_mobilenet_v3_rules, _mobilenet_v3),
    "efficientnet": Family(_efficientnet_rules, _efficientnet),
    "regnet": Family(_regnet_rules, _regnet),
    "convnext": Family(_convnext_rules, _convnext),
}
"""The families by the name of the module of `purecnn.zoo` that builds them."""
