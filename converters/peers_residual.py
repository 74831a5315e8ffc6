"""pytorchcv's and timm's names and modules for the residual networks.

In each rule their name is on the left, ours on the right. Each library is imported only to build its modules, so one
can be used without the other.
"""

from typing import Any

from torch import nn

from converters.families import BASIC, CONV_NORM, Pairs, under
from converters.library import Family
from converters.rules import Rules
from purecnn import Model

# pytorchcv ------------------------------------------------------------------------------------------------------

UNIT = "features.stage{s}.unit{b+1}"
OURS = "stage{s}.{b}"


def after(theirs: str, ours: str, number: str) -> Pairs:
    """The rules of a convolution and the normalisation after it; in our names both have the number."""
    return under(theirs, ours, (("conv", f"conv{number}"), ("bn", f"norm{number}")))


def last_stage(model: Model) -> str:
    """The stage whose end pytorchcv calls ``post_activ``."""
    return f"stage{len(model.settings['depths'])}"


def any_size(module: Any) -> nn.Module:
    """Replace pytorchcv's last pool, which accepts one image size only, by the mean of all pixels."""
    module.features.final_pool = nn.AdaptiveAvgPool2d(1)
    return module


def channels(model: Model) -> dict[str, Any]:
    """The arguments that all constructors of pytorchcv take."""
    return {"in_channels": model.in_channels, "num_classes": model.settings["num_classes"]}


def _bottlenecks(model: Model) -> list[list[int]]:
    return [[256 << i] * depth for i, depth in enumerate(model.settings["depths"])]


def _resnet_v1_rules(model: Model) -> Rules:
    return Rules(
        *under("features.init_block.conv", "stem", BASIC),
        *after(f"{UNIT}.body.conv{{i}}", OURS, "{i}"),
        *under(f"{UNIT}.identity_conv", f"{OURS}.shortcut", BASIC),
        ("output", "head.linear"),
    )


def _resnet_v1(model: Model) -> nn.Module:
    from pytorchcv.models.resnet import ResNet

    return any_size(ResNet(_bottlenecks(model), 64, bottleneck=True, conv1_stride=True, **channels(model)))


def _preactivation_rules(model: Model) -> Rules:
    return Rules(
        ("features.init_block", "stem.conv"),
        (f"{UNIT}.body.conv{{i}}.bn", f"{OURS}.norm{{i}}"),
        (f"{UNIT}.body.conv{{i}}.conv", f"{OURS}.conv{{i}}"),
        (f"{UNIT}.identity_conv", f"{OURS}.shortcut"),
        ("features.post_activ.bn", f"{last_stage(model)}.norm"),
        ("output", "head.linear"),
    )


def _preactresnet_cifar(model: Model) -> nn.Module:
    from pytorchcv.models.preresnet_cifar import CIFARPreResNet

    s = model.settings
    widths = [[width] * depth for width, depth in zip(s["widths"], s["depths"], strict=True)]
    return any_size(CIFARPreResNet(widths, 16, bottleneck=True, **channels(model)))


def _wideresnet_cifar(model: Model) -> nn.Module:
    from pytorchcv.models.wrn_cifar import CIFARWRN

    s = model.settings
    widths = [[width * s["width"]] * depth for width, depth in zip(s["widths"], s["depths"], strict=True)]
    return any_size(CIFARWRN(widths, s["widths"][0], **channels(model)))


def _densenet_cifar_rules(model: Model) -> Rules:
    """pytorchcv puts a transition into the stage after it."""
    return Rules(
        ("features.init_block", "stem.conv"),
        ("features.stage{s+1}.trans{s+1}.conv.bn", "stage{s}.transition.norm"),
        ("features.stage{s+1}.trans{s+1}.conv.conv", "stage{s}.transition.conv"),
        (f"{UNIT}.conv{{i}}.bn", f"{OURS}.norm{{i}}"),
        (f"{UNIT}.conv{{i}}.conv", f"{OURS}.conv{{i}}"),
        ("features.post_activ.bn", f"{last_stage(model)}.norm"),
        ("output", "head.linear"),
    )


