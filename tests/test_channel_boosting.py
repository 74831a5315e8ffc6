"""Channel boosting: frozen learners, stored statistics, and a start at the function of the network as it was."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_rel
from torch import Tensor
from torch.func import grad, vmap
from typer.testing import CliRunner

import purecnn
from converters.cli import app
from converters.recipes import channel_boosting as recipe
from purecnn import Layer, Mode, Model, random, serial, tree
from purecnn.layers import conv, conv_norm, dropout, global_avg_pool, linear, relu, stateless
from purecnn.optimizers import sgd
from purecnn.per_sample import mixes_images, per_sample_gradients
from purecnn.training import TrainState, fit, make_step
from purecnn.tree import Tree
from purecnn.zoo.channel_boosting import auxiliary, channel_boost, features, measured
from tests.table import assert_close

LEARNER = serial(conv1=conv_norm(4, 3), conv2=conv_norm(3, 3, 2))
OTHER = conv(2, 1, bias=True)


def images(count: int = 4, channels: int = 3, size: int = 32, seed: int = 0) -> Tensor:
    return random.normal(random.key(seed), (count, channels, size, size))


def trained(layer: Layer, seed: int, channels: int = 3) -> tuple[Tree, Tree]:
    """Trees of a learner that no initialisation would give, its running statistics too."""
    params, state, _ = layer.init(torch.empty(2, channels, 32, 32, device="meta"), Mode(key=random.key(seed)))
    return params, tree.map(lambda leaf: leaf - 0.25 if leaf.is_floating_point() else leaf + 1, state)


def boosted(name: str, at: str | None = None, **settings: Any) -> tuple[Model, Model, Tree, Tree, Tree, Tree]:
    """A network of the registry, plain and boosted by two learners, with the plain network's values in both."""
    plain = purecnn.create(name, num_classes=5, in_channels=3, **settings)
    model = dataclasses.replace(plain, layer=channel_boost(plain.layer, at, a=auxiliary(LEARNER), b=auxiliary(OTHER)))
    plain_params, plain_state = plain.init(random.key(0))
    params, state = model.init(random.key(1))
    learners = {
        key: measured(layer, *trained(layer, seed), [images(8, seed=9)])
        for key, layer, seed in (("a", LEARNER, 2), ("b", OTHER, 3))
    }
    assert params.keys() == {*plain_params, "boost"}
    return (
        plain,
        model,
        plain_params,
        plain_state,
        {**params, **plain_params},
        {**state, **plain_state, "boost": learners},
    )


def test_kept_numbers_are_no_statistics_of_the_batch() -> None:
    _, model, _, _, params, state = boosted("lenet5")
    x, labels = images(3), torch.tensor([0, 1, 2])
    found = per_sample_gradients(model, params, state, (x, labels), train=True)
    for i in range(3):

        def loss(params: Tree, i: int = i) -> Tensor:
            return F.cross_entropy(model.apply(params, state, x[i : i + 1], train=True)[0], labels[i : i + 1])

        assert_close(tree.map(lambda leaf, i=i: leaf[i], found), grad(loss)(params), rtol=1e-4, atol=1e-6)
    assert not mixes_images(model)


def perturbed(params: Tree, size: float = 0.1) -> Tree:
    """With new columns that are not zero."""
    weight = params["boost"]["weight"]
    return {**params, "boost": {"weight": weight + size * random.normal(random.key(7), weight.shape)}}


NETWORKS = [
    ("lenet5", None, {}),
    ("lenet5", "stage1.conv", {}),
    ("squeezenet1_1", None, {"image_size": 64}),
    ("resnet20_cifar", None, {}),
    ("resnet20_cifar", "stage2.0.conv1", {}),
    ("resnet20_cifar", None, {"norm": "group"}),
]
each_network = pytest.mark.parametrize(("name", "at", "settings"), NETWORKS)


# The start ---------------------------------------------------------------------------------------------------


