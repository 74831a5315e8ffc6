"""The training step as a pure function.

optimizer = sgd(0.1, momentum=0.9)
step = make_step(model, optimizer)
train_state = TrainState.start(*model.init(key), optimizer)
train_state, metrics = step(train_state, (images, labels), key)
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from purecnn import distributed, random, tree
from purecnn.augment import Augment
from purecnn.eager import is_transformed
from purecnn.layer import Outputs, logits_of
from purecnn.model import Model
from purecnn.optimizers import Optimizer
from purecnn.paper import Loss
from purecnn.precision import Policy
from purecnn.tree import Tree

__all__ = ["Batch", "Metrics", "Step", "TrainState", "Trainable", "loss_function", "make_step", "partition"]

Batch = tuple[Tensor, Tensor]
"""Images (batch, channels, height, width), and their labels: class indices (batch,), int64, or class probabilities
(batch, classes)."""
Trainable = Callable[[str], bool]
"""Whether the parameter at a path is trained, for example ``lambda path: path.startswith("head.")``."""

NO_LAYOUT: dict[str, Any] = {"layout_optimization": False}
"""Options of ``torch.compile`` on a CPU: layout optimisation would convert all convolution weights to channels last in
every step, which costs more than it gains there (``docs/performance.md``)."""

# Aliases, because the compiler cannot subscript types in nested functions.
_Leaves: TypeAlias = dict[str, Tensor]
_Objective: TypeAlias = tuple[Tensor, tuple[Tree, Tensor, Tensor]]
_After: TypeAlias = tuple[Any, Tree]


class TrainState(NamedTuple):
    """Everything that a training step changes."""

    params: Tree
    state: Tree
    opt_state: Tree
    step: Tensor
    """The number of steps made: a scalar, int64."""
    extra: Tree = {}  # noqa: RUF012, never written to
    """What some steps keep in addition: ``"average"``, a moving average of parameters and statistics, and
    ``"loss_scale"``."""

    @classmethod
    def start(
        cls,
        params: Tree,
        state: Tree,
        optimizer: Optimizer,
        *,
        trainable: Trainable | None = None,
        policy: Policy | None = None,
        average: bool = False,
    ) -> "TrainState":
        """The train state before the first step.

        Args:
            params, state: the network's.
            optimizer: the update rule.
            trainable: as in `make_step`.
            policy: as in `make_step`.
            average: start a moving average, for a step with ``average``; float16 and bfloat16 are averaged in float32.

        Raises:
            ValueError: if ``trainable`` chooses no parameter.
        """
        if policy is not None:
            params = policy.keep(params)
        trained, _ = partition(params, trainable)
        step = torch.zeros((), dtype=torch.int64, device=tree.device(params))
        extra: Tree = {}
        if average:
            extra["average"] = tree.map(_long, {"params": params, "state": state})
        if policy is not None and policy.scaled:
            # The initial scale of torch.amp.GradScaler.
            extra["loss_scale"] = {"scale": torch.full_like(step, 2**16, dtype=torch.float32), "good": step.clone()}
        return cls(params, state, optimizer.init(tree.unflatten(trained)), step, extra)

    @property
    def averaged(self) -> tuple[Tree, Tree]:
        """The parameters and statistics to evaluate: those of the moving average if there is one."""
        if "average" not in self.extra:
            return self.params, self.state
        average = self.extra["average"]
        return average["params"], average.get("state", {})


class Metrics(NamedTuple):
    """What a step measured on its batch, as tensors, so that nothing waits for an accelerator until a value is read."""

    loss: Tensor
    """The minimised loss: the mean over the batch, with label smoothing and auxiliary heads."""
    correct: Tensor
    """The number of images whose largest logit is that of their label."""


class Step(Protocol):
    """The type of what `make_step` returns."""

    def __call__(
        self, train_state: TrainState, batch: Batch, key: Tensor | None = None
    ) -> tuple[TrainState, Metrics]: ...


def loss_function(
    outputs: Tensor | Outputs, labels: Tensor, *, label_smoothing: float = 0.0, aux_weight: float = 0.3
) -> Tensor:
    """The mean cross-entropy over the batch, plus ``aux_weight`` times that of each auxiliary head.

    ``-sum_c q_c log softmax(logits)_c`` with ``q = (1 - label_smoothing) onehot(label) + label_smoothing / classes``.

    Args:
        outputs: logits (batch, classes), or `Outputs`.
        labels: (batch,), int64, or class probabilities (batch, classes) in place of ``onehot(label)``.
        label_smoothing: Szegedy et al., arXiv:1512.00567, section 7.
        aux_weight: weight of each auxiliary head; GoogLeNet's is 0.3 (arXiv:1409.4842, section 5).
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
    loss: Loss | None = None,
    label_smoothing: float = 0.0,
    aux_weight: float = 0.3,
    trainable: Trainable | None = None,
    statistics: Literal["batch", "running", "global"] = "batch",
    policy: Policy | None = None,
    accumulate: int = 1,
    average: float | None = None,
    remat: bool = False,
    augment: Augment | None = None,
    compile: bool | None = None,
    donate: bool = False,
) -> Step:
    """Make the training step ``(train_state, batch, key) -> (train_state, metrics)``, a pure function.

    It can be mapped over an ensemble with ``vmap`` and compiled with ``torch.compile(step, fullgraph=True)``. In a
    process group (`purecnn.distributed`) each process passes its part of the batch, and all get the same train state.

    Args:
        model: the network.
        optimizer: the update rule.
        loss: of outputs and labels; by default the network's own if it has one, else `loss_function`.
        label_smoothing: see `loss_function`.
        aux_weight: see `loss_function`; a network's own loss has its own weights.
        trainable: which parameters to train; by default all. The others do not change, and no gradient is
            computed for them.
        statistics: what batch normalisation uses: the statistics of the batch (``"batch"``), the running ones, which
            then do not change (``"running"``), or those of all processes' batches together (``"global"``).
        policy: number types. With float16 the loss is scaled, and a step whose gradients are not finite changes only
            the loss scale, but is counted.
        accumulate: split the batch into this many parts and process them one after the other, for less memory; fewer
            parts if there are fewer images. The gradient is that of the whole batch, but batch normalisation sees one
            part at a time.
        average: keep a moving average of parameters and statistics, ``a += (1 - d) * (p - a)`` with
            ``d = min(average, (1 + step) / (10 + step))``, as TensorFlow's ``ExponentialMovingAverage`` does.
        remat: see `Model.apply`. The compiler decides by itself what to keep, so with ``remat``, ``compile`` is off by
            default.
        augment: maps the stored images to the network's input, as part of the step (`purecnn.augment`).
        compile: compile the gradient with ``torch.compile``; by default if the parameters are on a GPU.
        donate: overwrite the buffers of the train state's parameters and optimizer state instead of copying
            them: faster, but that train state must not be used again. On a CPU, the gradients' memory is also kept
            until the next step.

    Returns:
        The step. Its key may be the same for the whole training: the step number is folded into it. A network
        that draws no random numbers needs no key, unless there is ``augment``. The step is differentiable: if the
        parameters require gradients, so does the new train state, and its graph goes back through all steps.

    Raises:
        ValueError: if a setting is out of range, or settings contradict each other.
    """
    if accumulate < 1:
        raise ValueError(f"accumulate must be at least 1, found {accumulate}")
    if statistics not in ("batch", "running", "global"):
        raise ValueError(f"statistics is 'batch', 'running' or 'global', found {statistics!r}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing is at least 0 and below 1, found {label_smoothing}")
    if average is not None and not 0 < average < 1:
        raise ValueError(f"average is between 0 and 1, found {average}")
    minimised = loss or model.loss
    if minimised is None:
        minimised = functools.partial(loss_function, label_smoothing=label_smoothing, aux_weight=aux_weight)
    elif label_smoothing:
        raise ValueError(f"label_smoothing is for cross-entropy, and {model.name} is trained with another loss")
    network = model.apply if policy is None else functools.partial(policy.apply, model)
    scaled = policy is not None and policy.scaled

    gradient = _gradient(network, minimised, augment, statistics, remat)

    @functools.cache  # on first use: importing the compiler takes seconds
    def compiled(on_cpu: bool) -> Callable[..., tuple[_Leaves, Tree, Metrics]]:
        return torch.compile(gradient, fullgraph=True, options=NO_LAYOUT if on_cpu else None)

    # The last gradients are kept until the next step begins. If they were freed after the update, the C library would
    # return their memory to the system, and the next step would spend up to a tenth of its time getting it back.
    spare: list[Tensor] = []

    def step(train_state: TrainState, batch: Batch, key: Tensor | None = None) -> tuple[TrainState, Metrics]:
        params, state, opt_state, count, extra = train_state
        if count.ndim:
            raise ValueError(f"a train state of {len(count)} members is for purecnn.ensembles.make_ensemble_step")
        trained, frozen = partition(params, trainable)
        # Only the outermost function is compiled: inside another compilation it is superfluous, inside vmap impossible.
        wanted = count.is_cuda and not remat if compile is None else compile
        run = compiled(count.is_cpu) if wanted and not is_transformed() else gradient
        spare.clear()
        if scaled and "loss_scale" not in extra:
            raise ValueError("the loss has no scale yet: begin with TrainState.start(..., policy=policy)")
        if average is None and "average" in extra:
            raise ValueError("the train state keeps an average, which this step would not update: give average=")
        scale = extra["loss_scale"]["scale"] if scaled else None
        many = distributed.world_size() > 1
        part = distributed.share(len(batch[1]), count.device) if many else None
        if part is not None:
            scale = part if scale is None else part * scale
        if accumulate == 1:
            grads, after, metrics = run(trained, frozen, state, batch, key, (count,), scale)
        else:
            parts = min(accumulate, max(len(batch[1]), 1))
            if statistics == "global":  # every part takes all processes, so their numbers must agree
                parts = distributed.least(parts)
            grads, after, metrics = _accumulated(run, trained, frozen, state, batch, key, count, scale, parts)
        if part is not None:
            # Global statistics are the same in all processes already, and running ones do not change.
            differs = after if statistics == "batch" else {}
            grads, differs, metrics = _joined(grads, differs, metrics, part)
            after = differs or after

        # The tree's order, in which the updated parameters are reassembled.
        order = tree.flatten(params) if frozen else trained
        finite = None
        if not scaled:
            updated, opt_state = optimizer.update(grads, opt_state, trained, donate=donate)
        else:
            finite, updated, opt_state, after, scaling = _unless_infinite(
                optimizer, grads, opt_state, trained, (state, after), extra["loss_scale"]
            )
            extra = {**extra, "loss_scale": scaling}
        if donate and count.is_cpu and not is_transformed():
            spare[:] = grads.values()
        params = tree.unflatten({**order, **tree.flatten(updated)})
        if average is not None:
            extra = {**extra, "average": _averaged(extra, params, after, average, count, finite)}
        return TrainState(params, after, opt_state, count + 1, extra), metrics

    return step


