"""Optimizers as pairs of pure functions.

    optimizer = sgd(0.1, momentum=0.9)
    opt_state = optimizer.init(params)
    params, opt_state = optimizer.update(grads, opt_state, params)

`Optimizer.update` leaves its inputs alone, unless the caller *donates* them: with ``donate=True`` the buffers of
``params`` and ``opt_state`` become those of the results, as ``jax.jit``'s ``donate_argnums`` does it.

Each rule is here twice, side by side: as a formula, which works under ``vmap``, ``grad`` and ``torch.compile``, and
as torch's fused kernel, which is many times faster outside of them and works in place, on donated buffers or on
copies. On a CPU the formulas equal torch's single-tensor implementations bit for bit, and the kernels are those of
``fused=True``. The two differ in rounding: a parameter by a few units in the last place after 100 steps.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from purecnn import tree
from purecnn.eager import is_transformed
from purecnn.schedules import Schedule
from purecnn.tree import Tree

__all__ = ["LearningRate", "Optimizer", "adamw", "sgd"]

LearningRate: TypeAlias = float | Tensor | Schedule
"""A number, a scalar tensor (such as one of an ensemble's, under ``vmap``), or a function of the step."""


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
    """``init(params) -> opt_state``: the scalar ``"step"``, the number of updates made, and trees alike to
    ``params`` by name."""
    update: Update
    """``update(grads, opt_state, params, learning_rate=None, *, donate=False) -> (params, opt_state)``.

    ``grads`` has the same names and shapes as ``params``. ``learning_rate`` replaces the optimizer's own.
    ``donate=True`` allows to overwrite ``params`` and ``opt_state``, which must not be used again."""
    learning_rate: LearningRate

    def rate(self, opt_state: Tree) -> float:
        """The learning rate of the next update."""
        return float(_rate(self.learning_rate, opt_state["step"]))


class _Formula(Protocol):
    """One leaf's new value and new moments. ``count`` is the number of this update, from 1."""

    def __call__(
        self, param: Tensor, grad: Tensor, moments: list[Tensor], rate: Tensor, count: Tensor, decay: float
    ) -> tuple[Tensor, ...]: ...


class _Kernel(Protocol):
    """The formula for many leaves of one type on one device, in place."""

    def __call__(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        moments: list[list[Tensor]],
        rate: float | Tensor,
        count: Tensor,
        decay: float,
    ) -> None: ...


def sgd(
    learning_rate: LearningRate,
    *,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    decay: Callable[[str], bool] | None = None,
) -> Optimizer:
    """Stochastic gradient descent with momentum, ``torch.optim.SGD``.

    ``g = grad + weight_decay * param``; ``m = momentum * m + g``; ``param -= learning_rate * m``, or with Nesterov's
    momentum ``param -= learning_rate * (g + momentum * m)``.

    Args:
        learning_rate: step size.
        momentum: share of the former direction that is kept, at least 0 and below 1.
        nesterov: look ahead (Sutskever et al., On the importance of initialization and momentum in deep learning,
            ICML 2013).
        weight_decay: strength of the pull to zero.
        decay: whether a parameter is pulled, by its path; by default all are.

    >>> optimizer = sgd(0.5)
    >>> params = {"head": {"weight": torch.ones(2)}}
    >>> optimizer.update({"head": {"weight": torch.tensor([1.0, 2.0])}}, optimizer.init(params), params)[0]
    {'head': {'weight': tensor([0.5000, 0.0000])}}
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum is at least 0 and below 1, found {momentum}")
    if nesterov and not momentum:
        raise ValueError("Nesterov's momentum needs a momentum")

    def formula(
        param: Tensor, grad: Tensor, moments: list[Tensor], rate: Tensor, count: Tensor, decay: float
    ) -> tuple[Tensor, ...]:
        if decay:
            grad = grad.add(param, alpha=decay)
        moments = [moment.mul(momentum).add(grad) for moment in moments]
        for moment in moments:
            grad = grad.add(moment, alpha=momentum) if nesterov else moment
        return torch.addcmul(param, grad, rate, value=-1), *moments

    def kernel(
        params: list[Tensor],
        grads: list[Tensor],
        moments: list[list[Tensor]],
        rate: float | Tensor,
        count: Tensor,
        decay: float,
    ) -> None:
        torch._fused_sgd_(
            params,
            grads,
            *(moments or [[]]),
            weight_decay=decay,
            momentum=momentum,
            lr=rate,
            dampening=0.0,
            nesterov=nesterov,
            maximize=False,
            is_first_step=False,  # the moment starts at zero, which comes to the same
        )

    return _optimizer(learning_rate, weight_decay, decay, ("momentum",) if momentum else (), formula, kernel)


def adamw(
    learning_rate: LearningRate = 1e-3,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    decay: Callable[[str], bool] | None = None,
) -> Optimizer:
    """Adam with decoupled weight decay (Loshchilov and Hutter, arXiv:1711.05101), ``torch.optim.AdamW``.

    ``mean = beta1 * mean + (1 - beta1) * grad`` and ``square = beta2 * square + (1 - beta2) * grad**2``; with both
    divided by ``1 - beta**count``, ``param -= learning_rate * (mean / (sqrt(square) + eps) + weight_decay * param)``.

    Args:
        learning_rate: step size.
        beta1: memory of the gradient's mean.
        beta2: memory of its square.
        eps: keeps the division finite.
        weight_decay: strength of the pull to zero.
        decay: whether a parameter is pulled, by its path; by default all are.
    """
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"beta1 and beta2 are at least 0 and below 1, found {beta1} and {beta2}")
    if not eps > 0:
        raise ValueError(f"eps must be positive, found {eps}")

    def formula(
        param: Tensor, grad: Tensor, moments: list[Tensor], rate: Tensor, count: Tensor, decay: float
    ) -> tuple[Tensor, ...]:
        mean, square = moments
        mean = mean.lerp(grad, 1 - beta1)
        square = square.mul(beta2).addcmul(grad, grad, value=1 - beta2)
        # The corrections are scalars, in double precision as in torch: 1 - beta2**1 leaves few digits of a float.
        size = rate / (1 - beta1 ** count.double())
        scale = torch.sqrt(1 - beta2 ** count.double())
        if decay:
            param = param * (1 - rate * decay)
        return param - size * mean / (square.sqrt() / scale + eps), mean, square

    def kernel(
        params: list[Tensor],
        grads: list[Tensor],
        moments: list[list[Tensor]],
        rate: float | Tensor,
        count: Tensor,
        decay: float,
    ) -> None:
        mean, square = moments
        torch._fused_adamw_(
            params,
            grads,
            mean,
            square,
            [],
            [count.float()] * len(params),
            lr=rate,
            beta1=beta1,
            beta2=beta2,
            weight_decay=decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
        )

    return _optimizer(learning_rate, weight_decay, decay, ("mean", "square"), formula, kernel)


def _optimizer(
    learning_rate: LearningRate,
    weight_decay: float,
    decay: Callable[[str], bool] | None,
    names: tuple[str, ...],
    formula: _Formula,
    kernel: _Kernel,
) -> Optimizer:
    """The pair of functions, from a rule and the names of its moments."""
    if isinstance(learning_rate, (int, float)) and learning_rate < 0:
        raise ValueError(f"the learning rate must not be negative, found {learning_rate}")
    if weight_decay < 0:
        raise ValueError(f"weight_decay must not be negative, found {weight_decay}")
    default = learning_rate

    def decay_of(path: str) -> float:
        return weight_decay if decay is None or decay(path) else 0.0

    def init(params: Tree) -> Tree:
        device = next(iter(tree.flatten(params).values())).device if params else None
        step = torch.zeros((), dtype=torch.int64, device=device)
        return {"step": step, **{name: tree.map(torch.zeros_like, params) for name in names}}

    def update(
        grads: Tree, opt_state: Tree, params: Tree, learning_rate: LearningRate | None = None, *, donate: bool = False
    ) -> tuple[Tree, Tree]:
        step = opt_state["step"]
        rate = _rate(default if learning_rate is None else learning_rate, step)
        rows = _rows(params, grads, *(opt_state[name] for name in names))
        if _fusible(rows, rate):
            if not donate:
                rows = {path: [p.clone(), g, *(m.clone() for m in ms)] for path, (p, g, *ms) in rows.items()}
            groups: dict[tuple[torch.dtype, torch.device, float], list[list[Tensor]]] = {}
            for path, row in rows.items():
                groups.setdefault((row[0].dtype, row[0].device, decay_of(path)), []).append(row)
            for (_, _, strength), group in groups.items():
                ps, gs, *ms = (list(column) for column in zip(*group, strict=True))
                gs = [_like(grad, param) for grad, param in zip(gs, ps, strict=True)]
                kernel(ps, gs, ms, rate.float() if isinstance(rate, Tensor) else rate, step + 1, strength)
            new = {path: (param, *moments) for path, (param, _, *moments) in rows.items()}
        else:
            if not isinstance(rate, Tensor):
                rate = torch.full((), rate, dtype=torch.float64, device=step.device)
            new = {path: formula(p, g, ms, rate, step + 1, decay_of(path)) for path, (p, g, *ms) in rows.items()}
        params, *moments = (tree.unflatten({path: row[i] for path, row in new.items()}) for i in range(1 + len(names)))
        return params, {"step": step + 1, **dict(zip(names, moments, strict=True))}

    return Optimizer(init, update, learning_rate)


def _rate(learning_rate: LearningRate, step: Tensor) -> float | Tensor:
    rate = learning_rate(step) if callable(learning_rate) else learning_rate
    if isinstance(rate, Tensor) and rate.ndim:
        raise ValueError(f"a learning rate is a scalar, found shape {tuple(rate.shape)}; map over members with vmap")
    return rate


def _rows(*trees: Tree) -> dict[str, list[Tensor]]:
    """For each path, its leaves in all trees."""
    first, *others = (tree.flatten(each) for each in trees)
    for other in others:
        if different := sorted(first.keys() ^ other.keys()):
            raise ValueError(f"params, grads and opt_state have different names: {', '.join(different[:5])}")
    return {path: [leaf, *(other[path] for other in others)] for path, leaf in first.items()}


def _fusible(rows: Mapping[str, list[Tensor]], rate: float | Tensor) -> bool:
    """Whether the kernels can be used: nobody watches, and the memory is laid out as they need it."""
    watched = [leaf for row in rows.values() for leaf in row]
    if is_transformed(*watched, *([rate] if isinstance(rate, Tensor) else [])):
        return False
    return all(
        all(type(leaf) is Tensor and leaf.device.type in ("cpu", "cuda") for leaf in (param, grad, *moments))
        and (param.is_contiguous() or param.is_contiguous(memory_format=torch.channels_last))
        and all(moment.stride() == param.stride() for moment in moments)
        for param, grad, *moments in rows.values()
    )


def _like(grad: Tensor, param: Tensor) -> Tensor:
    """The gradient in the parameter's layout: the kernels walk through memory without a look at strides."""
    return grad if grad.stride() == param.stride() else torch.empty_like(param).copy_(grad)
