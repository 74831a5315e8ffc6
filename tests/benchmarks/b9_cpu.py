"""B9: a CPU, beside torchvision: evaluation, training step, initialisation, folded inference, and a compiled step."""

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import purecnn
from purecnn import random, tree
from purecnn.fold import fold, pack
from purecnn.optimizers import sgd
from purecnn.training import TrainState, make_step
from tests.benchmarks.race import Constant, Row, Setting, check, images, logits, package, pair, rows

WHAT = "eager and folded on a CPU"
NEEDS_GPU = False
MODELS = ("resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small")


def run(setting: Setting) -> Iterator[Row]:
    for name in setting.pick(MODELS, ("resnet18",)):
        yield from initialisation(setting, name)
        for batch in setting.pick((1, 8), (2,)):
            yield from evaluation(setting, name, batch)
            yield from training(setting, name, batch, donate=True)
            yield from training(setting, name, batch, donate=False)
    for name in setting.pick(("resnet18", "mobilenet_v2"), ()):
        yield from training(setting, name, 8, donate=True, compiled=True)
    for name in setting.pick(("resnet18", "mobilenet_v2"), ("resnet18",)):
        yield from frozen(setting, name)


def evaluation(setting: Setting, name: str, batch: int) -> list[Row]:
    """`Model.apply` and a folded one, against the module's call, under ``torch.inference_mode``."""
    model, params, state, module = pair(name)
    module.eval()
    x, _ = images(setting, batch, setting.pick(224, 32))
    folded, fewer, rest = fold(model, params, state)
    with torch.inference_mode():
        check(model.apply(params, state, x)[0], module(x), exact=True)
        check(folded.apply(fewer, rest, x)[0], module(x))
        peers = {"torchvision eager": lambda: module(x)}
        what = f"{name}, evaluation, batch {batch}"
        goals = {"torchvision eager": 1.0}
        result = rows(setting, "B9", what, lambda: model.apply(params, state, x), peers, goals=goals)
        goals = {"torchvision eager": 0.8}
        what = f"{name}, folded, batch {batch}"
        result += rows(setting, "B9", what, lambda: folded.apply(fewer, rest, x), peers, goals=goals)
        packed, own = pack(folded, fewer, rest, x)
        check(packed.apply(own, rest, x)[0], module(x), rtol=1e-3)
        what = f"{name}, folded and packed, batch {batch}"
        return result + rows(setting, "B9", what, lambda: packed.apply(own, rest, x), peers, goals=goals)


def training(setting: Setting, name: str, batch: int, *, donate: bool, compiled: bool = False) -> list[Row]:
    """A step of SGD with momentum 0.9, against zero_grad, forward, backward and ``torch.optim.SGD.step``.

    A compiled one also against the same loop with the module compiled.
    """
    # Without dropout, whose masks would differ.
    quiet = {} if name.startswith("resnet") else {"dropout": 0.0}
    model, params, state, module = pair(name, **quiet)
    module.train()
    x, labels = images(setting, batch, setting.pick(224, 32))
    rate = 1e-4  # the weights should stay healthy, however often the same batch is seen
    reference = torch.optim.SGD(module.parameters(), lr=rate, momentum=0.9)
    optimizer = sgd(rate, momentum=0.9)
    step = make_step(model, optimizer, donate=donate, compile=compiled)
    train_state = TrainState.start(params, state, optimizer)
    faster = setting.compile(module)

    def ours() -> Tensor:
        nonlocal train_state
        train_state, metrics = step(train_state, (x, labels))
        return metrics.loss

    def peer(module: nn.Module = module) -> Tensor:
        reference.zero_grad()
        loss = F.cross_entropy(module(x), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        reference.step()
        return loss

    check(ours(), peer(), exact=not compiled)  # the first loss; after it, updates differ in rounding
    check(ours(), peer())
    peers = {"torchvision eager": peer}
    if compiled:
        peers["torch.compile(torchvision)"] = lambda: peer(faster)
    what = f"{name}, step, {'donating' if donate else 'pure'}{', compiled' if compiled else ''}, batch {batch}"
    return rows(setting, "B9", what, ours, peers, goals={"torchvision eager": 1.0})


def initialisation(setting: Setting, name: str) -> list[Row]:
    """``model.init`` against torchvision's constructor."""
    model = purecnn.create(name)
    build = getattr(torchvision.models, name)
    assert tree.size(model.init(random.key(0))[0]) == sum(p.numel() for p in build(weights=None).parameters())
    return rows(
        setting,
        "B9",
        f"{name}, initialisation",
        lambda: model.init(random.key(0)),
        {"torchvision constructor": lambda: build(weights=None)},
        goals={"torchvision constructor": 2.0},
        warmup=1,
    )


def frozen(setting: Setting, name: str) -> Iterator[Row]:
    """Folded, compiled, with weights as constants on both sides; ours folded, packed and eager beside it; packaged."""
    import torch._inductor.config as inductor

    batch = setting.pick(8, 2)
    model, params, state, module = pair(name)
    module.eval()
    x, _ = images(setting, batch, setting.pick(224, 32))
    folded, fewer, rest = fold(model, params, state)
    with torch.inference_mode(), inductor.patch(freezing=True):
        theirs = setting.compile(module)
        ours = setting.compile(Constant(folded, fewer, rest), fullgraph=True)
        check(ours(x), theirs(x))
        peers = {"torch.compile, freezing": lambda: theirs(x)}
        yield from rows(setting, "B9", f"{name}, folded and compiled, batch {batch}", lambda: ours(x), peers)
        packed, own = pack(folded, fewer, rest, x)
        what = f"{name}, folded and packed, batch {batch}"
        yield from rows(setting, "B9", what, lambda: packed.apply(own, rest, x), peers)
    ready = package(setting, functools.partial(logits, model, params, state), x)
    if ready is None:
        return
    with torch.inference_mode():
        check(ready(x), theirs(x))
        peers["torchvision eager"] = lambda: module(x)
        what = f"{name}, evaluation as a package, batch {batch}"
        yield from rows(setting, "B9", what, lambda: ready(x), peers, goals={"torchvision eager": 0.8})