def _gradient(
    network: Callable[..., _After],
    loss: Loss,
    augment: Augment | None,
    statistics: Literal["batch", "running", "global"],
    remat: bool,
) -> Callable[..., tuple[_Leaves, Tree, Metrics]]:
    """The function that gives a batch's gradient by the trained parameters, its new statistics and its metrics."""

    def gradient(
        trained: _Leaves,
        frozen: _Leaves,
        state: Tree,
        batch: Batch,
        key: Tensor | None,
        counts: tuple[Tensor, ...],
        scale: Tensor | None,
    ) -> tuple[_Leaves, Tree, Metrics]:
        images, labels = batch
        if key is not None:
            for count in counts:
                key = random.fold_in(key, count)
        if augment is not None:
            if key is None:
                raise ValueError("augmentation draws random numbers: pass key=purecnn.random.key(seed)")
            images = augment(images, random.fold_in(key, 0))

        def objective(trained: _Leaves) -> _Objective:
            params = tree.unflatten({**frozen, **trained})
            outputs, after = network(params, state, images, train=True, key=key, statistics=statistics, remat=remat)
            logits = logits_of(outputs)
            value = loss(outputs, labels)
            truth = labels.argmax(1) if labels.ndim > 1 and labels.is_floating_point() else labels
            scaled = value if scale is None else value * scale.to(value.dtype)
            return scaled, (after, (logits.argmax(1) == truth).sum(), value)

        inputs = images, labels, *trained.values(), *frozen.values(), *tree.flatten(state).values()
        if is_transformed(*inputs) or torch.is_inference_mode_enabled():
            grads, (_, (after, correct, value)) = torch.func.grad_and_value(objective, has_aux=True)(trained)
            return grads, after, Metrics(value, correct)
        # torch.func keeps what a second derivative would need, which takes up to a tenth of a step's time. If the step
        # is neither differentiated nor mapped, torch.autograd does the same without this overhead.
        with torch.enable_grad():
            leaves = {path: leaf.detach().requires_grad_() for path, leaf in trained.items()}
            total, (after, correct, value) = objective(leaves)
            found = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
        return dict(zip(leaves, found, strict=True)), tree.map(torch.detach, after), Metrics(value.detach(), correct)

    return gradient


