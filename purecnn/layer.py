"""The algebra: a layer is a pair of pure functions, and layers compose.

    params, state, y = layer.init(x, mode)           # x is a meta tensor: its shape is all that matters
    y, state = layer.apply(params, state, x, mode)

The idea is that of ``jax.example_libraries.stax``, with four changes. Children have *names*, statistics
travel as *state*, shapes come from running layers on meta tensors, and the key of a random draw is
folded from the *path* of names at the point of the draw.

A combinator's keyword children are named: their parameters live in a sub-tree of that name. Its
positional children are transparent: they read and write the parent's own tree. Hence the laws
``serial(serial(a, b), c) == serial(a, b, c) == serial(a, serial(b, c))``. The price is that two
transparent children must not use one name, which raises as soon as it is written.
"""

import operator
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from purecnn import random
from purecnn.initializers import Initializer
from purecnn.remat import rematerialize
from purecnn.tree import Tree

Tap = Callable[[str, Any, Any], Any]
"""``tap(path, input, output) -> output`` is called as each named layer ends; what it returns flows on.

Of a random draw, ``path`` ends in `DRAW`, ``input`` is the probability of True and ``output`` the mask."""

Law = Callable[[str, tuple[int, ...]], Initializer | float | None]
"""``law(path, shape)`` says how a tensor is drawn, or with which number it is filled; None leaves it to its layer."""

Around = Callable[["Layer", Tree, Tree, Any, "Mode"], tuple[Any, Tree]]
"""``around(layer, params, state, x, mode) -> (y, state)`` runs each layer that has tensors of its own, in its stead.

It may call ``layer.apply``; `Layer.kind` says what sort of layer it is. What tools are made of that look at parameters
and inputs layer by layer, such as the norms of per-sample gradients."""

DRAW = "(draw)"
"""Stands for a random draw: in `Layer.names` if it is made at the layer's own path, and in a tap's path."""


def _number(path: str) -> int:
    return zlib.crc32(path.encode())


# What torch.compiler.assume_constant_result does, but for importing the compiler, which takes seconds.
vars(_number)["_dynamo_marked_constant"] = True


class Mode(NamedTuple):
    """How a network is run; the same for all its layers, but for the path."""

    train: bool = False
    """Draw random numbers, and run auxiliary heads."""
    batch_statistics: bool = False
    """Normalise by the batch's statistics and update the running ones."""
    key: Tensor | None = None
    """The key of all draws; see `purecnn.random`."""
    tap: Tap | None = None
    law: Law | None = None
    """In initialisation, overrides the laws that layers bring along."""
    norm: Literal["batch", "group"] = "batch"
    """What stands where a network has batch normalisation: itself, or group normalisation, which needs no batch."""
    synchronized: bool = False
    """A batch's statistics are those of all processes' batches together; see `purecnn.distributed`."""
    around: Around | None = None
    remat: bool = False
    """Blocks do not keep what the backward pass needs, but compute it again. A block is a named layer that is no list
    of numbered ones: an element of such a list, or a part of the network that has none."""
    path: str = ""
    """The names from the root to this layer, joined by dots."""

    def enter(self, name: str) -> "Mode":
        """The mode of a child. Without key, tap and around nobody asks for the path, so it is not kept."""
        train, batch_statistics, key, tap, law, norm, synchronized, around, remat, path = self
        if key is None and tap is None and around is None and not remat:
            return self
        path = f"{path}.{name}" if path else name
        return Mode(train, batch_statistics, key, tap, law, norm, synchronized, around, remat, path)

    def draw_key(self) -> Tensor:
        """The key of this layer's draw: the run's key folded with the layer's path.

        Raises:
            ValueError: if the network runs without a key.
        """
        if self.key is None:
            raise ValueError("this layer draws random numbers in training: pass key=purecnn.random.key(seed)")
        # A step's own draws take small numbers of the same key, and the number of "" is 0.
        return random.fold_in(self.key, _number(self.path or DRAW))

    def bernoulli(self, p: float, shape: tuple[int, ...]) -> Tensor:
        """This layer's mask, each value True with probability ``p``; a tap sees it, and may replace it.

        Raises:
            ValueError: if the network runs without a key.
        """
        mask = random.bernoulli(self.draw_key(), p, shape)
        if self.tap is None:
            return mask
        return self.tap(f"{self.path}.{DRAW}" if self.path else DRAW, p, mask)