@each_network
@pytest.mark.parametrize("train", [False, True], ids=["evaluation", "training"])
def test_starts_exactly_at_the_plain_network(name: str, at: str | None, settings: dict[str, Any], train: bool) -> None:
    """Not within rounding: outputs, statistics and gradients are the same to the bit."""
    plain, model, plain_params, plain_state, params, state = boosted(name, at, **settings)
    x = images(size=model.image_size)
    labels = torch.arange(4)
    key = random.key(5)

    def loss(network: Model, state: Tree) -> Callable[[Tree], Any]:
        def of(params: Tree) -> Any:
            logits, after = network.apply(params, state, x, train=train, key=key)
            return F.cross_entropy(logits, labels), (logits, after)

        return of

    expected, (logits, after) = grad(loss(plain, plain_state), has_aux=True)(plain_params)
    found, (same, boosted_after) = grad(loss(model, state), has_aux=True)(params)
    assert torch.equal(logits, same)
    assert all(torch.equal(leaf, tree.flatten(boosted_after)[path]) for path, leaf in tree.flatten(after).items())
    assert all(torch.equal(leaf, tree.flatten(found)[path]) for path, leaf in tree.flatten(expected).items())
    assert found["boost"]["weight"].abs().sum() > 0  # so the next step is another one


def test_is_the_convolution_of_all_channels() -> None:
    """What is computed as a sum is the wide convolution of ``concat(I, A_1, A_2)``, in that order."""
    layer = channel_boost(conv(6, 3, 2, bias=True), a=auxiliary(conv(4, 3)), b=auxiliary(OTHER))
    params, state, _ = layer.init(torch.empty(2, 3, 9, 9, device="meta"), Mode(key=random.key(0)))
    params = perturbed(params)
    for number, name in enumerate("ab"):
        leaf = state["boost"][name]["mean"]
        state["boost"][name] |= {"mean": leaf + number + 1, "std": leaf + number + 2}
    x = images(size=9)
    a, b = (state["boost"][name]["params"] for name in "ab")
    channels = [x, (F.conv2d(x, a["weight"], padding=1) - 1) / 2, (F.conv2d(x, b["weight"], b["bias"]) - 2) / 3]
    wide = torch.cat([params["weight"], params["boost"]["weight"]], dim=1)
    assert wide.shape == (6, 3 + 4 + 2, 3, 3)
    expected = F.conv2d(torch.cat(channels, dim=1), wide, params["bias"], 2, 1)
    found, _ = layer.apply(params, state, x, Mode())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@given(st.permutations(["a", "b", "c"]))
def test_channels_are_in_the_order_of_the_names_given(order: list[str]) -> None:
    """Each learner's own number of channels, each channel its own value: the columns tell whose they are."""
    counts = {"a": 1, "b": 2, "c": 3}
    learners = {
        name: stateless(
            lambda x, n=counts[name]: torch.arange(n, device=x.device).reshape(1, n, 1, 1) + 10 * n + 0 * x[:, :1]
        )
        for name in order
    }
    layer = channel_boost(conv(1, 1), **{name: auxiliary(learner) for name, learner in learners.items()})
    params, state, _ = layer.init(torch.empty(1, 3, 2, 2, device="meta"), Mode(key=random.key(0)))
    expected = [i + 10 * counts[name] for name in order for i in range(counts[name])]
    assert params["boost"]["weight"].shape == (1, 6, 1, 1)
    for column, value in enumerate(expected):
        one = F.one_hot(torch.tensor(column), 6).float().reshape(1, 6, 1, 1)
        y, _ = layer.apply(
            {"weight": params["weight"] * 0, "boost": {"weight": one}}, state, torch.zeros(1, 3, 2, 2), Mode()
        )
        assert torch.equal(y, torch.full((1, 1, 2, 2), float(value)))


def test_learners_of_other_sizes_are_resized() -> None:
    layer = channel_boost(conv(1, 1), a=auxiliary(stateless(lambda x: F.avg_pool2d(x, 2))))
    params, state, _ = layer.init(torch.empty(1, 1, 8, 8, device="meta"), Mode(key=random.key(0)))
    x = images(1, 1, 8)
    y, _ = layer.apply({"weight": params["weight"] * 0, "boost": {"weight": torch.ones(1, 1, 1, 1)}}, state, x, Mode())
    assert torch.equal(y, F.interpolate(F.avg_pool2d(x, 2), (8, 8), mode="bilinear"))


# Frozen learners ---------------------------------------------------------------------------------------------


