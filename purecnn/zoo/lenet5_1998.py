"""LeNet-5 as published in 1998, for images of 32x32 pixels with one channel.

    LeCun, Bottou, Bengio, Haffner. Gradient-Based Learning Applied to Document Recognition. Proceedings of the
    IEEE 86(11), 1998, doi:10.1109/5.726791.

What it added: subsampling between the convolutions, and a loss that makes the classes compete. The background is -0.1
and ink is 1.175, so that pixels have a mean of about 0 and a variance of about 1. `purecnn.zoo.lenet` is the network as
it is taught today.

60,000 trainable parameters: C1 156, S2 12, C3 1,516, S4 32, C5 48,120, F6 10,164. The output units compare F6 with a
drawing of each class. The drawings are constants, so F6 is the last layer with parameters, and it is part of the head.
The output is minus the squared distance from each drawing, so the predicted class is that of the largest output;
`competitive` is the loss.

Deviations from the paper: the drawings of the digits are our own, and there are drawings of digits only, not of other
characters. Biases start at zero.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

from purecnn.initializers import uniform
from purecnn.layer import Layer, Mode, concat, serial
from purecnn.layers import Leaf, Leaves, conv, flatten, linear, parametric, stateless
from purecnn.paper import Published, Variant
from purecnn.tree import Tree
from purecnn.zoo.lecun1989 import by_fan_in
from purecnn.zoo.lenet import PAPER

DIGITS = """
.#####. ...#... .#####. .#####. ....##. ####### ..####. ####### .#####. .#####.
##...## ..##... ##...## ##...## ...###. ##..... .##.... ....... ##...## ##...##
##...## .###... .....## .....## ..#.##. ##..... ##..... .....## ##...## ##...##
##...## ...#... .....## .....## .##.##. ##..... ##..... .....## ##...## ##...##
##...## ...#... ....##. .....## .#..##. ######. ##.###. ....##. .##.##. ##...##
##...## ...#... ...##.. ..####. ##..##. .....## ###..## ....##. .#####. .######
##...## ...#... ..##... .....## ####### .....## ##...## ...##.. ##...## .....##
##...## ...#... .##.... .....## ....##. .....## ##...## ...##.. ##...## .....##
##...## ...#... ##..... .....## ....##. .....## ##...## ..##... ##...## .....##
##...## ...#... ##..... ##...## ....##. ##...## ##...## ..##... ##...## ##...##
##...## ...#... ##..... ##...## ....##. ##...## ##...## .##.... ##...## ##...##
.#####. .#####. ####### .#####. ....##. .#####. .#####. .##.... .#####. .####..
"""
"""A drawing of 7x12 pixels for each class."""

CODES = ["".join(rows) for rows in zip(*(line.split() for line in DIGITS.strip().splitlines()), strict=True)]
"""Each drawing as one string, row by row: the target values of F6's units, 1 for ``#`` and -1 for ``.``."""

HALF = len(CODES[0]) // 2
WORDS = [int(code[i : i + HALF].replace("#", "1").replace(".", "0"), 2) for code in CODES for i in (0, HALF)]
"""Each half of a drawing as an integer whose bits are the pixels; one integer cannot hold all 84."""

squash = stateless(lambda x: 1.7159 * torch.tanh(x * (2 / 3)))
"""Appendix A: goes through (1, 1) and (-1, -1), where it bends most (its second derivative peaks)."""


def subsampling() -> Layer:
    """Layers S2 and S4: the sum of 2x2 pixels times a coefficient plus a bias, one of each for every map."""

    def leaves(x: Tensor) -> Leaves:
        shape = (x.shape[1],)
        return {"weight": Leaf(shape, uniform(-2.4 / 4, 2.4 / 4)), "bias": Leaf(shape, 0.0)}, {}

    def apply(params: Tree, state: Tree, x: Tensor, mode: Mode) -> tuple[Tensor, Tree]:
        coefficient, bias = (rearrange(params[name], "c -> c 1 1") for name in ("weight", "bias"))
        return 4 * F.avg_pool2d(x, 2) * coefficient + bias, state

    return parametric(leaves, apply, "weight", "bias")


