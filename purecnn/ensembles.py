"""Ensembles: all members in one tree with a first axis of members, trained in one step, and their joint predictions.

    params, state = vmap(model.init)(random.split(key, 16))
    train_state = start(params, state, optimizer)
    step = make_ensemble_step(model, optimizer, donate=True)
    train_state, metrics = step(train_state, (images, labels), random.split(key, 16))
    probabilities = mean_probability(logits(model, train_state.params, train_state.state, images))

Logits of an ensemble are ``(members, batch, classes)``. The same functions work for other sources of several
predictions for an image: snapshots of one training, and dropout masks.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap
from torch.utils import _pytree as pytree

from purecnn import distributed, tree
from purecnn.augment import Augment
from purecnn.layer import DRAW, logits_of
from purecnn.model import Model
from purecnn.optimizers import Optimizer
from purecnn.paper import Loss
from purecnn.schedules import Schedule, cosine
from purecnn.step import Batch, Metrics, Step, Trainable, TrainState, make_step, partition
from purecnn.tree import Tree

__all__ = [
    "EnsembleStep",
    "Reliability",
    "cosine_restarts",
    "disagreement",
    "expected_entropy",
    "logits",
    "make_ensemble_step",
    "mc_dropout",
    "mean_probability",
    "member_dims",
    "mutual_information",
    "predictive_entropy",
    "reliability",
    "snapshots",
    "stack",
    "start",
    "unstack",
    "vote",
]

Members = TypeVar("Members")
"""A tensor, or a tree or (named) tuple of them, such as `TrainState`."""


def stack(members: Sequence[Members]) -> Members:
    """Stack the members' trees into one: each leaf gets a first axis of members.

    >>> stack([{"weight": torch.zeros(3)}, {"weight": torch.ones(3)}])["weight"].shape
    torch.Size([2, 3])

    Raises:
        ValueError: if there are no members, or their trees differ.
    """
    if not members:
        raise ValueError("an ensemble has at least one member, found none")
    first: Any = members[0]
    parts: Any = members
    if isinstance(first, Tensor):
        joined: Any = torch.stack(list(parts))
    elif isinstance(first, Mapping):
        different = next((part for part in parts if part.keys() != first.keys()), None)
        if different is not None:
            raise ValueError(f"the members' trees differ: {sorted(first)} and {sorted(different)}")
        joined = {name: stack([part[name] for part in parts]) for name in first}
    else:
        joined = _alike(first, map(stack, zip(*parts, strict=True)))
    return joined


def unstack(members: Members, *, mapped: Trainable | None = None) -> list[Members]:
    """The members' trees, as views of the stacked one, without a copy.

    Args:
        members: a tensor, or a tree or (named) tuple of them.
        mapped: for a tree of parameters, which of them, by path, have an axis of members; the others are shared. By
            default all.

    Raises:
        ValueError: if leaves have different numbers of members.

    >>> [tree["weight"].tolist() for tree in unstack({"weight": torch.eye(2)})]
    [[1.0, 0.0], [0.0, 1.0]]
    """
    if mapped is None:
        return [_member(members, i) for i in range(_count(members))]
    own, shared = partition(members, mapped)  # type: ignore[arg-type]
    return [tree.unflatten({**shared, **each}) for each in unstack(own)]  # type: ignore[misc]


def _member(stacked: Any, i: int | slice) -> Any:
    """One member, or several."""
    if isinstance(stacked, Tensor):
        return stacked[i]
    if isinstance(stacked, Mapping):
        return {name: _member(child, i) for name, child in stacked.items()}
    return _alike(stacked, (_member(child, i) for child in stacked))


def _alike(pattern: Any, children: Iterable[Any]) -> Any:
    """A tuple of the same type as the pattern."""
    return type(pattern)(*children) if hasattr(pattern, "_fields") else tuple(children)


def _count(stacked: Any) -> int:
    """The number of members.

    Raises:
        ValueError: if leaves have different numbers.
    """
    counts: dict[int, str] = {}
    for path, leaf in pytree.tree_flatten_with_path(stacked)[0]:
        counts.setdefault(len(leaf) if leaf.ndim else 0, pytree.keystr(path))
    if len(counts) > 1:
        found = ", ".join(f"{count} in {path}" for count, path in list(counts.items())[:3])
        raise ValueError(f"a leaf's first axis is that of the members, but there are {found}; are some leaves shared?")
    return next(iter(counts), 0)


def member_dims(params: Tree, mapped: Trainable | None = None) -> Tree:
    """The ``in_dims`` of ``vmap`` for parameters of which each member has some of its own and shares the others.

    A layer whose parameters and input are shared runs once for all members. So several heads on one trunk cost one
    trunk::

        dims = member_dims(params, lambda path: path.startswith("head."))
        logits, _ = vmap(model.apply, in_dims=(dims, None, None))(params, state, images)

    >>> member_dims({"stem": {"weight": 0}, "head": {"weight": 0}}, lambda path: path.startswith("head."))
    {'stem': {'weight': None}, 'head': {'weight': 0}}
    """
    return tree.unflatten({path: 0 if mapped is None or mapped(path) else None for path in tree.flatten(params)})


# Training ----------------------------------------------------------------------------------------------------


class EnsembleStep(Protocol):
    """The type of what `make_ensemble_step` returns."""

    def __call__(
        self, train_state: TrainState, batch: Batch, key: Tensor | None = None, learning_rates: Tensor | None = None
    ) -> tuple[TrainState, Metrics]: ...


# Takes an optimizer's place: returns the gradients as if they were the new parameters.
_GRADIENTS = Optimizer(lambda params: {}, lambda grads, opt_state, *_, **__: (grads, opt_state), 0.0)


def start(params: Tree, state: Tree, optimizer: Optimizer, *, trainable: Trainable | None = None) -> TrainState:
    """The train state before the first step of `make_ensemble_step`.

    Args:
        params: with a first axis of members on each trained leaf, such as the result of ``vmap(model.init)``.
        state: running statistics, with a first axis of members, or without it for a step with ``statistics="running"``.
        optimizer: the update rule.
        trainable: as in `make_ensemble_step`.
    """
    trained = tree.map(_separate, tree.unflatten(partition(params, trainable)[0]))
    params = tree.unflatten({**tree.flatten(params), **tree.flatten(trained)})
    opt_state = tree.map(_separate, vmap(optimizer.init)(trained))
    return TrainState(params, state, opt_state, torch.zeros_like(opt_state["step"]))


def _separate(leaf: Tensor) -> Tensor:
    """A leaf with memory for each member: values that do not differ between members leave ``vmap`` sharing one copy."""
    return leaf.clone(memory_format=torch.contiguous_format) if leaf.stride(0) == 0 else leaf


def make_ensemble_step(
    model: Model,
    optimizer: Optimizer,
    *,
    own_batch: bool = False,
    loss: Loss | None = None,
    label_smoothing: float = 0.0,
    aux_weight: float = 0.3,
    trainable: Trainable | None = None,
    statistics: Literal["batch", "running"] = "batch",
    augment: Augment | None = None,
    chunk_size: int | None = None,
    donate: bool = False,
) -> EnsembleStep:
    """Make the training step of all members, ``(train_state, batch, keys) -> (train_state, metrics)``, a pure function.

    Gradients come from ``vmap`` over the members. Each member is then updated through views of the stacked tree,
    which is faster than an update under ``vmap`` and, with ``donate``, needs no memory beyond that tree and the
    gradients. Each member does what `purecnn.step.make_step` does with its key, batch and learning rate.

    Args:
        model: the network.
        optimizer: any update rule.
        own_batch: whether images and labels have a first axis of members; else all members see the same batch.
        loss, label_smoothing, aux_weight, augment: as in `make_step`.
        trainable: which parameters to train, by path; the others are shared and have no axis of members. If only the
            head is trained, on a shared batch with frozen statistics, the trunk runs once for all members, unless it
            draws random numbers.
        statistics: what batch normalisation uses. ``"running"`` statistics are shared and do not change.
        chunk_size: number of members to process at a time, as in ``torch.vmap``; by default all. Fewer take less
            memory. With 1, members are processed one after the other, without ``vmap``: the fastest on one CPU thread.
        donate: overwrite the train state's buffers, see `make_step`.

    Returns:
        The step. ``key`` holds the members' keys, (members, 2). ``learning_rates`` (members,) are used instead of the
        optimizer's. The metrics are (members,).

    Raises:
        ValueError: if ``chunk_size`` is less than 1, in a process group, or as from `make_step`; from the step, if an
            argument has another number of members than the train state, or the train state is of one network or has an
            average or a loss scale.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, found {chunk_size}")
    if distributed.world_size() > 1:
        raise ValueError("an ensemble trains in one process; a process group is for one network")
    if statistics not in ("batch", "running"):
        raise ValueError(f"statistics is 'batch' or 'running', found {statistics!r}")
    frozen = statistics == "running"
    gradient = make_step(
        model,
        _GRADIENTS,
        loss=loss,
        label_smoothing=label_smoothing,
        aux_weight=aux_weight,
        trainable=trainable,
        statistics=statistics,
        augment=augment,
        compile=False,
    )

    def step(
        train_state: TrainState, batch: Batch, key: Tensor | None = None, learning_rates: Tensor | None = None
    ) -> tuple[TrainState, Metrics]:
        params, state, opt_state, count, extra = train_state
        if not count.ndim:
            raise ValueError("the train state is of one network: begin with purecnn.ensembles.start")
        if extra:
            raise ValueError(f"an ensemble's step keeps no {', '.join(extra)}: begin with purecnn.ensembles.start")
        for name, each in (("key", key), ("learning_rates", learning_rates)):
            if each is not None and (not each.ndim or len(each) != len(count)):
                raise ValueError(f"{name} has one for each of {len(count)} members, found {tuple(each.shape)}")
        leaves = tree.flatten(params)
        trained, _ = partition(leaves, trainable)

        def member(
            trained: Tree, state: Tree, count: Tensor, batch: Batch, key: Tensor | None
        ) -> tuple[Tree, Tree, Metrics]:
            before = TrainState(tree.unflatten({**leaves, **trained}), state, {}, count)
            (found, after, *_), metrics = gradient(before, batch, key)
            return partition(found, trainable)[0], {} if frozen else after, metrics

        dims = (0, None if frozen else 0, 0, 0 if own_batch else None, None if key is None else 0)
        given = (trained, state, count, batch, key)

        def gradients(part: range) -> tuple[Tree, Tree, Metrics]:
            """Gradients, statistics and metrics of some members."""
            index = part[0] if len(part) == 1 else slice(part.start, part.stop)
            own: list[Any] = [
                each if dim is None else _member(each, index) for each, dim in zip(given, dims, strict=True)
            ]
            found: Any = member(*own) if len(part) == 1 else vmap(member, dims)(*own)
            return pytree.tree_map(lambda leaf: leaf[None], found) if len(part) == 1 else found

        if not donate:
            trained, opt_state = (tree.map(torch.clone, each) for each in (trained, opt_state))
        results: list[tuple[Tree, Metrics]] = []
        members = range(len(count))
        for begin in members[:: chunk_size or len(count)]:
            part = members[begin : begin + (chunk_size or len(count))]
            grads, after, metrics = gradients(part)
            results.append((after, metrics))
            for i in part:
                own_grads, own_state, own = _member(grads, i - begin), _member(opt_state, i), _member(trained, i)
                rate = None if learning_rates is None else learning_rates[i]
                new, new_state = optimizer.update(own_grads, own_state, own, rate, donate=True)
                _overwrite(own, new)
                _overwrite(own_state, new_state)
        after, metrics = results[0] if len(results) == 1 else _joined(results)
        after = state if frozen else after
        return TrainState(tree.unflatten({**leaves, **trained}), after, opt_state, count + 1, extra), metrics

    return step


