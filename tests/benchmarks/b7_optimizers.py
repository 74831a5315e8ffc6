"""B7: one step of the optimizer on the parameters of a ResNet-50, against torch.optim's fused and foreach kernels."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import purecnn
from purecnn import random, tree
from purecnn.optimizers import Optimizer, adamw, sgd
from purecnn.tree import Tree
from tests.benchmarks.race import Row, Setting, check, rows

WHAT = "optimizer step, resnet50's parameters"
NEEDS_GPU = False


def run(setting: Setting) -> Iterator[Row]:
    model = purecnn.create(setting.pick("resnet50", "lenet5"))
    params, _ = model.init(random.key(0, setting.device))
    grads, _ = model.init(random.key(1, setting.device))
    rules: dict[str, tuple[Optimizer, Callable[..., Any]]] = {
        "SGD with momentum": (
            sgd(1e-4, momentum=0.9),
            lambda leaves, **kind: torch.optim.SGD(leaves, lr=1e-4, momentum=0.9, **kind),
        ),
        "AdamW": (adamw(1e-4), lambda leaves, **kind: torch.optim.AdamW(leaves, lr=1e-4, **kind)),
    }
    for name, (optimizer, build) in rules.items():
        for donate in (True, False):
            yield from race(setting, name, optimizer, build, params, grads, donate=donate)


def race(
    setting: Setting,
    name: str,
    optimizer: Optimizer,
    build: Callable[..., Any],
    params: Tree,
    grads: Tree,
    *,
    donate: bool,
) -> list[Row]:
    params = tree.map(torch.clone, params)
    opt_state = optimizer.init(params)
    peers: dict[str, Callable[[], Any]] = {}
    leaves: dict[str, list[Tensor]] = {}
    for kind in ("fused", "foreach"):
        label = f"torch.optim, {kind}"
        leaves[label] = [leaf.clone().requires_grad_() for leaf in tree.flatten(params).values()]
        for leaf, grad in zip(leaves[label], tree.flatten(grads).values(), strict=True):
            leaf.grad = grad.clone()
        peers[label] = build(leaves[label], **{kind: True}).step

    def ours() -> None:
        nonlocal params, opt_state
        params, opt_state = optimizer.update(grads, opt_state, params, donate=donate)

    ours()
    for label, step in peers.items():
        step()
        for leaf, mine in zip(leaves[label], tree.flatten(params).values(), strict=True):
            check(mine, leaf)
    what = f"{name}, {'donating' if donate else 'pure'}"
    return rows(setting, "B7", what, ours, peers, goals={"torch.optim, fused": 1.0})
