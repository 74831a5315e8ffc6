"""The algebra of layers: a layer is a pair of pure functions, and layers compose.

    params, state, y = layer.init(x, mode)           # x is a meta tensor: only its shape matters
    y, state = layer.apply(params, state, x, mode)

The idea comes from ``jax.example_libraries.stax``, with four changes: children have *names*, running
statistics are passed along as *state*, shapes are found by running layers on meta tensors, and the key of a
random draw is derived from the *path* of names at which it is made.

A combinator's keyword children are named: their parameters live in a sub-tree of that name. Its
positional children are transparent: they read and write the parent's own tree. Hence the laws
``serial(serial(a, b), c) == serial(a, b, c) == serial(a, serial(b, c))``. The price is that two
transparent children must not use the same name; building such a combination raises an error.
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
"""``tap(path, input, output) -> output`` is called after each named layer; its result replaces the layer's output.

It is called for each random mask, too: then ``path`` ends in `DRAW`, ``input`` is the probability of True and
``output`` is the mask."""

Law = Callable[[str, tuple[int, ...]], Initializer | float | None]
"""``law(path, shape)`` returns a parameter's initializer, or a number to fill it with, or None for the layer's own."""

Around = Callable[["Layer", Tree, Tree, Any, "Mode"], tuple[Any, Tree]]
"""``around(layer, params, state, x, mode) -> (y, state)`` is called in place of each layer that has its own tensors.

It may call ``layer.apply``; `Layer.kind` says what kind of layer it is. Tools that need the parameters and inputs layer
by layer are built on it, such as the norms of per-sample gradients."""

DRAW = "(draw)"
"""Marks a random draw: in `Layer.names`, one made at the layer's own path; and at the end of a tap's path."""


def _number(path: str) -> int:
    return zlib.crc32(path.encode())


# What torch.compiler.assume_constant_result does, without importing the compiler, which takes seconds.
vars(_number)["_dynamo_marked_constant"] = True


class Mode(NamedTuple):
    """How a network is run: the same for all its layers, except for the path."""

    train: bool = False
    """Draw random numbers, and run auxiliary heads."""
    batch_statistics: bool = False
    """Normalise by the batch's statistics and update the running ones."""
    key: Tensor | None = None
    """The key that all draws are derived from; see `purecnn.random`."""
    tap: Tap | None = None
    law: Law | None = None
    """In initialisation, overrides the initializers of the layers."""
    norm: Literal["batch", "group"] = "batch"
    """What batch normalisation layers run: batch normalisation, or group normalisation, which needs no batch."""
    synchronized: bool = False
    """Batch statistics are computed over the batches of all processes; see `purecnn.distributed`."""
    around: Around | None = None
    remat: bool = False
    """Blocks do not keep what the backward pass needs, but recompute it. A block is an outermost named layer whose
    children are not numbered: an element of a numbered list, or a part of the network that is no such list."""
    path: str = ""
    """The names from the root to this layer, joined by dots."""

    def enter(self, name: str) -> "Mode":
        """The mode of a child. Without key, tap, around and remat nothing reads the path, so it is not updated."""
        train, batch_statistics, key, tap, law, norm, synchronized, around, remat, path = self
        if key is None and tap is None and around is None and not remat:
            return self
        path = f"{path}.{name}" if path else name
        return Mode(train, batch_statistics, key, tap, law, norm, synchronized, around, remat, path)

    def draw_key(self) -> Tensor:
        """The key of this layer's draw: the run's key, folded with the layer's path.

        Raises:
            ValueError: if the network runs without a key.
        """
        if self.key is None:
            raise ValueError("this layer draws random numbers in training: pass key=purecnn.random.key(seed)")
        # A training step folds small numbers into the same key for its own draws, and the number of "" is 0.
        return random.fold_in(self.key, _number(self.path or DRAW))

    def bernoulli(self, p: float, shape: tuple[int, ...]) -> Tensor:
        """This layer's random mask: each value is True with probability ``p``; a tap sees it and may replace it.

        Raises:
            ValueError: if the network runs without a key.
        """
        mask = random.bernoulli(self.draw_key(), p, shape)
        if self.tap is None:
            return mask
        return self.tap(f"{self.path}.{DRAW}" if self.path else DRAW, p, mask)


class Outputs(NamedTuple):
    """What a network with auxiliary heads returns in training."""

    logits: Tensor
    aux: tuple[Tensor, ...]
    """The auxiliary heads' logits, from shallow to deep."""


def logits_of(outputs: Any) -> Tensor:
    """The network's main logits, without those of auxiliary heads."""
    logits: Tensor = outputs.logits if isinstance(outputs, Outputs) else outputs
    return logits


Init = Callable[[Any, Mode], tuple[Tree, Tree, Any]]
Apply = Callable[[Tree, Tree, Any, Mode], tuple[Any, Tree]]


@dataclass(frozen=True, slots=True)
class Layer:
    """A pure function with parameters and state: the pair of its ``init`` and its ``apply``."""

    init: Init
    """``(x, mode) -> (params, state, y)``: ``x`` and ``y`` are meta tensors. Without ``mode.key`` the
    parameters are meta tensors too."""
    apply: Apply
    """``(params, state, x, mode) -> (y, state)``: returns the given state with the layer's own entries
    replaced; in evaluation, the same object that it was given."""
    names: frozenset[str] = frozenset()
    """The names it uses in the tree, and `DRAW` if it draws at its own path."""
    kind: Any = None
    """For a layer with its own tensors, of a kind that tools know: that kind, and what they need to know about it, as
    in `purecnn.layers.Convolution`."""