def _joined(parts: Sequence[Members]) -> Members:
    """The leaves of all members, from parts with some members each."""
    joined: Members = pytree.tree_map(lambda *leaves: torch.cat(leaves), *parts)
    return joined


def _overwrite(old: Tree, new: Tree) -> None:
    """Copy into the tensors of ``old`` what the optimizer did not write there itself."""
    leaves = tree.flatten(new)
    for path, leaf in tree.flatten(old).items():
        if leaves[path] is not leaf:
            leaf.copy_(leaves[path])


def cosine_restarts(initial: float, period: int) -> Schedule:
    """Half a cosine from ``initial`` to 0, restarted every ``period`` steps.

    Loshchilov and Hutter, arXiv:1608.03983, equation 5.

    >>> schedule = cosine_restarts(1.0, 4)
    >>> [round(float(schedule(torch.tensor(step))), 3) for step in (0, 2, 4, 6)]
    [1.0, 0.5, 1.0, 0.5]
    """
    once = cosine(initial, period)
    return lambda step: once(step % period)


def snapshots(
    step: Step, train_state: TrainState, batches: Iterable[Batch], period: int, key: Tensor | None = None
) -> tuple[Tree, Tree]:
    """Train, and keep the network every ``period`` steps: an ensemble at the cost of one training.

    These are snapshot ensembles (Huang et al., arXiv:1704.00109) if the step's optimizer follows `cosine_restarts` of
    the same period, so that each snapshot is taken where the learning rate has fallen to 0.

    Args:
        step: from `make_step`.
        train_state: where to begin; a step with ``donate`` overwrites it.
        batches: what to train on; an incomplete last period is trained, but not kept.
        period: number of steps from one snapshot to the next.
        key: see `make_step`.

    Returns:
        The snapshots' parameters and running statistics, stacked.

    Raises:
        ValueError: if there are fewer batches than ``period``.
    """
    found: list[tuple[Tree, Tree]] = []
    for done, batch in enumerate(batches, 1):
        train_state, _ = step(train_state, batch, key)
        if done % period == 0:
            params, state = (tree.map(torch.clone, each) for each in train_state[:2])
            found.append((params, state))
    if not found:
        raise ValueError(f"there are fewer than {period} batches, so no snapshot was taken")
    return stack([params for params, _ in found]), stack([state for _, state in found])


