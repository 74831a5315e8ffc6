"""B5: gradients of single images: their clipped sum, and all of them, beside a plain gradient and beside Opacus."""

import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

import purecnn
from purecnn import random, tree
from purecnn.layers import conv, global_avg_pool, group_norm, linear, relu
from purecnn.model import Model
from purecnn.per_sample import clipped_gradient_sum, per_sample_gradients
from purecnn.tree import Tree
from tests.benchmarks.race import Row, Setting, check, images, pair, rows

WHAT = "per-sample gradients"
NEEDS_GPU = False
CLIP = 1.0


def small(setting: Setting) -> tuple[Model, Tree, Tree, nn.Module]:
    """Four convolutions with group normalisation."""
    widths = (32, 32, 64, 64)
    layers: dict[str, Any] = {}
    modules: list[nn.Module] = []
    inputs = 3
    for i, width in enumerate(widths):
        stride = 2 if i % 2 else 1
        layers |= {f"conv{i}": conv(width, 3, stride), f"norm{i}": group_norm(8), f"relu{i}": relu}
        modules += [nn.Conv2d(inputs, width, 3, stride, 1, bias=False), nn.GroupNorm(8, width), nn.ReLU()]
        inputs = width
    head = purecnn.serial(global_avg_pool, linear=linear(10))
    model = Model.of(purecnn.serial(**layers, head=head), num_classes=10, image_size=32, name="small CNN")
    module = nn.Sequential(*modules, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))
    return *_twins(model, module, setting.device), module.to(setting.device)


def resnet(setting: Setting) -> tuple[Model, Tree, Tree, nn.Module]:
    """ResNet-18 with group normalisation, and torchvision's without what works in place, which hooks refuse."""
    model, params, state, module = pair(
        "resnet18",
        setting.device,
        {"num_classes": 10, "norm_layer": lambda channels: nn.GroupNorm(min(32, channels), channels)},
        num_classes=10,
        norm="group",
    )
    for each in module.modules():
        if isinstance(each, nn.ReLU):
            each.inplace = False
        if isinstance(each, BasicBlock):
            each.__class__ = OutOfPlace
    return model, params, state, module


