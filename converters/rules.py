"""Invertible rules for names, and strict conversion of a flat dictionary of tensors to trees and back.

A rule is a pair of templates, such as ``("layer{s}.{b}.conv{i}", "stage{s}.{b}.conv{i}")``. A field in braces
stands for a whole number, and ``{b+1}`` for the number after ``{b}``. Both templates have the same fields, so a rule
can be applied from left to right and from right to left. The left side is always the other library's name.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from purecnn import Model, tree
from purecnn.tree import Tree


class ConversionError(ValueError):
    """Weights do not fit a model; the message names the differences, or the first of them if there are many."""


_FIELD = re.compile(r"\{(\w+)(?:\+(\d+))?\}")


class Template:
    """One side of a rule.

    >>> Template("denseblock{s}.denselayer{b+1}").match("denseblock2.denselayer7")
    {'s': 2, 'b': 6}
    >>> Template("stage{s}.{b}").fill({"s": 2, "b": 6})
    'stage2.6'
    >>> Template("block{s}.block{s}-{b}").match("block2.block3-0") is None  # a field that stands twice is one number
    True
    """

    def __init__(self, text: str):
        self.text = text
        self.offsets = {name: int(offset or 0) for name, offset in _FIELD.findall(text)}
        literals = _FIELD.split(text)[::3]
        names = [name for name, _ in _FIELD.findall(text)]
        fields = [f"(?P={name})" if name in names[:i] else f"(?P<{name}>0|[1-9][0-9]*)" for i, name in enumerate(names)]
        self.pattern = re.compile("".join(map("".join, zip(map(re.escape, literals), [*fields, ""], strict=True))))

    def match(self, name: str) -> dict[str, int] | None:
        """The numbers in the fields, or None if the name does not have this form."""
        found = self.pattern.fullmatch(name)
        if found is None:
            return None
        numbers = {field: int(found[field]) - offset for field, offset in self.offsets.items()}
        return numbers if all(number >= 0 for number in numbers.values()) else None

    def fill(self, numbers: Mapping[str, int]) -> str:
        """The name with these numbers in its fields."""
        return _FIELD.sub(lambda field: str(numbers[field[1]] + int(field[2] or 0)), self.text)


class Rules:
    """A table of rules: an invertible renaming.

    >>> rules = Rules(("conv1", "stem.conv"), ("layer{s}.{b}.bn{i}", "stage{s}.{b}.norm{i}"))
    >>> rules.forward("layer3.0.bn2"), rules.backward("stage3.0.norm2")
    ('stage3.0.norm2', 'layer3.0.bn2')

    ``layouts`` gives the other library's name and shape for tensors inside a layer that differ in both, as an einops
    pattern from our shape to theirs: ``{"layer_scale": ("gamma", "c 1 1 -> c")}``.

    Raises:
        ValueError: if the two sides of a rule do not have the same fields.
    """

    def __init__(self, *pairs: tuple[str, str], layouts: Mapping[str, tuple[str, str]] | None = None):
        self.layouts = dict(layouts or {})
        self.pairs = [(Template(left), Template(right)) for left, right in pairs]
        for left, right in self.pairs:
            if left.offsets.keys() != right.offsets.keys():
                raise ValueError(f"the fields differ in {left.text!r} and {right.text!r}")

    def forward(self, name: str) -> str:
        """From the other library's name to ours.

        Raises:
            ConversionError: if no rule matches the name, or two rules give it different names.
        """
        return self._rename(name, self.pairs)

    def backward(self, name: str) -> str:
        """From our name to the other library's; raises as `forward` does."""
        return self._rename(name, [(right, left) for left, right in self.pairs])

    @staticmethod
    def _rename(name: str, pairs: list[tuple[Template, Template]]) -> str:
        found = {target.fill(numbers) for source, target in pairs if (numbers := source.match(name)) is not None}
        if len(found) != 1:
            raise ConversionError(f"{'no rule renames' if not found else f'rules give {sorted(found)} for'} {name!r}")
        return found.pop()


LEAVES = Rules(
    ("weight", "weight"),
    ("bias", "bias"),
    ("running_mean", "mean"),
    ("running_var", "var"),
    ("num_batches_tracked", "count"),
    ("layer_scale", "layer_scale"),
)
"""torch.nn's names for the tensors in a layer, and ours."""


class Leaf(NamedTuple):
    """One tensor under its two names, with its shape."""

    key: str
    path: str
    meta: Tensor
    """A meta tensor of our shape and dtype."""
    layout: str | None = None
    """An einops pattern from our shape to the other library's; None if the shapes are equal."""

    def theirs(self, tensor: Tensor) -> Tensor:
        """Our tensor in the other library's shape, with the same values."""
        return tensor if self.layout is None else rearrange(tensor, self.layout)

    def ours(self, tensor: Tensor) -> Tensor:
        """The other library's tensor in our shape, with the same values."""
        return tensor if self.layout is None else rearrange(tensor, " -> ".join(self.layout.split(" -> ")[::-1]))


