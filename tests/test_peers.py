"""pytorchcv's and timm's networks beside ours: the same outputs, gradients and statistics."""

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

import purecnn
from converters import checkpoint, peers_shared, pytorchcv, timm
from converters.library import Library
from converters.rules import ConversionError, leaves
from purecnn import data, random
from tests.table import (
    TABLE,
    assert_close,
    assert_computes_as,
    differences,
    drawn_state_dict,
    trained_tensors,
)
from tests.test_cli import call

LIBRARIES = {"pytorchcv": pytorchcv.LIBRARY, "timm": timm.LIBRARY}
PAIRS = [("pytorchcv", name) for name in pytorchcv.FAMILIES] + [("timm", name) for name in timm.FAMILIES]

SMALL = {("timm", "nasnet_a_large"), ("timm", "pnasnet5_large")} | {
    (library, name) for library in LIBRARIES for name in ("dpn98", "dpn107", "dpn131", "resnest101", *peers_shared.TIMM)
}
"""Large networks, compared at a smaller size of images; NASNet and PNASNet also with pytorchcv at the published one."""


def bare(library: str, name: str) -> dict[str, Any]:
    """What a library's network lacks of ours."""
    return peers_shared.BARE.get(name, {}) if library == "timm" else {}


@pytest.mark.parametrize(("library", "name"), PAIRS)
def test_model_equals_the_library_s(library: str, name: str) -> None:
    pytest.importorskip(library, reason=f"{library} is not installed: nox -s peers has it")
    found: Library = LIBRARIES[library]
    model = purecnn.create(name, **dict.fromkeys(TABLE[name].draws, 0.0), **bare(library, name))
    module = found.to_module(model, *model.init(random.key(0)))
    state_dict = drawn_state_dict(module)
    module.load_state_dict(state_dict)
    params, state = found.from_state_dict(model, module.state_dict())
    assert differences(found.to_state_dict(model, params, state), state_dict) == []

    for layer in module.modules():
        if isinstance(layer, nn.Dropout | nn.Dropout2d):
            layer.p = 0.0

    # Some pool the published size of images alone.
    size = 96 if (library, name) in SMALL else model.image_size
    x = random.normal(random.key(1), (2, model.in_channels, size, size))
    # CBAM's perceptron sees means and maxima at once: another order of sums, other maxima.
    assert_computes_as(
        model,
        params,
        state,
        module,
        x,
        lambda: found.from_state_dict(model, trained_tensors(module)),
        single=name != "cbam_resnet50",
    )


@pytest.mark.parametrize("name", timm.NAMES)
def test_functions_of_timms_published_weights(name: str) -> None:
    peer = pytest.importorskip("timm", reason="timm is not installed: nox -s peers has it")
    assert peer.is_model_pretrained(timm.NAMES[name])
    model, module = purecnn.create(name, **bare("timm", name)), peer.create_model(timm.NAMES[name])
    module.load_state_dict(drawn_state_dict(module))
    params, state = timm.from_state_dict(model, module.state_dict())
    x = random.normal(random.key(1), (1, 3, 96, 96))
    bound = 0.03 if name == "nasnet_a_large" else 1e-6  # timm's means count the padding where the image shrinks
    with torch.no_grad():
        assert_close(model.apply(params, state, x)[0], module.eval()(x), rtol=bound, atol=0)


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> Any:
    """timm, whose published weights are drawn instead of downloaded."""
    peer = pytest.importorskip("timm", reason="timm is not installed: nox -s peers has it")
    create = peer.create_model

    def draw(name: str, pretrained: bool = False, **settings: Any) -> nn.Module:
        assert not pretrained or peer.is_model_pretrained(name)
        module: nn.Module = create(name, **settings)
        module.load_state_dict(drawn_state_dict(module))
        return module

    monkeypatch.setattr(peer, "create_model", draw)
    return peer


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("resnet18", None),
        ("convnext_tiny", "convnext_tiny.fb_in22k_ft_in1k"),
        ("efficientnet_b0", None),
        ("dpn68", None),
        ("nasnet_a_large", None),
    ],
)
def test_published_weights_of_timm(untrained: Any, name: str, weights: str | None) -> None:
    model = purecnn.create(name, image_size=96)
    params, state = timm.pretrained(model, weights)
    module = untrained.create_model(weights or timm.NAMES[name])
    assert differences(timm.to_state_dict(model, params, state), module.state_dict()) == []
    about, preprocessing, origin = timm.about(model, weights)
    assert (about.num_classes, about.image_size, about.in_channels) == (1000, preprocessing.size, 3)
    assert origin["weights"] == f"timm/{weights or timm.NAMES[name]}"
    settings = untrained.data.resolve_data_config(model=module)
    picture = data.read_image(io.BytesIO(_picture()))
    theirs = untrained.data.create_transform(**settings)(picture)
    assert_close(preprocessing.evaluation()(picture), theirs, rtol=0, atol=2e-6)


