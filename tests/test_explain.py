"""Laws of explanations, and captum beside them."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from torch.func import grad, vmap
from typer.testing import CliRunner

import purecnn
from converters import checkpoint, cli
from converters import torchvision as tv
from purecnn import data, pictures, random, serial
from purecnn.explain import grad_cam, input_gradient, integrated_gradients, smooth_gradient
from purecnn.layers import conv, flatten, global_avg_pool, linear, relu
from purecnn.model import Model
from purecnn.paper import Paper
from purecnn.tree import Tree
from tests.table import CASES

CLASSES = 4


def model_of(layer: purecnn.Layer) -> Model:
    return Model("tiny", layer, {"num_classes": CLASSES}, Paper("", "", 2000, ""), 2, 8)


AFFINE = model_of(serial(stem=conv(3, 3, bias=True), head=serial(flatten, linear=linear(CLASSES))))
POOLED = model_of(
    serial(
        stem=serial(conv=conv(5, 3, bias=True), relu=relu),
        stage1=serial(conv=conv(6, 3, 2, bias=True), relu=relu),
        head=serial(global_avg_pool, linear=linear(CLASSES)),
    )
)


def network(model: Model, seed: int = 0) -> tuple[Model, Tree, Tree]:
    return model, *model.init(random.key(seed))


def images(batch: int = 3, seed: int = 5) -> Tensor:
    return random.normal(random.key(seed), (batch, 2, 8, 8))


METHODS: dict[str, Callable[..., Tensor]] = {
    "input": input_gradient,
    "smooth": lambda *inputs: smooth_gradient(*inputs, key=random.key(9), samples=5),
    "integrated": lambda *inputs: integrated_gradients(*inputs, steps=5).values,
    "grad-cam": grad_cam,
}
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())


# Laws ------------------------------------------------------------------------------------------------------------


FAMILIES = (
    "lenet5_1998", "lenet", "nin", "highway", "squeezenet", "densenet_cifar", "resnet_cifar", "mobilenet_v3",
    "airbench", "shufflenet_v2", "regnet", "convnext",
)  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str) -> None:
    """Grad-CAM says nothing negative, and what an image's gradient is does not depend on the rest of its batch."""
    case = CASES[name]
    model = case.quiet()
    inputs = network(model)
    x = case.images()
    heat = grad_cam(*inputs, x, 1)
    assert heat.shape[0] == 2
    assert heat[0].numel() > 1
    assert heat.min() >= 0
    target = torch.tensor([1, 3])
    both = input_gradient(*inputs, x, target)
    alone = grad(lambda x: model.apply(*inputs[1:], x)[0][0, 3])(x[1:])
    torch.testing.assert_close(both[1:], alone, rtol=1e-3, atol=1e-4 * float(alone.abs().max()))


@each_method
def test_the_target(method: Callable[..., Tensor]) -> None:
    """A number for all, a class for each, and by default the likeliest."""
    inputs = network(POOLED)
    x = images()
    likeliest = POOLED.apply(*inputs[1:], x)[0].argmax(1)
    torch.testing.assert_close(method(*inputs, x), method(*inputs, x, likeliest))
    torch.testing.assert_close(method(*inputs, x, 2), method(*inputs, x, torch.tensor([2, 2, 2])))
    with pytest.raises(ValueError, match=r"each of 3 images, found shape \(2,\)"):
        method(*inputs, x, torch.tensor([0, 1]))


@each_method
@pytest.mark.parametrize("target", [None, 1, torch.tensor([], dtype=torch.int64)], ids=["none", "one", "each"])
def test_no_images_have_no_explanations(method: Callable[..., Tensor], target: Tensor | int | None) -> None:
    inputs = network(POOLED)
    expected = method(*inputs, images(), 1)[:0]
    found = method(*inputs, images()[:0], target)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype


def test_no_images_have_no_gap() -> None:
    assert integrated_gradients(*network(POOLED), images()[:0]).gap.shape == (0,)


@each_method
def test_pure(method: Callable[..., Tensor]) -> None:
    model, params, state = network(POOLED)
    x = images()
    before = [x.clone(), *(leaf.clone() for leaf in purecnn.tree.flatten(params).values())]
    first = method(model, params, state, x, 1)
    assert torch.equal(first, method(model, params, state, x, 1))
    for old, new in zip(before, [x, *purecnn.tree.flatten(params).values()], strict=True):
        assert torch.equal(old, new)


@each_method
def test_mapped_over_an_ensemble(method: Callable[..., Tensor]) -> None:
    params, state = vmap(POOLED.init)(random.split(random.key(0), 3))
    x = images()
    together = vmap(lambda params, state: method(POOLED, params, state, x))(params, state)
    for i in range(3):
        member, statistics = (purecnn.tree.map(lambda leaf, i=i: leaf[i], part) for part in (params, state))
        torch.testing.assert_close(together[i], method(POOLED, member, statistics, x), rtol=1e-4, atol=1e-6)


