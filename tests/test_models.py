"""The registry, the settings, and the one anatomy of all networks."""

import copy
import dataclasses
import json
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import purecnn
from purecnn import UnknownModelError, layers, model, random, serial, tree
from purecnn.layer import Layer, Mode
from purecnn.tree import Tree
from purecnn.zoo import VARIANTS
from tests.table import CASES, TABLE, Case, differences, family, heads, quiet, unsettled

each_family = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
each_model = pytest.mark.parametrize("name", TABLE)


def test_table_has_every_model_and_every_family() -> None:
    assert purecnn.list_models() == list(VARIANTS)
    assert sorted(TABLE) == sorted(VARIANTS)
    assert sorted(CASES) == sorted({family(name) for name in VARIANTS})


@each_model
def test_parameter_count_is_the_published_one(name: str) -> None:
    params, _ = purecnn.create(name).spec()
    assert tree.size(params) == TABLE[name].parameters


@each_model
def test_paper_is_cited(name: str) -> None:
    paper = purecnn.create(name).paper
    assert paper.title
    assert paper.authors
    assert 1979 <= paper.year <= 2026
    assert paper.reference.startswith(("arXiv:", "doi:"))


@each_family
def test_outputs_read_as_probabilities(case: Case) -> None:
    built = case.model()
    params, state = built.init(random.key(0))
    logits, _ = built.apply(params, state, case.images())
    found = built.probabilities(logits)
    assert found.shape == logits.shape
    assert found.min() >= 0
    assert found.max() <= 1
    if built.loss is None:
        torch.testing.assert_close(found.sum(1), torch.ones(2))
    else:
        best = logits.argmax(1, keepdim=True)
        assert torch.equal(found.gather(1, best), found.max(1, keepdim=True).values)


def test_googlenet_without_auxiliary_heads() -> None:
    bare = purecnn.create("googlenet", aux_logits=False)
    assert tree.size(bare.spec()[0]) == 6_624_904


def test_googlenet_of_2014_without_auxiliary_heads() -> None:
    bare = purecnn.create("googlenet_2014", aux_logits=False)
    assert tree.size(bare.spec()[0]) == 6_998_552


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("lecun1989", [1068, 2592, 5790, 310]),
        ("lenet5_1998", [156, 12, 1516, 32, 48_120, 10_164]),
    ],
)
def test_parameters_of_the_papers_layers(name: str, counts: list[int]) -> None:
    layers: dict[str, int] = {}
    for path, leaf in tree.flatten(purecnn.create(name).spec()[0]).items():
        layer = ".".join(path.split(".")[:2])  # C3 of LeNet-5 is four layers
        layers[layer] = layers.get(layer, 0) + leaf.numel()
    assert list(layers.values()) == counts


def test_lenet_of_colour_images() -> None:
    assert tree.size(purecnn.create("lenet5", in_channels=3).spec()[0]) == 62_006


@each_model
def test_anatomy_is_stem_stages_head(name: str) -> None:
    params, state = purecnn.create(name).spec()
    body = [part for part in params if not part.startswith("aux")]
    assert body == ["stem", *(f"stage{i}" for i in range(1, len(body) - 1)), "head"]
    assert len(body) >= 3
    assert set(state) <= set(params)
    assert {path.rpartition(".")[2] for path in tree.flatten(params)} <= {"weight", "bias", "layer_scale"}
    assert {path.rpartition(".")[2] for path in tree.flatten(state)} <= {"mean", "var", "count"}


@each_model
def test_settings_build_the_model_again(name: str) -> None:
    first = purecnn.create(name, num_classes=7)
    written = json.loads(json.dumps(dict(first.settings)))
    again = purecnn.create(name, **written)
    assert json.loads(json.dumps(dict(again.settings))) == written
    for a, b in zip(first.spec(), again.spec(), strict=True):
        assert tree.map(lambda leaf: leaf.shape, a) == tree.map(lambda leaf: leaf.shape, b)


