"""``init`` draws from the distributions that torchvision's builders draw from, parameter by parameter."""

import dataclasses
from typing import Any

import pytest
import torch
from scipy.stats import ks_2samp
from torch import Tensor
from torchvision import models

import purecnn
from converters import torchvision as tv
from purecnn import random, serial, tree
from purecnn.layers import global_avg_pool, linear
from tests.table import PEERS, TABLE, family

# In the default run one of each family, the smallest, and both versions of those that have two.
FEW = {
    "alexnet", "vgg11_bn", "googlenet", "inception_v3", "resnet18", "resnext50_32x4d", "squeezenet1_1", "densenet121",
    "mobilenet_v2", "shufflenet_v2_x0_5", "mnasnet0_5", "mobilenet_v3_small", "efficientnet_b0", "efficientnet_v2_s",
    "regnet_x_400mf", "regnet_y_400mf", "convnext_tiny",
}  # fmt: skip
NAMES = [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in PEERS]


def sample(values: Tensor) -> Tensor:
    """At most two thousand values, from all over the tensor."""
    flat = values.flatten()
    return flat[:: max(1, len(flat) // 2000)]


@pytest.mark.parametrize(
    "name", [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in PEERS]
)
def test_initial_values_have_torchvisions_distribution(name: str) -> None:
    torch.manual_seed(0)
    settings = {"init_weights": True} if TABLE[name].peer else {}
    theirs = models.get_model(name, weights=None, **settings).state_dict()
    model = purecnn.create(name)
    ours = tv.to_state_dict(model, *model.init(random.key(0)))
    for key, expected in theirs.items():
        if expected.numel() == 1 or expected.std() == 0:
            assert torch.equal(ours[key], expected), key
        else:
            assert ours[key].std() > 0, key
            # Of ten thousand tensors in all models, not one should be rejected by chance.
            assert ks_2samp(sample(ours[key]), sample(expected)).pvalue > 1e-7, key


def test_every_family_is_in_the_default_run() -> None:
    assert {family(name) for name in FEW} == {family(name) for name in PEERS}


@pytest.mark.parametrize(
    ("name", "path", "std"),
    [
        ("lenet5", "stage1.conv.weight", 2.4 / 150 / 3**0.5),
        ("alexnet", "stage3.linear1.weight", 0.01),
        ("vgg11_bn", "stage1.conv1.weight", 0.1),
        ("resnet18", "stage2.0.conv1.weight", (2 / 576) ** 0.5),
    ],
)
def test_the_papers_law_on_request(name: str, path: str, std: float) -> None:
    model = purecnn.create(name)
    drawn, default = (tree.flatten(model.init(random.key(0), law=law)[0]) for law in ("paper", None))
    assert float(drawn[path].std()) == pytest.approx(std, rel=0.05)
    assert float(default[path].std()) != pytest.approx(std, rel=0.05)


@pytest.mark.parametrize("law", ["papr", 0.5])
def test_what_is_no_law_is_refused(law: Any) -> None:
    with pytest.raises(ValueError, match=rf"law is 'paper', a function law\(path, shape\) or None, found {law!r}"):
        purecnn.create("lenet5").init(random.key(0), law=law)


@pytest.mark.parametrize("name", ["mine", "vgg11"])
def test_a_layer_of_ones_own_has_no_paper(name: str) -> None:
    """Nor that of a network which happens to have its name."""
    layer = serial(global_avg_pool, linear=linear(5))
    model = purecnn.Model.of(layer, num_classes=5, image_size=8, name=name)
    with pytest.raises(ValueError, match=f"'{name}' has a layer .* no paper: law is a function or None"):
        model.init(random.key(0), law="paper")


def test_a_wrapped_network_keeps_its_paper() -> None:
    plain = purecnn.create("lenet5")
    wrapped = dataclasses.replace(plain, layer=serial(plain.layer))
    drawn, expected = (tree.flatten(model.init(random.key(0), law="paper")[0]) for model in (wrapped, plain))
    assert all(torch.equal(drawn[path], leaf) for path, leaf in expected.items())


def test_alexnets_biases_of_the_paper() -> None:
    params, _ = purecnn.create("alexnet").init(random.key(0), law="paper")
    biases = {path: leaf for path, leaf in tree.flatten(params).items() if path.endswith("bias")}
    ones = [path for path, leaf in biases.items() if torch.equal(leaf, torch.ones_like(leaf))]
    assert ones == [
        "stage1.conv.bias",
        *(f"stage2.conv{i}.bias" for i in (2, 3)),
        *(f"stage3.linear{i}.bias" for i in (1, 2)),
    ]
    assert all(not leaf.count_nonzero() for path, leaf in biases.items() if path not in ones)


def test_a_law_of_ones_own() -> None:
    model = purecnn.create("resnet18")
    zero = lambda path, shape: 0.0 if path.endswith("norm2.weight") else None  # noqa: E731
    params, _ = model.init(random.key(0), law=zero)
    default, _ = model.init(random.key(0))
    for (path, a), b in zip(tree.flatten(params).items(), tree.flatten(default).values(), strict=True):
        if path.endswith("norm2.weight"):
            assert not a.count_nonzero()
        else:
            assert torch.equal(a, b)


def test_a_law_is_asked_for_each_parameter_and_for_nothing_else() -> None:
    model = purecnn.create("resnet18")
    asked: dict[str, tuple[int, ...]] = {}

    def law(path: str, shape: tuple[int, ...]) -> float:
        asked[path] = shape
        return 0.5

    _, state = model.init(random.key(0), law=law)
    assert asked == {path: tuple(leaf.shape) for path, leaf in tree.flatten(model.spec()[0]).items()}
    tree.map(torch.testing.assert_close, state, model.init(random.key(0))[1])
