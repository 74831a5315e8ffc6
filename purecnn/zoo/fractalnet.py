"""FractalNet: deep networks without residual connections, from one expansion rule.

    Larsson, Maire, Shakhnarovich. FractalNet: Ultra-Deep Neural Networks without Residuals. ICLR 2017,
    arXiv:1605.07648.

``f_1`` is a convolution, and ``f_{C+1}(z)`` joins ``f_C(f_C(z))`` with a convolution of ``z``. Adjacent joins are
merged into one, the mean of all columns that end there. So a block has ``C`` columns, and the longest has ``2^(C-1)``
convolutions. Drop-path trains the columns to work without each other: local drop-path drops each input of a join
independently, but never all of them; global drop-path keeps only one column, the same in the whole network.

Here it is drawn for each image whether its drop-path is global; pytorchcv uses a fixed part of the batch. Dropout drops
single values, while pytorchcv drops channels. There are 33,724,618 parameters, as in pytorchcv. The paper says 38.6 M,
but the authors' generator (github.com/gustavla/fractalnet) builds the same 35 convolutions with the same widths, which
have 33.7 M parameters; so the paper's figure must count something that appears in neither. The first block is the stem.
"""

from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from torch import Tensor

from purecnn import layers, random
from purecnn.initializers import kaiming_normal
from purecnn.layer import Layer, Mode, named, serial
from purecnn.layers import conv_norm, global_avg_pool, linear, max_pool
from purecnn.paper import Group, Paper, Published, Variant
from purecnn.tree import Tree

PAPER = Paper(
    "FractalNet: Ultra-Deep Neural Networks without Residuals",
    "Larsson, Maire, Shakhnarovich",
    2016,
    "arXiv:1605.07648",
    groups=(Group.MULTI_PATH,),
    in_survey=True,
)

he = kaiming_normal("fan_in")

Unit = Callable[[int, int, Tensor], Tensor]
"""``unit(column, place, x)`` runs a convolution; ``place`` is its end, in convolutions of the longest column."""
Join = Callable[[int, list[Tensor]], Tensor]
"""``join(place, outputs)`` merges the outputs of the columns that end at ``place``, from short to long."""


def expand(columns: int, unit: Unit, join: Join, x: Tensor, start: int = 0) -> list[Tensor]:
    """The expansion rule: the outputs of a fractal's columns, from short to long, before they are joined."""
    middle, end = start + 2 ** (columns - 1) // 2, start + 2 ** (columns - 1)
    longer = []
    if columns > 1:
        y = join(middle, expand(columns - 1, unit, join, x, start))
        longer = expand(columns - 1, unit, join, y, middle)
    return [unit(columns, end, x), *longer]


def pick(mode: Mode, count: int, batch: int) -> Tensor:
    """Picks one of ``count`` for each image, as booleans ``(batch, count)``."""
    number = (random.uniform(mode.draw_key(), (batch,)) * count).floor()
    return number[:, None] == torch.arange(count, device=number.device)


def drop_path(outputs: list[Tensor], columns: int, local: float, whole: float, mode: Mode) -> Tensor:
    """Drop-path: the mean of the outputs that are kept; which ones is drawn for each image.

    Args:
        outputs: outputs of the columns that end here, from short to long; these are the last of all ``columns``.
        columns: columns of a block.
        local: rate at which an output is dropped; if all would be dropped, a random one is kept.
        whole: rate at which an image goes through a single column, the same in all joins of the network.
        mode: the mode of the join.
    """
    batch, count = outputs[0].shape[0], len(outputs)
    kept = torch.ones(batch, count, dtype=torch.bool, device=outputs[0].device)
    if local:
        drawn = mode.enter("local").bernoulli(1 - local, (batch, count))
        kept = drawn | (pick(mode.enter("spare"), count, batch) & ~drawn.any(1, keepdim=True))
    if whole:
        # Not the join's path, so that all joins draw the same.
        root = mode._replace(path="drop_path", tap=None)
        alone = random.bernoulli(root.enter("whole").draw_key(), whole, (batch,))
        # If the chosen column does not end here, the result is zero; it cannot reach the block's end.
        only = pick(root.enter("column"), columns, batch)[:, columns - count :]
        kept = torch.where(alone[:, None], only, kept)
    weight = rearrange(kept.to(outputs[0].dtype), "b column -> column b 1 1 1")
    return (torch.stack(outputs) * weight).sum(0) / weight.sum(0).clamp(min=1)


def fractal(width: int, columns: int, dropout: float, local: float, whole: float) -> Layer:
    """Figure 1: convolution ``i`` of column ``c`` is named ``column{c}_{i}``; column 1 is the longest."""
    unit = serial(conv_norm(width, 3, init=he), dropout=layers.dropout(dropout))
    units = {
        (column, 2 ** (column - 1) * (i + 1)): named(f"column{column}_{i}", unit)
        for column in range(1, columns + 1)
        for i in range(2 ** (columns - column))
    }

    def init(x: Tensor, mode: Mode) -> tuple[Tree, Tree, Tensor]:
        params: Tree = {}
        state: Tree = {}

        def run(column: int, place: int, x: Tensor) -> Tensor:
            own_params, own_state, y = units[column, place].init(x, mode)
            params.update(own_params)
            state.update(own_state)
            return y

        (y, *_) = expand(columns, run, lambda place, outputs: outputs[0], x)
        return params, state, y

    def apply(params: Tree, state: Tree, x: Tensor, mode: Mode) -> tuple[Tensor, Tree]:
        def run(column: int, place: int, x: Tensor) -> Tensor:
            nonlocal state
            y, state = units[column, place].apply(params, state, x, mode)
            return y

        def join(place: int, outputs: list[Tensor]) -> Tensor:
            if mode.train and len(outputs) > 1 and (local or whole):
                return drop_path(outputs, columns, local, whole, mode.enter(f"join{place}"))
            return torch.stack(outputs).mean(0)

        y = join(2 ** (columns - 1), expand(columns, run, join, x))
        return y, state

    return Layer(init, apply, frozenset().union(*(layer.names for layer in units.values())))


def fractalnet_cifar(
    widths: Sequence[int] = (64, 128, 256, 512, 512),
    *,
    columns: int = 3,
    dropout: float = 0.1,
    local_drop: float = 0.15,
    global_drop: float = 0.5,
    num_classes: int = 10,
) -> Layer:
    """The network for CIFAR: fractal blocks, each followed by a pool that halves the image.

    Args:
        widths: channels of each block.
        columns: columns of each block, C in the paper.
        dropout: rate in the second block; it rises linearly over the blocks, from 0 in the first.
        local_drop: rate at which a join drops an input.
        global_drop: rate at which an image goes through a single column.
        num_classes: outputs of the head.

    Raises:
        ValueError: if a rate is out of range.
    """
    for name, rate in (("local_drop", local_drop), ("global_drop", global_drop)):
        if not 0 <= rate <= 1:
            raise ValueError(f"{name} is a rate between 0 and 1, found {rate}")
    stem, *stages = (
        serial(fractal(width, columns, dropout * i, local_drop, global_drop), pool=max_pool(2, 2))
        for i, width in enumerate(widths)
    )
    return serial(
        stem=stem,
        **{f"stage{i}": stage for i, stage in enumerate(stages, start=1)},
        head=serial(global_avg_pool, linear=linear(num_classes)),
    )


VARIANTS = {
    "fractalnet_cifar": Variant(
        fractalnet_cifar,
        PAPER,
        {},
        32,
        published=Published(4.6, "test error", "CIFAR-10", "with augmentation, drop-path and dropout"),
    )
}
