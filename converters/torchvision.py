"""torchvision: its state_dicts, its modules and its published weights, to and from our trees.

    params, state = from_state_dict(model, module.state_dict())
    module.load_state_dict(to_state_dict(model, params, state))     # strict

Names and modules are those of `converters.families`.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import WeightsEnum

from converters.families import FAMILIES, Family
from converters.rules import ConversionError, leaves, to_tensors, to_trees
from purecnn import Model, tree
from purecnn.data import Preprocessing
from purecnn.model import find
from purecnn.tree import Tree


def has(model: Model) -> bool:
    """Whether torchvision has the model too."""
    return model.name in models.list_models()


def family(model: Model) -> Family:
    """torchvision's names and module for a model.

    Raises:
        ConversionError: if torchvision does not have it.
    """
    if not has(model):
        raise ConversionError(f"torchvision has no counterpart of {model.name}")
    return FAMILIES[find(model.name).build.__module__.rpartition(".")[2]]


def head_key(model: Model) -> str:
    """The key of the weight whose first axis is the classes."""
    params, _ = leaves(model, family(model).rules(model))
    return next(leaf.key for leaf in params if leaf.path.startswith("head.") and leaf.path.endswith(".weight"))


def from_state_dict(model: Model, state_dict: Mapping[str, Tensor]) -> tuple[Tree, Tree]:
    """Parameters and running statistics from a torchvision state_dict.

    The trees are copies: a module that trains on does not change them.

    >>> import purecnn, torchvision
    >>> model = purecnn.create("squeezenet1_1")
    >>> params, state = from_state_dict(model, torchvision.models.squeezenet1_1().state_dict())
    >>> params["head"]["conv"]["weight"].shape
    torch.Size([1000, 512, 1, 1])

    Raises:
        ConversionError: that lists all missing, unexpected and mis-shaped keys.
    """
    params, state = _trees(model, state_dict)
    return tree.map(torch.clone, params), tree.map(torch.clone, state)


def _trees(model: Model, state_dict: Mapping[str, Tensor]) -> tuple[Tree, Tree]:
    legacy = family(model).legacy
    tensors: dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        layer, _, leaf = key.rpartition(".")
        if legacy and any(left.match(layer) for left, _ in legacy.pairs):
            key = f"{legacy.forward(layer)}.{leaf}"
        if not isinstance(tensor, Tensor):
            raise ConversionError(f"{key} is not a tensor but a {type(tensor).__name__}")
        if key in tensors:
            raise ConversionError(f"{key} is there twice, under its old name and its new one")
        tensors[key] = tensor.detach()
    return to_trees(model, family(model).rules(model), tensors)


def to_state_dict(model: Model, params: Tree, state: Tree) -> "OrderedDict[str, Tensor]":
    """The state_dict of the torchvision module, in its order and with its ``_metadata``; loads with strict=True.

    The tensors are the trees' own, not copies.

    Raises:
        ConversionError: if the trees are not the model's, or torchvision does not have it.
    """
    tensors = to_tensors(model, family(model).rules(model), params, state)
    template = _meta_module(model).state_dict()
    shapes, expected = ({key: t.shape for key, t in part.items()} for part in (tensors, template))
    if shapes != expected:
        other = sorted(key for key in shapes | expected if shapes.get(key) != expected.get(key))
        raise ConversionError(f"torchvision's {model.name} cannot have these settings: {', '.join(other)} differ")
    result = OrderedDict((key, tensors[key]) for key in template)
    result._metadata = template._metadata  # type: ignore[attr-defined]
    return result


def to_module(model: Model, params: Tree, state: Tree) -> nn.Module:
    """A live torchvision module, in evaluation mode, with copies of the parameters and statistics."""
    state_dict = to_state_dict(model, params, state)
    module = _meta_module(model)
    copies = OrderedDict((key, tensor.clone()) for key, tensor in state_dict.items())
    copies._metadata = state_dict._metadata  # type: ignore[attr-defined]
    module.load_state_dict(copies, assign=True)
    return module.requires_grad_().eval()


def _meta_module(model: Model) -> nn.Module:
    """torchvision's module for the model's settings, without memory behind its parameters."""
    with torch.device("meta"):
        module = family(model).module(model)
        if model.in_channels != 3:  # which torchvision takes for granted in the first convolution
            stem = next(layer for layer in module.modules() if isinstance(layer, nn.Conv2d))
            stem.in_channels = model.in_channels
            stem.weight = nn.Parameter(torch.empty(stem.out_channels, model.in_channels, *stem.kernel_size))
    return module


def weights_entry(model: Model, name: str = "DEFAULT") -> WeightsEnum:
    """torchvision's entry for published weights, with their address, transforms, classes and accuracy.

    Raises:
        ConversionError: if torchvision has no such weights for the model.
    """
    family(model)
    entries = models.get_model_weights(model.name)
    if name not in entries.__members__:
        raise ConversionError(f"{model.name} has no weights {name!r}; it has {', '.join(entries.__members__)}")
    return entries[name]


def weights_entries(model: Model) -> list[WeightsEnum]:
    """All weights that torchvision publishes for a model; none where it does not have the model."""
    return list(models.get_model_weights(model.name)) if has(model) else []


def accuracies(entry: WeightsEnum) -> dict[str, float]:
    """What torchvision publishes of the weights' accuracy on ImageNet, in percent: ``acc@1`` and ``acc@5``.

    Empty for weights that are for features alone.
    """
    published: dict[str, float] = entry.meta["_metrics"]["ImageNet-1K"]
    return {name: value for name, value in published.items() if math.isfinite(value)}


def origin(entry: WeightsEnum) -> dict[str, Any]:
    """Where published weights are from, and how accurate they are; JSON-able."""
    return {"weights": str(entry), "url": entry.url, "recipe": entry.meta.get("recipe"), **accuracies(entry)}


def preprocessing(entry: WeightsEnum) -> Preprocessing:
    """What torchvision does to an image before these weights see it."""
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
    """The names of the classes, in the order of the logits; None for weights that are for features alone."""
    names = entry.meta["categories"]
    return None if names is None else tuple(names)


def pretrained(model: Model, weights: str | WeightsEnum = "DEFAULT") -> tuple[Tree, Tree]:
    """torchvision's published weights, downloaded and checked by torchvision's own cache.

    Args:
        model: created with the settings that the weights were trained with.
        weights: the entry's name, as in ``"IMAGENET1K_V1"``, or the entry.

    Raises:
        ConversionError: if the weights are not the model's, or cannot be had; the message says where to put
            the file by hand.
    """
    entry = weights_entry(model, weights) if isinstance(weights, str) else weights
    if model.settings.get("transform_input") is False:
        raise ConversionError(
            f"the published weights of {model.name} want their input transformed: "
            f"create({model.name!r}, transform_input=True)"
        )
    try:
        state_dict = entry.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:  # no network, or a file with another hash
        folder = f"{torch.hub.get_dir()}/checkpoints"
        raise ConversionError(f"{entry.url} cannot be had ({error}); put it into {folder} by hand") from error
    return _trees(model, state_dict)