def test_settings_cannot_be_changed() -> None:
    settings: Any = purecnn.create("resnet18").settings
    with pytest.raises(TypeError):
        settings["num_classes"] = 3


@each_model
def test_declared_draws_are_all_there_are(name: str) -> None:
    """With the table's rates at 0 training runs without a key."""
    small = CASES[family(name)]
    if small.name == name:
        params, state = small.quiet().init(random.key(0))
        small.quiet().apply(params, state, small.images(), train=True)
    else:
        assert TABLE[name].draws == TABLE[small.name].draws


@each_family
def test_init_is_what_spec_says(case: Case) -> None:
    drawn, abstract = case.model().init(random.key(0)), case.model().spec()
    for a, b in zip(drawn, abstract, strict=True):
        flat, meta = tree.flatten(a), tree.flatten(b)
        assert list(flat) == list(meta)
        assert all(leaf.is_meta for leaf in meta.values())
        assert not any(leaf.is_meta for leaf in flat.values())
        assert {path: (leaf.shape, leaf.dtype) for path, leaf in flat.items()} == {
            path: (leaf.shape, leaf.dtype) for path, leaf in meta.items()
        }


@each_family
def test_init_depends_on_the_key_alone(case: Case) -> None:
    first, again, other = (case.model().init(random.key(seed)) for seed in (0, 0, 1))
    assert [differences(a, b) for a, b in zip(first, again, strict=True)] == [[], []]
    weights = {path for path in tree.flatten(first[0]) if path.endswith("linear.weight") or ".conv" in path}
    assert weights & set(differences(first[0], other[0]))


@each_family
def test_leaves_share_no_memory_and_no_values(case: Case) -> None:
    params, state = case.model().init(random.key(0))
    leaves = tree.flatten({"params": params, "state": state})
    assert len({leaf.data_ptr() for leaf in leaves.values()}) == len(leaves)
    if case.name == "airbench94":
        return  # its convolutions begin as the identity
    drawn = [leaf.flatten()[:4] for path, leaf in leaves.items() if leaf.ndim > 1 and not path.endswith("layer_scale")]
    assert len({tuple(values.tolist()) for values in drawn}) == len(drawn)


@each_family
def test_shapes_of_outputs(case: Case) -> None:
    net = case.quiet()
    params, state = net.init(random.key(0))
    x = case.images(3)
    logits, same = net.apply(params, state, x)
    assert logits.shape == (3, net.num_classes)
    assert same is state
    trained, new_state = net.apply(params, state, x, train=True)
    assert {output.shape for output in heads(trained)} == {(3, net.num_classes)}
    assert isinstance(trained, purecnn.Outputs) == any(part.startswith("aux") for part in params)
    assert list(tree.flatten(new_state)) == list(tree.flatten(state))
    _, frozen = net.apply(params, state, x, train=True, statistics="running")
    assert frozen is state
    _, recalibrated = net.apply(params, state, x, statistics="batch")
    for path, leaf in tree.flatten(recalibrated).items():
        if not path.startswith("aux"):
            assert torch.equal(leaf, tree.flatten(new_state)[path])


@each_family
def test_features_are_the_parts_outputs(case: Case) -> None:
    net = case.model()
    params, state = net.init(random.key(0))
    state = unsettled(state)
    features = net.features(params, state, case.images())
    assert list(features) == [part for part in params if not part.startswith("aux")]
    assert torch.equal(features["head"], net.apply(params, state, case.images())[0])


