"""timm's names and modules for networks that torchvision has too.

In timm, ResNets, DenseNets and Inception v3 have torchvision's names; the other networks have timm's own. In each rule
timm's name is on the left, ours on the right. timm is imported only to build a module.
"""

from functools import partial
from typing import Any

from torch import nn

import purecnn
from converters import families
from converters.families import BASIC, Pairs, under
from converters.library import Family
from converters.peers_inception import MBCONV, SEPARABLE, fixed
from converters.rules import Rules
from purecnn import Model

BARE = {"inception_v3": {"aux_logits": False}}
"""Settings that switch off parts of our networks which timm's do not have."""


def _module(architecture: str, model: Model, **options: Any) -> nn.Module:
    """Build timm's network, after checking that our settings are the ones that it has."""
    import timm

    free = ("num_classes", "in_channels", "image_size", "dropout", "stochastic_depth")
    usual = {**purecnn.create(model.name).settings, **BARE.get(model.name, {})}
    fixed(model, **{name: value for name, value in usual.items() if name not in free})
    classes = model.settings["num_classes"]
    module: nn.Module = timm.create_model(architecture, num_classes=classes, in_chans=model.in_channels, **options)
    return module


def _inverted(model: Model, separable: Pairs) -> Rules:
    """timm counts stages from 0; inverted bottlenecks begin with our second stage, after separable convolutions."""
    stages = len(model.settings["stages"]) if "stages" in model.settings else 7  # MnasNet's
    last = f"stage{stages + 1}"
    pairs: Pairs = [("conv_stem", "stem.conv"), ("bn1", "stem.norm"), ("classifier", "head.linear"), *separable]
    for i in range(2, stages + 1):
        pairs += under(f"blocks.{i - 1}.{{b}}", f"stage{i}.{{b}}", MBCONV)
    return Rules(*pairs, ("conv_head", f"{last}.conv"), ("bn2", f"{last}.norm"))


def _mobilenet_v2_rules(model: Model) -> Rules:
    return _inverted(model, under("blocks.0.{b}", "stage1.{b}", SEPARABLE))


def _mnasnet_rules(model: Model) -> Rules:
    return _inverted(model, under("blocks.0.0", "stage1", SEPARABLE))


def _mnasnet(architecture: str, model: Model) -> nn.Module:
    return _module(architecture, model, bn_momentum=1 - 0.9997)  # timm's default is torch's


def _regnet_rules(model: Model) -> Rules:
    theirs, ours = "s{s}.b{b+1}", "stage{s}.{b}"
    return Rules(
        *under("stem", "stem", BASIC),
        *under(f"{theirs}.conv{{i}}", f"{ours}.conv{{i}}", BASIC),
        *under(f"{theirs}.downsample", f"{ours}.shortcut", BASIC),
        (f"{theirs}.se.fc1", f"{ours}.gate.squeeze"),
        (f"{theirs}.se.fc2", f"{ours}.gate.expand"),
        ("head.fc", "head.linear"),
    )


_SHRINK = (("0", "norm"), ("1", "conv"))


def _convnext_rules(model: Model) -> Rules:
    """timm's layer scales have no axes for height and width."""
    block = (("conv_dw", "depthwise"), ("norm", "norm"), ("mlp.fc1", "expand"), ("mlp.fc2", "project"))
    theirs, ours, last = "stages.{s}.blocks.{b}", "stage{s+1}.{b}", len(model.settings["depths"])
    shrinking = [pair for i in range(1, last) for pair in under(f"stages.{i}.downsample", f"stage{i + 1}", _SHRINK)]
    return Rules(
        *under("stem", "stem", (("0", "conv"), ("1", "norm"))),
        (theirs, ours),
        *under(theirs, ours, block),
        *shrinking,
        ("head.norm", f"stage{last + 1}.norm"),
        ("head.fc", "head.linear"),
        layouts={"layer_scale": ("gamma", "c 1 1 -> c")},
    )


_RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
_WIDER = ("wide_resnet50_2", "wide_resnet101_2", "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d")
_DENSENETS = ("densenet121", "densenet161", "densenet169", "densenet201")
_REGNETS = {
    f"regnet_{kind}_{size}": f"regnet{kind}_{number}"
    for kind in "xy"
    for size, number in {
        "400mf": "004", "800mf": "008", "1_6gf": "016", "3_2gf": "032", "8gf": "080", "16gf": "160", "32gf": "320",
    }.items()
}  # fmt: skip
# timm's names for the networks where torchvision's widths differ from the paper's.
_REGNETS |= {"regnet_x_400mf": "regnetx_004_tv", "regnet_y_800mf": "regnety_008_tv", "regnet_y_8gf": "regnety_080_tv"}


def _family(architecture: str, rules: Any, module: Any = _module) -> Family:
    return Family(rules, partial(module, architecture))


TIMM: dict[str, Family] = {
    **{name: _family(name, families.FAMILIES["resnet"].rules) for name in (*_RESNETS, *_WIDER)},
    **{name: _family(name, families.FAMILIES["densenet"].rules) for name in _DENSENETS},
    "inception_v3": _family("inception_v3", families.FAMILIES["inception_v3"].rules),
    "mobilenet_v2": _family("mobilenetv2_100", _mobilenet_v2_rules),
    "mnasnet1_0": _family("mnasnet_100", _mnasnet_rules, _mnasnet),
    **{f"efficientnet_b{i}": _family(f"efficientnet_b{i}", _mobilenet_v2_rules) for i in range(5)},
    **{name: _family(theirs, _regnet_rules) for name, theirs in _REGNETS.items()},
    **{f"convnext_{size}": _family(f"convnext_{size}", _convnext_rules) for size in ("tiny", "small", "base", "large")},
}
