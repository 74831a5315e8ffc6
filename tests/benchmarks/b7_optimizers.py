"""B7: one step of the optimizer on the parameters of a ResNet-50.

Against torch.optim's fused and foreach kernels; and, where they are installed, against the other libraries whose
optimizers are functions: Optax, compiled by ``jax.jit``, with and without donated buffers, and TorchOpt. The pure one
also as a package, compiled ahead of time.
"""

import functools
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch import Tensor

import purecnn
from purecnn import random, tree
from purecnn.optimizers import Optimizer, adamw, sgd
from purecnn.tree import Tree
from tests.benchmarks.race import Row, Setting, check, package, rows

WHAT = "optimizer step, resnet50's parameters"
NEEDS_GPU = False
RULES: dict[str, tuple[Optimizer, Callable[..., Any]]] = {
    "SGD with momentum": (
        sgd(1e-4, momentum=0.9),
        lambda leaves, **kind: torch.optim.SGD(leaves, lr=1e-4, momentum=0.9, **kind),
    ),
    "AdamW": (adamw(1e-4), lambda leaves, **kind: torch.optim.AdamW(leaves, lr=1e-4, **kind)),
}
"""Ours, and torch's of given leaves."""


def run(setting: Setting) -> Iterator[Row]:
    model = purecnn.create(setting.pick("resnet50", "lenet5"))
    params, _ = model.init(random.key(0, setting.device))
    grads, _ = model.init(random.key(1, setting.device))
    for name, (optimizer, build) in RULES.items():
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

    others: dict[str, Callable[[], dict[str, Any]]] = {
        **_optax(name, params, grads, donate=donate),
        **({} if donate else _torchopt(name, params, grads)),
    }
    peers.update(others)

    def ours() -> None:
        nonlocal params, opt_state
        params, opt_state = optimizer.update(grads, opt_state, params, donate=donate)

    ours()
    for label, step in peers.items():
        found = step()
        if label in leaves:
            found = dict(zip(tree.flatten(params), leaves[label], strict=True))
        for path, mine in tree.flatten(params).items():
            leaf = found[path]
            check(mine, leaf if isinstance(leaf, Tensor) else torch.tensor(np.asarray(leaf)))
    what = f"{name}, {'donating' if donate else 'pure'}"
    goals = {"torch.optim, fused": 1.0}
    result = rows(setting, "B7", what, ours, peers, goals=goals)
    packaged = None if donate else package(setting, functools.partial(_updated, name), grads, opt_state, params)
    if packaged is not None:
        held = opt_state, params

        def ready() -> None:
            nonlocal held
            params, opt_state = packaged(grads, *held)
            held = opt_state, params

        expected, found = (update(grads, *held)[0] for update in (optimizer.update, packaged))
        check(tree.flatten(expected), tree.flatten(found))
        result += rows(setting, "B7", f"{what}, as a package", ready, peers, goals=goals)
    return [row._replace(note=_version(row.peer)) if row.peer in others else row for row in result]


def _updated(name: str, grads: Tree, opt_state: Tree, params: Tree) -> tuple[Tree, Tree]:
    return RULES[name][0].update(grads, opt_state, params)


def _version(package: str) -> str:
    return f"{package} {metadata.version(package)}"


def _optax(name: str, params: Tree, grads: Tree, *, donate: bool) -> dict[str, Callable[[], dict[str, Any]]]:
    """Optax's update, and what it gives; empty where it is not installed, and on a GPU unless jax sees it, too."""
    try:
        import jax
        import optax
    except ImportError:
        return {}
    leaf = next(iter(tree.flatten(params).values()))
    if leaf.device.type != {"cpu": "cpu", "gpu": "cuda"}.get(jax.default_backend()):
        return {}
    # As torch's AdamW, whose decay is 0.01.
    rule = optax.sgd(1e-4, momentum=0.9) if name.startswith("SGD") else optax.adamw(1e-4, weight_decay=0.01)
    theirs, gradients = (
        {path: jax.numpy.array(leaf.cpu().numpy()) for path, leaf in tree.flatten(each).items()}
        for each in (params, grads)
    )

    def update(params: Any, opt_state: Any, gradients: Any) -> Any:
        changes, opt_state = rule.update(gradients, opt_state, params)
        return optax.apply_updates(params, changes), opt_state

    compiled = jax.jit(update, donate_argnums=(0, 1) if donate else ())
    opt_state = rule.init(theirs)

    def step() -> dict[str, Any]:
        nonlocal theirs, opt_state
        theirs, opt_state = jax.block_until_ready(compiled(theirs, opt_state, gradients))
        return theirs

    return {"optax": step}


def _torchopt(name: str, params: Tree, grads: Tree) -> dict[str, Callable[[], dict[str, Any]]]:
    """TorchOpt's update likewise. Not its way in place, which scales the gradients too, and they are used again."""
    try:
        import torchopt
    except ImportError:
        return {}
    rule = torchopt.sgd(1e-4, momentum=0.9) if name.startswith("SGD") else torchopt.adamw(1e-4, weight_decay=0.01)
    theirs, gradients = tree.flatten(params), tree.flatten(grads)
    opt_state = rule.init(theirs)

    def step() -> dict[str, Any]:
        nonlocal theirs, opt_state
        changes, opt_state = rule.update(gradients, opt_state, params=theirs, inplace=False)
        theirs = torchopt.apply_updates(theirs, changes, inplace=False)
        return theirs

    return {"torchopt": step}
