"""The table of all architectures, over which the other files state their laws.

A new network is a new row of `TABLE`, and a new family is also a row of `CASES`.
"""

import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import models

import purecnn
from purecnn import Model, Outputs, random, tree
from purecnn.model import find
from purecnn.tree import Tree

COMPILER = any(map(shutil.which, ("c++", "g++", "clang++")))
"""Whether there is one of C++, as torch needs for its compiled code on a CPU."""


class Row(NamedTuple):
    """What is known of a model from elsewhere."""

    parameters: int
    """Published."""
    draws: tuple[str, ...] = ()
    """The settings that are rates of random draws; at 0 nothing is drawn."""
    peer: Mapping[str, Any] | None = {}
    """Further settings of torchvision's function of the same name; None where torchvision has no such model."""
    image_size: int = 64
    """Side of the images in the tests: small, but every convolution sees more than its padding."""


_BOTH = ("dropout", "dropout_aux")
_DROP = ("dropout",)
_DEPTH = ("stochastic_depth",)
_FRACTAL = ("dropout", "local_drop", "global_drop")
_DROP_DEPTH = ("dropout", "stochastic_depth")

TABLE = {
    "lecun1989": Row(9_760, peer=None, image_size=16),
    "lenet5_1998": Row(60_000, peer=None, image_size=32),
    "lenet5": Row(61_706, peer=None, image_size=32),
    "alexnet_2012": Row(60_965_224, _DROP, peer=None, image_size=224),
    "zfnet": Row(62_357_608, _DROP, peer=None, image_size=224),
    "zfnetb": Row(107_627_624, _DROP, peer=None, image_size=224),
    "nin_cifar": Row(966_986, _DROP, peer=None, image_size=32),
    "alexnet": Row(61_100_840, _DROP),
    "vgg11": Row(132_863_336, _DROP),
    "vgg11_bn": Row(132_868_840, _DROP),
    "vgg13": Row(133_047_848, _DROP),
    "vgg13_bn": Row(133_053_736, _DROP),
    "vgg16": Row(138_357_544, _DROP),
    "vgg16_bn": Row(138_365_992, _DROP),
    "vgg19": Row(143_667_240, _DROP),
    "vgg19_bn": Row(143_678_248, _DROP),
    "vgg11_lrn": Row(132_863_336, _DROP, peer=None),
    "vgg16_1x1": Row(133_638_952, _DROP, peer=None),
    "googlenet_2014": Row(13_378_280, _BOTH, peer=None, image_size=224),
    "googlenet": Row(13_004_888, _BOTH, {"init_weights": False}),
    "bn_inception": Row(11_295_240, peer=None, image_size=224),
    "highway19_cifar": Row(2_256_838, _DROP, peer=None, image_size=32),
    "inception_v3": Row(27_161_264, _DROP, {"init_weights": False}, image_size=299),
    "resnet18": Row(11_689_512),
    "resnet34": Row(21_797_672),
    "resnet50": Row(25_557_032),
    "resnet101": Row(44_549_160),
    "resnet152": Row(60_192_808),
    "wide_resnet50_2": Row(68_883_240),
    "wide_resnet101_2": Row(126_886_696),
    "resnext50_32x4d": Row(25_028_904),
    "resnext101_32x8d": Row(88_791_336),
    "resnext101_64x4d": Row(83_455_272),
    "squeezenet1_0": Row(1_248_424, _DROP),
    "squeezenet1_1": Row(1_235_496, _DROP),
    "densenet121": Row(7_978_856, _DROP),
    "densenet161": Row(28_681_000, _DROP),
    "densenet169": Row(14_149_480, _DROP),
    "densenet201": Row(20_013_928, _DROP),
    "resnet20_cifar": Row(269_722, peer=None, image_size=32),
    "resnet32_cifar": Row(464_154, peer=None, image_size=32),
    "resnet44_cifar": Row(658_586, peer=None, image_size=32),
    "resnet56_cifar": Row(853_018, peer=None, image_size=32),
    "resnet110_cifar": Row(1_727_962, peer=None, image_size=32),
    "resnet50_v1": Row(25_557_032, peer=None),
    "resnet110_stochastic_cifar": Row(1_727_962, _DEPTH, None, 32),
    "preactresnet50": Row(25_549_352, peer=None),
    "preactresnet164_cifar": Row(1_703_258, peer=None, image_size=32),
    "fractalnet_cifar": Row(33_724_618, _FRACTAL, None, 32),
    "wideresnet28_10_cifar": Row(36_479_194, _DROP, None, 32),
    "wideresnet40_4_cifar": Row(8_949_210, _DROP, None, 32),
    "densenet40_k12_cifar": Row(1_019_722, _DROP, None, 32),
    "densenetbc100_k12_cifar": Row(769_162, _DROP, None, 32),
    "pyramidnet110_a48_cifar": Row(1_772_706, peer=None, image_size=32),
    "resattnet56": Row(31_810_728, peer=None),
    "seresnet50": Row(28_088_024, _DROP, None),
    "seresnext50_32x4d": Row(27_559_896, _DROP, None),
    "senet154": Row(115_088_984, _DROP, None),
    "capsnet": Row(8_215_568, peer=None, image_size=28),
    "bam_resnet50": Row(25_915_099, peer=None),
    "cbam_resnet50": Row(28_089_624, peer=None),
    # The survey prints 36.92 million; the authors' table 36.9.
    "cmpe_se_wideresnet28_10_cifar": Row(36_883_234, _DROP, None, 32),
    "inception_v4": Row(42_679_816, _DROP, peer=None, image_size=299),
    "inception_resnet_v1": Row(23_995_624, _DROP, peer=None, image_size=299),
    "inception_resnet_v2": Row(55_843_464, _DROP, peer=None, image_size=299),
    "xception": Row(22_855_952, _DROP, peer=None),
    "polynet": Row(95_366_600, _DROP, peer=None, image_size=331),
    "mobilenet_v1": Row(4_231_976, peer=None),
    "shufflenet_g3": Row(1_865_728, peer=None),
    "nasnet_a_mobile": Row(5_289_978, _DROP, peer=None),
    "nasnet_a_large": Row(88_753_150, _DROP, peer=None, image_size=331),
    "pnasnet5_large": Row(86_057_668, _DROP, peer=None, image_size=331),
    "mnasnet_a1": Row(3_887_038, _DROP, peer=None),
    "dpn68": Row(12_611_602, peer=None),
    "dpn92": Row(37_668_392, peer=None),
    "dpn98": Row(61_570_728, peer=None),
    "dpn131": Row(79_254_504, peer=None),
    "dpn107": Row(86_917_800, peer=None),
    "resnest50": Row(27_483_240, peer=None),
    "resnest101": Row(48_275_016, peer=None),
    "delugenet146_cifar": Row(6_686_250, peer=None, image_size=32),
    "delugenet218_cifar": Row(9_981_738, peer=None, image_size=32),
    "wide_delugenet146_cifar": Row(20_150_658, peer=None, image_size=32),
    "amoebanet_d": Row(46_095_080, _DROP, None),
    "airbench94": Row(1_971_640, peer=None, image_size=32),
    "mobilenet_v2": Row(3_504_872, _DROP),
    "shufflenet_v2_x0_5": Row(1_366_792),
    "shufflenet_v2_x1_0": Row(2_278_604),
    "shufflenet_v2_x1_5": Row(3_503_624),
    "shufflenet_v2_x2_0": Row(7_393_996),
    "mnasnet0_5": Row(2_218_512, _DROP),
    "mnasnet0_75": Row(3_170_208, _DROP),
    "mnasnet1_0": Row(4_383_312, _DROP),
    "mnasnet1_3": Row(6_282_256, _DROP),
    "mobilenet_v3_large": Row(5_483_032, _DROP),
    "mobilenet_v3_small": Row(2_542_856, _DROP),
    "efficientnet_b0": Row(5_288_548, _DROP_DEPTH),
    "efficientnet_b1": Row(7_794_184, _DROP_DEPTH),
    "efficientnet_b2": Row(9_109_994, _DROP_DEPTH),
    "efficientnet_b3": Row(12_233_232, _DROP_DEPTH),
    "efficientnet_b4": Row(19_341_616, _DROP_DEPTH),
    "efficientnet_b5": Row(30_389_784, _DROP_DEPTH),
    "efficientnet_b6": Row(43_040_704, _DROP_DEPTH),
    "efficientnet_b7": Row(66_347_960, _DROP_DEPTH),
    "efficientnet_v2_s": Row(21_458_488, _DROP_DEPTH),
    "efficientnet_v2_m": Row(54_139_356, _DROP_DEPTH),
    "efficientnet_v2_l": Row(118_515_272, _DROP_DEPTH),
    "regnet_x_400mf": Row(5_495_976),
    "regnet_x_800mf": Row(7_259_656),
    "regnet_x_1_6gf": Row(9_190_136),
    "regnet_x_3_2gf": Row(15_296_552),
    "regnet_x_8gf": Row(39_572_648),
    "regnet_x_16gf": Row(54_278_536),
    "regnet_x_32gf": Row(107_811_560),
    "regnet_y_400mf": Row(4_344_144),
    "regnet_y_800mf": Row(6_432_512),
    "regnet_y_1_6gf": Row(11_202_430),
    "regnet_y_3_2gf": Row(19_436_338),
    "regnet_y_8gf": Row(39_381_472),
    "regnet_y_16gf": Row(83_590_140),
    "regnet_y_32gf": Row(145_046_770),
    "regnet_y_128gf": Row(644_812_894),
    "convnext_tiny": Row(28_589_128, _DEPTH),
    "convnext_small": Row(50_223_688, _DEPTH),
    "convnext_base": Row(88_591_464, _DEPTH),
    "convnext_large": Row(197_767_336, _DEPTH),
}

