"""pytorchcv's and timm's names and modules for Inception networks, and for networks of separable convolutions or of
searched cells.

Each library is imported only to build its modules.
"""

import json
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from converters.families import BASIC, Pairs, under
from converters.library import Family
from converters.peers_residual import any_size
from converters.rules import ConversionError, Rules
from purecnn import Model
from purecnn.zoo import mnasnet_a1


def fixed(model: Model, **settings: object) -> None:
    """Check that settings which the other library's network does not have are at its fixed values."""
    for name, value in settings.items():
        found = model.settings[name]
        if json.dumps(found) != json.dumps(value):  # lists and tuples count as equal
            raise ConversionError(f"the other library's {model.name} has {name}={value}, found {found}")


def _inception_v4_rules(model: Model) -> Rules:
    """timm numbers the modules consecutively."""
    a, b, c = model.settings["depths"]
    layers = {
        "0": "stem.conv1", "1": "stem.conv2", "2": "stem.conv3", "3.conv": "stem.split1.branch3",
        "4.branch0.{i}": "stem.split2.branch3.{i}", "4.branch1.{i}": "stem.split2.branch9.{i}",
        "5.conv": "stem.split3.branch3",
    }  # fmt: skip
    wide = {"branch0": "branch1", "branch1.{i}": "branch3.{i}", "branch2.{i}": "branch5.{i}"}
    long = {"branch0": "branch1", "branch1.{i}": "branch7.{i}", "branch2.{i}": "branch13.{i}"}
    cross = {
        "branch0": "branch1",
        "branch1_0": "branch3.reduce", "branch1_1a": "branch3.expand.row", "branch1_1b": "branch3.expand.column",
        "branch2_0": "branch5.reduce", "branch2_1": "branch5.column", "branch2_2": "branch5.row",
        "branch2_3a": "branch5.expand.row", "branch2_3b": "branch5.expand.column",
    }  # fmt: skip
    plan = [
        *((f"stage1.{i}", {**wide, "branch3.1": "pool.project"}) for i in range(a)),
        ("stage2.0", {"branch0": "branch3", "branch1.{i}": "branch5.{i}"}),
        *((f"stage2.{i + 1}", {**long, "branch3.1": "pool.project"}) for i in range(b)),
        ("stage3.0", {"branch0.{i}": "branch3.{i}", "branch1.{i}": "branch9.{i}"}),
        *((f"stage3.{i + 1}", {**cross, "branch3.1": "pool.project"}) for i in range(c)),
    ]
    for position, (ours, names) in enumerate(plan, start=6):
        layers |= {f"{position}.{left}": f"{ours}.{right}" for left, right in names.items()}
    pairs = [pair for left, right in layers.items() for pair in under(f"features.{left}", right, BASIC)]
    return Rules(*pairs, ("last_linear", "head.linear"))


def _inception_v4(model: Model) -> nn.Module:
    from timm.models.inception_v4 import InceptionV4

    s = model.settings
    fixed(model, depths=(4, 7, 3))
    return InceptionV4(s["num_classes"], s["in_channels"], drop_rate=s["dropout"])


def _inception_resnet_v2_rules(model: Model) -> Rules:
    """timm has the last module outside the third sequence."""
    last = model.settings["depths"][2]
    layers = {
        "conv2d_1a": "stem.conv1", "conv2d_2a": "stem.conv2", "conv2d_2b": "stem.conv3",
        "conv2d_3b": "stem.reduce", "conv2d_4a": "stem.conv4", "conv2d_7b": "stage4",
        "mixed_5b.branch0": "stage1.mixed.branch1", "mixed_5b.branch1.{i}": "stage1.mixed.branch5.{i}",
        "mixed_5b.branch2.{i}": "stage1.mixed.branch3.{i}", "mixed_5b.branch3.1": "stage1.mixed.pool.project",
        "mixed_6a.branch0": "stage2.0.branch3", "mixed_6a.branch1.{i}": "stage2.0.branch5.{i}",
        "mixed_7a.branch0.{i}": "stage3.0.branch3a.{i}", "mixed_7a.branch1.{i}": "stage3.0.branch3b.{i}",
        "mixed_7a.branch2.{i}": "stage3.0.branch5.{i}",
    }  # fmt: skip
    blocks = {
        "repeat.{b}": ("stage1.{b}", {"branch1.{i}": "branch3.{i}", "branch2.{i}": "branch5.{i}"}),
        "repeat_1.{b}": ("stage2.{b+1}", {"branch1.{i}": "branch7.{i}"}),
        **{f"repeat_2.{i}": (f"stage3.{i + 1}", {"branch1.{i}": "branch3.{i}"}) for i in range(last - 1)},
        "block8": (f"stage3.{last}", {"branch1.{i}": "branch3.{i}"}),
    }
    pairs: Pairs = []
    for theirs, (ours, names) in blocks.items():
        pairs.append((f"{theirs}.conv2d", f"{ours}.restore"))
        layers |= {f"{theirs}.{left}": f"{ours}.{right}" for left, right in {"branch0": "branch1", **names}.items()}
    pairs += [pair for left, right in layers.items() for pair in under(left, right, BASIC)]
    return Rules(*pairs, ("classif", "head.linear"))


