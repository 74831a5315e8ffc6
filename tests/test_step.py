"""Laws of what a training step may do besides: types of numbers, parts of a batch, averages, recomputation."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap

import purecnn
from purecnn import Mode, augment, numbered, random, serial, tree
from purecnn.layers import conv, dropout
from purecnn.optimizers import adamw, sgd
from purecnn.precision import POLICIES, Policy
from purecnn.remat import rematerialize
from purecnn.step import TrainState, make_step
from purecnn.training import evaluate
from purecnn.zoo.lecun1989 import squared_error
from tests import table
from tests.test_training import CLASSES, FORKED, TINY, batch, close, equal, head, model_of, start

NUMBERED = model_of(
    serial(
        stem=conv(4, 3), stage1=numbered(*(serial(conv=conv(4, 3), drop=dropout(0.5)) for _ in range(2))), head=head()
    )
)

# Rematerialisation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [TINY, FORKED, NUMBERED], ids=["tiny", "forked", "numbered"])
def test_recomputing_changes_nothing(model: Any) -> None:
    optimizer = sgd(0.1, momentum=0.9)
    plain, saving = make_step(model, optimizer), make_step(model, optimizer, remat=True)
    a, b = start(model, optimizer), start(model, optimizer)
    for i in range(3):
        a, first = plain(a, batch(i), random.key(1))
        b, second = saving(b, batch(i), random.key(1))
        assert torch.equal(first.loss, second.loss)
    assert equal(a, b)
    assert tree.map(lambda leaf: leaf.shape, a.state) == tree.map(lambda leaf: leaf.shape, b.state)


def test_recomputing_goes_with_every_transformation() -> None:
    params, state = TINY.init(random.key(0))
    images, labels = batch(0)

    def loss(params: Any, image: Tensor, label: Tensor, key: Tensor, remat: bool) -> Tensor:
        logits, _ = TINY.apply(params, state, image[None], train=True, statistics="running", key=key, remat=remat)
        return F.cross_entropy(logits, label[None])

    def per_sample(remat: bool) -> Any:
        # Each image with a key of its own, so the recomputation is mapped over keys, too.
        keys = random.split(random.key(1), len(images))
        return vmap(lambda i, t, k: grad(loss)(params, i, t, k, remat))(images, labels, keys)

    tree.map(torch.testing.assert_close, per_sample(True), per_sample(False))

    def hessian_vector(remat: bool) -> Any:
        def slope(params: Any) -> Tensor:
            first = grad(loss)(params, images[0], labels[0], random.key(1), remat)
            return sum(leaf.square().sum() for leaf in tree.flatten(first).values())

        return grad(slope)(params)

    tree.map(torch.testing.assert_close, hessian_vector(True), hessian_vector(False))


def test_recomputing_goes_with_second_derivatives_of_autograd() -> None:
    params, state = TINY.init(random.key(0))
    images, labels = batch(0)

    def penalty(remat: bool) -> list[Tensor]:
        own = tree.map(lambda leaf: leaf.clone().requires_grad_(), params)
        x = images.clone().requires_grad_()
        logits, _ = TINY.apply(own, state, x, train=True, key=random.key(1), remat=remat)
        (slope,) = torch.autograd.grad(F.cross_entropy(logits, labels), x, create_graph=True)
        leaves = list(tree.flatten(own).values())
        return list(torch.autograd.grad(slope.square().sum(), leaves, materialize_grads=True))

    assert any(leaf.count_nonzero() for leaf in penalty(False))
    for one, other in zip(penalty(True), penalty(False), strict=True):
        torch.testing.assert_close(one, other)


def test_recomputing_keeps_only_what_goes_in() -> None:
    kept: list[tuple[int, ...]] = []

    def function(x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return x.sin().cos().exp(), {}

    x = torch.ones(3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):  # type: ignore[func-returns-value]
        y, _ = rematerialize(function, x)
    assert kept == [(3,)]
    y.sum().backward()
    again = torch.ones(3, requires_grad=True)
    function(again)[0].sum().backward()
    assert x.grad is not None
    assert again.grad is not None
    assert torch.equal(x.grad, again.grad)


# Types of numbers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICIES)
def test_types_are_those_of_the_policy(name: str) -> None:
    policy = POLICIES[name]
    params, state = TINY.init(random.key(0))
    images, _ = batch(0)
    inside: set[torch.dtype] = set()

    def tap(path: str, x: Any, y: Tensor) -> Tensor:
        inside.add(y.dtype)
        return y

    for statistics in ("batch", "running"):
        settings: dict[str, Any] = {"train": True, "statistics": statistics, "key": random.key(0)}
        inside.clear()
        logits, after = policy.apply(TINY, params, state, images, tap=tap, **settings)
        assert logits.dtype == torch.float32
        assert inside - {torch.bool} == {policy.compute}
        assert {leaf.dtype for leaf in tree.flatten(after).values()} == {torch.float32, torch.int64}
        inside.clear()
        mapped, states = vmap(lambda x: policy.apply(TINY, params, state, x, tap=tap, **settings))(images[None])  # noqa: B023
        assert mapped.dtype == logits.dtype
        assert inside - {torch.bool} == {policy.compute}
        assert tree.map(lambda leaf: leaf.dtype, states) == tree.map(lambda leaf: leaf.dtype, after)
        torch.testing.assert_close(mapped[0], logits, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_short_numbers_train_nearly_as_long_ones_do(name: str) -> None:
    optimizer = sgd(0.05)
    long, short = make_step(TINY, optimizer), make_step(TINY, optimizer, policy=POLICIES[name])
    a, b = start(TINY, optimizer), start(TINY, optimizer, policy=POLICIES[name])
    for i in range(20):
        a, first = long(a, batch(i, 30), random.key(1))
        b, second = short(b, batch(i, 30), random.key(1))
        torch.testing.assert_close(first.loss, second.loss, rtol=0.05, atol=0.02)
    assert {leaf.dtype for leaf in tree.flatten(b.params).values()} == {torch.float32}


def test_an_infinite_gradient_changes_the_scale_alone() -> None:
    policy = POLICIES["float16"]
    optimizer = adamw(0.01)
    step = make_step(TINY, optimizer, policy=policy, average=0.9)
    before = start(TINY, optimizer, policy=policy, average=True)
    # As the average lags behind in training.
    average = {"average": tree.map(lambda x: x + 1 if x.is_floating_point() else x, before.extra["average"])}
    scale = before.extra["loss_scale"]["scale"]
    huge = before._replace(extra={**average, "loss_scale": {"scale": scale * 2.0**20, "good": torch.tensor(5)}})
    after, _ = step(huge, batch(0), random.key(1))
    for name in ("params", "state", "opt_state"):
        tree.map(lambda x, y: torch.equal(x, y) or pytest.fail("changed"), getattr(after, name), getattr(before, name))
    tree.map(lambda x, y: torch.equal(x, y) or pytest.fail("moved"), after.extra["average"], average["average"])
    assert after.extra["loss_scale"] == {"scale": scale * 2.0**19, "good": torch.tensor(0)}
    ready = before._replace(extra={**average, "loss_scale": {"scale": scale, "good": torch.tensor(1999)}})
    after, _ = step(ready, batch(0), random.key(1))
    assert after.extra["loss_scale"] == {"scale": 2 * scale, "good": torch.tensor(0)}


def test_the_scale_stays_finite() -> None:
    policy, optimizer = POLICIES["float16"], sgd(0.0)
    before = start(TINY, optimizer, policy=policy)
    step = make_step(TINY, optimizer, policy=policy, loss=lambda outputs, labels: 0 * outputs.float().sum())
    largest = torch.tensor(2.0**127)
    ready = before._replace(extra={"loss_scale": {"scale": largest, "good": torch.tensor(1999)}})
    assert step(ready, batch(0), random.key(1))[0].extra["loss_scale"]["scale"] == largest


def test_parameters_can_be_kept_in_short_numbers() -> None:
    policy = Policy(parameters=torch.bfloat16, compute=torch.bfloat16)
    optimizer = sgd(0.1, momentum=0.9)
    before = start(TINY, optimizer, policy=policy)
    after, _ = make_step(TINY, optimizer, policy=policy)(before, batch(0), random.key(1))
    assert {leaf.dtype for leaf in tree.flatten(after.params).values()} == {torch.bfloat16}


def test_the_average_of_short_numbers_is_kept_in_long_ones() -> None:
    policy = Policy(parameters=torch.bfloat16)
    optimizer = sgd(0.0)
    step = make_step(TINY, optimizer, policy=policy, average=0.999, compile=False)
    now = start(TINY, optimizer, policy=policy, average=True)
    now = now._replace(step=torch.tensor(100_000), extra={"average": tree.map(lambda x: x + 1, now.extra["average"])})
    for i in range(5):
        now, _ = step(now, batch(i), random.key(1))
    mean, _ = now.averaged
    gap = mean["head"]["linear"]["bias"] - now.params["head"]["linear"]["bias"]
    torch.testing.assert_close(gap, torch.full_like(gap, 0.999**5), rtol=1e-5, atol=0)


# Parts of a batch --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [2, 3, 6])
def test_accumulated_parts_are_the_whole(parts: int) -> None:
    optimizer = sgd(0.1)
    settings: dict[str, Any] = {"statistics": "running"}
    model = FORKED
    whole = make_step(model, optimizer, **settings)(start(model, optimizer), batch(0, 7))
    split = make_step(model, optimizer, accumulate=parts, **settings)(start(model, optimizer), batch(0, 7))
    close(whole[0], split[0])
    torch.testing.assert_close(whole[1].loss, split[1].loss)
    assert whole[1].correct == split[1].correct
    with pytest.raises(ValueError, match="accumulate must be at least 1, found 0"):
        make_step(model, optimizer, accumulate=0)


def test_accumulated_parts_draw_differently_and_move_the_statistics_each() -> None:
    optimizer = sgd(0.0)
    images, labels = batch(0)
    twice = torch.cat([images, images]), torch.cat([labels, labels])
    before = start(TINY, optimizer)
    after, metrics = make_step(TINY, optimizer, accumulate=2)(before, twice, random.key(1))
    assert after.state["stem"]["norm"]["count"] == 2
    assert after.step == 1
    key = random.fold_in(random.key(1), 0)
    logits = [
        TINY.apply(before.params, before.state, images, train=True, key=random.fold_in(key, i))[0] for i in range(2)
    ]
    losses = [F.cross_entropy(each, labels) for each in logits]
    assert losses[0] != losses[1]
    torch.testing.assert_close(metrics.loss, sum(losses) / 2)


# Averages ----------------------------------------------------------------------------------------------------


def test_the_average_follows() -> None:
    optimizer = sgd(0.1)
    step = make_step(TINY, optimizer, average=0.5)
    now = start(TINY, optimizer, average=True)
    params, state = now.averaged
    for i in range(8):
        now, _ = step(now, batch(i), random.key(1))
        weight = 1 - min(0.5, (1 + i) / (10 + i))
        params = tree.map(lambda mean, leaf, w=weight: mean + w * (leaf - mean), params, now.params)
        state = tree.map(
            lambda mean, leaf, w=weight: mean + w * (leaf - mean) if leaf.is_floating_point() else leaf,
            state,
            now.state,
        )
    tree.map(torch.testing.assert_close, now.averaged[0], params)
    tree.map(torch.testing.assert_close, now.averaged[1], state)
    assert now.averaged[1]["stem"]["norm"]["count"] == 8
    with pytest.raises(ValueError, match="there is no average yet"):
        step(start(TINY, optimizer), batch(0), random.key(1))
    with pytest.raises(ValueError, match="average is between 0 and 1, found 1"):
        make_step(TINY, optimizer, average=1.0)


# Losses and labels -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lecun1989", "lenet5_1998"])
def test_networks_are_trained_with_their_own_loss(name: str) -> None:
    model = purecnn.create(name)
    assert model.loss is not None
    optimizer = sgd(0.01)
    before = TrainState.start(*model.init(random.key(0)), optimizer)
    images, labels = torch.rand(4, 1, model.image_size, model.image_size), torch.arange(4)
    after, metrics = make_step(model, optimizer)(before, (images, labels))
    outputs, _ = model.apply(before.params, before.state, images)
    torch.testing.assert_close(metrics.loss, model.loss(outputs, labels))
    assert make_step(model, optimizer, loss=F.cross_entropy)(before, (images, labels))[1].loss != metrics.loss
    with pytest.raises(ValueError, match=f"{name} is trained with another loss"):
        make_step(model, optimizer, label_smoothing=0.1)
    assert after.step == 1


def test_shares_of_classes_are_labels_too() -> None:
    optimizer = sgd(0.1)
    images, labels = batch(0)
    shares = F.one_hot(labels, 3).float()
    a, first = make_step(TINY, optimizer)(start(TINY, optimizer), (images, labels), random.key(1))
    b, second = make_step(TINY, optimizer)(start(TINY, optimizer), (images, shares), random.key(1))
    close(a, b)
    assert first.correct == second.correct


# Augmentation ------------------------------------------------------------------------------------------------


def test_augmentation_is_part_of_the_step() -> None:
    optimizer = sgd(0.1)
    images = torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8)
    labels = torch.arange(6) % 3
    vary = augment.chain(augment.crop(2), augment.flip, augment.normalize([0.5], [0.25]))
    step = make_step(TINY, optimizer, augment=vary)
    after, _ = step(start(TINY, optimizer), (images, labels), random.key(1))
    key = random.fold_in(random.key(1), 0)
    varied = vary(images, random.fold_in(key, 0))
    by_hand, _ = make_step(TINY, optimizer)(start(TINY, optimizer), (varied, labels), random.key(1))
    assert equal(after, by_hand)
    with pytest.raises(ValueError, match="pass key="):
        step(start(TINY, optimizer), (images, labels))


def test_each_step_of_a_chain_has_a_key_of_its_own() -> None:
    seen: list[Tensor] = []

    def look(images: Tensor, key: Tensor) -> Tensor:
        seen.append(key)
        return images + 1

    assert augment.chain(look, look, look)(torch.zeros(1), random.key(3)) == 3
    assert torch.equal(torch.stack(seen), torch.stack([random.fold_in(random.key(3), i) for i in range(3)]))


def test_crops_are_windows_of_the_padded_image() -> None:
    images = torch.arange(1, 1 + 5 * 36).reshape(5, 1, 6, 6)
    for mode in ("constant", "reflect"):
        wide = F.pad(images.float(), (2,) * 4, mode=mode).long()
        cropped = augment.crop(2, mode)(images, random.key(3))
        assert cropped.dtype == images.dtype
        for image, window in zip(wide, cropped, strict=True):
            found = image.unfold(1, 6, 1).unfold(2, 6, 1)[0]
            assert (found == window).flatten(2).all(2).any()
    many = torch.arange(36).reshape(1, 1, 6, 6).expand(500, 1, 6, 6)
    corners = augment.crop(2, "reflect")(many, random.key(0))[:, 0, 0, 0]
    assert len(corners.unique()) == 9  # 5x5 places, of which reflection makes some alike


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.float16, torch.uint8])
@pytest.mark.parametrize("mode", ["constant", "reflect"])
def test_a_crop_without_padding_is_exact(dtype: torch.dtype, mode: str) -> None:
    images = random.bits(random.key(0), (2, 1, 4, 4)).to(dtype)
    images = images / 3 if dtype.is_floating_point else images
    assert torch.equal(augment.crop(0, mode)(images, random.key(1)), images)


def test_cutout_hides_one_square() -> None:
    cut = augment.cutout(3)(torch.ones(50, 2, 8, 8), random.key(0))
    hidden = (cut == 0).all(1).flatten(1).sum(1)
    assert ((hidden >= 4) & (hidden <= 9)).all()
    assert torch.equal(cut[:, 0], cut[:, 1])
    _, _, rows, columns = (augment.cutout(1)(torch.ones(50, 1, 8, 8), random.key(0)) == 0).nonzero().T
    assert len(rows) == 50
    assert len(rows.unique()) == len(columns.unique()) == 8
    assert (rows == columns).sum() < 25  # the one says nothing of the other
    compiled = torch.compile(augment.cutout(3), fullgraph=True, backend="aot_eager")
    torch.compiler.reset()
    assert torch.equal(compiled(torch.ones(50, 2, 8, 8), random.key(0)), cut)


def test_a_compiled_step_may_recompute() -> None:
    optimizer = sgd(0.1)
    compiled = torch.compile(make_step(TINY, optimizer, remat=True), fullgraph=True, backend="aot_eager")
    a, _ = make_step(TINY, optimizer)(start(TINY, optimizer), batch(0), random.key(1))
    b, _ = compiled(start(TINY, optimizer), batch(0), random.key(1))
    close(a, b)


def test_a_train_state_is_begun_with_the_steps_policy() -> None:
    optimizer = sgd(0.1)
    with pytest.raises(ValueError, match="the loss has no scale yet"):
        make_step(TINY, optimizer, policy=POLICIES["float16"])(start(TINY, optimizer), batch(0), random.key(1))
    scaled = start(TINY, optimizer, policy=POLICIES["float16"])
    after, _ = make_step(TINY, optimizer)(scaled, batch(0), random.key(1))
    plain, _ = make_step(TINY, optimizer)(start(TINY, optimizer), batch(0), random.key(1))
    assert equal(after._replace(extra={}), plain)


def test_inference_mode_changes_no_gradient() -> None:
    table.need_derivatives_in_inference_mode()
    optimizer = sgd(0.1)
    step = make_step(TINY, optimizer)
    expected, _ = step(start(TINY, optimizer), batch(0), random.key(1))
    with torch.inference_mode():
        found, _ = step(start(TINY, optimizer), batch(0), random.key(1))
    close(found, expected)


def test_derivatives_by_labels() -> None:
    """Also where the labels, as shares, are all that somebody differentiates by."""
    optimizer = sgd(0.1)
    images, labels = batch(0)
    shares = F.one_hot(labels, CLASSES).float().requires_grad_()
    step = make_step(TINY, optimizer)

    def after(shares: Tensor) -> Tensor:
        now, _ = step(start(TINY, optimizer), (images, shares), random.key(1))
        return now.params["head"]["linear"]["weight"].square().sum()

    (found,) = torch.autograd.grad(after(shares), shares)
    torch.testing.assert_close(found, grad(after)(shares.detach()))
    assert found.count_nonzero()


def test_augmentation_and_a_draw_at_the_root_are_different() -> None:
    keys: list[Tensor] = []

    def augmented(images: Tensor, key: Tensor) -> Tensor:
        keys.append(key)
        return images

    step = make_step(TINY, sgd(0.1), augment=augmented)
    step(start(TINY, sgd(0.1)), batch(0), random.key(1))
    assert not torch.equal(keys[0], Mode(key=random.fold_in(random.key(1), 0)).draw_key())


def test_an_average_is_not_left_behind() -> None:
    optimizer = sgd(0.1)
    before = start(TINY, optimizer, average=True)
    with pytest.raises(ValueError, match="keeps an average, which this step would not update"):
        make_step(TINY, optimizer)(before, batch(0), random.key(1))


def test_an_empty_batch_in_parts_moves_nothing() -> None:
    optimizer = sgd(0.1)
    before = start(TINY, optimizer)
    images, labels = batch(0)
    after, metrics = make_step(TINY, optimizer, accumulate=2)(before, (images[:0], labels[:0]), random.key(1))
    assert int(metrics.correct) == 0
    tree.map(lambda x, y: torch.equal(x, y) or pytest.fail("moved"), after.params, before.params)


def test_logits_of_pixels_are_counted_by_pixel() -> None:
    layer = serial(stem=conv(8, 3, padding="same"), head=conv(4, 1, padding="same"))
    model = purecnn.Model.of(layer, num_classes=4, image_size=8)
    params, state = model.init(random.key(0))
    images = random.normal(random.key(1), (3, 3, 8, 8))
    labels = random.bits(random.key(2), (3, 8, 8)) % 4
    optimizer = sgd(0.0)
    _, metrics = make_step(model, optimizer)(TrainState.start(params, state, optimizer), (images, labels))
    logits, _ = model.apply(params, state, images)
    assert metrics.correct == (logits.argmax(1) == labels).sum()
    found = evaluate(model, params, state, [(images, labels)])
    assert found.accuracy == pytest.approx(int(metrics.correct) / labels.numel())
    assert found.loss == pytest.approx(float(metrics.loss))


def test_the_loss_of_1989_takes_shares() -> None:
    outputs = random.normal(random.key(0), (10, 10))  # as many images as classes
    labels = torch.arange(10) % 3
    shares = F.one_hot(labels, 10).float()
    assert torch.equal(squared_error(outputs, shares), squared_error(outputs, labels))


def test_recomputing_has_forward_derivatives() -> None:
    params, state = TINY.init(random.key(0))
    images, _ = batch(0)

    def run(x: Tensor, remat: bool) -> Tensor:
        logits: Tensor = TINY.apply(params, state, x, train=True, key=random.key(1), remat=remat)[0]
        return logits

    expected, found = (
        torch.func.jvp(lambda x, remat=remat: run(x, remat), (images,), (torch.ones_like(images),))[1]
        for remat in (False, True)
    )
    assert torch.equal(found, expected)
