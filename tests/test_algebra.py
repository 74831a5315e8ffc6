"""The laws of composition, on random layers; and trees, the algebra's other half."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import purecnn
from purecnn import Layer, Mode, Outputs, add, concat, fork, layers, multiply, named, numbered, random, serial, tree
from purecnn.layer import DRAW
from purecnn.layers import batch_norm, conv, dropout, identity, linear, relu
from purecnn.tree import Tree
from tests.table import differences

CHANNELS = 3
KEY = random.key(3)
TRAIN = Mode(train=True, batch_statistics=True, key=KEY)
EVALUATE = Mode(key=KEY)
X = random.normal(random.key(1), (2, CHANNELS, 5, 4))

LEAVES: dict[str, Callable[[], Layer]] = {
    "conv": lambda: conv(CHANNELS, 3, bias=True),
    "norm": batch_norm,
    "drop": lambda: dropout(0.4),
    "relu": lambda: relu,
    "block": lambda: serial(conv=conv(CHANNELS, 1), norm=batch_norm(), drop=dropout(0.2)),
    "sum": lambda: add(identity, serial(conv=conv(CHANNELS, 3), norm=batch_norm())),
}
"""Layers that keep the shape, so that any sequence of them composes."""

kinds = st.sampled_from(sorted(LEAVES))
modes = st.sampled_from([TRAIN, EVALUATE, TRAIN._replace(batch_statistics=False), EVALUATE._replace(key=None)])


def sequence(kinds: list[str]) -> list[Layer]:
    """Layers under names of their own."""
    return [named(f"{kind}{i}", LEAVES[kind]()) for i, kind in enumerate(kinds)]


def init(layer: Layer, x: Tensor = X) -> tuple[Tree, Tree]:
    params, state, _ = layer.init(x.to("meta"), TRAIN)
    return params, state


def run(layer: Layer, mode: Mode, x: Tensor = X) -> tuple[Any, Tree]:
    return layer.apply(*init(layer, x), x, mode)


def assert_same(a: Layer, b: Layer, mode: Mode, x: Tensor = X) -> None:
    """The same trees, outputs and statistics, to the last bit."""
    assert a.names == b.names
    for mine, other in zip(init(a, x), init(b, x), strict=True):
        assert differences(mine, other) == []
    (y, state), (z, other_state) = run(a, mode, x), run(b, mode, x)
    assert torch.equal(y, z)
    assert differences(state, other_state) == []


@st.composite
def nestings(draw: st.DrawFn, layers: list[Layer]) -> Layer:
    """The layers in series, in brackets somehow."""
    parts = list(layers)
    while len(parts) > 1:
        start = draw(st.integers(0, len(parts) - 2))
        stop = draw(st.integers(start + 2, len(parts)))
        parts[start:stop] = [serial(*parts[start:stop])]
    return parts[0]


# Series ------------------------------------------------------------------------------------------------------


@given(st.lists(kinds, min_size=1, max_size=5), modes, st.data())
def test_series_is_associative(kinds: list[str], mode: Mode, data: st.DataObject) -> None:
    parts = sequence(kinds)
    assert_same(data.draw(nestings(parts)), serial(*parts), mode)


@given(st.lists(kinds, max_size=4), modes, st.data())
def test_identity_and_the_empty_series_are_neutral(kinds: list[str], mode: Mode, data: st.DataObject) -> None:
    parts = sequence(kinds)
    padded = list(parts)
    for _ in range(data.draw(st.integers(1, 3))):
        padded.insert(data.draw(st.integers(0, len(padded))), data.draw(st.sampled_from([identity, serial()])))
    assert_same(serial(*padded), serial(*parts), mode)


@given(st.lists(kinds, max_size=4), modes)
def test_keyword_children_are_named_children(kinds: list[str], mode: Mode) -> None:
    children = {f"layer{i}": LEAVES[kind]() for i, kind in enumerate(kinds)}
    assert_same(serial(**children), serial(*(named(name, child) for name, child in children.items())), mode)
    numbers = {str(i): child for i, child in enumerate(children.values())}
    assert_same(numbered(*children.values()), serial(**numbers), mode)


@given(kinds, modes)
def test_one_positional_child_is_transparent(kind: str, mode: Mode) -> None:
    layer = LEAVES[kind]()
    for combine in (serial, add, multiply, concat):
        assert_same(combine(layer), layer, mode)


@given(st.lists(kinds, min_size=1, max_size=4))
def test_series_is_the_composition(kinds: list[str]) -> None:
    parts = sequence(kinds)
    params, state = init(serial(*parts))
    x, now = X, state
    for part in parts:
        x, now = part.apply(params, now, x, TRAIN)
    y, new_state = serial(*parts).apply(params, state, X, TRAIN)
    assert torch.equal(x, y)
    assert differences(now, new_state) == []


@given(st.lists(kinds, min_size=2, max_size=5), modes)
def test_evaluation_gives_the_state_back(kinds: list[str], mode: Mode) -> None:
    layer = serial(*sequence(kinds))
    params, state = init(layer)
    _, new_state = layer.apply(params, state, X, mode)
    assert (new_state is state) == (not mode.batch_statistics or not state)
    assert list(tree.flatten(new_state)) == list(tree.flatten(state))


def test_names_nest_to_paths() -> None:
    layer = serial(stem=serial(conv=conv(4, 1), norm=batch_norm()), stage1=numbered(serial(conv1=conv(4, 1)), relu))
    params, state = init(layer)
    assert list(tree.flatten(params)) == [
        "stem.conv.weight",
        "stem.norm.weight",
        "stem.norm.bias",
        "stage1.0.conv1.weight",
    ]
    assert list(tree.flatten(state)) == ["stem.norm.mean", "stem.norm.var", "stem.norm.count"]


# Parallel ----------------------------------------------------------------------------------------------------

JOINS: dict[str, tuple[Callable[..., Layer], Callable[[list[Tensor]], Tensor]]] = {
    "add": (add, lambda ys: sum(ys[1:], start=ys[0])),
    "multiply": (multiply, lambda ys: torch.stack(ys).prod(0) if len(ys) < 3 else ys[0] * ys[1] * ys[2]),
    "concat": (concat, lambda ys: torch.cat(ys, dim=1)),
}


@pytest.mark.parametrize("join", JOINS)
@given(kinds=st.lists(kinds, min_size=1, max_size=3), mode=modes)
def test_parallel_layers_are_joined_by_the_formula(join: str, kinds: list[str], mode: Mode) -> None:
    combine, formula = JOINS[join]
    parts = sequence(kinds)
    layer = combine(*parts)
    params, state = init(layer)
    y, new_state = layer.apply(params, state, X, mode)
    assert torch.equal(y, formula([part.apply(params, state, X, mode)[0] for part in parts]))
    expected = state
    for part in parts:
        _, expected = part.apply(params, expected, X, mode)
    assert differences(new_state, expected) == []


@pytest.mark.parametrize("combine", [add, concat], ids=["add", "concat"])
@given(kinds=st.lists(kinds, min_size=3, max_size=3), mode=modes)
def test_parallel_is_associative(combine: Callable[..., Layer], kinds: list[str], mode: Mode) -> None:
    a, b, c = sequence(kinds)
    assert_same(combine(combine(a, b), c), combine(a, b, c), mode)
    if combine is concat:  # a sum of floating-point numbers depends on its order
        assert_same(combine(a, combine(b, c)), combine(a, b, c), mode)


def test_output_shapes_of_init_are_those_of_apply() -> None:
    for layer in (
        concat(identity, a=conv(5, 3)),
        add(a=conv(5, 3, 2), b=conv(5, 1, 2)),
        fork(identity, aux=conv(2, 1)),
    ):
        params, state, y = layer.init(X.to("meta"), TRAIN)
        output, _ = layer.apply(params, state, X, TRAIN)
        shapes = [leaf.shape for leaf in torch.utils._pytree.tree_leaves(y)]
        assert shapes == [leaf.shape for leaf in torch.utils._pytree.tree_leaves(output)]


# Forks -------------------------------------------------------------------------------------------------------


@given(kinds, kinds)
def test_fork_is_its_main_branch_in_evaluation(first: str, second: str) -> None:
    main = named("main", LEAVES[first]())
    forked = fork(main, aux=LEAVES[second]())
    params, state = init(forked)
    y, same = forked.apply(params, state, X, EVALUATE)
    assert same is state
    assert torch.equal(y, main.apply(params, state, X, EVALUATE)[0])
    assert isinstance(forked.apply(params, state, X, TRAIN)[0], Outputs)


def test_fork_without_heads_is_its_main_branch() -> None:
    main = conv(2, 1)
    assert fork(main) is main


def test_heads_of_nested_forks_come_from_shallow_to_deep() -> None:
    def constant(value: float) -> Layer:
        return layers.stateless(lambda x: torch.full_like(x, value))

    net = fork(serial(identity, fork(constant(0), aux3=constant(3))), aux1=constant(1), aux2=constant(2))
    output, _ = net.apply({}, {}, X, TRAIN)
    assert [float(y.mean()) for y in (output.logits, *output.aux)] == [0, 1, 2, 3]


# Clashes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combine", [serial, add, multiply, concat])
def test_two_layers_of_one_name(combine: Callable[..., Layer]) -> None:
    with pytest.raises(ValueError, match=r"two layers use \['conv'\]: give one of them a name"):
        combine(serial(conv=conv(3, 1)), conv=conv(3, 1))
    with pytest.raises(ValueError, match=r"two layers use \['weight'\]"):
        combine(conv(3, 1), conv(3, 1))
    with pytest.raises(ValueError, match=r"two layers use \['bias', 'weight'\]"):
        combine(conv(3, 1, bias=True), batch_norm())
    combine(named("a", serial(conv=conv(3, 1))), conv=conv(3, 1))


@pytest.mark.parametrize("combine", [serial, add, multiply, concat])
def test_pairs_by_hand_that_do_not_declare_their_names(combine: Callable[..., Layer]) -> None:
    def scale() -> Layer:
        return Layer(lambda x, mode: ({"scale": torch.ones(1)}, {}, x), lambda p, s, x, mode: (x * p["scale"], s))

    with pytest.raises(ValueError, match=r"two layers use \['scale'\]: give one of them a name"):
        combine(scale(), scale()).init(X, TRAIN)
    assert list(combine(scale(), other=scale()).init(X, TRAIN)[0]) == ["scale", "other"]


@pytest.mark.parametrize("combine", [serial, add, multiply, concat])
def test_two_unnamed_random_layers(combine: Callable[..., Layer]) -> None:
    with pytest.raises(ValueError, match="two random layers would share a mask"):
        combine(dropout(0.1), serial(relu, dropout(0.1)))
    combine(dropout(0.1), other=dropout(0.1))


@pytest.mark.parametrize("combine", [add, multiply, concat])
def test_nothing_cannot_be_joined(combine: Callable[..., Layer]) -> None:
    with pytest.raises(ValueError, match="no layers whose outputs"):
        combine()


def test_fork_whose_head_and_trunk_have_one_name() -> None:
    with pytest.raises(ValueError, match=r"two layers use \['head'\]"):
        fork(serial(head=conv(2, 1)), head=conv(2, 1))


@pytest.mark.parametrize("name", ["", "a.b", ".", "stage1."])
def test_names_have_no_dots(name: str) -> None:
    with pytest.raises(ValueError, match="non-empty and without dots"):
        named(name, relu)
    with pytest.raises(ValueError, match="non-empty and without dots"):
        serial(**{name: relu})


# Draws -------------------------------------------------------------------------------------------------------

ONES = torch.ones(2, 8, 8, 8)


def mask(layer: Layer, path: str, mode: Mode = TRAIN) -> Tensor:
    """What a network of dropouts lets pass at a path."""
    found: dict[str, Tensor] = {}

    def tap(at: str, x: Any, y: Any) -> Any:
        if at.endswith(DRAW):
            return y
        found[at] = y != 0
        return torch.ones_like(y)

    layer.apply({}, {}, ONES, mode._replace(tap=tap))
    return found[path]


def test_masks_depend_on_the_path_and_the_key_alone() -> None:
    a = mask(serial(a=dropout(0.5), b=dropout(0.5)), "a")
    b = mask(serial(a=dropout(0.5), b=dropout(0.5)), "b")
    assert not torch.equal(a, b)
    assert torch.equal(b, mask(serial(relu, identity, b=dropout(0.5)), "b"))
    assert torch.equal(b, mask(concat(identity, a=dropout(0.2), b=serial(relu, dropout(0.5))), "b"))
    deep = mask(serial(b=numbered(dropout(0.5), dropout(0.5))), "b.1")
    assert torch.equal(deep, mask(named("b", named("1", dropout(0.5))), "b.1"))
    assert not torch.equal(deep, mask(serial(b=numbered(dropout(0.5), dropout(0.5))), "b.0"))
    assert not torch.equal(a, mask(serial(a=dropout(0.5)), "a", TRAIN._replace(key=random.key(4))))


@given(st.lists(kinds, min_size=1, max_size=4), kinds, st.data())
def test_a_layers_draw_does_not_depend_on_its_neighbours(kinds: list[str], new: str, data: st.DataObject) -> None:
    parts = sequence(kinds)
    more = list(parts)
    more.insert(data.draw(st.integers(0, len(parts))), named("new", LEAVES[new]()))
    for less_tree, more_tree in zip(init(serial(*parts)), init(serial(*more)), strict=True):
        assert differences(less_tree, {name: more_tree[name] for name in less_tree}) == []


@given(st.permutations(["a", "b", "c"]))
def test_the_order_of_layers_does_not_matter_to_their_draws(order: list[str]) -> None:
    def leaves(names: list[str]) -> Tree:
        return init(concat(**{name: conv(2, 3, bias=True) for name in names}))[0]

    expected = leaves(["a", "b", "c"])
    assert differences(leaves(order), {name: expected[name] for name in order}) == []
    assert not torch.equal(expected["a"]["weight"], expected["b"]["weight"])


# Errors ------------------------------------------------------------------------------------------------------

words = st.text("abcdefgh0123456789_", min_size=1, max_size=6)


@given(st.lists(words, min_size=1, max_size=4))
def test_an_error_says_where(path: list[str]) -> None:
    layer = linear(2)  # wants vectors: weight (2, 3) meets an image of width 4
    for name in reversed(path):
        layer = serial(identity, add(**{name: layer}))
    params, state = init(layer, X.flatten(1)[:, :3])
    with pytest.raises(RuntimeError) as caught:
        layer.apply(params, state, X, EVALUATE)
    assert caught.value.__notes__ == [f"in layer '{'.'.join(path)}', input (2, 3, 5, 4)"]
    with pytest.raises(RuntimeError) as caught:
        serial(first=serial(small=conv(2, 9, padding=0)), **{path[0]: layer}).init(X.to("meta"), TRAIN)
    assert caught.value.__notes__ == ["in layer 'first.small', input (2, 3, 5, 4)"]


def test_an_error_about_something_else_keeps_its_notes() -> None:
    def fail(x: Any) -> Any:
        error = RuntimeError("no")
        error.add_note("a note of its own")
        raise error

    with pytest.raises(RuntimeError) as caught:
        serial(a=serial(b=layers.stateless(fail))).apply({}, {}, [1], EVALUATE)
    assert caught.value.__notes__ == ["a note of its own", "in layer 'a.b'"]


# Trees -------------------------------------------------------------------------------------------------------

leaves_by_path = st.dictionaries(st.lists(words, min_size=1, max_size=4).map(".".join), st.integers(), max_size=8)
trees = st.recursive(
    st.dictionaries(words, st.integers(), min_size=1, max_size=3),
    lambda inner: st.dictionaries(words, st.integers() | inner, min_size=1, max_size=3),
    max_leaves=12,
)


@given(trees)
def test_unflatten_undoes_flatten(values: Tree) -> None:
    flat = tree.flatten(values)
    assert tree.unflatten(flat) == values
    assert list(tree.flatten(tree.unflatten(flat)).items()) == list(flat.items())


def test_no_leaf_takes_the_path_of_another() -> None:
    with pytest.raises(ValueError, match=r"two leaves have the path 'a\.b'"):
        tree.flatten({"a.b": 1, "a": {"b": 2}})


@given(leaves_by_path)
def test_flatten_undoes_unflatten(flat: dict[str, int]) -> None:
    clash = any(other.startswith(f"{path}.") for path in flat for other in flat)
    if clash:
        with pytest.raises(ValueError, match="already"):
            tree.unflatten(flat)
    else:
        assert tree.flatten(tree.unflatten(flat)) == flat


@given(trees)
def test_map_laws(values: Tree) -> None:
    assert tree.map(lambda leaf: leaf, values) == values
    twice = tree.map(lambda leaf: 3 * leaf, tree.map(lambda leaf: leaf + 1, values))
    assert twice == tree.map(lambda leaf: 3 * (leaf + 1), values)
    assert tree.map(lambda a, b: a - b, values, values) == tree.map(lambda leaf: 0, values)
    assert tree.flatten(tree.map(str, values)) == {path: str(leaf) for path, leaf in tree.flatten(values).items()}


@given(trees, trees)
def test_map_of_different_trees(a: Tree, b: Tree) -> None:
    assume(tree.flatten(a).keys() != tree.flatten(b).keys())
    with pytest.raises(ValueError, match="differ"):
        tree.map(lambda x, y: x, a, b)


@pytest.mark.parametrize("pair", [({"a": 1}, {"a": {"b": 1}}), ({"a": {"b": 1}}, {"a": torch.zeros(1)})])
def test_map_of_a_leaf_and_a_tree(pair: tuple[Tree, Tree]) -> None:
    with pytest.raises(ValueError, match="'a' is a leaf in one and a tree in another"):
        tree.map(lambda x, y: x, *pair)


@given(st.lists(kinds, max_size=4))
def test_size_counts_numbers(kinds: list[str]) -> None:
    params, _ = init(serial(*sequence(kinds)))
    assert tree.size(params) == sum(leaf.numel() for leaf in tree.flatten(params).values())


def test_public_names_are_there() -> None:
    assert sorted(purecnn.__all__) == purecnn.__all__
    assert all(hasattr(purecnn, name) for name in purecnn.__all__)


@pytest.mark.parametrize("child", [torch.relu, batch_norm, 8])
def test_what_is_no_layer(child: Any) -> None:
    with pytest.raises(TypeError, match=r"'act' is not a layer but .*wrap a function of tensors in purecnn\.layers"):
        serial(act=child)


def test_a_tap_gives_what_flows_on() -> None:
    layer = named("stem", identity)
    with pytest.raises(TypeError, match="found None for 'stem'"):
        layer.apply({}, {}, torch.ones(1), Mode(tap=lambda path, x, y: None))
