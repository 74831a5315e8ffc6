"""The interface of optimizers, and functions that make optimizers from others.

    optimizer = clipped(sgd(0.1, momentum=0.9), 1.0)
    opt_state = optimizer.init(params)
    params, opt_state = optimizer.update(grads, opt_state, params)

`Optimizer.update` does not change its inputs, unless the caller *donates* them: with ``donate=True`` the results reuse
the buffers of ``params`` and ``opt_state``, like ``jax.jit``'s ``donate_argnums``.

The rules themselves are in `purecnn.optimizers`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from purecnn import tree
from purecnn.schedules import Schedule
from purecnn.tree import Tree

__all__ = ["LearningRate", "Optimizer", "Update", "clipped", "from_transformation", "partitioned"]

LearningRate: TypeAlias = float | Tensor | Schedule
"""A number, a scalar tensor (such as an ensemble member's, under ``vmap``), or a function of the step."""


class Update(Protocol):
    """The type of `Optimizer.update`."""

    def __call__(
        self,
        grads: Tree,
        opt_state: Tree,
        params: Tree,
        learning_rate: LearningRate | None = None,
        *,
        donate: bool = False,
    ) -> tuple[Tree, Tree]: ...


class Optimizer(NamedTuple):
    """A rule that turns gradients into new parameters."""

    init: Callable[[Tree], Tree]
    """``init(params) -> opt_state``: a tree of tensors, with the scalar ``"step"``, the number of updates made."""
    update: Update
    """``update(grads, opt_state, params, learning_rate=None, *, donate=False) -> (params, opt_state)``.

    ``grads`` has the same paths and shapes as ``params``; both may also be flat dictionaries from paths to leaves.
    ``learning_rate`` replaces the optimizer's own. With ``donate=True``, ``params`` and ``opt_state`` may be
    overwritten and must not be used again."""
    learning_rate: LearningRate

    def rate(self, opt_state: Tree) -> float:
        """The learning rate of the next update.

        Raises:
            ValueError: if it is not a scalar.
        """
        return float(current(self.learning_rate, opt_state["step"]))


def current(learning_rate: LearningRate, step: Tensor, device: torch.device | None = None) -> Tensor:
    """The learning rate of a step as a scalar tensor; a Python number becomes float64 on the given device.

    Raises:
        ValueError: if it is not a scalar.
    """
    rate = learning_rate(step) if callable(learning_rate) else learning_rate
    if not isinstance(rate, Tensor):
        return torch.full((), rate, dtype=torch.float64, device=device)
    if rate.ndim:
        raise ValueError(f"a learning rate is a scalar, found shape {tuple(rate.shape)}; map over members with vmap")
    return rate


def no_steps(params: Tree) -> Tree:
    """The first part of every initial state: the number of updates, zero."""
    device = tree.device(params) if params else None
    return {"step": torch.zeros((), dtype=torch.int64, device=device)}


def _nested(tree_or_leaves: Tree) -> Tree:
    """A nested tree, from a nested tree or from a flat dictionary from paths to leaves."""
    return tree.unflatten(tree.flatten(tree_or_leaves))


def clipped(optimizer: Optimizer, max_norm: float) -> Optimizer:
    """Clip the global norm of the gradient to ``max_norm`` before the update, like ``torch.nn.utils.clip_grad_norm_``.

    ``grad * min(1, max_norm / (norm + 1e-6))`` (Pascanu et al., arXiv:1211.5063, algorithm 1).

    >>> from purecnn.optimizers import sgd
    >>> optimizer = clipped(sgd(1.0), 1.0)
    >>> params = {"weight": torch.zeros(2)}
    >>> optimizer.update({"weight": torch.tensor([3.0, -4.0])}, optimizer.init(params), params)[0]
    {'weight': tensor([-0.6000,  0.8000])}

    Raises:
        ValueError: unless ``max_norm`` is positive.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm must be positive, found {max_norm}")

    def update(
        grads: Tree, opt_state: Tree, params: Tree, learning_rate: LearningRate | None = None, *, donate: bool = False
    ) -> tuple[Tree, Tree]:
        norms = [torch.linalg.vector_norm(leaf) for leaf in tree.flatten(grads).values()]
        factor = (max_norm / (torch.linalg.vector_norm(torch.stack(norms)) + 1e-6)).clamp(max=1.0)
        grads = tree.map(lambda leaf: leaf * factor, grads)
        return optimizer.update(grads, opt_state, params, learning_rate, donate=donate)

    return optimizer._replace(update=update)


def partitioned(choose: Callable[[str, Tensor], bool], chosen: Optimizer, others: Optimizer) -> Optimizer:
    """Use one optimizer for the parameters that ``choose(path, parameter)`` selects, and another for all others.

    The reported learning rate is that of ``chosen``; a rate passed to ``update`` applies to both.

    Args:
        choose: called for each parameter, with its path; it may use the parameter's shape and type, but not its values.
        chosen: updates the selected parameters.
        others: updates all others.

    Raises:
        ValueError: from ``update``, if the names of gradients and parameters differ.

    >>> from purecnn.optimizers import adamw, sgd
    >>> optimizer = partitioned(lambda path, parameter: path.startswith("head."), adamw(1e-3), sgd(1e-2))
    >>> optimizer.init({"stem": {"weight": torch.zeros(3)}, "head": {"weight": torch.zeros(2)}})["chosen"]["mean"]
    {'head': {'weight': tensor([0., 0.])}}
    """

    def split(params: Tree, other: Tree) -> tuple[Tree, Tree]:
        """The leaves of ``other`` whose parameters are selected, and the rest."""
        marks = {path: bool(choose(path, leaf)) for path, leaf in tree.flatten(params).items()}
        leaves = tree.flatten(other)
        if different := sorted(marks.keys() ^ leaves.keys()):
            raise ValueError(f"params and grads have different names: {', '.join(different[:5])}")
        first, second = (
            tree.unflatten({path: leaf for path, leaf in leaves.items() if marks[path] is mark})
            for mark in (True, False)
        )
        return first, second

    def init(params: Tree) -> Tree:
        first, second = split(params, params)
        return {**no_steps(params), "chosen": chosen.init(first), "others": others.init(second)}

    def update(
        grads: Tree, opt_state: Tree, params: Tree, learning_rate: LearningRate | None = None, *, donate: bool = False
    ) -> tuple[Tree, Tree]:
        order = tree.flatten(params)
        states = opt_state["chosen"], opt_state["others"]
        (first, chosen_state), (second, others_state) = (
            optimizer.update(part, state, mine, learning_rate, donate=donate)
            for optimizer, part, state, mine in zip(
                (chosen, others), split(params, grads), states, split(params, params), strict=True
            )
        )
        leaves = {**tree.flatten(first), **tree.flatten(second)}
        params = tree.unflatten({path: leaves[path] for path in order})
        return params, {"step": opt_state["step"] + 1, "chosen": chosen_state, "others": others_state}

    return Optimizer(init, update, chosen.learning_rate)


def from_transformation(
    init: Callable[[Tree], Any],
    update: Callable[[Tree, Any, Tree], tuple[Tree, Any]],
    learning_rate: LearningRate = 1.0,
) -> Optimizer:
    """An optimizer from an Optax-style pair of ``init`` and ``update``, such as TorchOpt's.

    ``param += learning_rate * update``. If the pair applies its own learning rate, keep the default.

    Args:
        init: ``init(params) -> state``; any tree of tensors (lists, tuples, named tuples). Its structure must not
            depend on the values of ``params``, because ``init`` is called again to recover the structure.
        update: ``update(grads, state, params) -> (updates, state)``, pure. TorchOpt's is
            ``lambda grads, state, params: adam.update(grads, state, params=params, inplace=False)``.
        learning_rate: factor of the updates.

    Raises:
        ValueError: from ``update``, if the learning rate is not a scalar.

    >>> descent = from_transformation(lambda params: (), lambda grads, state, params: (grads, state), -0.5)
    >>> params = {"weight": torch.ones(2)}
    >>> descent.update({"weight": torch.ones(2)}, descent.init(params), params)[0]
    {'weight': tensor([0.5000, 0.5000])}
    """

    def start(params: Tree) -> Tree:
        leaves = pytree.tree_leaves(init(params))
        return {**no_steps(params), "inner": {str(i): leaf for i, leaf in enumerate(leaves)}}

    default = learning_rate

    def step(
        grads: Tree, opt_state: Tree, params: Tree, learning_rate: LearningRate | None = None, *, donate: bool = False
    ) -> tuple[Tree, Tree]:
        grads, params = _nested(grads), _nested(params)
        time = opt_state["step"]
        rate = current(default if learning_rate is None else learning_rate, time, time.device)
        structure = pytree.tree_structure(init(params))
        state = pytree.tree_unflatten(list(opt_state["inner"].values()), structure)
        updates, state = update(grads, state, params)
        params = tree.map(lambda leaf, change: leaf + rate.to(leaf) * change, params, updates)
        inner = {str(i): leaf for i, leaf in enumerate(pytree.tree_leaves(state))}
        return params, {"step": time + 1, "inner": inner}

    return Optimizer(start, step, learning_rate)