def test_no_gradient_reaches_the_learners() -> None:
    """Neither as parameters, since they are none, nor by the state; but the image's gradient goes through them."""
    _, model, _, _, params, state = boosted("lenet5")
    params = perturbed(params)
    assert not any("a." in path or "b." in path for path in tree.flatten(params) if path.startswith("boost"))
    floats = {path: leaf for path, leaf in tree.flatten(state).items() if leaf.is_floating_point()}

    def loss(floats: Tree, x: Tensor) -> Tensor:
        merged = tree.unflatten({**tree.flatten(state), **floats})
        return model.apply(params, merged, x)[0].square().sum()

    by_state, by_image = grad(loss, argnums=(0, 1))(floats, images())
    assert len(by_state) >= 10
    assert not any(leaf.any() for leaf in by_state.values())
    silent = tree.map(torch.zeros_like, params["boost"])
    plain = grad(lambda x: model.apply({**params, "boost": silent}, state, x)[0].square().sum())(images())
    assert not torch.allclose(by_image, plain)


def test_training_leaves_the_learners_as_they_are() -> None:
    _, model, _, _, params, state = boosted("resnet20_cifar")
    optimizer = sgd(0.1, momentum=0.9, weight_decay=0.1)
    before = tree.map(torch.clone, state["boost"])
    train_state = TrainState.start(params, state, optimizer)
    step = make_step(model, optimizer)
    for seed in range(2):
        train_state, metrics = step(train_state, (images(seed=seed), torch.arange(4)), random.key(0))
    after = train_state.state["boost"]
    assert all(torch.equal(leaf, tree.flatten(after)[path]) for path, leaf in tree.flatten(before).items())
    assert list(tree.flatten(train_state.opt_state["momentum"])) == list(tree.flatten(params))
    assert train_state.params["boost"]["weight"].any()
    assert torch.isfinite(metrics.loss)


def test_learners_keep_their_own_normalisation_and_mode() -> None:
    """A learner trained with batch normalisation does what it did, also in a network with group normalisation that is
    in training; a learner's dropout is silent."""
    learner = serial(conv=conv_norm(3, 3), drop=dropout(0.5))
    params, state = trained(learner, 2)
    layer, tree_ = auxiliary(learner), measured(learner, params, state, [images()])
    expected, _ = learner.apply(params, state, images(), Mode())
    expected = (expected - tree_["mean"][:, None, None]) / tree_["std"][:, None, None]
    mode = Mode(train=True, batch_statistics=True, key=random.key(0), norm="group")
    found, after = layer.apply({}, tree_, images(), mode)
    assert torch.equal(found, expected)
    assert after is tree_


# Statistics --------------------------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    shift=st.sampled_from([0.0, 10.0, 1e3]),
    scale=st.sampled_from([1e-2, 1.0, 30.0]),
)
def test_measured_are_mean_and_deviation_of_all_images(sizes: list[int], shift: float, scale: float) -> None:
    x = images(sum(sizes), size=4) * scale + shift
    found = measured(stateless(lambda x: x), {}, {}, x.split(sizes))
    torch.testing.assert_close(found["mean"], x.double().mean((0, 2, 3)).float())
    torch.testing.assert_close(found["std"], x.double().std((0, 2, 3), correction=0).float(), rtol=1e-4, atol=0)


def test_channels_are_standardised_by_what_was_measured() -> None:
    """On the training images they have mean 0 and deviation 1; others' mean and deviation change nothing."""
    params, state = trained(LEARNER, 2)
    training = images(16)
    layer, own = auxiliary(LEARNER), measured(LEARNER, params, state, training.split(5))
    y, _ = layer.apply({}, own, training, Mode())
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(y.std((0, 2, 3), correction=0), torch.ones(3), rtol=1e-5, atol=0)
    shifted = 5 * images(3, seed=1) + 2
    together, _ = layer.apply({}, own, shifted, Mode(train=True, batch_statistics=True))
    alone = torch.cat([layer.apply({}, own, x[None], Mode())[0] for x in shifted])
    torch.testing.assert_close(together, alone)  # what stands beside an image in its batch does not matter
    assert together.std() > 2


def test_a_channel_that_never_changes_is_centred() -> None:
    found = measured(stateless(lambda x: torch.zeros_like(x) + 3.3), {}, {}, [images()])
    assert torch.equal(found["std"], torch.ones(3))
    torch.testing.assert_close(found["mean"], torch.full((3,), 3.3))


# Purity and transformations ----------------------------------------------------------------------------------


@each_network
def test_apply_is_pure(name: str, at: str | None, settings: dict[str, Any]) -> None:
    _, model, _, _, params, state = boosted(name, at, **settings)
    x = images(size=model.image_size)
    inputs = [x, *tree.flatten(params).values(), *tree.flatten(state).values()]
    versions = [leaf._version for leaf in inputs]
    first, same = model.apply(params, state, x)
    second, _ = model.apply(params, state, x)
    assert torch.equal(first, second)
    assert same is state
    model.apply(params, state, x, train=True, key=random.key(0))
    assert versions == [leaf._version for leaf in inputs]


