"""Make an optimizer from an update rule.

A `Rule` is written twice, side by side: as a *formula* for one parameter, which works under ``vmap``, ``grad`` and
``torch.compile``, and as a *kernel* for many parameters, which is many times faster outside of these transforms and
works in place, on donated buffers or on copies. The two differ only in rounding.
"""

import itertools
import operator
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from purecnn import tree
from purecnn.eager import is_transformed
from purecnn.optimizer import LearningRate, Optimizer, current, no_steps
from purecnn.tree import Tree

__all__ = [
    "Formula",
    "Kernel",
    "Rule",
    "Step",
    "blockwise",
    "optimizer",
]

_BLOCK = 1 << 17
"""Elements in a block, half a megabyte in float32: the fastest of 2**15 to 2**20 in a trial."""
_DEVICE = operator.attrgetter("device")


class Step(NamedTuple):
    """What an update uses besides the parameters' tensors."""

    rate: Tensor
    """The learning rate, a scalar."""
    time: Tensor
    """The number of this update, from 1: a scalar, int64."""
    decay: float
    """The weight decay of these parameters."""


class Formula(Protocol):
    """Computes one parameter's new value and new moments."""

    def __call__(self, param: Tensor, grad: Tensor, moments: list[Tensor], step: Step) -> tuple[Tensor, ...]: ...


class Kernel(Protocol):
    """Applies the formula in place to many parameters of one type on one device; the gradients do not change."""

    def __call__(self, params: list[Tensor], grads: list[Tensor], moments: list[list[Tensor]], step: Step) -> None: ...


class Rule(NamedTuple):
    """What distinguishes one optimizer from another."""

    formula: Formula
    kernel: Kernel
    moments: Mapping[str, float]
    """The names of the tensors that are kept for each parameter, in its shape, and the values they start with."""


def optimizer(
    rule: Rule,
    learning_rate: LearningRate,
    weight_decay: float,
    decay: Callable[[str], bool] | None,
    scale: Callable[[str], float] | None,
) -> Optimizer:
    """The optimizer that follows a rule; the other arguments are those of `purecnn.optimizers.sgd`.

    Raises:
        ValueError: if the learning rate or ``weight_decay`` is a negative number; from ``update``, if the trees have
            different names, the state is another optimizer's or the learning rate is not a scalar.
    """
    if isinstance(learning_rate, (int, float)) and learning_rate < 0:
        raise ValueError(f"the learning rate must not be negative, found {learning_rate}")
    if weight_decay < 0:
        raise ValueError(f"weight_decay must not be negative, found {weight_decay}")
    default = learning_rate
    formula, kernel, moments = rule

    def of_path(path: str) -> tuple[float, float]:
        """The weight decay and the factor of the learning rate."""
        return weight_decay if decay is None or decay(path) else 0.0, 1.0 if scale is None else scale(path)

    def init(params: Tree) -> Tree:
        return {
            **no_steps(params),
            **{
                name: tree.map(lambda leaf, value=value: torch.full_like(leaf, value), params)
                for name, value in moments.items()
            },
        }

    def update(
        grads: Tree, opt_state: Tree, params: Tree, learning_rate: LearningRate | None = None, *, donate: bool = False
    ) -> tuple[Tree, Tree]:
        if opt_state.keys() != {"step", *moments}:
            raise ValueError(
                f"the optimizer keeps {sorted(moments)}, but its state has {sorted(opt_state.keys() - {'step'})}: "
                "begin with the optimizer's own init"
            )
        time = opt_state["step"] + 1
        chosen = default if learning_rate is None else learning_rate
        trees = [params, *(opt_state[name] for name in moments)]
        paths, columns = _columns(grads, *trees)
        fusible = _fusible(columns)
        rate = current(chosen, opt_state["step"], None if fusible else time.device)  # kernels take a rate on the host
        if fusible and not is_transformed(rate):
            if not donate:
                trees = [tree.map(torch.clone, each) for each in trees]
                paths, columns = _columns(grads, *trees)
            groups: dict[tuple[torch.dtype, torch.device, float, float], list[int]] = {}
            for i, (path, param) in enumerate(zip(paths, columns[1], strict=True)):
                groups.setdefault((param.dtype, param.device, *of_path(path)), []).append(i)
            for (_, _, strength, factor), members in groups.items():
                gs, ps, *ms = ([column[i] for i in members] for column in columns)
                gs = [_like(grad, param) for grad, param in zip(gs, ps, strict=True)]
                kernel(ps, gs, ms, Step(_scaled(rate, factor), time, strength))
        else:
            rate = rate.to(time.device)
            new: dict[str, tuple[Tensor, ...]] = {}
            for path, grad, param, *others in zip(paths, *columns, strict=True):
                strength, factor = of_path(path)
                old = param, *others
                found = formula(param, grad, others, Step(_scaled(rate, factor), time, strength))
                # A scalar parameter, unlike others, would be promoted to the type of the rate.
                new[path] = tuple(after.to(before.dtype) for after, before in zip(found, old, strict=True))
            trees = [tree.fill(each, {path: row[i] for path, row in new.items()}) for i, each in enumerate(trees)]
        return trees[0], {"step": time, **dict(zip(moments, trees[1:], strict=True))}

    return Optimizer(init, update, learning_rate)


