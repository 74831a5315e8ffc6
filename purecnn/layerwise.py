"""Update rules that treat each parameter as a whole; see `purecnn.optimizers`."""

import math
import sys
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from purecnn import rule
from purecnn.elementwise import adamw
from purecnn.optimizer import LearningRate, Optimizer, partitioned
from purecnn.rule import Rule, Step, blockwise, check_positive, check_share, descend, number, square_root

__all__ = ["lamb", "lars", "muon"]


def lars(
    learning_rate: LearningRate,
    *,
    momentum: float = 0.9,
    trust: float = 1e-3,
    weight_decay: float = 0.0,
    decay: Callable[[str], bool] | None = None,
    scale: Callable[[str], float] | None = None,
) -> Optimizer:
    """Layer-wise adaptive rate scaling for large batches (You et al., arXiv:1708.03888, algorithm 1 and equation 6).

    ``ratio = trust * norm(param) / (norm(grad) + weight_decay * norm(param))``;
    ``m = momentum * m + learning_rate * ratio * (grad + weight_decay * param)``; ``param -= m``.
    Where a norm is zero, ``ratio`` is 1.

    Args:
        learning_rate: step size.
        momentum: share of the previous direction that is kept.
        trust: share of its norm by which a parameter may change in a step.
        weight_decay: strength of the weight decay.
        decay: whether the parameter at a path is decayed *and* its rate adapted; by default all are. With large
            batches, biases and normalisation are usually left out. The ratio of those left out is 1.
        scale: as in `sgd`.

    Raises:
        ValueError: if a number is out of range.
    """
    check_share(momentum=momentum)
    check_positive(trust=trust)

    def ratio(param_norm: Tensor, grad_norm: Tensor) -> Tensor:
        used = (param_norm > 0) & (grad_norm > 0)
        # The denominator is replaced as well: the derivative of 0 / 0 would be NaN, whether it is used or not.
        norm = torch.where(used, grad_norm + weight_decay * param_norm, 1.0)
        return torch.where(used, trust * param_norm / norm, 1.0)

    def formula(param: Tensor, grad: Tensor, moments: list[Tensor], step: Step) -> tuple[Tensor, ...]:
        rate = step.rate
        if step.decay:
            rate = rate * ratio(torch.linalg.vector_norm(param), torch.linalg.vector_norm(grad))
            grad = grad.add(param, alpha=weight_decay)
        moment = moments[0].mul(momentum) + rate * grad
        return param - moment, moment

    def kernel(params: list[Tensor], grads: list[Tensor], moments: list[list[Tensor]], step: Step) -> None:
        if step.decay:
            norms = zip(torch._foreach_norm(params), torch._foreach_norm(grads), strict=True)
            rates = [step.rate * ratio(*pair) for pair in norms]
            grads = list(torch._foreach_add(grads, params, alpha=weight_decay))
            torch._foreach_mul_(grads, rates)
        else:
            grads = list(torch._foreach_mul(grads, number(step.rate)))
        torch._foreach_mul_(moments[0], momentum)
        torch._foreach_add_(moments[0], grads)
        torch._foreach_sub_(params, moments[0])

    return _adapted(Rule(formula, kernel, {"momentum": 0.0}), learning_rate, weight_decay, decay, scale)


def lamb(
    learning_rate: LearningRate = 1e-3,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 1e-2,
    decay: Callable[[str], bool] | None = None,
    scale: Callable[[str], float] | None = None,
) -> Optimizer:
    """Adam with a rate adapted to each layer, for large batches (You et al., arXiv:1904.00962, algorithm 2).

    With ``mean`` and ``square`` as in `adamw`, ``direction = mean / (sqrt(square) + eps) + weight_decay * param``;
    ``param -= learning_rate * norm(param) / norm(direction) * direction``. Where a norm is zero, their ratio is 1.

    Args:
        learning_rate: step size.
        beta1: decay rate of the gradient's running mean.
        beta2: decay rate of the running mean of its square.
        eps: keeps the division finite.
        weight_decay, decay, scale: as in `lars`.

    Raises:
        ValueError: if a number is out of range.
    """
    check_share(beta1=beta1, beta2=beta2)
    check_positive(eps=eps)

    def ratio(param_norm: Tensor, norm: Tensor) -> Tensor:
        used = (param_norm > 0) & (norm > 0)
        return torch.where(used, param_norm / torch.where(used, norm, 1.0), 1.0)

    def formula(param: Tensor, grad: Tensor, moments: list[Tensor], step: Step) -> tuple[Tensor, ...]:
        mean, square = moments
        mean = mean.lerp(grad, 1 - beta1)
        square = square.mul(beta2).addcmul(grad, grad, value=1 - beta2)
        root = torch.sqrt(1 - beta2 ** step.time.double())
        direction = mean / (1 - beta1 ** step.time.double()) / (square_root(square) / root + eps)
        rate = step.rate
        if step.decay:
            direction = direction.add(param, alpha=weight_decay)
            rate = rate * ratio(torch.linalg.vector_norm(param), torch.linalg.vector_norm(direction))
        return param - rate * direction, mean, square

    def kernel(params: list[Tensor], grads: list[Tensor], moments: list[list[Tensor]], step: Step) -> None:
        means, squares = moments
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, value=1 - beta2)
        roots = torch._foreach_sqrt(squares)
        # The first bias correction is applied in the division, which saves a pass over all elements.
        torch._foreach_mul_(roots, (1 - beta1 ** step.time.double()) / torch.sqrt(1 - beta2 ** step.time.double()))
        # The full operator name: otherwise torch takes the scalar tensor for a number and fetches it from the GPU.
        torch.ops.aten._foreach_add_.Tensor(roots, eps * (1 - beta1 ** step.time.double()))
        directions = list(torch._foreach_div(means, roots))
        if step.decay:
            torch._foreach_add_(directions, params, alpha=weight_decay)
            norms = zip(torch._foreach_norm(params), torch._foreach_norm(directions), strict=True)
            torch._foreach_mul_(directions, [ratio(*pair) for pair in norms])
        descend(params, directions, step.rate)

    return _adapted(Rule(formula, kernel, {"mean": 0.0, "square": 0.0}), learning_rate, weight_decay, decay, scale)


