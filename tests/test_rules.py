"""Rules of renaming can be inverted, and conversions use every key once or say what is wrong."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from converters.rules import ConversionError, Rules, Template, leaves, to_tensors, to_trees
from purecnn import create, random, tree
from tests.table import differences

IDENTITY = Rules(
    ("{s}", "{s}"),
    *((f"{part}.{layer}", f"{part}.{layer}") for part in ("stem", "head") for layer in ("conv", "linear")),
    *((f"stage{s}.{layer}", f"stage{s}.{layer}") for s in (1, 2) for layer in ("conv", "linear1", "linear2")),
)

words = st.text("abcxyz_.-+*()[]^$\\", min_size=1, max_size=5)
fields = st.lists(st.sampled_from("pqrs"), unique=True, max_size=3)
numbers = st.integers(0, 10**6)


@st.composite
def templates(draw: st.DrawFn, fields: list[str]) -> str:
    """Words around fields in some order; between two fields there is always a word without digits."""
    text = draw(words)
    for field in draw(st.permutations(fields)):
        offset = draw(st.integers(0, 3))
        text += f"{{{field}+{offset}}}" if offset else f"{{{field}}}"
        text += draw(words)
    return text


@given(fields, st.data())
def test_match_undoes_fill(fields: list[str], data: st.DataObject) -> None:
    template = Template(data.draw(templates(fields)))
    values = {field: data.draw(numbers) for field in fields}
    assert template.match(template.fill(values)) == values


@given(fields, st.data())
def test_fill_undoes_match(fields: list[str], data: st.DataObject) -> None:
    text = data.draw(templates(fields))
    template = Template(text)
    name = data.draw(st.text("abcxyz_.-0123456789", max_size=12) | st.from_regex(template.pattern, fullmatch=True))
    found = template.match(name)
    if found is not None:
        assert template.fill(found) == name


@given(fields, st.data())
def test_rules_read_from_left_to_right_and_from_right_to_left(fields: list[str], data: st.DataObject) -> None:
    left, right = data.draw(templates(fields)), data.draw(templates(fields))
    rules, inverse = Rules((left, right)), Rules((right, left))
    name = Template(left).fill({field: data.draw(numbers) for field in fields})
    assert rules.backward(rules.forward(name)) == name
    assert rules.forward(name) == inverse.backward(name)


@given(st.lists(fields.flatmap(templates), min_size=1, max_size=4, unique=True), st.data())
def test_tables_that_rename_to_themselves(texts: list[str], data: st.DataObject) -> None:
    """Whichever rules apply, they agree."""
    rules = Rules(*((text, text) for text in texts))
    template = Template(data.draw(st.sampled_from(texts)))
    name = template.fill({field: data.draw(numbers) for field in template.offsets})
    assert rules.forward(name) == rules.backward(name) == name


def test_offsets_count_on() -> None:
    rules = Rules(("denselayer{b+1}", "{b}"))
    assert rules.forward("denselayer1") == "0"
    assert rules.backward("9") == "denselayer10"
    with pytest.raises(ConversionError, match="no rule renames 'denselayer0'"):
        rules.forward("denselayer0")


@pytest.mark.parametrize(
    "name", ["layer01.conv1", "layer1.conv1.weight", "xlayer1.conv1", "layer.conv1", "layer1xconv1", "layer-1.conv1"]
)
def test_other_names_do_not_match(name: str) -> None:
    with pytest.raises(ConversionError, match="no rule renames"):
        Rules(("layer{s}.conv{i}", "stage{s}.conv{i}")).forward(name)


def test_rules_that_disagree() -> None:
    rules = Rules(("a{i}", "b{i}"), ("a1", "c"))
    assert rules.forward("a2") == "b2"
    with pytest.raises(ConversionError, match=r"rules give \['b1', 'c'\] for 'a1'"):
        rules.forward("a1")


@pytest.mark.parametrize(("left", "right"), [("a{i}", "b"), ("a", "b{i}"), ("a{i}.{j}", "b{i}"), ("a{i}", "b{j}")])
def test_sides_with_different_fields(left: str, right: str) -> None:
    with pytest.raises(ValueError, match="the fields differ in"):
        Rules((left, right))


# Trees -------------------------------------------------------------------------------------------------------

LENET = create("lenet5")


def tensors() -> dict[str, Tensor]:
    params, state = LENET.init(random.key(0))
    return to_tensors(LENET, IDENTITY, params, state)


def test_there_and_back() -> None:
    params, state = LENET.init(random.key(0))
    flat = to_tensors(LENET, IDENTITY, params, state)
    again, same = to_trees(LENET, IDENTITY, flat)
    assert differences(again, params) == []
    assert same == state == {}
    assert all(flat[path] is leaf for path, leaf in tree.flatten(params).items())


@given(st.permutations(sorted(tensors())))
def test_the_order_of_keys_does_not_matter(order: list[str]) -> None:
    flat = tensors()
    params, _ = to_trees(LENET, IDENTITY, {key: flat[key] for key in order})
    assert differences(params, LENET.init(random.key(0))[0]) == []


@given(
    missing=st.sets(st.sampled_from(sorted(tensors())), max_size=3),
    unexpected=st.sets(st.sampled_from(["extra.weight", "stem.conv.weight2", "weight"]), max_size=2),
    reshaped=st.sets(st.sampled_from(sorted(tensors())), max_size=3),
)
def test_all_differences_are_in_one_message(missing: set[str], unexpected: set[str], reshaped: set[str]) -> None:
    flat = tensors()
    reshaped -= missing
    flat = {key: leaf[..., None] if key in reshaped else leaf for key, leaf in flat.items() if key not in missing}
    flat |= {key: torch.zeros(1) for key in sorted(unexpected)}
    if not missing | unexpected | reshaped:
        to_trees(LENET, IDENTITY, flat)
        return
    with pytest.raises(ConversionError, match="do not fit lenet5") as caught:
        to_trees(LENET, IDENTITY, flat)
    message = str(caught.value)
    for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped)):
        assert (f"{len(keys)} {what}: " in message) == bool(keys)
        assert all(key in message for key in keys)
    for key in reshaped:
        shape = tuple(tensors()[key].shape)
        assert f"{key} (expected float32{shape}, found float32{(*shape, 1)})" in message


def test_integers_are_no_weights() -> None:
    flat = {key: leaf.long() for key, leaf in tensors().items()}
    with pytest.raises(ConversionError, match="10 of another shape"):
        to_trees(LENET, IDENTITY, flat)


def _drop(params: Any) -> None:
    del params["head"]["linear"]["bias"]


def _add(params: Any) -> None:
    params["head"]["linear"]["scale"] = torch.ones(10)


def _reshape(params: Any) -> None:
    params["head"]["linear"]["bias"] = torch.ones(11)


@pytest.mark.parametrize(("change", "path"), [(_drop, "bias"), (_add, "scale"), (_reshape, "bias")])
def test_trees_of_another_model(change: Any, path: str) -> None:
    params, state = LENET.init(random.key(0))
    change(params)
    with pytest.raises(ConversionError, match=rf"do not fit lenet5: they differ in head\.linear\.{path}$"):
        to_tensors(LENET, IDENTITY, params, state)


def test_rules_that_merge_two_layers() -> None:
    merge = Rules(
        ("all", "head.linear"),
        ("all", "stem.conv"),
        *((f"b{i}.{j}", f"stage{i}.linear{j}") for i in (1, 2) for j in (1, 2)),
        ("conv", "stage1.conv"),
    )
    with pytest.raises(ConversionError, match=r"each of \['all\.bias', 'all\.weight'\] to two layers"):
        leaves(LENET, merge)


def test_rules_without_a_layer() -> None:
    with pytest.raises(ConversionError, match=r"no rule renames 'stem\.conv'"):
        leaves(LENET, Rules(("fc", "head.linear")))


def test_files_without_batch_counters() -> None:
    """PyTorch before 0.4.1 wrote none; some but not all missing is an error."""
    net = create("resnet18", num_classes=2)
    rules = Rules(*((path, path) for path in {p.rpartition(".")[0] for p in tree.flatten(net.spec()[0])}))
    params, state = net.init(random.key(0))
    flat: Mapping[str, Tensor] = to_tensors(net, rules, params, state)
    counters = [key for key in flat if key.endswith("num_batches_tracked")]
    assert len(counters) == 20
    _, old = to_trees(net, rules, {key: leaf for key, leaf in flat.items() if key not in counters})
    assert differences(old, state) == []
    elsewhere = {key: leaf.to("meta") for key, leaf in flat.items() if key not in counters}
    assert all(leaf.is_meta for leaf in tree.flatten(to_trees(net, rules, elsewhere)[1]).values())
    with pytest.raises(ConversionError, match="1 missing: "):
        to_trees(net, rules, {key: leaf for key, leaf in flat.items() if key != counters[3]})
