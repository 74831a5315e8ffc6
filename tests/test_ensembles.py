"""Laws of ensembles: members are what they would be alone, and what they say together is what it should be."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.func import vmap

import purecnn
import purecnn.data
from converters.recipes import digit_ensemble
from purecnn import Model, fork, random, serial, tree
from purecnn.augment import Augment
from purecnn.ensembles import (
    cosine_restarts,
    disagreement,
    expected_entropy,
    logits,
    make_ensemble_step,
    mc_dropout,
    mean_probability,
    member_dims,
    mutual_information,
    predictive_entropy,
    reliability,
    snapshots,
    stack,
    start,
    unstack,
    vote,
)
from purecnn.layers import batch_norm, conv, dropout, global_avg_pool, linear, relu
from purecnn.optimizers import Optimizer, adamw, clipped, lamb, sgd
from purecnn.paper import Paper
from purecnn.step import Batch, TrainState, make_step
from tests.table import assert_close, differences

CLASSES = 3
MEMBERS = 3
KEYS = random.split(random.key(0), MEMBERS)


def model_of(**parts: Any) -> Model:
    return Model("tiny", serial(**parts), {}, Paper("", "", 2000, ""), 1, 8)


TINY = model_of(
    stem=serial(conv=conv(4, 3), norm=batch_norm(), relu=relu),
    stage1=serial(conv=conv(6, 3, 2, bias=True), relu=relu, drop=dropout(0.3)),
    head=serial(global_avg_pool, linear=linear(CLASSES)),
)


def batch(seed: int, *members: int, size: int = 6) -> Batch:
    """Noise around the class's brightness."""
    keys = random.split(random.key(seed))
    labels = random.bits(keys[0], (*members, size)) % CLASSES
    return random.normal(keys[1], (*members, size, 1, 8, 8)) + labels[..., None, None, None], labels


def close(a: TrainState, b: TrainState) -> None:
    for x, y in zip(a[:3], b[:3], strict=True):
        assert_close(x, y, rtol=1e-4, atol=1e-6)
    assert torch.equal(a.step, b.step)


def in_head(path: str) -> bool:
    return path.startswith("head.")


def random_logits(members: int, count: int = 5, classes: int = CLASSES, seed: int = 0) -> Tensor:
    return 3 * random.normal(random.key(seed), (members, count, classes), dtype=torch.float64)


# Trees -------------------------------------------------------------------------------------------------------


def test_unstack_is_the_inverse_of_stack_and_copies_nothing() -> None:
    members = [TrainState.start(*TINY.init(key), sgd(0.1, momentum=0.9)) for key in KEYS]
    together = stack(members)
    assert isinstance(together, TrainState)
    for one, again in zip(members, unstack(together), strict=True):
        assert isinstance(again, TrainState)
        for x, y in zip(one[:3], again[:3], strict=True):
            assert differences(x, y) == []
    assert unstack(together)[1].params["stem"]["conv"]["weight"]._base is together.params["stem"]["conv"]["weight"]


def test_stack_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="found none"):
        stack([])
    with pytest.raises(ValueError, match=r"\['a'\] and \[\]"):
        stack([{"a": torch.zeros(1)}, {}])
    with pytest.raises(ValueError, match=r"\['a'\] and \['b'\]"):
        stack([{"a": torch.zeros(1)}, {"b": torch.zeros(1)}])


# Training ----------------------------------------------------------------------------------------------------


OPTIMIZERS = {
    "sgd": sgd(0.1, momentum=0.9, weight_decay=1e-3),
    "adamw": adamw(cosine_restarts(0.01, 2)),
    "lamb": lamb(0.01),
    "clipped": clipped(sgd(0.1), 0.1),
}