@given(st.integers(0, 1000), st.integers(1, 7))
def test_integrated_gradients_of_an_affine_network_are_exact(seed: int, steps: int) -> None:
    """Whatever the number of steps: gradient times way, and complete."""
    inputs = network(AFFINE, seed)
    x, baseline = images(2, seed), images(1, seed + 1)
    values, gap = integrated_gradients(*inputs, x, 1, baseline=baseline, steps=steps)
    torch.testing.assert_close(values, (x - baseline) * input_gradient(*inputs, x, 1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gap, torch.zeros(2), rtol=0, atol=1e-5)


@settings(max_examples=10)
@given(st.integers(0, 1000))
def test_integrated_gradients_are_complete(seed: int) -> None:
    inputs = network(POOLED, seed)
    x, baseline = images(2, seed), images(1, seed + 1)
    values, gap = integrated_gradients(*inputs, x, 1, baseline=baseline, steps=100, chunk_size=200)
    difference = POOLED.apply(*inputs[1:], x)[0][:, 1] - POOLED.apply(*inputs[1:], baseline)[0][:, 1]
    torch.testing.assert_close(values.sum((1, 2, 3)) - difference, gap, rtol=0, atol=1e-6)
    assert gap.abs().max() < 1e-3


def test_chunks_change_nothing() -> None:
    inputs = network(POOLED)
    x = images()
    for method, others in (smooth_gradient, {"key": random.key(1)}), (integrated_gradients, {}):
        whole = method(*inputs, x, 1, chunk_size=1000, **others)
        parts = method(*inputs, x, 1, chunk_size=7, **others)
        torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-6)


def test_smooth_gradient_is_the_mean_over_noise_from_the_key() -> None:
    inputs = network(POOLED)
    x = images() * torch.tensor([0.5, 1.0, 2.0])[:, None, None, None]
    key = random.key(3)
    deviation = 0.2 * (x.flatten(1).max(1).values - x.flatten(1).min(1).values)[:, None, None, None]
    noisy = [x + deviation * random.normal(random.fold_in(key, i), x.shape) for i in range(6)]
    expected = torch.stack([input_gradient(*inputs, each, 1) for each in noisy]).mean(0)
    found = smooth_gradient(*inputs, x, 1, key=key, noise=0.2, samples=6)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        smooth_gradient(*inputs, x, 1, key=key, noise=0.0, samples=2), input_gradient(*inputs, x, 1)
    )


@given(st.integers(0, 1000))
def test_grad_cam_of_a_pooled_network_is_the_class_activation_map(seed: int) -> None:
    """Zhou et al., arXiv:1512.04150: the channels weighted by the last layer's weights."""
    model, params, state = network(POOLED, seed)
    x = images(2, seed)
    activation = model.features(params, state, x)["stage1"]
    cam = torch.einsum("bchw,c->bhw", activation, params["head"]["linear"]["weight"][2])
    torch.testing.assert_close(
        grad_cam(model, params, state, x, 2) * activation[0, 0].numel(), cam.relu(), rtol=1e-4, atol=1e-6
    )


def test_grad_cam_of_any_layer() -> None:
    inputs = network(POOLED)
    assert grad_cam(*inputs, images()).shape == (3, 4, 4)
    assert grad_cam(*inputs, images(), path="stem.conv").shape == (3, 8, 8)
    with pytest.raises(ValueError, match=r"no 'stage7'.*stem, stage1, head"):
        grad_cam(*inputs, images(), path="stage7")
    with pytest.raises(ValueError, match=r"'head.linear' gives no image"):
        grad_cam(*inputs, images(), path="head.linear")


def test_settings_that_make_no_sense() -> None:
    inputs = network(POOLED)
    with pytest.raises(ValueError, match="steps"):
        integrated_gradients(*inputs, images(), steps=0)
    with pytest.raises(ValueError, match="samples"):
        smooth_gradient(*inputs, images(), key=random.key(0), samples=0)
    with pytest.raises(ValueError, match="noise"):
        smooth_gradient(*inputs, images(), key=random.key(0), noise=-1.0)
    with pytest.raises(ValueError, match="chunk_size must be at least 1, found 0"):
        integrated_gradients(*inputs, images(), chunk_size=0)


# captum ----------------------------------------------------------------------------------------------------------


def attr() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("captum.attr", reason="captum is not installed")


def close(ours: Tensor, theirs: Tensor) -> None:
    """Within 1e-4 of the largest."""
    theirs = theirs.detach()
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.fixture(scope="module", params=[("squeezenet1_1", "features"), ("resnet18", "layer3")], ids=lambda p: p[0])
def twins(request: pytest.FixtureRequest) -> tuple[tuple[Model, Tree, Tree], str, nn.Module, nn.Module, Tensor]:
    """One network as two, the layer of ours and of theirs, and images."""
    name, layer = request.param
    model = purecnn.create(name, num_classes=CLASSES)
    # Seed 0 kills all of SqueezeNet's last rectifiers on these images.
    inputs = network(model, 2)
    module = tv.to_module(*inputs).eval()
    path = {"squeezenet1_1": "stage3", "resnet18": "stage3"}[name]
    x = random.normal(random.key(4), (2, 3, 64, 64))
    return inputs, path, module, getattr(module, layer), x