def _densenet_cifar(model: Model) -> nn.Module:
    from pytorchcv.models.densenet_cifar import CIFARDenseNet

    s = model.settings
    width, plan = 4 * s["growth"], []
    for depth in s["depths"]:
        plan.append([width // 2 + s["growth"] * (j + 1) for j in range(depth)])
        width = plan[-1][-1]
    net = CIFARDenseNet(plan, 2 * s["growth"], bottleneck=True, dropout_rate=s["dropout"], **channels(model))
    return any_size(net)


def _gated_rules(model: Model, gates: Pairs) -> Rules:
    """Rules for a ResNet with a gate on the residual branch of each block."""
    return Rules(
        *under("features.init_block.conv", "stem", BASIC),
        *after(f"{UNIT}.body.conv{{i}}", OURS, "{i}"),
        *under(UNIT, OURS, gates),
        *under(f"{UNIT}.identity_conv", f"{OURS}.shortcut", BASIC),
        ("output", "head.linear"),
    )


SE = [("se.conv1", "gate.squeeze"), ("se.conv2", "gate.expand")]
CBAM = [
    ("cbam.ch_gate.mlp.fc1", "channel.squeeze"), ("cbam.ch_gate.mlp.fc2", "channel.expand"),
    *under("cbam.sp_gate.conv", "spatial", BASIC),
]  # fmt: skip


def _seresnet_rules(model: Model) -> Rules:
    return _gated_rules(model, SE)


def _seresnet(model: Model) -> nn.Module:
    from pytorchcv.models.seresnet import SEResNet

    return any_size(SEResNet(_bottlenecks(model), 64, bottleneck=True, conv1_stride=False, **channels(model)))


def _seresnext(model: Model) -> nn.Module:
    from pytorchcv.models.seresnext import SEResNeXt

    s = model.settings
    return any_size(SEResNeXt(_bottlenecks(model), 64, s["groups"], s["width_per_group"], **channels(model)))


def _senet_rules(model: Model) -> Rules:
    return Rules(
        *after("features.init_block.conv{i}", "stem.conv{i}", ""),
        *after(f"{UNIT}.body.conv{{i}}", OURS, "{i}"),
        *under(UNIT, OURS, SE),
        *under(f"{UNIT}.identity_conv", f"{OURS}.shortcut", BASIC),
        ("output.fc", "head.linear"),
    )


def _senet(model: Model) -> nn.Module:
    from pytorchcv.models.senet import SENet

    net = SENet(_bottlenecks(model), 128, model.settings["groups"], 4, **channels(model))
    net.output.dropout.p = model.settings["dropout"]
    return any_size(net)


def _cbam_resnet_rules(model: Model) -> Rules:
    return _gated_rules(model, CBAM)


def _cbam_resnet(model: Model) -> nn.Module:
    """pytorchcv leaves the momentum of the spatial gate's normalisation at 0.1; the authors' code has 0.01."""
    from pytorchcv.models.cbamresnet import CbamResNet

    net = any_size(CbamResNet(_bottlenecks(model), 64, bottleneck=True, **channels(model)))
    for name, module in net.named_modules():
        if name.endswith("sp_gate.conv.bn"):
            module.momentum = 0.01
    return net


def _bam_resnet_rules(model: Model) -> Rules:
    """pytorchcv puts a BAM into the first block of the stage after it."""
    theirs, ours = "features.stage{s+1}.unit1.bam", "stage{s}.bam"
    return Rules(
        *under("features.init_block.conv", "stem", BASIC),
        *after(f"{UNIT}.res_unit.body.conv{{i}}", OURS, "{i}"),
        *under(f"{UNIT}.res_unit.identity_conv", f"{OURS}.shortcut", BASIC),
        *under(
            f"{theirs}.ch_att",
            f"{ours}.channel",
            [("init_fc.fc", "squeeze"), ("init_fc.bn", "norm"), ("final_fc", "expand")],
        ),
        (f"{theirs}.sp_att.init_conv.conv", f"{ours}.spatial.reduce"),
        (f"{theirs}.sp_att.init_conv.bn", f"{ours}.spatial.norm"),
        *after(f"{theirs}.sp_att.dil_convs.conv{{i}}", f"{ours}.spatial", "{i}"),
        (f"{theirs}.sp_att.final_conv", f"{ours}.spatial.project"),
        ("output", "head.linear"),
    )


def _bam_resnet(model: Model) -> nn.Module:
    from pytorchcv.models.bamresnet import BamResNet

    return any_size(BamResNet(_bottlenecks(model), 64, bottleneck=True, **channels(model)))


def _pyramidnet_cifar_rules(model: Model) -> Rules:
    return Rules(
        *under("features.init_block", "stem", BASIC),
        (f"{UNIT}.body.conv{{i}}.conv", f"{OURS}.conv{{i}}"),
        (f"{UNIT}.body.conv1.bn", f"{OURS}.norm1"),
        (f"{UNIT}.body.conv2.bn", f"{OURS}.norm2"),
        (f"{UNIT}.bn", f"{OURS}.norm3"),
        ("features.post_activ.bn", f"{last_stage(model)}.norm"),
        ("output", "head.linear"),
    )


def _pyramidnet_cifar(model: Model) -> nn.Module:
    from pytorchcv.models.pyramidnet_cifar import CIFARPyramidNet

    s, widths, done = model.settings, [], 0
    for depth in s["depths"]:
        widths.append([round(16 + s["widening"] * (done + j + 1) / sum(s["depths"])) for j in range(depth)])
        done += depth
    return any_size(CIFARPyramidNet(widths, 16, bottleneck=False, **channels(model)))


def _resattnet_rules(model: Model) -> Rules:
    """pytorchcv keeps the levels of an hourglass in lists; ours are nested."""
    last = len(model.settings["widths"])
    unit = [("body.conv{i}.bn", "norm{i}"), ("body.conv{i}.conv", "conv{i}"), ("identity_conv", "shortcut")]
    mask = [("conv{i}.bn", "norm{i}"), ("conv{i}.conv", "conv{i}")]
    pairs = under(UNIT, OURS, unit)
    blocks = [
        ("init_blocks.blocks.block{j+1}", "first.{j}"),
        ("hg.skip_seq.skip1.blocks.block{j+1}", "trunk.{j}"),
        ("final_block", "last"),
    ]
    for level in range(1, last):
        glass = "hourglass" + ".inner" * (level - 1)
        blocks += [
            (f"hg.down_seq.down{level}.res_blocks.blocks.block{{j+1}}", f"{glass}.down.{{j}}"),
            (f"hg.up_seq.up{level}.res_blocks.blocks.block{{j+1}}", f"{glass}.up.{{j}}"),
        ]
        if level > 1:
            blocks.append((f"hg.skip_seq.skip{level}.skip1", f"{glass}.skip"))
    for left, right in blocks:
        pairs += under(f"{UNIT}.{left}", f"{OURS}.{right}", unit)
    return Rules(
        *under("features.init_block.conv", "stem", BASIC),
        *pairs,
        *under(f"{UNIT}.middle_block", f"{OURS}.mask", mask),
        ("features.post_activ.bn", f"stage{last}.norm"),
        ("output", "head.linear"),
    )


def _resattnet(model: Model) -> nn.Module:
    from pytorchcv.models.resattnet import ResAttNet

    s = model.settings
    counts = [*s["modules"], 2]
    widths = [[width] * (1 + count) for width, count in zip(s["widths"], counts, strict=True)]
    attentions = [*([0] + [1] * count for count in s["modules"]), [0, 0, 0]]
    net = ResAttNet(widths, s["widths"][0] // 4, attentions, [s["p"], s["t"], s["r"]], **channels(model))
    return any_size(net)


def _fractalnet_cifar_rules(model: Model) -> Rules:
    """pytorchcv counts blocks along the longest column; we count them in each column."""
    columns, pairs = model.settings["columns"], []
    for part in range(len(model.settings["widths"])):
        ours = f"stage{part}" if part else "stem"
        for column in range(1, columns + 1):
            for i in range(2 ** (columns - column)):
                block = f"block{(i + 1) * 2 ** (column - 1)}.subblock{column}"
                pairs += under(f"features.unit{part + 1}.block.blocks.{block}", f"{ours}.column{column}_{i}", BASIC)
    return Rules(*pairs, ("output", "head.linear"))


def _fractalnet_cifar(model: Model) -> nn.Module:
    from pytorchcv.models.fractalnet_cifar import CIFARFractalNet

    s = model.settings
    dropouts = [s["dropout"] * i for i in range(len(s["widths"]))]
    return CIFARFractalNet(
        list(s["widths"]), s["columns"], dropouts, s["local_drop"], s["global_drop"], **channels(model)
    )


PYTORCHCV: dict[str, Family] = {
    "resnet50_v1": Family(_resnet_v1_rules, _resnet_v1),
    "preactresnet164_cifar": Family(_preactivation_rules, _preactresnet_cifar),
    "wideresnet28_10_cifar": Family(_preactivation_rules, _wideresnet_cifar),
    "wideresnet40_4_cifar": Family(_preactivation_rules, _wideresnet_cifar),
    "densenetbc100_k12_cifar": Family(_densenet_cifar_rules, _densenet_cifar),
    "seresnet50": Family(_seresnet_rules, _seresnet),
    "seresnext50_32x4d": Family(_seresnet_rules, _seresnext),
    "senet154": Family(_senet_rules, _senet),
    "bam_resnet50": Family(_bam_resnet_rules, _bam_resnet),
    "cbam_resnet50": Family(_cbam_resnet_rules, _cbam_resnet),
    "pyramidnet110_a48_cifar": Family(_pyramidnet_cifar_rules, _pyramidnet_cifar),
    "resattnet56": Family(_resattnet_rules, _resattnet),
    "fractalnet_cifar": Family(_fractalnet_cifar_rules, _fractalnet_cifar),
}

# timm -----------------------------------------------------------------------------------------------------------


def _preactresnet_rules(model: Model) -> Rules:
    return Rules(
        ("stem.conv", "stem.conv"),
        ("stages.{s}.blocks.{b}.conv{i}", "stage{s+1}.{b}.conv{i}"),
        ("stages.{s}.blocks.{b}.norm{i}", "stage{s+1}.{b}.norm{i}"),
        ("stages.{s}.blocks.{b}.downsample.conv", "stage{s+1}.{b}.shortcut"),
        ("norm", f"{last_stage(model)}.norm"),
        ("head.fc", "head.conv"),
    )


def _preactresnet(model: Model) -> nn.Module:
    from timm.layers.create_conv2d import create_conv2d
    from timm.layers.norm_act import BatchNormAct2d
    from timm.models.resnetv2 import ResNetV2

    s = model.settings
    return ResNetV2(
        s["depths"],
        s["widths"],
        s["num_classes"],
        model.in_channels,
        conv_layer=create_conv2d,
        norm_layer=BatchNormAct2d,
    )


def _timm_seresnet_rules(model: Model) -> Rules:
    layer = "layer{s}.{b}"
    return Rules(
        ("conv1", "stem.conv"),
        ("bn1", "stem.norm"),
        (f"{layer}.conv{{i}}", f"{OURS}.conv{{i}}"),
        (f"{layer}.bn{{i}}", f"{OURS}.norm{{i}}"),
        (f"{layer}.se.fc1", f"{OURS}.gate.squeeze"),
        (f"{layer}.se.fc2", f"{OURS}.gate.expand"),
        *under(f"{layer}.downsample", f"{OURS}.shortcut", CONV_NORM),
        ("fc", "head.linear"),
    )


def _timm_senet_rules(model: Model) -> Rules:
    """As `_timm_seresnet_rules`, except for the stem of three convolutions."""
    stem = [
        ("conv1.0", "stem.conv1.conv"), ("conv1.1", "stem.conv1.norm"), ("conv1.3", "stem.conv2.conv"),
        ("conv1.4", "stem.conv2.norm"), ("conv1.6", "stem.conv3.conv"), ("bn1", "stem.conv3.norm"),
    ]  # fmt: skip
    body = [(left.text, right.text) for left, right in _timm_seresnet_rules(model).pairs]
    return Rules(*stem, *(pair for pair in body if not pair[1].startswith("stem.")))


def _timm_resnet(model: Model, **options: Any) -> nn.Module:
    from timm.models.resnet import Bottleneck, ResNet

    return ResNet(
        Bottleneck,
        model.settings["depths"],
        model.settings["num_classes"],
        model.in_channels,
        cardinality=model.settings["groups"],
        drop_rate=model.settings["dropout"],
        block_args={"attn_layer": "se"},
        **options,
    )


def _timm_seresnet(model: Model) -> nn.Module:
    return _timm_resnet(model, base_width=model.settings["width_per_group"])


def _timm_senet(model: Model) -> nn.Module:
    return _timm_resnet(
        model,
        base_width=4,
        stem_type="deep",
        stem_width=64,
        down_kernel_size=3,
        block_reduce_first=2,
    )


TIMM: dict[str, Family] = {
    "seresnet50": Family(_timm_seresnet_rules, _timm_seresnet),
    "seresnext50_32x4d": Family(_timm_seresnet_rules, _timm_seresnet),
    "senet154": Family(_timm_senet_rules, _timm_senet),
    "preactresnet50": Family(_preactresnet_rules, _preactresnet),
}
