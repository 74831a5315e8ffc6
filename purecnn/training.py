"""Evaluation, and the loop around the training step.

    fitted = fit(model, optimizer, train, test, epochs=10, key=key)
    params, state = fitted.train_state.averaged

Nothing here reads or writes files; the command line does that. The step itself is in `purecnn.step`.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from purecnn import distributed, random, tree
from purecnn.capture import captured
from purecnn.model import Model
from purecnn.optimizers import Optimizer
from purecnn.precision import Policy
from purecnn.step import Batch, Metrics, Step, Trainable, TrainState, loss_function, make_step
from purecnn.tree import Tree

__all__ = [
    "Batch",
    "DivergedError",
    "Epoch",
    "Evaluation",
    "Fitted",
    "Metrics",
    "Position",
    "Step",
    "TrainState",
    "Trainable",
    "evaluate",
    "fit",
    "loss_function",
    "make_step",
]


class Evaluation(NamedTuple):
    """A network's results on a set of images."""

    loss: float
    """Mean cross-entropy, or the mean of the network's own loss."""
    accuracy: float
    """Share of the images whose largest logit is that of their label."""
    confusion: Tensor
    """Number of images by true class (row) and predicted class (column): (classes, classes), int64, on the CPU."""

    @property
    def class_accuracy(self) -> Tensor:
        """Share of each class's images that are classified correctly: (classes,); NaN for a class without images."""
        return self.confusion.diagonal() / self.confusion.sum(1)


def evaluate(
    model: Model, params: Tree, state: Tree, batches: Iterable[Batch], *, policy: Policy | None = None
) -> Evaluation:
    """Evaluate the network on batches, which are moved to the parameters' device.

    In a process group each process passes its part of the images, and all get the result for all images.

    Args:
        model: the network.
        params, state: its parameters and statistics.
        batches: images and their class indices.
        policy: number types.

    Raises:
        ValueError: if there is no batch, or a label is not a class index.
    """
    device = tree.device(params)
    network = model.apply if policy is None else lambda *args: policy.apply(model, *args)
    loss = model.loss or F.cross_entropy
    losses = [torch.zeros((), dtype=torch.float64, device=device)]
    count = 0
    places = [torch.zeros((2, 0), dtype=torch.int64, device=device)]
    classes = 0
    with torch.no_grad():
        for images, labels in batches:
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            if labels.is_floating_point():
                raise ValueError(f"evaluate takes class indices as labels, found {labels.dtype}")
            logits, _ = network(params, state, images)
            losses.append(loss(logits, labels).double() * len(labels))
            count += len(labels)
            places.append(torch.stack([labels, logits.argmax(1)]).flatten(1))
            classes = logits.shape[1]
    # In a process group, a process may get no images; then it does not know the number of classes.
    seen = distributed.total({"": torch.tensor([classes > 0, classes], dtype=torch.int64, device=device)})[""].tolist()
    if not seen[0]:
        raise ValueError("there is no batch to evaluate")
    classes = seen[1] // seen[0]
    truth, found = torch.cat(places, 1)
    if len(truth) and not 0 <= int(truth.min()) <= int(truth.max()) < classes:
        raise ValueError(f"labels are indices of {classes} classes, found {int(truth.min())} to {int(truth.max())}")
    pairs = (truth * classes + found).bincount(minlength=classes**2)
    images_seen = torch.tensor(count, device=device)
    sums = distributed.total({"loss": torch.stack(losses).sum(), "confusion": pairs, "images": images_seen})
    confusion = sums["confusion"].cpu().reshape(classes, classes)
    accuracy = int(confusion.diagonal().sum()) / int(confusion.sum())
    return Evaluation(float(sums["loss"]) / int(sums["images"]), accuracy, confusion)


class Epoch(NamedTuple):
    """One row of a training's history."""

    epoch: int
    """From 1."""
    train_loss: float
    """Mean of the minimised loss over the epoch's images, as measured by the steps."""
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    learning_rate: float
    """That of the epoch's first step."""
    seconds: float
    """Duration of training and evaluation."""


