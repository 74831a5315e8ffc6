"""Laws of differentially private training; dp-accounting's own examples."""

import importlib
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import vmap
from typer.testing import CliRunner

import purecnn
from purecnn import Mode, random, serial, tree
from purecnn.layers import conv, dropout, global_avg_pool, linear
from purecnn.optimizers import Optimizer, adamw, sgd
from purecnn.per_sample import clipped_gradient_sum, per_sample_norms
from purecnn.privacy import epsilon, make_private_step, noise_for, poisson_sample
from purecnn.training import Batch, TrainState, make_step
from purecnn.tree import Tree
from tests import table

MODEL = purecnn.create("lenet5", num_classes=3)
SIZE = 6


def start(optimizer: Optimizer, model: purecnn.Model = MODEL) -> TrainState:
    return TrainState.start(*model.init(random.key(0)), optimizer)


def batch(size: int = SIZE, seed: int = 1, side: int = 32) -> Batch:
    return random.normal(random.key(seed), (size, 1, side, side)), torch.arange(size) % 3


def moved(before: TrainState, after: TrainState) -> Tree:
    """By the gradient, with SGD and a learning rate of 1."""
    return tree.map(torch.sub, before.params, after.params)


def norm(values: Tree) -> float:
    return float(torch.stack([leaf.double().norm() for leaf in tree.flatten(values).values()]).norm())


# The step ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("microbatch", [None, 4, 100])
@pytest.mark.parametrize("optimizer", [sgd(0.1, momentum=0.9), adamw(1e-2, eps=1e-2)], ids=["sgd", "adamw"])
def test_without_noise_and_clipping_it_is_the_plain_step(optimizer: Optimizer, microbatch: int | None) -> None:
    plain = make_step(MODEL, optimizer)
    private = make_private_step(MODEL, optimizer, clip=math.inf, noise=0.0, expected_batch=SIZE, microbatch=microbatch)
    a = b = start(optimizer)
    for seed in range(3):
        a, expected = plain(a, batch(seed=seed))
        b, found = private(b, batch(seed=seed), random.key(1))
        torch.testing.assert_close(found.loss, expected.loss)
        assert found.correct == expected.correct
    assert b.step == 3
    assert list(tree.flatten(b.params)) == list(tree.flatten(a.params))
    table.assert_close(b.params, a.params, rtol=1e-5, atol=1e-6)


@given(clip=st.floats(1e-3, 10.0), size=st.integers(1, 4), seed=st.integers(0, 1000), microbatch=st.integers(1, 4))
def test_one_image_moves_the_sum_by_at_most_clip(clip: float, size: int, seed: int, microbatch: int) -> None:
    """The sensitivity, on which all accounting rests."""
    step = make_private_step(MODEL, sgd(1.0), clip=clip, noise=0.0, expected_batch=1.0, microbatch=microbatch)
    before = start(sgd(1.0))
    images, labels = batch(size, seed)
    whole = moved(before, step(before, (images, labels), None)[0])
    without = moved(before, step(before, (images[1:], labels[1:]), None)[0])
    # Parameters are single-precision numbers of about 0.1.
    assert norm(tree.map(torch.sub, whole, without)) <= clip * (1 + 1e-5) + 1e-5


def test_noise_has_the_stated_deviation() -> None:
    clip, noise, expected = 0.5, 3.0, 8.0
    step = make_private_step(MODEL, sgd(1.0), clip=clip, noise=noise, expected_batch=expected)
    quiet = make_private_step(MODEL, sgd(1.0), clip=clip, noise=0.0, expected_batch=expected)
    before = start(sgd(1.0))
    key = random.key(2)
    drawn = tree.map(torch.sub, moved(before, step(before, batch(), key)[0]), moved(before, quiet(before, batch())[0]))
    leaves = tree.flatten(drawn)
    for path, leaf in leaves.items():
        if leaf.numel() > 1000:  # a deviation of n numbers is known to 1 / sqrt(2 n)
            scale = clip * noise / expected
            assert abs(float(leaf.std()) / scale - 1) < 5 / math.sqrt(2 * leaf.numel()), path
            assert abs(float(leaf.mean())) < 5 * scale / math.sqrt(leaf.numel()), path
    a, b = (leaves[f"stage2.linear{i}.weight"].flatten()[:10_000] for i in (1, 2))
    assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.05


