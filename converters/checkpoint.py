"""Checkpoints: one safetensors file that holds a model, its parameters and all that a prediction needs.

The tensors are named by their paths, ``params.stem.conv.weight`` and ``state.stem.norm.mean``. The file's
metadata holds, as JSON, the model's name and settings, the preprocessing of its images and the names of its
classes, so that the model is built again from the file alone. Nothing is ever unpickled.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import purecnn
from converters.files import Contents, FileError, contents, opened, write
from converters.rules import ConversionError
from purecnn import Model, tree
from purecnn.data import Preprocessing
from purecnn.tree import Tree

FORMAT = "purecnn-1"


@dataclass(frozen=True)
class About:
    """What a checkpoint says of itself."""

    model: Model
    preprocessing: Preprocessing | None
    """How images become the model's input."""
    classes: tuple[str, ...] | None
    """The names of the classes, in the order of the logits."""
    origin: Mapping[str, Any] | None
    """Of published weights, where they are from and how accurate they are."""


def save(
    path: str | os.PathLike[str],
    model: Model,
    params: Tree,
    state: Tree,
    *,
    preprocessing: Preprocessing | None = None,
    classes: Sequence[str] | None = None,
    origin: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint, wholly or not at all.

    Args:
        path: the file, ``.safetensors``; what is there is replaced.
        model: created by name, as by `purecnn.create`.
        params, state: the model's trees.
        preprocessing: how images become the model's input.
        classes: their names, in the order of the logits.
        origin: where published weights are from; JSON-able.

    Raises:
        ConversionError: if the trees are not the model's, there are more or fewer names than its classes, or no model
            of its name could be created again.
        FileError: if the path does not end in ``.safetensors``.
    """
    if model.name not in purecnn.list_models():
        raise ConversionError(f"a checkpoint names the model that it rebuilds, and there is none called {model.name!r}")
    _check_as_created(model, params, state)
    if classes is not None and len(classes) != model.num_classes:
        raise ConversionError(f"{model.name} has {model.num_classes} classes, and there are {len(classes)} names")
    metadata = {
        "format": FORMAT,
        "model": model.name,
        "settings": json.dumps(dict(model.settings)),
        "preprocessing": json.dumps(preprocessing.to_dict() if preprocessing else None),
        "classes": json.dumps(list(classes) if classes is not None else None),
        "origin": json.dumps(dict(origin) if origin is not None else None),
    }
    write(path, tree.flatten({"params": params, "state": state}), metadata)


def _check_as_created(model: Model, params: Tree, state: Tree) -> None:
    """That the trees are those of what a reader will build from the file."""
    if not model.is_built:
        raise ConversionError(
            f"a checkpoint holds {model.name} as purecnn.create builds it, not folded or otherwise changed: "
            "save the network before it is folded"
        )
    try:
        check(model, params, state)
    except ConversionError:
        if count := _members((params, state), model.spec()):
            raise ConversionError(
                f"the trees have a first axis of {count} members, and a checkpoint holds one network: "
                "save each of purecnn.ensembles.unstack((params, state))"
            ) from None
        raise


def _members(trees: tuple[Tree, Tree], spec: tuple[Tree, Tree]) -> int | None:
    """How many networks are stacked in the trees; None if they are not."""
    given, expected = (
        {path: tuple(leaf.shape) for part in pair for path, leaf in tree.flatten(part).items()}
        for pair in (trees, spec)
    )
    counts = {shape[:1] for shape in given.values()}
    count = counts.pop() if len(counts) == 1 else ()
    stacked = {path: (*count, *shape) for path, shape in expected.items()}
    return count[0] if count and stacked == given else None


def load(path: str | os.PathLike[str]) -> tuple[Model, Tree, Tree]:
    """The model of a checkpoint with its parameters and statistics.

    Raises:
        FileError: if the file is missing, damaged or not a checkpoint.
        ConversionError: if its tensors are not those of its model.
    """
    found, params, state = restore(path, contents(path))
    return found.model, params, state


def is_checkpoint(found: Contents) -> bool:
    """Whether a file holds a checkpoint of ours, rather than other tensors."""
    return found.metadata.get("format") == FORMAT


def restore(path: str | os.PathLike[str], found: Contents) -> tuple[About, Tree, Tree]:
    """What a checkpoint says of itself, the model's parameters and its statistics, from what its file holds.

    Args:
        path: the file's name, for errors.
        found: what it holds.

    Raises:
        FileError: if it is not a checkpoint.
        ConversionError: if its tensors are not those of its model.
    """
    described = _about(path, found.metadata)
    trees = tree.unflatten(found.tensors)
    if others := sorted(trees.keys() - {"params", "state"}):
        raise ConversionError(f"{path} holds more than a network: {tree.some(others)}")
    given = trees.get("params", {}), trees.get("state", {})
    try:
        check(described.model, *given)
    except ConversionError as error:
        raise ConversionError(f"{path}: {error}") from None
    # safetensors sorts its keys; a model's trees are in the order of the network.
    params, state = (tree.map(lambda _, leaf: leaf, *pair) for pair in zip(described.model.spec(), given, strict=True))
    return described, params, state


def about(path: str | os.PathLike[str]) -> About:
    """The model, preprocessing and classes of a checkpoint, without reading its tensors.

    Raises:
        FileError: if the file is missing, damaged or not a checkpoint.
    """
    with opened(path) as file:
        return _about(path, file.metadata() or {})


def _about(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> About:
    if metadata.get("format") != FORMAT:
        raise FileError(
            f"{path} is not a checkpoint of purecnn; if it holds a state_dict, convert it first: "
            f"purecnn convert {path} NEW.safetensors --model NAME"
        )
    try:
        model = purecnn.create(metadata["model"], **json.loads(metadata["settings"]))
        preprocessing = json.loads(metadata["preprocessing"])
        classes = json.loads(metadata["classes"])
        if classes is not None:
            if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
                raise TypeError(f"the names of its classes are a list of strings, found {str(classes)[:80]}")
            if len(classes) != model.num_classes:
                raise ValueError(f"{model.name} has {model.num_classes} classes, and there are {len(classes)} names")
        return About(
            model,
            Preprocessing.from_dict(preprocessing) if preprocessing else None,
            tuple(classes) if classes is not None else None,
            json.loads(metadata["origin"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise FileError(f"{path} describes no network that this version of purecnn can build: {error}") from error


def check(model: Model, params: Tree, state: Tree) -> None:
    """That trees have the names and shapes of a model.

    Raises:
        ConversionError: that names what differs.
    """
    try:
        model.check(params, state)
    except ValueError as error:
        raise ConversionError(str(error)) from None