class Outputs(NamedTuple):
    """What a network with auxiliary heads gives in training."""

    logits: Tensor
    aux: tuple[Tensor, ...]
    """The auxiliary heads' logits, from shallow to deep."""


def logits_of(outputs: Any) -> Tensor:
    """The network's own logits, without those of auxiliary heads."""
    logits: Tensor = outputs.logits if isinstance(outputs, Outputs) else outputs
    return logits


Init = Callable[[Any, Mode], tuple[Tree, Tree, Any]]
Apply = Callable[[Tree, Tree, Any, Mode], tuple[Any, Tree]]


@dataclass(frozen=True, slots=True)
class Layer:
    """A pure function with parameters and state, as the pair of its initialisation and its application."""

    init: Init
    """``(x, mode) -> (params, state, y)``: ``x`` and ``y`` are meta tensors. Without ``mode.key`` the
    parameters are meta tensors too."""
    apply: Apply
    """``(params, state, x, mode) -> (y, state)``: the state that it was given, with its own entries
    replaced; in evaluation the very same object."""
    names: frozenset[str] = frozenset()
    """The names it uses in the tree, and `DRAW` if it draws at its own path."""
    kind: Any = None
    """Of a layer with tensors of its own, what sort it is, if it is one that tools know, with what they need to know:
    see `purecnn.layers.Convolution`."""


_EMPTY: Tree = {}
_After: TypeAlias = tuple[Any, Tree]
"""By a name, because the compiler cannot subscript types in functions inside of functions."""


def drawn(layer: Layer, law: Law) -> Layer:
    """The layer, its parameters drawn by ``law``, unless a law of the run says otherwise.

    >>> from purecnn.layers import linear
    >>> ones = drawn(linear(2), lambda path, shape: 1.0 if path.endswith("weight") else None)
    >>> ones.init(torch.empty(1, 3, device="meta"), Mode(key=random.key(0)))[0]["weight"]
    tensor([[1., 1., 1.],
            [1., 1., 1.]])
    """

    def init(x: Any, mode: Mode) -> tuple[Tree, Tree, Any]:
        def chosen(path: str, shape: tuple[int, ...]) -> Initializer | float | None:
            found = None if mode.law is None else mode.law(path, shape)
            return law(path, shape) if found is None else found

        return layer.init(x, mode._replace(law=chosen))

    return Layer(init, layer.apply, layer.names, layer.kind)


def _blame(error: Exception, name: str, x: Any) -> None:
    """Note on a passing exception in which layer it arose; every level on the way up prepends its name."""
    if torch.compiler.is_compiling():  # which cannot trace notes
        return
    notes = getattr(error, "__notes__", [])
    start = "in layer '"
    if notes and notes[-1].startswith(start):
        notes[-1] = f"{start}{name}.{notes[-1].removeprefix(start)}"
    else:
        shape = f", input {tuple(x.shape)}" if isinstance(x, Tensor) else ""
        error.add_note(f"{start}{name}'{shape}")


def named(name: str, layer: Layer) -> Layer:
    """Put a layer's parameters and statistics into a sub-tree called ``name``.

    Args:
        name: of the sub-tree, and of the layer in errors and for taps.
        layer: which computes as before.

    Raises:
        ValueError: if the name is empty or has a dot in it, which paths are joined by.

    >>> from purecnn.layers import linear
    >>> params, state, y = named("head", linear(2)).init(torch.empty(1, 3, device="meta"), Mode())
    >>> list(params), list(params["head"])
    (['head'], ['weight', 'bias'])
    """
    if not name or "." in name:
        raise ValueError(f"a layer's name must be non-empty and without dots, found {name!r}")
    is_list = any(child.isdigit() for child in layer.names)
    names = layer.names

    def init(x: Any, mode: Mode) -> tuple[Tree, Tree, Any]:
        try:
            params, state, y = layer.init(x, mode.enter(name))
        except Exception as error:
            _blame(error, name, x)
            raise
        return {name: params} if params else {}, {name: state} if state else {}, y

    def apply(params: Tree, state: Tree, x: Any, mode: Mode) -> tuple[Any, Tree]:
        own = params.get(name, _EMPTY)
        before = state.get(name, _EMPTY)
        inner = mode.enter(name)
        try:
            if not own.keys() <= names and mode.around is None:
                _check_known(layer, own)
            if mode.remat and not is_list:
                y, after = _rematerialized(layer, own, before, x, inner)
            else:
                y, after = layer.apply(own, before, x, inner)
        except Exception as error:
            _blame(error, name, x)
            raise
        if inner.tap is not None:
            y = inner.tap(inner.path, x, y)
            if y is None:
                raise TypeError(f"a tap gives what flows on, found None for {inner.path!r}")
        # Statistics of the batch are new ones; PyTorch 2.11's compiler could not tell, of two dictionaries.
        same = not after if mode.batch_statistics else after is before
        return y, state if same else {**state, name: after}

    return Layer(init, apply, frozenset((name,)))


