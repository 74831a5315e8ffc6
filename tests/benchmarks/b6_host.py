"""B6: what the host does for a call and a step of a small network, where the device has next to nothing to do.

The bare operators are the same calls into torch one after the other, as `make_fx` records them, without modules, trees
or names; each goes through a Python object of its own, so they are no floor for what calls torch's functions directly.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

import purecnn
from purecnn import random, tree
from purecnn.optimizers import sgd
from purecnn.training import TrainState, make_step
from purecnn.tree import Tree
from tests.benchmarks.race import Row, Setting, check, images, pair, rows

WHAT = "host cost of a call and of a step"
NEEDS_GPU = False
GOALS = {"nn.Module": 1.0, "functional_call": 0.1}


class LeNet(nn.Module):
    """What a user writes for `purecnn.create("lenet5")`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5)
        self.linear1, self.linear2, self.linear3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.linear1(x.flatten(1)))
        return self.linear3(F.relu(self.linear2(x)))


def lenet(device: str) -> tuple[purecnn.Model, Tree, Tree, nn.Module]:
    model, module = purecnn.create("lenet5"), LeNet().to(device)
    params, state = model.init(random.key(0, device))
    leaves = tree.flatten(params).values()
    module.load_state_dict(dict(zip(module.state_dict(), (leaf.clone() for leaf in leaves), strict=True)))
    return model, params, state, module


def thin(device: str) -> tuple[purecnn.Model, Tree, Tree, nn.Module]:
    """MobileNet v2 with a tenth of its channels: 158 parameters and 156 statistics, and little to compute."""
    settings = {"dropout": 0.0, "num_classes": 10}
    return pair("mobilenet_v2", device, {**settings, "width_mult": 0.1}, **settings, width=0.1)


def run(setting: Setting) -> Iterator[Row]:
    for name, build in (("lenet5", lenet), ("thin mobilenet_v2", thin)):
        for batch in setting.pick((1, 32), (2,)):
            yield from evaluation(setting, name, build, batch)
            yield from training(setting, name, build, batch)


Build = Callable[[str], tuple[purecnn.Model, Tree, Tree, nn.Module]]


def evaluation(setting: Setting, name: str, build: Build, batch: int) -> list[Row]:
    model, params, state, module = build(setting.device)
    module.eval()
    x, _ = images(setting, batch, 32, model.in_channels)
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    with torch.inference_mode():
        bare = make_fx(lambda params, state, x: model.apply(params, state, x)[0])(params, state, x)
        check(model.apply(params, state, x)[0], module(x))
        check(bare(params, state, x), module(x))
        peers: Mapping[str, Callable[[], Any]] = {
            "nn.Module": lambda: module(x),
            "functional_call": lambda: functional_call(module, tensors, (x,)),
            "the bare operators": lambda: bare(params, state, x),
        }
        what = f"{name}, call, batch {batch}"
        return rows(
            setting, "B6", what, lambda: model.apply(params, state, x), peers, goals=GOALS, asynchronous=setting.cuda
        )


def training(setting: Setting, name: str, build: Build, batch: int) -> list[Row]:
    """SGD with momentum, donated, against the loop that everybody writes, and against ``torch.func``."""
    model, params, state, module = build(setting.device)
    module.train()
    x, labels = images(setting, batch, 32, model.in_channels, classes=10)
    if batch == 1 and state:
        return []  # the last images are of one pixel, of which there are no statistics
    rate = 1e-4
    optimizer = sgd(rate, momentum=0.9)
    reference = torch.optim.SGD(module.parameters(), lr=rate, momentum=0.9)
    step = make_step(model, optimizer, donate=True)
    train_state = TrainState.start(params, state, optimizer)
    functional = {path: leaf.detach().clone() for path, leaf in module.named_parameters()}
    momenta = {path: torch.zeros_like(leaf) for path, leaf in functional.items()}
    buffers = {path: leaf.clone() for path, leaf in module.named_buffers()}

    def ours() -> Tensor:
        nonlocal train_state
        train_state, metrics = step(train_state, (x, labels))
        return metrics.loss

    def eager() -> Tensor:
        reference.zero_grad()
        loss = F.cross_entropy(module(x), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        reference.step()
        return loss

    def objective(leaves: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(module, {**leaves, **buffers}, (x,)), labels)

    def through_func() -> Tensor:
        nonlocal functional, momenta
        grads, loss = torch.func.grad_and_value(objective)(functional)
        momenta = {path: momenta[path] * 0.9 + grad for path, grad in grads.items()}
        functional = {path: leaf - rate * momenta[path] for path, leaf in functional.items()}
        return loss

    losses = ours(), eager()
    check(*losses)
    peers = {"nn.Module": eager}
    if not buffers:  # running statistics in place are refused under torch.func
        check(losses[0], through_func())
        peers["functional_call"] = through_func
    return rows(setting, "B6", f"{name}, step, batch {batch}", ours, peers, goals=GOALS, asynchronous=setting.cuda)