# Predictions -------------------------------------------------------------------------------------------------


def logits(model: Model, params: Tree, state: Tree, x: Tensor, *, mapped: Trainable | None = None) -> Tensor:
    """Each member's logits in evaluation mode, (members, batch, classes).

    Args:
        model: the network.
        params: the members' parameters, stacked.
        state: their running statistics, stacked or shared.
        x: images, (batch, channels, height, width), for all members.
        mapped: which parameters are stacked, by path; by default all. The others are shared, see `member_dims`.

    Raises:
        ValueError: if leaves that should be stacked have different numbers of members.
    """
    own = params if mapped is None else partition(params, mapped)[0]
    single = tree.flatten(model.spec()[1]) if state else {}
    stacked = any(leaf.ndim > single[path].ndim for path, leaf in tree.flatten(state).items() if path in single)
    _count((own, state) if stacked else own)
    dims = (member_dims(params, mapped), 0 if stacked else None, None)
    found: Tensor = vmap(lambda *arguments: model.apply(*arguments)[0], in_dims=dims)(params, state, x)
    return found


def mc_dropout(model: Model, params: Tree, state: Tree, x: Tensor, keys: Tensor) -> Tensor:
    """The logits of one network with dropout on, once for each key: (keys, batch, classes).

    Gal and Ghahramani, Dropout as a Bayesian Approximation (arXiv:1506.02142). Batch normalisation uses its running
    statistics. Layers before the first random draw run once for all keys.

    Args:
        model, params, state: the network, one with dropout.
        x: images, (batch, channels, height, width).
        keys: for the masks, (keys, 2): ``random.split(key, count)``.

    Raises:
        ValueError: if the network draws no random numbers.
    """
    drawn = False

    def tap(path: str, given: Any, value: Any) -> Any:
        nonlocal drawn
        drawn = drawn or path.rpartition(".")[2] == DRAW
        return value

    def one(key: Tensor) -> Tensor:
        return logits_of(model.apply(params, state, x, train=True, statistics="running", key=key, tap=tap)[0])

    found = vmap(one)(keys)
    if not drawn:
        raise ValueError(f"{model.name} draws nothing in training: all passes are equal, and show no uncertainty")
    return found