def test_noise_is_of_the_key_and_the_step() -> None:
    step = make_private_step(MODEL, sgd(0.0, momentum=0.0), clip=1.0, noise=1.0, expected_batch=SIZE)
    loud = make_private_step(MODEL, sgd(1.0), clip=1.0, noise=1.0, expected_batch=SIZE)
    before = start(sgd(1.0))
    first, again = (loud(before, batch(), random.key(1))[0].params for _ in range(2))
    assert table.differences(first, again) == []
    assert len(table.differences(first, loud(before, batch(), random.key(2))[0].params)) == len(tree.flatten(first))
    later = step(before, batch(), random.key(1))[0]
    assert table.differences(later.params, before.params) == []
    assert len(table.differences(first, loud(later, batch(), random.key(1))[0].params)) == len(tree.flatten(first))


def test_step_is_what_one_writes_by_hand() -> None:
    """Each part of the batch has its masks, and the noise has a key of its own."""
    drawing = purecnn.Model.of(
        serial(stem=conv(4, 3), drop=dropout(0.5), head=serial(global_avg_pool, linear=linear(3))),
        num_classes=3, in_channels=1, image_size=8,
    )  # fmt: skip
    clip, noise, expected = 0.5, 2.0, 4.0
    step = make_private_step(drawing, sgd(1.0), clip=clip, noise=noise, expected_batch=expected, microbatch=2)
    before = start(sgd(1.0), drawing)
    images, labels = batch(side=8)
    draw_key, noise_key = random.split(random.fold_in(random.key(1), 0))
    total = {
        path: clip * noise * random.normal(Mode(key=noise_key, path=path).draw_key(), leaf.shape)
        for path, leaf in tree.flatten(before.params).items()
    }
    for i in range(3):
        part = images[2 * i : 2 * i + 2], labels[2 * i : 2 * i + 2]
        key = random.fold_in(draw_key, i)
        found = clipped_gradient_sum(drawing, *before[:2], part, clip=clip, train=True, key=key)
        total = {path: total[path] + leaf for path, leaf in tree.flatten(found.gradient).items()}
    by_hand = tree.unflatten({path: leaf / expected for path, leaf in total.items()})
    table.assert_close(moved(before, step(before, (images, labels), random.key(1))[0]), by_hand)


def test_an_empty_batch_is_noise_alone() -> None:
    images, labels = batch()
    for noise in (0.0, 1.0):
        step = make_private_step(MODEL, sgd(1.0), clip=1.0, noise=noise, expected_batch=SIZE)
        before = start(sgd(1.0))
        after, metrics = step(before, (images[:0], labels[:0]), random.key(1))
        assert (norm(moved(before, after)) > 0) == (noise > 0)
        assert metrics == (0, 0)
        assert after.step == 1


def test_what_is_not_trained_stays() -> None:
    def chosen(path: str) -> bool:
        return path.startswith("head.")

    optimizer = sgd(1.0)
    step = make_private_step(MODEL, optimizer, clip=1.0, noise=1.0, expected_batch=SIZE, trainable=chosen)
    before = TrainState.start(*MODEL.init(random.key(0)), optimizer, trainable=chosen)
    after, _ = step(before, batch(), random.key(1))
    assert all(map(chosen, table.differences(before.params, after.params)))
    assert len(table.differences(before.params, after.params)) == 2