@each_family
def test_tap_sees_every_named_layer_and_can_replace_its_output(case: Case) -> None:
    net = case.quiet()
    params, state = net.init(random.key(0))
    x = case.images()
    seen: dict[str, Any] = {}

    def look(path: str, x: Any, y: Any) -> Any:
        assert path not in seen
        seen[path] = y
        return y

    output, _ = net.apply(params, state, x, train=True, tap=look)
    expected, _ = net.apply(params, state, x, train=True)
    assert all(map(torch.equal, heads(output), heads(expected)))
    owners = {path.rpartition(".")[0] for path in tree.flatten(params)}
    assert owners <= set(seen)

    def silence(path: str, x: Any, y: Any) -> Any:
        return torch.zeros_like(y) if path == "stage1" else y

    features: dict[str, Tensor] = {}

    def both(path: str, x: Any, y: Any) -> Any:
        features[path] = y
        return silence(path, x, y)

    net.apply(params, state, x, tap=both)
    a, _ = net.apply(params, state, x, tap=silence)
    b, _ = net.apply(params, state, -x, tap=silence)
    assert features["stage1"].count_nonzero()
    assert torch.equal(a, b)


@each_family
def test_derivative_with_respect_to_features(case: Case) -> None:
    """Grad-CAM's gradients: add zero inside the network, and differentiate with respect to it."""
    net = case.model()
    params, state = net.init(random.key(0))
    x = case.images()
    stage = net.features(params, state, x)["stage1"]

    def loss(shift: Tensor) -> Tensor:
        logits, _ = net.apply(params, state, x, tap=lambda path, x, y: y + shift if path == "stage1" else y)
        return logits.square().sum()

    gradient = torch.func.grad(loss)(torch.zeros_like(stage))
    assert gradient.shape == stage.shape
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", ["resnet18", "googlenet"])
def test_replaced_head_leaves_the_body(name: str) -> None:
    first = quiet(name)
    params, state = first.init(random.key(0))
    second, new_params, new_state = model.replace_head(first, params, state, 3, random.key(1))
    assert second.num_classes == 3
    for part in params:
        kept = new_params[part] is params[part]
        assert kept != part.startswith(("head", "aux"))
    output, _ = second.apply(new_params, new_state, torch.ones(2, 3, 33, 33), train=True)
    assert {logits.shape for logits in heads(output)} == {(2, 3)}


def test_list_models_by_pattern() -> None:
    assert purecnn.list_models("vgg1?_bn") == ["vgg11_bn", "vgg13_bn", "vgg16_bn", "vgg19_bn"]
    assert purecnn.list_models("nothing*") == []


def test_a_global_drop_path_takes_one_column_in_the_whole_network() -> None:
    """Which columns an image went through is where the derivatives of its logits are not zero."""
    fractal = CASES["fractalnet"].model(dropout=0.0, local_drop=0.0, global_drop=0.5)
    params, state = fractal.init(random.key(0))
    count = 24
    images = CASES["fractalnet"].images(count)

    def logits(params: tree.Tree, i: int) -> Tensor:
        return fractal.apply(params, state, images, train=True, key=random.key(1), statistics="running")[0][i].sum()

    taken = []
    for i in range(count):
        slopes = torch.func.grad(logits)(params, i)
        columns = [
            frozenset(name[: len("column1")] for name, unit in block.items() if unit["conv"]["weight"].any())
            for part, block in slopes.items()
            if part != "head"
        ]
        assert len(columns) == 3
        assert len(set(columns)) == 1, columns
        taken.append(columns[0])
    assert {len(columns) for columns in taken} == {1, 3}
    assert len({columns for columns in taken if len(columns) == 1}) == 3


# Bad input ---------------------------------------------------------------------------------------------------


def test_unknown_name_shows_the_nearest() -> None:
    with pytest.raises(UnknownModelError, match=r"no model 'resnet51'; did you mean .*resnet50.*\?"):
        purecnn.create("resnet51")
    with pytest.raises(UnknownModelError, match="did you mean resnet50 or"):
        purecnn.create("ResNet-50")
    with pytest.raises(UnknownModelError, match=r"'inception_v1'; did you mean googlenet\?"):
        purecnn.create("inception_v1")
    with pytest.raises(UnknownModelError, match="see list_models"):
        purecnn.create("????")


