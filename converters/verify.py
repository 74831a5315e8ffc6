"""Check that a model computes what torchvision's does, bit for bit, and that conversion there and back is exact."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import get_model_weights

import purecnn
from converters import torchvision as tv
from purecnn import Model, Outputs, random, tree
from purecnn.layer import DRAW
from purecnn.summary import summarize
from purecnn.tree import Tree


@dataclass(frozen=True, slots=True)
class Report:
    """The result of each comparison, all exact: whether it is equal; None where there is nothing to compare."""

    model: str
    evaluation: bool
    """Logits with running statistics."""
    training: bool
    """Logits with batch statistics, and with the same masks of dropout and stochastic depth."""
    auxiliary: bool | None
    """Logits of the auxiliary heads."""
    gradients: bool
    """Gradients of every parameter, by `torch.autograd` on both sides."""
    statistics: bool | None
    """Running statistics after the training step."""
    round_trip: bool
    """From state_dict to trees and back: keys, order, values and ``_metadata``; loading is strict."""
    parameters: bool
    """The number of parameters, against the number that torchvision publishes."""
    macs: bool
    """The number of multiplications, against the number that torchvision publishes (rounded to millions)."""

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return all(getattr(self, check) is not False for check in CHECKS)

    def to_dict(self) -> dict[str, str | bool | None]:
        """The report as a dictionary for JSON, with ``equal`` as a summary."""
        return {**asdict(self), "equal": self.equal}


CHECKS = tuple(field.name for field in fields(Report)[1:])
"""The names of the comparisons in a report."""


def verify(name: str, *, image_size: int = 96, batch: int = 2, seed: int = 0) -> Report:
    """Compare a model with torchvision's, using random weights, running statistics, images and masks.

    Args:
        name: the name of a model that torchvision has too.
        image_size: height and width of the random images in pixels; a network that needs larger images gets its own
            size.
        batch: number of images.
        seed: seed of all random numbers.

    Raises:
        ConversionError: if torchvision does not have the model.
    """
    model = purecnn.create(name)
    tv.family(model)
    weights_key, state_key, x_key, key = random.split(random.key(seed), 4)
    params, state = model.spec()
    params, state = _drawn(params, weights_key), _drawn(state, state_key)
    side = _side(model, image_size)
    x = random.normal(x_key, (batch, model.in_channels, side, side))
    module = tv.to_module(model, params, state)
    round_trip = _round_trip(model, module, params, state)

    with torch.no_grad():
        evaluation = torch.equal(model.apply(params, state, x)[0], module(x))
        masks = _masks(model, params, state, x, key)
    module.train()
    with _drawing(masks):
        logits, *aux = _heads(module(x))
    _loss([logits, *aux]).backward()  # type: ignore[no-untyped-call]

    # Use torch.autograd, as for torchvision's: under torch.func.grad PyTorch differentiates SiLU by another formula.
    leaves = tree.map(lambda leaf: leaf.detach().requires_grad_(), params)
    y, new_state = model.apply(leaves, state, x, train=True, key=key)
    ours = [y.logits, *y.aux] if isinstance(y, Outputs) else [y]
    flat = tree.flatten(leaves)
    gradients = tree.unflatten(dict(zip(flat, torch.autograd.grad(_loss(ours), list(flat.values())), strict=True)))
    found = tv.to_state_dict(model, gradients, new_state)
    buffers = dict(module.named_buffers())
    return Report(
        model=name,
        evaluation=evaluation,
        training=torch.equal(ours[0], logits) and not masks,
        auxiliary=len(ours) == 1 + len(aux) and all(map(torch.equal, ours[1:], aux)) if aux else None,
        gradients=all(
            parameter.grad is not None and torch.equal(parameter.grad, found[key])
            for key, parameter in module.named_parameters()
        ),
        statistics=all(torch.equal(buffer, found[key]) for key, buffer in buffers.items()) if buffers else None,
        round_trip=round_trip,
        parameters=_parameters(model),
        macs=_macs(model),
    )


def _drawn(meta: Tree, key: Tensor) -> Tree:
    """Random values like those of a trained network: no leaf is constant, and activations keep their scale."""

    def draw(path: str, leaf: Tensor, key: Tensor) -> Tensor:
        kind = path.rpartition(".")[2]
        if kind == "count":
            return random.bits(key, ()) % 1000
        if kind in ("bias", "mean"):
            return random.uniform(key, leaf.shape, minval=-0.1, maxval=0.1)
        if leaf.ndim in (2, 4):
            bound = (6 / leaf[0].numel()) ** 0.5
            return random.uniform(key, leaf.shape, minval=-bound, maxval=bound)
        return random.uniform(key, leaf.shape, minval=0.5, maxval=1.5)

    leaves = tree.flatten(meta).items()
    return tree.unflatten({path: draw(path, leaf, random.fold_in(key, i)) for i, (path, leaf) in enumerate(leaves)})


def _side(model: Model, image_size: int) -> int:
    """The requested size if the network can be trained on such images, else the network's own."""
    try:
        purecnn.create(model.name, image_size=image_size).spec()
    except RuntimeError:
        return model.image_size
    return image_size