def _check(logits: Tensor, members: int = 1) -> None:
    if logits.ndim != 3 or len(logits) < members:
        raise ValueError(
            f"an ensemble's logits are (members, batch, classes) of at least {members} members, "
            f"found shape {tuple(logits.shape)}"
        )


def mean_probability(logits: Tensor) -> Tensor:
    """The mean of the members' probabilities, (members, batch, classes) to (batch, classes).

    The prediction of a deep ensemble (Lakshminarayanan et al., arXiv:1612.01474, section 2.4).

    Raises:
        ValueError: unless ``logits`` has these three axes.

    >>> mean_probability(torch.tensor([[[0.0, 0.0]], [[100.0, 0.0]]]))
    tensor([[0.7500, 0.2500]])
    """
    _check(logits)
    return logits.softmax(-1).mean(0)


def vote(logits: Tensor) -> Tensor:
    """The share of members that predict each class, (members, batch, classes) to (batch, classes).

    Raises:
        ValueError: unless ``logits`` has these three axes.

    >>> vote(torch.tensor([[[1.0, 0.0]], [[5.0, 0.0]], [[0.0, 1.0]]]))
    tensor([[0.6667, 0.3333]])
    """
    _check(logits)
    return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype).mean(0)


def disagreement(logits: Tensor) -> Tensor:
    """The share of pairs of members with different predictions, (members, batch, classes) to (batch,).

    With ``v`` of ``n`` votes for each class, ``(n^2 - sum v^2) / (n (n - 1))``.

    Raises:
        ValueError: unless ``logits`` has these three axes, and at least two members.

    >>> disagreement(torch.tensor([[[1.0, 0.0]], [[5.0, 0.0]], [[0.0, 1.0]]]))
    tensor([0.6667])
    """
    _check(logits, 2)
    count = len(logits)
    return (1 - vote(logits).square().sum(-1)).clamp(min=0) * count / (count - 1)


