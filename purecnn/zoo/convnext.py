"""ConvNeXt: a ResNet modernised step by step until it matches vision transformers.

    Liu, Mao, Wu, Feichtenhofer, Darrell, Xie. A ConvNet for the 2020s. CVPR 2022, arXiv:2201.03545.

Stages 2 to 4 begin with downsampling. The last pool and its normalisation are a stage of their own, so that replacing
the head for fine-tuning keeps the normalisation.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from purecnn.initializers import truncated_normal
from purecnn.layer import Layer, Mode, add, numbered, serial
from purecnn.layers import (
    Leaf,
    Leaves,
    channels_first,
    channels_last,
    conv,
    gelu,
    global_avg_pool,
    identity,
    layer_norm,
    linear,
    parametric,
    stochastic_depth,
)
from purecnn.paper import Group, Paper, Published, Variant
from purecnn.tree import Tree

PAPER = Paper(
    "A ConvNet for the 2020s",
    "Liu, Mao, Wu, Feichtenhofer, Darrell, Xie",
    2022,
    "arXiv:2201.03545",
    groups=(Group.DESIGN,),
)

cut = truncated_normal(0.02)


def layer_scale(initial: float) -> Layer:
    """A learned factor for each channel (Touvron et al., arXiv:2103.17239)."""

    def leaves(x: Tensor) -> Leaves:
        return {"layer_scale": Leaf((x.shape[1], 1, 1), initial)}, {}

    def apply(params: Tree, state: Tree, x: Tensor, mode: Mode) -> tuple[Tensor, Tree]:
        return torch.mul(params["layer_scale"], x), state

    return parametric(leaves, apply, "layer_scale", keeps_shape=True)


def norm() -> Layer:
    """Layer normalisation along the channels of images."""
    return serial(channels_last, layer_norm(eps=1e-6), channels_first)


def block(width: int, scale: float, drop: float) -> Layer:
    """Figure 4: depthwise 7x7, then an MLP at each pixel."""
    main = serial(
        depthwise=conv(width, 7, groups=width, bias=True, init=cut, bias_init=0.0), to_last=channels_last,
        norm=layer_norm(eps=1e-6),
        expand=linear(4 * width, init=cut, bias_init=0.0), act=gelu,
        project=linear(width, init=cut, bias_init=0.0), to_first=channels_first,
    )  # fmt: skip
    return add(identity, stochastic_depth(serial(main, layer_scale(scale)), drop))


def convnext(
    depths: Sequence[int],
    widths: Sequence[int],
    *,
    layer_scale: float = 1e-6,
    num_classes: int = 1000,
    stochastic_depth: float = 0.1,
) -> Layer:
    """Table 9 of the paper.

    Args:
        depths: blocks of each stage.
        widths: channels of each stage.
        layer_scale: initial value of the factors on each branch.
        num_classes: outputs of the head.
        stochastic_depth: rate at which the last block's branch is dropped; the rate rises linearly from 0 at the first.
    """
    stages: dict[str, Layer] = {}
    done, last = 0, max(sum(depths) - 1, 1)
    for i, (depth, width) in enumerate(zip(depths, widths, strict=True), start=1):
        blocks = numbered(*(block(width, layer_scale, stochastic_depth * (done + j) / last) for j in range(depth)))
        done += depth
        down = serial(norm=norm(), conv=conv(width, 2, 2, bias=True, init=cut, bias_init=0.0))
        stages[f"stage{i}"] = blocks if i == 1 else serial(down, blocks)
    return serial(
        stem=serial(conv=conv(widths[0], 4, 4, 0, bias=True, init=cut, bias_init=0.0), norm=norm()),
        **stages,
        **{f"stage{len(depths) + 1}": serial(pool=global_avg_pool, norm=layer_norm(eps=1e-6))},
        head=serial(linear=linear(num_classes, init=cut, bias_init=0.0)),
    )


VARIANTS = {
    f"convnext_{name}": Variant(
        convnext,
        PAPER,
        {"depths": depths, "widths": widths, "stochastic_depth": rate},
        published=Published(accuracy, "top-1 accuracy", "ImageNet", "authors' repository, 224 pixels"),
    )
    for name, depths, widths, rate, accuracy in (
        ("tiny", (3, 3, 9, 3), (96, 192, 384, 768), 0.1, 82.1),
        ("small", (3, 3, 27, 3), (96, 192, 384, 768), 0.4, 83.1),
        ("base", (3, 3, 27, 3), (128, 256, 512, 1024), 0.5, 83.8),
        ("large", (3, 3, 27, 3), (192, 384, 768, 1536), 0.5, 84.3),
    )
}
