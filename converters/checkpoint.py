"""Checkpoints: one safetensors file with a model, its parameters and everything else that a prediction needs.

The tensors are named by their paths, such as ``params.stem.conv.weight`` and ``state.stem.norm.mean``. The file's
metadata holds, as JSON, the model's name and settings, the preprocessing of its images and its class names, so the
model can be rebuilt from the file alone. Nothing is ever unpickled.
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
    """What a checkpoint's metadata say: model, preprocessing, class names and origin."""

    model: Model
    preprocessing: Preprocessing | None
    """How images become the model's input."""
    classes: tuple[str, ...] | None
    """The class names, in the order of the logits."""
    origin: Mapping[str, Any] | None
    """For published weights: their source and their accuracy."""


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
    """Write a checkpoint atomically: the whole file or nothing.

    Args:
        path: the file, ``.safetensors``; an existing one is replaced.
        model: created by name, as by `purecnn.create`.
        params, state: the model's trees.
        preprocessing: how images become the model's input.
        classes: the class names, in the order of the logits.
        origin: the source of published weights; JSON-serialisable.

    Raises:
        ConversionError: if the trees do not fit the model, if the number of class names is not its number of classes,
            or if `purecnn.create` does not know its name or would build another network.
        FileError: if the path does not end in ``.safetensors``.
    """
    if model.name not in purecnn.list_models():
        raise ConversionError(f"a checkpoint stores its model by name, and `purecnn list` has no {model.name!r}")
    _check_as_created(model, params, state)
    if classes is not None and len(classes) != model.num_classes:
        raise ConversionError(f"{model.name} has {model.num_classes} classes, but {len(classes)} class names are given")
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
    """Check that the trees fit the model that a reader will build from the file."""
    if not model.is_built:
        raise ConversionError(
            f"a checkpoint can only hold {model.name} as purecnn.create builds it, not folded or otherwise changed: "
            "save the network before it is folded"
        )
    try:
        check(model, params, state)
    except ConversionError:
        if count := _members((params, state), model.spec()):
            raise ConversionError(
                f"the trees hold an ensemble (a first axis of {count} members), but a checkpoint holds one network: "
                "save each of purecnn.ensembles.unstack((params, state))"
            ) from None
        raise


def _members(trees: tuple[Tree, Tree], spec: tuple[Tree, Tree]) -> int | None:
    """How many networks are stacked in the trees; None if they are not stacked."""
    given, expected = (
        {path: tuple(leaf.shape) for part in pair for path, leaf in tree.flatten(part).items()}
        for pair in (trees, spec)
    )
    counts = {shape[:1] for shape in given.values()}
    count = counts.pop() if len(counts) == 1 else ()
    stacked = {path: (*count, *shape) for path, shape in expected.items()}
    return count[0] if count and stacked == given else None


def load(path: str | os.PathLike[str]) -> tuple[Model, Tree, Tree]:
    """Read a checkpoint: its model, parameters and running statistics.

    Raises:
        FileError: if the file is missing, damaged or not a checkpoint.
        ConversionError: if its tensors do not fit its model.
    """
    found, params, state = restore(path, contents(path))
    return found.model, params, state


def is_checkpoint(found: Contents) -> bool:
    """Whether the contents of a file are a purecnn checkpoint."""
    return found.metadata.get("format") == FORMAT


def restore(path: str | os.PathLike[str], found: Contents) -> tuple[About, Tree, Tree]:
    """Build a checkpoint's metadata, parameters and running statistics from the contents of its file.

    Args:
        path: the file's name, for error messages.
        found: the file's contents.

    Raises:
        FileError: if it is not a checkpoint.
        ConversionError: if its tensors do not fit its model.
    """
    described = _about(path, found.metadata)
    trees = tree.unflatten(found.tensors)
    if others := sorted(trees.keys() - {"params", "state"}):
        raise ConversionError(f"{path} holds tensors outside of params and state: {tree.some(others)}")
    given = trees.get("params", {}), trees.get("state", {})
    try:
        check(described.model, *given)
    except ConversionError as error:
        raise ConversionError(f"{path}: {error}") from None
    # safetensors sorts its keys; put the trees back into the order of the network.
    params, state = (tree.map(lambda _, leaf: leaf, *pair) for pair in zip(described.model.spec(), given, strict=True))
    return described, params, state


def about(path: str | os.PathLike[str]) -> About:
    """The model, preprocessing, class names and origin of a checkpoint, without reading its tensors.

    Raises:
        FileError: if the file is missing, damaged or not a checkpoint.
    """
    with opened(path) as file:
        return _about(path, file.metadata() or {})


def _about(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> About:
    if metadata.get("format") != FORMAT:
        raise FileError(
            f"{path} is not a purecnn checkpoint; if it holds a state_dict, convert it first: "
            f"purecnn convert {path} NEW.safetensors --model NAME"
        )
    try:
        model = purecnn.create(metadata["model"], **json.loads(metadata["settings"]))
        preprocessing = json.loads(metadata["preprocessing"])
        classes = json.loads(metadata["classes"])
        if classes is not None:
            if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
                raise TypeError(f"its class names should be a list of strings, found {str(classes)[:80]}")
            if len(classes) != model.num_classes:
                raise ValueError(f"{model.name} has {model.num_classes} classes, found {len(classes)} class names")
        return About(
            model,
            Preprocessing.from_dict(preprocessing) if preprocessing else None,
            tuple(classes) if classes is not None else None,
            json.loads(metadata["origin"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise FileError(f"{path} describes a network that this version of purecnn cannot build: {error}") from error


def check(model: Model, params: Tree, state: Tree) -> None:
    """Check that trees have the names and shapes of a model.

    Raises:
        ConversionError: if they do not; the message names what differs.
    """
    try:
        model.check(params, state)
    except ValueError as error:
        raise ConversionError(str(error)) from None
