"""B1: CIFAR-10 in seconds: eight epochs of airbench's network at batch 2,000, images on the device as bytes.

With ``--data FOLDER`` the pictures are CIFAR-10's and the accuracy is in the note; without, they are noise, which takes
the same time. If the folder also has the authors' ``airbench94_muon.py``
(https://github.com/KellerJordan/cifar10-airbench) and what that needs, it is run as it is.
"""

import contextlib
import importlib.util
import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import purecnn
from purecnn import augment, data, random, schedules, tree
from purecnn.capture import captured
from purecnn.data import Preprocessing
from purecnn.optimizers import Optimizer, muon, partitioned, sgd
from purecnn.precision import Policy
from purecnn.schedules import Schedule
from purecnn.step import TrainState, make_step
from purecnn.tree import Tree
from purecnn.zoo.airbench import patches, whitening
from tests.benchmarks.race import Row, Setting, check, signed

WHAT = "CIFAR-10 to 94 %, airbench94, eight epochs at batch 2000"
NEEDS_GPU = True
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
GOAL = 0.7


class Twin(nn.Module):
    """`purecnn.create("airbench94")` as a user of torch.nn writes it."""

    def __init__(self, widths: tuple[int, ...], classes: int = 10, *, batch_statistics: bool = False) -> None:
        super().__init__()
        self.whiten = nn.Conv2d(3, 24, 2)
        self.whiten.weight.requires_grad = False
        layers: list[nn.Module] = []
        inputs = 24
        for width in widths:
            for i in range(2):
                layers.append(nn.Conv2d(inputs, width, 3, padding=1, bias=False))
                layers += [] if i else [nn.MaxPool2d(2)]
                layers += [nn.BatchNorm2d(width, 1e-12, 0.4, track_running_stats=not batch_statistics), nn.GELU()]
                layers[-2].weight.requires_grad = False  # type: ignore[union-attr]
                inputs = width
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(inputs, classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(F.gelu(self.whiten(x)))
        return self.head(F.max_pool2d(x, 3).flatten(1)) / 9


def twin(model: purecnn.Model, params: Tree, state: Tree, device: str, *, batch_statistics: bool = True) -> Twin:
    """With copies of our weights; without running statistics, which torch.func's plain use would refuse."""
    module = Twin(model.settings["widths"], model.num_classes, batch_statistics=batch_statistics).to(device)
    leaves = iter(tree.flatten(params).values())
    with torch.no_grad():
        for path, leaf in module.named_parameters():
            if not path.endswith("weight") or leaf.ndim > 1:  # normalisations have no scale of their own
                leaf.copy_(next(leaves))
    return module.train()


def recipe(steps: int) -> Optimizer:
    """The authors' rates: Muon for the inner convolutions, SGD for biases and head, all falling to zero."""

    def falling(rate: float) -> Schedule:
        return schedules.warmup(steps, 0.0, start=rate)  # a straight line from the rate to 0

    others = partitioned(
        lambda path, leaf: path.startswith("head."),
        sgd(falling(0.67), momentum=0.85, nesterov=True),
        sgd(falling(0.053), momentum=0.85, nesterov=True),
    )
    return partitioned(
        lambda path, leaf: leaf.ndim == 4 and not path.startswith("stem."),
        muon(falling(0.24), momentum=0.6, adjust="original", weight_decay=0.0),
        others,
    )


def run(setting: Setting) -> Iterator[Row]:
    model = purecnn.create("airbench94", **setting.pick({}, {"widths": (26, 28, 30)}))
    images, labels, test = pictures(setting)
    batch, epochs = setting.pick(2000, 16), setting.pick(8, 1)
    train = trainer(setting, model, images, labels, batch, epochs)
    verify(setting, model)
    train()  # compiles
    seconds, (params, state) = timed(setting, train)
    note = "" if test is None else f"accuracy {accuracy(model, params, state, *test):.4f}"
    peers = {"torch.compile, fused SGD": peer(setting, model, images, labels, batch, epochs)}
    if setting.data is not None and (script := setting.data / "airbench94_muon.py").exists():
        peers["airbench94_muon.py"] = authors(script)
    for name, other in peers.items():
        other()
        theirs, _ = timed(setting, other)
        goal = GOAL if not setting.toy else None
        row = Row("B1", f"{epochs} epochs, batch {batch}", name, seconds, theirs, goal, seconds / theirs, 1, note)
        yield signed(setting, row)


def pictures(setting: Setting) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Bytes (n, 3, 32, 32) and labels; and the test half, if they are real."""
    if setting.data is None:
        count = setting.pick(50_000, 32)
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
        return images.to(setting.device), torch.randint(10, (count,), generator=generator).to(setting.device), None
    found = data.load(str(setting.data))
    as_is = Preprocessing(size=32, resize=32, mean=(0.0,), std=(1.0,))
    train, test = (data.resident(part, 2000, preprocessing=as_is, device=setting.device) for part in found[:2])
    return train.images, train.labels, (test.images, test.labels)


def normalized(images: Tensor) -> Tensor:
    return augment.normalize(MEAN, STD)(images, torch.empty(0))


def started(model: purecnn.Model, images: Tensor, device: str) -> tuple[Tree, Tree]:
    """With whitening in the first convolution."""
    params, state = model.init(random.key(0, device))
    weight = whitening(patches(normalized(images[:5000])))
    stem = {**params["stem"], "whiten": {**params["stem"]["whiten"], "weight": weight}}
    return {**params, "stem": stem}, state


def trainer(
    setting: Setting, model: purecnn.Model, images: Tensor, labels: Tensor, batch: int, epochs: int
) -> Callable[[], tuple[Tree, Tree]]:
    count = len(images) // batch
    optimizer = recipe(epochs * count)
    policy = Policy(compute=torch.bfloat16)
    vary = augment.chain(augment.flip, augment.crop(2, "reflect"), augment.normalize(MEAN, STD))
    trainable = lambda path: path != "stem.whiten.weight"  # noqa: E731
    settings: dict[str, Any] = {"label_smoothing": 0.2, "policy": policy, "augment": vary, "trainable": trainable}
    step = captured(make_step(model, optimizer, donate=True, compile=not setting.toy, **settings))
    key = random.key(1, setting.device)

    def train() -> tuple[Tree, Tree]:
        params, state = started(model, images, setting.device)
        train_state = TrainState.start(params, state, optimizer, trainable=trainable, policy=policy)
        for epoch in range(epochs):
            order = random.permutation(random.fold_in(key, epoch), len(images))
            for i in range(count):
                chosen = order[i * batch : (i + 1) * batch]
                train_state, _ = step(train_state, (images[chosen], labels[chosen]), key)
        return train_state.params, train_state.state

    return train


def peer(
    setting: Setting, model: purecnn.Model, images: Tensor, labels: Tensor, batch: int, epochs: int
) -> Callable[[], Any]:
    """torch.nn, autocast, torch.compile, fused SGD; the same pictures varied in the same way."""
    count = len(images) // batch
    module = twin(model, *started(model, images, setting.device), setting.device, batch_statistics=False)
    module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(
        [leaf for leaf in module.parameters() if leaf.requires_grad], lr=0.01, momentum=0.85, nesterov=True, fused=True
    )

    def objective(images: Tensor, labels: Tensor) -> Tensor:
        mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
        x = torch.where(mirrored, images.flip(-1), images)
        wide = F.pad(x.float(), (2,) * 4, mode="reflect")
        shift = torch.randint(5, (2, len(images), 1, 1, 1), device=images.device)
        steps = torch.arange(32, device=images.device)
        x = wide.take_along_dim(shift[0] + steps[:, None], 2).take_along_dim(shift[1] + steps, 3)
        mean, std = (torch.tensor(each, device=images.device)[:, None, None] for each in (MEAN, STD))
        x = ((x / 255 - mean) / std).contiguous(memory_format=torch.channels_last)
        with torch.autocast(setting.device, torch.bfloat16):
            return F.cross_entropy(module(x), labels, label_smoothing=0.2)

    loss_of = setting.compile(objective)

    def train() -> None:
        for _ in range(epochs):
            order = torch.randperm(len(images), device=images.device)
            for i in range(count):
                chosen = order[i * batch : (i + 1) * batch]
                optimizer.zero_grad(set_to_none=True)
                loss_of(images[chosen], labels[chosen]).backward()
                optimizer.step()

    return train


def authors(script: Path) -> Callable[[], Any]:
    """Their ``main``, as their script calls it; it looks for ``cifar10/`` beside itself."""
    sys.argv[0] = str(script)  # it reads its own source from there
    spec = importlib.util.spec_from_file_location("airbench94_muon", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.CifarNet().cuda().to(memory_format=torch.channels_last)
    model.compile(mode="max-autotune")

    def train() -> None:
        before = Path.cwd()
        os.chdir(script.parent)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                module.main(0, model)
        finally:
            os.chdir(before)

    return train


def verify(setting: Setting, model: purecnn.Model) -> None:
    """That the twin computes the same."""
    params, state = model.init(random.key(0, setting.device))
    x = torch.randn(8, 3, 32, 32, device=setting.device)
    check(model.apply(params, state, x, train=True)[0], twin(model, params, state, setting.device)(x), rtol=1e-3)


def timed(setting: Setting, run: Callable[[], Any]) -> tuple[float, Any]:
    """Milliseconds, and the result."""
    if setting.cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    result = run()
    if setting.cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1e3, result


def accuracy(model: purecnn.Model, params: Tree, state: Tree, images: Tensor, labels: Tensor) -> float:
    """Without augmentation of the test images."""
    with torch.no_grad():
        right = sum(
            int((model.apply(params, state, normalized(x))[0].argmax(1) == y).sum())
            for x, y in zip(images.split(2000), labels.split(2000), strict=True)
        )
    return right / len(images)