class Position(NamedTuple):
    """The progress of a training: with the same arguments, `fit` continues from it as if it had never stopped."""

    train_state: TrainState
    epoch: int
    """The epoch of the next step, from 1."""
    batch: int
    """Number of steps made in this epoch."""
    sums: Tensor
    """Over this epoch's images so far: sum of losses, number classified correctly, number of images: (3,), float64."""
    seconds: float
    """Time spent in this epoch."""
    history: tuple[Epoch, ...]
    """The finished epochs."""
    learning_rate: float | None = None
    """That of this epoch's first step; None before it."""

    @classmethod
    def start(cls, train_state: TrainState) -> "Position":
        """The position before the first epoch."""
        return cls(train_state, 1, 0, torch.zeros(3, dtype=torch.float64, device=train_state.step.device), 0.0, ())


class Fitted(NamedTuple):
    """The result of `fit`."""

    train_state: TrainState
    """After the last step."""
    best: TrainState | None
    """After the epoch with the highest test accuracy (among equals, the one with the lowest test loss). None if that
    epoch lies before the position from which the training continued."""
    history: tuple[Epoch, ...]
    stopped: bool
    """Whether ``on_step`` ended the training early."""

    @property
    def best_epoch(self) -> Epoch:
        """The best epoch's row of the history."""
        return max(self.history, key=_merit)


class DivergedError(ArithmeticError):
    """The loss is infinite or NaN."""

    def __init__(
        self, message: str, epoch: int, step: int, train_state: TrainState, history: tuple[Epoch, ...]
    ) -> None:
        super().__init__(message)
        self.epoch = epoch
        """The epoch, from 1."""
        self.step = step
        """Number of steps made before the one that failed."""
        self.train_state = train_state
        """The last good one: after the previous epoch, or from the start."""
        self.history = history
        """The finished epochs."""