def _inception_resnet_v2(model: Model) -> nn.Module:
    from timm.models.inception_resnet_v2 import InceptionResnetV2

    s = model.settings
    fixed(model, depths=(10, 20, 10), scales=(0.17, 0.1, 0.2))
    return InceptionResnetV2(s["num_classes"], s["in_channels"], drop_rate=s["dropout"])


def _inception_resnet_v1_rules(model: Model) -> Rules:
    """pytorchcv counts the reductions as units of the second and third stages."""
    names = ("conv1", "conv2", "conv3", "reduce", "conv4", "conv5")
    layers = {f"init_block.conv{i}": f"stem.{name}" for i, name in enumerate(names, start=1)}
    units = {
        "stage1.unit{b+1}": ("stage1.{b}", ("branch1", "branch3.{i}", "branch5.{i}")),
        "stage2.unit1": ("stage2.0", ("branch3", "branch5.{i}")),
        "stage2.unit{b+2}": ("stage2.{b+1}", ("branch1", "branch7.{i}")),
        "stage3.unit1": ("stage3.0", ("branch3a.{i}", "branch3b.{i}", "branch5.{i}")),
        "stage3.unit{b+2}": ("stage3.{b+1}", ("branch1", "branch3.{i}")),
    }
    pairs: Pairs = []
    for theirs, (ours, branches) in units.items():
        pairs.append((f"features.{theirs}.conv", f"{ours}.restore"))
        for i, branch in enumerate(branches, start=1):
            # A branch of a single convolution has no list, except in a reduction.
            end = "conv_list.conv{i+1}" if "{i}" in branch else "conv_list.conv1" if theirs[-1] == "1" else "conv"
            layers[f"{theirs}.branches.branch{i}.{end}"] = f"{ours}.{branch}"
    pairs += [pair for left, right in layers.items() for pair in under(f"features.{left}", right, BASIC)]
    return Rules(*pairs, ("output.fc1", "stage4.linear"), ("output.bn", "stage4.norm"), ("output.fc2", "head.linear"))


def _inception_resnet_v1(model: Model) -> nn.Module:
    from pytorchcv.models.inceptionresnetv1 import InceptionResNetV1

    s = model.settings
    fixed(model, depths=(5, 10, 6), scales=(0.17, 0.1, 0.2), embedding=512)
    return any_size(InceptionResNetV1(s["dropout"], 1e-3, s["in_channels"], num_classes=s["num_classes"]))


def _xception_rules(model: Model) -> Rules:
    """timm numbers modules, and the layers in each, consecutively; the first module does not begin with a ReLU."""
    s = model.settings
    deep = len(s["entry_widths"])
    last = f"stage{deep + 1}"
    blocks = [
        *(f"stage{i}.0" for i in range(1, deep)), *(f"stage{deep}.{i}" for i in range(s["middle"] + 1)), f"{last}.0",
    ]  # fmt: skip
    separable = [("conv3", "bn3", f"{last}.conv1"), ("conv4", "bn4", f"{last}.conv2")]
    pairs: Pairs = [(f"{theirs}{i}", f"stem.conv{i}.{ours}") for theirs, ours in BASIC for i in (1, 2)]
    for number, ours in enumerate(blocks, start=1):
        pairs += [(f"block{number}.skip", f"{ours}.shortcut.conv"), (f"block{number}.skipbn", f"{ours}.shortcut.norm")]
        for i in (1, 2, 3):
            at = 3 * (i - 1) if number == 1 else 3 * i - 2
            separable.append((f"block{number}.rep.{at}", f"block{number}.rep.{at + 1}", f"{ours}.conv{i}"))
    for conv, norm, ours in separable:
        pairs += [
            (f"{conv}.conv1", f"{ours}.depthwise"), (f"{conv}.pointwise", f"{ours}.pointwise"), (norm, f"{ours}.norm")
        ]  # fmt: skip
    return Rules(*pairs, ("fc", "head.linear"))