@pytest.mark.parametrize("target", [1, torch.tensor([3, 0])], ids=["one", "each"])
def test_captum(
    twins: tuple[tuple[Model, Tree, Tree], str, nn.Module, nn.Module, Tensor], target: int | Tensor
) -> None:
    captum = attr()
    inputs, path, module, layer, x = twins
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = captum.Saliency(module).attribute(x.clone().requires_grad_(), target, abs=False)
        close(input_gradient(*inputs, x, target), theirs)
        theirs, delta = captum.IntegratedGradients(module).attribute(
            x, torch.full_like(x, 0.1), target, n_steps=20, return_convergence_delta=True
        )
        values, gap = integrated_gradients(*inputs, x, target, baseline=torch.tensor(0.1), steps=20)
        close(values, theirs)
        torch.testing.assert_close(gap, delta.to(gap.dtype).detach(), rtol=1e-3, atol=1e-4)
        theirs = captum.LayerGradCam(module, layer).attribute(x, target, relu_attributions=True)
        close(grad_cam(*inputs, x, target, path=path), theirs[:, 0])


def test_captums_noise_tunnel(
    twins: tuple[tuple[Model, Tree, Tree], str, nn.Module, nn.Module, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With our noise in place of its own, which comes from the global generator."""
    captum = attr()
    inputs, _, module, _, x = twins
    x, key, samples = x[:1], random.key(8), 4
    noise = torch.cat([random.normal(random.fold_in(key, i), x.shape) for i in range(samples)])
    monkeypatch.setattr(torch, "normal", lambda mean, std: mean + std * noise)
    deviation = 0.15 * float(x.max() - x.min())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tunnel = captum.NoiseTunnel(captum.Saliency(module))
        theirs = tunnel.attribute(x, nt_samples=samples, stdevs=deviation, target=1, abs=False)
    close(smooth_gradient(*inputs, x, 1, key=key, samples=samples), theirs)


# The command and its picture ---------------------------------------------------------------------------------------


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    digits = data.load("digits")
    model = purecnn.create("lenet5")
    prepare = digits.preprocessing.adapt(size=32)
    checkpoint.save("net.safetensors", *network(model), preprocessing=prepare, classes=digits.classes)
    for name, index in ("a.png", 0), ("b.png", 1):
        digits.test[index][0].save(name)
    words = ["--from", "net.safetensors", "--out", "why/why.png"]
    result = CliRunner().invoke(cli.app, ["explain", "a.png", *words, "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["picture"] == "why/why.png"
    (found,) = report["images"]
    assert found["image"] == "a.png"
    assert set(found["peaks"]) == {"grad-cam", "integrated", "smooth", "input"}
    assert all(0 < share < 1 for peak in found["peaks"].values() for share in peak)
    assert abs(found["integrated_gap"]) < 0.1
    assert np.asarray(Image.open("why/why.png")).std() > 10
    words = ["explain", "a.png", "b.png", *words, "--method", "grad-cam"]
    result = CliRunner().invoke(cli.app, words, catch_exceptions=False)
    assert "a.png: " in result.stdout
    assert "b.png: " in result.stdout
    assert CliRunner().invoke(cli.app, ["explain", "c.png", "--from", "net.safetensors"]).exit_code == 2


def test_picture_of_maps_of_any_size(tmp_path: Path) -> None:
    path = tmp_path / "why.png"
    wide = Image.new("RGB", (900, 200), (10, 200, 30))
    maps = {"dark": np.zeros((3, 7)), "fine": np.random.default_rng(0).random((400, 900))}
    rows = [(wide, "$a name$ " * 20, maps), (Image.new("L", (8, 8), 90), "no map", {})]
    pictures.explanations(rows, path)
    assert np.asarray(Image.open(path)).std() > 10
    with pytest.raises(ValueError, match="no explanations"):
        pictures.explanations([], path)
    with pytest.raises(ValueError, match="two axes"):
        pictures.explanations([(wide, "", {"x": np.zeros(3)})], path)


def test_a_target_may_be_numpys() -> None:
    model = purecnn.create("lenet5")
    inputs = (model, *model.init(random.key(0)), random.normal(random.key(1), (2, 1, 32, 32)))
    assert torch.equal(input_gradient(*inputs, np.int64(3)), input_gradient(*inputs, 3))


@pytest.mark.parametrize("target", [-1, 10])
def test_there_is_no_such_class(target: int) -> None:
    model = purecnn.create("lenet5")
    with pytest.raises(ValueError, match=rf"targets are classes from 0 to 9, found \[0, {target}\]"):
        input_gradient(model, *model.init(random.key(0)), torch.zeros(2, 1, 32, 32), torch.tensor([0, target]))
    with pytest.raises(ValueError, match=f"target is a class from 0 to 9, found {target}"):
        input_gradient(model, *model.init(random.key(0)), torch.zeros(1, 1, 32, 32), target=target)
