"""Laws of attacks, and captum beside them."""

import warnings
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, vmap

import purecnn
from converters import torchvision as tv
from purecnn import random, serial
from purecnn.adversarial import fgsm, pgd
from purecnn.layers import conv, global_avg_pool, linear, relu
from purecnn.model import Model
from purecnn.paper import Paper
from purecnn.tree import Tree

CLASSES = 4
TINY = Model(
    "tiny",
    serial(
        stem=serial(conv=conv(5, 3, bias=True), relu=relu),
        stage1=serial(conv=conv(6, 3, 2, bias=True), relu=relu),
        head=serial(global_avg_pool, linear=linear(CLASSES)),
    ),
    {"num_classes": CLASSES},
    Paper("", "", 2000, ""),
    2,
    8,
)
NETWORK = (TINY, *TINY.init(random.key(0)))
Norm = Literal["inf", "2"]


def batch(seed: int = 5, size: int = 3) -> tuple[Tensor, Tensor]:
    """Images from 0 to 1."""
    key = random.key(seed)
    return random.uniform(key, (size, 2, 8, 8)), torch.arange(size) % CLASSES


def losses(x: Tensor, labels: Tensor, network: tuple[Model, Tree, Tree] = NETWORK) -> Tensor:
    model, params, state = network
    return F.cross_entropy(model.apply(params, state, x)[0], labels, reduction="none")


def size(change: Tensor, norm: Norm) -> Tensor:
    return torch.linalg.vector_norm(change.flatten(1), ord=float(norm), dim=1)