def _xception(model: Model) -> nn.Module:
    from timm.models.xception import Xception

    s = model.settings
    fixed(model, stem_widths=(32, 64), entry_widths=(128, 256, 728), middle=8, exit_widths=(1024, 1536, 2048))
    return Xception(s["num_classes"], s["in_channels"], drop_rate=s["dropout"])


_DEPTHWISE = (("conv_dw", "depthwise.conv"), ("bn1", "depthwise.norm"))
_GATE = (("se.conv_reduce", "gate.squeeze"), ("se.conv_expand", "gate.expand"))
SEPARABLE = (*_DEPTHWISE, *_GATE, ("conv_pw", "project.conv"), ("bn2", "project.norm"))
"""timm's ``DepthwiseSeparableConv``."""
MBCONV = (
    ("conv_pw", "expand.conv"), ("bn1", "expand.norm"), ("conv_dw", "depthwise.conv"), ("bn2", "depthwise.norm"),
    *_GATE, ("conv_pwl", "project.conv"), ("bn3", "project.norm"),
)  # fmt: skip
"""timm's ``InvertedResidual``."""


def _mobilenet_v1_timm_rules(model: Model) -> Rules:
    """timm numbers the stages from 0."""
    block = (*_DEPTHWISE, ("conv_pw", "pointwise.conv"), ("bn2", "pointwise.norm"))
    pairs: Pairs = [("conv_stem", "stem.conv"), ("bn1", "stem.norm"), ("classifier", "head.linear")]
    for i in range(len(model.settings["depths"])):
        pairs += under(f"blocks.{i}.{{b}}", f"stage{i + 1}.{{b}}", block)
    return Rules(*pairs)


def _mobilenet_v1_timm(model: Model) -> nn.Module:
    from timm.models import efficientnet

    s = model.settings
    fixed(model, widths=(64, 128, 256, 512, 1024), depths=(1, 2, 2, 6, 2), width=1.0)
    return efficientnet.mobilenetv1_100(act_layer="relu", num_classes=s["num_classes"], in_chans=s["in_channels"])


def _mobilenet_v1_rules(model: Model) -> Rules:
    theirs, ours = "features.stage{s}.unit{b+1}", "stage{s}.{b}"
    return Rules(
        *under("features.init_block", "stem", BASIC),
        *under(f"{theirs}.dw_conv", f"{ours}.depthwise", BASIC),
        *under(f"{theirs}.pw_conv", f"{ours}.pointwise", BASIC),
        ("output", "head.linear"),
    )


def _mobilenet_v1(model: Model) -> nn.Module:
    from pytorchcv.models.mobilenet import MobileNet

    s = model.settings
    rows = [[channels] * depth for channels, depth in zip((32, *s["widths"]), (1, *s["depths"]), strict=True)]
    widths = [[max(8, int(channels * s["width"])) for channels in row] for row in rows]
    return any_size(MobileNet(widths, False, in_channels=s["in_channels"], num_classes=s["num_classes"]))


def _mnasnet_a1_rules(model: Model) -> Rules:
    """timm numbers the stages from 0."""
    last = len(model.settings["stages"]) + 2
    pairs: Pairs = [("conv_stem", "stem.conv"), ("bn1", "stem.norm"), ("classifier", "head.linear")]
    pairs += under("blocks.0.0", "stage1", SEPARABLE)
    for i in range(2, last):
        pairs += under(f"blocks.{i - 1}.{{b}}", f"stage{i}.{{b}}", MBCONV)
    return Rules(*pairs, ("conv_head", f"stage{last}.conv"), ("bn2", f"stage{last}.norm"))


def _mnasnet_a1(model: Model) -> nn.Module:
    from timm.models import efficientnet

    s = model.settings
    fixed(model, stages=mnasnet_a1.A1, width=1.0)
    return efficientnet.semnasnet_100(
        num_classes=s["num_classes"], in_chans=s["in_channels"], drop_rate=s["dropout"], bn_momentum=1 - 0.9997
    )


def _shufflenet_rules(model: Model) -> Rules:
    pairs = [*under("features.init_block", "stem", BASIC), ("output", "head.linear")]
    for i, (conv, name) in enumerate((("compress", "reduce"), ("dw", "depthwise"), ("expand", "expand")), start=1):
        names = ((f"{conv}_conv{i}", f"{name}.conv"), (f"{conv}_bn{i}", f"{name}.norm"))
        pairs += under("features.stage{s}.unit{b+1}", "stage{s}.{b}", names)
    return Rules(*pairs)