def predictive_entropy(logits: Tensor) -> Tensor:
    """The entropy of the mean probability, in nats: the total uncertainty, (members, batch, classes) to (batch,).

    Raises:
        ValueError: unless ``logits`` has these three axes.

    >>> predictive_entropy(torch.tensor([[[100.0, 0.0]], [[0.0, 100.0]]]))
    tensor([0.6931])
    """
    return torch.special.entr(mean_probability(logits)).sum(-1)


def expected_entropy(logits: Tensor) -> Tensor:
    """The mean of the members' entropies, in nats: the uncertainty within each member, as for an ambiguous image.

    (members, batch, classes) to (batch,).

    Raises:
        ValueError: unless ``logits`` has these three axes.

    >>> expected_entropy(torch.zeros(2, 1, 2))
    tensor([0.6931])
    """
    _check(logits)
    return torch.special.entr(logits.softmax(-1)).sum(-1).mean(0)


def mutual_information(logits: Tensor) -> Tensor:
    """`predictive_entropy` minus `expected_entropy`, in nats: the uncertainty because members differ, (batch,).

    The mutual information of the prediction and the choice of a member (Houlsby et al., arXiv:1112.5745, equation 2;
    Depeweg et al., arXiv:1710.07283), from 0 to the logarithm of the number of members or classes, whichever is
    smaller.

    Raises:
        ValueError: unless ``logits`` has the axes (members, batch, classes).

    >>> mutual_information(torch.tensor([[[100.0, 0.0]], [[0.0, 100.0]]]))
    tensor([0.6931])
    """
    return (predictive_entropy(logits) - expected_entropy(logits)).clamp(min=0)


class Reliability(NamedTuple):
    """How often predictions of a given confidence are right; see `reliability`."""

    confidence: Tensor
    """The mean confidence in each bin, (bins,); NaN where a bin is empty."""
    accuracy: Tensor
    """The share of right predictions in each bin, (bins,); NaN where a bin is empty."""
    images: Tensor
    """The number of images in each bin, (bins,)."""

    @property
    def expected_calibration_error(self) -> float:
        """The distance of accuracy and confidence in a bin, averaged over the images (Guo et al., equation 3)."""
        gaps = (self.accuracy - self.confidence).abs().nan_to_num()
        return float((gaps * self.images).sum() / self.images.sum())


def reliability(probabilities: Tensor, labels: Tensor, bins: int = 15) -> Reliability:
    """The reliability curve: accuracy by confidence (the largest probability), in bins of equal width.

    Guo et al., On Calibration of Modern Neural Networks (arXiv:1706.04599, section 2).

    Args:
        probabilities: (images, classes).
        labels: the right classes, (images,).
        bins: number of bins.

    >>> found = reliability(torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([0, 0]), bins=2)
    >>> found.images.tolist(), round(found.expected_calibration_error, 2)
    ([0, 2], 0.35)

    Raises:
        ValueError: if the shapes do not match, there are no images, or ``bins`` is less than 1.
    """
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1] or not len(labels):
        raise ValueError(
            f"probabilities are (images, classes) and labels (images,), found {tuple(probabilities.shape)} "
            f"and {tuple(labels.shape)}"
        )
    if bins < 1:
        raise ValueError(f"bins must be at least 1, found {bins}")
    confidence, answer = probabilities.double().max(-1)
    # Bins are open below and closed above, as in the paper.
    index = ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)
    count, right, sure = (
        torch.bincount(index, weights, bins)
        for weights in (torch.ones_like(confidence), (answer == labels).double(), confidence)
    )
    return Reliability(sure / count, right / count, count.long())
