"""NASNet-A: two small cells found by a search on CIFAR-10, and a large network built from them.

    Zoph, Vasudevan, Shlens, Le. Learning Transferable Architectures for Scalable Image Recognition. CVPR 2018,
    arXiv:1707.07012.

A cell takes the outputs of the two cells before it. Five times, it chooses two of the states available so far, applies
an operation to each and adds the results as a new state; then states are concatenated. The search chooses only the
operations and their inputs, so the cells can be repeated any number of times, at any width. A normal cell keeps the
image size, a reduction cell halves it.

Here a cell is a layer on a growing tuple of states. A stage begins with its reduction cell; the first stage has two of
them, because the stem is only the first convolution. As the next cell needs two inputs, a stage returns the outputs of
its last two cells, concatenated along the channels.

Deviations from the paper, those of the published weights: no auxiliary head, and no drop-path. As in TensorFlow, images
of even size get more padding at the bottom and right than at the top and left, and average pools do not count padding.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from purecnn import layers
from purecnn.initializers import kaiming_uniform
from purecnn.layer import Layer, Mode, add, concat, named, serial
from purecnn.layers import (
    Leaf,
    Leaves,
    batch_norm,
    conv,
    conv_norm,
    global_avg_pool,
    identity,
    linear,
    max_pool,
    parametric,
    relu,
    stateless,
)
from purecnn.paper import Group, Paper, Published, Variant
from purecnn.tree import Tree

PAPER = Paper(
    "Learning Transferable Architectures for Scalable Image Recognition",
    "Zoph, Vasudevan, Shlens, Le",
    2017,
    "arXiv:1707.07012",
    groups=(Group.SEARCH,),
)

he = kaiming_uniform("fan_in")

Operation = Callable[[int, int], Layer]
"""``operation(width, stride) -> layer``."""


class Block(NamedTuple):
    """Two operations, each on one of the states so far; their sum is the next state."""

    left: Operation
    left_input: int
    right: Operation
    right_input: int


class Cell(NamedTuple):
    """States 0 and 1 are the outputs of the two previous cells, the older one first, brought to this cell's width."""

    blocks: Sequence[Block]
    joined: Sequence[int]
    """The states that are concatenated to the cell's output."""


def norm() -> Layer:
    """Batch normalisation."""
    return batch_norm(eps=1e-3)


def same(layer: Layer, stride: int) -> Layer:
    """Gives a layer with an odd kernel and symmetric padding TensorFlow's padding instead.

    With that padding, on an image of even size, the windows of stride 2 begin one pixel later. So a row and a column
    are added at the top and left of the image, and the first row and column of the output are removed.
    """
    if stride == 1:
        return layer

    def apply(params: Tree, state: Tree, x: Tensor, mode: Mode) -> tuple[Tensor, Tree]:
        top, left = (1 - size % 2 for size in x.shape[2:])
        y, state = layer.apply(params, state, F.pad(x, (left, 0, top, 0)), mode)
        return y[:, :, top:, left:].contiguous(), state

    return Layer(layer.init, apply, layer.names)