def leaves(model: Model, rules: Rules) -> tuple[list[Leaf], list[Leaf]]:
    """The model's parameters and its statistics, each with the other library's key."""

    def found(path: str, meta: Tensor) -> Leaf:
        layer, _, name = path.rpartition(".")
        theirs, layout = rules.layouts.get(name) or (LEAVES.backward(name), None)
        return Leaf(f"{rules.backward(layer)}.{theirs}", path, meta, layout)

    params, state = ([found(*leaf) for leaf in tree.flatten(part).items()] for part in model.spec())
    counts = Counter(leaf.key for leaf in (*params, *state))
    if twice := {key for key, count in counts.items() if count > 1}:
        raise ConversionError(f"the rules of {model.name} give each of {sorted(twice)} to two layers")
    return params, state


def to_trees(model: Model, rules: Rules, tensors: Mapping[str, Tensor]) -> tuple[Tree, Tree]:
    """Convert a flat dictionary to parameters and statistics: every key is used once, every leaf filled once.

    Tensors are neither copied nor reshaped, except where the rules have layouts. Files from before PyTorch 0.4.1 have
    no batch counters; these are set to zero, as PyTorch does.

    Raises:
        ConversionError: if keys are missing, unexpected or of the wrong shape; the message names them.
    """
    names = list(tensors)
    params, state = leaves(model, rules)
    if not any(key.endswith(".num_batches_tracked") for key in tensors):
        device = next(iter(tensors.values())).device if tensors else None
        zero = torch.zeros((), dtype=torch.int64, device=device)
        zeros = {leaf.key: zero.clone() for leaf in state if leaf.path.endswith(".count")}
        tensors = {**tensors, **zeros}
    expected = {leaf.key: leaf.theirs(leaf.meta) for leaf in (*params, *state)}
    missing = [key for key in expected if key not in tensors]
    unexpected = [key for key in tensors if key not in expected]
    other = [
        f"{key} (expected {_form(meta)}, found {_form(tensors[key])})"
        for key, meta in expected.items()
        if key in tensors and not _fits(tensors[key], meta)
    ]
    if prefix := wrapping(names, expected):
        raise ConversionError(
            f"all keys begin with {prefix!r}, added by a wrapper such as DataParallel or torch.compile: "
            f"use {{key.removeprefix({prefix!r}): tensor for key, tensor in state_dict.items()}}"
        )
    complaints = [
        f"{len(keys)} {what}: {tree.some(keys)}"
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", other))
        if keys
    ]
    if model.norm == "group" and any(key.endswith(".running_mean") for key in unexpected):
        complaints.append(
            'norm="group" has no running statistics: convert with norm="batch", and keep only the parameters'
        )
    if complaints:
        raise ConversionError(f"the weights do not fit {model.name}; {'; '.join(complaints)}")
    first, second = (
        tree.unflatten({leaf.path: leaf.ours(tensors[leaf.key]) for leaf in part}) for part in (params, state)
    )
    return first, second


def wrapping(names: Sequence[str], expected: Collection[str]) -> str | None:
    """The prefix that all names share and that hides expected names; None if there is none."""
    beginnings = [name[: dot.end()] for name in names[:1] for dot in re.finditer(r"\.", name)]
    shared = [each for each in beginnings if all(name.startswith(each) for name in names)]
    return next((each for each in shared if any(name.removeprefix(each) in expected for name in names)), None)


def _fits(tensor: Tensor, meta: Tensor) -> bool:
    return tensor.shape == meta.shape and tensor.is_floating_point() == meta.is_floating_point()


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{tuple(tensor.shape)}"


def to_tensors(model: Model, rules: Rules, params: Tree, state: Tree) -> dict[str, Tensor]:
    """Convert trees to the flat dictionary that `to_trees` reads; the tensors are the trees' own, not copies.

    Raises:
        ConversionError: if the trees do not fit the model.
    """
    tensors: dict[str, Tensor] = {}
    for part, given in zip(leaves(model, rules), (params, state), strict=True):
        found = tree.flatten(given)
        wrong = {leaf.path for leaf in part} ^ found.keys()
        wrong |= {leaf.path for leaf in part if leaf.path in found and not _fits(found[leaf.path], leaf.meta)}
        if wrong:
            raise ConversionError(f"the trees do not fit {model.name}: they differ in {tree.some(sorted(wrong))}")
        tensors |= {leaf.key: leaf.theirs(found[leaf.path]) for leaf in part}
    return tensors
