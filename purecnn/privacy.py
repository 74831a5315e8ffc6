"""Differentially private training: DP-SGD, and DP-Adam with `purecnn.optimizers.adamw`.

Abadi et al., Deep Learning with Differential Privacy, arXiv:1607.00133, algorithm 1. A step sums the gradients of
single images, each clipped to a norm of at most ``clip``, adds normal noise of standard deviation ``noise * clip``, and
divides by the expected size of a batch. Each image is in a batch with the same probability, independently of the others
(`poisson_sample`); the sizes of batches therefore vary, and the step accepts any size.

    noise = noise_for(3.0, sampling_rate=0.1, steps=100, delta=1e-5)
    step = make_private_step(model, optimizer, clip=1.0, noise=noise, expected_batch=900)
    chosen = poisson_sample(key, count=9000, rate=0.1)
    train_state, metrics = step(train_state, (images[chosen], labels[chosen]), key)

The parameters are private, after each step and at the end. The metrics are not: they are computed without noise. The
numbers are floating-point and the keys are only as secret as their seed, so this protects against an adversary with
access to the trained networks, but not to the machine (Mironov, On significance of the least significant bits for
differential privacy, CCS 2012).
"""

import importlib
import math
from typing import Any, Literal

import torch
from torch import Tensor

from purecnn import distributed, random, tree
from purecnn.layer import Mode, logits_of
from purecnn.model import Model
from purecnn.optimizers import Optimizer
from purecnn.paper import Loss
from purecnn.per_sample import clipped_gradient_sum, mixes_images
from purecnn.step import Batch, Metrics, Step, Trainable, TrainState, partition

__all__ = ["epsilon", "make_private_step", "noise_for", "poisson_sample"]


