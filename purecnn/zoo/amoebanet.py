"""AmoebaNet-D: cells found by evolution instead of a trained controller, and tuned for the cost of training.

    Real, Aggarwal, Huang, Le. Regularized Evolution for Image Classifier Architecture Search. AAAI 2019,
    arXiv:1802.01548.

The search goes through NASNet's space: copy a good cell, change an operation or an input, train it, and let the oldest
cell die rather than the worst. How cells are wired is NASNet's: see `purecnn.zoo.nasnet`. Cell D is from a search on
ImageNet, carried on by hand for the cost of training, and won DAWNBench for it. In place of separable convolutions it
has bottlenecks and pools, and the newer input of a normal cell is part of its output, as in a dense block.

This is the authors' code (github.com/tensorflow/tpu, models/official/amoeba_net), with as many cells and channels as in
DAWNBench. The port in torchgpipe differs from it: among other things its stem cells are twice as wide, "max_pool_3x3"
takes means, and it rectifies the image, but not what it pools at the end.

Deviations from the authors' code: no auxiliary head, and branches are not dropped. Normalisation has the epsilon of
their model; their command line sets 1e-5.
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
    """The authors', in place of NASNet's."""
    return fan_out if len(shape) > 1 else 0.0 if path == "head.linear.bias" else None


def rectified(width: int, kernel: Pair, stride: int = 1) -> Layer:
    """Rectify, convolve, normalise."""
    return serial(relu=relu, conv=same(conv(width, kernel, stride), stride), norm=norm())


def conv3(width: int, stride: int) -> Layer:
    """A bottleneck around a 3x3 convolution."""
    return serial(reduce=squeeze(width // 4), conv=rectified(width // 4, 3, stride), expand=squeeze(width))


def conv7(width: int, stride: int) -> Layer:
    """A bottleneck around a 7x7 convolution, made of 1x7 and 7x1; nowhere in this cell does it take a stride."""
    return serial(
        reduce=squeeze(width // 4),
        row=rectified(width // 4, (1, 7)), column=rectified(width // 4, (7, 1)),
        expand=squeeze(width),
    )  # fmt: skip


def max2(width: int, stride: int) -> Layer:
    """The largest of 2x2, where the image shrinks."""
    return max_pool(2, stride, ceil_mode=True)


def max2_project(width: int, stride: int) -> Layer:
    """The largest of 2x2, brought to the cell's width."""
    return serial(max2(width, stride), conv=conv(width, 1), norm=norm())


# As the authors' code has them, but with the older of a cell's two inputs first.
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
# The older input of the first cell is the stem's output as it is, in the stem's width.
FIRST = REDUCTION._replace(blocks=(*REDUCTION.blocks[:3], Block(keep, 3, max2_project, 0), *REDUCTION.blocks[4:]))


def amoebanet(depth: int, width: int, *, stem_width: int = 32, num_classes: int = 1000, dropout: float = 0.5) -> Layer:
    """NASNet's arrangement of cells.

    Args:
        depth: normal cells of each of the three stages; DAWNBench's N is of all together, GPipe's L too.
        width: channels of an operation in the first stage's normal cells, F or D there; a multiple of 4, from 16 on.
        stem_width: channels of the first convolution.
        num_classes: outputs of the head.
        dropout: rate before the head.

    Raises:
        ValueError: for another width, and as from `purecnn.zoo.nasnet.network`.
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
