"""B3: the training step of a ResNet-50 in bfloat16, channels last, batch 256."""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from purecnn import tree
from purecnn.capture import captured
from purecnn.optimizers import sgd
from purecnn.precision import Policy
from purecnn.step import TrainState, make_step
from purecnn.tree import Tree
from tests.benchmarks.race import Row, Setting, check, images, pair, rows

WHAT = "training step, resnet50, bfloat16, channels last, batch 256"
NEEDS_GPU = True
GOAL = 1 / 1.1
RATE = 1e-4


def channels_last(values: Tree) -> Tree:
    """Kernels in the layout that the GPU's convolutions prefer."""
    return tree.map(lambda leaf: leaf.to(memory_format=torch.channels_last) if leaf.ndim == 4 else leaf, values)


def run(setting: Setting) -> Iterator[Row]:
    name, batch, size = setting.pick(("resnet50", 256, 224), ("resnet18", 4, 64))
    model, params, state, module = pair(name, setting.device)
    x, labels = images(setting, batch, size)
    x = x.to(memory_format=torch.channels_last)
    params = channels_last(params)
    policy = Policy(compute=torch.bfloat16)
    optimizer = sgd(RATE, momentum=0.9)

    def ours(way: Literal["", "whole", "recorded"] = "") -> Callable[[], Tensor]:
        whole = way == "whole"
        step = make_step(model, optimizer, policy=policy, donate=not whole, compile=False if whole else not setting.toy)
        if whole:
            step = setting.compile(step, fullgraph=True)
        elif way == "recorded":
            step = captured(step)
        train_state = TrainState.start(tree.map(torch.clone, params), state, optimizer, policy=policy)

        def run() -> Tensor:
            nonlocal train_state
            train_state, metrics = step(train_state, (x, labels))
            return metrics.loss

        return run

    default = ours()
    peers: dict[str, Callable[[], Tensor]] = {
        "torchvision eager": loop(setting, module, x, labels),
        "torchvision, torch.compile, CUDA graphs": loop(
            setting, pair(name, setting.device)[3], x, labels, compile=True
        ),
        "ours, the whole step compiled": ours("whole"),
        "ours, recorded as a CUDA graph": ours("recorded"),
    }
    if not setting.toy and (network := _timm(name)) is not None:
        peers["timm, torch.compile, CUDA graphs"] = loop(setting, network.to(setting.device), x, labels, compile=True)
    loss = default()
    for name_, peer in peers.items():
        theirs = peer()
        if "timm" not in name_:  # its weights are others
            check(loss, theirs, rtol=2e-2)
    goals = {name_: GOAL for name_ in peers if "compile," in name_}
    yield from rows(setting, "B3", f"{name}, step, batch {batch}", default, peers, goals=goals)


def loop(
    setting: Setting, module: nn.Module, x: Tensor, labels: Tensor, *, compile: bool = False
) -> Callable[[], Tensor]:
    """The loop that everybody writes: autocast, cross-entropy, fused SGD."""
    module = module.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(module.parameters(), lr=RATE, momentum=0.9, fused=True)

    def objective(x: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(setting.device, torch.bfloat16):
            return F.cross_entropy(module(x), labels)

    run: Callable[..., Any] = objective
    if compile:
        run = setting.compile(objective, mode="reduce-overhead")

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = run(x, labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _timm(name: str) -> nn.Module | None:
    try:
        import timm
    except ImportError:
        return None
    network: nn.Module = timm.create_model(name, pretrained=False)
    return network