def _check_known(layer: Layer, params: Tree) -> None:
    """That nobody's layers are left out silently. Single tensors may be beside a layer's own, as a folded bias is."""
    for name, part in params.items():
        if name not in layer.names and isinstance(part, Mapping):
            raise ValueError(f"there is no layer {name!r} here, but parameters of one: they are another network's")


def _rematerialized(layer: Layer, params: Tree, state: Tree, x: Any, mode: Mode) -> tuple[Any, Tree]:
    def run(params: Tree, state: Tree, x: Any, key: Tensor | None) -> _After:
        return layer.apply(params, state, x, mode._replace(key=key, remat=False))

    y, after = rematerialize(run, params, state, x, mode.key)
    return y, after if mode.batch_statistics and state else state  # the same object where nothing is new


def _children(positional: tuple[Layer, ...], keyword: Mapping[str, Layer]) -> tuple[list[Layer], frozenset[str]]:
    for name, layer in (*enumerate(positional), *keyword.items()):
        if not isinstance(layer, Layer):
            raise TypeError(
                f"{name!r} is no layer but {layer!r}: call what makes one, and wrap a function of tensors in "
                "purecnn.layers.stateless"
            )
    layers = [*positional, *(named(name, layer) for name, layer in keyword.items())]
    names: frozenset[str] = frozenset()
    for layer in layers:
        if clash := names & layer.names:
            what = "two random layers would share a mask" if clash == {DRAW} else f"two layers use {sorted(clash)}"
            raise ValueError(f"{what}: give one of them a name")
        names |= layer.names
    return layers, names


def _joined(first: Tree, second: Tree) -> Tree:
    """Two layers' tensors in one tree; a pair written by hand may not have declared its names."""
    if clash := sorted(first.keys() & second.keys()):
        raise ValueError(f"two layers use {clash}: give one of them a name")
    return {**first, **second}


def serial(*layers: Layer, **named_layers: Layer) -> Layer:
    """One layer after the other, positional ones first: ``serial(f, g)(x) = g(f(x))``.

    Raises:
        ValueError: if two layers use one name in the tree, or would share a mask.

    >>> from purecnn.layers import conv, relu
    >>> block = serial(conv1=conv(8, 3), relu1=relu, conv2=conv(4, 1))
    >>> params, state, y = block.init(torch.empty(1, 3, 16, 16, device="meta"), Mode())
    >>> {name: tuple(child["weight"].shape) for name, child in params.items()}, tuple(y.shape)
    ({'conv1': (8, 3, 3, 3), 'conv2': (4, 8, 1, 1)}, (1, 4, 16, 16))
    """
    children, names = _children(layers, named_layers)
    applies = [child.apply for child in children]

    def init(x: Any, mode: Mode) -> tuple[Tree, Tree, Any]:
        params: Tree = {}
        state: Tree = {}
        for child in children:
            own_params, own_state, x = child.init(x, mode)
            params, state = _joined(params, own_params), _joined(state, own_state)
        return params, state, x

    def apply(params: Tree, state: Tree, x: Any, mode: Mode) -> tuple[Any, Tree]:
        for child in applies:
            x, state = child(params, state, x, mode)
        return x, state

    return Layer(init, apply, names)


def numbered(*layers: Layer) -> Layer:
    """`serial` with the names ``"0"``, ``"1"``, ``"2"`` ...

    >>> from purecnn.layers import conv
    >>> list(numbered(conv(8, 3), conv(4, 1)).init(torch.empty(1, 3, 16, 16, device="meta"), Mode())[0])
    ['0', '1']
    """
    return serial(**{str(i): layer for i, layer in enumerate(layers)})