def test_batch_normalisation_is_refused() -> None:
    case = table.CASES["resnet_cifar"]
    settings: dict[str, Any] = {"clip": 1.0, "noise": 0.0, "expected_batch": 2}
    with pytest.raises(ValueError, match=r'build it with norm="group".*statistics="running"'):
        make_private_step(case.model(), sgd(0.1), **settings)
    data = case.images(2), torch.tensor([0, 1])
    for model, more in ((case.model(norm="group"), {}), (case.model(), {"statistics": "running"})):
        before = start(sgd(0.1), model)
        after, _ = make_private_step(model, sgd(0.1), **settings, **more)(before, data)
        assert table.differences(before.state, after.state) == []
        assert table.differences(before.params, after.params)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip": 0.0}, "clip must be positive"),
        ({"noise": -1.0}, "noise must be at least 0"),
        ({"clip": math.inf}, "choose a finite clip"),
        ({"expected_batch": 0}, "expected_batch must be positive"),
        ({"microbatch": 0}, "microbatch must be at least 1"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_private_step(MODEL, sgd(0.1), **{"clip": 1.0, "noise": 1.0, "expected_batch": 2, **settings})


def test_noise_needs_a_key() -> None:
    step = make_private_step(MODEL, sgd(0.1), clip=1.0, noise=1.0, expected_batch=SIZE)
    with pytest.raises(ValueError, match="pass key="):
        step(start(sgd(0.1)), batch())


def test_mapped_over_members() -> None:
    model = purecnn.create("resnet20_cifar", norm="group", depths=(1,), widths=(4,), num_classes=3, in_channels=1)
    step = make_private_step(model, sgd(0.1), clip=1.0, noise=1.0, expected_batch=SIZE)
    keys = random.split(random.key(0), 2)
    members = [TrainState.start(*model.init(key), sgd(0.1)) for key in keys]
    data = batch(side=8)
    alone = [step(member, data, key)[0].params for member, key in zip(members, keys, strict=True)]
    stacked = torch.utils._pytree.tree_map(lambda *leaves: torch.stack(leaves), *members)
    together, _ = vmap(step, in_dims=(0, None, 0))(stacked, data, keys)
    for i in range(2):
        table.assert_close(table.pick(together.params, i), alone[i])


def test_clipping_bites() -> None:
    """The clip is smaller than the gradients, so a step is as long as the clip allows and no longer."""
    before = start(sgd(1.0))
    images, labels = batch(1)
    size = float(per_sample_norms(MODEL, *before[:2], (images, labels), train=True))
    for clip in (size / 2, size * 2):
        after, _ = make_private_step(MODEL, sgd(1.0), clip=clip, noise=0.0, expected_batch=1)(before, (images, labels))
        assert norm(moved(before, after)) == pytest.approx(min(clip, size), rel=1e-4)


# Sampling ----------------------------------------------------------------------------------------------------


def test_poisson_sampling() -> None:
    count, rate, draws = 400, 0.3, 300
    chosen = [poisson_sample(random.key(i), count, rate) for i in range(draws)]
    sizes = torch.tensor([len(indices) for indices in chosen], dtype=torch.float64)
    often = torch.cat(chosen).bincount(minlength=count).double() / draws
    variance = count * rate * (1 - rate)
    assert abs(float(sizes.mean()) - count * rate) < 5 * math.sqrt(variance / draws)
    assert abs(float(sizes.var()) / variance - 1) < 5 * math.sqrt(2 / draws)
    assert float((often - rate).abs().max()) < 5.5 * math.sqrt(rate * (1 - rate) / draws)
    assert all(bool((indices.diff() > 0).all()) for indices in chosen)


def test_at_rate_one_no_word_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "bits", lambda key, shape: torch.full(shape, 2**32 - 1))
    assert len(poisson_sample(random.key(0), 3, 1.0)) == 3


def test_extreme_rates() -> None:
    assert poisson_sample(random.key(0), 5, 1.0).tolist() == [0, 1, 2, 3, 4]
    assert poisson_sample(random.key(0), 5, 0.0).tolist() == []
    words = random.bits(random.key(0), (100_000,))
    least = int(words.min())  # of 32 bits, most of which a float does not have
    assert poisson_sample(random.key(0), len(words), least / 2**32).tolist() == []
    assert poisson_sample(random.key(0), len(words), (least + 1) / 2**32).tolist() == [int(words.argmin())]
    with pytest.raises(ValueError, match="rate must be in"):
        poisson_sample(random.key(0), 5, 1.5)


# Accounting --------------------------------------------------------------------------------------------------


@pytest.fixture
def accountant() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("dp_accounting", reason="dp-accounting is not installed", exc_type=ImportError)


