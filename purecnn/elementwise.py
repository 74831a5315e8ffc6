"""Update rules that treat each element of a parameter by itself; see `purecnn.optimizers`."""

from collections.abc import Callable

import torch
from torch import Tensor

from purecnn import rule
from purecnn.optimizer import LearningRate, Optimizer
from purecnn.rule import Rule, Step, blockwise, check_positive, check_share, descend, number, square_root

__all__ = ["adamw", "rmsprop", "sgd"]


def sgd(
    learning_rate: LearningRate,
    *,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    decay: Callable[[str], bool] | None = None,
    scale: Callable[[str], float] | None = None,
) -> Optimizer:
    """Stochastic gradient descent with momentum, ``torch.optim.SGD``.

    ``g = grad + weight_decay * param``; ``m = momentum * m + g``; ``param -= learning_rate * m``, or with Nesterov's
    momentum ``param -= learning_rate * (g + momentum * m)``.

    Args:
        learning_rate: step size.
        momentum: share of the previous direction that is kept, at least 0 and below 1.
        nesterov: look ahead (Sutskever et al., On the importance of initialization and momentum in deep learning,
            ICML 2013).
        weight_decay: strength of the pull towards zero.
        decay: from a parameter's path to whether weight decay applies to it; by default it applies to all.
        scale: from a parameter's path to a factor of its learning rate, as for fine-tuning in stages; by default 1.

    Raises:
        ValueError: if a number is out of range, or ``nesterov`` is set without a momentum.

    >>> optimizer = sgd(0.5, scale=lambda path: 1.0 if path.startswith("head.") else 0.1)
    >>> params = {"stem": {"weight": torch.ones(2)}, "head": {"weight": torch.ones(2)}}
    >>> optimizer.update(params, optimizer.init(params), params)[0]
    {'stem': {'weight': tensor([0.9500, 0.9500])}, 'head': {'weight': tensor([0.5000, 0.5000])}}
    """
    check_share(momentum=momentum)
    if nesterov and not momentum:
        raise ValueError("nesterov=True needs a momentum above 0")

    def formula(param: Tensor, grad: Tensor, moments: list[Tensor], step: Step) -> tuple[Tensor, ...]:
        if step.decay:
            grad = grad.add(param, alpha=step.decay)
        moments = [moment.mul(momentum).add(grad) for moment in moments]
        for moment in moments:
            grad = grad.add(moment, alpha=momentum) if nesterov else moment
        return torch.addcmul(param, grad, step.rate, value=-1), *moments

    def kernel(params: list[Tensor], grads: list[Tensor], moments: list[list[Tensor]], step: Step) -> None:
        torch._fused_sgd_(
            params,
            grads,
            *(moments or [[]]),
            weight_decay=step.decay,
            momentum=momentum,
            lr=number(step.rate),
            dampening=0.0,
            nesterov=nesterov,
            maximize=False,
            is_first_step=False,  # the moment starts at zero, so the result is the same
        )

    moments = {"momentum": 0.0} if momentum else {}
    return rule.optimizer(Rule(formula, kernel, moments), learning_rate, weight_decay, decay, scale)