def test_an_ensemble_is_its_members() -> None:
    _, model, _, _, _, _ = boosted("lenet5")
    keys = random.split(random.key(3), 2)
    params, state = vmap(model.init)(keys)
    params = perturbed(params)
    logits, _ = vmap(model.apply, in_dims=(0, 0, None))(params, state, images())
    for i in range(2):
        member = [tree.map(lambda leaf, i=i: leaf[i], part) for part in (params, state)]
        torch.testing.assert_close(logits[i], model.apply(*member, images())[0], rtol=1e-4, atol=1e-5)


def test_gradients_of_single_images() -> None:
    _, model, _, _, params, state = boosted("lenet5")
    params = perturbed(params)

    def loss(params: Tree, x: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(model.apply(params, state, x[None])[0], label[None])

    x, labels = images(), torch.arange(4)
    each = vmap(grad(loss), in_dims=(None, 0, 0))(params, x, labels)
    for i in range(4):
        one = grad(loss)(params, x[i], labels[i])
        tree.map(lambda a, b, i=i: torch.testing.assert_close(a[i], b, rtol=1e-4, atol=1e-5), each, one)


def test_rematerialising_loses_no_gradient() -> None:
    """What is computed again is what comes in by the front door; the learners' channels do not."""
    _, model, _, _, params, state = boosted("lenet5")
    params = perturbed(params)

    def loss(params: Tree, remat: bool) -> Tensor:
        logits, _ = model.apply(params, state, images(), train=True, remat=remat)
        return F.cross_entropy(logits, torch.arange(4))

    expected = grad(loss)(params, False)
    tree.map(torch.testing.assert_close, grad(loss)(params, True), expected)


@pytest.mark.parametrize("at", [None, "stage1.conv"])
def test_compiles_in_one_piece(at: str | None) -> None:
    _, model, _, _, params, state = boosted("lenet5", at)
    params = perturbed(params)

    def run(params: Tree, state: Tree, x: Tensor) -> Tensor:
        return model.apply(params, state, x, train=True, key=random.key(0))[0]

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(params, state, images()), run(params, state, images()))


def test_who_looks_from_around_sees_the_new_weights_and_no_learner() -> None:
    _, model, _, _, params, state = boosted("lenet5")
    seen = []

    def around(layer: Layer, params: Tree, state: Tree, x: Any, mode: Mode) -> tuple[Any, Tree]:
        seen.append(mode.path)
        return layer.apply(params, state, x, mode)

    logits, _ = model.apply(params, state, images(), around=around)
    assert torch.equal(logits, model.apply(params, state, images())[0])
    assert sorted(seen) == sorted({path.rpartition(".")[0] for path in tree.flatten(params)})


def test_fit_takes_a_boosted_network() -> None:
    _, model, _, _, params, state = boosted("lenet5")
    batches = [(images(seed=seed), torch.arange(4)) for seed in range(2)]
    fitted = fit(model, sgd(0.01), lambda key: batches, batches, epochs=2, key=random.key(0), start=(params, state))
    assert fitted.history[-1].train_loss < fitted.history[0].train_loss


# Composition and misuse --------------------------------------------------------------------------------------


def test_composes_inside_of_other_layers() -> None:
    """A boosted block may be part of a network, and what a network computes inside may be a learner."""
    block = channel_boost(serial(conv1=conv(4, 3), relu1=relu, conv2=conv(4, 3)), "conv2", a=auxiliary(OTHER))
    net = serial(stem=conv(3, 3), stage1=block, head=serial(global_avg_pool, linear=linear(2)))
    params, state, _ = net.init(torch.empty(1, 3, 8, 8, device="meta"), Mode(key=random.key(0)))
    assert params["stage1"].keys() == {"conv1", "conv2", "boost"}
    assert params["stage1"]["boost"]["weight"].shape == (4, 2, 3, 3)
    x = images(size=8)
    inside = features(net, "stage1.conv1")
    y, _ = inside.apply(params, state, x, Mode())
    assert torch.equal(
        y,
        conv(4, 3).apply(params["stage1"]["conv1"], {}, conv(3, 3).apply(params["stem"], {}, x, Mode())[0], Mode())[0],
    )
    outer = channel_boost(conv(2, 1), a=auxiliary(inside))
    params, state, y = outer.init(torch.empty(1, 3, 8, 8, device="meta"), Mode(key=random.key(0)))
    assert params["boost"]["weight"].shape == (2, 4, 1, 1)
    assert outer.apply(params, state, x, Mode())[0].shape == (4, 2, 8, 8)


