"""pytorchcv's and timm's names and modules for networks with several paths: DPN and ResNeSt.

In each rule their name is on the left, ours on the right. Each library is imported only to build its modules, so one
can be used without the other.
"""

from torch import nn

from converters.families import BASIC, under
from converters.library import Family
from converters.peers_inception import fixed
from converters.peers_residual import OURS, UNIT, after, any_size, channels, last_stage
from converters.rules import Rules
from purecnn import Model

# timm -----------------------------------------------------------------------------------------------------------


def _dpn_rules(model: Model) -> Rules:
    """timm counts the stem as the first stage, and names a shortcut by its stride."""
    theirs = "features.conv{s+1}_{b+1}"
    pairs = [*under("features.conv1_1", "stem", BASIC), ("features.conv5_bn_ac.bn", f"{last_stage(model)}.norm")]
    for i, name in enumerate(("c1x1_a", "c3x3_b", "c1x1_c"), start=1):
        pairs += [(f"{theirs}.{name}.bn", f"{OURS}.norm{i}"), (f"{theirs}.{name}.conv", f"{OURS}.conv{i}")]
    for i in range(len(model.settings["depths"])):
        shortcut = f"features.conv{i + 2}_1.c1x1_w_s{2 if i else 1}"
        pairs += under(shortcut, f"stage{i + 1}.0.shortcut", BASIC)
    return Rules(*pairs, ("classifier", "head.conv"))


def _dpn(model: Model) -> nn.Module:
    from timm.models.dpn import DPN

    s = model.settings
    small = s["stem_kernel"] == 3
    fixed(model, width=64 if small else 256, stem_kernel=3 if small else 7)
    return DPN(
        s["depths"],
        s["growths"],
        s["inner"],
        s["groups"],
        s["num_classes"],
        model.in_channels,
        small=small,
        num_init_features=s["stem_width"],
    )


def _resnest_rules(model: Model) -> Rules:
    layer, attention = "layer{s}.{b}", f"{OURS}.attention"
    return Rules(
        ("conv1.0", "stem.conv1.conv"), ("conv1.1", "stem.conv1.norm"), ("conv1.3", "stem.conv2.conv"),
        ("conv1.4", "stem.conv2.norm"), ("conv1.6", "stem.conv3.conv"), ("bn1", "stem.conv3.norm"),
        (f"{layer}.conv1", f"{OURS}.conv1"), (f"{layer}.bn1", f"{OURS}.norm1"),
        (f"{layer}.conv3", f"{OURS}.conv3"), (f"{layer}.bn3", f"{OURS}.norm3"),
        (f"{layer}.conv2.conv", f"{attention}.conv"), (f"{layer}.conv2.bn0", f"{attention}.norm"),
        (f"{layer}.conv2.fc1", f"{attention}.gate.squeeze"),
        (f"{layer}.conv2.bn1", f"{attention}.gate.norm"),
        (f"{layer}.conv2.fc2", f"{attention}.gate.expand"),
        (f"{layer}.downsample.1", f"{OURS}.shortcut.conv"), (f"{layer}.downsample.2", f"{OURS}.shortcut.norm"),
        ("fc", "head.linear"),
    )  # fmt: skip


def _resnest(model: Model) -> nn.Module:
    from timm.models.resnest import ResNestBottleneck
    from timm.models.resnet import ResNet

    s = model.settings
    return ResNet(
        ResNestBottleneck,
        s["depths"],
        s["num_classes"],
        model.in_channels,
        cardinality=s["groups"],
        base_width=s["width_per_group"],
        stem_width=s["stem_width"],
        stem_type="deep",
        avg_down=True,
        block_args={"radix": s["radix"], "avd": True},
    )


# pytorchcv ------------------------------------------------------------------------------------------------------


def _dpn_pytorchcv_rules(model: Model) -> Rules:
    return Rules(
        *under("features.init_block", "stem", BASIC),
        (f"{UNIT}.conv{{i}}.bn", f"{OURS}.norm{{i}}"),
        (f"{UNIT}.conv{{i}}.conv", f"{OURS}.conv{{i}}"),
        *under(f"{UNIT}.conv_proj", f"{OURS}.shortcut", BASIC),
        ("features.final_block.activ.bn", f"{last_stage(model)}.norm"),
        ("output.classifier", "head.conv"),
    )


def _dpn_pytorchcv(model: Model) -> nn.Module:
    from pytorchcv.models.dpn import DPN

    s, rows = model.settings, []
    for i, (depth, growth) in enumerate(zip(s["depths"], s["growths"], strict=True)):
        rows.append([(s["width"] << i) + growth * (j + 3) for j in range(depth)])
    stages = range(len(rows))
    return DPN(
        rows, s["stem_width"], s["stem_kernel"], (s["stem_kernel"] - 1) // 2, [s["inner"] << i for i in stages],
        [s["width"] << i for i in stages], list(s["growths"]), s["groups"], b_case=False, for_training=True,
        test_time_pool=False, **channels(model),
    )  # fmt: skip


def _resnest_pytorchcv_rules(model: Model) -> Rules:
    attention, body = f"{OURS}.attention", f"{UNIT}.body"
    gate = (("conv1", "squeeze"), ("bn", "norm"), ("conv2", "expand"))
    return Rules(
        *after("features.init_block.conv{i}", "stem.conv{i}", ""),
        *after(f"{body}.conv1", OURS, "1"),
        *after(f"{body}.conv3", OURS, "3"),
        *under(f"{body}.conv2.conv", attention, BASIC),
        *under(f"{body}.conv2.att", f"{attention}.gate", gate),
        *under(f"{UNIT}.identity_block.conv", f"{OURS}.shortcut", BASIC),
        ("output.fc", "head.linear"),
    )


def _resnest_pytorchcv(model: Model) -> nn.Module:
    from pytorchcv.models.resnesta import ResNeStA

    s = model.settings
    fixed(model, radix=2, groups=1, width_per_group=64)
    rows = [[256 << i] * depth for i, depth in enumerate(s["depths"])]
    return any_size(ResNeStA(rows, 2 * s["stem_width"], bottleneck=True, **channels(model)))


DPNS = ("dpn68", "dpn92", "dpn98", "dpn131", "dpn107")
TIMM: dict[str, Family] = {
    **dict.fromkeys(DPNS, Family(_dpn_rules, _dpn)),
    **dict.fromkeys(("resnest50", "resnest101"), Family(_resnest_rules, _resnest)),
}
PYTORCHCV: dict[str, Family] = {
    **dict.fromkeys(DPNS, Family(_dpn_pytorchcv_rules, _dpn_pytorchcv)),
    **dict.fromkeys(("resnest50", "resnest101"), Family(_resnest_pytorchcv_rules, _resnest_pytorchcv)),
}
