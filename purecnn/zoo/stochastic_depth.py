"""A ResNet for CIFAR whose blocks are dropped at random in training.

    Huang, Sun, Liu, Sedra, Weinberger. Deep Networks with Stochastic Depth. ECCV 2016, arXiv:1603.09382.

What it showed: a residual network depends so little on any single block that dropping blocks, later ones more often,
makes training faster and the network better, and allows more than a thousand layers. EfficientNet and ConvNeXt are
still trained this way.

As in the authors' code, one draw decides for the whole batch, the last block survives with probability 0.5, and
evaluation multiplies each branch by its survival probability (`purecnn.layers.stochastic_depth` and torchvision scale
it in training instead). Also as in their code, shortcuts that shrink the image average 2x2 pixels and append channels
of zeros. Convolutions have no biases here, since a normalisation follows. No further deviations.
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
    """A shortcut without parameters: the mean of each square of pixels, with channels of zeros after the input's own.

    At the border of an image of odd size, the squares are cut off.
    """

    def shortcut(x: Tensor) -> Tensor:
        small = x if stride == 1 else F.avg_pool2d(x, stride, stride, ceil_mode=True, count_include_pad=False)
        return F.pad(small, (0, 0, 0, 0, 0, width - x.shape[1]))

    return stateless(shortcut)


def block(width: int, stride: int, death: float) -> Layer:
    """Equations 2 and 5: the branch is kept with probability ``1 - death``; evaluation multiplies it by this."""
    share = stateless(lambda x: x * (1 - death), keeps_shape=True)
    drawn = serial(layers.stochastic_depth(branch(width, stride), death, "batch"), share)
    return serial(add(drawn, mean_and_zeros(width, stride)), relu)


def stochastic_resnet_cifar(
    depths: Sequence[int], *, widths: Sequence[int] = (16, 32, 64), num_classes: int = 10, stochastic_depth: float = 0.5
) -> Layer:
    """Section 4: `purecnn.zoo.resnet_cifar` with blocks that may be dropped.

    Args:
        depths: blocks of each stage.
        widths: channels of each stage; the first is also the stem's.
        num_classes: outputs of the head.
        stochastic_depth: probability that the last block is dropped; it falls linearly to almost 0 at the first
            (equation 4).
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
