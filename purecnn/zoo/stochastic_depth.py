"""A ResNet for CIFAR whose blocks are left out by chance while it is trained.

    Huang, Sun, Liu, Sedra, Weinberger. Deep Networks with Stochastic Depth. ECCV 2016, arXiv:1603.09382.

What it showed: a residual network is so little in need of any one block that dropping them, the later ones more often,
makes training shorter and the network better, and lets depth go on past a thousand layers. EfficientNet and ConvNeXt
are trained so to this day.

As in the authors' code, one draw decides for a whole batch, the last block survives with probability 0.5, and in
evaluation a branch counts by its probability, where `purecnn.layers.stochastic_depth` and torchvision scale it in
training instead. Also theirs: shortcuts that shrink are means of 2x2 pixels, with zeros after the image's channels;
biases are left out here, since a normalisation follows. No further deviations.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from purecnn import layers
from purecnn.layer import Layer, add, serial
from purecnn.layers import relu, stateless
from purecnn.paper import Group, Paper, Published, Variant
from purecnn.zoo.resnet_cifar import branch, network

PAPER = Paper(
    "Deep Networks with Stochastic Depth",
    "Huang, Sun, Liu, Sedra, Weinberger",
    2016,
    "arXiv:1603.09382",
    groups=(Group.DEPTH,),
)


def mean_and_zeros(width: int, stride: int) -> Layer:
    """A shortcut without parameters: the mean of each square of pixels, and channels of zeros after the image's own.

    At the border of an image of odd size a square is cut.
    """

    def shortcut(x: Tensor) -> Tensor:
        small = x if stride == 1 else F.avg_pool2d(x, stride, stride, ceil_mode=True, count_include_pad=False)
        return F.pad(small, (0, 0, 0, 0, 0, width - x.shape[1]))

    return stateless(shortcut)


def block(width: int, stride: int, death: float) -> Layer:
    """Equations 2 and 5: a branch that is there with probability ``1 - death``, and in evaluation by that share."""
    share = stateless(lambda x: x * (1 - death), keeps_shape=True)
    drawn = serial(layers.stochastic_depth(branch(width, stride), death, "batch"), share)
    return serial(add(drawn, mean_and_zeros(width, stride)), relu)


def stochastic_resnet_cifar(
    depths: Sequence[int], *, widths: Sequence[int] = (16, 32, 64), num_classes: int = 10, stochastic_depth: float = 0.5
) -> Layer:
    """Section 4: `purecnn.zoo.resnet_cifar` with blocks that may be missing.

    Args:
        depths: blocks of each stage.
        widths: channels of each stage; the first is also the stem's.
        num_classes: outputs of the head.
        stochastic_depth: probability that the last block is left out; towards the first it falls in equal steps to
            nearly none (equation 4).
    """

    def decaying(width: int, stride: int, place: int) -> Layer:
        return block(width, stride, stochastic_depth * (place + 1) / sum(depths))

    return network(decaying, depths, widths, num_classes)


VARIANTS = {
    "resnet110_stochastic_cifar": Variant(
        stochastic_resnet_cifar,
        PAPER,
        {"depths": (18, 18, 18)},
        32,
        published=Published(5.25, "test error", "CIFAR-10", "authors' repository"),
    )
}
