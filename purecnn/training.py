"""Evaluation, and the loop around the training step.

    fitted = fit(model, optimizer, train, test, epochs=10, key=key)
    params, state = fitted.train_state.averaged

Nothing here writes files or looks at the world; that is the command line's. The step itself is `purecnn.step`'s.
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
    """How a network does on a set of images."""

    loss: float
    """Mean cross-entropy, or the mean of the network's own loss."""
    accuracy: float
    """Share of the images whose largest logit is at their label."""
    confusion: Tensor
    """Numbers of images by true (row) and predicted class (column): (classes, classes), int64, on the CPU."""

    @property
    def class_accuracy(self) -> Tensor:
        """Share of each class's images that are recognised: (classes,); nan for a class without images."""
        return self.confusion.diagonal() / self.confusion.sum(1)


def evaluate(
    model: Model, params: Tree, state: Tree, batches: Iterable[Batch], *, policy: Policy | None = None
) -> Evaluation:
    """Run the network in evaluation mode over batches, which are brought to the parameters' device.

    In a process group each process gives its part of the images, and all get the result of all.

    Args:
        model: the network.
        params, state: its parameters and statistics.
        batches: images, and the index of the class of each.
        policy: types of numbers.

    Raises:
        ValueError: if there is no batch, or a label is no class.
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
                raise ValueError(f"to evaluate takes the index of each class, found labels of {labels.dtype}")
            logits, _ = network(params, state, images)
            losses.append(loss(logits, labels).double() * len(labels))
            count += len(labels)
            places.append(torch.stack([labels, logits.argmax(1)]).flatten(1))
            classes = logits.shape[1]
    # In a process group there may be no picture for one of the processes, which then knows no number of classes.
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
    """One row of the history of a training."""

    epoch: int
    """From 1."""
    train_loss: float
    """Mean of what was minimised, over the epoch's images as the steps saw them."""
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    learning_rate: float
    """Of the epoch's first step."""
    seconds: float
    """Training and evaluation."""


class Position(NamedTuple):
    """Where a training stands: with the same arguments, `fit` goes on from here as if it had never stopped."""

    train_state: TrainState
    epoch: int
    """Of the next step, from 1."""
    batch: int
    """Steps made in this epoch."""
    sums: Tensor
    """Of this epoch's images: losses, and how many were right and how many there were: (3,), float64."""
    seconds: float
    """Spent in this epoch."""
    history: tuple[Epoch, ...]
    """The epochs before."""
    learning_rate: float | None = None
    """Of this epoch's first step; None before it."""

    @classmethod
    def start(cls, train_state: TrainState) -> "Position":
        """Before the first epoch."""
        return cls(train_state, 1, 0, torch.zeros(3, dtype=torch.float64, device=train_state.step.device), 0.0, ())


class Fitted(NamedTuple):
    """The result of `fit`."""

    train_state: TrainState
    """After the last step."""
    best: TrainState | None
    """After the epoch with the highest test accuracy; of equals, the one with the lowest test loss. None if it lies
    before the position that the training went on from."""
    history: tuple[Epoch, ...]
    stopped: bool
    """Whether ``on_step`` ended it early."""

    @property
    def best_epoch(self) -> Epoch:
        """The row of `best`."""
        return max(self.history, key=_merit)


class DivergedError(ArithmeticError):
    """The loss is infinite or not a number."""

    def __init__(
        self, message: str, epoch: int, step: int, train_state: TrainState, history: tuple[Epoch, ...]
    ) -> None:
        super().__init__(message)
        self.epoch = epoch
        """In which epoch, from 1."""
        self.step = step
        """How many steps had been made before the one that failed."""
        self.train_state = train_state
        """The last good one: after the epoch before, or from the start."""
        self.history = history
        """The epochs before."""


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

    A function of its arguments: everything random comes from ``key``. It writes no files; what should happen on the
    way is up to the callbacks.

    A fine-tune starts from given parameters with a fresh head, and may leave the trunk as it is::

        model, params, state = purecnn.replace_head(model, params, state, num_classes, head_key)
        fit(model, ..., start=(params, state), trainable=lambda path: path.startswith("head."), statistics="running")

    In a process group (`purecnn.distributed`) ``train`` and ``test`` give each process its part of every batch.

    Args:
        model: the network.
        optimizer: the update rule.
        train: from a key, another one in each epoch, to the batches of that epoch. If they have a method ``skip(n)``,
            it is used to go on in the midst of an epoch.
        test: the batches to evaluate on; gone through after each epoch.
        epochs: how often to go through the training images.
        key: of initial values, order and draws; without ``start``, parameters are on its device.
        start: parameters and running statistics to start from; they are not overwritten. By default
            ``model.init``'s.
        position: where to go on, in place of ``start``. Its tensors are not overwritten.
        trainable, policy, average: see `make_step`. With an average, that is what is evaluated.
        capture: on a GPU, record the step as a CUDA graph (`purecnn.capture`).
        on_step: called after each step; to look at values on an accelerator is to wait for them. The position's
            tensors are overwritten by the next step. If it returns True, the training stops there.
        on_epoch: called as ``on_epoch(row, train_state)`` after each epoch. The train state may be kept.
        settings: others of `make_step`: ``statistics``, ``loss``, ``label_smoothing``, ``aux_weight``,
            ``accumulate``, ``remat``, ``augment``, ``compile``. A ``loss`` is the steps' alone: evaluations are by the
            model's, ``dataclasses.replace(model, loss=...)``, else by cross-entropy.

    Raises:
        DivergedError: if a loss is infinite or not a number.
        ValueError: if ``start`` is another network's or ``position`` is given too, there are no batches, or ``epochs``
            is less than 1.
    """
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, found {epochs}")
    if start is not None and position is not None:
        raise ValueError("start begins a training and position goes on with one: give one of both")
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
    # The steps overwrite their input, so what is to be kept is a copy.
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
            if last is not None:  # the batch before: an accelerator is still busy with this one
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
    """The batches without the first ones."""
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