@each_family
def test_unknown_setting_shows_the_known_ones(case: Case) -> None:
    with pytest.raises(TypeError, match=rf"{case.name}: .*'wigth'.*image_size.*num_classes"):
        case.model(wigth=2)


@pytest.mark.parametrize(
    "shape", [(3, 32, 32), (2, 1, 32, 32), (2, 4, 32, 32), (3,), (2, 32, 32, 3), (1, 2, 3, 32, 32)]
)
def test_images_of_another_form(shape: tuple[int, ...]) -> None:
    net = CASES["resnet"].model()
    with pytest.raises(ValueError, match=r"resnet50 takes images \(batch, 3, height, width\), found \(") as caught:
        net.apply({}, {}, torch.zeros(shape))
    assert str(shape) in str(caught.value)


@pytest.mark.parametrize(
    ("family", "size", "needed", "where"),
    [
        ("alexnet", 16, 63, "in layer 'stage1.pool', input (2, 192, 1, 1)"),
        ("vgg", 3, 8, "in layer 'stage1.pool', input (2, 6, 1, 1)"),
        ("squeezenet", 2, 17, "in layer 'stem.conv', input (2, 3, 2, 2)"),
        ("lenet", 20, 32, "in layer 'stage2.linear1', input (2, 64)"),
        ("densenet", 1, 5, "in layer 'stage1.transition.pool', input (2, 7, 1, 1)"),
    ],
)
def test_too_small_an_image_names_the_layer_and_what_is_needed(family: str, size: int, needed: int, where: str) -> None:
    case = CASES[family]
    net = case.model()
    params, state = net.init(random.key(0))
    words = f"images of 70 x {size} pixels are too small for {case.name}, which needs {needed} x {needed}"
    for how in ({}, {"train": True, "key": random.key(1)}):
        with pytest.raises(RuntimeError, match=words.replace("70", str(size))) as caught:
            net.apply(params, state, torch.zeros(2, net.in_channels, size, size), **how)
        assert caught.value.__notes__ == [where]
        with pytest.raises(RuntimeError, match=words):
            net.apply(params, state, torch.zeros(2, net.in_channels, 70, size), **how)
    net.apply(params, state, torch.zeros(2, net.in_channels, needed, needed))


@pytest.mark.parametrize(
    ("name", "size", "needed"),
    [("lenet5", 8, 16), ("alexnet", 4, 63), ("inception_v3", 70, 299), ("bn_inception", 1, 31)],
)
def test_too_small_an_image_for_the_parameters_of_init(name: str, size: int, needed: int) -> None:
    net = purecnn.create(name, image_size=size)
    words = f"images of {size} x {size} pixels are too small for {name}, which needs {needed} x {needed}"
    for run in (lambda: net.init(random.key(0)), net.spec, lambda: net.check({}, {})):
        with pytest.raises(RuntimeError, match=words) as caught:
            run()
        assert caught.value.__notes__[0].startswith("in layer '")
    purecnn.create(name, image_size=needed).spec()


def test_what_is_wrong_with_an_image_besides_its_size_is_told_as_it_is() -> None:
    net = CASES["alexnet"].model()
    params, state = net.init(random.key(0))

    def tap(path: str, x: Any, y: Any) -> Any:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match=r"^no"):
        net.apply(params, state, torch.zeros(1, 3, 63, 63), tap=tap)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        purecnn.create("lenet5").apply(*purecnn.create("lenet5").init(random.key(0)), torch.zeros(1, 1, 50, 50))


def test_missing_parameters_name_the_layer() -> None:
    net = CASES["resnet"].model()
    params, state = net.init(random.key(0))
    del params["stage1"]["0"]["conv2"]
    with pytest.raises(KeyError) as caught:
        net.apply(params, state, CASES["resnet"].images())
    assert caught.value.__notes__[0] == "in layer 'stage1.0.conv2', input (2, 16, 9, 9)"