def _accumulated(
    run: Callable[..., tuple[_Leaves, Tree, Metrics]],
    trained: _Leaves,
    frozen: _Leaves,
    state: Tree,
    batch: Batch,
    key: Tensor | None,
    count: Tensor,
    scale: Tensor | None,
    parts: int,
) -> tuple[_Leaves, Tree, Metrics]:
    """The gradient of a batch, accumulated over its parts."""
    images = len(batch[1])
    chunks = list(zip(*(each.tensor_split(parts) for each in batch), strict=True))
    total: _Leaves = {}
    loss = correct = torch.zeros((), device=count.device)
    for i, chunk in enumerate(chunks):
        share = len(chunk[1]) / max(images, 1)
        counts = (count, torch.full_like(count, i))
        # The loss is weighted, not the gradient, because through global statistics this gradient also contains other
        # processes' losses.
        weight = torch.full((), share, dtype=torch.float64, device=count.device)
        grads, state, metrics = run(
            trained, frozen, state, chunk, key, counts, weight if scale is None else weight * scale
        )
        total = {path: total[path] + grad for path, grad in grads.items()} if total else grads
        loss, correct = loss + metrics.loss * share, correct + metrics.correct
    return total, state, Metrics(loss, correct.to(torch.int64))


def _joined(grads: _Leaves, state: Tree, metrics: Metrics, part: Tensor) -> tuple[_Leaves, Tree, Metrics]:
    """Gradients, statistics and metrics, joined from all processes; gradients are already scaled by ``part``."""
    flat = tree.flatten(state)
    shares = {path: leaf * part.to(leaf.dtype) for path, leaf in flat.items() if leaf.is_floating_point()}
    mine = {
        **{f"grads.{path}": grad for path, grad in grads.items()},
        **{f"state.{path}": leaf for path, leaf in shares.items()},
        "loss": metrics.loss * part.to(metrics.loss.dtype),
        "correct": metrics.correct.to(metrics.loss.dtype),
    }
    sums = distributed.total(mine)
    state = tree.unflatten({path: sums.get(f"state.{path}", leaf) for path, leaf in flat.items()})
    grads = {path: sums[f"grads.{path}"] for path in grads}
    return grads, state, Metrics(sums["loss"], sums["correct"].to(torch.int64))