def _parallel(join: Callable[[list[Any]], Any], layers: tuple[Layer, ...], keyword: Mapping[str, Layer]) -> Layer:
    children, names = _children(layers, keyword)
    if not children:
        raise ValueError("there are no layers whose outputs could be joined")
    applies = [child.apply for child in children]

    def init(x: Any, mode: Mode) -> tuple[Tree, Tree, Any]:
        params: Tree = {}
        state: Tree = {}
        outputs = []
        for child in children:
            own_params, own_state, y = child.init(x, mode)
            params, state = _joined(params, own_params), _joined(state, own_state)
            outputs.append(y)
        return params, state, join(outputs)

    def apply(params: Tree, state: Tree, x: Any, mode: Mode) -> tuple[Any, Tree]:
        outputs = []
        for child in applies:
            y, state = child(params, state, x, mode)
            outputs.append(y)
        return join(outputs), state

    return Layer(init, apply, names)


def add(*layers: Layer, **named_layers: Layer) -> Layer:
    """The sum of the layers' outputs on one input: ``add(identity, f)`` is a residual connection.

    The outputs have the same shape. He et al. 2015, arXiv:1512.03385, figure 2.

    Raises:
        ValueError: as from `serial`, or if there are no layers.

    >>> from purecnn.layers import identity, stateless
    >>> add(identity, stateless(torch.square)).apply({}, {}, torch.tensor([3.0]), Mode())[0]
    tensor([12.])
    """
    return _parallel(lambda outputs: reduce(operator.add, outputs), layers, named_layers)


def multiply(*layers: Layer, **named_layers: Layer) -> Layer:
    """The product of the layers' outputs on one input: ``multiply(identity, gate)`` is an attention gate.

    The outputs have shapes that broadcast. Hu et al. 2017, arXiv:1709.01507, figure 1.

    Raises:
        ValueError: as from `serial`, or if there are no layers.

    >>> from purecnn.layers import identity, stateless
    >>> multiply(identity, stateless(torch.square)).apply({}, {}, torch.tensor([3.0]), Mode())[0]
    tensor([27.])
    """
    return _parallel(lambda outputs: reduce(operator.mul, outputs), layers, named_layers)


def concat(*layers: Layer, **named_layers: Layer) -> Layer:
    """The layers' outputs on one input, joined along the channels: dense blocks and inception modules.

    The outputs have the same shape ``(b, c, ...)`` but for the channels ``c``. Szegedy et al. 2014, arXiv:1409.4842,
    figure 2; Huang et al. 2016, arXiv:1608.06993, figure 1.

    Raises:
        ValueError: as from `serial`, or if there are no layers.

    >>> from purecnn.layers import identity, stateless
    >>> concat(identity, stateless(torch.square)).apply({}, {}, torch.tensor([[3.0]]), Mode())[0]
    tensor([[3., 9.]])
    """
    return _parallel(lambda outputs: torch.cat(outputs, dim=1), layers, named_layers)


def fork(main: Layer, **aux: Layer) -> Layer:
    """A side branch to auxiliary heads: ``main``'s output in evaluation, `Outputs` in training.

    ``main`` may hold further forks; their heads come after this one's. Without heads it is ``main``.

    Args:
        main: from the input to the logits.
        aux: auxiliary heads, by name, from the same input to logits.

    Raises:
        ValueError: as from `serial`.

    >>> from purecnn.layers import linear
    >>> layer = fork(named("head", linear(2)), aux1=linear(2))
    >>> params, state, y = layer.init(torch.empty(1, 3, device="meta"), Mode())
    >>> list(params), type(y).__name__, len(y.aux)
    (['aux1', 'head'], 'Outputs', 1)
    """
    if not aux:
        return main
    (main, *heads), names = _children((main,), aux)

    def join(y: Any, aux: list[Tensor]) -> Outputs:
        return Outputs(y.logits, (*aux, *y.aux)) if isinstance(y, Outputs) else Outputs(y, tuple(aux))

    def init(x: Any, mode: Mode) -> tuple[Tree, Tree, Any]:
        params: Tree = {}
        state: Tree = {}
        aux = []
        for child in heads:
            own_params, own_state, y = child.init(x, mode)
            params, state = _joined(params, own_params), _joined(state, own_state)
            aux.append(y)
        own_params, own_state, y = main.init(x, mode)
        return params | own_params, state | own_state, join(y, aux)

    def apply(params: Tree, state: Tree, x: Any, mode: Mode) -> tuple[Any, Tree]:
        if not mode.train:
            return main.apply(params, state, x, mode)
        aux = []
        for child in heads:
            y, state = child.apply(params, state, x, mode)
            aux.append(y)
        y, state = main.apply(params, state, x, mode)
        return join(y, aux), state

    return Layer(init, apply, names)
