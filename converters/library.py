"""Another library's state_dicts and modules, to and from our trees: the part that is the same for all libraries."""

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
    """How a library names and builds one family."""

    rules: Callable[[Model], Rules]
    module: Callable[[Model], nn.Module]
    legacy: Rules | None = None
    """From module names in old published files to today's."""


@dataclass(frozen=True)
class Library:
    """A library that has some of our models."""

    name: str
    find: Callable[[Model], Family | None]
    """None for a model that the library does not have."""

    def has(self, model: Model) -> bool:
        """Whether the library has the model too.

        Raises:
            TypeError: if it is no model.
        """
        return self._found(model) is not None

    def _found(self, model: Model) -> Family | None:
        if not isinstance(model, Model):
            raise TypeError(f"expected a model, as from purecnn.create, found {_named(model)}")
        return self.find(model) if model.is_built else None

    def family(self, model: Model) -> Family:
        """The library's names and module for a model.

        Raises:
            ConversionError: if the library does not have it.
            TypeError: if it is no model.
        """
        found = self._found(model)
        if found is None:
            words = f"{self.name} has no counterpart of {model.name}"
            if not model.is_built:
                words += " with a layer of its own: convert the network as purecnn.create builds it"
            elif model.name in models.list_models():
                words += (
                    ": converters.torchvision has it, and reads any state_dict in the same names, "
                    "as of timm's ResNets and DenseNets"
                )
            raise ConversionError(words)
        return found

    def head_key(self, model: Model) -> str:
        """The key of the weight whose first axis is the classes.

        Raises:
            ConversionError: if the library does not have the model.
        """
        params, _ = leaves(model, self.family(model).rules(model))
        return next(leaf.key for leaf in params if leaf.path.startswith("head.") and leaf.path.endswith(".weight"))

    def sizes(self, model: Model, state_dict: Mapping[str, Tensor]) -> tuple[int, int]:
        """How many classes and channels of images a state_dict has; the model's own where it does not tell.

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
        """A state_dict without what a wrapper, such as DataParallel or torch.compile, puts before all its names.

        Raises:
            ConversionError: if the library does not have the model.
        """
        expected = {leaf.key for part in leaves(model, self.family(model).rules(model)) for leaf in part}
        prefix = wrapping([*state_dict], expected) or ""
        return {key.removeprefix(prefix): tensor for key, tensor in state_dict.items()}

    def from_state_dict(self, model: Model, state_dict: Mapping[str, Tensor]) -> tuple[Tree, Tree]:
        """Parameters and running statistics from the library's state_dict.

        The trees are copies: a module that trains on does not change them.

        Raises:
            ConversionError: that names missing, unexpected and mis-shaped keys.
            TypeError: if the arguments are not a model and a mapping.
        """
        params, state = self.adopt(model, state_dict)
        return tree.map(torch.clone, params), tree.map(torch.clone, state)

    def adopt(self, model: Model, state_dict: Mapping[str, Tensor]) -> tuple[Tree, Tree]:
        """`from_state_dict` without copies, for tensors that nobody else has; raises the same."""
        legacy = self.family(model).legacy
        if not isinstance(state_dict, Mapping):
            raise TypeError(
                f"expected a state_dict, found {_named(state_dict)}: of a module it is module.state_dict(), "
                "of a file converters.files.read(path)"
            )
        tensors: dict[str, Tensor] = {}
        for key, tensor in state_dict.items():
            if not isinstance(key, str):
                raise ConversionError(f"the names of a state_dict are strings, found {key!r}")
            layer, _, leaf = key.rpartition(".")
            if legacy and any(left.match(layer) for left, _ in legacy.pairs):
                key = f"{legacy.forward(layer)}.{leaf}"
            if not isinstance(tensor, Tensor):
                raise ConversionError(f"{key} is not a tensor but a {type(tensor).__name__}")
            if key in tensors:
                raise ConversionError(f"{key} is there twice, under its old name and its new one")
            tensors[key] = tensor.detach()
        return to_trees(model, self.family(model).rules(model), tensors)

    def from_module(self, model: Model, module: nn.Module, name: str, size: int, bound: float) -> tuple[Tree, Tree]:
        """The weights of a module of the library, if the model computes with them what the module does.

        That names and shapes fit does not say so: padding, epsilons, rectifiers and strides have neither. So both are
        run on an image, of random numbers.

        Args:
            model: ours.
            module: the library's, which is put into evaluation mode.
            name: the library's name of the weights, for the message.
            size: of the image, pixels.
            bound: of the logits' deviation, as a share of the largest.

        Raises:
            ConversionError: if they do not fit, or compute something else.
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
        """The state_dict of the library's module, in its order and with its ``_metadata``; loads with strict=True.

        The tensors are the trees' own, not copies.

        Raises:
            ConversionError: if the trees are not the model's, or the library does not have it.
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
        """The library's module, live and in evaluation mode, with copies of the parameters and statistics.

        Raises:
            ConversionError: as from `to_state_dict`.
        """
        state_dict = self.to_state_dict(model, params, state)
        module = self._meta_module(model)
        copies = OrderedDict((key, tensor.clone()) for key, tensor in state_dict.items())
        copies._metadata = state_dict._metadata  # type: ignore[attr-defined]
        module.load_state_dict(copies, assign=True)
        return module.requires_grad_().eval()

    def _meta_module(self, model: Model) -> nn.Module:
        """The library's module for the model's settings, without memory behind its parameters."""
        with torch.device("meta"):
            module = self.family(model).module(model)
            stem = next(layer for layer in module.modules() if isinstance(layer, nn.Conv2d))
            if stem.in_channels != model.in_channels:  # torchvision takes 3 for granted in the first convolution
                stem.in_channels = model.in_channels
                stem.weight = nn.Parameter(torch.empty(stem.out_channels, model.in_channels, *stem.kernel_size))
        return module


def _named(value: object) -> str:
    """What was given in place of something else: a string as it is, of others the type."""
    return repr(value) if isinstance(value, str) else f"a {type(value).__name__}"
