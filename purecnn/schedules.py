"""Learning rates as functions of the step.

A schedule takes the number of updates made so far, a scalar integer tensor, and returns a scalar float32 tensor.
It uses tensor operations, so that it compiles without a new graph for every step and can be mapped over an
ensemble. Schedules of several phases are compositions: ``warmup(5, cosine(0.1, 95))``.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

__all__ = ["Schedule", "constant", "cosine", "one_cycle", "piecewise", "step_decay", "warmup"]

Schedule = Callable[[Tensor], Tensor]
"""From the number of updates made so far to the learning rate of the next one."""


def _check_steps(**steps: int) -> None:
    for name, value in steps.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, found {value}")


def _half_cosine(start: float, end: float, progress: Tensor) -> Tensor:
    """From ``start`` at progress 0 to ``end`` at progress 1, level at both ends."""
    return end + (start - end) / 2 * (1 + torch.cos(math.pi * progress))


def constant(value: float) -> Schedule:
    """The same learning rate at every step.

    >>> float(constant(0.5)(torch.tensor(7)))
    0.5
    """
    return lambda step: torch.full_like(step, value, dtype=torch.float32)


def step_decay(initial: float, every: int, factor: float = 0.1) -> Schedule:
    """``initial * factor ** (step // every)``: ResNet's recipe (arXiv:1512.03385, section 3.4).

    Args:
        initial: the first learning rate.
        every: number of steps from one change to the next.
        factor: multiplies the learning rate at each change.

    Raises:
        ValueError: if ``every`` is less than 1.

    >>> schedule = step_decay(1.0, every=30, factor=0.5)
    >>> [float(schedule(torch.tensor(step))) for step in (0, 29, 30, 60)]
    [1.0, 1.0, 0.5, 0.25]
    """
    _check_steps(every=every)
    return lambda step: initial * torch.pow(factor, (step // every).float())


def piecewise(initial: float, factors: Mapping[int, float]) -> Schedule:
    """Piecewise constant: ``initial``, multiplied by another factor from each of the given steps on.

    Args:
        initial: the first learning rate.
        factors: from the number of a step to the factor from there on, of ``initial``, not of the previous rate.

    >>> schedule = piecewise(1.0, {50: 0.1, 75: 0.01})
    >>> [round(float(schedule(torch.tensor(step))), 3) for step in (0, 49, 50, 75, 100)]
    [1.0, 1.0, 0.1, 0.01, 0.01]
    """

    def schedule(step: Tensor) -> Tensor:
        value = torch.full_like(step, initial, dtype=torch.float32)
        for boundary, factor in sorted(factors.items()):
            value = torch.where(step >= boundary, initial * factor, value)
        return value

    return schedule


def cosine(initial: float, steps: int, final: float = 0.0) -> Schedule:
    """Half a cosine from ``initial`` at step 0 to ``final`` from step ``steps`` on (arXiv:1608.03983, equation 5).

    Args:
        initial: the first learning rate.
        steps: number of updates from ``initial`` to ``final``.
        final: the last learning rate.

    Raises:
        ValueError: if ``steps`` is less than 1.

    >>> schedule = cosine(1.0, 100)
    >>> [round(float(schedule(torch.tensor(step))), 3) for step in (0, 50, 100, 150)]
    [1.0, 0.5, 0.0, 0.0]
    """
    _check_steps(steps=steps)
    return lambda step: _half_cosine(initial, final, step.clamp(max=steps) / steps)


def one_cycle(
    peak: float, steps: int, *, warm: float = 0.3, start_divisor: float = 25.0, final_divisor: float = 1e4
) -> Schedule:
    """Rise to ``peak`` and fall again, each along half a cosine (Smith and Topin, arXiv:1708.07120).

    The rate starts at ``peak / start_divisor``, peaks at step ``warm * steps - 1``, and is ``peak / start_divisor /
    final_divisor`` from the last step, number ``steps - 1``, on. The values are those of
    ``torch.optim.lr_scheduler.OneCycleLR``; the momentum does not change.

    Args:
        peak: the largest learning rate.
        steps: number of updates in the cycle.
        warm: share of them in which the rate rises.
        start_divisor: ``peak`` divided by the first rate.
        final_divisor: the first rate divided by the last one.

    Raises:
        ValueError: unless ``0 < warm < 1`` and the rise and the fall both take some time.
    """
    top = warm * steps - 1
    if not 0 < top < steps - 1:
        raise ValueError(f"a cycle of {steps} steps cannot rise for a share of {warm} of them and then fall")
    start = peak / start_divisor
    final = start / final_divisor

    def schedule(step: Tensor) -> Tensor:
        up = _half_cosine(start, peak, step / top)
        down = _half_cosine(peak, final, (step.clamp(max=steps - 1) - top) / (steps - 1 - top))
        return torch.where(step <= top, up, down)

    return schedule


def warmup(steps: int, then: float | Schedule, start: float = 0.0) -> Schedule:
    """Rise linearly for ``steps`` steps, from ``start`` to the first value of ``then``; afterwards follow ``then``.

    ``then`` counts its steps from the end of the rise (Goyal et al., arXiv:1706.02677, section 2.2).

    Args:
        steps: number of updates in the rise.
        then: the schedule after the rise, or a constant learning rate.
        start: the first learning rate.

    Raises:
        ValueError: if ``steps`` is less than 1.

    >>> schedule = warmup(4, step_decay(1.0, every=10), start=0.2)
    >>> [round(float(schedule(torch.tensor(step))), 3) for step in (0, 2, 4, 13, 14)]
    [0.2, 0.6, 1.0, 1.0, 0.1]
    """
    _check_steps(steps=steps)
    after = then if callable(then) else constant(then)

    def schedule(step: Tensor) -> Tensor:
        # During the rise, this is the value that it ends at.
        target = after((step - steps).clamp(min=0))
        return torch.lerp(torch.full_like(target, start), target, (step / steps).clamp(max=1))

    return schedule
