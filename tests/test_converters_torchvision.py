"""torchvision's weights, names and modules, to and from ours."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision import models
from torchvision.models import get_model_weights

import purecnn
from converters import checkpoint, families, sources
from converters import torchvision as tv
from converters.rules import ConversionError
from purecnn import Model, random, tree
from tests.table import CASES, PEERS, TABLE, differences, drawn_state_dict, heads, peer, quiet, unsettled

FAMILIES = [family for family, case in CASES.items() if case.name in PEERS]


# state_dicts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PEERS)
def test_round_trip_gives_the_same_state_dict(name: str) -> None:
    model, module = quiet(name), peer(name)
    state_dict = drawn_state_dict(module)
    back = tv.to_state_dict(model, *tv.from_state_dict(model, state_dict))
    assert list(back) == list(state_dict)
    assert differences(back, state_dict) == []
    assert back._metadata == module.state_dict()._metadata  # type: ignore[attr-defined]
    module.load_state_dict(back, strict=True, assign=True)
    assert differences(module.state_dict(), state_dict) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_trees_and_module_share_no_memory(family: str) -> None:
    model = CASES[family].model()
    params, state = model.init(random.key(0))
    module = tv.to_module(model, params, state)
    again = tv.from_state_dict(model, module.state_dict())
    for tensor in module.state_dict().values():
        tensor.fill_(7)
    assert [differences(a, b) for a, b in zip(again, model.init(random.key(0)), strict=True)] == [[], []]
    assert [differences(a, b) for a, b in zip((params, state), again, strict=True)] == [[], []]


@pytest.mark.parametrize("family", FAMILIES)
def test_module_is_alive(family: str) -> None:
    model = CASES[family].model()
    module = tv.to_module(model, *model.init(random.key(0)))
    assert not module.training
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert not any(tensor.is_meta for tensor in module.state_dict().values())
    assert type(module) is type(peer(model.name))


def test_old_names_of_densenet() -> None:
    """Published files have ``norm.1`` where torchvision now has ``norm1``."""
    model = purecnn.create("densenet121")
    state_dict = drawn_state_dict(peer("densenet121"))

    def old(key: str) -> str:
        layer, _, leaf = key.rpartition(".")
        return f"{layer[:-1]}.{layer[-1]}.{leaf}" if ".denselayer" in layer else key

    renamed = {old(key): tensor for key, tensor in state_dict.items() if "num_batches" not in key}
    assert "features.denseblock1.denselayer1.norm.1.weight" in renamed
    params, state = tv.from_state_dict(model, renamed)
    expected_params, expected_state = tv.from_state_dict(model, state_dict)
    assert differences(params, expected_params) == []
    counts = {path: leaf for path, leaf in tree.flatten(state).items() if path.endswith(".count")}
    assert counts
    assert not any(counts.values())
    assert differences(tree.flatten(state) | counts, tree.flatten(expected_state) | counts) == []

    key = "features.denseblock1.denselayer1.norm1.weight"
    with pytest.raises(ConversionError, match="in the state_dict twice, under its old name and its new one"):
        tv.from_state_dict(model, {**renamed, key: state_dict[key]})


def test_googlenet_orders_of_auxiliary_heads() -> None:
    """Ours count from shallow to deep, and so do torchvision's names, though not its outputs."""
    model = CASES["googlenet"].quiet()
    params, state = model.init(random.key(0))
    module = tv.to_module(model, params, state).train()
    output, _ = model.apply(params, state, CASES["googlenet"].images(), train=True)
    theirs = module(CASES["googlenet"].images())
    assert torch.equal(output.logits, theirs.logits)
    assert torch.equal(output.aux[0], theirs.aux_logits1)
    assert torch.equal(output.aux[1], theirs.aux_logits2)


# Random settings ---------------------------------------------------------------------------------------------

classes = st.integers(1, 9)
channels = st.sampled_from([1, 2, 3, 5])
few = st.integers(1, 2)
four = st.tuples(few, few, few, few)