PEERS = [name for name, row in TABLE.items() if row.peer is not None]
"""The models that torchvision has."""


class Case(NamedTuple):
    """A family's smallest network that still has every kind of layer, for laws that are dear to check."""

    name: str
    settings: Mapping[str, Any]
    image_size: int

    def model(self, **settings: Any) -> Model:
        """With its dropout, unless told otherwise."""
        return purecnn.create(self.name, **{**self.settings, **settings})

    def quiet(self, **settings: Any) -> Model:
        """Without dropout."""
        return self.model(**dict.fromkeys(TABLE[self.name].draws, 0.0), **settings)

    def images(self, batch: int = 2, seed: int = 7) -> Tensor:
        """Random images."""
        channels = self.model().in_channels
        return random.normal(random.key(seed), (batch, channels, self.image_size, self.image_size))


CASES = {
    "lecun1989": Case("lecun1989", {}, 16),
    "lenet5_1998": Case("lenet5_1998", {"num_classes": 5}, 32),
    "lenet": Case("lenet5", {}, 32),
    "alexnet_2012": Case(
        "alexnet_2012", {"num_classes": 5, "widths": (8, 12, 12, 8, 8), "hidden_width": 16, "image_size": 63}, 63
    ),
    "zfnet": Case("zfnet", {"num_classes": 5, "widths": (6, 8, 8, 8, 6), "hidden_width": 16, "image_size": 51}, 51),
    "nin": Case("nin_cifar", {"num_classes": 5, "widths": ((8, 6), (8, 6), (8, 6))}, 16),
    "vgg_2014": Case(
        "vgg11_lrn", {"num_classes": 5, "kernels": ((3,), (3, 1), (3,)), "widths": (6, 6, 8), "hidden_width": 16}, 32
    ),
    # The auxiliary heads want 79 pixels. At some sizes a rectifier or a pool flips by rounding in float32.
    "googlenet_2014": Case("googlenet_2014", {"num_classes": 5, "image_size": 87}, 87),
    # Below 65 the last statistics are of 4 values.
    "bn_inception": Case("bn_inception", {"num_classes": 5}, 65),
    "highway": Case("highway19_cifar", {"num_classes": 5, "widths": (6, 8), "depths": (2, 1), "last_width": 10}, 16),
    "alexnet": Case("alexnet", {"num_classes": 5}, 63),
    "vgg": Case("vgg11_bn", {"num_classes": 5, "depths": (1, 2, 1), "widths": (4, 6, 8)}, 32),
    "googlenet": Case("googlenet", {"num_classes": 5, "transform_input": True}, 32),
    # The auxiliary head would want 299 pixels.
    "inception_v3": Case("inception_v3", {"num_classes": 5, "aux_logits": False}, 107),
    "resnet": Case("resnet50", {"num_classes": 5, "depths": (2, 1, 1, 1), "groups": 2, "width_per_group": 8}, 33),
    "squeezenet": Case("squeezenet1_1", {"num_classes": 5}, 33),
    "densenet": Case(
        "densenet121", {"num_classes": 5, "depths": (2, 1), "growth": 4, "stem_width": 6, "dropout": 0.3}, 33
    ),
    "resnet_cifar": Case("resnet20_cifar", {"num_classes": 5, "depths": (1, 2, 1), "widths": (4, 6, 8)}, 16),
    "resnet_v1": Case("resnet50_v1", {"num_classes": 5, "depths": (2, 1)}, 33),
    "stochastic_depth": Case(
        "resnet110_stochastic_cifar", {"num_classes": 5, "depths": (1, 2, 1), "widths": (4, 6, 8)}, 16
    ),
    "preactresnet": Case("preactresnet50", {"num_classes": 5, "depths": (2, 1), "widths": (16, 24)}, 33),
    "wideresnet_cifar": Case(
        "wideresnet28_10_cifar",
        {"num_classes": 5, "depths": (2, 1), "widths": (4, 6), "width": 2, "dropout": 0.3},
        16,
    ),
    "densenet_cifar": Case(
        "densenetbc100_k12_cifar", {"num_classes": 5, "depths": (2, 1), "growth": 4, "dropout": 0.3}, 16
    ),
    "senet": Case("senet154", {"num_classes": 5, "depths": (1, 2), "groups": 4}, 33),
    "capsnet": Case(
        "capsnet", {"num_classes": 5, "width": 8, "maps": 2, "size": 4, "class_size": 6, "image_size": 21}, 21
    ),
    "bam": Case("bam_resnet50", {"num_classes": 5, "depths": (2, 1)}, 33),
    "cbam": Case("cbam_resnet50", {"num_classes": 5, "depths": (2, 1)}, 33),
    "pyramidnet": Case("pyramidnet110_a48_cifar", {"num_classes": 5, "depths": (2, 1), "widening": 6}, 17),
    "cmpe_se": Case(
        "cmpe_se_wideresnet28_10_cifar",
        {"num_classes": 5, "depths": (2, 1), "widths": (4, 6), "width": 2, "reduction": 4, "dropout": 0.3},
        16,
    ),
    "resattnet": Case("resattnet56", {"num_classes": 5, "modules": (1, 1), "widths": (8, 12, 16)}, 33),
    "fractalnet": Case("fractalnet_cifar", {"num_classes": 5, "widths": (4, 6, 8), "dropout": 0.3}, 16),
    "inception_v4": Case("inception_v4", {"num_classes": 5, "depths": (1, 1, 1)}, 107),
    "inception_resnet": Case("inception_resnet_v1", {"num_classes": 5, "depths": (1, 1, 2), "embedding": 16}, 107),
    "xception": Case(
        "xception",
        {"num_classes": 5, "stem_widths": (6, 8), "entry_widths": (10, 12), "middle": 1, "exit_widths": (14, 16, 20)},
        65,
    ),
    "polynet": Case("polynet", {"num_classes": 5, "depths": (1, 1, 1)}, 107),
    "mobilenet_v1": Case("mobilenet_v1", {"num_classes": 5, "widths": (8, 16), "depths": (1, 2), "width": 0.5}, 33),
    "shufflenet_v1": Case(
        "shufflenet_g3", {"num_classes": 5, "widths": (24, 48), "depths": (2, 1), "stem_width": 6}, 65
    ),
    "nasnet": Case("nasnet_a_mobile", {"num_classes": 5, "depth": 2, "width": 96, "stem_width": 6}, 48),
    "pnasnet": Case("pnasnet5_large", {"num_classes": 5, "depth": 2, "width": 80, "stem_width": 6}, 48),
    "dpn": Case(
        "dpn92",
        {"num_classes": 5, "depths": (2, 1), "growths": (2, 4), "width": 8, "inner": 8, "groups": 4, "stem_width": 6},
        33,
    ),
    # The gate's statistics are of one value per image, in any size.
    "resnest": Case(
        "resnest50", {"num_classes": 5, "depths": (2, 1), "groups": 2, "width_per_group": 8, "stem_width": 6}, 33
    ),
    "amoebanet": Case("amoebanet_d", {"num_classes": 5, "width": 16, "stem_width": 6}, 48),
    "delugenet": Case("delugenet146_cifar", {"num_classes": 5, "depths": (2, 1, 2), "width": 8}, 16),
    "mnasnet_a1": Case(
        "mnasnet_a1", {"num_classes": 5, "stages": ((6, 3, 16, 2, 2, False), (3, 5, 24, 2, 2, True)), "width": 0.5}, 33
    ),
    "airbench": Case("airbench94", {"num_classes": 5, "widths": (26, 28)}, 32),
    "mobilenet_v2": Case(
        "mobilenet_v2", {"num_classes": 5, "stages": ((1, 8, 2, 1), (6, 8, 2, 2)), "width": 0.5}, 33
    ),
    "shufflenet_v2": Case(
        "shufflenet_v2_x0_5", {"num_classes": 5, "widths": (8, 12, 16, 10), "depths": (1, 2, 1), "stem_width": 6}, 65
    ),
    "mnasnet": Case("mnasnet0_5", {"num_classes": 5, "width": 0.1}, 65),
    "mobilenet_v3": Case(
        "mobilenet_v3_small",
        {
            "num_classes": 5,
            "stages": (((3, 16, 16, True, "RE", 1),), ((5, 24, 8, True, "HS", 2), (3, 24, 8, False, "HS", 1))),
            "hidden": 16,
        },
        33,
    ),
    "efficientnet": Case(
        "efficientnet_v2_s",
        {
            "num_classes": 5,
            "stages": (
                ("fused", 1, 3, 1, 8, 2), ("fused", 4, 3, 2, 16, 2), ("mb", 4, 3, 2, 16, 2), ("mb", 1, 5, 1, 16, 1),
            ),
            "stem_width": 8,
            "last_width": 24,
            "stochastic_depth": 0.4,
        },
        33,
    ),
    "regnet": Case(
        "regnet_y_400mf", {"num_classes": 5, "depth": 4, "w0": 16, "wa": 6.0, "wm": 1.8, "stem_width": 12}, 33
    ),
    "convnext": Case(
        "convnext_tiny",
        {"num_classes": 5, "depths": (1, 2), "widths": (6, 8), "layer_scale": 0.5, "stochastic_depth": 0.4},
        35,
    ),
}  # fmt: skip
"""By the module of `purecnn.zoo` that builds the family."""