def test_nothing_to_boost_with_is_the_network() -> None:
    layer = conv(2, 1)
    assert channel_boost(layer) is layer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: channel_boost(conv(2, 1), "stem.conv", a=auxiliary(OTHER)), "no convolution 'stem.conv'"),
        (lambda: channel_boost(serial(flat=global_avg_pool, fc=linear(2)), a=auxiliary(OTHER)), "there are none"),
        (lambda: channel_boost(conv(3, 1, groups=3), a=auxiliary(OTHER)), "3 groups cannot be boosted"),
        (lambda: channel_boost(conv(3, 1), a=OTHER), "learner 'a' has parameters"),
        (lambda: channel_boost(conv(3, 1), a=auxiliary(global_avg_pool)), r"gives images .* found \(1, 3\)"),
        (
            lambda: channel_boost(conv(3, 1), a=auxiliary(features(serial(c=conv(1, 1)), "d"))),
            "no layer 'd'; there are",
        ),
        (lambda: channel_boost(channel_boost(conv(3, 1), a=auxiliary(OTHER)), b=auxiliary(OTHER)), "boosted already"),
    ],
    ids=["path", "none", "groups", "parameters", "vector", "feature", "twice"],
)
def test_what_is_wrong_is_said(make: Callable[[], Layer], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make().init(torch.empty(1, 3, 8, 8, device="meta"), Mode())


def test_measuring_nothing() -> None:
    with pytest.raises(ValueError, match="no images"):
        measured(OTHER, {}, {}, [])


# The experiment ----------------------------------------------------------------------------------------------


def test_recipe(tmp_path: Path) -> None:
    """One small trial on real digits: every arm is there, and the files are whole."""
    options = ["--seeds", "1", "--labels", "4", "--epochs", "1", "--source-epochs", "1", "--source-images", "40"]
    command = ["recipe", "channel-boosting", *options, "--out", str(tmp_path / "new"), "--json"]
    ran = CliRunner().invoke(app, command, catch_exceptions=False)
    assert ran.exit_code == 0
    result = json.loads(ran.stdout)
    assert list(result["arms"]) == list(recipe.ARMS)
    assert all(len(arm["accuracies"]) == 1 and 0 <= arm["mean"] <= 100 for arm in result["arms"].values())
    assert json.loads((tmp_path / "new" / "results.json").read_text()) == result
    assert {file.name for file in (tmp_path / "new").iterdir()} == {"results.json", "boosting.png"}


def test_all_arms_start_as_one_function() -> None:
    """An arm's initial values are the plain network's, so what differs between arms is the channels alone."""
    plain = purecnn.create("lenet5", in_channels=3)
    model = dataclasses.replace(plain, layer=channel_boost(plain.layer, a=auxiliary(recipe.encoder)))
    params, state = model.init(random.key(0))
    x = images()
    assert torch.equal(model.apply(params, state, x)[0], plain.apply(*plain.init(random.key(0)), x)[0])


def test_noise_is_of_the_image_alone() -> None:
    x, layer = images(size=8), recipe.noise(5)
    y, _ = layer.apply({}, {}, x, Mode())
    assert y.shape == (4, 5, 4, 4)
    assert torch.equal(y[2:], layer.apply({}, {}, x[2:].clone(), Mode())[0])
    assert len({float(value) for value in y[:, 0, 0, 0]}) == 4
    assert abs(float(y.std()) - 1) < 0.1


def test_summary_is_the_paired_t() -> None:
    gains = torch.tensor([1.0, 2.0, 4.0, 0.5, 1.5])
    plain = torch.tensor([50.0, 60.0, 40.0, 55.0, 45.0])
    found = recipe.summary({name: plain.tolist() for name in recipe.BASES} | {"arm": (plain + gains).tolist()})
    for base in recipe.BASES:
        row = found["arm"]["above"][base]
        assert row["t"] == pytest.approx(ttest_rel((plain + gains).numpy(), plain.numpy()).statistic)
        assert row["difference"] == pytest.approx(float(gains.mean()))
    assert found["arm"]["std"] == pytest.approx(float((plain + gains).std()))
