"""Times on a CPU, beside torchvision's: evaluation, training step, initialisation.

    python -m tests.benchmarks.cpu --models resnet18 resnet50 --batches 1 8 --json times.json

In one process ours and torchvision's take turns, with the same weights and images, after it was checked that both
compute the same. The ratio is ours to theirs, of the medians and of the minima; below 1 is faster than torchvision.
On a machine that others use, the minima tell more, or ``--threads 1 --clock cpu``. With ``--keep-memory`` the C
library keeps freed memory, as it does in the ``purecnn`` command; without, half of the differences between two runs
come from memory that is given back to the system and fetched again.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import purecnn
from converters import torchvision as tv
from converters.cli import keep_memory
from purecnn import random, tree
from purecnn.optimizers import sgd
from purecnn.training import TrainState, make_step

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Timing(NamedTuple):
    """Medians and minima, in milliseconds."""

    model: str
    what: str
    batch: int
    ours: float
    peer: float
    ours_min: float
    peer_min: float
    rounds: int

    @property
    def ratio(self) -> float:
        return self.ours / self.peer

    @property
    def ratio_min(self) -> float:
        return self.ours_min / self.peer_min


def take_turns(
    ours: Callable[[], Any], peer: Callable[[], Any], seconds: float, clock: str, warmup: int = 3
) -> tuple[Any, ...]:
    """Median times of both in milliseconds, then minima, then the number of rounds."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(warmup):
        ours()
        peer()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        # The order changes, so that neither always finds the cache as the other has left it.
        for i in (0, 1) if len(times[0]) % 2 else (1, 0):
            begin = CLOCKS[clock]()
            (ours, peer)[i]()
            times[i].append((CLOCKS[clock]() - begin) * 1e3)
    medians = [statistics.median(each) for each in times]
    return *medians, *(min(each) for each in times), len(times[0])


def pair(name: str) -> tuple[purecnn.Model, tree.Tree, tree.Tree, nn.Module]:
    """Our model and torchvision's with the same weights, but no shared memory."""
    torch.manual_seed(0)
    module: nn.Module = getattr(torchvision.models, name)(weights=None)
    model = purecnn.create(name)
    state_dict = {key: value.clone() for key, value in module.state_dict().items()}
    return model, *tv.from_state_dict(model, state_dict), module


def evaluation(name: str, batch: int, seconds: float, clock: str) -> Timing:
    """``model.apply`` against the module's call, both under ``torch.inference_mode``."""
    model, params, state, module = pair(name)
    module.eval()
    x = torch.randn(batch, 3, 224, 224)
    with torch.inference_mode():
        assert torch.equal(model.apply(params, state, x)[0], module(x))
        times = take_turns(lambda: model.apply(params, state, x), lambda: module(x), seconds, clock)
    return Timing(name, "evaluation", batch, *times)


def training(name: str, batch: int, seconds: float, clock: str, *, donate: bool) -> Timing:
    """A step of SGD with momentum 0.9, against zero_grad, forward, backward and ``torch.optim.SGD.step``."""
    model, params, state, module = pair(name)
    module.train()
    x, labels = torch.randn(batch, 3, 224, 224), torch.randint(1000, (batch,))
    rate = 1e-4  # the weights should stay healthy, however often the same batch is seen
    reference = torch.optim.SGD(module.parameters(), lr=rate, momentum=0.9)
    optimizer = sgd(rate, momentum=0.9)
    step = make_step(model, optimizer, donate=donate)
    train_state = TrainState.start(params, state, optimizer)

    def ours() -> Tensor:
        nonlocal train_state
        train_state, metrics = step(train_state, (x, labels))
        return metrics.loss

    def peer() -> Tensor:
        reference.zero_grad()
        loss = F.cross_entropy(module(x), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        reference.step()
        return loss

    assert torch.equal(ours(), peer())  # the first loss; after it, updates differ in rounding
    torch.testing.assert_close(ours(), peer().detach(), rtol=1e-4, atol=1e-4)
    return Timing(name, "step, donating" if donate else "step", batch, *take_turns(ours, peer, seconds, clock))


def initialisation(name: str, seconds: float, clock: str) -> Timing:
    """``model.init`` against torchvision's constructor."""
    model = purecnn.create(name)
    build = getattr(torchvision.models, name)
    expected = sum(leaf.numel() for leaf in build(weights=None).parameters())
    assert tree.size(model.init(random.key(0))[0]) == expected
    times = take_turns(lambda: model.init(random.key(0)), lambda: build(weights=None), seconds, clock, warmup=1)
    return Timing(name, "initialisation", 0, *times)


def measure(models: list[str], batches: list[int], seconds: float, clock: str) -> Iterator[Timing]:
    for name in models:
        yield initialisation(name, seconds, clock)
        for batch in batches:
            yield evaluation(name, batch, seconds, clock)
            yield training(name, batch, seconds, clock, donate=True)
            yield training(name, batch, seconds, clock, donate=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18", "resnet50"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--seconds", type=float, default=20.0, help="for each measurement")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu (with one thread) bears other processes better"
    )
    parser.add_argument("--keep-memory", action="store_true", help="see above")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.keep_memory:
        keep_memory()
    rows = []
    print(
        f"{'model':10} {'what':15} {'batch':>5} {'ours':>9} {'theirs':>9} {'ratio':>6} {'of minima':>9} {'rounds':>6}"
    )
    for row in measure(arguments.models, arguments.batches, arguments.seconds, arguments.clock):
        print(
            f"{row.model:10} {row.what:15} {row.batch:5} {row.ours:6.1f} ms {row.peer:6.1f} ms "
            f"{row.ratio:6.3f} {row.ratio_min:9.3f} {row.rounds:6}",
            flush=True,
        )
        rows.append({**row._asdict(), "ratio": row.ratio, "ratio_min": row.ratio_min})
    if arguments.json is not None:
        machine = {
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "threads": torch.get_num_threads(),
            "keep_memory": arguments.keep_memory,
        }
        arguments.json.write_text(json.dumps({**machine, "unit": "ms", "times": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
