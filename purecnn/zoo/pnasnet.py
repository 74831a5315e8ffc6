"""PNASNet-5: a cell found five times faster, by a search from simple cells to complex ones.

    Liu, Zoph, Neumann, Shlens, Hua, Li, Fei-Fei, Yuille, Huang, Murphy. Progressive Neural Architecture Search. ECCV
    2018, arXiv:1712.00559.

While NASNet searches among all cells of five blocks at once, this search begins with one block and adds blocks only to
the most promising cells, guided by a predictor of their accuracy. There is one kind of cell: a reduction is the same
cell with stride 2. The wiring of cells and the deviations from the paper are NASNet's: see `purecnn.zoo.nasnet`.
"""

from purecnn import layers
from purecnn.layer import Layer, serial
from purecnn.layers import conv, conv_norm, global_avg_pool, identity, linear, relu
from purecnn.paper import Group, Paper, Published, Variant
from purecnn.zoo.nasnet import (
    SEP3,
    SEP5,
    SEP7,
    Block,
    Cell,
    cell,
    cells,
    halve,
    he,
    keep,
    max3,
    norm,
    pack,
    pick,
    squeeze,
    twice,
    unpack,
)

PAPER = Paper(
    "Progressive Neural Architecture Search",
    "Liu, Zoph, Neumann, Shlens, Hua, Li, Fei-Fei, Yuille, Huang, Murphy",
    2017,
    "arXiv:1712.00559",
    groups=(Group.SEARCH,),
)


def max3_project(width: int, stride: int) -> Layer:
    """3x3 max pooling, then a 1x1 convolution to the cell's width."""
    return serial(max3(width, stride), conv=conv(width, 1, init=he), norm=norm())


# Figure 1 of the paper, left.
CELL = Cell(
    (
        Block(SEP5, 0, max3, 0), Block(SEP7, 1, max3, 1), Block(SEP5, 1, SEP3, 1), Block(SEP3, 4, max3, 1),
        Block(SEP3, 0, keep, 1),
    ),
    joined=(2, 3, 4, 5, 6),
)  # fmt: skip
FIRST = CELL._replace(blocks=(Block(SEP5, 0, max3_project, 0), *CELL.blocks[1:]))


def pnasnet(depth: int, width: int, *, stem_width: int = 96, num_classes: int = 1000, dropout: float = 0.5) -> Layer:
    """Figure 1 of the paper, right.

    Args:
        depth: cells of each stage, of which the first halves the image in stages 2 and 3; stage 1 begins with two more
            reductions.
        width: channels of the last cell, a multiple of 80.
        stem_width: channels of the first convolution.
        num_classes: outputs of the head.
        dropout: rate before the head.

    Raises:
        ValueError: if ``depth`` is below 2: then the outputs of the last two cells differ in shape.
    """
    if depth < 2:
        raise ValueError(f"a stage has at least 2 cells, found {depth}")
    base = width // 20

    def normal(width: int, count: int) -> list[Layer]:
        first = cell(CELL, width, 1, halve(width))
        return [first, *(cell(CELL, width, 1, squeeze(width)) for _ in range(count - 1))]

    start = [cell(FIRST, base // 4, 2, identity), cell(CELL, base // 2, 2, halve(base // 2))]
    middle, end = (cells(cell(CELL, wide, 2, squeeze(wide)), *normal(wide, depth - 1)) for wide in (2 * base, 4 * base))
    return serial(
        stem=conv_norm(stem_width, 3, 2, 0, init=he, norm=norm(), act=identity),
        stage1=serial(twice, cells(*start, *normal(base, depth)), pack),
        stage2=serial(unpack, middle, pack),
        stage3=serial(unpack, end, pick(1), relu),
        head=serial(global_avg_pool, layers.dropout(dropout), linear=linear(num_classes)),
    )


VARIANTS = {
    "pnasnet5_large": Variant(
        pnasnet,
        PAPER,
        {"depth": 4, "width": 4320},
        image_size=331,
        published=Published(82.9, "top-1 accuracy", "ImageNet", "authors' weights in TensorFlow-Slim"),
    )
}