def family(name: str) -> str:
    """The module of `purecnn.zoo` that builds a model."""
    return find(name).build.__module__.rpartition(".")[2]


def quiet(name: str) -> Model:
    """A model of the registry without dropout."""
    return purecnn.create(name, **dict.fromkeys(TABLE[name].draws, 0.0))


class Abstract(TorchFunctionMode):
    """No memory behind what torch.nn makes; ``torch.device("meta")`` would take in torchvision's own arithmetic."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.empty, torch.zeros, torch.ones):
            kwargs = {**(kwargs or {}), "device": "meta"}
        return func(*args, **(kwargs or {}))


def peer(name: str) -> nn.Module:
    """torchvision's model without dropout, built by torchvision's own function; no memory behind its tensors."""
    row = TABLE[name]
    assert row.peer is not None
    # DenseNet calls it drop_rate, and has none by default.
    off = {} if family(name) == "densenet" else dict.fromkeys(row.draws, 0.0)
    if "stochastic_depth" in off:
        off["stochastic_depth_prob"] = off.pop("stochastic_depth")
    with Abstract():
        return models.get_model(name, weights=None, **off, **row.peer)


def drawn_state_dict(module: nn.Module, seed: int = 0) -> "OrderedDict[str, Tensor]":
    """Random values for every tensor of a module, running statistics and counters too; activations stay finite."""
    generator = torch.Generator().manual_seed(seed)
    state_dict = module.state_dict()

    def uniform(shape: torch.Size, low: float, high: float) -> Tensor:
        return torch.empty(shape).uniform_(low, high, generator=generator)

    for key, meta in state_dict.items():
        leaf = key.rpartition(".")[2]
        if leaf == "num_batches_tracked":
            state_dict[key] = torch.randint(1000, meta.shape, generator=generator)
        elif leaf in ("running_mean", "bias"):
            state_dict[key] = uniform(meta.shape, -0.1, 0.1)
        elif meta.ndim == 1:  # running_var, and the weight of a normalisation
            state_dict[key] = uniform(meta.shape, 0.5, 1.5)
        else:
            bound = (6 / meta[0].numel()) ** 0.5
            state_dict[key] = uniform(meta.shape, -bound, bound)
    return state_dict


def unsettled(state: Tree, seed: int = 5) -> Tree:
    """Running statistics as training could have left them."""
    leaves = {}
    for i, (path, leaf) in enumerate(tree.flatten(state).items()):
        key = random.fold_in(random.key(seed), i)
        low, high = {"mean": (-0.1, 0.1), "var": (0.5, 1.5), "count": (1.0, 100.0)}[path.rpartition(".")[2]]
        leaves[path] = random.uniform(key, leaf.shape, minval=low, maxval=high).to(leaf.dtype)
    return tree.unflatten(leaves)


def heads(output: "Tensor | Outputs") -> list[Tensor]:
    """The logits, then those of the auxiliary heads from shallow to deep."""
    return [output.logits, *output.aux] if isinstance(output, Outputs) else [output]


def loss_of(outputs: Iterable[Tensor]) -> Tensor:
    """A number to which every logit matters."""
    return torch.stack([output.square().mean() for output in outputs]).sum()


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """The paths at which two trees are not the same to the last bit; the order of names counts."""
    left, right = tree.flatten(a), tree.flatten(b)
    if list(left) != list(right):
        return [f"names {sorted(left.keys() ^ right.keys()) or 'in another order'}"]
    return [path for path in left if left[path].dtype != right[path].dtype or not torch.equal(left[path], right[path])]


def assert_close(a: Any, b: Any, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    """Nested dictionaries and tuples of tensors agree; the tolerance is relative to each tensor's largest value."""
    if isinstance(a, Mapping):
        assert a.keys() == b.keys()
        for name in a:
            assert_close(a[name], b[name], rtol, atol)
    elif isinstance(a, tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_close(x, y, rtol, atol)
    else:
        scale = float(b.abs().max()) if b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=0, atol=atol + rtol * scale)