def make_private_step(
    model: Model,
    optimizer: Optimizer,
    *,
    clip: float,
    noise: float,
    expected_batch: float,
    loss: Loss | None = None,
    trainable: Trainable | None = None,
    statistics: Literal["batch", "running"] = "batch",
    microbatch: int | None = None,
) -> Step:
    """Make the private training step ``(train_state, batch, key) -> (train_state, metrics)``, a pure function.

    It is called like the step of `purecnn.training.make_step`, and with ``noise=0``, ``clip=math.inf`` and batches of
    the expected size it makes the same updates, unless the network draws: dropout masks come from other keys.

    Args:
        model: the network; without batch normalisation, or with ``statistics="running"``.
        optimizer: the update rule; it sees only the private gradient.
        clip: the largest norm of an image's gradient by all trained parameters together.
        noise: standard deviation of the noise, in multiples of ``clip``: see `noise_for`.
        expected_batch: the mean size of a batch, ``rate * count`` of `poisson_sample`. The actual size of a batch must
            stay secret.
        loss: see `purecnn.per_sample.per_sample_gradients`.
        trainable: which parameters to train, by path; by default all. Only these get noise.
        statistics: what batch normalisation uses. Only frozen ``"running"`` statistics keep images' gradients separate.
        microbatch: process the batch in pieces of at most this many images, for less memory.

    Returns:
        The step. Its key may be the same for the whole training: the step number is folded into it, and each
        parameter's noise is drawn by its path. Metrics are the batch's mean loss (0 for an empty batch) and number of
        correctly classified images.

    Raises:
        ValueError: if a number is out of range, or the network would use the batch's statistics.

    >>> import purecnn
    >>> from purecnn.optimizers import sgd
    >>> model, optimizer = purecnn.create("lenet5"), sgd(0.1)
    >>> step = make_private_step(model, optimizer, clip=1.0, noise=1.0, expected_batch=4)
    >>> train_state = TrainState.start(*model.init(random.key(0)), optimizer)
    >>> train_state, metrics = step(train_state, (torch.zeros(3, 1, 32, 32), torch.tensor([1, 2, 3])), random.key(1))
    >>> int(train_state.step)
    1
    """
    if not clip > 0:
        raise ValueError(f"clip must be positive, found {clip}")
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise must be at least 0 and finite, found {noise}")
    if noise and math.isinf(clip):
        raise ValueError("gradients that are not clipped need infinite noise: choose a finite clip, or noise=0")
    if not expected_batch > 0:
        raise ValueError(f"expected_batch must be positive, found {expected_batch}")
    if microbatch is not None and microbatch < 1:
        raise ValueError(f"microbatch must be at least 1, found {microbatch}")
    if statistics != "running" and mixes_images(model):
        raise ValueError(
            f"{model.name} has batch normalisation, which mixes the images of a batch and keeps their statistics: "
            f'build it with norm="group", or freeze them with statistics="running"'
        )

    def step(train_state: TrainState, batch: Batch, key: Tensor | None = None) -> tuple[TrainState, Metrics]:
        params, state, opt_state, count = train_state[:4]
        if noise and key is None:
            raise ValueError("noise is drawn from a key: pass key=purecnn.random.key(seed)")
        draw_key, noise_key = (None, None) if key is None else random.split(random.fold_in(key, count))
        trained, _ = partition(params, trainable)
        total = {path: torch.zeros_like(leaf) for path, leaf in trained.items()}
        loss_sum, correct = torch.zeros((), device=count.device), torch.zeros_like(count)
        size = len(batch[1])
        if len(batch[0]) != size:
            raise ValueError(f"a batch has as many labels as images, found {size} and {len(batch[0])}")
        if "average" in train_state.extra:
            raise ValueError("a private step keeps no average: begin with TrainState.start(..., average=False)")
        for i, start in enumerate(range(0, size, microbatch or size or 1)):
            images, labels = (each[start : start + (microbatch or size)] for each in batch)
            found = clipped_gradient_sum(
                model,
                params,
                state,
                (images, labels),
                clip=clip,
                train=True,
                key=None if draw_key is None else random.fold_in(draw_key, i),
                statistics=statistics,
                loss=loss,
                trainable=trainable,
            )
            total = {path: total[path] + part for path, part in tree.flatten(found.gradient).items()}
            logits = logits_of(found.outputs)
            truth = labels.argmax(1) if labels.ndim > 1 and labels.is_floating_point() else labels
            loss_sum, correct = loss_sum + found.losses.sum(), correct + (logits.argmax(1) == truth).sum()
        total = distributed.total(total)
        sums = distributed.total({"loss": loss_sum, "correct": correct, "images": torch.full_like(count, size)})
        if noise:  # added once, to the total: all processes draw the same
            total = {path: part + noise * clip * _normal(noise_key, path, part) for path, part in total.items()}
        grads = {path: part / expected_batch for path, part in total.items()}
        updated, opt_state = optimizer.update(grads, opt_state, trained)
        params = tree.unflatten({**tree.flatten(params), **tree.flatten(updated)})
        after = train_state._replace(params=params, opt_state=opt_state, step=count + 1)
        return after, Metrics(sums["loss"] / sums["images"].clamp_min(1), sums["correct"])

    return step


def _normal(key: Tensor | None, path: str, like: Tensor) -> Tensor:
    return random.normal(Mode(key=key, path=path).draw_key(), like.shape, like.dtype)


