"""Laws of the training step and of the loop around it."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap
from torch.utils._python_dispatch import TorchDispatchMode

import purecnn
from purecnn import Outputs, fork, random, serial, tree
from purecnn.layers import batch_norm, conv, dropout, global_avg_pool, linear, relu
from purecnn.model import Model
from purecnn.optimizers import Optimizer, adamw, sgd
from purecnn.paper import Paper
from purecnn.precision import POLICIES
from purecnn.schedules import constant, cosine, warmup
from purecnn.training import (
    Batch,
    DivergedError,
    Epoch,
    Fitted,
    Position,
    TrainState,
    evaluate,
    fit,
    loss_function,
    make_step,
)
from purecnn.tree import Tree

CLASSES = 3


def model_of(layer: purecnn.Layer) -> Model:
    return Model("tiny", layer, {"num_classes": CLASSES}, Paper("", "", 2000, ""), 1, 8)


def head() -> purecnn.Layer:
    return serial(global_avg_pool, linear=linear(CLASSES))


TINY = model_of(
    serial(
        stem=serial(conv=conv(4, 3), norm=batch_norm(), relu=relu),
        stage1=serial(conv=conv(6, 3, 2), norm=batch_norm(), relu=relu, drop=dropout(0.3)),
        head=head(),
    )
)
FORKED = model_of(
    serial(stem=serial(conv=conv(4, 3), relu=relu), main=fork(serial(stage1=conv(5, 3), head=head()), aux1=head()))
)


def batch(seed: int, size: int = 6) -> Batch:
    """Noise around the class's brightness."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (size,), generator=generator)
    return torch.randn(size, 1, 8, 8, generator=generator) + labels[:, None, None, None], labels


def start(model: Model, optimizer: Optimizer, **settings: Any) -> TrainState:
    return TrainState.start(*model.init(random.key(0)), optimizer, **settings)


def leaves(train_state: TrainState) -> list[Tensor]:
    params, state, opt_state, step, extra = train_state
    return [leaf for each in (params, state, opt_state, extra) for leaf in tree.flatten(each).values()] + [step]