def fit(
    model: Model,
    optimizer: Optimizer,
    train: Callable[[Tensor], Iterable[Batch]],
    test: Iterable[Batch],
    *,
    epochs: int,
    key: Tensor,
    start: tuple[Tree, Tree] | None = None,
    position: Position | None = None,
    trainable: Trainable | None = None,
    policy: Policy | None = None,
    average: float | None = None,
    capture: bool = False,
    on_step: Callable[[Position, Metrics], bool | None] | None = None,
    on_epoch: Callable[[Epoch, TrainState], None] | None = None,
    **settings: Any,
) -> Fitted:
    """Train for some epochs, with an evaluation after each.

    The result depends only on the arguments: everything random comes from ``key``. No files are written; use the
    callbacks for logs and checkpoints.

    Fine-tuning starts from given parameters with a fresh head, and may keep the trunk frozen::

        model, params, state = purecnn.replace_head(model, params, state, num_classes, head_key)
        fit(model, ..., start=(params, state), trainable=lambda path: path.startswith("head."), statistics="running")

    In a process group (`purecnn.distributed`) ``train`` and ``test`` give each process its part of every batch.

    Args:
        model: the network.
        optimizer: the update rule.
        train: called with a different key in each epoch; returns the batches of that epoch. If they have a method
            ``skip(n)``, it is used to continue in the middle of an epoch.
        test: the batches to evaluate on, after each epoch.
        epochs: number of epochs.
        key: for initial values, the order of images and random draws; without ``start``, parameters are on its device.
        start: parameters and running statistics to start from; they are not overwritten. By default
            ``model.init``'s.
        position: where to continue, in place of ``start``. Its tensors are not overwritten.
        trainable, policy, average: see `make_step`. If there is an average, it is what is evaluated.
        capture: on a GPU, record the step as a CUDA graph (`purecnn.capture`).
        on_step: called as ``on_step(position, metrics)`` after each step; reading values from an accelerator waits for
            the step. The next step overwrites the position's tensors. If it returns True, the training stops there.
        on_epoch: called as ``on_epoch(row, train_state)`` after each epoch. The train state may be kept.
        settings: other arguments of `make_step`: ``statistics``, ``loss``, ``label_smoothing``, ``aux_weight``,
            ``accumulate``, ``remat``, ``augment``, ``compile``. Only the steps use ``loss``: evaluations use the
            model's own, set with ``dataclasses.replace(model, loss=...)``, or else cross-entropy.

    Raises:
        DivergedError: if a loss is infinite or NaN.
        ValueError: if ``start`` is another network's or ``position`` is given too, there are no batches, or ``epochs``
            is less than 1.
    """
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, found {epochs}")
    if start is not None and position is not None:
        raise ValueError("start begins a training and position continues one: give only one of them")
    init_key, order_key, draw_key = random.split(key, 3)
    if position is None:
        params, state = model.init(init_key) if start is None else start
        model.check(params, state)
        begin = TrainState.start(
            params, state, optimizer, trainable=trainable, policy=policy, average=average is not None
        )
        position = Position.start(begin)
    step = make_step(model, optimizer, trainable=trainable, policy=policy, average=average, donate=True, **settings)
    step = captured(step) if capture else step
    kept, epoch, done, sums, seconds, history, rate = position
    device = tree.device(kept.params)
    draw_key = draw_key.to(device)
    best: TrainState | None = None
    # The steps overwrite their input, so what is to be kept must be copied.
    train_state = _copy(kept)

    def check(loss: float, done: int, where: str) -> None:
        if not math.isfinite(loss):
            message = f"the loss is {loss} {where} of epoch {epoch} (step {done}); a lower learning rate may help"
            raise DivergedError(message, epoch, done, kept, history)

    for epoch in range(position.epoch, epochs + 1):
        begun = time.perf_counter() - seconds
        first = int(train_state.step) - done
        rate = optimizer.rate(train_state.opt_state) if rate is None else rate
        last: Metrics | None = None
        for images, labels in _skipped(train(random.fold_in(order_key, epoch)), done):
            batch = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            train_state, metrics = step(train_state, batch, draw_key)
            done += 1
            count = distributed.total({"": torch.full((), len(labels), dtype=torch.float64, device=device)})[""]
            sums = sums + torch.stack([metrics.loss * count, metrics.correct, count])
            if last is not None:  # the previous batch: an accelerator is still busy with this one
                check(float(last.loss), first + done - 2, f"in batch {done - 1}")
            last = metrics
            if on_step is not None:
                now = Position(train_state, epoch, done, sums, time.perf_counter() - begun, history, rate)
                if on_step(now, metrics):
                    return Fitted(_copy(train_state), best, history, True)
        if not done:
            raise ValueError(f"there is no batch to train on in epoch {epoch}")
        check(float(sums[0]), first + done - 1, f"in batch {done}")
        found = evaluate(model, *train_state.averaged, test, policy=policy)
        check(found.loss, first + done, "in the evaluation at the end")
        loss, correct, images_seen = sums.tolist()
        row = Epoch(
            epoch,
            loss / images_seen,
            correct / images_seen,
            found.loss,
            found.accuracy,
            rate,
            time.perf_counter() - begun,
        )
        history = (*history, row)
        kept = _copy(train_state)
        if row is max(history, key=_merit):
            best = kept
        if on_epoch is not None:
            on_epoch(row, kept)
        done, seconds, sums, rate = 0, 0.0, torch.zeros_like(sums), None
    return Fitted(kept, best, history, False)


def _skipped(batches: Iterable[Batch], count: int) -> Iterable[Batch]:
    """The batches without the first ``count``."""
    if not count:
        return batches
    skip: Callable[[int], Iterable[Batch]] | None = getattr(batches, "skip", None)
    return itertools.islice(batches, count, None) if skip is None else skip(count)


def _merit(row: Epoch) -> tuple[float, float]:
    return row.test_accuracy, -row.test_loss


def _copy(train_state: TrainState) -> TrainState:
    params, state, opt_state, step, extra = train_state
    params, state, opt_state, extra = (tree.map(torch.clone, part) for part in (params, state, opt_state, extra))
    return TrainState(params, state, opt_state, step.clone(), extra)