def test_wrong_choice_of_statistics() -> None:
    net = CASES["lenet"].model()
    wrong: Any = "frozen"
    with pytest.raises(ValueError, match="'batch', 'running', 'global' or None, found 'frozen'"):
        net.apply(*net.init(random.key(0)), CASES["lenet"].images(), statistics=wrong)
    with pytest.raises(ValueError, match="use one or the other"):
        net.apply(*net.init(random.key(0)), CASES["lenet"].images(), around=wrong, remat=True)


@pytest.mark.parametrize("family", ["alexnet", "vgg", "googlenet", "squeezenet", "densenet"])
def test_training_with_dropout_wants_a_key(family: str) -> None:
    net = CASES[family].model()
    params, state = net.init(random.key(0))
    x = CASES[family].images()
    net.apply(params, state, x)
    with pytest.raises(ValueError, match=r"pass key=purecnn\.random\.key") as caught:
        net.apply(params, state, x, train=True)
    assert caught.value.__notes__[0].startswith("in layer '")


def test_batch_statistics_of_a_single_value() -> None:
    net = CASES["resnet"].model()
    params, state = net.init(random.key(0))
    x = CASES["resnet"].images(1)[:, :, :1, :1]
    with pytest.raises(ValueError, match="more than one value per channel") as caught:
        net.apply(params, state, x, train=True)
    assert caught.value.__notes__ == ["in layer 'stem.norm', input (1, 64, 1, 1)"]
    net.apply(params, state, x, train=True, statistics="running")


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, float("nan")])
def test_rate_of_dropout(rate: float) -> None:
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        layers.dropout(rate)
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        purecnn.create("vgg11", dropout=rate)


def test_basic_blocks_have_no_groups() -> None:
    with pytest.raises(ValueError, match="groups=1"):
        purecnn.create("resnet18", groups=2)


@each_model
def test_models_go_through_pickle(name: str) -> None:
    first = purecnn.create(name, num_classes=7)
    again = pickle.loads(pickle.dumps(first))
    assert (again.settings, again.norm) == (first.settings, first.norm)
    assert tree.map(lambda leaf: leaf.shape, again.spec()[0]) == tree.map(lambda leaf: leaf.shape, first.spec()[0])


def test_a_replaced_loss_goes_with_its_model() -> None:
    model = dataclasses.replace(purecnn.create("lenet5"), loss=F.multi_margin_loss)
    assert pickle.loads(pickle.dumps(model)).loss is F.multi_margin_loss
    replaced, _, _ = purecnn.replace_head(model, *model.init(random.key(0)), 3, random.key(1))
    assert (replaced.loss, replaced.num_classes) == (F.multi_margin_loss, 3)


@each_family
def test_torchs_default_type_changes_no_network(case: Case) -> None:
    expected = case.model().spec()
    torch.set_default_dtype(torch.float64)
    try:
        found = case.model().spec(), case.model().init(random.key(0))
    finally:
        torch.set_default_dtype(torch.float32)
    for trees in found:
        for before, after in zip(expected, trees, strict=True):
            assert tree.map(lambda leaf: leaf.dtype, before) == tree.map(lambda leaf: leaf.dtype, after)


def test_models_can_be_copied_and_looked_up() -> None:
    first = purecnn.create("lenet5")
    assert copy.deepcopy(first) is copy.copy(first) is first
    assert {first: 1}[first] == 1


def test_a_model_of_ones_own_is_not_in_the_table() -> None:
    layer = serial(stem=layers.conv(4, 3), head=serial(layers.global_avg_pool, linear=layers.linear(5)))
    mine = purecnn.Model.of(layer, num_classes=5, image_size=8)
    assert mine.settings == {"num_classes": 5}
    assert copy.deepcopy(mine) is mine
    with pytest.raises(TypeError, match=r"'custom' has a layer that purecnn\.create did not build"):
        pickle.dumps(mine)
    params, state = mine.init(random.key(0))
    with pytest.raises(ValueError, match=r"'custom' has a layer that purecnn\.create did not build: .* for 3 classes"):
        model.replace_head(mine, params, state, 3, random.key(1))
    with pytest.raises(ValueError, match=r"should give logits \(batch, 7\), found \(batch, 5\)"):
        purecnn.Model.of(layer, num_classes=7, image_size=8)
    grouped = purecnn.Model.of(serial(layers.batch_norm(), head=layer), num_classes=5, image_size=8, norm="group")
    assert grouped.spec()[1] == {}