_EMPTY: Tree = {}
_After: TypeAlias = tuple[Any, Tree]
"""An alias, because the compiler cannot subscript types in nested functions."""


def drawn(layer: Layer, law: Law) -> Layer:
    """The same layer, with its parameters drawn by ``law``; a law passed to `Model.init` takes precedence.

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
    """Add a note to a passing exception: in which layer it arose. Every level on the way up prepends its name."""
    if torch.compiler.is_compiling():  # the compiler cannot trace notes
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
        name: name of the sub-tree, and of the layer in errors and taps.
        layer: the layer; what it computes does not change.

    Raises:
        ValueError: if the name is empty or contains a dot, which separates the names in a path.

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
                raise TypeError(f"a tap must return the output that flows on, found None for {inner.path!r}")
        # With batch statistics the state is new. PyTorch 2.11's compiler cannot tell whether two dictionaries are one.
        same = not after if mode.batch_statistics else after is before
        return y, state if same else {**state, name: after}

    return Layer(init, apply, frozenset((name,)))


def _check_known(layer: Layer, params: Tree) -> None:
    """Check that no sub-tree is silently ignored. Single unknown tensors are allowed, such as the bias of a fold."""
    for name, part in params.items():
        if name not in layer.names and isinstance(part, Mapping):
            raise ValueError(
                f"there is no layer {name!r} here, but the parameters have one: they are those of another network"
            )


def _rematerialized(layer: Layer, params: Tree, state: Tree, x: Any, mode: Mode) -> tuple[Any, Tree]:
    def run(params: Tree, state: Tree, x: Any, key: Tensor | None) -> _After:
        return layer.apply(params, state, x, mode._replace(key=key, remat=False))

    y, after = rematerialize(run, params, state, x, mode.key)
    return y, after if mode.batch_statistics and state else state  # if nothing is new, the same object


def _children(positional: tuple[Layer, ...], keyword: Mapping[str, Layer]) -> tuple[list[Layer], frozenset[str]]:
    for name, layer in (*enumerate(positional), *keyword.items()):
        if not isinstance(layer, Layer):
            raise TypeError(
                f"{name!r} is not a layer but {layer!r}: call the function that makes the layer, or wrap a function of "
                "tensors in purecnn.layers.stateless"
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
    """Two layers' tensors in one tree; a `Layer` written by hand may not have declared its names."""
    if clash := sorted(first.keys() & second.keys()):
        raise ValueError(f"two layers use {clash}: give one of them a name")
    return {**first, **second}


def serial(*layers: Layer, **named_layers: Layer) -> Layer:
    """Run layers one after the other, positional ones first: ``serial(f, g)(x) = g(f(x))``.

    Raises:
        ValueError: if two layers use the same name in the tree, or would share a mask.

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
        raise ValueError("there are no layers whose outputs could be joined: give at least one")
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
    """The sum of the layers' outputs for the same input: ``add(identity, f)`` is a residual connection.

    The outputs must have the same shape. He et al. 2015, arXiv:1512.03385, figure 2.

    Raises:
        ValueError: as from `serial`, or if there are no layers.

    >>> from purecnn.layers import identity, stateless
    >>> add(identity, stateless(torch.square)).apply({}, {}, torch.tensor([3.0]), Mode())[0]
    tensor([12.])
    """
    return _parallel(lambda outputs: reduce(operator.add, outputs), layers, named_layers)


def multiply(*layers: Layer, **named_layers: Layer) -> Layer:
    """The product of the layers' outputs for the same input: ``multiply(identity, gate)`` is an attention gate.

    The outputs' shapes must broadcast. Hu et al. 2017, arXiv:1709.01507, figure 1.

    Raises:
        ValueError: as from `serial`, or if there are no layers.

    >>> from purecnn.layers import identity, stateless
    >>> multiply(identity, stateless(torch.square)).apply({}, {}, torch.tensor([3.0]), Mode())[0]
    tensor([27.])
    """
    return _parallel(lambda outputs: reduce(operator.mul, outputs), layers, named_layers)


def concat(*layers: Layer, **named_layers: Layer) -> Layer:
    """The layers' outputs for the same input, concatenated along the channels: dense blocks and inception modules.

    The outputs ``(b, c, ...)`` must have the same shape, except for the channels ``c``. Szegedy et al. 2014,
    arXiv:1409.4842, figure 2; Huang et al. 2016, arXiv:1608.06993, figure 1.

    Raises:
        ValueError: as from `serial`, or if there are no layers.

    >>> from purecnn.layers import identity, stateless
    >>> concat(identity, stateless(torch.square)).apply({}, {}, torch.tensor([[3.0]]), Mode())[0]
    tensor([[3., 9.]])
    """
    return _parallel(lambda outputs: torch.cat(outputs, dim=1), layers, named_layers)


def fork(main: Layer, **aux: Layer) -> Layer:
    """Attach auxiliary heads: the result returns ``main``'s output in evaluation, and `Outputs` in training.

    ``main`` may contain further forks; their heads come after this one's. Without heads the result is ``main``.

    Args:
        main: maps the input to the logits.
        aux: auxiliary heads, by name; each maps the same input to logits.

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
