"""Load networks with weights from a checkpoint, a file in torchvision's names, or torchvision's or timm's downloads."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torchvision.models import WeightsEnum

import purecnn
from converters import checkpoint, files, timm
from converters import torchvision as tv
from converters.files import FileError
from converters.rules import ConversionError
from purecnn import Model, tree
from purecnn.data import Preprocessing
from purecnn.tree import Tree


@dataclass(frozen=True)
class Source:
    """A network with weights, and what is known about its input and output."""

    model: Model
    params: Tree
    state: Tree
    preprocessing: Preprocessing | None
    classes: tuple[str, ...] | None
    origin: Mapping[str, Any] | None
    """For published weights: their source and their accuracy."""
    assumed: bool = False
    """Whether ImageNet's classes and preprocessing are only assumed, because nothing says what a file of 1,000 classes
    was trained on."""

    def single(self) -> "Source":
        """The same network in single precision, the dtype of preprocessed images; integers are kept."""
        params, state = (
            tree.map(lambda leaf: leaf.float() if leaf.is_floating_point() else leaf, part)
            for part in (self.params, self.state)
        )
        return replace(self, params=params, state=state)


TIMM = "timm:"
"""The prefix of the names of timm's weights."""


class NamelessError(ConversionError):
    """Neither the file nor the caller says which model the weights are for."""


def load(source: str | os.PathLike[str], name: str | None = None, entry: str | None = None) -> Source:
    """Load a network with weights.

    Args:
        source: a purecnn checkpoint; a ``.safetensors`` or ``.pth`` file in torchvision's names; the name of weights
            that torchvision publishes, such as ``DEFAULT``; or ``timm:`` followed by the name of weights that timm
            publishes, or by nothing for its default.
        name: the model's name; a checkpoint knows it, all other sources need it.
        entry: see `converters.files.read`.

    Raises:
        FileError: if the file is missing, damaged or of the wrong kind.
        NamelessError: if neither the source nor ``name`` says which model the weights are for.
        ConversionError: if the source holds another model's weights.
    """
    path, words = Path(source), str(source)
    is_file = not words.startswith(TIMM) and (path.is_file() or bool(path.suffix))
    if entry is not None and not is_file:
        raise FileError(f"an entry is part of a file, but {source} is not a file: leave out the entry {entry!r}")
    found = files.contents(path, entry) if is_file else None
    if found is not None and checkpoint.is_checkpoint(found):
        about, params, state = checkpoint.restore(path, found)
        if name not in (None, about.model.name):
            raise ConversionError(f"{path} is a checkpoint of {about.model.name}, not of {name}")
        return Source(about.model, params, state, about.preprocessing, about.classes, about.origin)
    if found is not None and (kind := found.metadata.get("format", "")).startswith("purecnn"):
        raise FileError(f"{path} is not a checkpoint of the format {checkpoint.FORMAT}, but of the format {kind}")
    if name is None:
        raise NamelessError(f"{source} does not say which model its weights are for: name it")
    if found is not None:
        return _from_state_dict(name, found.tensors, path.name)
    if words.startswith(TIMM):
        weights = words.removeprefix(TIMM) or None
        model, preprocessing, origin = timm.about(purecnn.create(name), weights)
        classes = tv.classes(tv.weights_entry(purecnn.create("resnet50"))) if model.num_classes == 1000 else None
        return Source(model, *timm.pretrained(model, weights), preprocessing, classes, origin)
    published = tv.weights_entry(purecnn.create(name), words)
    model = _published(name, published)
    return Source(
        model,
        *tv.pretrained(model, published),
        tv.preprocessing(published),
        tv.classes(published),
        tv.origin(published),
    )


def _published(name: str, entry: WeightsEnum) -> Model:
    """The model that torchvision's published weights need, for the image size that they are evaluated at."""
    settings: dict[str, Any] = {"transform_input": True} if "transform_input" in purecnn.create(name).settings else {}
    return purecnn.create(name, image_size=tv.preprocessing(entry).size, **settings)


def _from_state_dict(name: str, state_dict: Mapping[str, Tensor], file: str) -> Source:
    """Build the model with as many classes and channels as the weights have, and convert them.

    If these are ImageNet's numbers, the source gets ImageNet's preprocessing and class names. The file's name tells
    which of torchvision's published weights they are; with any other name they are taken for the default ones. The
    prefix that a wrapper, such as DataParallel, adds to all keys is removed.
    """
    model = purecnn.create(name)
    state_dict = tv.unwrapped(model, state_dict)
    published = next((entry for entry in tv.weights_entries(model) if entry.url.endswith(f"/{file}")), None)
    entry = published or tv.weights_entry(model)
    classes, channels = tv.sizes(model, state_dict)
    if (classes, channels) != (model.num_classes, model.in_channels):
        model = purecnn.create(name, num_classes=classes, in_channels=channels)
        return Source(model, *tv.from_state_dict(model, state_dict), None, None, None)
    model = _published(name, entry)
    trees = tv.from_state_dict(model, state_dict)
    origin = None if published is None else tv.origin(published)
    return Source(model, *trees, tv.preprocessing(entry), tv.classes(entry), origin, assumed=published is None)
