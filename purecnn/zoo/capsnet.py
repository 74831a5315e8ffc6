"""CapsNet: each class is a vector; its length says whether the class is present, its direction how it looks.

    Sabour, Frosst, Hinton. Dynamic Routing Between Capsules. NIPS 2017, arXiv:1710.09829.

What it tried instead of pooling: each capsule, a small vector, predicts the output of the capsules in the next layer,
and the better it agrees with the others, the more weight it gets. The network's outputs are the lengths of the classes'
capsules, between 0 and 1: each is the probability that its class is present. Their loss is `margin_loss`. In training,
a decoder reconstructs the image from each class's capsule alone. The decoder is the auxiliary head; as in
`purecnn.zoo.lenet5_1998`, its output is minus the squared distance, here between reconstruction and image, so the class
with the largest value reconstructs best. Pixels are between 0 and 1.

6,804,224 parameters, plus 1,411,344 in the decoder. Initial values are those of the authors' code. Deviation: 1e-12 is
added under square roots, so that zero vectors have a derivative.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from purecnn.initializers import truncated_normal
from purecnn.layer import Layer, Mode, Outputs, fork, named, serial
from purecnn.layers import Leaf, Leaves, conv, identity, linear, parametric, relu, stateless
from purecnn.paper import Group, Paper, Published, Variant
from purecnn.tree import Tree

PAPER = Paper(
    "Dynamic Routing Between Capsules",
    "Sabour, Frosst, Hinton",
    2017,
    "arXiv:1710.09829",
    groups=(Group.SPATIAL,),
)


class Drawn(NamedTuple):
    """The decoder's input."""

    capsules: Tensor
    """(batch, classes, size)."""
    image: Tensor
    """(batch, channels, height, width)."""


def _drawn(std: float) -> dict[str, Any]:
    """The authors' initial values of a layer with biases."""
    return {"init": truncated_normal(std, lower=-2 * std, upper=2 * std), "bias_init": 0.1}


def length(capsules: Tensor) -> Tensor:
    """The lengths of the vectors along the last axis."""
    exact = capsules if capsules.dtype.itemsize > 2 else capsules.float()
    return (exact.square().sum(-1) + 1e-12).sqrt().to(capsules.dtype)


def squash(capsules: Tensor) -> Tensor:
    """Equation 1: a vector of length n keeps its direction and gets the length ``n^2 / (1 + n^2)``."""
    n = length(capsules)[..., None]
    return capsules * (n / (1 + n.square()))


def route(votes: Tensor, rounds: int) -> Tensor:
    """Procedure 1: the outputs of the capsules above; in each round, votes that agree with the others gain weight.

    Args:
        votes: each lower capsule's prediction for each capsule above, (batch, below, above, size).
        rounds: how often the weights are computed, at least 1; the first time, all are equal.

    Returns:
        The capsules above, (batch, above, size).

    Raises:
        ValueError: if ``rounds`` is below 1.
    """
    if rounds < 1:
        raise ValueError(f"capsules are routed in at least 1 round, found {rounds}")
    agreement = votes.new_zeros(votes.shape[:-1])
    for last in [False] * (rounds - 1) + [True]:
        above = squash(torch.einsum("bnc,bnco->bco", agreement.softmax(-1), votes))
        if not last:
            agreement = agreement + torch.einsum("bnco,bco->bnc", votes, above)
    return above


def primary_capsules(maps: int, size: int) -> Layer:
    """A convolution whose channels are ``maps`` capsules per pixel: images to capsules (batch, maps * pixels, size)."""
    capsules = stateless(lambda x: squash(rearrange(x, "b (maps size) h w -> b (maps h w) size", size=size)))
    return serial(conv=conv(maps * size, 9, 2, padding=0, bias=True, **_drawn(0.1)), capsules=capsules)


def class_capsules(num_classes: int, size: int, rounds: int) -> Layer:
    """Equation 2 and the routing: (batch, below, inputs) to (batch, num_classes, size), with a matrix for each vote."""

    def leaves(x: Tensor) -> Leaves:
        return {"weight": Leaf((x.shape[1], num_classes, size, x.shape[2]), _drawn(0.1)["init"])}, {}

    def apply(params: Tree, state: Tree, x: Tensor, mode: Mode) -> tuple[Tensor, Tree]:
        return route(torch.einsum("ncoi,bni->bnco", params["weight"], x), rounds), state

    return parametric(leaves, apply, "weight")


def alone(capsules: Tensor) -> Tensor:
    """Each class's capsule, the others zeroed: (batch, classes, size) to (batch, classes, classes * size)."""
    mask = torch.eye(capsules.shape[1], dtype=capsules.dtype, device=capsules.device)
    return rearrange(capsules[:, None] * mask[..., None], "b k c size -> b k (c size)")


