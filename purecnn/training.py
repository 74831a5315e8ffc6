"""The training step as a pure function, and the loop around it.

    optimizer = sgd(0.1, momentum=0.9)
    step = make_step(model, optimizer)
    train_state = TrainState.start(*model.init(key), optimizer)
    train_state, metrics = step(train_state, (images, labels), key)

Nothing here writes files or looks at the world; that is the command line's.
"""

import functools
import math
import time
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from purecnn import random, tree
from purecnn.eager import is_transformed
from purecnn.layer import Outputs
from purecnn.model import Model
from purecnn.optimizers import Optimizer
from purecnn.tree import Tree

__all__ = [
    "Batch",
    "DivergedError",
    "Epoch",
    "Evaluation",
    "Fitted",
    "Metrics",
    "Step",
    "TrainState",
    "evaluate",
    "fit",
    "loss_function",
    "make_step",
]

Batch = tuple[Tensor, Tensor]
"""Images (batch, channels, height, width) and the index of the class of each (batch,), int64."""
Trainable = Callable[[str], bool]
"""Whether a parameter is trained, by its path, such as ``lambda path: path.startswith("head.")``."""

# By names, because the compiler cannot subscript types in functions inside of functions.
_Leaves: TypeAlias = dict[str, Tensor]
_Objective: TypeAlias = tuple[Tensor, tuple[Tree, Tensor]]


class TrainState(NamedTuple):
    """All that a training step changes."""

    params: Tree
    state: Tree
    opt_state: Tree
    step: Tensor
    """How many steps were made: a scalar, int64."""

    @classmethod
    def start(
        cls, params: Tree, state: Tree, optimizer: Optimizer, *, trainable: Trainable | None = None
    ) -> "TrainState":
        """Before the first step; ``trainable`` as in `make_step`."""
        trained, _ = _partition(params, trainable)
        step = torch.zeros((), dtype=torch.int64, device=_device(params))
        return cls(params, state, optimizer.init(tree.unflatten(trained)), step)


class Metrics(NamedTuple):
    """What a step says of its batch. Tensors, so that nothing waits for an accelerator unless someone looks."""

    loss: Tensor
    """What was minimised: the mean over the batch, with smoothing and auxiliary heads."""
    correct: Tensor
    """How many images have the largest logit at their label."""


class Step(Protocol):
    """The type of what `make_step` returns."""

    def __call__(
        self, train_state: TrainState, batch: Batch, key: Tensor | None = None
    ) -> tuple[TrainState, Metrics]: ...


def loss_function(
    outputs: Tensor | Outputs, labels: Tensor, *, label_smoothing: float = 0.0, aux_weight: float = 0.3
) -> Tensor:
    """Cross-entropy, the mean over the batch; auxiliary heads' are added with a weight.

    ``-sum_c q_c log softmax(logits)_c`` with ``q = (1 - label_smoothing) onehot(label) + label_smoothing / classes``.

    Args:
        outputs: logits (batch, classes), or `Outputs`.
        labels: (batch,), int64.
        label_smoothing: Szegedy et al., arXiv:1512.00567, section 7.
        aux_weight: of each auxiliary head; 0.3 is GoogLeNet's (arXiv:1409.4842, section 5).
    """
    if not isinstance(outputs, Outputs):
        return F.cross_entropy(outputs, labels, label_smoothing=label_smoothing)
    loss = F.cross_entropy(outputs.logits, labels, label_smoothing=label_smoothing)
    for logits in outputs.aux:
        loss = loss + aux_weight * F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    return loss