def _scaled(rate: Tensor, factor: float) -> Tensor:
    return rate if factor == 1 else rate * factor


def _columns(grads: Tree, *trees: Tree) -> tuple[list[str], list[list[Tensor]]]:
    """The paths, in the order of the parameters (the second tree), and each tree's leaves in that order."""
    flat = [tree.flatten(each) for each in (grads, *trees)]
    paths = list(flat[1])
    for other in flat:
        if different := sorted(flat[1].keys() ^ other.keys()):
            raise ValueError(
                f"params, grads and opt_state have different names: {', '.join(different[:5])} (make_step and "
                "TrainState.start need the same trainable)"
            )
    return paths, [list(map(each.__getitem__, paths)) for each in flat]


def _fusible(columns: list[list[Tensor]]) -> bool:
    """Whether the kernels can be used: no transform is active, and the memory is laid out as they need it.

    Written with C functions: a Python loop over the leaves takes longer than launching the kernel.
    """
    leaves = list(itertools.chain(*columns))
    if is_transformed(*leaves) or any(kind is not Tensor for kind in set(map(type, leaves))):
        return False
    _, params, *moments = columns
    if any(device.type not in ("cpu", "cuda") for device in set(map(_DEVICE, params))):
        return False
    if not all(map(Tensor.is_contiguous, params)) and not all(map(_is_dense, params)):
        return False
    strides = list(map(Tensor.stride, params))
    return all(list(map(Tensor.stride, column)) == strides for column in moments)


def _is_dense(leaf: Tensor) -> bool:
    return leaf.is_contiguous() or leaf.is_contiguous(memory_format=torch.channels_last)


def _like(grad: Tensor, param: Tensor) -> Tensor:
    """The gradient in the parameter's type and layout: the kernels walk through memory and ignore strides."""
    same = grad.dtype == param.dtype and grad.stride() == param.stride()
    return grad if same else torch.empty_like(param).copy_(grad)


# Helpers for rules -------------------------------------------------------------------------------------------


def check_share(**values: float) -> None:
    """Check that values, such as decay rates of running means, are at least 0 and below 1.

    Raises:
        ValueError: naming the first that is not.
    """
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name} is at least 0 and below 1, found {value}")


def check_positive(**values: float) -> None:
    """Check that values are positive.

    Raises:
        ValueError: naming the first that is not.
    """
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, found {value}")


def number(rate: Tensor) -> float | Tensor:
    """A learning rate as torch's fused kernels take it: one on a GPU stays there, because fetching it would wait."""
    return float(rate) if rate.is_cpu else rate.float()


def square_root(square: Tensor) -> Tensor:
    """The square root, with derivative 0 at 0, where no gradient has arrived yet: else unrolled training gives NaN."""
    still = square == 0
    return torch.where(still, 0.0, torch.where(still, 1.0, square).sqrt())


def descend(params: list[Tensor], directions: list[Tensor], rate: Tensor) -> None:
    """``param -= rate * direction``."""
    if rate.is_cpu:
        torch._foreach_add_(params, directions, alpha=-float(rate))
    else:
        torch._foreach_sub_(params, torch._foreach_mul(directions, rate.float()))


def blockwise(kernel: Kernel, block: int = _BLOCK) -> Kernel:
    """On a CPU, call an elementwise kernel on one block of memory after the other.

    A kernel made of several operations reads its memory once for each; a block that fits into the cache is read once.
    """

    def in_blocks(params: list[Tensor], grads: list[Tensor], moments: list[list[Tensor]], step: Step) -> None:
        if not params[0].is_cpu:
            kernel(params, grads, moments, step)
            return
        for row in zip(params, grads, *moments, strict=True):
            # All leaves of a row are dense and have the same strides, so their elements lie in the same order.
            flat = (leaf.as_strided((leaf.numel(),), (1,)).split(block) for leaf in row)
            for param, grad, *others in zip(*flat, strict=True):
                kernel([param], [grad], [[other] for other in others], step)

    return in_blocks
