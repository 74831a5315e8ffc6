"""PyramidNet: the width grows a little in every block, instead of doubling where the image shrinks.

    Han, Kim, Kim. Deep Pyramidal Residual Networks. CVPR 2017, arXiv:1610.02915.

This is the additive pyramid: block ``k`` of ``N`` has ``16 + a * k / N`` channels, rounded. A block has no ReLU before
its first convolution, and one more normalisation after its last. Shortcuts have no parameters: they average 2x2 pixels
where the image shrinks and append channels of zeros. Deviation from the paper, which rounds widths down: as in
pytorchcv, they are rounded to the nearest integer, and only when used, so rounding errors do not add up.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from purecnn.initializers import kaiming_normal
from purecnn.layer import Layer, add, numbered, serial
from purecnn.layers import batch_norm, conv, global_avg_pool, linear, relu, stateless
from purecnn.paper import Group, Paper, Published, Variant

PAPER = Paper(
    "Deep Pyramidal Residual Networks", "Han, Kim, Kim", 2016, "arXiv:1610.02915", groups=(Group.WIDTH,), in_survey=True
)

he = kaiming_normal("fan_out")


def zero_pad(width: int, stride: int) -> Layer:
    """The shortcut: the mean of ``stride x stride`` pixels, of fewer at the border; then channels of zeros."""

    def shortcut(x: Tensor) -> Tensor:
        if stride > 1:
            x = F.avg_pool2d(x, stride, stride, ceil_mode=True)
        return F.pad(x, (0, 0, 0, 0, 0, width - x.shape[1]))

    return stateless(shortcut)


def block(width: int, stride: int) -> Layer:
    """Figure 6d."""
    main = serial(
        norm1=batch_norm(), conv1=conv(width, 3, stride, init=he),
        norm2=batch_norm(), relu=relu, conv2=conv(width, 3, init=he), norm3=batch_norm(),
    )  # fmt: skip
    return add(main, zero_pad(width, stride))


def pyramidnet_cifar(depths: Sequence[int], widening: int, *, num_classes: int = 10) -> Layer:
    """Table 1 of the paper.

    Args:
        depths: blocks of each stage; ``n`` blocks in each of three stages make ``6n + 2`` layers.
        widening: number of channels that all blocks together add to the stem's 16, alpha in the paper.
        num_classes: outputs of the head.
    """
    parts: dict[str, Layer] = {"stem": serial(conv=conv(16, 3, init=he), norm=batch_norm())}
    done = 0
    for i, depth in enumerate(depths, start=1):
        blocks = []
        for j in range(depth):
            done += 1
            blocks.append(block(round(16 + widening * done / sum(depths)), 2 if i > 1 and not j else 1))
        parts[f"stage{i}"] = numbered(*blocks)
    last = f"stage{len(depths)}"
    parts[last] = serial(parts[last], norm=batch_norm(), relu=relu)
    return serial(**parts, head=serial(global_avg_pool, linear=linear(num_classes)))


VARIANTS = {
    "pyramidnet110_a48_cifar": Variant(
        pyramidnet_cifar,
        PAPER,
        {"depths": (18, 18, 18), "widening": 48},
        32,
        published=Published(4.62, "test error", "CIFAR-10", "authors' repository"),
    )
}