def make_step(
    model: Model,
    optimizer: Optimizer,
    *,
    label_smoothing: float = 0.0,
    aux_weight: float = 0.3,
    trainable: Trainable | None = None,
    statistics: Literal["batch", "running"] = "batch",
    compile: bool | None = None,
    donate: bool = False,
) -> Step:
    """The training step ``(train_state, batch, key) -> (train_state, metrics)``, a pure function.

    It can be mapped over an ensemble with ``vmap`` and compiled with ``torch.compile(step, fullgraph=True)``.

    Args:
        model: the network.
        optimizer: the update rule.
        label_smoothing: see `loss_function`.
        aux_weight: see `loss_function`.
        trainable: which parameters to train; by default all. The others stay as they are, and no gradient is
            computed for them.
        statistics: what batch normalisation uses: the batch's, or ``"running"`` ones, which then stay frozen.
        compile: compile the gradient with ``torch.compile``; by default if the parameters are on a GPU.
        donate: overwrite the buffers of the train state's parameters and optimizer state, instead of copying
            them: faster, but that train state must not be used again. On a CPU, the memory of the gradients is kept
            from one step to the next, too.

    Returns:
        The step. Its key may be that of the whole training: the step's number is folded into it. A network
        that draws no random numbers needs none.
    """

    def gradient(
        trained: _Leaves,
        frozen: _Leaves,
        state: Tree,
        batch: Batch,
        key: Tensor | None,
        step: Tensor,
    ) -> tuple[_Leaves, Tree, Metrics]:
        images, labels = batch
        step_key = None if key is None else random.fold_in(key, step)

        def objective(trained: _Leaves) -> _Objective:
            params = tree.unflatten({**frozen, **trained})
            outputs, after = model.apply(params, state, images, train=True, key=step_key, statistics=statistics)
            logits = outputs.logits if isinstance(outputs, Outputs) else outputs
            loss = loss_function(outputs, labels, label_smoothing=label_smoothing, aux_weight=aux_weight)
            return loss, (after, (logits.argmax(1) == labels).sum())

        if is_transformed(images, *trained.values(), *frozen.values()):
            grads, (loss, (after, correct)) = torch.func.grad_and_value(objective, has_aux=True)(trained)
            return grads, after, Metrics(loss, correct)
        # torch.func keeps what a second derivative would need, which takes up to a tenth of a step's time. Where
        # nobody differentiates or maps the step, torch.autograd does the same without.
        with torch.enable_grad():
            leaves = {path: leaf.detach().requires_grad_() for path, leaf in trained.items()}
            loss, (after, correct) = objective(leaves)
            found = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        return dict(zip(leaves, found, strict=True)), tree.map(torch.detach, after), Metrics(loss.detach(), correct)

    @functools.cache  # at the first use: to import the compiler takes seconds
    def compiled() -> Callable[..., tuple[_Leaves, Tree, Metrics]]:
        return torch.compile(gradient, fullgraph=True)

    # The last gradients stay until the next step begins. If they were freed after the update, the C library would give
    # their memory back to the system, and the next step would lose up to a tenth of its time to get it again.
    spare: list[Tensor] = []

    def step(train_state: TrainState, batch: Batch, key: Tensor | None = None) -> tuple[TrainState, Metrics]:
        params, state, opt_state, count = train_state
        trained, frozen = _partition(params, trainable)
        # Compilation is for the outermost function: inside another's it is superfluous, inside vmap impossible.
        wanted = count.is_cuda if compile is None else compile
        run = compiled() if wanted and not is_transformed() else gradient
        spare.clear()
        grads, state, metrics = run(trained, frozen, state, batch, key, count)
        updated, opt_state = optimizer.update(grads, opt_state, trained, donate=donate)
        if donate and count.is_cpu and not is_transformed():
            spare[:] = grads.values()
        # In the order of the tree that came in.
        leaves = {**tree.flatten(params), **tree.flatten(updated)}
        return TrainState(tree.unflatten(leaves), state, opt_state, count + 1), metrics

    return step


def _partition(params: Tree, trainable: Trainable | None) -> tuple[_Leaves, _Leaves]:
    """The leaves to train and the others, by path."""
    leaves = tree.flatten(params)
    if trainable is None:
        return leaves, {}
    trained = {path: leaf for path, leaf in leaves.items() if trainable(path)}
    if not trained:
        raise ValueError(f"trainable chooses no parameter; paths are {', '.join(list(leaves)[-3:])} and the like")
    return trained, {path: leaf for path, leaf in leaves.items() if path not in trained}


# The loop ----------------------------------------------------------------------------------------------------


class Evaluation(NamedTuple):
    """How a network does on a set of images."""

    loss: float
    """Mean cross-entropy."""
    accuracy: float
    """Share of the images whose largest logit is at their label."""
    confusion: Tensor
    """Numbers of images by true (row) and predicted class (column): (classes, classes), int64, on the CPU."""

    @property
    def class_accuracy(self) -> Tensor:
        """Share of each class's images that are recognised: (classes,); nan for a class without images."""
        return self.confusion.diagonal() / self.confusion.sum(1)


def evaluate(model: Model, params: Tree, state: Tree, batches: Iterable[Batch]) -> Evaluation:
    """Run the network in evaluation mode over batches, which are brought to the parameters' device.

    Raises:
        ValueError: if there is no batch.
    """
    device = _device(params)
    losses, pairs = [], []
    classes = 0
    with torch.no_grad():
        for images, labels in batches:
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            logits, _ = model.apply(params, state, images)
            classes = logits.shape[1]
            losses.append(F.cross_entropy(logits, labels, reduction="none"))
            pairs.append(labels * classes + logits.argmax(1))
    if not losses:
        raise ValueError("there is no batch to evaluate")
    confusion = torch.cat(pairs).cpu().bincount(minlength=classes**2).reshape(classes, classes)
    count = int(confusion.sum())
    return Evaluation(
        float(torch.cat(losses).cpu().double().mean()), int(confusion.diagonal().sum()) / count, confusion
    )


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