def _picture() -> bytes:
    file = io.BytesIO()
    values = random.bits(random.key(3), (400, 520, 3)).remainder(256).to(torch.uint8)
    Image.fromarray(values.numpy()).resize((390, 300)).save(file, "png")
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("resnet18", "nonsense", "timm has no weights 'nonsense'"),
        ("resnet18", "resnet18.nonsense", r"timm has no weights 'resnet18\.nonsense'"),
        ("convnext_tiny", "convnext_tiny.dinov3_lvd1689m", "have no head"),
    ],
)
def test_weights_of_timm_that_are_none(untrained: Any, name: str, weights: str, message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        timm.about(purecnn.create(name), weights)


def test_settings_that_weights_of_timm_were_trained_with(untrained: Any) -> None:
    wide = purecnn.create("mobilenet_v2", width=1.4, image_size=64)
    params, _ = timm.pretrained(wide, "mobilenetv2_140.ra_in1k")
    wide.check(params, wide.spec()[1])
    with pytest.raises(ConversionError, match=r"mobilenet_v2 has width=1\.0, found 1\.4"):
        timm.to_module(wide, *wide.init(random.key(0)))


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("efficientnet_b0", "tf_efficientnet_b0.ns_jft_in1k", "computes something else with tf_efficientnet_b0"),
        ("resnet18", "resnet34.a1_in1k", "do not fit resnet18; .* unexpected"),
        ("convnext_tiny", "convnext_tiny.fb_in22k", "another shape: head.fc"),
        ("lenet5", None, "no weights that fit lenet5; it does for .*convnext_tiny"),
    ],
)
def test_weights_of_timm_that_do_not_fit(untrained: Any, name: str, weights: str | None, message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        timm.pretrained(purecnn.create(name, **({} if name == "lenet5" else {"image_size": 64})), weights)


def test_weights_of_timm_on_the_command_line(untrained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = call("convert", "timm:", "ours.safetensors", "--model", "resnet18")
    assert result.exit_code == 0, result.output
    about = checkpoint.about("ours.safetensors")
    assert about.classes is not None
    assert about.classes[:2] == ("tench", "goldfish")
    assert about.origin is not None
    assert about.origin["url"] == "https://huggingface.co/timm/resnet18.a1_in1k"
    assert about.preprocessing is not None
    assert about.preprocessing.interpolation == "bicubic"
    Path("picture.png").write_bytes(_picture())
    result = call("predict", "picture.png", "--from", "timm:resnet18.tv_in1k", "--model", "resnet18", "--json")
    assert result.exit_code == 0, result.output
    result = call("predict", "picture.png", "--from", "timm:resnet18.tv_in1k")
    assert result.exit_code == 2
    assert "name it with --model" in result.output.replace("\n", " ")


@pytest.fixture
def unpublished(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """pytorchcv, whose published weights are drawn instead of downloaded."""
    provider = pytest.importorskip("pytorchcv.model_provider", reason="pytorchcv is not installed: nox -s peers has it")
    from pytorchcv.models.common import model_store

    def draw(name: str) -> str:
        assert model_store.get_model_metainfo(name)[2] != "NA"
        path = tmp_path / f"{name}.pth"
        torch.save(drawn_state_dict(provider.get_model(name)), path)
        return str(path)

    monkeypatch.setattr(model_store, "get_model_file", draw)


@pytest.mark.parametrize("name", ["nin_cifar", "resnet50_v1", "densenetbc100_k12_cifar", "cbam_resnet50"])
def test_published_weights_of_pytorchcv(unpublished: None, name: str) -> None:
    model = purecnn.create(name)
    params, state = pytorchcv.pretrained(model)
    state_dict = drawn_state_dict(pytorchcv.to_module(model, params, state))
    assert differences(pytorchcv.to_state_dict(model, params, state), state_dict) == []


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("resnet50_v1", "resnet50b", "pytorchcv computes something else with resnet50b than resnet50_v1 does"),
        ("resnet50_v1", "resnet18", "do not fit resnet50_v1"),
        ("resnet50_v1", "resnet51", "pytorchcv's resnet51 cannot be loaded"),
        ("fractalnet_cifar", None, "no weights that fit fractalnet_cifar; it does for zfnet"),
    ],
)
def test_weights_of_pytorchcv_that_do_not_fit(unpublished: None, name: str, weights: str | None, message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        pytorchcv.pretrained(purecnn.create(name), weights)


def test_pytorchcv_has_all_the_names() -> None:
    store = pytest.importorskip("pytorchcv.models.common.model_store", reason="pytorchcv is not installed")
    for name, theirs in pytorchcv.NAMES.items():
        parameters, _, checksum, _ = store.get_model_metainfo(theirs)
        assert checksum != "NA"
        assert parameters == TABLE[name].parameters


def test_without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConversionError, match="timm is not installed: pip install timm"):
        timm.pretrained(purecnn.create("resnet18"))
    monkeypatch.setitem(sys.modules, "pytorchcv.model_provider", None)
    with pytest.raises(ConversionError, match="pytorchcv is not installed: pip install pytorchcv"):
        pytorchcv.pretrained(purecnn.create("zfnet"))


def test_models_of_torchvision_are_read_by_its_converter() -> None:
    with pytest.raises(ConversionError, match=r"no counterpart of resnet18: converters\.torchvision has it"):
        pytorchcv.from_state_dict(purecnn.create("resnet18"), {})
    for library in LIBRARIES.values():
        with pytest.raises(ConversionError, match=r"no counterpart of lenet5$"):
            library.from_state_dict(purecnn.create("lenet5"), {})


@pytest.mark.parametrize("library", LIBRARIES)
def test_rules_fill_every_leaf_once(library: str) -> None:
    """Without the library: its names and ours are one to one."""
    found = LIBRARIES[library]
    for name in (name for lib, name in PAIRS if lib == library):
        model = purecnn.create(name, **bare(library, name))
        params, state = leaves(model, found.family(model).rules(model))
        keys = [leaf.key for leaf in (*params, *state)]
        assert len(set(keys)) == len(keys)
        rules = found.family(model).rules(model)
        for leaf in (*params, *state):
            layer = leaf.key.rpartition(".")[0]
            assert rules.forward(layer) == leaf.path.rpartition(".")[0]