def options(**settings: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({"num_classes": classes, "in_channels": channels, **settings})


widths = st.integers(1, 6)
block = st.tuples(
    st.sampled_from([3, 5]),
    st.integers(1, 30),
    st.integers(1, 20),
    st.booleans(),
    st.sampled_from(["RE", "HS"]),
    few,
)
stage = st.tuples(
    st.sampled_from(["mb", "fused"]), st.sampled_from([1, 2, 4]), st.sampled_from([3, 5]), few, st.integers(1, 20), few
)
SETTINGS: dict[str, st.SearchStrategy[tuple[str, dict[str, Any], int]]] = {
    "alexnet": st.tuples(st.just("alexnet"), options(), st.integers(63, 90)),
    "vgg": st.integers(1, 4).flatmap(
        lambda blocks: st.tuples(
            st.just("vgg13"),
            options(depths=st.tuples(*[few] * blocks), widths=st.tuples(*[widths] * blocks), batch_norm=st.booleans()),
            st.integers(16, 40),
        )
    ),
    "googlenet": st.tuples(
        st.just("googlenet"),
        options(in_channels=st.just(3), transform_input=st.booleans(), aux_logits=st.booleans()),
        st.integers(15, 40),
    ),
    "resnet": st.tuples(st.just("resnet34"), options(depths=four), st.integers(1, 50))
    | st.tuples(
        st.just("resnet50"),
        options(depths=four, groups=st.integers(1, 4), width_per_group=st.integers(1, 12)),
        st.integers(1, 50),
    ),
    "squeezenet": st.tuples(st.sampled_from(["squeezenet1_0", "squeezenet1_1"]), options(), st.integers(21, 50)),
    "inception_v3": st.tuples(
        st.just("inception_v3"),
        options(in_channels=st.just(3), transform_input=st.booleans(), aux_logits=st.just(False)),
        st.integers(75, 90),
    ),
    "mobilenet_v2": st.tuples(
        st.just("mobilenet_v2"),
        options(
            width=st.floats(0.1, 1.5),
            stages=st.lists(st.tuples(few, st.integers(1, 20), few, few), min_size=1, max_size=3),
        ),
        st.integers(1, 50),
    ),
    "shufflenet_v2": st.tuples(
        st.just("shufflenet_v2_x1_0"),
        options(
            widths=st.tuples(*[widths.map(lambda width: 2 * width)] * 3, widths),
            depths=st.tuples(few, few, few),
            stem_width=widths,
        ),
        st.integers(1, 50),
    ),
    "mnasnet": st.tuples(st.just("mnasnet1_0"), options(width=st.floats(0.1, 0.9)), st.integers(1, 70)),
    "mobilenet_v3": st.tuples(
        st.just("mobilenet_v3_large"),
        options(
            width=st.floats(0.1, 1.5),
            stages=st.lists(st.lists(block, min_size=1, max_size=2), min_size=1, max_size=3),
            hidden=st.integers(1, 20),
        ),
        st.integers(1, 50),
    ),
    "efficientnet": st.tuples(
        st.just("efficientnet_b0"),
        options(
            width=st.floats(0.1, 1.5),
            depth=st.floats(0.5, 2),
            stages=st.lists(stage, min_size=1, max_size=3),
            stem_width=st.integers(1, 20),
            last_width=st.none() | widths,
            norm_eps=st.sampled_from([1e-3, 1e-5]),
        ),
        st.integers(1, 50),
    ),
    "regnet": st.tuples(
        st.just("regnet_x_400mf"),
        options(
            depth=st.integers(1, 6),
            w0=st.integers(1, 3).map(lambda n: 8 * n),
            wa=st.floats(0, 30),
            wm=st.floats(1.5, 3),
            group_width=st.sampled_from([1, 4, 8, 16, 24]),
            se_ratio=st.sampled_from([0.0, 0.25, 0.5]),
            stem_width=st.integers(4, 9),
        ),
        st.integers(1, 50),
    ),
    "convnext": st.integers(2, 3).flatmap(
        lambda blocks: st.tuples(
            st.just("convnext_tiny"),
            options(
                depths=st.tuples(*[few] * blocks),
                widths=st.tuples(*[widths] * blocks),
                layer_scale=st.sampled_from([1e-6, 0.5]),
            ),
            st.integers(2 ** (blocks + 1), 60),
        )
    ),
    "densenet": st.integers(1, 3).flatmap(
        lambda blocks: st.tuples(
            st.just("densenet121"),
            options(depths=st.tuples(*[few] * blocks), growth=st.integers(1, 6), stem_width=st.integers(2, 9)),
            st.integers(16, 50),
        )
    ),
}


def test_every_family_has_random_settings() -> None:
    assert sorted(SETTINGS) == sorted(FAMILIES) == sorted(families.FAMILIES)


def round_trip(name: str, size: int, **chosen: Any) -> None:
    """Through torchvision and back; and both compute the same, in evaluation and in training."""
    model = purecnn.create(name, **dict.fromkeys(TABLE[name].draws, 0.0), **chosen)
    params, state = model.init(random.key(0))
    state = unsettled(state)
    module = tv.to_module(model, params, state)
    again = tv.from_state_dict(model, module.state_dict())
    assert [differences(a, b) for a, b in zip(again, (params, state), strict=True)] == [[], []]
    x = random.normal(random.key(1), (2, model.in_channels, size, size))
    with torch.no_grad():
        assert torch.equal(model.apply(params, state, x)[0], module(x))
        module.train()
        try:
            theirs = module(x)
        except ValueError:  # a batch's statistics of a single value
            with pytest.raises(ValueError, match="more than one value per channel"):
                model.apply(params, state, x, train=True)
            return
        output, new_state = model.apply(params, state, x, train=True)
    expected = [theirs] if isinstance(theirs, Tensor) else [theirs[0], *reversed(theirs[1:])]
    # GoogLeNet's module says None of auxiliary heads that it does not have.
    assert all(map(torch.equal, heads(output), [logits for logits in expected if logits is not None]))
    assert differences(new_state, tv.from_state_dict(model, module.state_dict())[1]) == []


@pytest.mark.parametrize("family", SETTINGS)
@settings(max_examples=settings().max_examples // 5)
@given(data=st.data())
def test_random_settings_go_through_torchvision(family: str, data: st.DataObject) -> None:
    name, chosen, size = data.draw(SETTINGS[family])
    round_trip(name, size, **chosen)


@pytest.mark.parametrize(
    ("name", "chosen", "words"),
    [
        ("resnet18", {"depths": (1, 1)}, "torchvision's ResNet has 4 stages, found 2"),
        ("resnet18", {"depths": (1, 1, 1, 1, 1)}, "torchvision's ResNet has 4 stages, found 5"),
        ("squeezenet1_1", {"squeeze": 8}, r"features\.10\.expand1x1\.bias, .* and 39 more differ"),
        ("squeezenet1_1", {"depths": (2, 2, 5)}, r"classifier\.1\.weight, features\.13\..* differ"),
        ("squeezenet1_1", {"depths": (2, 2, 3)}, r"settings: features\.12\.expand1x1\.bias, .*squeeze\.weight differ"),
        (
            "squeezenet1_0",
            {"stem_width": 32},
            r"features\.0\.bias, features\.0\.weight, features\.3\.squeeze\.weight differ",
        ),
        ("squeezenet1_0", {"stem_kernel": 3}, r"squeezenet1_0 cannot have these settings: features\.0\.weight differ"),
    ],
)
def test_settings_that_torchvision_does_not_have(name: str, chosen: dict[str, Any], words: str) -> None:
    """The conversion says which, and loses no tensor."""
    model = purecnn.create(name, num_classes=2, **chosen)
    params, state = model.init(random.key(0))
    for convert in (tv.to_state_dict, tv.to_module):
        with pytest.raises(ConversionError, match=words):
            convert(model, params, state)


# Bad input ---------------------------------------------------------------------------------------------------


def squeezenet() -> "OrderedDict[str, Tensor]":
    return drawn_state_dict(peer("squeezenet1_1"))


def test_all_differences_are_in_one_message() -> None:
    state_dict: dict[str, Any] = squeezenet()
    del state_dict["features.3.squeeze.bias"], state_dict["features.0.weight"]
    state_dict["features.99.weight"] = torch.zeros(1)
    state_dict["classifier.1.bias"] = torch.zeros(7)
    with pytest.raises(ConversionError) as caught:
        tv.from_state_dict(purecnn.create("squeezenet1_1"), state_dict)
    message = str(caught.value)
    assert message.startswith("the weights do not fit squeezenet1_1; ")
    assert "2 missing: features.0.weight, features.3.squeeze.bias" in message
    assert "1 unexpected: features.99.weight" in message
    assert "1 of another shape: classifier.1.bias (expected float32(1000,), found float32(7,))" in message


def test_weights_of_another_model() -> None:
    with pytest.raises(ConversionError, match=r"do not fit squeezenet1_0; .*of another shape"):
        tv.from_state_dict(purecnn.create("squeezenet1_0"), squeezenet())
    with pytest.raises(ConversionError, match=r"do not fit alexnet; .*missing: .*unexpected: ") as caught:
        tv.from_state_dict(purecnn.create("alexnet"), squeezenet())
    assert "12 missing: features.3.weight, " in str(caught.value)
    assert " and 2 more; " in str(caught.value)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module.", "model.features."])
def test_names_of_a_wrapped_module(prefix: str) -> None:
    state_dict = {prefix + key: tensor for key, tensor in squeezenet().items()}
    with pytest.raises(ConversionError, match=rf"all keys begin with '{prefix}', .*key\.removeprefix\('{prefix}'\)"):
        tv.from_state_dict(purecnn.create("squeezenet1_1"), state_dict)


@pytest.mark.parametrize("value", [None, 1.0, [1.0], "weight"])
def test_not_a_tensor(value: Any) -> None:
    state_dict: dict[str, Any] = {**squeezenet(), "classifier.1.bias": value}
    with pytest.raises(ConversionError, match=rf"classifier\.1\.bias is not a tensor but a {type(value).__name__}"):
        tv.from_state_dict(purecnn.create("squeezenet1_1"), state_dict)


def test_a_whole_checkpoint_in_place_of_its_state_dict() -> None:
    with pytest.raises(ConversionError, match="state_dict is not a tensor but a OrderedDict"):
        tv.from_state_dict(purecnn.create("squeezenet1_1"), {"state_dict": squeezenet()})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("convert", "words"),
    [
        (lambda model, trees: tv.from_state_dict(model, peer(model.name)), r"a SqueezeNet: .*module\.state_dict\(\)"),
        (lambda model, trees: tv.from_state_dict(model, "x.pth"), r"'x\.pth': .*converters\.files\.read\(path\)"),
        (lambda model, trees: tv.from_state_dict(model.name, {}), "expected a model, .*found 'squeezenet1_1'"),
        (lambda model, trees: tv.from_state_dict({}, model), "expected a model, .*found a dict"),
        (lambda model, trees: tv.to_state_dict(*trees, model), "expected a model, .*found a dict"),
        (lambda model, trees: tv.to_state_dict(model, trees, {}), "expected two trees, .*found a tuple"),
        (lambda model, trees: tv.to_module(model, trees[0], None), "expected two trees, .*found a NoneType"),
        (lambda model, trees: tv.pretrained(model.name), "expected a model, .*found 'squeezenet1_1'"),
        (lambda model, trees: tv.has(model.name), "expected a model, .*found 'squeezenet1_1'"),
    ],
)
def test_other_arguments(convert: Callable[..., Any], words: str) -> None:
    model = purecnn.create("squeezenet1_1")
    with pytest.raises(TypeError, match=words):
        convert(model, model.init(random.key(0)))


def test_group_normalisation_takes_the_parameters_alone() -> None:
    batch, group = (purecnn.create("resnet18", norm=norm) for norm in ("batch", "group"))
    state_dict = tv.to_state_dict(batch, *batch.init(random.key(0)))
    with pytest.raises(ConversionError, match='norm="group" has no running statistics: convert with norm="batch"'):
        tv.from_state_dict(group, state_dict)
    params, _ = tv.from_state_dict(batch, state_dict)
    group.check(params, {})
    with pytest.raises(ConversionError, match='torchvision\'s resnet18 cannot have norm="group": bn1'):
        tv.to_state_dict(group, params, {})


def _call(function: Callable[..., Any]) -> Callable[[Model], Any]:
    return lambda model: function(model, *model.spec())


@pytest.mark.parametrize(
    "convert",
    [
        _call(tv.to_state_dict),
        _call(tv.to_module),
        lambda model: tv.from_state_dict(model, {}),
        tv.pretrained,
        tv.weights_entry,
    ],
)
def test_models_that_torchvision_does_not_have(convert: Callable[[Model], Any]) -> None:
    lacking = [name for name, row in TABLE.items() if row.peer is None]
    assert "lenet5" in lacking
    for name in lacking:
        assert not tv.has(purecnn.create(name))
        with pytest.raises(ConversionError, match=f"torchvision has no counterpart of {name}"):
            convert(purecnn.create(name))


@pytest.mark.parametrize("name", PEERS)
def test_head_key_is_the_classifier(name: str) -> None:
    assert tv.has(purecnn.create(name))
    key = tv.head_key(purecnn.create(name))
    assert peer(name).state_dict()[key].shape[0] == 1000
    assert key.rpartition(".")[0] == list(peer(name).state_dict())[-1].rpartition(".")[0]


# Published weights -------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torch's cache of downloads in an empty folder, without a network."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ConnectionRefusedError("no network")

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    return checkpoints


def file_of(entry: Any) -> str:
    return str(entry.url).rpartition("/")[2]


def test_published_weights_come_from_torchs_cache(cache: Path) -> None:
    model = purecnn.create("squeezenet1_1")
    state_dict = squeezenet()
    torch.save(state_dict, cache / file_of(tv.weights_entry(model)))
    for weights in ("DEFAULT", "IMAGENET1K_V1", models.SqueezeNet1_1_Weights.IMAGENET1K_V1):
        params, state = tv.pretrained(model, weights)
        assert differences(tv.to_state_dict(model, params, state), state_dict) == []


@pytest.mark.parametrize("by_name", [True, False], ids=["by name", "as a file"])
def test_published_weights_keep_what_is_published_of_them(cache: Path, tmp_path: Path, by_name: bool) -> None:
    entry = models.ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1
    file = cache / file_of(entry)
    torch.save(drawn_state_dict(peer("shufflenet_v2_x0_5")), file)
    found = sources.load(entry.name if by_name else file, "shufflenet_v2_x0_5")
    assert not found.assumed
    path = tmp_path / "ours.safetensors"
    checkpoint.save(
        path,
        found.model,
        found.params,
        found.state,
        preprocessing=found.preprocessing,
        classes=found.classes,
        origin=found.origin,
    )
    again = sources.load(path)
    assert again.preprocessing == found.preprocessing == tv.preprocessing(entry)
    assert again.classes == tuple(entry.meta["categories"])
    assert again.origin is not None
    assert (again.origin["weights"], again.origin["acc@1"]) == (str(entry), 60.552)
    assert differences(again.params, found.params) == []


def test_published_weights_of_googlenet_want_their_input_transformed(cache: Path) -> None:
    with pytest.raises(ConversionError, match=r"create\('googlenet', transform_input=True\)"):
        tv.pretrained(purecnn.create("googlenet"))
    model = purecnn.create("googlenet", transform_input=True)
    state_dict = drawn_state_dict(peer("googlenet"))
    torch.save(state_dict, cache / file_of(tv.weights_entry(model)))
    assert differences(tv.to_state_dict(model, *tv.pretrained(model)), state_dict) == []


def test_published_weights_in_a_model_of_other_classes(cache: Path) -> None:
    model = purecnn.create("squeezenet1_1", num_classes=2)
    torch.save(squeezenet(), cache / file_of(tv.weights_entry(model)))
    with pytest.raises(ConversionError, match="2 of another shape"):
        tv.pretrained(model)
    params, _ = tv.pretrained(model, key=random.key(0))
    assert params["head"]["conv"]["weight"].shape == (2, 512, 1, 1)
    full = tv.pretrained(purecnn.create("squeezenet1_1"))[0]
    assert differences({**params, "head": {}}, {**full, "head": {}}) == []
    assert differences(params["head"], model.init(random.key(0))[0]["head"]) == []


def test_failed_download_says_where_to_put_the_file(cache: Path) -> None:
    model = purecnn.create("resnet18")
    with pytest.raises(ConversionError) as caught:
        tv.pretrained(model)
    message = str(caught.value)
    assert tv.weights_entry(model).url in message
    assert str(cache) in message
    assert "no network" in message
    assert isinstance(caught.value.__cause__, OSError)


def test_unknown_weights_show_the_known_ones() -> None:
    model = purecnn.create("resnet50")
    with pytest.raises(ConversionError, match=r"no weights 'V3'; it has .*IMAGENET1K_V1, IMAGENET1K_V2"):
        tv.weights_entry(model, "V3")
    with pytest.raises(ConversionError, match="no weights 'V3'"):
        tv.pretrained(model, "V3")
    other = tv.weights_entry(purecnn.create("squeezenet1_1"))
    with pytest.raises(ConversionError, match=r"SqueezeNet1_1_Weights.IMAGENET1K_V1 are not weights of resnet50"):
        tv.pretrained(model, other)


@pytest.mark.parametrize("name", PEERS)
def test_entries_tell_preprocessing_and_classes(name: str) -> None:
    for member in get_model_weights(name).__members__:
        entry = tv.weights_entry(purecnn.create(name), member)
        assert entry is get_model_weights(name)[member]
        assert (tv.classes(entry) or ()) == tuple(entry.meta["categories"] or ())
        told, transforms = tv.preprocessing(entry), entry.transforms()
        assert [told.size] == transforms.crop_size
        assert [told.resize] == transforms.resize_size
        assert (list(told.mean), list(told.std)) == (transforms.mean, transforms.std)
        assert told.interpolation == transforms.interpolation.value


@pytest.mark.parametrize("name", ["resnet50", "efficientnet_b0", "inception_v3"])
def test_preprocessing_is_torchvisions(name: str) -> None:
    entry = tv.weights_entry(purecnn.create(name))
    for size in [(300, 400), (500, 375), (200, 180)]:
        image = Image.effect_noise(size, 60).convert("RGB")
        assert torch.equal(tv.preprocessing(entry).evaluation()(image), entry.transforms()(image))
