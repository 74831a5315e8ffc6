"""The network that read zip codes in 1989: the first convolutional network trained by backpropagation on real images.

    LeCun, Boser, Denker, Henderson, Howard, Hubbard, Jackel. Backpropagation Applied to Handwritten Zip Code
    Recognition. Neural Computation 1(4), 1989, doi:10.1162/neco.1989.1.4.541.

What it added: the shared weights of feature maps are learned, end to end from pixels to classes. Images have 16x16
pixels and one channel, with -1 for the background and 1 for ink. Weights are shared, biases are not: each unit has its
own. 9,760 parameters: 1,068 in H1, 2,592 in H2, 5,790 in H3, 310 in the output layer.

The output is a hyperbolic tangent, so the loss is `squared_error`, not cross-entropy; the predicted class is that of
the largest output.

Deviations from the paper: it scales its hyperbolic tangent without saying how; here it is not scaled. It does not say
which eight of H1's twelve maps each map of H2 sees, so the scheme is that of Karpathy's reproduction
(github.com/karpathy/lecun1989-repro). That reproduction draws the weights from a range that is wider by the square root
of the fan-in; here they are drawn as in the paper, and so are the biases, which the paper counts among the connections.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from purecnn import random
from purecnn.initializers import Initializer, fans
from purecnn.layer import Layer, Mode, serial
from purecnn.layers import Leaf, Leaves, flatten, parametric, stateless
from purecnn.paper import Group, Paper, Published, Variant
from purecnn.tree import Tree

PAPER = Paper(
    "Backpropagation Applied to Handwritten Zip Code Recognition",
    "LeCun, Boser, Denker, Henderson, Howard, Hubbard, Jackel",
    1989,
    "doi:10.1162/neco.1989.1.4.541",
    groups=(Group.SPATIAL,),
)


def by_fan_in(fan_in: int | None = None) -> Initializer:
    """Uniform on ``+-2.4 / n``, where n is a unit's number of inputs; None takes n from the weight's shape."""

    def init(key: Tensor, shape: tuple[int, ...], /, dtype: torch.dtype = torch.float32) -> Tensor:
        bound = 2.4 / (fans(shape)[0] if fan_in is None else fan_in)
        return random.uniform(key, shape, dtype, -bound, bound)

    return init


tanh = stateless(torch.tanh)

background = stateless(lambda x: F.pad(x, (2, 2, 2, 2), value=-1.0))
"""Two pixels of background on each side."""

wiring = stateless(lambda x: torch.cat([x[:, :8], x[:, 4:], x[:, :4], x[:, 8:]], 1))
"""The maps of H1 that each of the three groups of H2's maps sees: eight of twelve."""


def shared(maps: int, groups: int = 1) -> Layer:
    """5x5 convolution with stride two: weights are shared over the image, but each unit has its own bias."""

    def leaves(x: Tensor) -> Leaves:
        height, width = ((side - 5) // 2 + 1 for side in x.shape[2:])
        inputs = x.shape[1] // groups
        init = by_fan_in(25 * inputs)
        return {"weight": Leaf((maps, inputs, 5, 5), init), "bias": Leaf((maps, height, width), init)}, {}

    def apply(params: Tree, state: Tree, x: Tensor, mode: Mode) -> tuple[Tensor, Tree]:
        return torch.conv2d(x, params["weight"], None, 2, 0, 1, groups) + params["bias"], state

    return parametric(leaves, apply, "weight", "bias")


def connected(units: int) -> Layer:
    """A fully-connected layer: each unit sees all inputs."""

    def leaves(x: Tensor) -> Leaves:
        init = by_fan_in(x.shape[1])
        return {"weight": Leaf((units, x.shape[1]), init), "bias": Leaf((units,), init)}, {}

    def apply(params: Tree, state: Tree, x: Tensor, mode: Mode) -> tuple[Tensor, Tree]:
        return F.linear(x, params["weight"], params["bias"]), state

    return parametric(leaves, apply, "weight", "bias")


def lecun1989(*, num_classes: int = 10) -> Layer:
    """Figure 3 of the paper: H1 is the stem, H2 and H3 are stages."""
    return serial(
        stem=serial(background, conv=shared(12), tanh=tanh),
        stage1=serial(background, wiring, conv=shared(12, groups=3), tanh=tanh),
        stage2=serial(flatten, linear=connected(30), tanh=tanh),
        head=serial(linear=connected(num_classes), tanh=tanh),
    )


def squared_error(outputs: Tensor, labels: Tensor) -> Tensor:
    """The paper's loss: the mean squared error, with target 1 for the label's unit and -1 for all others.

    >>> squared_error(torch.tensor([[1.0, -1.0], [1.0, -1.0]]), torch.tensor([0, 1]))
    tensor(2.)
    """
    shares = labels.ndim == outputs.ndim  # of mixed images
    hit = labels if shares else labels[..., None] == torch.arange(outputs.shape[-1], device=outputs.device)
    return (outputs - (2 * hit.to(outputs.dtype) - 1)).square().mean()


def certainty(outputs: Tensor) -> Tensor:
    """Maps outputs from the range of the targets, -1 to 1, to the range 0 to 1.

    >>> certainty(torch.tensor([[-1.0, 0.0, 1.0, 1.7]]))
    tensor([[0.0000, 0.5000, 1.0000, 1.0000]])
    """
    return ((outputs + 1) / 2).clamp(0, 1)


VARIANTS = {
    "lecun1989": Variant(
        lecun1989,
        PAPER,
        image_size=16,
        in_channels=1,
        loss=squared_error,
        probabilities=certainty,
        pixels=(-1.0, 1.0),
        published=Published(5.0, "test error", "zip codes", "quoted in karpathy/lecun1989-repro"),
    )
}
