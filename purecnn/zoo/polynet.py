"""PolyNet: residual modules as polynomials of an Inception block.

    Zhang, Li, Loy, Lin. PolyNet: A Pursuit of Structural Diversity in Very Deep Networks. CVPR 2017, arXiv:1611.05725.

With an Inception block F, a residual module is I + F. Here it becomes I + F + F^2 + F^3 ("poly-3", the block applied
to its own output) or I + F + G ("2-way", two parallel blocks): more paths through a module instead of more modules. In
poly-3 the three applications share the convolutions of the branches, but neither the normalisations nor the final 1x1
convolution. "Very Deep PolyNet" alternates both kinds of module; its branches are scaled down, more strongly in deeper
modules.

Deviations from the paper, those of the published weights in pytorchcv: the final 1x1 convolution of a block is
normalised, and the scale falls linearly from 1 in the first module to 0.7 in the last. Dropout of whole modules, with
which the paper trains, is not part of the network.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from purecnn import layers, tree
from purecnn.initializers import kaiming_uniform
from purecnn.layer import Layer, Mode, add, concat, named, numbered, serial
from purecnn.layers import Pair, global_avg_pool, identity, linear, max_pool, relu
from purecnn.paper import Group, Paper, Published, Variant
from purecnn.tree import Tree
from purecnn.zoo import inception_v3
from purecnn.zoo.inception_resnet import scaled
from purecnn.zoo.inception_v3 import COLUMN, ROW
from purecnn.zoo.inception_v4 import SHORT_COLUMN, SHORT_ROW

PAPER = Paper(
    "PolyNet: A Pursuit of Structural Diversity in Very Deep Networks",
    "Zhang, Li, Loy, Lin",
    2016,
    "arXiv:1611.05725",
    groups=(Group.WIDTH,),
    in_survey=True,
)

he = kaiming_uniform("fan_in")

Steps = Sequence[tuple[int, Pair]]
"""Width and kernel of each convolution of a branch."""

A: Sequence[Steps] = (((32, 1), (48, 3), (64, 3)), ((32, 1), (32, 3)), ((32, 1),))
B: Sequence[Steps] = (((128, 1), (160, ROW), (192, COLUMN)), ((192, 1),))
C: Sequence[Steps] = (((192, 1), (224, SHORT_ROW), (256, SHORT_COLUMN)), ((192, 1),))


conv_norm = partial(layers.conv_norm, init=he)
chain = partial(inception_v3.chain, unit=conv_norm)
shrinking = partial(chain, stride=2, padding=0)


def block(branches: Sequence[Steps], width: int) -> Layer:
    """An Inception block: branches, then a 1x1 convolution without activation back to the trunk's width."""
    ways = {f"branch{i}": chain(*steps) for i, steps in enumerate(branches, start=1)}
    return serial(concat(**ways), restore=conv_norm(width, 1, act=identity))


def two_way(branches: Sequence[Steps], width: int, scale: float) -> Layer:
    """I + F + G, with two parallel blocks."""
    first, second = (scaled(block(branches, width), scale) for _ in range(2))
    return serial(add(add(identity, first=first), second=second), relu)


def is_shared(path: str) -> bool:
    """Whether a block's parameter is shared: true for the weights of the branches' convolutions."""
    return path.startswith("branch") and path.endswith(".conv.weight")


def poly(branches: Sequence[Steps], width: int, scale: float, order: int = 3) -> Layer:
    """I + F + F^2 + ... up to ``order``; the first application owns the shared convolutions, the others borrow them."""
    names = [f"block{i}" for i in range(1, order + 1)]
    blocks = {name: named(name, block(branches, width)) for name in names}

    def init(x: Tensor, mode: Mode) -> tuple[Tree, Tree, Tensor]:
        params: Tree = {}
        state: Tree = {}
        for name, layer in blocks.items():
            drawn, own_state, _ = layer.init(x, mode)
            own = tree.flatten(drawn[name]).items()
            params[name] = tree.unflatten({path: leaf for path, leaf in own if not (params and is_shared(path))})
            state |= own_state
        return params, state, x

    def apply(params: Tree, state: Tree, x: Tensor, mode: Mode) -> tuple[Tensor, Tree]:
        lent = tree.flatten(params[names[0]])
        total = x
        for name, layer in blocks.items():
            own = tree.unflatten({**lent, **tree.flatten(params[name])})
            x, state = layer.apply({name: own}, state, x, mode)
            total = total + scale * x
            x = torch.relu(x)
        return torch.relu(total), state

    return Layer(init, apply, frozenset(names))


def stem() -> Layer:
    """To 35x35 pixels, 384 channels: Inception v4's stem, except for the order of some convolutions and branches."""
    return serial(
        conv1=conv_norm(32, 3, 2, 0), conv2=conv_norm(32, 3, 1, 0), conv3=conv_norm(64, 3),
        split1=concat(pool=max_pool(3, 2), branch3=conv_norm(96, 3, 2, 0)),
        split2=concat(
            branch3=chain((64, 1), (96, 3), padding=0),
            branch9=chain((64, 1), (64, COLUMN), (64, ROW), (96, 3), padding=0),
        ),
        split3=concat(pool=max_pool(3, 2), branch3=conv_norm(192, 3, 2, 0)),
    )  # fmt: skip


def reduction_a() -> Layer:
    """From 35x35 to 17x17."""
    return concat(
        branch5=shrinking((256, 1), (256, 3), (384, 3)),
        branch3=conv_norm(384, 3, 2, 0),
        pool=max_pool(3, 2),
    )


def reduction_b() -> Layer:
    """From 17x17 to 8x8."""
    return concat(
        branch5=shrinking((256, 1), (256, 3), (256, 3)),
        branch3a=shrinking((256, 1), (256, 3)),
        branch3b=shrinking((256, 1), (384, 3)),
        pool=max_pool(3, 2),
    )


def falling(count: int, last: float) -> Iterator[float]:
    """Evenly spaced numbers from 1 to ``last``, rounded to six digits as for the published weights."""
    return (round(1 - (1 - last) * i / max(count - 1, 1), 6) for i in range(count))


def polynet(
    *, depths: Sequence[int] = (10, 10, 5), last_scale: float = 0.7, num_classes: int = 1000, dropout: float = 0.2
) -> Layer:
    """Section 4 of the paper, Very Deep PolyNet: stage 1 is 2-way; in the others, poly-3 and 2-way alternate.

    Args:
        depths: number of 2-way modules in the first stage, and of pairs of modules in the second and third.
        last_scale: factor for the branches of the last module; it falls linearly from 1 in the first.
        num_classes: outputs of the head.
        dropout: rate before the head.
    """
    a, b, c = depths
    scales = falling(a + 2 * (b + c), last_scale)

    def pair(branches: Sequence[Steps], width: int) -> Layer:
        return serial(
            poly=poly(branches, width, next(scales)),
            two_way=two_way(branches, width, next(scales)),
        )

    return serial(
        stem=stem(),
        stage1=numbered(*(two_way(A, 384, next(scales)) for _ in range(a))),
        stage2=numbered(reduction_a(), *(pair(B, 1152) for _ in range(b))),
        stage3=numbered(reduction_b(), *(pair(C, 2048) for _ in range(c))),
        head=serial(global_avg_pool, layers.dropout(dropout), linear=linear(num_classes)),
    )


VARIANTS = {
    "polynet": Variant(
        polynet,
        PAPER,
        image_size=331,
        published=Published(18.71, "top-1 error", "ImageNet", "quoted in arXiv:1709.01507, Table 9"),
    )
}