def convolution(maps: int, groups: int = 1) -> Layer:
    """5x5 without padding."""
    return conv(maps, 5, padding=0, groups=groups, bias=True, init=by_fan_in(), bias_init=0.0)


def wired(rows: Sequence[Sequence[int]]) -> Layer:
    """One output map for each row; it sees the input maps listed in the row. All rows have the same length."""
    wires = [i for row in rows for i in row]
    return serial(
        stateless(lambda x: torch.cat([x[:, i : i + 1] for i in wires], 1)), convolution(len(rows), len(rows))
    )


def c3() -> Layer:
    """Table 1: except for the last, each map sees only some of S2's maps, which breaks the symmetry between maps."""
    three = [sorted((i + j) % 6 for j in range(3)) for i in range(6)]
    four = [sorted((i + j) % 6 for j in range(4)) for i in range(6)] + [[0, 1, 3, 4], [1, 2, 4, 5], [0, 2, 3, 5]]
    return concat(three=wired(three), four=wired(four), all=convolution(1))


def drawings(num_classes: int, like: Tensor) -> Tensor:
    """The codes as a tensor (classes, units), with the dtype and device of ``like``.

    They are computed on that device, because a tensor made from a list would be copied there at every call.
    """
    words = torch.cat([torch.full((1, 1), word, device=like.device) for word in WORDS[: 2 * num_classes]])
    places = 2 ** torch.arange(HALF - 1, -1, -1, device=like.device)
    pixels = (words // places % 2).reshape(num_classes, -1).to(like.dtype)
    return 2 * pixels - 1


def radial_basis(num_classes: int) -> Layer:
    """Section II-B: minus the squared distance from each class's drawing."""

    def distances(x: Tensor) -> Tensor:
        codes = drawings(num_classes, x)
        return -reduce((x[:, None] - codes).square(), "b classes units -> b classes", "sum")

    return stateless(distances)


def lenet5_1998(*, num_classes: int = 10) -> Layer:
    """Figure 2 of the paper: C1 and S2 are the stem, C3 and S4 the first stage, C5 the second.

    Args:
        num_classes: output units, 1 to 10; the classes are the first ``num_classes`` digits.

    Raises:
        ValueError: if ``num_classes`` is not between 1 and the number of drawings.
    """
    if not 1 <= num_classes <= len(CODES):
        raise ValueError(f"there are drawings for 1 to {len(CODES)} classes, found num_classes={num_classes}")
    return serial(
        stem=serial(c1=convolution(6), squash1=squash, s2=subsampling(), squash2=squash),
        stage1=serial(c3=c3(), squash3=squash, s4=subsampling(), squash4=squash),
        stage2=serial(c5=convolution(120), squash5=squash),
        head=serial(
            flatten,
            linear=linear(len(CODES[0]), init=by_fan_in(), bias_init=0.0), squash6=squash,
            output=radial_basis(num_classes),
        ),
    )  # fmt: skip


def competitive(logits: Tensor, labels: Tensor, j: float = 1.0) -> Tensor:
    """Equation 9: the label's distance, plus a competition term that pushes the other classes away.

    ``mean(y[label] + log(exp(-j) + sum_i exp(-y[i])))`` with the distances ``y = -logits``. The paper
    says only that j is positive; j keeps classes that are already far away from being pushed further.
    """
    own = logits.gather(-1, labels[..., None])
    others = torch.cat([torch.full_like(own, -j), logits], -1)
    return (others.logsumexp(-1, keepdim=True) - own).mean()


VARIANTS = {
    "lenet5_1998": Variant(
        lenet5_1998,
        PAPER,
        image_size=32,
        in_channels=1,
        loss=competitive,
        pixels=(-0.1, 1.175),
        published=Published(0.95, "test error", "MNIST", "authors' page of MNIST, no distortions"),
    )
}