def test_trees_of_another_network_are_named_for_ones_own_model_too() -> None:
    layer = serial(stem=layers.conv(4, 3), head=serial(layers.global_avg_pool, linear=layers.linear(5)))
    mine = purecnn.Model.of(layer, num_classes=5, image_size=8, name="mine")
    params, state = mine.init(random.key(0))
    with pytest.raises(KeyError, match="head") as caught:
        mine.apply({"stem": params["stem"]}, state, torch.zeros(1, 3, 8, 8))
    assert caught.value.__notes__[-1].startswith("the parameters are not those of mine: head.linear.bias (expected")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"norm": "grp"}, "norm is 'batch' or 'group', found 'grp'"),
        ({"in_channels": True}, "in_channels of custom is a whole number of at least 1, found True"),
        ({"image_size": 0}, "image_size of custom is a whole number of at least 1, found 0"),
        ({"num_classes": 2.5}, "num_classes of custom is a whole number of at least 1, found 2.5"),
    ],
)
def test_settings_of_ones_own_model_are_checked(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        purecnn.Model.of(layers.conv(5, 3), **{"num_classes": 5, "image_size": 8, **setting})


def test_trees_of_another_network_are_refused() -> None:
    first = purecnn.create("resnet18")
    params, state = purecnn.create("resnet34").spec()
    with pytest.raises(ValueError, match=r"parameters .* resnet18: .*expected nothing, found \(64, 64, 3, 3\).* more$"):
        first.check(params, state)
    with pytest.raises(ValueError, match="statistics are not those of resnet18"):
        first.check(first.spec()[0], {})
    with pytest.raises(ValueError, match="parameters are not those of resnet18"):
        model.replace_head(first, {**first.spec()[0], "boost": {}, "stem": {}}, state, 3, random.key(1))


def test_a_new_head_has_the_type_of_the_body() -> None:
    first = purecnn.create("squeezenet1_1")
    params, state = (tree.map(torch.Tensor.double, each) for each in first.init(random.key(0)))
    second, params, state = model.replace_head(first, params, state, 2, random.key(1))
    assert second.apply(params, state, torch.zeros(1, 3, 64, 64).double())[0].dtype == torch.float64


def test_tap_and_recomputation_do_not_go_together() -> None:
    first = purecnn.create("lenet5")
    params, state = first.init(random.key(0))
    with pytest.raises(ValueError, match="around and tap see each layer once"):
        first.apply(params, state, torch.zeros(1, 1, 32, 32), remat=True, tap=lambda path, x, y: y)


def test_the_compiler_is_not_imported() -> None:
    """That takes seconds, and most users of a function never compile it."""
    code = "import sys, purecnn; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# What does not fit together ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (lambda params, state, x: (params, {}, x), "the statistics are not those of resnet18: .* found nothing"),
        (lambda params, state, x: (state, params, x), "the parameters are not those of resnet18: head.linear.bias"),
        (lambda params, state, x: (tree.flatten(params), state, x), "the parameters are flat: purecnn.tree.unflatten"),
        (lambda params, state, x: (nn.ReLU(), state, x), "the parameters must be nested dictionaries, found ReLU"),
        (lambda params, state, x: (params, state, x.double()), "images are torch.float64, parameters torch.float32"),
    ],
    ids=["no statistics", "swapped", "flat", "a module", "type"],
)
def test_a_note_says_what_does_not_fit(change: Callable[..., Any], note: str) -> None:
    model = purecnn.create("resnet18", num_classes=2)
    params, state = model.init(random.key(0))
    with pytest.raises((KeyError, AttributeError, RuntimeError)) as caught:
        model.apply(*change(params, state, torch.zeros(1, 3, 64, 64)))
    assert re.search(note, caught.value.__notes__[-1])