def _masks(model: Model, params: Tree, state: Tree, x: Tensor, key: Tensor) -> list[tuple[float, Tensor]]:
    """The masks that training draws, in order, each with its probability."""
    masks: list[tuple[float, Tensor]] = []

    def tap(path: str, p: Any, mask: Any) -> Any:
        if path.endswith(DRAW):
            masks.append((p, mask))
        return mask

    model.apply(params, state, x, train=True, key=key, tap=tap)
    return masks


@contextmanager
def _drawing(masks: list[tuple[float, Tensor]]) -> Iterator[None]:
    """Make torchvision's dropout and stochastic depth draw these masks, removing each from the list."""

    class Draw(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is not torch.ops.aten.bernoulli_.float:
                return func(*args, **(kwargs or {}))
            noise, probability = args if len(args) == 2 else (*args, 0.5)  # the operator's default
            if masks and masks[0][0] == probability and masks[0][1].numel() == noise.numel():
                return noise.copy_(masks.pop(0)[1].reshape(noise.shape))
            return func(*args, **(kwargs or {}))  # another distribution: masks remain, which counts as a difference

    with Draw():  # type: ignore[no-untyped-call]
        yield


def _heads(output: "Tensor | tuple[Tensor, ...]") -> list[Tensor]:
    """The logits, then the auxiliary heads' from shallow to deep; torchvision has these from deep to shallow."""
    if isinstance(output, Tensor):
        return [output]
    logits, *aux = output
    return [logits, *reversed(aux)]


def _loss(heads: list[Tensor]) -> Tensor:
    return torch.stack([logits.square().mean() for logits in heads]).sum()


def _round_trip(model: Model, module: nn.Module, params: Tree, state: Tree) -> bool:
    state_dict = module.state_dict()
    there = tv.from_state_dict(model, state_dict)
    back = tv.to_state_dict(model, *there)
    leaves = [tree.flatten(part) for part in (params, state, *there)]
    tv.to_module(model, *there)  # strict
    return (
        list(back) == list(state_dict)
        and all(torch.equal(back[key], tensor) for key, tensor in state_dict.items())
        and back._metadata == state_dict._metadata  # type: ignore[attr-defined]
        and all(list(ours) == list(found) for ours, found in zip(leaves[:2], leaves[2:], strict=True))
        and all(torch.equal(a[path], b[path]) for a, b in zip(leaves[:2], leaves[2:], strict=True) for path in a)
    )


def _parameters(model: Model) -> bool:
    """torchvision's published number leaves out GoogLeNet's auxiliary heads, but counts Inception v3's."""
    params, _ = model.spec()
    counts = {tree.size(params), tree.size({part: params[part] for part in params if not part.startswith("aux")})}
    return all(entry.meta["num_params"] in counts for entry in get_model_weights(model.name))


def _macs(model: Model) -> bool:
    """For each entry of published weights, at the image size that it is evaluated at."""
    published = {(tv.preprocessing(entry).size, entry.meta["_ops"]) for entry in get_model_weights(model.name)}
    return all(round(summarize(model, size)[0].macs / 1e9, 3) == ops for size, ops in published)
