"""Conversion between our trees and another library's state_dicts and modules: the part common to all libraries."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision import models

from converters.rules import ConversionError, Rules, leaves, to_tensors, to_trees, wrapping
from purecnn import Model, random, tree
from purecnn.tree import Tree


class Family(NamedTuple):
    """How a library names and builds one family of networks."""

    rules: Callable[[Model], Rules]
    module: Callable[[Model], nn.Module]
    legacy: Rules | None = None
    """Rules from the module names in old published files to today's names."""


@dataclass(frozen=True)
class Library:
    """A library that has some of our models."""

    name: str
    find: Callable[[Model], Family | None]
    """The library's family for a model; None if the library does not have the model."""

    def has(self, model: Model) -> bool:
        """Whether the library has the model too.

        Raises:
            TypeError: if the argument is not a model.
        """
        return self._found(model) is not None

    def _found(self, model: Model) -> Family | None:
        if not isinstance(model, Model):
            raise TypeError(f"expected a model, as from purecnn.create, found {_named(model)}")
        return self.find(model) if model.is_built else None

    def family(self, model: Model) -> Family:
        """The library's names and module for a model.

        Raises:
            ConversionError: if the library does not have the model.
            TypeError: if the argument is not a model.
        """
        found = self._found(model)
        if found is None:
            words = f"{self.name} has no counterpart of {model.name}"
            if not model.is_built:
                words += " with a layer that purecnn.create did not build: convert the network as it builds it"
            elif model.name in models.list_models():
                words += (
                    ": converters.torchvision has it, and reads any state_dict with the same names, "
                    "such as those of timm's ResNets and DenseNets"
                )
            raise ConversionError(words)
        return found

    def head_key(self, model: Model) -> str:
        """The state_dict key of the last layer's weight, whose first axis is the classes.

        Raises:
            ConversionError: if the library does not have the model.
        """
        params, _ = leaves(model, self.family(model).rules(model))
        return next(leaf.key for leaf in params if leaf.path.startswith("head.") and leaf.path.endswith(".weight"))

    def sizes(self, model: Model, state_dict: Mapping[str, Tensor]) -> tuple[int, int]:
        """The numbers of classes and image channels in a state_dict; the model's own where it does not tell.

        Raises:
            ConversionError: if the library does not have the model.
        """
        params, _ = leaves(model, self.family(model).rules(model))
        first = next((leaf for leaf in params if leaf.meta.ndim == 4 and leaf.meta.shape[1] == model.in_channels), None)
        stem = state_dict.get(first.key) if first else None
        head = state_dict.get(self.head_key(model))
        classes = model.num_classes if head is None or not head.ndim else len(head)
        return classes, model.in_channels if stem is None or stem.ndim != 4 else stem.shape[1]

    def unwrapped(self, model: Model, state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A state_dict without the prefix that a wrapper, such as DataParallel or torch.compile, adds to every key.

        Raises:
            ConversionError: if the library does not have the model.
        """
        expected = {leaf.key for part in leaves(model, self.family(model).rules(model)) for leaf in part}
        prefix = wrapping([*state_dict], expected) or ""
        return {key.removeprefix(prefix): tensor for key, tensor in state_dict.items()}

    def from_state_dict(self, model: Model, state_dict: Mapping[str, Tensor]) -> tuple[Tree, Tree]:
        """Convert the library's state_dict to parameters and running statistics.

        The trees are copies: further training of the module does not change them.

        Raises:
            ConversionError: if keys are missing, unexpected or of the wrong shape; the message names them.
            TypeError: if the arguments are not a model and a mapping.
        """
        params, state = self.adopt(model, state_dict)
        return tree.map(torch.clone, params), tree.map(torch.clone, state)

    def adopt(self, model: Model, state_dict: Mapping[str, Tensor]) -> tuple[Tree, Tree]:
        """Do the same as `from_state_dict`, without copies, for tensors that nothing else uses; raises the same."""
        legacy = self.family(model).legacy
        if not isinstance(state_dict, Mapping):
            raise TypeError(
                f"expected a state_dict, found {_named(state_dict)}: get it from a module by module.state_dict(), "
                "from a file by converters.files.read(path)"
            )
        tensors: dict[str, Tensor] = {}
        for key, tensor in state_dict.items():
            if not isinstance(key, str):
                raise ConversionError(f"the keys of a state_dict must be strings, found {key!r}")
            layer, _, leaf = key.rpartition(".")
            if legacy and any(left.match(layer) for left, _ in legacy.pairs):
                key = f"{legacy.forward(layer)}.{leaf}"
            if not isinstance(tensor, Tensor):
                raise ConversionError(f"{key} is not a tensor but a {type(tensor).__name__}")
            if key in tensors:
                raise ConversionError(f"{key} is in the state_dict twice, under its old name and its new one")
            tensors[key] = tensor.detach()
        return to_trees(model, self.family(model).rules(model), tensors)

    def from_module(self, model: Model, module: nn.Module, name: str, size: int, bound: float) -> tuple[Tree, Tree]:
        """Convert a module's weights, and check that the model computes what the module does.

        Matching names and shapes do not ensure this, because they do not show padding, epsilons, activations and
        strides. So both networks are run on an image of random numbers.

        Args:
            model: our model.
            module: the library's module, which is put into evaluation mode.
            name: the library's name for the weights, for error messages.
            size: height and width of the image in pixels.
            bound: the logits' allowed deviation, relative to the largest logit.

        Raises:
            ConversionError: if the weights do not fit, or the model computes something else.
        """
        params, state = self.adopt(model, module.state_dict())
        image = random.normal(random.key(0), (1, model.in_channels, size, size))
        with torch.no_grad():
            theirs = module.eval()(image)
            deviation = float((model.apply(params, state, image)[0] - theirs).abs().max() / theirs.abs().max())
        if not deviation < bound:
            raise ConversionError(
                f"{self.name} computes something else with {name} than {model.name} does: the logits of an image "
                f"differ by {deviation:.1%} of the largest"
            )
        return params, state

    def to_state_dict(self, model: Model, params: Tree, state: Tree) -> "OrderedDict[str, Tensor]":
        """Convert to the state_dict of the library's module, in its order, with ``_metadata``; loads with strict=True.

        The tensors are the trees' own, not copies.

        Raises:
            ConversionError: if the trees do not fit the model, or the library does not have it.
            TypeError: if the arguments are not a model and two trees.
        """
        rules = self.family(model).rules(model)
        for part in (params, state):
            if not isinstance(part, Mapping):
                raise TypeError(f"expected two trees, parameters and statistics, found {_named(part)}")
        tensors = to_tensors(model, rules, params, state)
        template = self._meta_module(model).state_dict()
        shapes, expected = ({key: t.shape for key, t in part.items()} for part in (tensors, template))
        if shapes != expected:
            other = sorted(key for key in shapes | expected if shapes.get(key) != expected.get(key))
            settings = 'norm="group"' if model.norm == "group" else "these settings"
            raise ConversionError(f"{self.name}'s {model.name} cannot have {settings}: {tree.some(other)} differ")
        result = OrderedDict((key, tensors[key]) for key in template)
        result._metadata = template._metadata  # type: ignore[attr-defined]
        return result

    def to_module(self, model: Model, params: Tree, state: Tree) -> nn.Module:
        """Build the library's module, trainable but in evaluation mode, with copies of parameters and statistics.

        Raises:
            ConversionError: as `to_state_dict` does.
        """
        state_dict = self.to_state_dict(model, params, state)
        module = self._meta_module(model)
        copies = OrderedDict((key, tensor.clone()) for key, tensor in state_dict.items())
        copies._metadata = state_dict._metadata  # type: ignore[attr-defined]
        module.load_state_dict(copies, assign=True)
        return module.requires_grad_().eval()

    def _meta_module(self, model: Model) -> nn.Module:
        """The library's module for the model's settings, on the meta device."""
        with torch.device("meta"):
            module = self.family(model).module(model)
            stem = next(layer for layer in module.modules() if isinstance(layer, nn.Conv2d))
            if stem.in_channels != model.in_channels:  # torchvision's first convolution always has 3
                stem.in_channels = model.in_channels
                stem.weight = nn.Parameter(torch.empty(stem.out_channels, model.in_channels, *stem.kernel_size))
        return module


def _named(value: object) -> str:
    """A value for an error message: a string as it is, anything else by its type."""
    return repr(value) if isinstance(value, str) else f"a {type(value).__name__}"