def rmsprop(
    learning_rate: LearningRate = 1e-2,
    *,
    alpha: float = 0.99,
    eps: float = 1e-8,
    momentum: float = 0.0,
    tensorflow: bool = False,
    weight_decay: float = 0.0,
    decay: Callable[[str], bool] | None = None,
    scale: Callable[[str], float] | None = None,
) -> Optimizer:
    """Gradients divided by the root of their mean square (Tieleman and Hinton, 2012), ``torch.optim.RMSprop``.

    ``g = grad + weight_decay * param``; ``square = alpha * square + (1 - alpha) * g**2``;
    ``m = momentum * m + g / (sqrt(square) + eps)``; ``param -= learning_rate * m``.

    MnasNet (arXiv:1807.11626) and EfficientNet (arXiv:1905.11946) were trained with TensorFlow's variant, in which
    ``square`` starts at 1, ``eps`` is inside the root, and the learning rate inside the momentum:
    ``m = momentum * m + learning_rate * g / sqrt(square + eps)``; ``param -= m``. EfficientNet's settings are
    ``rmsprop(rate, alpha=0.9, eps=1e-3, momentum=0.9, tensorflow=True, weight_decay=1e-5)``.

    Args:
        learning_rate: step size.
        alpha: decay rate of the average of squared gradients.
        eps: keeps the division finite.
        momentum: share of the previous direction that is kept.
        tensorflow: use TensorFlow's variant.
        weight_decay, decay, scale: as in `sgd`.

    Raises:
        ValueError: if a number is out of range.
    """
    check_share(alpha=alpha, momentum=momentum)
    check_positive(eps=eps)

    def formula(param: Tensor, grad: Tensor, moments: list[Tensor], step: Step) -> tuple[Tensor, ...]:
        if step.decay:
            grad = grad.add(param, alpha=step.decay)
        square, *kept = moments
        square = square.mul(alpha).addcmul(grad, grad, value=1 - alpha)
        root = (square + eps).sqrt() if tensorflow else square_root(square) + eps
        if not kept:
            return param - step.rate * grad / root, square
        if tensorflow:
            moment = kept[0].mul(momentum) + step.rate * grad / root
            return param - moment, square, moment
        moment = kept[0].mul(momentum).addcdiv(grad, root)
        return torch.addcmul(param, moment, step.rate, value=-1), square, moment

    def kernel(params: list[Tensor], grads: list[Tensor], moments: list[list[Tensor]], step: Step) -> None:
        if step.decay:
            grads = list(torch._foreach_add(grads, params, alpha=step.decay))
        squares, *kept = moments
        torch._foreach_mul_(squares, alpha)
        torch._foreach_addcmul_(squares, grads, grads, value=1 - alpha)
        if tensorflow:
            roots = torch._foreach_add(squares, eps)
            torch._foreach_sqrt_(roots)
        else:
            roots = torch._foreach_sqrt(squares)
            torch._foreach_add_(roots, eps)
        if not kept:
            descend(params, list(torch._foreach_div(grads, roots)), step.rate)
            return
        torch._foreach_mul_(kept[0], momentum)
        if tensorflow:
            torch._foreach_addcdiv_(kept[0], torch._foreach_mul(grads, number(step.rate)), roots)
            torch._foreach_sub_(params, kept[0])
        else:
            torch._foreach_addcdiv_(kept[0], grads, roots)
            descend(params, kept[0], step.rate)

    moments = {"square": 1.0 if tensorflow else 0.0} | ({"momentum": 0.0} if momentum else {})
    return rule.optimizer(Rule(formula, blockwise(kernel), moments), learning_rate, weight_decay, decay, scale)


def adamw(
    learning_rate: LearningRate = 1e-3,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    decay: Callable[[str], bool] | None = None,
    scale: Callable[[str], float] | None = None,
) -> Optimizer:
    """Adam with decoupled weight decay (Loshchilov and Hutter, arXiv:1711.05101), ``torch.optim.AdamW``.

    ``mean = beta1 * mean + (1 - beta1) * grad`` and ``square = beta2 * square + (1 - beta2) * grad**2``. Both are
    divided by ``1 - beta**count``; then
    ``param -= learning_rate * (mean / (sqrt(square) + eps) + weight_decay * param)``.

    Args:
        learning_rate: step size.
        beta1: decay rate of the average of gradients.
        beta2: decay rate of the average of squared gradients.
        eps: keeps the division finite.
        weight_decay, decay, scale: as in `sgd`.

    Raises:
        ValueError: if a number is out of range.
    """
    check_share(beta1=beta1, beta2=beta2)
    check_positive(eps=eps)

    def formula(param: Tensor, grad: Tensor, moments: list[Tensor], step: Step) -> tuple[Tensor, ...]:
        mean, square = moments
        mean = mean.lerp(grad, 1 - beta1)
        square = square.mul(beta2).addcmul(grad, grad, value=1 - beta2)
        # The corrections are scalars in float64, as in torch: in float32, 1 - beta2**1 would keep few digits.
        size = step.rate / (1 - beta1 ** step.time.double())
        root = torch.sqrt(1 - beta2 ** step.time.double())
        if step.decay:
            param = param * (1 - step.rate * step.decay)
        return param - size * mean / (square_root(square) / root + eps), mean, square

    def kernel(params: list[Tensor], grads: list[Tensor], moments: list[list[Tensor]], step: Step) -> None:
        mean, square = moments
        torch._fused_adamw_(
            params,
            grads,
            mean,
            square,
            [],
            [step.time.float()] * len(params),
            lr=number(step.rate),
            beta1=beta1,
            beta2=beta2,
            weight_decay=step.decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
        )

    moments = {"mean": 0.0, "square": 0.0}
    return rule.optimizer(Rule(formula, kernel, moments), learning_rate, weight_decay, decay, scale)
