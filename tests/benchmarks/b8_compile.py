"""B8: time from nothing to the first step's result, with ``torch.compile``: caches empty (cold) and full (warm).

Each trial is a process of its own, because a compiler that has run once has its own code and tables in memory. Further
rows are of our function as a package (`converters.export`): cold, to make it and run it; warm, to load it, where
nothing is traced; beside the peer's ``torch.compile``, cold and with full caches.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.benchmarks.race import Row, Setting, signed

WHAT = "time to the first compiled step"
NEEDS_GPU = False
ROOT = Path(__file__).parents[2]


def run(setting: Setting) -> Iterator[Row]:
    sides = setting.pick(("ours", "torchvision", "packaged"), ("ours", "torchvision"))
    for name in setting.pick(("resnet18", "mobilenet_v2"), ("squeezenet1_1",)):
        times: dict[str, dict[str, float]] = {}
        with tempfile.TemporaryDirectory() as folder:
            for state in ("cold", "warm"):
                # Each side has a cache of its own; the second trial finds what the first has left.
                times[state] = {side: _trial(setting, name, side, Path(folder) / side) for side in sides}
        for side, suffix in {"ours": "", "packaged": ", as a package"}.items():
            for state, goal in {"cold": 0.5, "warm": 0.3}.items():
                if side not in sides:
                    continue
                ours, theirs = times[state][side], times[state]["torchvision"]
                what = f"{name}, first step, {state}{suffix}"
                row = Row("B8", what, "torch.compile(torchvision)", ours, theirs, goal)
                yield signed(setting, row._replace(ratio=ours / theirs, rounds=1))


def _trial(setting: Setting, name: str, side: str, cache: Path) -> float:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(sys.path)}
    if setting.clock == "cpu":  # its compilers are then its own children, whose time is known
        environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    arguments = [name, side, setting.device, json.dumps(setting.toy), setting.clock, str(cache)]
    command = [sys.executable, "-m", "tests.benchmarks.b8_compile", *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1])


def _now(clock: str) -> float:
    """Seconds; of the processor those of children, too."""
    return time.perf_counter() if clock == "wall" else sum(os.times()[:4])


def first_step(name: str, side: str, device: str, toy: bool, clock: str = "wall", cache: str = ".") -> float:
    """Milliseconds from a network to the result of its first gradient; imports and the network itself aside.

    A package is made in ``cache`` if there is none yet.
    """
    import torch
    import torch.nn.functional as F

    from converters import export
    from purecnn import tree
    from tests.benchmarks.race import images, pair

    setting = Setting(device, toy)
    dropout: dict[str, Any] = {} if name.startswith("resnet") else {"dropout": 0.0}
    model, params, state, module = pair(name, device, num_classes=10, **dropout)
    module.train()
    x, labels = images(setting, 4, 64, classes=10)
    backend = "eager" if toy else "inductor"
    leaves = {path: leaf.requires_grad_() for path, leaf in tree.flatten(params).items()}

    def ours(leaves: Any, state: Any, x: Any, labels: Any) -> Any:
        outputs, state = model.apply(tree.unflatten(leaves), state, x, train=True)
        return F.cross_entropy(outputs, labels), state

    def theirs(x: Any, labels: Any) -> Any:
        return F.cross_entropy(module(x), labels)

    torch.ones(1, device=device)
    begin = _now(clock)
    if side == "packaged":
        file = Path(cache, "gradient.pt2")
        if not file.exists():
            export.package(file, torch.func.grad_and_value(ours, has_aux=True), leaves, state, x, labels)
        with torch.no_grad():
            found, (loss, _) = export.load(file)(leaves, state, x, labels)
        grads = tuple(found.values())
    elif side == "ours":
        loss, _ = torch.compile(ours, fullgraph=True, backend=backend)(leaves, state, x, labels)
        grads = torch.autograd.grad(loss, list(leaves.values()))
    else:
        loss = torch.compile(theirs, backend=backend)(x, labels)
        grads = torch.autograd.grad(loss, list(module.parameters()))
    assert bool(loss.isfinite())
    assert len(grads) == len(leaves)
    return (_now(clock) - begin) * 1e3


if __name__ == "__main__":
    name, side, device, toy, clock, cache = sys.argv[1:]
    print(first_step(name, side, device, json.loads(toy), clock, cache))