def canvas(hidden: int) -> Layer:
    """The decoder's last layer: (batch, classes, hidden + pixels) to minus each reconstruction's squared distance.

    In the input, the image's pixels follow the hidden units; their number is the size of the reconstruction.
    """

    def leaves(x: Tensor) -> Leaves:
        pixels = x.shape[-1] - hidden
        return {"weight": Leaf((pixels, hidden), _drawn(0.1)["init"]), "bias": Leaf((pixels,), 0.1)}, {}

    def apply(params: Tree, state: Tree, x: Tensor, mode: Mode) -> tuple[Tensor, Tree]:
        rows = rearrange(x, "b k numbers -> (b k) numbers")  # as in `purecnn.layers.linear`
        drawing = F.linear(rows[:, :hidden], params["weight"], params["bias"]).sigmoid()
        return -(drawing - rows[:, hidden:]).square().sum(-1).reshape(x.shape[:2]), state

    return parametric(leaves, apply, "weight", "bias")


def decoder(widths: tuple[int, int] = (512, 1024)) -> Layer:
    """Figure 2: how well each class's capsule alone reconstructs the image, (batch, classes)."""
    hidden = serial(
        linear1=linear(widths[0], **_drawn(0.1)), relu1=relu, linear2=linear(widths[1], **_drawn(0.1)), relu2=relu
    )
    last = named("linear3", canvas(widths[1]))

    def both(y: Tensor, x: Tensor) -> Tensor:
        return torch.cat([y, repeat(x, "b c h w -> b k (c h w)", k=y.shape[1])], -1)

    def init(x: Drawn, mode: Mode) -> tuple[Tree, Tree, Tensor]:
        p1, _, y = hidden.init(alone(x.capsules), mode)
        p2, _, z = last.init(both(y, x.image), mode)
        return {**p1, **p2}, {}, z

    def apply(params: Tree, state: Tree, x: Drawn, mode: Mode) -> tuple[Tensor, Tree]:
        y, _ = hidden.apply(params, state, alone(x.capsules), mode)
        return last.apply(params, state, both(y, x.image), mode)

    return Layer(init, apply, hidden.names | last.names)


def drawn_again(network: Layer) -> Layer:
    """Adds the decoder, in training, to a network that then returns `Outputs` of lengths and capsules."""
    draw = named("aux1", decoder())

    def init(x: Tensor, mode: Mode) -> tuple[Tree, Tree, Outputs]:
        params, state, (lengths, (capsules,)) = network.init(x, mode)
        own, _, distances = draw.init(Drawn(capsules, x), mode)
        return {**own, **params}, state, Outputs(lengths, (distances,))

    def apply(params: Tree, state: Tree, x: Tensor, mode: Mode) -> tuple[Tensor | Outputs, Tree]:
        y, state = network.apply(params, state, x, mode)
        if not mode.train:
            return y, state
        distances, _ = draw.apply(params, state, Drawn(y.aux[0], x), mode)
        return Outputs(y.logits, (distances,)), state

    return Layer(init, apply, network.names | draw.names)


def capsnet(
    *, width: int = 256, maps: int = 32, size: int = 8, class_size: int = 16, rounds: int = 3, num_classes: int = 10
) -> Layer:
    """The network of figure 1 with the decoder of figure 2.

    Args:
        width: channels of the first convolution.
        maps: maps of primary capsules.
        size: values in a primary capsule.
        class_size: values in a class's capsule.
        rounds: rounds of routing.
        num_classes: capsules of the head.
    """
    return drawn_again(
        serial(
            stem=serial(conv=conv(width, 9, padding=0, bias=True, **_drawn(0.05)), relu=relu),
            stage1=primary_capsules(maps, size),
            head=serial(class_capsules(num_classes, class_size, rounds), fork(stateless(length), capsules=identity)),
        )
    )


def margin_loss(outputs: Tensor | Outputs, labels: Tensor) -> Tensor:
    """Equation 4, averaged over the batch: the label's length should be at least 0.9, the others at most 0.1.

    In training, 0.0005 times the squared distance of the label's reconstruction is added (section 4.1). Labels are
    class indices, or each class's share of the image.
    """
    lengths = outputs.logits if isinstance(outputs, Outputs) else outputs
    shares = labels.ndim == lengths.ndim  # of mixed images
    own = labels if shares else labels[..., None] == torch.arange(lengths.shape[-1], device=lengths.device)
    own = own.to(lengths.dtype)
    loss = own * (0.9 - lengths).relu().square() + 0.5 * (1 - own) * (lengths - 0.1).relu().square()
    total = loss.sum(-1).mean()
    if isinstance(outputs, Outputs):
        (aux,) = outputs.aux
        total = total - 0.0005 * (own * aux).sum(-1).mean()
    return total


VARIANTS = {
    "capsnet": Variant(
        capsnet,
        PAPER,
        image_size=28,
        in_channels=1,
        loss=margin_loss,
        probabilities=lambda lengths: lengths,
        pixels=(0.0, 1.0),  # the decoder's output is a sigmoid
        published=Published(0.25, "test error", "MNIST", "quoted in jarchv/capsnet-tensorflow"),
    )
}
