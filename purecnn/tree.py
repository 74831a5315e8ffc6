"""Trees: nested dictionaries of tensors, which hold parameters, statistics and gradients.

A *path* is the names from the root to a leaf, joined by dots, as in ``"stage1.0.conv1.weight"``.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

Tree: TypeAlias = dict[str, Any]
"""A nested dictionary whose leaves are tensors."""


# isinstance(child, Mapping) is slow. Nearly all children are tensors or dictionaries, so these are checked first.
_TREES = (dict, Mapping)


def _collect(tree: Mapping[str, Any], prefix: str, leaves: dict[str, Any]) -> None:
    for name, child in tree.items():
        if type(child) is not Tensor and isinstance(child, _TREES):
            _collect(child, f"{prefix}{name}.", leaves)
        else:
            path = prefix + name
            if path in leaves:
                raise ValueError(f"two leaves have the path {path!r}, because a name contains a dot")
            leaves[path] = child


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of a tree as one dictionary from path to leaf, in the tree's order.

    >>> flatten({"stem": {"conv1": {"weight": 1, "bias": 2}}, "head": {"weight": 3}})
    {'stem.conv1.weight': 1, 'stem.conv1.bias': 2, 'head.weight': 3}

    Raises:
        ValueError: if two leaves have the same path, because a name contains a dot.
    """
    leaves: dict[str, Any] = {}
    _collect(tree, "", leaves)
    return leaves


def unflatten(leaves: Mapping[str, Any]) -> Tree:
    """The inverse of `flatten`: the tree with these leaves, given by path.

    >>> unflatten({"stem.conv1.weight": 1, "head.weight": 2})
    {'stem': {'conv1': {'weight': 1}}, 'head': {'weight': 2}}

    Raises:
        ValueError: if one path is a leaf and also the beginning of another path.
    """
    tree: Tree = {}
    for path, leaf in leaves.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ValueError(f"{path!r} goes through {parent!r}, which is already a leaf")
        if name in node:
            raise ValueError(f"{path!r} is a leaf, but already the beginning of another path")
        node[name] = leaf
    return tree


def map(function: Callable[..., Any], tree: Mapping[str, Any], *others: Mapping[str, Any]) -> Tree:
    """Apply ``function`` to the leaves of one tree, or of several with the same names.

    >>> map(lambda a, b: a + b, {"w": 1, "c": {"w": 2}}, {"w": 10, "c": {"w": 20}})
    {'w': 11, 'c': {'w': 22}}

    Raises:
        ValueError: if the trees' names differ.
    """
    for other in others:
        if tree.keys() != other.keys():
            raise ValueError(f"the trees differ: {sorted(tree)} and {sorted(other)}")
    mapped: Tree = {}
    for name, child in tree.items():
        same = [other[name] for other in others]
        inner = type(child) is not Tensor and isinstance(child, _TREES)
        for other in same:
            if (type(other) is not Tensor and isinstance(other, _TREES)) != inner:
                raise ValueError(f"the trees differ: {name!r} is a leaf in one and a tree in another")
        mapped[name] = map(function, child, *same) if inner else function(child, *same)
    return mapped


def fill(tree: Mapping[str, Any], leaves: Mapping[str, Any]) -> Tree:
    """A tree with the same structure and other leaves, given by path.

    >>> fill({"stem": {"weight": 1}, "head": 2}, {"head": 20, "stem.weight": 10})
    {'stem': {'weight': 10}, 'head': 20}
    """
    values = iter([leaves[path] for path in flatten(tree)])
    return map(lambda leaf: next(values), tree)


def size(tree: Mapping[str, Any]) -> int:
    """The total number of elements of all leaves.

    >>> import torch
    >>> size({"weight": torch.zeros(3, 4), "bias": torch.zeros(3)})
    15
    """
    return sum(leaf.numel() for leaf in flatten(tree).values() if isinstance(leaf, Tensor))


def device(tree: Mapping[str, Any]) -> torch.device:
    """The device of the first leaf; all leaves of a tree are expected on the same device."""
    leaf: Tensor = next(iter(flatten(tree).values()))
    return leaf.device


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Where names or shapes of two trees differ: one phrase for each path.

    >>> differences({"weight": torch.zeros(3)}, {"weight": torch.zeros(2), "bias": torch.zeros(3)})
    ['bias (expected nothing, found (3,))', 'weight (expected (3,), found (2,))']
    """
    one, other = ({path: tuple(leaf.shape) for path, leaf in flatten(each).items()} for each in (expected, found))
    return [
        f"{path} (expected {one.get(path, 'nothing')}, found {other.get(path, 'nothing')})"
        for path in sorted(one.keys() | other.keys())
        if one.get(path) != other.get(path)
    ]


def some(paths: Sequence[str]) -> str:
    """The first ten paths and the number of those left out, as text for error messages.

    >>> some([f"stage{i}" for i in range(12)])[-25:]
    'stage8, stage9 and 2 more'
    """
    more = f" and {len(paths) - 10} more" if len(paths) > 10 else ""
    return ", ".join(paths[:10]) + more
