"""B2: N networks trained at once, against the same N one after the other and against plain ``vmap``."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad_and_value, stack_module_state, vmap

import purecnn
from purecnn import ensembles, random, tree
from purecnn.optimizers import sgd
from purecnn.step import TrainState, make_step
from tests.benchmarks.b1_cifar import Twin, twin
from tests.benchmarks.race import Row, Setting, check, images, rows

WHAT = "training step of 4, 16 and 64 networks at once, batch 128, 500 and 2000"
NEEDS_GPU = True
RATE = 1e-3


def run(setting: Setting) -> Iterator[Row]:
    for batch in setting.pick((128, 500, 2000), (4,)):
        for members in setting.pick((4, 16, 64), (2,)):
            if members * batch > 32_000:
                continue  # activations would not fit a GPU's memory
            yield from race(setting._replace(seconds=min(setting.seconds, 10.0)), members, batch)


def race(setting: Setting, members: int, batch: int) -> list[Row]:
    model = purecnn.create("airbench94", **setting.pick({}, {"widths": (26, 28, 30)}))
    optimizer = sgd(RATE, momentum=0.9)
    data = images(setting, batch, 32, classes=10)
    keys = random.split(random.key(0, setting.device), members)
    params, state = vmap(model.init)(keys)
    together = ensembles.make_ensemble_step(model, optimizer, donate=True)
    train_state = ensembles.start(tree.map(torch.clone, params), state, optimizer)
    one = make_step(model, optimizer, donate=True, compile=False if setting.toy else None)
    alone = [
        TrainState.start(tree.map(torch.clone, own), own_state, optimizer)
        for own, own_state in zip(ensembles.unstack(params), ensembles.unstack(state), strict=True)
    ]

    def ours() -> Tensor:
        nonlocal train_state
        train_state, metrics = together(train_state, data)
        return metrics.loss

    def sequential() -> Tensor:
        losses = []
        for i, each in enumerate(alone):
            alone[i], metrics = one(each, data)
            losses.append(metrics.loss)
        return torch.stack(losses)

    losses = ours()
    check(losses, sequential())
    trees = zip(ensembles.unstack(params), ensembles.unstack(state), strict=True)
    networks = [twin(model, *each, setting.device) for each in trees]
    peers: dict[str, Callable[[], Any]] = {"ours, one after the other": sequential}
    peers["torch vmap, functional_call"] = plain_vmap(setting, networks, data, compile=False)
    peers["torch vmap, torch.compile"] = plain_vmap(setting, networks, data, compile=True)
    for peer in peers.values():
        peer()
    goals = {"ours, one after the other": 0.5 if batch <= 128 else 0.85, "torch vmap, torch.compile": 0.5}
    return rows(setting, "B2", f"{members} networks, batch {batch}", ours, peers, goals=goals)


def plain_vmap(
    setting: Setting, networks: list[Twin], data: tuple[Tensor, Tensor], *, compile: bool
) -> Callable[[], Tensor]:
    """What torch's tutorial on ensembles does, with an SGD of its own."""
    images, labels = data
    network = networks[0]
    params, buffers = stack_module_state(networks)  # type: ignore[arg-type]
    params = {path: leaf.detach() for path, leaf in params.items()}
    momenta = {path: torch.zeros_like(leaf) for path, leaf in params.items()}

    def objective(params: Any, buffers: Any) -> Tensor:
        return F.cross_entropy(functional_call(network, {**params, **buffers}, (images,)), labels)

    def step(params: Any, momenta: Any, buffers: Any) -> Any:
        grads, loss = vmap(grad_and_value(objective))(params, buffers)
        momenta = {path: 0.9 * momenta[path] + grad for path, grad in grads.items()}
        return {path: leaf - RATE * momenta[path] for path, leaf in params.items()}, momenta, loss

    run = setting.compile(step) if compile else step

    def call() -> Tensor:
        nonlocal params, momenta
        params, momenta, loss = run(params, momenta, buffers)
        return loss

    return call