@pytest.mark.parametrize(
    ("mine", "theirs", "where"),
    [
        ("resnet18", "resnet34", "stage1"),
        ("vgg16", "vgg19", "stage2"),
        ("vgg13", "vgg13_bn", "stem"),
        ("convnext_tiny", "convnext_small", "stage3"),
    ],
)
def test_a_deeper_networks_parameters_do_not_run(mine: str, theirs: str, where: str) -> None:
    model, other = purecnn.create(mine), purecnn.create(theirs)
    with pytest.raises(ValueError, match=r"^there is no layer .* here, but the parameters have one") as caught:
        model.apply(*other.spec(), torch.empty(1, 3, 64, 64, device="meta"))
    assert caught.value.__notes__[0].startswith(f"in layer '{where}")
    assert "are not those of" in caught.value.__notes__[-1]


def test_an_around_may_find_more_than_a_layers_own_parameters() -> None:
    model = purecnn.create("lenet5")
    params, state = model.init(random.key(0))
    images = random.normal(random.key(1), (2, 1, 32, 32))
    head = params["head"]["linear"]
    low = {"down": torch.ones(84, 1), "up": torch.ones(1, 10)}
    adapted = {**params, "head": {"linear": {**head, "low": low}}}

    def around(layer: Layer, params: Tree, state: Tree, x: Any, mode: Mode) -> tuple[Any, Tree]:
        y, state = layer.apply(params, state, x, mode)
        return (y + x @ params["low"]["down"] @ params["low"]["up"] if "low" in params else y), state

    features = model.features(params, state, images)
    expected = features["head"] + features["stage2"].sum(1, keepdim=True)
    torch.testing.assert_close(model.apply(adapted, state, images, around=around)[0], expected)
    with pytest.raises(ValueError, match="no layer 'low' here"):
        model.apply(adapted, state, images)


def test_a_tap_that_fails_is_no_matter_of_the_trees() -> None:
    model = purecnn.create("lenet5")

    def tap(path: str, x: Any, y: Any) -> Any:
        raise KeyError(path)

    with pytest.raises(KeyError) as caught:
        model.apply(*model.init(random.key(0)), torch.zeros(1, 1, 32, 32), tap=tap)
    assert [note.startswith("in layer") for note in caught.value.__notes__] == [True]


@pytest.mark.parametrize(
    "settings", [{"num_classes": 0}, {"num_classes": 2.0}, {"num_classes": True}, {"in_channels": 0}]
)
def test_counts_are_positive_whole_numbers(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="of resnet18 is a whole number of at least 1"):
        purecnn.create("resnet18", **settings)


def test_counts_of_numpy_become_pythons() -> None:
    model = purecnn.create("lenet5", num_classes=np.int64(7), image_size=np.int32(28))
    assert [type(model.settings[name]) for name in ("num_classes", "image_size")] == [int, int]
    assert model.init(random.key(0))[0]["head"]["linear"]["bias"].shape == (7,)
    assert purecnn.replace_head(model, *model.init(random.key(0)), np.int64(3), random.key(1))[0].num_classes == 3


def test_logits_are_what_a_model_gives() -> None:
    with pytest.raises(ValueError, match=r"logits \(batch, 4\), found \(batch, 5, 8, 8\)"):
        purecnn.Model.of(layers.conv(5, 3), num_classes=4, image_size=8)


def test_settings_are_the_same_from_a_file() -> None:
    listed = purecnn.create("resnet18", depths=[1, 1, 1, 1])
    assert listed.settings == purecnn.create("resnet18", depths=(1, 1, 1, 1)).settings