def equal(a: TrainState, b: TrainState) -> bool:
    return all(torch.equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


def close(a: TrainState, b: TrainState) -> None:
    for x, y in zip(leaves(a), leaves(b), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


# The step ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [sgd(0.1, momentum=0.9), adamw(cosine(0.01, 10))], ids=["sgd", "adamw"])
def test_step_is_pure(optimizer: Optimizer) -> None:
    step = make_step(TINY, optimizer)
    before = start(TINY, optimizer)
    images, labels = batch(0)
    key = random.key(1)
    inputs = [*leaves(before), images, labels, key]
    values, versions = [leaf.clone() for leaf in inputs], [leaf._version for leaf in inputs]
    first, second = step(before, (images, labels), key), step(before, (images, labels), key)
    assert versions == [leaf._version for leaf in inputs]
    assert all(torch.equal(a, b) for a, b in zip(values, inputs, strict=True))
    assert equal(first[0], second[0])
    assert torch.equal(first[1].loss, second[1].loss)
    assert list(tree.flatten(first[0].params)) == list(tree.flatten(before.params))
    assert first[0].step == 1
    assert not any(leaf.requires_grad for leaf in [*leaves(first[0]), *first[1]])


def test_step_is_what_one_writes_by_hand() -> None:
    optimizer = sgd(0.1)
    before = start(TINY, optimizer)
    images, labels = batch(0)
    after, metrics = make_step(TINY, optimizer)(before, (images, labels), random.key(1))
    params = tree.map(lambda leaf: leaf.clone().requires_grad_(), before.params)
    key = random.fold_in(random.key(1), 0)
    logits, state = TINY.apply(params, before.state, images, train=True, key=key)
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    assert torch.equal(metrics.loss, loss)
    assert metrics.correct == (logits.argmax(1) == labels).sum()
    tree.map(torch.testing.assert_close, after.params, tree.map(lambda p: p.detach() - 0.1 * p.grad, params))
    tree.map(torch.testing.assert_close, after.state, state)


def test_donating_changes_nothing_but_the_buffers() -> None:
    optimizer = sgd(0.1, momentum=0.9)
    copying, donating = make_step(TINY, optimizer), make_step(TINY, optimizer, donate=True)
    a, b = start(TINY, optimizer), start(TINY, optimizer)
    pointers = [leaf.data_ptr() for leaf in tree.flatten(b.params).values()]
    for i in range(3):
        a, _ = copying(a, batch(i), random.key(1))
        b, _ = donating(b, batch(i), random.key(1))
    assert equal(a, b)
    assert pointers == [leaf.data_ptr() for leaf in tree.flatten(b.params).values()]


def test_each_step_draws_anew() -> None:
    optimizer = sgd(0.0)
    step = make_step(TINY, optimizer)
    first, a = step(start(TINY, optimizer), batch(0), random.key(1))
    second, b = step(first, batch(0), random.key(1))
    assert second.step == 2
    assert a.loss != b.loss  # nothing was learned: the masks differ
    with pytest.raises(ValueError, match="pass key="):
        step(first, batch(0))


@pytest.mark.parametrize("settings", [{}, {"trainable": lambda path: path.startswith("head.")}], ids=["all", "head"])
def test_an_ensemble_is_its_members(settings: dict[str, Any]) -> None:
    keys, rates = random.split(random.key(0), 3), torch.tensor([0.1, 0.03, 0.01])

    def begin(key: Tensor) -> TrainState:
        return TrainState.start(*TINY.init(key), sgd(0.0, momentum=0.9), **settings)

    def step(train_state: TrainState, data: Batch, key: Tensor, rate: Tensor) -> Any:
        return make_step(TINY, sgd(rate, momentum=0.9), **settings)(train_state, data, key)

    together = vmap(begin)(keys)
    members = [begin(key) for key in keys]
    for i in range(2):
        together, metrics = vmap(step, in_dims=(0, None, 0, 0))(together, batch(i), keys, rates)
        for j in range(3):
            members[j], alone = step(members[j], batch(i), keys[j], rates[j])
            torch.testing.assert_close(metrics.loss[j], alone.loss)
            assert metrics.correct[j] == alone.correct
    for j in range(3):
        member = torch.utils._pytree.tree_map(lambda leaf, j=j: leaf[j], together)
        close(member, members[j])


@pytest.mark.parametrize("donate", [False, True])
def test_step_compiles_into_one_graph(donate: bool) -> None:
    model = purecnn.create("lenet5")
    optimizer = sgd(cosine(0.1, 10), momentum=0.9, weight_decay=1e-4)
    data = (torch.randn(4, 1, 32, 32), torch.arange(4))
    step = make_step(model, optimizer, label_smoothing=0.1, donate=donate)
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    a, b = start(model, optimizer), start(model, optimizer)
    for _ in range(3):
        a, metrics = step(a, data, random.key(0))
        b, same = compiled(b, data, random.key(0))
        torch.testing.assert_close(metrics, same)
    close(a, b)


def test_gradient_compiles_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    compile, calls = torch.compile, []

    def cheap(function: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
        calls.append(settings)
        return compile(function, backend="aot_eager", **settings)

    monkeypatch.setattr(torch, "compile", cheap)
    optimizer = adamw()
    eager, compiled = make_step(TINY, optimizer), make_step(TINY, optimizer, compile=True, donate=True)
    a, b = start(TINY, optimizer), start(TINY, optimizer)
    for i in range(2):
        a, _ = eager(a, batch(i), random.key(0))
        assert not i or len(calls) == 1
        b, _ = compiled(b, batch(i), random.key(0))
    close(a, b)
    # Once, and not for the eager one, as the parameters are on the CPU.
    assert [settings["fullgraph"] for settings in calls] == [True]


def test_a_step_is_differentiable() -> None:
    """The loss after a step, with respect to the learning rate and to the image."""

    def after(rate: Tensor, images: Tensor) -> Tensor:
        step = make_step(TINY, sgd(rate))
        train_state, _ = step(start(TINY, sgd(0.0)), (images, batch(0)[1]), random.key(1))
        logits, _ = TINY.apply(train_state.params, train_state.state, batch(1)[0])
        return F.cross_entropy(logits, batch(1)[1])

    rate, images = torch.tensor(0.1), batch(0)[0]
    slope, by_image = torch.func.grad(after, argnums=(0, 1))(rate, images)
    difference = (after(rate + 1e-2, images) - after(rate - 1e-2, images)) / 2e-2
    torch.testing.assert_close(slope, difference, rtol=0.05, atol=1e-3)
    images.requires_grad_()
    after(rate, images).backward()
    torch.testing.assert_close(images.grad, by_image)
    assert by_image.abs().max() > 0


class Convolutions(TorchDispatchMode):
    """Counts the derivatives of convolutions."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten.convolution_backward.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("donate", [False, True])
def test_a_frozen_trunk_stays_and_gets_no_gradient(donate: bool) -> None:
    def trainable(path: str) -> bool:
        return path.startswith("head.")

    optimizer = sgd(0.1, momentum=0.9, weight_decay=0.1)
    before = start(TINY, optimizer, trainable=trainable)
    values = tree.map(torch.clone, before.params)
    assert list(before.opt_state["momentum"]) == ["head"]
    step = make_step(TINY, optimizer, trainable=trainable, statistics="running", donate=donate)
    with Convolutions() as convolutions:
        after, _ = step(before, batch(0), random.key(1))
    assert convolutions.count == 0
    with Convolutions() as convolutions:
        make_step(TINY, optimizer)(start(TINY, optimizer), batch(0), random.key(1))
    assert convolutions.count == 2
    assert list(after.params) == list(before.params)
    for part in ("stem", "stage1"):
        tree.map(lambda a, b: torch.equal(a, b) or pytest.fail("changed"), after.params[part], values[part])
    assert not torch.equal(after.params["head"]["linear"]["weight"], values["head"]["linear"]["weight"])
    tree.map(lambda a, b: torch.equal(a, b) or pytest.fail("changed"), after.state, before.state)
    with pytest.raises(ValueError, match=r"no parameter is chosen; paths are .*head\.linear\.weight"):
        start(TINY, optimizer, trainable=lambda path: False)


def test_auxiliary_heads_count_by_their_weight() -> None:
    optimizer = sgd(0.1)
    before = start(FORKED, optimizer)
    images, labels = batch(0)
    outputs, _ = FORKED.apply(before.params, before.state, images, train=True)
    assert isinstance(outputs, Outputs)
    main, aux = F.cross_entropy(outputs.logits, labels), F.cross_entropy(outputs.aux[0], labels)
    for weight in (0.0, 0.3):
        after, metrics = make_step(FORKED, optimizer, aux_weight=weight)(before, (images, labels))
        torch.testing.assert_close(metrics.loss, main + weight * aux)
        assert metrics.correct == (outputs.logits.argmax(1) == labels).sum()
        same = torch.equal(*(each.params["main"]["aux1"]["linear"]["weight"] for each in (before, after)))
        assert same == (weight == 0)
    assert evaluate(FORKED, before.params, before.state, [(images, labels)]).loss == pytest.approx(float(main))


def test_label_smoothing_mixes_with_the_uniform_distribution() -> None:
    logits, labels = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    target = 0.9 * F.one_hot(labels, 4) + 0.1 / 4
    expected = -(target * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(loss_function(logits, labels, label_smoothing=0.1), expected)


# Evaluation --------------------------------------------------------------------------------------------------


def test_evaluation_counts_every_image_once() -> None:
    params, state = TINY.init(random.key(0))
    batches = [batch(0, 5), batch(1, 1), batch(2, 7)]
    found = evaluate(TINY, params, state, batches)
    images, labels = (torch.cat(each) for each in zip(*batches, strict=True))
    logits, _ = TINY.apply(params, state, images)
    predicted = logits.argmax(1)
    assert found.loss == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)
    assert found.accuracy == float((predicted == labels).double().mean())
    assert found.confusion.sum() == 13
    for i in range(CLASSES):
        for j in range(CLASSES):
            assert found.confusion[i, j] == ((labels == i) & (predicted == j)).sum()
        assert found.class_accuracy[i] == (predicted[labels == i] == i).float().mean()
    only_one = evaluate(TINY, params, state, [(images[:2], torch.zeros(2, dtype=torch.int64))])
    assert only_one.class_accuracy.isnan().tolist() == [False, True, True]
    with pytest.raises(ValueError, match="no batch"):
        evaluate(TINY, params, state, [])


# The loop ----------------------------------------------------------------------------------------------------


def batches(key: Tensor) -> Iterator[Batch]:
    """Three batches of the same 18 images, in the key's order."""
    images, labels = batch(0, 18)
    order = random.permutation(key, 18)
    yield from zip(images[order].split(6), labels[order].split(6), strict=True)


TEST = [batch(100, 12)]


def run(**settings: Any) -> Fitted:
    optimizer = settings.pop("optimizer", sgd(cosine(0.1, 12), momentum=0.9))
    defaults = {"epochs": 4, "key": random.key(0)}
    return fit(TINY, optimizer, settings.pop("train", batches), TEST, **{**defaults, **settings})


def test_fit_is_a_function_of_its_key() -> None:
    first, second, other = run(), run(), run(key=random.key(1))
    assert equal(first.train_state, second.train_state)
    assert equal(first.best, second.best)
    assert [row._replace(seconds=0) for row in first.history] == [row._replace(seconds=0) for row in second.history]
    assert not equal(first.train_state, other.train_state)


def test_fit_learns_and_tells() -> None:
    seen: list[tuple[int, int]] = []
    rows: list[Epoch] = []
    states: list[TrainState] = []
    copies: list[TrainState] = []

    def on_epoch(row: Epoch, train_state: TrainState) -> None:
        rows.append(row)
        states.append(train_state)
        copies.append(torch.utils._pytree.tree_map(torch.clone, train_state))

    fitted = run(
        epochs=8, on_step=lambda position, metrics: seen.append((position.epoch, position.batch)), on_epoch=on_epoch
    )
    assert seen == [(epoch, i) for epoch in range(1, 9) for i in range(1, 4)]
    assert tuple(rows) == fitted.history
    assert [row.epoch for row in rows] == list(range(1, 9))
    assert rows[-1].train_loss < rows[0].train_loss
    assert rows[0].learning_rate == pytest.approx(0.1)
    assert rows[2].learning_rate == pytest.approx(0.05)
    assert all(row.seconds > 0 for row in rows)
    # What was handed out is not overwritten by later steps.
    assert all(equal(*pair) for pair in zip(states, copies, strict=True))
    assert equal(fitted.train_state, copies[-1])
    best = max(range(8), key=lambda i: (rows[i].test_accuracy, -rows[i].test_loss))
    assert fitted.best_epoch == rows[best]
    assert equal(fitted.best, copies[best])
    found = evaluate(TINY, fitted.best.params, fitted.best.state, TEST)
    assert (found.loss, found.accuracy) == (rows[best].test_loss, rows[best].test_accuracy)


def test_a_resumed_epoch_knows_its_learning_rate() -> None:
    """Also where steps were skipped, which an optimizer does not count."""
    policy, settings = POLICIES["float16"], {"epochs": 2, "optimizer": sgd(warmup(4, constant(0.1)), momentum=0.9)}
    params, state = TINY.init(random.key(0))
    begin = TrainState.start(params, state, settings["optimizer"], policy=policy)
    huge = begin._replace(
        extra={"loss_scale": {"scale": torch.tensor(2.0**120), "good": torch.zeros((), dtype=torch.int64)}}
    )
    whole = run(position=Position.start(huge), policy=policy, **settings)
    kept: list[Position] = []

    def stop(position: Position, metrics: Any) -> bool:
        kept.append(position._replace(train_state=torch.utils._pytree.tree_map(torch.clone, position.train_state)))
        return len(kept) == 2

    run(position=Position.start(huge), policy=policy, on_step=stop, **settings)
    again = run(position=kept[-1], policy=policy, **settings)
    assert int(kept[-1].train_state.opt_state["step"]) == 0
    assert [row.learning_rate for row in again.history] == [row.learning_rate for row in whole.history]
    assert equal(again.train_state, whole.train_state)


def test_the_best_epoch_need_not_be_the_last() -> None:
    """From the third epoch on the steps lead upwards."""
    states: list[TrainState] = []
    fitted = run(
        optimizer=sgd(lambda step: torch.where(step < 6, 0.1, -1.0)),
        on_epoch=lambda row, train_state: states.append(train_state),
    )
    assert fitted.best_epoch == fitted.history[1]
    assert fitted.best is not None
    assert equal(fitted.best, states[1])
    assert not equal(fitted.best, fitted.train_state)


def test_fit_is_the_steps_one_after_the_other() -> None:
    optimizer = sgd(0.1, momentum=0.9)
    fitted = run(epochs=2, optimizer=optimizer)
    init_key, order_key, draw_key = random.split(random.key(0), 3)
    step = make_step(TINY, optimizer)
    train_state = TrainState.start(*TINY.init(init_key), optimizer)
    for epoch in (1, 2):
        for data in batches(random.fold_in(order_key, epoch)):
            train_state, _ = step(train_state, data, draw_key)
    assert equal(fitted.train_state, train_state)


def test_a_fine_tune_leaves_where_it_started_alone() -> None:
    params, state = TINY.init(random.key(7))
    copies = [tree.map(torch.clone, each) for each in (params, state)]
    head_only: dict[str, Any] = {"trainable": lambda path: path.startswith("head."), "statistics": "running"}
    tuned = run(start=(params, state), **head_only)
    for given, copy in zip((params, state), copies, strict=True):
        tree.map(lambda a, b: torch.equal(a, b) or pytest.fail("changed"), given, copy)

    def same(part: str, tree_: Tree) -> bool:
        return all(map(torch.equal, tree.flatten(tree_[part]).values(), tree.flatten(params[part]).values()))

    assert same("stem", tuned.train_state.params)
    assert same("stage1", tuned.train_state.params)
    assert not same("head", tuned.train_state.params)
    tree.map(lambda a, b: torch.equal(a, b) or pytest.fail("changed"), tuned.train_state.state, state)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_divergence_is_an_error_that_keeps_the_last_good_state(bad: float, index: int) -> None:
    epochs_begun = 0

    def train(key: Tensor) -> Iterator[Batch]:
        nonlocal epochs_begun
        epochs_begun += 1
        for i, (images, labels) in enumerate(batches(key)):
            yield (images * bad if (epochs_begun, i) == (3, index) else images), labels

    rows: list[Epoch] = []
    states: list[TrainState] = []
    with pytest.raises(DivergedError, match=rf"the loss is \w+ in batch {index + 1} of epoch 3") as caught:
        run(train=train, on_epoch=lambda row, train_state: (rows.append(row), states.append(train_state)))
    error = caught.value
    assert (error.epoch, error.step) == (3, 6 + index)
    assert error.history == tuple(rows)
    assert len(rows) == 2
    assert error.train_state is states[-1]
    assert all(leaf.isfinite().all() for leaf in leaves(error.train_state))


def test_divergence_in_the_last_update_shows_in_the_evaluation() -> None:
    def train(key: Tensor) -> Iterator[Batch]:
        yield batch(0)

    with pytest.raises(DivergedError, match="in the evaluation at the end of epoch 1") as caught:
        run(train=train, optimizer=sgd(math.inf))
    begun = TrainState.start(*TINY.init(random.split(random.key(0), 3)[0]), sgd(math.inf))
    assert equal(caught.value.train_state, begun)


def test_fit_refuses_nothing_to_do() -> None:
    with pytest.raises(ValueError, match="epochs must be at least 1, found 0"):
        run(epochs=0)
    with pytest.raises(ValueError, match="give only one of them"):
        run(start=TINY.init(random.key(0)), position=Position.start(start(TINY, sgd(0.1))))
    with pytest.raises(ValueError, match="no batch to train on in epoch 1"):
        run(train=lambda key: [])