class OutOfPlace(BasicBlock):
    """Without ``out += identity``."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


def _twins(model: Model, module: nn.Module, device: str) -> tuple[Model, Tree, Tree]:
    params, state = model.init(random.key(0))
    leaves = list(tree.flatten(params).values())
    module.load_state_dict(dict(zip(module.state_dict(), (leaf.clone() for leaf in leaves), strict=True)))
    return model, tree.map(lambda leaf: leaf.to(device), params), state


def run(setting: Setting) -> Iterator[Row]:
    large = 256 if setting.cuda else 16  # all gradients of a ResNet-18 take 45 MB an image
    for build, batch in ((small, 256), (resnet, large)):
        if setting.toy and build is resnet:
            batch = 2
        yield from race(setting, build, setting.pick(batch, 2))


def race(
    setting: Setting, build: Callable[[Setting], tuple[Model, Tree, Tree, nn.Module]], batch: int
) -> Iterator[Row]:
    model, params, state, module = build(setting)
    data = images(setting, batch, 32, classes=10)
    x, labels = data
    leaves = {path: leaf.detach().requires_grad_() for path, leaf in tree.flatten(params).items()}

    def plain() -> tuple[Tensor, ...]:
        outputs, _ = model.apply(tree.unflatten(leaves), state, x, train=True)
        return torch.autograd.grad(F.cross_entropy(outputs, labels), list(leaves.values()))

    def module_gradient() -> tuple[Tensor, ...]:
        return torch.autograd.grad(F.cross_entropy(module(x), labels), list(module.parameters()))

    def clipped() -> Tree:
        return clipped_gradient_sum(model, params, state, data, clip=CLIP, train=True).gradient

    def materialised() -> Tree:
        return per_sample_gradients(model, params, state, data, train=True)

    def clip(gradients: Tree) -> Tree:
        flat = tree.flatten(gradients)
        squares = [leaf.flatten(1).square().sum(1) for leaf in flat.values()]
        scale = (CLIP / torch.stack(squares).sum(0).sqrt()).clamp(max=1)
        return tree.unflatten({path: torch.tensordot(scale, leaf, 1) for path, leaf in flat.items()})

    found = clipped()
    check(found, clip(materialised()), rtol=1e-3)
    peers: dict[str, Callable[[], Any]] = {
        "our plain gradient": plain,
        "nn.Module's plain gradient": module_gradient,
        "vmap(grad), then clip": lambda: clip(materialised()),
    }
    hooks = opacus(build, setting, data)
    order = [path for path, _ in _same_order(module, params)]
    for name, (gradient, read) in hooks.items():
        gradient()
        theirs = read()
        if name == "Opacus, ghost":
            check(tree.flatten(found), dict(zip(order, theirs, strict=True)), rtol=1e-3)
        peers[name] = gradient
    name = f"{model.name}{', group norm' if model.norm == 'group' else ''}, batch {batch}"
    goals = {"our plain gradient": 1.5, **dict.fromkeys(peers.keys() - {"our plain gradient"}, 0.5)}
    del goals["nn.Module's plain gradient"]
    yield from _versioned(rows(setting, "B5", f"{name}, clipped sum", clipped, peers, goals=goals, warmup=1))
    peers = {name: peer for name, peer in peers.items() if name in ("our plain gradient", "Opacus, hooks")}
    goals = {"Opacus, hooks": 0.5}
    yield from _versioned(rows(setting, "B5", f"{name}, all gradients", materialised, peers, goals=goals, warmup=1))


def _versioned(found: list[Row]) -> Iterator[Row]:
    for row in found:
        yield row._replace(note=f"Opacus {metadata.version('opacus')}") if row.peer.startswith("Opacus") else row


def _same_order(module: nn.Module, params: Tree) -> list[tuple[str, Tensor]]:
    """Our paths in the order of the module's parameters: by value, since both have the same weights."""
    ours = tree.flatten(params)
    result = []
    for leaf in module.parameters():
        path = next(path for path, mine in ours.items() if mine.shape == leaf.shape and torch.equal(mine, leaf))
        result.append((path, ours.pop(path)))
    return result


def opacus(
    build: Callable[[Setting], tuple[Model, Tree, Tree, nn.Module]], setting: Setting, data: tuple[Tensor, Tensor]
) -> dict[str, tuple[Callable[[], Any], Callable[[], list[Tensor]]]]:
    """A pass that gives the gradients, and how to look at them; empty where Opacus is not installed."""
    x, labels = data
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
            from opacus.optimizers import DPOptimizerFastGradientClipping
            from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
        except ImportError:
            return {}
        hooked = GradSampleModule(build(setting)[3].train())
        ghost = GradSampleModuleFastGradientClipping(
            build(setting)[3].train(), max_grad_norm=CLIP, use_ghost_clipping=True, loss_reduction="mean"
        )
        optimizer = DPOptimizerFastGradientClipping(
            torch.optim.SGD(ghost.parameters(), lr=1.0),
            noise_multiplier=0.0,
            max_grad_norm=CLIP,
            expected_batch_size=len(labels),
            loss_reduction="mean",
        )
        loss = DPLossFastGradientClipping(ghost, optimizer, nn.CrossEntropyLoss(), "mean")

    def with_hooks() -> None:
        for parameter in hooked.parameters():
            parameter.grad_sample = parameter.grad = None  # type: ignore[attr-defined]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            F.cross_entropy(hooked(x), labels).backward()  # type: ignore[no-untyped-call]

    def with_ghosts() -> None:
        optimizer.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss(ghost(x), labels).backward()

    return {
        "Opacus, hooks": (with_hooks, lambda: [leaf.grad_sample for leaf in hooked.parameters()]),
        "Opacus, ghost": (with_ghosts, lambda: [leaf.grad for leaf in ghost.parameters()]),
    }