def to(dtype: torch.dtype, values: Tree) -> Tree:
    """The tree with its floating-point leaves in another type."""
    return tree.map(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, values)


def stack(trees: list[Tree]) -> Tree:
    """Trees of the same names as one, with a new first axis."""
    first, *others = trees
    return tree.map(lambda *leaves: torch.stack(leaves), first, *others)


def pick(values: Tree, i: int) -> Tree:
    """One of the trees that `stack` put together."""
    return tree.map(lambda leaf: leaf[i], values)


def need_derivatives_in_inference_mode() -> None:
    """Skips a test where torch itself differentiates convolutions wrongly, as 2.11 does."""
    image, weight = torch.ones(1, 1, 4, 4), torch.ones(1, 1, 3, 3)
    with torch.inference_mode():
        gradient = torch.func.grad(lambda weight: torch.conv2d(image, weight).sum())(weight)
    if not torch.equal(gradient, torch.full_like(weight, 4.0)):
        pytest.skip("this PyTorch differentiates convolutions wrongly in inference mode")


class Mutations(TorchDispatchMode):
    """Collects the names of operators that write into their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def trained_tensors(module: nn.Module) -> dict[str, Tensor]:
    """After a backward pass a module's gradients, zeros where there are none, and its buffers, by its own names."""
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in module.named_parameters()}
    return grads | dict(module.named_buffers())