def poisson_sample(key: Tensor, count: int, rate: float) -> Tensor:
    """Draw a batch that contains each of ``count`` images with probability ``rate``: the sorted indices, int64.

    Its size varies from draw to draw: ``rate * count`` on average, possibly 0. `epsilon` assumes this: cutting or
    filling batches to one size would make its figure wrong.

    Args:
        key: a different one for each batch.
        count: the number of all images.
        rate: the probability of each image.

    Raises:
        ValueError: if ``rate`` is not a probability.

    >>> poisson_sample(random.key(0), 10, 0.5)
    tensor([2, 3, 5, 6, 9])
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must be in [0, 1], found {rate}")
    # With all 32 bits: with the 23 of a float32, a rate of 1e-6 would be 7 % larger. In double precision, because torch
    # compares with a number in single precision, where the largest words would equal 2**32.
    return (random.bits(key, (count,)).double() < rate * 2**32).nonzero()[:, 0]


# Accounting --------------------------------------------------------------------------------------------------


def epsilon(noise: float, sampling_rate: float, steps: int, delta: float) -> float:
    """The privacy cost of a training: all steps together are ``(epsilon, delta)``-differentially private.

    This holds for adding or removing one image, with batches drawn by `poisson_sample`, even if the parameters after
    every step are published. Computed by Google's ``dp-accounting`` from privacy loss distributions, rounded to the
    safe side (Doroshenko et al., arXiv:2207.04380).

    Args:
        noise: as in `make_private_step`.
        sampling_rate: the probability that an image is in a batch.
        steps: number of steps.
        delta: probability with which the guarantee may fail; should be far less than one over the number of images.

    Raises:
        ModuleNotFoundError: if ``dp-accounting`` is not installed.
        ValueError: if a number is out of range.

    Example::

        epsilon(1.1, sampling_rate=256 / 60000, steps=14062, delta=1e-5)
    """
    _check(sampling_rate, steps, delta)
    if noise < 0:
        raise ValueError(f"noise must not be negative, found {noise}")
    if math.isinf(noise):
        return 0.0
    return _epsilon(_accounting(), noise, sampling_rate, steps, delta)


def noise_for(epsilon: float, sampling_rate: float, steps: int, delta: float) -> float:
    """The least noise with which a training costs no more than ``epsilon``, to a thousandth and on the safe side.

    Never between 0 and a quarter: computing the cost of so little noise takes minutes and gigabytes. It is 0 if the
    probability that an image is used at all is at most ``delta``.

    Args:
        epsilon: the largest privacy cost.
        sampling_rate, steps, delta: see `epsilon`.

    Raises:
        ModuleNotFoundError: if ``dp-accounting`` is not installed.
        ValueError: if a number is out of range.

    Example::

        noise_for(3.0, sampling_rate=1024 / 9000, steps=100, delta=1e-5)
    """
    _check(sampling_rate, steps, delta)
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon must be positive and finite, found {epsilon}")
    if 1 - (1 - sampling_rate) ** steps <= delta:
        return 0.0  # delta covers the probability that an image is used at all
    accounting = _accounting()
    # Its own search begins at zero noise, near which the privacy loss is costly to compute.
    upper = 1.0
    while _epsilon(accounting, upper, sampling_rate, steps, delta) > epsilon:
        upper *= 2
    while _epsilon(accounting, upper / 2, sampling_rate, steps, delta) <= epsilon:
        upper /= 2
        if upper <= _LEAST_NOISE:
            return upper
    found = accounting.calibrate_dp_mechanism(
        accounting.pld.PLDAccountant,
        lambda noise: _event(accounting, noise, sampling_rate, steps),
        epsilon,
        delta,
        accounting.ExplicitBracketInterval(upper / 2, upper),
        tol=1e-3,
    )
    return float(found)


_LEAST_NOISE = 1 / 4


def _check(sampling_rate: float, steps: int, delta: float) -> None:
    if not 0 < sampling_rate <= 1:
        raise ValueError(f"sampling_rate must be above 0 and at most 1, found {sampling_rate}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, found {steps}")
    if not 0 < delta < 1:
        raise ValueError(f"delta must be between 0 and 1, found {delta}")


def _epsilon(accounting: Any, noise: float, sampling_rate: float, steps: int, delta: float) -> float:
    accountant = accounting.pld.PLDAccountant().compose(_event(accounting, noise, sampling_rate, steps))
    return float(accountant.get_epsilon(delta))


def _event(accounting: Any, noise: float, sampling_rate: float, steps: int) -> Any:
    single = accounting.PoissonSampledDpEvent(sampling_rate, accounting.GaussianDpEvent(noise))
    return accounting.SelfComposedDpEvent(single, steps)


def _accounting() -> Any:
    try:
        importlib.import_module("dp_accounting.pld")
        return importlib.import_module("dp_accounting")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"epsilon is computed by Google's dp-accounting: pip install dp-accounting (missing: {error.name})"
        ) from error
