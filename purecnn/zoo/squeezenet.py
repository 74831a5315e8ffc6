"""SqueezeNet: AlexNet's accuracy with fifty times fewer parameters.

    Iandola, Han, Moskewicz, Ashraf, Dally, Keutzer. SqueezeNet: AlexNet-level accuracy with 50x fewer parameters
    and <0.5MB model size. 2016, arXiv:1602.07360.

Version 1.0 is the paper's. Version 1.1, from the authors' repository, has a smaller stem and pools earlier, which
needs 2.4 times less computation. As in the paper, the head ends in a ReLU, so with a high learning rate a new head
can die.
"""

from collections.abc import Sequence

from purecnn import layers
from purecnn.initializers import kaiming_uniform, normal
from purecnn.layer import Layer, concat, numbered, serial
from purecnn.layers import conv, global_avg_pool, max_pool, relu
from purecnn.paper import Group, Paper, Published, Variant

PAPER = Paper(
    "SqueezeNet: AlexNet-level accuracy with 50x fewer parameters and <0.5MB model size",
    "Iandola, Han, Moskewicz, Ashraf, Dally, Keutzer",
    2016,
    "arXiv:1602.07360",
    groups=(Group.MOBILE,),
)

he = kaiming_uniform("fan_in")


def fire(squeeze: int) -> Layer:
    """Figure 1: a 1x1 convolution squeezes; a 1x1 and a 3x3 in parallel each expand to four times the channels."""
    return serial(
        squeeze=conv(squeeze, 1, bias=True, init=he, bias_init=0.0), relu1=relu,
        expand=concat(
            expand1=conv(4 * squeeze, 1, bias=True, init=he, bias_init=0.0),
            expand3=conv(4 * squeeze, 3, bias=True, init=he, bias_init=0.0),
        ),
        relu2=relu,
    )  # fmt: skip


def squeezenet(
    stem_width: int,
    stem_kernel: int,
    depths: Sequence[int],
    *,
    squeeze: int = 16,
    num_classes: int = 1000,
    dropout: float = 0.5,
) -> Layer:
    """Table 1 of the paper.

    Args:
        stem_width: channels of the first convolution.
        stem_kernel: kernel size of the first convolution, pixels.
        depths: fire modules in each stage; each stage begins with a pool.
        squeeze: squeezed channels of the first two modules; each further pair has this many more.
        num_classes: outputs of the head.
        dropout: rate before the head's convolution.
    """
    fires = iter(fire(squeeze * (1 + i // 2)) for i in range(sum(depths)))
    pool = max_pool(3, 2, ceil_mode=True)
    stages = {
        f"stage{i}": serial(pool, numbered(*(next(fires) for _ in range(depth))))
        for i, depth in enumerate(depths, start=1)
    }
    return serial(
        stem=serial(conv=conv(stem_width, stem_kernel, 2, padding=0, bias=True, init=he, bias_init=0.0), relu=relu),
        **stages,
        head=serial(
            layers.dropout(dropout),
            conv=conv(num_classes, 1, bias=True, init=normal(0.01), bias_init=0.0),
            relu=relu,
            pool=global_avg_pool,
        ),
    )


VARIANTS = {
    "squeezenet1_0": Variant(
        squeezenet,
        PAPER,
        {"stem_width": 96, "stem_kernel": 7, "depths": (3, 4, 1)},
        published=Published(57.5, "top-1 accuracy", "ImageNet", "the paper, uncompressed"),
    ),
    "squeezenet1_1": Variant(squeezenet, PAPER, {"stem_width": 64, "stem_kernel": 3, "depths": (2, 2, 4)}),
}