def _shufflenet(model: Model) -> nn.Module:
    from pytorchcv.models.shufflenet import ShuffleNet

    s = model.settings
    widths = [[width] * depth for width, depth in zip(s["widths"], s["depths"], strict=True)]
    return any_size(ShuffleNet(widths, s["stem_width"], s["groups"], s["in_channels"], num_classes=s["num_classes"]))


def _polynet_rules(model: Model) -> Rules:
    """pytorchcv counts the reductions as units, and numbers the normalisations of a polynomial's shared convolution."""
    start = "features.init_block"
    layers = {
        f"{start}.conv{{i}}": "stem.conv{i}",
        f"{start}.block1.branches.branch2.conv": "stem.split1.branch3",
        f"{start}.block2.branches.branch1.conv_list.conv{{i+1}}": "stem.split2.branch3.{i}",
        f"{start}.block2.branches.branch2.conv_list.conv{{i+1}}": "stem.split2.branch9.{i}",
        f"{start}.block3.branches.branch2.conv": "stem.split3.branch3",
    }
    reductions = {2: ("branch5.{i}", "branch3"), 3: ("branch5.{i}", "branch3a.{i}", "branch3b.{i}")}
    for stage, branches in reductions.items():
        for i, branch in enumerate(branches, start=1):
            end = "conv{i+1}" if "{i}" in branch else "conv1"
            layers[f"features.stage{stage}.unit1.branches.branch{i}.conv_list.{end}"] = f"stage{stage}.0.{branch}"
    pairs: Pairs = []
    two_ways = {"features.stage1.unit{b+1}": "stage1.{b}"}
    for stage in (2, 3):
        unit, ours = f"features.stage{stage}.unit{{b+2}}", f"stage{stage}.{{b+1}}"
        two_ways[unit] = f"{ours}.two_way"
        convs = {"branch1.conv_list.conv{i+1}": "branch1.{i}", "branch2": "branch2.0"}
        for left, right in convs.items():
            theirs = f"{unit}.poly.pre_block.branches.{left}"
            pairs.append((f"{theirs}.conv", f"{ours}.poly.block1.{right}.conv"))
            pairs.append((f"{theirs}.bns.{{k}}", f"{ours}.poly.block{{k+1}}.{right}.norm"))
        layers[f"{unit}.poly.res_blocks.{{k}}"] = f"{ours}.poly.block{{k+1}}.restore"
    for unit, ours in two_ways.items():
        single = 3 if "stage1" in ours else 2  # the branch with a single convolution
        for k, name in enumerate(("first", "second")):
            theirs = f"{unit}.twoway.res_blocks.{k}"
            for n in range(1, single):
                layers[f"{theirs}.branches.branch{n}.conv_list.conv{{i+1}}"] = f"{ours}.{name}.branch{n}.{{i}}"
            layers[f"{theirs}.branches.branch{single}.conv"] = f"{ours}.{name}.branch{single}.0"
            layers[f"{theirs}.conv"] = f"{ours}.{name}.restore"
    pairs += [pair for left, right in layers.items() for pair in under(left, right, BASIC)]
    return Rules(*pairs, ("output.fc", "head.linear"))


def _polynet(model: Model) -> nn.Module:
    from pytorchcv.models.polynet import polynet

    s = model.settings
    fixed(model, depths=(10, 10, 5), last_scale=0.7)
    return any_size(polynet(dropout_rate=s["dropout"], in_channels=s["in_channels"], num_classes=s["num_classes"]))


def _cell(theirs: str, ours: str, current: str, previous: str) -> Pairs:
    """Rules for a cell of pytorchcv's NASNet or PNASNet: every layer that a cell may contain."""
    pairs = [*under(f"{theirs}.{current}", f"{ours}.current", BASIC)]
    pairs += under(f"{theirs}.{previous}", f"{ours}.previous", BASIC)
    for side in ("left", "right"):
        left, right = f"{theirs}.comb{{k}}_{side}", f"{ours}.block{{k+1}}.{side}"
        pairs += [
            (f"{left}.conv{{i}}.conv.dw_conv", f"{right}.conv{{i}}.depthwise"),
            (f"{left}.conv{{i}}.conv.pw_conv", f"{right}.conv{{i}}.pointwise"),
            (f"{left}.conv{{i}}.bn", f"{right}.norm{{i}}"),
        ]
    return pairs