def depthwise(kernel: int, stride: int) -> Layer:
    """A depthwise convolution."""

    def leaves(x: Tensor) -> Leaves:
        return {"weight": Leaf((x.shape[1], 1, kernel, kernel), he)}, {}

    def apply(params: Tree, state: Tree, x: Tensor, mode: Mode) -> tuple[Tensor, Tree]:
        weight = params["weight"]
        return torch.conv2d(x, weight, None, stride, kernel // 2, 1, x.shape[1]), state

    return parametric(leaves, apply, "weight")


def separable(kernel: int) -> Operation:
    """Twice: ReLU, depthwise convolution, 1x1, normalisation. The first one has the stride."""

    def pair(width: int, stride: int) -> Layer:
        return same(serial(depthwise=depthwise(kernel, stride), pointwise=conv(width, 1, init=he)), stride)

    def build(width: int, stride: int) -> Layer:
        return serial(
            relu1=relu, conv1=pair(width, stride), norm1=norm(), relu2=relu, conv2=pair(width, 1), norm2=norm()
        )

    return build


def max3(width: int, stride: int) -> Layer:
    """3x3 max pooling."""
    return same(max_pool(3, stride, 1), stride)


def mean3(width: int, stride: int) -> Layer:
    """3x3 average pooling."""
    return same(stateless(lambda x: F.avg_pool2d(x, 3, stride, 1, count_include_pad=False)), stride)


def squeeze(width: int, stride: int = 1) -> Layer:
    """ReLU, 1x1, normalisation."""
    return serial(relu=relu, conv=conv(width, 1, stride, init=he), norm=norm())


def keep(width: int, stride: int) -> Layer:
    """The identity, or a 1x1 convolution where the image shrinks."""
    return identity if stride == 1 else squeeze(width, stride)


def halve(width: int) -> Layer:
    """Appendix A.4, halves the image: half of the channels come from the even pixels, half from the odd ones."""
    even = stateless(lambda x: x[:, :, ::2, ::2])
    odd = stateless(lambda x: F.pad(x, (-1, 1, -1, 1))[:, :, ::2, ::2])
    return serial(
        relu=relu,
        conv=concat(even=serial(even, conv(width // 2, 1, init=he)), odd=serial(odd, conv(width // 2, 1, init=he))),
        norm=norm(),
    )


def pick(i: int) -> Layer:
    """Picks one of several states."""
    return stateless(lambda states: states[i])


def grow(name: str, layer: Layer) -> Layer:
    """Appends the layer's output to the states."""
    layer = named(name, layer)

    def init(states: tuple[Tensor, ...], mode: Mode) -> tuple[Tree, Tree, tuple[Tensor, ...]]:
        params, state, y = layer.init(states, mode)
        return params, state, (*states, y)

    def apply(params: Tree, state: Tree, states: tuple[Tensor, ...], mode: Mode) -> tuple[tuple[Tensor, ...], Tree]:
        y, state = layer.apply(params, state, states, mode)
        return (*states, y), state

    return Layer(init, apply, layer.names)


SEP3, SEP5, SEP7 = separable(3), separable(5), separable(7)

# Figure 4 of the paper.
NORMAL = Cell(
    (
        Block(SEP5, 1, SEP3, 0), Block(SEP5, 0, SEP3, 0), Block(mean3, 1, keep, 0), Block(mean3, 0, mean3, 0),
        Block(SEP3, 1, keep, 1),
    ),
    joined=(0, 2, 3, 4, 5, 6),
)  # fmt: skip
REDUCTION = Cell(
    (
        Block(SEP5, 1, SEP7, 0), Block(max3, 1, SEP7, 0), Block(mean3, 1, SEP5, 0), Block(keep, 3, mean3, 2),
        Block(SEP3, 2, max3, 1),
    ),
    joined=(3, 4, 5, 6),
)  # fmt: skip


def cell(kind: Cell, width: int, stride: int, previous: Layer) -> Layer:
    """From the outputs of the two previous cells to this one's; ``previous`` adapts the older one to width and size."""
    steps = [
        grow("previous", serial(pick(0), previous)),
        grow("current", serial(pick(1), squeeze(width))),
        stateless(lambda states: states[2:]),
    ]
    for i, block in enumerate(kind.blocks, start=1):
        left, right = (
            serial(pick(j), operation(width, stride if j < 2 else 1))
            for operation, j in ((block.left, block.left_input), (block.right, block.right_input))
        )
        steps.append(grow(f"block{i}", add(left=left, right=right)))
    join = stateless(lambda states: torch.cat([states[j] for j in kind.joined], dim=1))
    return serial(*steps, join)


def cells(*layers: Layer, skip_first: bool = False) -> Layer:
    """A chain of cells, from the outputs of two cells to those of the last two in the chain.

    With ``skip_first``, the second cell has the same older input as the first.
    """
    return serial(
        *(
            serial(grow(str(i), layer), stateless(lambda states: states[::2]) if skip_first and not i else last_two)
            for i, layer in enumerate(layers)
        )
    )


last_two = stateless(lambda states: states[-2:])
twice = stateless(lambda x: (x, x))
pack = stateless(lambda states: torch.cat(states, dim=1))
unpack = stateless(lambda x: x.chunk(2, dim=1))


def network(
    normal: Cell,
    reduction: Cell,
    depth: int,
    width: int,
    *,
    first: Cell | None = None,
    stem_width: int,
    skip_first: bool = False,
    num_classes: int,
    dropout: float,
) -> Layer:
    """Figure 2 of the paper, right, with any two kinds of cells.

    Args:
        normal, reduction: the two kinds of cells.
        depth: normal cells of each stage, the paper's N.
        width: channels of an operation in the first stage's normal cells.
        first: the very first cell, if it differs from the other reduction cells.
        stem_width: channels of the first convolution.
        skip_first: see `cells`.
        num_classes: outputs of the head.
        dropout: rate before the head.

    Raises:
        ValueError: if ``depth`` is below 2: then the outputs of the last two cells differ in shape.
    """
    if depth < 2:
        raise ValueError(f"a stage has at least 2 normal cells, found {depth}")

    def row(width: int) -> list[Layer]:
        head = cell(normal, width, 1, halve(width))
        return [head, *(cell(normal, width, 1, squeeze(width)) for _ in range(depth - 1))]

    start = [
        cell(first or reduction, width // 4, 2, identity),
        cell(reduction, width // 2, 2, halve(width // 2)),
    ]
    middle, end = (
        cells(cell(reduction, wide, 2, squeeze(wide)), *row(wide), skip_first=skip_first)
        for wide in (2 * width, 4 * width)
    )
    return serial(
        stem=conv_norm(stem_width, 3, 2, 0, init=he, norm=norm(), act=identity),
        stage1=serial(twice, cells(*start, *row(width)), pack),
        stage2=serial(unpack, middle, pack),
        stage3=serial(unpack, end, pick(1), relu),
        head=serial(global_avg_pool, layers.dropout(dropout), linear=linear(num_classes)),
    )


def nasnet(
    depth: int,
    width: int,
    *,
    stem_width: int = 32,
    skip_reduction: bool = False,
    num_classes: int = 1000,
    dropout: float = 0.5,
) -> Layer:
    """The `network` with the cells of figure 4.

    Args:
        depth: normal cells of each stage, the paper's N.
        width: channels of the last cell, a multiple of 96.
        stem_width: channels of the first convolution.
        skip_reduction: the cell after a reduction cell has the same older input as the reduction cell, instead of the
            reduction cell's newer input.
        num_classes: outputs of the head.
        dropout: rate before the head.

    Raises:
        ValueError: see `network`.
    """
    return network(
        NORMAL,
        REDUCTION,
        depth,
        width // 24,
        stem_width=stem_width,
        skip_first=skip_reduction,
        num_classes=num_classes,
        dropout=dropout,
    )


VARIANTS = {
    "nasnet_a_large": Variant(
        nasnet,
        PAPER,
        {"depth": 6, "width": 4032, "stem_width": 96, "skip_reduction": True},
        image_size=331,
        published=Published(82.7, "top-1 accuracy", "ImageNet", "authors' weights in TensorFlow-Slim"),
    ),
    "nasnet_a_mobile": Variant(
        nasnet,
        PAPER,
        {"depth": 4, "width": 1056},
        published=Published(74.0, "top-1 accuracy", "ImageNet", "authors' weights in TensorFlow-Slim"),
    ),
}
