"""B4: inference in bfloat16, channels last, at batch 1 and 256: folded, compiled and frozen, against the same."""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from purecnn import tree
from purecnn.fold import fold
from purecnn.tree import Tree
from tests.benchmarks.b3_training import channels_last
from tests.benchmarks.race import Constant, Row, Setting, check, images, pair, rows, signed

WHAT = "inference of eight networks, bfloat16, channels last, batch 1 and 256"
NEEDS_GPU = True
MODELS = (
    "resnet50", "convnext_tiny", "efficientnet_b0", "densenet121", "vgg16", "mobilenet_v3_large", "regnet_y_3_2gf",
    "inception_v3",
)  # fmt: skip
BUDGET = 540.0
"""Seconds: no further network is begun after it."""


def run(setting: Setting) -> Iterator[Row]:
    import torch._inductor.config as inductor

    end = time.monotonic() + BUDGET
    measured: dict[int, list[Row]] = {}
    with torch.inference_mode(), inductor.patch(freezing=True):
        for name in setting.pick(MODELS, ("mobilenet_v3_large",)):
            for batch in setting.pick((256, 1), (2,)):
                if time.monotonic() > end:
                    return
                found = race(setting._replace(seconds=min(setting.seconds, 5.0)), name, batch)
                measured.setdefault(batch, []).append(found[0])
                yield from found
    for batch, found in measured.items():
        ratio = math.exp(sum(math.log(row.ratio or 1.0) for row in found) / len(found))
        goal = 0.9 if batch == 1 else 1 / 1.15
        row = Row("B4", f"all {len(found)}, batch {batch}, geometric mean", found[0].peer, ratio=ratio, goal=goal)
        ours, theirs = (sum(getattr(each, side) for each in found) for side in ("ours", "theirs"))
        yield signed(setting, row._replace(ours=ours, theirs=theirs, note="times are sums"))


def race(setting: Setting, name: str, batch: int) -> list[Row]:
    peer: dict[str, Any] = {"init_weights": False} if name == "inception_v3" else {}
    model, params, state, module = pair(name, setting.device, peer)
    size = setting.pick(model.image_size, 64)
    x, _ = images(setting, batch, size)
    module.eval()
    folded, fewer, rest = fold(model, params, state)
    check(folded.apply(fewer, rest, x[:2])[0], module(x[:2]), rtol=1e-3)  # before numbers get short

    def short(values: Tree) -> Tree:
        return channels_last(tree.map(lambda leaf: leaf.bfloat16() if leaf.is_floating_point() else leaf, values))

    x = x.bfloat16().to(memory_format=torch.channels_last)
    module = module.bfloat16().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    compile = _compiler(setting, batch)
    ours = compile(Constant(folded, short(fewer), short(rest)))
    peers: dict[str, Callable[[Tensor], Any]] = {"torchvision, compiled and frozen": compile(module)}
    if not setting.toy and (network := _timm(name)) is not None:
        network = network.to(setting.device).bfloat16().to(memory_format=torch.channels_last).eval()
        peers["timm, compiled and frozen"] = compile(network)
    ours(x)
    goal = dict.fromkeys(peers, 0.9 if batch == 1 else 1.0)
    calls = {peer: (lambda run=run: run(x)) for peer, run in peers.items()}  # type: ignore[misc]
    return rows(setting, "B4", f"{name}, batch {batch}", lambda: ours(x), calls, goals=goal)


def _compiler(setting: Setting, batch: int) -> Callable[[Any], Callable[[Tensor], Any]]:
    """For one image a graph of launches, on both sides; for many the plain compiler."""
    if batch == 1 and setting.cuda:
        return lambda run: setting.compile(run, mode="reduce-overhead", dynamic=False)
    return lambda run: setting.compile(run, dynamic=False)


def _timm(name: str) -> Any:
    try:
        import timm
    except ImportError:
        return None
    other = {"efficientnet_b0": "efficientnet_b0", "mobilenet_v3_large": "mobilenetv3_large_100"}
    other |= {"regnet_y_3_2gf": "regnety_032"}
    return timm.create_model(other.get(name, name), pretrained=False)
