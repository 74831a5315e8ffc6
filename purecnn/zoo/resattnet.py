"""Residual Attention Network: an hourglass parallel to the trunk computes an attention mask.

    Wang, Jiang, Qian, Yang, Li, Zhang, Wang, Tang. Residual Attention Network for Image Classification. CVPR 2017,
    arXiv:1704.06904.

A module's output is ``(1 + mask) * trunk``: a mask of zeros leaves the trunk unchanged, so modules can be stacked.
Units are pre-activation bottlenecks, and the larger the image, the deeper the hourglass. As in pytorchcv, the mask is
computed from the sum of the trunk's and the hourglass's outputs, and a skip connection within the hourglass adds a unit
to its own input. The paper gives 31.9 M parameters; here there are 31,810,728.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from purecnn.layer import Layer, Mode, add, named, numbered, serial
from purecnn.layers import batch_norm, conv, global_avg_pool, identity, linear, max_pool, relu, sigmoid
from purecnn.paper import Group, Paper, Published, Variant
from purecnn.tree import Tree
from purecnn.zoo.preactresnet import bottleneck, he, residual

PAPER = Paper(
    "Residual Attention Network for Image Classification",
    "Wang, Jiang, Qian, Yang, Li, Zhang, Wang, Tang",
    2017,
    "arXiv:1704.06904",
    groups=(Group.ATTENTION,),
    in_survey=True,
)


def unit(inputs: int, width: int, stride: int = 1) -> Layer:
    """A pre-activation bottleneck."""
    return residual(inputs, width, stride, bottleneck(width, stride))


def units(width: int, count: int) -> Layer:
    """``count`` units that keep the shape."""
    return numbered(*(unit(width, width) for _ in range(count)))


def resized(layer: Layer) -> Layer:
    """The layer's output, resized bilinearly to the size of its input."""

    def interpolate(y: Tensor, x: Tensor) -> Tensor:
        return F.interpolate(y, size=tuple(x.shape[-2:]), mode="bilinear", align_corners=True)

    def init(x: Tensor, mode: Mode) -> tuple[Tree, Tree, Tensor]:
        params, state, y = layer.init(x, mode)
        return params, state, interpolate(y, x)

    def apply(params: Tree, state: Tree, x: Tensor, mode: Mode) -> tuple[Tensor, Tree]:
        y, state = layer.apply(params, state, x, mode)
        return interpolate(y, x), state

    return Layer(init, apply, layer.names)


def hourglass(width: int, depth: int, r: int) -> Layer:
    """Figure 2, the soft mask branch: halves the image, applies a smaller hourglass inside, and restores the size."""
    skip = add(identity, unit(width, width))
    inner = {"inner": add(hourglass(width, depth - 1, r), skip=skip)} if depth > 1 else {}
    return resized(serial(max_pool(3, 2, 1), down=units(width, r), **inner, up=units(width, r)))


def attend(hourglass: Layer, trunk: Layer, mask: Layer) -> Layer:
    """Equation 3, ``(1 + mask) * trunk``. Not series-parallel, since the mask also uses the trunk's output."""

    def init(x: Tensor, mode: Mode) -> tuple[Tree, Tree, Tensor]:
        p1, s1, y = hourglass.init(x, mode)
        p2, s2, t = trunk.init(x, mode)
        p3, s3, m = mask.init(y + t, mode)
        return {**p1, **p2, **p3}, {**s1, **s2, **s3}, (1 + m) * t

    def apply(params: Tree, state: Tree, x: Tensor, mode: Mode) -> tuple[Tensor, Tree]:
        y, state = hourglass.apply(params, state, x, mode)
        t, state = trunk.apply(params, state, x, mode)
        m, state = mask.apply(params, state, y + t, mode)
        return (1 + m) * t, state

    return Layer(init, apply, hourglass.names | trunk.names | mask.names)


def attention(width: int, depth: int, p: int, t: int, r: int) -> Layer:
    """An attention module, figure 2."""
    mask = serial(
        norm1=batch_norm(), relu1=relu, conv1=conv(width, 1, init=he),
        norm2=batch_norm(), relu2=relu, conv2=conv(width, 1, init=he), gate=sigmoid,
    )  # fmt: skip
    glass = named("hourglass", hourglass(width, depth, r))
    module = attend(glass, named("trunk", units(width, t)), named("mask", mask))
    return serial(named("first", units(width, p)), module, last=unit(width, width))


def resattnet(
    modules: Sequence[int],
    *,
    widths: Sequence[int] = (256, 512, 1024, 2048),
    p: int = 1,
    t: int = 2,
    r: int = 1,
    num_classes: int = 1000,
) -> Layer:
    """Table 2 of the paper.

    Args:
        modules: attention modules of each stage except the last, which has three units.
        widths: channels of each stage; the stem has a quarter of the first.
        p, t, r: units before a module splits into two branches, in the trunk, and between two pools of the hourglass.
        num_classes: outputs of the head.
    """
    inputs = widths[0] // 4
    stem = serial(conv=conv(inputs, 7, 2, init=he), norm=batch_norm(), relu=relu, pool=max_pool(3, 2, 1))
    parts: dict[str, Layer] = {"stem": stem}
    for i, width in enumerate(widths):
        first, depth = unit(inputs, width, 2 if i else 1), len(widths) - 1 - i
        if depth:
            rest = [attention(width, depth, p, t, r) for _ in range(modules[i])]
        else:
            rest = [unit(width, width), unit(width, width)]
        parts[f"stage{i + 1}"] = numbered(first, *rest)
        inputs = width
    last = f"stage{len(widths)}"
    parts[last] = serial(parts[last], norm=batch_norm(), relu=relu)
    return serial(**parts, head=serial(global_avg_pool, linear=linear(num_classes)))


VARIANTS = {
    "resattnet56": Variant(
        resattnet,
        PAPER,
        {"modules": (1, 1, 1)},
        published=Published(21.76, "top-1 error", "ImageNet", "authors' repository, 224 pixels"),
    )
}