_HALVING = ("stage1.1", "stage1.2", "stage2.1", "stage3.1")
"""The cells of NASNet and PNASNet that halve the resolution of their second input, the output before the last."""


def _halve(theirs: str, ours: str) -> Pairs:
    names = (("path1.conv", "conv.even"), ("path2.conv", "conv.odd"), ("bn", "norm"))
    return under(theirs, f"{ours}.previous", names)


def _nasnet_rules(model: Model) -> Rules:
    """pytorchcv has the stem's two reductions outside the first stage; the cells in `_HALVING` halve an input."""
    pairs = [*under("features.init_block", "stem", BASIC), ("output.fc", "head.linear")]
    depth = model.settings["depth"]
    units = {
        "features.stem1_unit": "stage1.0",
        "features.stem2_unit": "stage1.1",
        **{f"features.stage1.unit{b + 1}": f"stage1.{b + 2}" for b in range(depth)},
        **{f"features.stage{s}.unit{b + 1}": f"stage{s}.{b}" for s in (2, 3) for b in range(depth + 1)},
    }
    for theirs, ours in units.items():
        halves = ours in _HALVING
        cell = _cell(theirs, ours, "conv1x1", "conv1x1_prev")
        pairs += [pair for pair in cell if not (halves and "_prev" in pair[0])]
        pairs += _halve(f"{theirs}.path", ours) if halves else []
    return Rules(*pairs)


def _nasnet(model: Model) -> nn.Module:
    """pytorchcv's padding depends on the published image size, which depends on ``skip_reduction``."""
    from pytorchcv.models.nasnet import get_nasnet

    s = model.settings
    large = s["skip_reduction"]
    module = get_nasnet(
        repeat=s["depth"],
        penultimate_filters=s["width"],
        init_block_channels=s["stem_width"],
        final_pool_size=11 if large else 7,
        extra_padding=not large,
        skip_reduction_layer_input=large,
        in_size=(s["image_size"], s["image_size"]),
        in_channels=s["in_channels"],
        num_classes=s["num_classes"],
    )
    module.output.dropout.p = s["dropout"]
    return any_size(module)


def _pnasnet_rules(model: Model) -> Rules:
    """pytorchcv has the first cell outside the first stage; the cells in `_HALVING` halve an input."""
    pairs = [*under("features.init_block", "stem", BASIC), ("output.fc", "head.linear")]
    pairs += under("features.stem1_unit.comb0_right", "stage1.0.block1.right", BASIC)
    depth = model.settings["depth"]
    units = {
        "features.stem1_unit": "stage1.0",
        **{f"features.stage1.unit{b + 1}": f"stage1.{b + 1}" for b in range(depth + 1)},
        **{f"features.stage{s}.unit{b + 1}": f"stage{s}.{b}" for s in (2, 3) for b in range(depth)},
    }
    for theirs, ours in units.items():
        halves = ours in _HALVING
        cell = _cell(theirs, ours, "conv_1x1", "conv_prev_1x1")
        pairs += [pair for pair in cell if not (halves and "_prev" in pair[0])]
        pairs += _halve(f"{theirs}.conv_prev_1x1", ours) if halves else []
        pairs += under(f"{theirs}.comb4_right", f"{ours}.block5.right", BASIC)
    return Rules(*pairs)


def _pnasnet(model: Model) -> nn.Module:
    from pytorchcv.models.pnasnet import pnasnet5large

    s = model.settings
    fixed(model, depth=4, width=4320, stem_width=96)
    module = pnasnet5large(in_channels=s["in_channels"], num_classes=s["num_classes"])
    module.output.dropout.p = s["dropout"]
    return any_size(module)