@pytest.mark.parametrize("chunk_size", [None, 1, 2], ids=["all", "in turn", "two at a time"])
@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donating"])
@pytest.mark.parametrize("own_batch", [False, True], ids=["shared batch", "own batch"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_members_equal_their_solo_training(
    optimizer: Optimizer, own_batch: bool, donate: bool, chunk_size: int | None
) -> None:
    """Own keys, masks, statistics and, if they like, data; three steps."""
    together = start(*vmap(TINY.init)(KEYS), optimizer)
    alone = [TrainState.start(*TINY.init(key), optimizer) for key in KEYS]
    step = make_ensemble_step(TINY, optimizer, own_batch=own_batch, donate=donate, chunk_size=chunk_size)
    solo = make_step(TINY, optimizer)
    for i in range(3):
        data = batch(i, MEMBERS) if own_batch else batch(i)
        together, metrics = step(together, data, KEYS)
        for j, key in enumerate(KEYS):
            alone[j], found = solo(alone[j], unstack(data)[j] if own_batch else data, key)
            assert_close(metrics.loss[j], found.loss)
            assert metrics.correct[j] == found.correct
    for one, member in zip(alone, unstack(together), strict=True):
        close(member, one)


def test_each_member_has_a_learning_rate_of_its_own() -> None:
    rates = torch.tensor([0.1, 0.01, 0.0])
    together = start(*vmap(TINY.init)(KEYS), sgd(1.0))
    after, _ = make_ensemble_step(TINY, sgd(1.0))(together, batch(0), KEYS, rates)
    for key, rate, member in zip(KEYS, rates.tolist(), unstack(after), strict=True):
        one, _ = make_step(TINY, sgd(rate))(TrainState.start(*TINY.init(key), sgd(rate)), batch(0), key)
        close(member, one)


def test_an_ensemble_of_one_is_the_network_alone() -> None:
    optimizer = sgd(0.1, momentum=0.9)
    key = KEYS[:1]
    together, metrics = make_ensemble_step(TINY, optimizer)(start(*vmap(TINY.init)(key), optimizer), batch(0), key)
    one, found = make_step(TINY, optimizer)(TrainState.start(*TINY.init(key[0]), optimizer), batch(0), key[0])
    close(unstack(together)[0], one)
    assert_close(metrics.loss[0], found.loss)


def test_permuted_members_are_permuted() -> None:
    order = [2, 0, 1]
    optimizer = adamw(0.01)
    step = make_ensemble_step(TINY, optimizer)
    straight, _ = step(start(*vmap(TINY.init)(KEYS), optimizer), batch(0), KEYS)
    permuted, _ = step(start(*vmap(TINY.init)(KEYS[order]), optimizer), batch(0), KEYS[order])
    for i, member in zip(order, unstack(permuted), strict=True):
        close(member, unstack(straight)[i])


def test_the_step_is_pure_unless_it_donates() -> None:
    optimizer = sgd(0.1, momentum=0.9)
    for donate in (False, True):
        before = start(*vmap(TINY.init)(KEYS), optimizer)
        leaves = [leaf for each in (before.params, before.opt_state) for leaf in tree.flatten(each).values()]
        values = [leaf.clone() for leaf in leaves]
        after, _ = make_ensemble_step(TINY, optimizer, donate=donate)(before, batch(0), KEYS)
        new = [leaf for each in (after.params, after.opt_state) for leaf in tree.flatten(each).values()]
        assert all(torch.equal(leaf, value) for leaf, value in zip(leaves, values, strict=True)) is not donate
        assert [leaf.data_ptr() for leaf in leaves] == [leaf.data_ptr() for leaf in new] or not donate
        assert not any(leaf.requires_grad for leaf in new)


def test_it_is_the_mapped_step() -> None:
    """``vmap(make_step(...))`` does the same, by formulas instead of kernels."""
    optimizer = sgd(0.1, momentum=0.9)
    members = vmap(lambda key: TrainState.start(*TINY.init(key), optimizer))(KEYS)
    mapped, _ = vmap(make_step(TINY, optimizer), in_dims=(0, None, 0))(members, batch(0), KEYS)
    together, _ = make_ensemble_step(TINY, optimizer)(start(*vmap(TINY.init)(KEYS), optimizer), batch(0), KEYS)
    close(together, mapped)


def test_augmentation_draws_with_each_members_key() -> None:
    augment: Augment = lambda images, key: images + random.normal(key, images.shape)  # noqa: E731
    optimizer = sgd(0.1)
    together, _ = make_ensemble_step(TINY, optimizer, augment=augment)(
        start(*vmap(TINY.init)(KEYS), optimizer), batch(0), KEYS
    )
    for key, member in zip(KEYS, unstack(together), strict=True):
        one = TrainState.start(*TINY.init(key), optimizer)
        close(member, make_step(TINY, optimizer, augment=augment)(one, batch(0), key)[0])


# Heads on a shared trunk -------------------------------------------------------------------------------------


def heads_on_a_trunk() -> tuple[dict[str, Any], dict[str, Any]]:
    params, state = TINY.init(random.key(5))
    return {**params, "head": vmap(lambda key: TINY.init(key)[0]["head"])(KEYS)}, state


def test_heads_equal_networks_of_their_own() -> None:
    params, state = heads_on_a_trunk()
    optimizer = sgd(0.1, momentum=0.9)
    together = start(params, state, optimizer, trainable=in_head)
    step = make_ensemble_step(TINY, optimizer, trainable=in_head, statistics="running")
    solo = make_step(TINY, optimizer, trainable=in_head, statistics="running")
    heads = unstack(params["head"])
    alone = [TrainState.start({**params, "head": head}, state, optimizer, trainable=in_head) for head in heads]
    for i in range(2):
        together, _ = step(together, batch(i), KEYS)
        alone = [solo(one, batch(i), key)[0] for one, key in zip(alone, KEYS, strict=True)]
    assert differences(together.state, state) == []
    assert differences(together.params["stem"], params["stem"]) == []
    found = logits(TINY, together.params, state, batch(9)[0], mapped=in_head)
    for i, one in enumerate(alone):
        assert_close(unstack(together.params["head"])[i], one.params["head"])
        assert_close(found[i], TINY.apply(one.params, state, batch(9)[0])[0])


@pytest.mark.parametrize("mapped", [None, in_head], ids=["all", "heads"])
@pytest.mark.parametrize("stacked", [False, True], ids=["shared statistics", "own statistics"])
def test_logits_of_members_that_share_statistics_or_not(mapped: Any, stacked: bool) -> None:
    params, state = vmap(TINY.init)(KEYS)
    if mapped is not None:
        params = {**TINY.init(random.key(5))[0], "head": params["head"]}
    state = tree.map(lambda leaf: leaf + torch.arange(MEMBERS).reshape(-1, *[1] * (leaf.ndim - 1)), state)
    if not stacked:
        state = unstack(state)[1]
    found = logits(TINY, params, state, batch(9)[0], mapped=mapped)
    for i, one in enumerate(found):
        own = {**params, "head": unstack(params["head"])[i]} if mapped else unstack(params)[i]
        assert_close(one, TINY.apply(own, unstack(state)[i] if stacked else state, batch(9)[0])[0])


def test_statistics_of_members_are_the_batchs_or_frozen() -> None:
    with pytest.raises(ValueError, match="statistics is 'batch' or 'running', found 'global'"):
        make_ensemble_step(TINY, sgd(0.1), statistics="global")  # type: ignore[arg-type]


def test_the_trunk_runs_once() -> None:
    seen: list[int] = []

    def count(layer: Any, params: Any, state: Any, x: Tensor, mode: Any) -> Any:
        if "weight" in params and params["weight"].ndim == 4:
            seen.append(
                torch._C._functorch.is_batchedtensor(x) or torch._C._functorch.is_batchedtensor(params["weight"])
            )
        return layer.apply(params, state, x, mode)

    params, state = heads_on_a_trunk()
    dims = member_dims(params, in_head)
    found = vmap(lambda *a: TINY.apply(*a, around=count)[0], in_dims=(dims, None, None))(params, state, batch(0)[0])
    assert found.shape == (MEMBERS, 6, CLASSES)
    assert seen == [False, False]


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(ValueError, match="no parameter is chosen"):
        start(*vmap(TINY.init)(KEYS), sgd(0.1), trainable=lambda path: False)


# Several answers from one network ----------------------------------------------------------------------------


def test_snapshots_are_taken_at_the_ends_of_the_cycles() -> None:
    optimizer = sgd(cosine_restarts(0.1, 2), momentum=0.9)
    batches = [batch(i) for i in range(5)]
    begin = TrainState.start(*TINY.init(KEYS[0]), optimizer)
    params, state = snapshots(make_step(TINY, optimizer), begin, batches, 2, random.key(1))
    now, step = begin, make_step(TINY, optimizer, donate=False)
    for i, data in enumerate(batches[:4], 1):
        now, _ = step(now, data, random.key(1))
        if i % 2 == 0:
            assert differences(unstack(params)[i // 2 - 1], now.params) == []
            assert differences(unstack(state)[i // 2 - 1], now.state) == []
    assert logits(TINY, params, state, batch(9)[0]).shape == (2, 6, CLASSES)
    with pytest.raises(ValueError, match="fewer than 9 batches"):
        snapshots(make_step(TINY, optimizer), begin, batches, 9, random.key(1))


def test_masks_of_dropout_are_those_of_their_keys() -> None:
    params, state = TINY.init(KEYS[0])
    x, _ = batch(0)
    found = mc_dropout(TINY, params, state, x, KEYS)
    for i, key in enumerate(KEYS):
        assert_close(found[i], TINY.apply(params, state, x, train=True, statistics="running", key=key)[0])
    assert not torch.equal(found[0], found[1])


def test_masks_of_a_network_with_auxiliary_heads() -> None:
    def head() -> Any:
        return serial(global_avg_pool, linear=linear(CLASSES))

    forked = model_of(main=fork(serial(drop=dropout(0.5), conv=conv(5, 3), head=head()), aux1=head()))
    params, state = forked.init(KEYS[0])
    assert mc_dropout(forked, params, state, batch(0)[0], KEYS).shape == (MEMBERS, 6, CLASSES)


# What members say --------------------------------------------------------------------------------------------


@given(members=st.integers(2, 6), seed=st.integers(0, 100))
def test_disagreement_counts_pairs(members: int, seed: int) -> None:
    found = random_logits(members, seed=seed)
    answers = found.argmax(-1)
    pairs = [(i, j) for i in range(members) for j in range(i)]
    expected = torch.stack([(answers[i] != answers[j]).double() for i, j in pairs]).mean(0)
    torch.testing.assert_close(disagreement(found), expected)


@given(members=st.integers(1, 6), seed=st.integers(0, 100))
def test_uncertainty_is_what_the_members_have_and_what_they_differ_by(members: int, seed: int) -> None:
    found = random_logits(members, seed=seed)
    p = found.softmax(-1)
    mean = mean_probability(found)
    torch.testing.assert_close(mean, p.mean(0))
    torch.testing.assert_close(predictive_entropy(found), -(mean * mean.log()).sum(-1))
    divergence = (p * (p / mean).log()).sum(-1).mean(0)  # of each member from the mean
    torch.testing.assert_close(mutual_information(found), divergence, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(predictive_entropy(found), expected_entropy(found) + mutual_information(found))
    assert (mutual_information(found) <= math.log(min(members, CLASSES)) + 1e-12).all()
    torch.testing.assert_close(vote(found).sum(-1), torch.ones(5, dtype=torch.float64))
    order = torch.arange(members).flip(0)
    for function in (mean_probability, vote, mutual_information):
        torch.testing.assert_close(function(found[order]), function(found))


def test_members_of_one_mind() -> None:
    same = random_logits(1).expand(4, -1, -1)
    assert torch.equal(disagreement(same), torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(mutual_information(same), torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(mean_probability(same), same[0].softmax(-1))


def test_certain_members_have_finite_entropies() -> None:
    sure = torch.tensor([[[1e4, 0.0]], [[0.0, 1e4]]])
    torch.testing.assert_close(predictive_entropy(sure), torch.tensor([math.log(2)]))
    assert expected_entropy(sure) == 0


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"found shape \(5, 3\)"):
        vote(torch.zeros(5, 3))
    with pytest.raises(ValueError, match="at least 2 members"):
        disagreement(torch.zeros(1, 5, 3))
    with pytest.raises(ValueError, match=r"\(4, 2\) and \(3,\)"):
        reliability(torch.zeros(4, 2), torch.zeros(3))
    with pytest.raises(ValueError, match="bins must be at least 1"):
        reliability(torch.zeros(4, 2), torch.zeros(4), bins=0)


@given(count=st.integers(1, 40), bins=st.integers(1, 12), seed=st.integers(0, 100))
def test_calibration_error_is_its_definition(count: int, bins: int, seed: int) -> None:
    probabilities = random_logits(1, count, seed=seed)[0].softmax(-1)
    labels = random.bits(random.key(seed), (count,)) % CLASSES
    found = reliability(probabilities, labels, bins)
    assert int(found.images.sum()) == count
    expected = 0.0
    confidence, answer = probabilities.max(-1)
    for i in range(bins):
        inside = (confidence > i / bins) & (confidence <= (i + 1) / bins)
        if inside.any():
            right = (answer[inside] == labels[inside]).double().mean()
            expected += float((right - confidence[inside].mean()).abs() * inside.sum() / count)
            assert found.accuracy[i] == pytest.approx(float(right))
        else:
            assert found.accuracy[i].isnan()
    assert found.expected_calibration_error == pytest.approx(expected)


def test_a_perfectly_calibrated_answer() -> None:
    probabilities = torch.tensor([[0.75, 0.25]]).expand(4, 2)
    assert reliability(probabilities, torch.tensor([0, 0, 0, 1])).expected_calibration_error == pytest.approx(0)


# The recipe --------------------------------------------------------------------------------------------------


def test_lenets_on_digits_equal_their_solo_training() -> None:
    """In double precision, where rounding stays small, over many steps with data of their own."""
    model = purecnn.create("lenet5")
    optimizer = sgd(0.05, momentum=0.9)
    digits = purecnn.data.load("digits")
    transform = digits.preprocessing.adapt(size=32, channels=1).evaluation()
    images, labels = digit_ensemble.everything(digits.test, transform, torch.device("cpu"), torch.float64)
    params = tree.map(Tensor.double, vmap(model.init)(KEYS)[0])
    together = start(params, {}, optimizer)
    alone = [TrainState.start(own, {}, optimizer) for own in unstack(params)]
    step, solo = make_ensemble_step(model, optimizer, own_batch=True), make_step(model, optimizer)
    for order in digit_ensemble.orders(KEYS, 1, len(images), 24):
        together, _ = step(together, (images[order], labels[order]))
        alone = [solo(one, (images[own], labels[own]))[0] for one, own in zip(alone, order, strict=True)]
    assert together.step.tolist() == [15] * MEMBERS
    for one, member in zip(alone, unstack(together), strict=True):
        assert_close(member.params, one.params, rtol=1e-10, atol=0)


def test_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digit_ensemble.run(tmp_path, members=3, epochs=2, batch_size=16, limit=64, as_json=True)
    found = json.loads((tmp_path / "results.json").read_text())
    assert json.loads(capsys.readouterr().out) == found
    assert len(found["results"]["members"]["accuracy"]) == 3
    assert found["alone"]["answers that are the same"] > 0.9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disagreement.png", "reliability.png", "results.json"]
    for name in ("disagreement.png", "reliability.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 500
    digit_ensemble.run(tmp_path, members=2, epochs=1, limit=32, solo=False)
    assert "alone" not in json.loads((tmp_path / "results.json").read_text())
    assert "ensemble, vote" in capsys.readouterr().out
    with pytest.raises(typer.BadParameter, match="99 is larger than the number of training images, 32"):
        digit_ensemble.run(tmp_path, limit=32, batch_size=99)


def test_each_epoch_has_each_image_once() -> None:
    order = digit_ensemble.orders(KEYS, 1, images=10, batch_size=5)
    assert order.shape == (2, MEMBERS, 5)
    for member in order.unbind(1):
        assert sorted(member.flatten().tolist()) == list(range(10))
    assert not torch.equal(order, digit_ensemble.orders(KEYS, 2, images=10, batch_size=5))


# What does not fit together ----------------------------------------------------------------------------------


def test_members_of_heads_on_one_trunk() -> None:
    model = purecnn.create("lenet5")
    trunk, _ = model.init(random.key(0))
    heads = vmap(lambda key: model.init(key)[0]["head"])(random.split(random.key(0), 8))
    both = {**trunk, "head": heads}
    with pytest.raises(ValueError, match=r"there are 6 in \['stem'\].*, 16 in .*are some leaves shared"):
        unstack(both)
    members = unstack(both, mapped=lambda path: path.startswith("head."))
    assert len(members) == 8
    model.check(members[3], {})
    assert torch.equal(members[3]["head"]["linear"]["weight"], heads["linear"]["weight"][3])
    with pytest.raises(ValueError, match="a leaf's first axis is that of the members"):
        logits(model, trunk, {}, torch.zeros(1, 1, 32, 32))


def test_an_ensemble_for_a_step_of_one_and_one_for_an_ensembles() -> None:
    model, optimizer = purecnn.create("lenet5"), sgd(0.1)
    params, state = model.init(random.key(0))
    batch = torch.zeros(2, 1, 32, 32), torch.tensor([0, 1])
    many = start(*vmap(model.init)(random.split(random.key(0), 3)), optimizer)
    with pytest.raises(ValueError, match="a train state of 3 members is for"):
        make_step(model, optimizer)(many, batch)
    step = make_ensemble_step(model, optimizer)
    with pytest.raises(ValueError, match="the train state is of one network"):
        step(TrainState.start(params, state, optimizer), batch)
    with pytest.raises(ValueError, match=r"key has one for each of 3 members, found \(4, 2\)"):
        step(many, batch, random.split(random.key(0), 4))
    with pytest.raises(ValueError, match=r"learning_rates has one for each of 3 members, found \(2,\)"):
        step(many, batch, None, torch.ones(2))
    averaged = vmap(lambda key: TrainState.start(*model.init(key), optimizer, average=True))(
        random.split(random.key(0), 3)
    )
    with pytest.raises(ValueError, match="an ensemble's step keeps no average"):
        step(averaged, batch)


def test_dropout_says_nothing_of_a_network_without_it() -> None:
    model = purecnn.create("lenet5")
    with pytest.raises(ValueError, match="lenet5 draws nothing in training"):
        mc_dropout(model, *model.init(random.key(0)), torch.zeros(2, 1, 32, 32), random.split(random.key(1), 3))