def muon(
    learning_rate: LearningRate = 1e-3,
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    adjust: Literal["match_rms_adamw", "original"] = "match_rms_adamw",
    weight_decay: float = 0.1,
    decay: Callable[[str], bool] | None = None,
    scale: Callable[[str], float] | None = None,
    hidden: Callable[[str], bool] | None = None,
    others: Optimizer | None = None,
) -> Optimizer:
    """Orthogonalised momentum for matrices and convolution kernels (Jordan et al., 2024), ``torch.optim.Muon``.

    ``m = momentum * m + (1 - momentum) * grad``; the direction is ``m``, or with Nesterov's momentum
    ``momentum * m + (1 - momentum) * grad``; ``param -= learning_rate * (ratio * U @ V.T + weight_decay * param)``
    where ``U @ S @ V.T`` is the direction's singular value decomposition. A kernel counts as the matrix
    (out, in * height * width). ``U @ V.T`` is approximated by five Newton-Schulz iterations in bfloat16, which bring
    the singular values to between about 0.7 and 1.2 (https://kellerjordan.github.io/posts/muon/).

    Args:
        learning_rate: step size.
        momentum: decay rate of the gradient's running mean.
        nesterov: use Nesterov's momentum.
        adjust: the ratio, for an (m, n) matrix. ``"match_rms_adamw"``: ``0.2 * sqrt(max(m, n))``, with which the same
            learning rate and decay suit both Muon and AdamW (Liu et al., arXiv:2502.16982, section 2.2);
            ``"original"``: ``sqrt(max(1, m / n))``.
        weight_decay, decay, scale: as in `sgd`.
        hidden: which of the matrices and kernels are orthogonalised, by path; by default all. Jordan leaves out the
            first layer and the head.
        others: for all other parameters; by default `adamw` with the same learning rate, decay and scale.

    Raises:
        ValueError: if a number is out of range, or ``adjust`` is neither of these.

    >>> optimizer = muon(1e-3, hidden=lambda path: path.startswith("stage"))
    >>> params = {"stage1": {"weight": torch.ones(4, 2, 3, 3), "bias": torch.ones(4)}, "head": torch.ones(5, 4)}
    >>> opt_state = optimizer.init(params)
    >>> list(opt_state["chosen"]["momentum"]["stage1"]), list(opt_state["others"]["mean"])
    (['weight'], ['stage1', 'head'])
    """
    check_share(momentum=momentum)
    if adjust not in ("match_rms_adamw", "original"):
        raise ValueError(f"adjust is 'match_rms_adamw' or 'original', found {adjust!r}")

    def directed(moment: Tensor, grad: Tensor) -> Tensor:
        direction = grad.lerp(moment, momentum) if nesterov else moment
        return _orthogonal(direction.flatten(1)).to(direction.dtype).reshape(direction.shape)

    def ratio(param: Tensor) -> float:
        rows, columns = param.shape[0], param.shape[1:].numel()
        return 0.2 * math.sqrt(max(rows, columns)) if adjust == "match_rms_adamw" else math.sqrt(max(1, rows / columns))

    def formula(param: Tensor, grad: Tensor, moments: list[Tensor], step: Step) -> tuple[Tensor, ...]:
        moment = moments[0].lerp(grad, 1 - momentum)
        if step.decay:
            param = param * (1 - step.rate * step.decay)
        return torch.addcmul(param, directed(moment, grad), step.rate * ratio(param), value=-1), moment

    def kernel(params: list[Tensor], grads: list[Tensor], moments: list[list[Tensor]], step: Step) -> None:
        torch._foreach_lerp_(moments[0], grads, 1 - momentum)
        if step.decay:
            torch._foreach_mul_(params, 1 - number(step.rate) * step.decay)
        for param, grad, moment in zip(params, grads, moments[0], strict=True):
            descend([param], [directed(moment, grad)], step.rate * ratio(param))

    matrices = rule.optimizer(Rule(formula, kernel, {"momentum": 0.0}), learning_rate, weight_decay, decay, scale)
    if others is None:
        others = adamw(learning_rate, weight_decay=weight_decay, decay=decay, scale=scale)
    return partitioned(lambda path, param: param.ndim in (2, 4) and (hidden is None or hidden(path)), matrices, others)


def _orthogonal(matrix: Tensor) -> Tensor:
    """Approximately ``U @ V.T`` where the matrix is ``U @ S @ V.T``; in bfloat16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.bfloat16()
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def _adapted(
    of: Rule,
    learning_rate: LearningRate,
    weight_decay: float,
    decay: Callable[[str], bool] | None,
    scale: Callable[[str], float] | None,
) -> Optimizer:
    """An optimizer of a rule that knows its weight decay; `Step.decay` is 1 for adapted parameters, else 0."""
    if weight_decay < 0:
        raise ValueError(f"weight_decay must not be negative, found {weight_decay}")
    return rule.optimizer(of._replace(kernel=blockwise(of.kernel, sys.maxsize)), learning_rate, 1.0, decay, scale)