def _unless_infinite(
    optimizer: Optimizer,
    grads: _Leaves,
    opt_state: Tree,
    trained: _Leaves,
    states: tuple[Tree, Tree],
    scaling: Tree,
) -> tuple[Tensor, Tree, Tree, Tree, Tree]:
    """Whether all gradients of a scaled loss are finite, and the update. If not, only the scale changes: it is halved.

    The scale is doubled after 2,000 good steps, as in torch.amp.GradScaler.
    """
    scale, good = scaling["scale"], scaling["good"]
    grads = {path: grad / scale for path, grad in grads.items()}
    finite = torch.stack([grad.isfinite().all() for grad in grads.values()]).all()
    updated, new_state = optimizer.update(grads, opt_state, trained)

    def keep(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(finite, new, old)

    good = torch.where(finite, good + 1, 0)
    grown = good == 2000
    larger = torch.where((2 * scale).isfinite(), 2 * scale, scale)
    scale = torch.where(finite, torch.where(grown, larger, scale), scale / 2)
    updated = {path: keep(leaf, trained[path]) for path, leaf in tree.flatten(updated).items()}
    opt_state = tree.map(keep, new_state, opt_state)
    scaling = {"scale": scale, "good": torch.where(grown, 0, good)}
    return finite, updated, opt_state, tree.map(keep, *reversed(states)), scaling


def _long(leaf: Tensor) -> Tensor:
    """A copy, with float16 and bfloat16 as float32: in 16 bits an average's small steps would be lost."""
    return leaf.to(torch.float32 if leaf.dtype in (torch.float16, torch.bfloat16) else leaf.dtype, copy=True)


def _averaged(extra: Tree, params: Tree, state: Tree, decay: float, count: Tensor, finite: Tensor | None) -> Tree:
    if "average" not in extra:
        raise ValueError("there is no average yet: begin with TrainState.start(..., average=True)")
    weight = 1 - ((1 + count) / (10 + count)).clamp(max=decay)
    if finite is not None:  # a step that changes nothing does not move the average
        weight = weight * finite

    def nearer(mean: Tensor, leaf: Tensor) -> Tensor:
        return mean.lerp(leaf.to(mean.dtype), weight.to(mean.dtype)) if mean.is_floating_point() else leaf

    return tree.map(nearer, extra["average"], {"params": params, "state": state})


def partition(params: Tree, trainable: Trainable | None) -> tuple[_Leaves, _Leaves]:
    """Split parameters into the leaves to train and the others, both by path.

    Raises:
        ValueError: if ``trainable`` chooses no leaf.
    """
    leaves = tree.flatten(params)
    if trainable is None:
        return leaves, {}
    trained = {path: leaf for path, leaf in leaves.items() if trainable(path)}
    if not trained:
        raise ValueError(f"no parameter is chosen; paths are {', '.join(list(leaves)[-3:])} and the like")
    return trained, {path: leaf for path, leaf in leaves.items() if path not in trained}