def test_epsilon_equals_the_accountants_own_example(accountant: None) -> None:
    """dp_accounting/pld/pld_privacy_accountant_test.py, test_self_composed_subsampled_gaussian, with its tolerance."""
    assert epsilon(0.5, 0.2, 3, 0.15594) == pytest.approx(1.0, abs=1e-3)


def test_noise_equals_the_accountants_own_example(accountant: None) -> None:
    """dp_accounting/pld/accountant_test.py, test_get_smallest_subsampled_gaussian_noise, "base"."""
    found = noise_for(1.0, 0.01, 1, 1e-5)
    assert found == pytest.approx(0.67379294682, abs=1e-3)
    assert epsilon(found, 0.01, 1, 1e-5) <= 1.0


def test_more_steps_cost_more_and_more_noise_costs_less(accountant: None) -> None:
    some = epsilon(1.0, 0.1, 10, 1e-5)
    assert epsilon(1.0, 0.1, 20, 1e-5) > some > epsilon(1.5, 0.1, 10, 1e-5)
    assert epsilon(0.0, 0.1, 10, 1e-5) == math.inf


def test_without_the_accountant(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(ModuleNotFoundError, match="pip install dp-accounting"):
        epsilon(1.0, 0.1, 10, 1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.0, 0.0, 10, 1e-5), "sampling_rate"),
        ((1.0, 0.1, 0, 1e-5), "steps"),
        ((1.0, 0.1, 10, 1.0), "delta"),
        ((-1.0, 0.1, 10, 1e-5), "negative|positive"),
    ],
)
def test_bad_numbers(arguments: tuple[float, float, int, float], message: str) -> None:
    for function in (epsilon, noise_for):
        with pytest.raises(ValueError, match=message):
            function(*arguments)


# The recipe --------------------------------------------------------------------------------------------------


def recipe() -> Any:
    import typer

    from converters.recipes import private_digits

    app = typer.Typer()
    app.command()(private_digits.run)
    return app


def test_recipe(accountant: None, tmp_path: Path) -> None:
    arguments = ["--data", "digits", "--steps", "2", "--expected-batch", "64", "--out", str(tmp_path), "--json"]
    result = CliRunner().invoke(recipe(), arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found == json.loads((tmp_path / "results.json").read_text())
    assert found["epsilon"] <= 3.0
    assert 0 < found["accuracy"] <= 1
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_recipe_reads_idx_files(tmp_path: Path) -> None:
    import gzip

    from converters.recipes.private_digits import load

    def write(name: str, values: Tensor) -> None:
        head = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
        with gzip.open(tmp_path / name, "wb") as file:
            file.write(head + values.numpy().tobytes())

    write("t10k-images-idx3-ubyte.gz", torch.arange(20 * 28 * 28).reshape(20, 28, 28).to(torch.uint8))
    write("t10k-labels-idx1-ubyte.gz", (torch.arange(20) % 10).to(torch.uint8))
    (images, labels), (test_images, test_labels) = load(str(tmp_path), random.key(0))
    assert images.shape == (18, 1, 32, 32)
    assert test_images.shape == (2, 1, 32, 32)
    assert sorted(torch.cat([labels, test_labels]).tolist()) == sorted([*range(10), *range(10)])


def test_noise_where_hardly_any_is_needed(accountant: None) -> None:
    assert noise_for(1.0, 1e-7, 1, 1e-5) == 0
    assert noise_for(50.0, 1.0, 1, 1e-5) == 1 / 4
    assert epsilon(math.inf, 0.1, 10, 1e-5) == 0
    with pytest.raises(ValueError, match="epsilon must be positive and finite"):
        noise_for(math.inf, 0.1, 10, 1e-5)


def test_a_private_batch_has_as_many_labels_as_images_and_no_average() -> None:
    model = purecnn.create("lenet5")
    params, state = model.init(random.key(0))
    step = make_private_step(model, sgd(0.1), clip=1.0, noise=0.0, expected_batch=4)
    images, labels = torch.zeros(6, 1, 32, 32), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="as many labels as images, found 4 and 6"):
        step(TrainState.start(params, state, sgd(0.1)), (images, labels), random.key(1))
    with pytest.raises(ValueError, match="keeps no average"):
        step(TrainState.start(params, state, sgd(0.1), average=True), (images[:4], labels), random.key(1))
