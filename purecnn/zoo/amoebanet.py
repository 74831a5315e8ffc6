"""AmoebaNet-D: cells found by evolution instead of a trained controller, then tuned for low training cost.

    Real, Aggarwal, Huang, Le. Regularized Evolution for Image Classifier Architecture Search. AAAI 2019,
    arXiv:1802.01548.

The search explores NASNet's space: copy a good cell, change one operation or input, train it, and remove the oldest
cell rather than the worst. Cells are wired as in NASNet: see `purecnn.zoo.nasnet`. Cell D comes from a search on
ImageNet and was then optimised by hand for training cost, for which it won DAWNBench. It has bottlenecks and pools
instead of separable convolutions, and the newer input of a normal cell is part of its output, as in a dense block.

This file follows the authors' code (github.com/tensorflow/tpu, models/official/amoeba_net), with the number of cells
and channels used in DAWNBench. The port in torchgpipe differs: among other things, its stem cells are twice as wide,
its "max_pool_3x3" averages, and it applies a ReLU to the image, but none before the final pool.

Deviations from the authors' code: no auxiliary head, and no drop-path. Normalisation has the epsilon of their model;
their command line sets 1e-5.
"""

from purecnn.initializers import Initializer, variance_scaling
from purecnn.layer import Layer, drawn, serial
from purecnn.layers import Pair, conv, max_pool, relu
from purecnn.paper import Group, Paper, Published, Variant
from purecnn.zoo.nasnet import Block, Cell, keep, max3, mean3, network, norm, same, squeeze

PAPER = Paper(
    "Regularized Evolution for Image Classifier Architecture Search",
    "Real, Aggarwal, Huang, Le",
    2018,
    "arXiv:1802.01548",
    groups=(Group.SEARCH,),
)

fan_out = variance_scaling(2.0, "fan_out", "truncated_normal")


def law(path: str, shape: tuple[int, ...]) -> Initializer | float | None:
    """The authors' initialisation, instead of NASNet's."""
    return fan_out if len(shape) > 1 else 0.0 if path == "head.linear.bias" else None


def rectified(width: int, kernel: Pair, stride: int = 1) -> Layer:
    """ReLU, convolution, normalisation."""
    return serial(relu=relu, conv=same(conv(width, kernel, stride), stride), norm=norm())


def conv3(width: int, stride: int) -> Layer:
    """A bottleneck around a 3x3 convolution."""
    return serial(reduce=squeeze(width // 4), conv=rectified(width // 4, 3, stride), expand=squeeze(width))


def conv7(width: int, stride: int) -> Layer:
    """A bottleneck around a 7x7 convolution, factorised into 1x7 and 7x1; in these cells its stride is always 1."""
    return serial(
        reduce=squeeze(width // 4),
        row=rectified(width // 4, (1, 7)), column=rectified(width // 4, (7, 1)),
        expand=squeeze(width),
    )  # fmt: skip


def max2(width: int, stride: int) -> Layer:
    """2x2 max pooling, used where the image shrinks."""
    return max_pool(2, stride, ceil_mode=True)


def max2_project(width: int, stride: int) -> Layer:
    """2x2 max pooling, then a 1x1 convolution to the cell's width."""
    return serial(max2(width, stride), conv=conv(width, 1), norm=norm())


# As in the authors' code, but with the older of a cell's two inputs first.
NORMAL = Cell(
    (
        Block(squeeze, 0, max3, 0), Block(keep, 0, conv7, 1), Block(squeeze, 1, conv7, 1), Block(max3, 2, keep, 2),
        Block(mean3, 0, squeeze, 5),
    ),
    joined=(1, 3, 4, 6),
)  # fmt: skip
REDUCTION = Cell(
    (
        Block(max2, 1, max3, 1), Block(keep, 2, conv3, 0), Block(conv7, 2, max3, 2), Block(keep, 3, max2, 0),
        Block(mean3, 2, squeeze, 3),
    ),
    joined=(4, 5, 6),
)  # fmt: skip
# The older input of the first cell is the stem's unchanged output, which has the stem's width.
FIRST = REDUCTION._replace(blocks=(*REDUCTION.blocks[:3], Block(keep, 3, max2_project, 0), *REDUCTION.blocks[4:]))


def amoebanet(depth: int, width: int, *, stem_width: int = 32, num_classes: int = 1000, dropout: float = 0.5) -> Layer:
    """NASNet's arrangement of cells.

    Args:
        depth: normal cells of each of the three stages; DAWNBench's N and GPipe's L count those of all stages.
        width: channels of an operation in the first stage's normal cells, F in DAWNBench and D in GPipe; a multiple of
            4, at least 16.
        stem_width: channels of the first convolution.
        num_classes: outputs of the head.
        dropout: rate before the head.

    Raises:
        ValueError: if the width is not such a number; see also `purecnn.zoo.nasnet.network`.
    """
    if width % 4 or width < 16:
        raise ValueError(f"a width is a multiple of 4 and at least 16, found {width}")
    return drawn(
        network(
            NORMAL,
            REDUCTION,
            depth,
            width,
            first=REDUCTION if stem_width == width // 4 else FIRST,
            stem_width=stem_width,
            num_classes=num_classes,
            dropout=dropout,
        ),
        law,
    )


VARIANTS = {
    "amoebanet_d": Variant(
        amoebanet,
        PAPER,
        {"depth": 2, "width": 256},
        published=Published(76.2, "top-1 accuracy", "ImageNet", "DAWNBench, AmoebaNet-D N6F256, 35 epochs"),
    )
}
