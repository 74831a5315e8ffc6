"""Learning to learn: MAML, learned learning rates, and differentiable training.

    loss = classification_loss(model, state)
    adapted = adapt(loss, params, (images, labels), learning_rate=0.1, steps=5)
    value = maml_loss(loss, params, tasks, learning_rate=0.1, steps=5)        # to be differentiated

A *loss* is any function ``(params, batch) -> scalar``. All functions here are functions of trees, so
``torch.func.grad`` differentiates through the steps they make: with respect to the initial parameters, to learning
rates, and to anything else that the loss depends on.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap

from purecnn import tree
from purecnn.model import Model
from purecnn.optimizers import Optimizer
from purecnn.tree import Tree

__all__ = ["Loss", "Rates", "Tasks", "adapt", "classification_loss", "learned_rates", "maml_loss", "unroll"]

Loss: TypeAlias = Callable[[Tree, Any], Tensor]
"""``loss(params, batch) -> scalar``."""
Rates: TypeAlias = float | Tensor | Mapping[str, Any]
"""One learning rate for all parameters, or a tree with one for each leaf: a scalar, or a tensor that broadcasts to the
leaf."""


class Tasks(NamedTuple):
    """Several learning problems: every tensor of both batches has the tasks as its first axis."""

    support: Any
    """The examples to adapt to, a batch as the loss takes it."""
    query: Any
    """The examples to evaluate the adapted parameters on."""


def classification_loss(
    model: Model, state: Tree, *, statistics: Literal["batch", "running"] = "batch"
) -> Callable[[Tree, tuple[Tensor, Tensor]], Tensor]:
    """The loss ``(params, (images, labels)) -> scalar`` of a network: its own, or cross-entropy.

    The network runs without dropout and auxiliary heads, and no statistics are updated.

    Args:
        model: the network.
        state: its running statistics.
        statistics: what batch normalisation uses. ``"batch"`` is transductive, as in the experiments of the MAML
            paper: the images of a batch share statistics. ``"running"`` uses those of ``state``, which do not change.
    """
    criterion = model.loss or F.cross_entropy

    def loss(params: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        logits, _ = model.apply(params, state, images, statistics=statistics)
        return criterion(logits, labels)

    return loss


def adapt(
    loss: Loss, params: Tree, batch: Any, learning_rate: Rates, *, steps: int = 1, first_order: bool = False
) -> Tree:
    """Parameters after some steps of gradient descent on one batch; differentiable.

    Args:
        loss: what to descend.
        params: the parameters to start from.
        batch: passed to the loss in each step.
        learning_rate: one for all, or a tree of them.
        steps: number of steps.
        first_order: treat the gradients as if they did not depend on the parameters. When the result is
            differentiated, each step then counts as a constant shift, and no second derivatives are needed.

    >>> def loss(params, batch):
    ...     return (params["w"] - batch) ** 2 / 2
    >>> adapt(loss, {"w": torch.tensor(1.0)}, torch.tensor(0.0), 0.5, steps=2)
    {'w': tensor(0.2500)}
    >>> grad(lambda params: adapt(loss, params, torch.tensor(0.0), 0.5, steps=2)["w"])({"w": torch.tensor(1.0)})
    {'w': tensor(0.2500)}
    """
    rates = learning_rate if isinstance(learning_rate, Mapping) else tree.map(lambda _: learning_rate, params)
    for _ in range(steps):
        gradients = grad(loss)(tree.map(torch.detach, params) if first_order else params, batch)
        params = tree.map(lambda param, gradient, rate: param - rate * gradient, params, gradients, rates)
    return params


def maml_loss(
    loss: Loss, params: Tree, tasks: Tasks, learning_rate: Rates, *, steps: int = 1, first_order: bool = False
) -> Tensor:
    """The objective of MAML: the mean over tasks of the query's loss after `adapt` to the support.

    Finn et al. 2017, arXiv:1703.03400, algorithms 1 and 2; ``first_order`` is section 5.2. Its gradient with respect
    to a tree of learning rates (`learned_rates`) is that of Meta-SGD, Li et al. 2017, arXiv:1707.09835.

    Args:
        loss, learning_rate, steps, first_order: see `adapt`.
        params: the parameters that every task starts from.
        tasks: the tasks, which ``vmap`` maps over.

    >>> def loss(params, batch):
    ...     return ((params["w"] - batch) ** 2).mean() / 2
    >>> tasks = Tasks(support=torch.tensor([[1.0], [3.0]]), query=torch.tensor([[1.0], [3.0]]))
    >>> grad(lambda params: maml_loss(loss, params, tasks, 0.5))({"w": torch.tensor(0.0)})  # (1 - 0.5)**2 (0 - 2)
    {'w': tensor(-0.5000)}
    """

    def query_loss(support: Any, query: Any) -> Tensor:
        return loss(adapt(loss, params, support, learning_rate, steps=steps, first_order=first_order), query)

    return vmap(query_loss)(*tasks).mean()


def learned_rates(params: Tree, value: float, *, per: Literal["leaf", "parameter"] = "leaf") -> Tree:
    """Initial values for learned learning rates: a tree of tensors filled with ``value``.

    Args:
        params: the parameters.
        value: the learning rate at the beginning.
        per: one scalar for each ``"leaf"``, as in Antoniou et al. 2018, arXiv:1810.09502, section 4; or one for each
            ``"parameter"``, as in Meta-SGD.

    Raises:
        ValueError: if ``per`` is neither of these.

    >>> learned_rates({"head": {"weight": torch.ones(2, 3)}}, 0.5)
    {'head': {'weight': tensor(0.5000)}}
    """
    if per not in ("leaf", "parameter"):
        raise ValueError(f"per is 'leaf' or 'parameter', found {per!r}")
    return tree.map(lambda leaf: torch.full_like(leaf if per == "parameter" else leaf.flatten()[0], value), params)


def unroll(
    loss: Loss,
    optimizer: Optimizer,
    params: Tree,
    batches: Iterable[Any],
    *,
    opt_state: Tree | None = None,
    learning_rate: Tensor | None = None,
) -> tuple[Tree, Tree]:
    """Parameters and optimizer state after one step for each batch; differentiable.

    The derivative of the resulting parameters' validation loss, with respect to the learning rate, to the data or to
    weights of the data, goes backwards through all steps (Maclaurin et al. 2015, arXiv:1502.03492; unlike theirs, this
    keeps all steps in memory).

    Args:
        loss: what to descend.
        optimizer: the update rule.
        params: the parameters to start from.
        batches: one for each step.
        opt_state: the state to continue from; by default the optimizer's initial one.
        learning_rate: in place of the optimizer's own.

    >>> from purecnn.optimizers import sgd
    >>> def loss(params, batch):
    ...     return (params["w"] - batch) ** 2 / 2
    >>> def after(rate):
    ...     return unroll(loss, sgd(0.0), {"w": torch.tensor(1.0)}, torch.zeros(3), learning_rate=rate)[0]["w"]
    >>> after(torch.tensor(0.5)), grad(after)(torch.tensor(0.5))  # (1 - rate)**3 and its derivative
    (tensor(0.1250), tensor(-0.7500))
    """
    opt_state = optimizer.init(params) if opt_state is None else opt_state
    for batch in batches:
        params, opt_state = optimizer.update(grad(loss)(params, batch), opt_state, params, learning_rate)
    return params, opt_state
