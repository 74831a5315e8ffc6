"""A guard against getting slower, in counts that do not depend on the machine.

Five hot paths are run beside torch's own way to do the same, and three things are counted on both sides: operators
that reach torch's dispatcher, bytes that they read and write, and calls of Python functions. The *ratios* ours /
theirs are compared with those in ``costs.json``: more than a tenth above fails, on a machine of any speed and load.
Another version of torch changes both sides alike, and so hardly the ratio; calls leave out generators and
comprehensions, which are calls in Python 3.11 and none in later ones. With Python 3.11 and torch 2.14 or Python 3.13
and torch 2.11, operators and bytes gave the same ratios, and calls ratios that are 3.3 % apart at the most. What
NumPy does, which draws on a CPU, goes unseen.

A loss on purpose, or a gain to keep: ``python -m tests.test_costs`` writes the file anew.
"""

import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import models

import purecnn
from purecnn import random, tree
from purecnn.layer import Mode
from purecnn.layers import dropout
from purecnn.optimizers import adamw, sgd
from purecnn.training import TrainState, make_step
from tests.benchmarks.race import pair

BASELINE = Path(__file__).with_name("costs.json")
LOSS = 1.1


class Cost(NamedTuple):
    """What one run takes; or the ratios of two."""

    operators: float
    bytes: float
    calls: float


class _Operators(TorchDispatchMode):
    """Counts operators, and the bytes of the tensors that they take and give, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.count += 1
            self.bytes += sum(
                leaf.nbytes for leaf in pytree.tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)
            )
        return result


def cost(run: Callable[[], Any]) -> Cost:
    """Of the second run: the first may fill caches."""
    run()
    with _Operators() as operators:
        run()
    calls = 0

    def count(frame: FrameType, event: str, _: Any) -> None:
        nonlocal calls
        code = frame.f_code
        if event == "call" and not code.co_name.startswith("<") and not code.co_flags & inspect.CO_GENERATOR:
            calls += 1

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(before)
    return Cost(operators.count, operators.bytes, calls)


Runs = tuple[Callable[[], Any], Callable[[], Any]]


def evaluation() -> Runs:
    model, params, state, module = pair("resnet18", num_classes=10)
    module.eval()
    x = torch.randn(2, 3, 32, 32)

    def ours() -> Tensor:
        with torch.inference_mode():
            return model.apply(params, state, x)[0]

    def theirs() -> Tensor:
        with torch.inference_mode():
            return module(x)

    return ours, theirs


def training() -> Runs:
    model, params, state, module = pair("resnet18", num_classes=10)
    module.train()
    x, labels = torch.randn(2, 3, 64, 64), torch.tensor([1, 2])
    optimizer, reference = (
        sgd(1e-3, momentum=0.9),
        torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9, fused=True),
    )
    step, train_state = make_step(model, optimizer, donate=True), TrainState.start(params, state, optimizer)

    def ours() -> None:
        nonlocal train_state
        train_state, _ = step(train_state, (x, labels))

    def theirs() -> None:
        reference.zero_grad()
        F.cross_entropy(module(x), labels).backward()
        reference.step()

    return ours, theirs


def initialisation() -> Runs:
    model = purecnn.create("squeezenet1_1")
    return lambda: model.init(random.key(0)), lambda: models.squeezenet1_1(weights=None)


def update() -> Runs:
    params, _ = purecnn.create("resnet18", num_classes=10).init(random.key(0))
    optimizer, opt_state = adamw(1e-3), adamw(1e-3).init(params)
    grads = tree.map(torch.ones_like, params)
    leaves = [leaf.clone().requires_grad_() for leaf in tree.flatten(params).values()]
    for leaf in leaves:
        leaf.grad = torch.ones_like(leaf)
    reference = torch.optim.AdamW(leaves, lr=1e-3, fused=True)
    return lambda: optimizer.update(grads, opt_state, params, donate=True), reference.step


def draws() -> Runs:
    """A key folded for a place, and a mask."""
    layer, module = dropout(0.5), nn.Dropout(0.5)
    x, mode = torch.ones(64, 256), Mode(train=True, key=random.key(0), path="stage2.dropout1")
    return lambda: layer.apply({}, {}, x, mode), lambda: module(x)


PATHS = {each.__name__: each for each in (evaluation, training, initialisation, update, draws)}


def measure(path: str) -> Cost:
    """Ours over theirs."""
    torch.manual_seed(0)
    ours, theirs = (cost(run) for run in PATHS[path]())
    return Cost(*(round(a / b, 4) for a, b in zip(ours, theirs, strict=True)))


@pytest.mark.parametrize("path", PATHS)
def test_no_loss(path: str) -> None:
    now, allowed = measure(path), Cost(**json.loads(BASELINE.read_text())[path])
    for name in Cost._fields:
        found, before = getattr(now, name), getattr(allowed, name)
        assert found <= LOSS * before, (
            f"{path}: {name} are {found:.3f} times torch's own, and were {before:.3f} times; "
            "if that is meant, write the baseline anew: python -m tests.test_costs"
        )


def test_counting() -> None:
    x = torch.ones(4)

    def twice() -> Tensor:
        return x + 1 + 1

    assert cost(twice) == Cost(operators=2, bytes=64, calls=1)


if __name__ == "__main__":
    BASELINE.write_text(json.dumps({path: measure(path)._asdict() for path in PATHS}, indent=2) + "\n")