def _timm_cells(stem: str, cells: Mapping[str, str], halving: str) -> Rules:
    """Rules for timm's NASNet or PNASNet: every layer that a cell may contain; ``halving`` prefixes what halves."""
    halve = [("path_1.conv", "conv.even"), ("path_2.conv", "conv.odd"), ("final_path_bn", "norm")]
    separable = [
        ("separable_{i}.depthwise_conv2d", "conv{i}.depthwise"),
        ("separable_{i}.pointwise_conv2d", "conv{i}.pointwise"),
        ("bn_sep_{i}", "norm{i}"),
    ]
    pairs = [*under(stem, "stem", BASIC), ("last_linear", "head.linear")]
    pairs += under("cell_stem_0.comb_iter_0_right", "stage1.0.block1.right", BASIC)
    for theirs, ours in cells.items():
        pairs += under(f"{theirs}.conv_1x1", f"{ours}.current", BASIC)
        if ours in _HALVING:
            pairs += [(f"{theirs}.{halving}{left}", f"{ours}.previous.{right}") for left, right in halve]
        else:
            pairs += under(f"{theirs}.conv_prev_1x1", f"{ours}.previous", BASIC)
        for side in ("left", "right"):
            pairs += under(f"{theirs}.comb_iter_{{k}}_{side}", f"{ours}.block{{k+1}}.{side}", separable)
        pairs += under(f"{theirs}.comb_iter_4_right", f"{ours}.block5.right", BASIC)
    return Rules(*pairs)


def _nasnet_timm_rules(model: Model) -> Rules:
    """timm numbers the normal cells consecutively, and the reduction cells separately."""
    depth = model.settings["depth"]
    cells = {"cell_stem_0": "stage1.0", "cell_stem_1": "stage1.1"}
    cells |= {f"reduction_cell_{s}": f"stage{s + 2}.0" for s in range(2)}
    cells |= {f"cell_{b}": f"stage{b // depth + 1}.{b % depth + (1 if b >= depth else 2)}" for b in range(3 * depth)}
    return _timm_cells("conv0", cells, "")


class _Mean3(nn.Module):
    """3x3 mean with stride 2 and TensorFlow's padding, which is left out of the mean."""

    def forward(self, x: Tensor) -> Tensor:
        odd = [size % 2 for size in x.shape[2:]]
        return F.avg_pool2d(x, 3, 2, odd, ceil_mode=True, count_include_pad=False)


def _nasnet_timm(model: Model) -> nn.Module:
    """timm's means with stride 2 count the padding; TensorFlow, where these weights are from, does not: corrected."""
    from timm.models.nasnet import NASNetALarge

    s = model.settings
    fixed(model, depth=6, skip_reduction=True)
    module = NASNetALarge(
        s["num_classes"], s["in_channels"], s["stem_width"], num_features=s["width"], drop_rate=s["dropout"]
    )
    for cell in (module.cell_stem_0, module.cell_stem_1, module.reduction_cell_0, module.reduction_cell_1):
        cell.comb_iter_2_left = _Mean3()
    return module


def _pnasnet_timm_rules(model: Model) -> Rules:
    """timm numbers the cells consecutively, except for the first two."""
    depth = model.settings["depth"]
    cells = {"cell_stem_0": "stage1.0", "cell_stem_1": "stage1.1"}
    cells |= {f"cell_{b}": f"stage{b // depth + 1}.{b % depth + (0 if b >= depth else 2)}" for b in range(3 * depth)}
    return _timm_cells("conv_0", cells, "conv_prev_1x1.")


def _pnasnet_timm(model: Model) -> nn.Module:
    from timm.models.pnasnet import PNASNet5Large

    s = model.settings
    fixed(model, depth=4, width=4320, stem_width=96)
    return PNASNet5Large(s["num_classes"], s["in_channels"], drop_rate=s["dropout"], pad_type="same")


PYTORCHCV = {
    "inception_resnet_v1": Family(_inception_resnet_v1_rules, _inception_resnet_v1),
    "mobilenet_v1": Family(_mobilenet_v1_rules, _mobilenet_v1),
    "shufflenet_g3": Family(_shufflenet_rules, _shufflenet),
    "polynet": Family(_polynet_rules, _polynet),
    "nasnet_a_large": Family(_nasnet_rules, _nasnet),
    "nasnet_a_mobile": Family(_nasnet_rules, _nasnet),
    "pnasnet5_large": Family(_pnasnet_rules, _pnasnet),
}
"""pytorchcv's families by the name of the model."""

TIMM = {
    "inception_v4": Family(_inception_v4_rules, _inception_v4),
    "inception_resnet_v2": Family(_inception_resnet_v2_rules, _inception_resnet_v2),
    "xception": Family(_xception_rules, _xception),
    "mobilenet_v1": Family(_mobilenet_v1_timm_rules, _mobilenet_v1_timm),
    "mnasnet_a1": Family(_mnasnet_a1_rules, _mnasnet_a1),
    "nasnet_a_large": Family(_nasnet_timm_rules, _nasnet_timm),
    "pnasnet5_large": Family(_pnasnet_timm_rules, _pnasnet_timm),
}
"""timm's families by the name of the model."""
