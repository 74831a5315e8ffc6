"""A step on a GPU lets nothing wait for the host: no tensor is brought there or fetched from there.

Shown without a GPU: torch's "fake" tensors have a device, a shape and a type, and no values. They cannot run a backward
pass on a device that is not there, so gradients are made up; what torch does in a backward pass is not looked at.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import purecnn
from purecnn import augment, random, rule, schedules, tree
from purecnn.laplace import Posterior
from purecnn.optimizers import adamw, clipped, from_transformation, lamb, lars, muon, partitioned, rmsprop, sgd
from purecnn.precision import POLICIES
from purecnn.step import TrainState, make_step
from tests.table import CASES

RATE = schedules.constant(0.1)
STEPS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": sgd(RATE, momentum=0.9, weight_decay=1e-4)},
    "adamw": {"optimizer": adamw(RATE)},
    "rmsprop": {"optimizer": rmsprop(RATE)},
    "rmsprop of tensorflow": {"optimizer": rmsprop(RATE, tensorflow=True, momentum=0.9)},
    "lars": {"optimizer": lars(RATE, weight_decay=1e-4)},
    "lamb": {"optimizer": lamb(RATE)},
    "muon": {"optimizer": muon(RATE)},
    "clipped": {"optimizer": clipped(sgd(RATE), 1.0)},
    "partitioned": {"optimizer": partitioned(lambda path, leaf: path.startswith("head."), sgd(RATE), adamw(RATE))},
    "another library's": {
        "optimizer": from_transformation(lambda params: (), lambda grads, state, params: (grads, state), -0.5)
    },
    "constant": {"optimizer": sgd(schedules.constant(0.1))},
    "step decay": {"optimizer": sgd(schedules.step_decay(0.1, 30))},
    "piecewise": {"optimizer": sgd(schedules.piecewise(0.1, {50: 0.1, 75: 0.01}))},
    "cosine": {"optimizer": sgd(schedules.warmup(5, schedules.cosine(0.1, 100)))},
    "one cycle": {"optimizer": sgd(schedules.one_cycle(0.1, 100))},
    "average": {"optimizer": sgd(RATE), "average": 0.99},
    "bfloat16": {"optimizer": sgd(RATE), "policy": POLICIES["bfloat16"]},
    "float16": {"optimizer": sgd(RATE), "policy": POLICIES["float16"]},
    "in parts": {"optimizer": sgd(RATE), "accumulate": 2},
    "recomputing": {"optimizer": sgd(RATE), "remat": True},
    "augmented": {
        "optimizer": sgd(RATE),
        "augment": augment.chain(
            augment.flip,
            augment.crop(4),
            augment.crop(2, "reflect"),
            augment.cutout(8),
            augment.normalize((0.5, 0.4, 0.3), (0.2, 0.2, 0.2)),
        ),
    },
}


class Transfers(TorchDispatchMode):
    """What goes from the host to the device or back."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [each for each in pytree.tree_leaves((args, kwargs, result)) if isinstance(each, Tensor)]
        copies = func._overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_, torch.ops.aten._foreach_copy_)
        if copies and len({each.device.type for each in tensors}) > 1:
            self.found.append(f"{func} of {[tuple(each.shape) for each in tensors]}")
        return result


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A GPU that need not be there."""
    monkeypatch.setattr(torch._C, "_get_cudnn_batch_norm_reserve_space_size", lambda *args, **kwargs: 0)
    monkeypatch.setattr(torch.autograd, "grad", lambda total, leaves, **kwargs: [torch.zeros_like(e) for e in leaves])
    for name in ("_fused_sgd_", "_fused_adamw_"):  # torch has no fake ones; they take what they are given
        monkeypatch.setattr(torch, name, lambda *args, **kwargs: None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield "cuda"


def check(device: str, model: purecnn.Model, size: int, **settings: Any) -> None:
    optimizer, policy = settings.pop("optimizer"), settings.get("policy")
    key = random.key(0, device)
    params, state = (tree.map(lambda leaf: torch.empty_like(leaf, device=device), each) for each in model.spec())
    train_state = TrainState.start(params, state, optimizer, policy=policy, average="average" in settings)
    kind = torch.uint8 if "augment" in settings else torch.float32
    images = torch.empty(4, model.in_channels, size, size, device=device, dtype=kind)
    labels = torch.empty(4, device=device, dtype=torch.int64)
    step = make_step(model, optimizer, compile=False, donate=True, **settings)
    with Transfers() as transfers:  # a value that is fetched is an error of its own: fake tensors have none
        train_state, metrics = step(train_state, (images, labels), key)
    assert not transfers.found
    found = [*tree.flatten(train_state._asdict()).values(), *metrics]
    assert all(each.device.type == device for each in found)


@pytest.mark.parametrize("update", ["formula", "kernel"])
@pytest.mark.parametrize("name", STEPS)
def test_every_kind_of_step(name: str, update: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rule, "_fusible", lambda columns: update == "kernel")
    check(device, purecnn.create("resnet20_cifar"), 32, **STEPS[name])


@pytest.mark.parametrize("name", CASES)
def test_every_architecture(name: str, device: str) -> None:
    case = CASES[name]
    check(device, case.model(), case.image_size, optimizer=sgd(0.1))  # the rate is a number, which lies on the host


def test_the_precision_of_a_posterior(device: str) -> None:
    posterior = Posterior({}, torch.empty(3, 3, device=device), torch.empty((), device=device), 1.0)
    with Transfers() as transfers:
        assert posterior.precision_factor.device.type == device
    assert not transfers.found