@given(
    st.integers(0, 1000),
    st.sampled_from(["inf", "2"]),
    st.floats(0.0, 2.0),
    st.integers(1, 4),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_no_change_exceeds_epsilon_or_the_bounds(
    seed: int, norm: Norm, epsilon: float, steps: int, start: bool, bounded: bool, targeted: bool
) -> None:
    x, labels = batch(seed)
    attacked = pgd(
        *NETWORK, x, labels, epsilon=epsilon, step_size=0.7 * epsilon, steps=steps, norm=norm,
        bounds=(0.0, 1.0) if bounded else None, key=random.key(seed + 1) if start else None, targeted=targeted,
    )  # fmt: skip
    assert attacked.isfinite().all()
    assert (size(attacked - x, norm) <= epsilon * (1 + 1e-5) + 1e-6).all()
    if bounded:
        assert attacked.min() >= 0
        assert attacked.max() <= 1


def test_one_step_is_the_fast_gradient_sign_method() -> None:
    x, labels = batch()
    gradient = grad(lambda x: losses(x, labels).sum())(x)
    expected = (x + 0.1 * gradient.sign()).clamp(0, 1)
    torch.testing.assert_close(fgsm(*NETWORK, x, labels, epsilon=0.1, bounds=(0, 1)), expected)
    one = pgd(*NETWORK, x, labels, epsilon=0.1, step_size=0.1, steps=1, bounds=(0, 1))
    assert torch.equal(fgsm(*NETWORK, x, labels, epsilon=0.1, bounds=(0, 1)), one)


def test_a_euclidean_step_follows_the_gradient() -> None:
    x, labels = batch()
    gradient = grad(lambda x: losses(x, labels).sum())(x)
    change = pgd(*NETWORK, x, labels, epsilon=1.0, step_size=0.5, steps=1, norm="2") - x
    torch.testing.assert_close(size(change, "2"), torch.full((3,), 0.5))
    torch.testing.assert_close(F.cosine_similarity(change.flatten(1), gradient.flatten(1)), torch.ones(3))


def test_a_euclidean_step_has_its_size_where_gradients_are_tiny() -> None:
    """A confident network's gradients have squares that are zero in single precision."""
    x, _ = batch(size=2)
    model, params, state = NETWORK
    head = {"weight": params["head"]["linear"]["weight"] / 100, "bias": torch.tensor([60.0, 0.0, 0.0, 0.0])}
    confident = {**params, "head": {"linear": head}}
    zeros = torch.zeros(2, dtype=torch.int64)
    attacked = pgd(model, confident, state, x, zeros, epsilon=5.0, step_size=0.1, steps=1, norm="2")
    torch.testing.assert_close(size(attacked - x, "2"), torch.full((2,), 0.1), rtol=1e-3, atol=0)


@settings(max_examples=10)
@given(st.integers(0, 1000), st.sampled_from(["inf", "2"]))
def test_the_loss_rises_and_falls_if_targeted(seed: int, norm: Norm) -> None:
    x, labels = batch(seed, 8)
    epsilon = {"inf": 0.1, "2": 0.5}[norm]
    common: dict[str, Any] = {"epsilon": epsilon, "step_size": epsilon / 4, "steps": 6, "norm": norm}
    before = losses(x, labels).mean()
    assert losses(pgd(*NETWORK, x, labels, **common), labels).mean() > before
    assert losses(pgd(*NETWORK, x, labels, **common, targeted=True), labels).mean() < before
    if norm == "inf":
        assert losses(fgsm(*NETWORK, x, labels, epsilon=epsilon), labels).mean() > before


def test_epsilon_and_bounds_by_channel() -> None:
    """An attack on normalised images is the attack on the pixels."""
    x, labels = batch()
    mean, std = torch.tensor([0.4, 0.6])[:, None, None], torch.tensor([0.2, 0.5])[:, None, None]
    model, params, state = NETWORK
    normalising = Model(
        "n", purecnn.serial(purecnn.layers.stateless(lambda x: (x - mean) / std), model.layer), {}, model.paper, 2, 8
    )
    of_pixels = pgd(
        normalising,
        params,
        state,
        x,
        labels,
        epsilon=0.1,
        step_size=0.03,
        steps=3,
        bounds=(0.0, 1.0),
        key=random.key(3),
    )
    of_normalised = pgd(
        *NETWORK, (x - mean) / std, labels, epsilon=0.1 / std, step_size=0.03 / std, steps=3,
        bounds=(-mean / std, (1 - mean) / std), key=random.key(3),
    )  # fmt: skip
    torch.testing.assert_close((of_pixels - mean) / std, of_normalised)


@pytest.mark.parametrize("norm", ["inf", "2"])
def test_random_starts(norm: Norm) -> None:
    """They fill the ball, and each is that of its key."""
    x, labels = torch.full((400, 2, 8, 8), 0.5), torch.zeros(400, dtype=torch.int64)
    common: dict[str, Any] = {"epsilon": 0.3, "step_size": 0.0, "steps": 1, "norm": norm}
    change = pgd(*NETWORK, x, labels, key=random.key(1), **common) - x
    again = pgd(*NETWORK, x, labels, key=random.key(1), **common) - x
    other = pgd(*NETWORK, x, labels, key=random.key(2), **common) - x
    assert torch.equal(change, again)
    assert not torch.equal(change, other)
    assert change.mean().abs() < 0.01
    if norm == "inf":  # uniform on -0.3 to 0.3
        assert change.std() == pytest.approx(0.3 / 3**0.5, rel=0.02)
    else:  # the radius's share, to the power of the dimension, is uniform
        shares = (size(change, "2") / 0.3) ** 128
        assert shares.mean() == pytest.approx(0.5, abs=0.05)
        assert shares.std() == pytest.approx(1 / 12**0.5, abs=0.04)


@pytest.mark.parametrize("norm", ["inf", "2"])
def test_images_do_not_know_of_each_other_and_vmap_runs_an_ensemble(norm: Norm) -> None:
    x, labels = batch()
    common: dict[str, Any] = {"epsilon": 0.2, "step_size": 0.1, "steps": 3, "norm": norm}
    together = pgd(*NETWORK, x, labels, **common)
    torch.testing.assert_close(together[1:2], pgd(*NETWORK, x[1:2], labels[1:2], **common))
    params, state = vmap(TINY.init)(random.split(random.key(0), 2))
    mapped = vmap(lambda params, state: pgd(TINY, params, state, x, labels, **common))(params, state)
    for i in range(2):
        member = purecnn.tree.map(lambda leaf, i=i: leaf[i], params)
        torch.testing.assert_close(mapped[i], pgd(TINY, member, {}, x, labels, **common))


def test_pure() -> None:
    x, labels = batch()
    before = x.clone()
    first = pgd(*NETWORK, x, labels, epsilon=0.1, step_size=0.1, steps=2, key=random.key(0))
    second = pgd(*NETWORK, x, labels, epsilon=0.1, step_size=0.1, steps=2, key=random.key(0))
    assert torch.equal(first, second)
    assert torch.equal(x, before)


def test_the_networks_own_loss() -> None:
    model = purecnn.create("lenet5_1998")
    network = model, *model.init(random.key(0))
    x, labels = random.normal(random.key(1), (2, 1, 32, 32)), torch.tensor([3, 8])
    attacked = fgsm(*network, x, labels, epsilon=0.01)
    before, after = (model.loss(model.apply(*network[1:], each)[0], labels) for each in (x, attacked))
    assert after > before


def test_settings_that_make_no_sense() -> None:
    x, labels = batch()
    by_channel = {"norm": "2", "epsilon": torch.ones(3, 1, 1)}
    for wrong in {"norm": "1"}, {"steps": 0}, {"epsilon": -0.1}, by_channel:
        common: dict[str, Any] = {"epsilon": 0.1, "step_size": 0.1, "steps": 1, **wrong}
        with pytest.raises(ValueError, match=[*wrong][-1]):
            pgd(*NETWORK, x, labels, **common)


@pytest.mark.parametrize("targeted", [False, True])
def test_captum(targeted: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        captum = pytest.importorskip("captum.robust", reason="captum is not installed")
    model = purecnn.create("squeezenet1_1", num_classes=CLASSES)
    network = model, *model.init(random.key(2))
    module = tv.to_module(*network).eval()
    x, labels = random.uniform(random.key(4), (2, 3, 64, 64)), torch.tensor([1, 3])

    def criterion(logits: Tensor, labels: Tensor) -> Tensor:
        # captum takes gradients below 1e-6 for zero.
        return 1e6 * F.cross_entropy(logits, labels, reduction="none")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = captum.FGSM(module, criterion, 0.0, 1.0).perturb(x, 0.05, labels, targeted=targeted)
        ours = fgsm(*network, x, labels, epsilon=0.05, bounds=(0.0, 1.0), targeted=targeted)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        theirs = captum.PGD(module, criterion, 0.0, 1.0).perturb(x, 0.05, 0.02, 4, labels, targeted=targeted)
        ours = pgd(*network, x, labels, epsilon=0.05, step_size=0.02, steps=4, bounds=(0.0, 1.0), targeted=targeted)
    # Where a gradient is zero but for rounding, its sign is open.
    assert ((ours - theirs).abs() > 1e-5).double().mean() < 1e-3


def test_images_beyond_the_bounds_are_refused() -> None:
    x, labels = 3 * random.normal(random.key(1), (2, 2, 8, 8)), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="exceed the bounds, which are in the images' own units"):
        fgsm(*NETWORK, x, labels, epsilon=0.1, bounds=(0, 1))