def assert_computes_as(
    model: Model,
    params: Tree,
    state: Tree,
    module: nn.Module,
    x: Tensor,
    found: Callable[[], tuple[Tree, Tree]],
    *,
    single: bool = True,
) -> None:
    """A network is a module's: logits, gradients and statistics.

    Evaluation is compared in single precision. Training in double: through tens of normalisations, the last digits of
    single precision become the third, wherever sums are taken in another order.

    Args:
        model, params, state: the network, without draws.
        module: which computes the same; it ends in double precision, with gradients.
        x: images.
        found: gives the module's gradients and statistics as our trees.
        single: whether evaluation is compared.
    """
    if single:
        with torch.no_grad():
            assert_close(model.apply(params, state, x)[0], module.eval()(x), rtol=1e-5, atol=0)
    module, x = module.double(), x.double()
    params, state = to(torch.float64, params), to(torch.float64, state)
    theirs = module.train()(x)
    loss_of([theirs]).backward()
    leaves = tree.map(lambda leaf: leaf.detach().requires_grad_(), params)
    output, new_state = model.apply(leaves, state, x, train=True)
    logits = heads(output)[0]
    assert_close(logits.detach(), theirs.detach(), rtol=1e-9, atol=0)
    flat = tree.flatten(leaves)
    gradients = torch.autograd.grad(loss_of([logits]), list(flat.values()), allow_unused=True, materialize_grads=True)
    expected, statistics = found()
    flat_expected = tree.flatten(expected)
    for (path, _), gradient in zip(flat.items(), gradients, strict=True):
        assert_close(gradient, flat_expected[path], rtol=1e-9, atol=1e-12)
    assert_close(new_state, statistics, rtol=1e-9, atol=1e-12)