class Fitted(NamedTuple):
    """The result of `fit`."""

    train_state: TrainState
    """After the last epoch."""
    best: TrainState
    """After the epoch with the highest test accuracy; of equals, the one with the lowest test loss."""
    history: tuple[Epoch, ...]

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
    label_smoothing: float = 0.0,
    aux_weight: float = 0.3,
    trainable: Trainable | None = None,
    statistics: Literal["batch", "running"] = "batch",
    compile: bool | None = None,
    on_batch: Callable[[int, int, Metrics], None] | None = None,
    on_epoch: Callable[[Epoch, TrainState], None] | None = None,
) -> Fitted:
    """Train for some epochs, with an evaluation after each.

    A function of its arguments: everything random comes from ``key``. It writes no files; what should happen on the
    way is up to the callbacks.

    A fine-tune starts from given parameters with a fresh head, and may leave the trunk as it is::

        model, params, state = purecnn.replace_head(model, params, state, num_classes, head_key)
        fit(model, ..., start=(params, state), trainable=lambda path: path.startswith("head."), statistics="running")

    Args:
        model: the network.
        optimizer: the update rule.
        train: from a key, another one in each epoch, to the batches of that epoch.
        test: the batches to evaluate on; gone through after each epoch.
        epochs: how often to go through the training images.
        key: of initial values, order and draws; without ``start``, parameters are on its device.
        start: parameters and running statistics to start from; they are not overwritten. By default
            ``model.init``'s.
        label_smoothing, aux_weight, trainable, statistics, compile: see `make_step`.
        on_batch: called as ``on_batch(epoch, batch, metrics)`` after each step, both numbers from 1. To look at the
            values of the metrics is to wait for them.
        on_epoch: called as ``on_epoch(row, train_state)`` after each epoch. The train state may be kept.

    Raises:
        DivergedError: if a loss is infinite or not a number.
        ValueError: if there are no batches, or ``epochs`` is less than 1.
    """
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, found {epochs}")
    init_key, order_key, draw_key = random.split(key, 3)
    params, state = model.init(init_key) if start is None else start
    kept = best = TrainState.start(params, state, optimizer, trainable=trainable)
    step = make_step(
        model,
        optimizer,
        label_smoothing=label_smoothing,
        aux_weight=aux_weight,
        trainable=trainable,
        statistics=statistics,
        compile=compile,
        donate=True,
    )
    device = _device(params)
    draw_key = draw_key.to(device)
    history: list[Epoch] = []
    # The steps overwrite their input, so what is to be kept is a copy.
    train_state = _copy(kept)

    def check(loss: float, epoch: int, done: int, where: str) -> None:
        if not math.isfinite(loss):
            message = f"the loss is {loss} {where} of epoch {epoch} (step {done}); a lower learning rate may help"
            raise DivergedError(message, epoch, done, kept, tuple(history))

    for epoch in range(1, epochs + 1):
        begin = time.perf_counter()
        rate = optimizer.rate(train_state.opt_state)
        first = int(train_state.step)
        steps: list[Metrics] = []
        sizes: list[int] = []
        for images, labels in train(random.fold_in(order_key, epoch)):
            batch = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            train_state, metrics = step(train_state, batch, draw_key)
            steps.append(metrics)
            sizes.append(len(labels))
            if on_batch is not None:
                on_batch(epoch, len(steps), metrics)
            if len(steps) > 1:  # the batch before: an accelerator is still busy with this one
                check(float(steps[-2].loss), epoch, first + len(steps) - 2, f"in batch {len(steps) - 1}")
        if not steps:
            raise ValueError(f"there is no batch to train on in epoch {epoch}")
        check(float(steps[-1].loss), epoch, first + len(steps) - 1, f"in batch {len(steps)}")
        found = evaluate(model, train_state.params, train_state.state, test)
        check(found.loss, epoch, first + len(steps), "in the evaluation at the end")
        row = Epoch(
            epoch,
            sum(float(metrics.loss) * size for metrics, size in zip(steps, sizes, strict=True)) / sum(sizes),
            sum(int(metrics.correct) for metrics in steps) / sum(sizes),
            found.loss,
            found.accuracy,
            rate,
            time.perf_counter() - begin,
        )
        history.append(row)
        kept = _copy(train_state)
        if row is max(history, key=_merit):
            best = kept
        if on_epoch is not None:
            on_epoch(row, kept)
    return Fitted(kept, best, tuple(history))


def _merit(row: Epoch) -> tuple[float, float]:
    return row.test_accuracy, -row.test_loss


def _device(params: Tree) -> torch.device:
    leaf: Tensor = next(iter(tree.flatten(params).values()))
    return leaf.device


def _copy(train_state: TrainState) -> TrainState:
    params, state, opt_state, step = train_state
    params, state, opt_state = (tree.map(torch.clone, part) for part in (params, state, opt_state))
    return TrainState(params, state, opt_state, step.clone())
