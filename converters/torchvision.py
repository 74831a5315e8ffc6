"""Convert torchvision's state_dicts and modules to and from our trees, and load its published weights.

    params, state = from_state_dict(model, module.state_dict())
    module.load_state_dict(to_state_dict(model, params, state))     # strict

`converters.families` has the names and modules; `converters.library` documents the functions.

>>> import purecnn, torchvision
>>> model = purecnn.create("squeezenet1_1")
>>> params, state = from_state_dict(model, torchvision.models.squeezenet1_1().state_dict())
>>> params["head"]["conv"]["weight"].shape
torch.Size([1000, 512, 1, 1])
"""

import math
from typing import Any

import torch
from torch import Tensor
from torchvision import models
from torchvision.models import WeightsEnum

import purecnn
from converters.families import FAMILIES
from converters.library import Family, Library
from converters.rules import ConversionError
from purecnn import Model
from purecnn.data import Preprocessing
from purecnn.model import find
from purecnn.tree import Tree


def _find(model: Model) -> Family | None:
    if model.name not in models.list_models():
        return None
    return FAMILIES[find(model.name).build.__module__.rpartition(".")[2]]


LIBRARY = Library("torchvision", _find)

has = LIBRARY.has
family = LIBRARY.family
head_key = LIBRARY.head_key
sizes = LIBRARY.sizes
unwrapped = LIBRARY.unwrapped
from_state_dict = LIBRARY.from_state_dict
to_state_dict = LIBRARY.to_state_dict
to_module = LIBRARY.to_module


def weights_entry(model: Model, name: str = "DEFAULT") -> WeightsEnum:
    """torchvision's entry for published weights, with their URL, transforms, class names and accuracy.

    Raises:
        ConversionError: if torchvision has no such weights for the model.
    """
    family(model)
    entries = models.get_model_weights(model.name)
    if name not in entries.__members__:
        raise ConversionError(
            f"torchvision's {model.name} has no weights {name!r}; it has {', '.join(entries.__members__)}"
        )
    return entries[name]


def weights_entries(model: Model) -> list[WeightsEnum]:
    """All weights that torchvision publishes for a model; empty if torchvision does not have the model."""
    return list(models.get_model_weights(model.name)) if has(model) else []


def accuracies(entry: WeightsEnum) -> dict[str, float]:
    """The ImageNet accuracies that torchvision publishes for weights, in percent: ``acc@1`` and ``acc@5``.

    Empty for weights that are only for feature extraction.
    """
    published: dict[str, float] = entry.meta["_metrics"]["ImageNet-1K"]
    return {name: value for name, value in published.items() if math.isfinite(value)}


def origin(entry: WeightsEnum) -> dict[str, Any]:
    """The source of published weights, and their accuracies; JSON-serialisable."""
    return {"weights": str(entry), "url": entry.url, "recipe": entry.meta.get("recipe"), **accuracies(entry)}


def preprocessing(entry: WeightsEnum) -> Preprocessing:
    """The preprocessing of images that these weights need."""
    transform = entry.transforms()
    return Preprocessing(
        size=transform.crop_size[0],
        channels=3,
        resize=transform.resize_size[0],
        mean=tuple(transform.mean),
        std=tuple(transform.std),
        interpolation=transform.interpolation.value,
    )


def classes(entry: WeightsEnum) -> tuple[str, ...] | None:
    """The class names, in the order of the logits; None for weights that are only for feature extraction."""
    names = entry.meta["categories"]
    return None if names is None else tuple(names)


def pretrained(model: Model, weights: str | WeightsEnum = "DEFAULT", *, key: Tensor | None = None) -> tuple[Tree, Tree]:
    """torchvision's published weights, downloaded, checked and cached by torchvision.

    ``pretrained(purecnn.create("resnet50", num_classes=2), key=random.key(0))`` is ready for fine-tuning.

    Args:
        model: created with the settings that the weights were trained with.
        weights: the entry's name, such as ``"IMAGENET1K_V1"``, or the entry.
        key: allows the model to have another number of classes; its heads are then drawn from this random key.

    Raises:
        ConversionError: if the weights do not fit the model, or cannot be downloaded; the message says where to put the
            file by hand.
    """
    entry = weights_entry(model, weights) if isinstance(weights, str) else weights
    if entry not in weights_entries(model):
        raise ConversionError(f"{entry} are not weights of {model.name}")
    if model.settings.get("transform_input") is False:
        raise ConversionError(
            f"the published weights of {model.name} expect a transformed input: "
            f"create({model.name!r}, transform_input=True)"
        )
    try:
        state_dict = entry.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:  # no network, or a file with another hash
        folder = f"{torch.hub.get_dir()}/checkpoints"
        raise ConversionError(f"{entry.url} cannot be downloaded ({error}); put the file into {folder}") from error
    classes = len(state_dict[head_key(model)])
    if key is None or classes == model.num_classes:
        return LIBRARY.adopt(model, state_dict)
    full = purecnn.create(model.name, **{**model.settings, "num_classes": classes})
    _, params, state = purecnn.replace_head(full, *LIBRARY.adopt(full, state_dict), model.num_classes, key)
    return params, state
