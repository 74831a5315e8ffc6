"""What decides how a training run ends, and what follows from it: optimizer, schedule, phases."""

import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from torchvision.transforms import v2

from purecnn import data, optimizers, schedules
from purecnn.precision import POLICIES, Policy
from purecnn.tree import Tree

__all__ = ["OptimizerName", "Options", "Phase", "PrecisionName", "ScheduleName", "mixing", "phases"]


class OptimizerName(StrEnum):
    """Update rules."""

    sgd = "sgd"
    adamw = "adamw"
    rmsprop = "rmsprop"
    lars = "lars"
    muon = "muon"


class ScheduleName(StrEnum):
    """Courses of the learning rate."""

    constant = "constant"
    step = "step"
    cosine = "cosine"
    one_cycle = "one-cycle"


class PrecisionName(StrEnum):
    """Types of the numbers that are computed with."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@dataclass(frozen=True)
class Options:
    """All that decides how a run ends."""

    model: str
    data: str
    like: str | None
    """A data set whose preprocessing and augmentation the pictures get."""
    source: str | None
    epochs: int
    batch_size: int
    optimizer: OptimizerName
    learning_rate: float
    schedule: ScheduleName
    warmup: int
    """Epochs in which the learning rate rises."""
    momentum: float
    weight_decay: float
    clip: float | None
    """The largest norm of the gradient."""
    label_smoothing: float
    mixup: float | None
    cutmix: float | None
    average: float | None
    head_epochs: int
    """Of all epochs the first, in which the head alone is trained."""
    stage_epochs: int
    """Epochs after them for each stage that joins, from the last to the first."""
    stage_decay: float
    """Each stage's learning rate, as a share of the next one's."""
    accumulate: int
    precision: PrecisionName
    channels_last: bool
    remat: bool
    image_size: int | None
    seed: int
    root: str | None
    skip_bad: bool
    workers: int
    device: str
    compile: bool | None
    capture: bool
    synchronize: bool
    """Batch normalisation sees the batch of all processes."""

    @property
    def policy(self) -> Policy | None:
        """Types of numbers; None for single precision all over."""
        return None if self.precision is PrecisionName.float32 else POLICIES[self.precision]

    def command(self) -> str:
        """The command line that trains with these options."""
        words = ["purecnn", "train", self.model]
        for field, value in asdict(self).items():
            flag = {"source": "--from"}.get(field, f"--{field.replace('_', '-')}")
            if value is True:
                words.append(flag)
            elif value is False and field == "compile":
                words.append("--no-compile")
            elif value is not None and value is not False and field != "model":
                words += [flag, str(value)]
        return shlex.join(words)


ELSEWHERE = ("root", "workers", "device", "compile", "capture")
"""Options that may change when a run goes on on another machine: they change no result but by rounding."""


def mixing(options: Options, classes: int) -> data.Mix | None:
    """How images of a batch are mixed; where both ways are asked for, each batch draws one."""
    ways = []
    if options.mixup is not None:
        ways.append(v2.MixUp(alpha=options.mixup, num_classes=classes))
    if options.cutmix is not None:
        ways.append(v2.CutMix(alpha=options.cutmix, num_classes=classes))
    return None if not ways else ways[0] if len(ways) == 1 else v2.RandomChoice(ways)


class Phase(NamedTuple):
    """Some epochs in which the same layers are trained."""

    epochs: int
    optimizer: optimizers.Optimizer
    trainable: Callable[[str], bool] | None
    """Paths of the parameters that are trained; None for all."""


def phases(options: Options, params: Tree, steps: int) -> list[Phase]:
    """First the head alone, then stage after stage from the last on, then all.

    A fresh head's first gradients would spoil a trained network's features (Kumar et al., Fine-Tuning can Distort
    Pretrained Features, arXiv:2202.10054); to let the stages join one by one is Howard and Ruder's gradual unfreezing
    (arXiv:1801.06146). The head's rate is ten times higher while it is alone.
    """
    left = options.epochs
    result = []

    def add(epochs: int, rate: float | schedules.Schedule, parts: tuple[str, ...] | None) -> None:
        nonlocal left
        epochs = min(epochs, left)
        left -= epochs
        if epochs:
            trainable = None if parts is None else lambda path: path.startswith(parts)
            result.append(Phase(epochs, _optimizer(options, params, rate), trainable))

    heads = tuple(f"{part}." for part in params if part.startswith(("head", "aux")))
    add(options.head_epochs, schedules.constant(10 * options.learning_rate), heads)
    trunk = [f"{part}." for part in params if f"{part}." not in heads]
    for i in range(1, len(trunk) if options.stage_epochs else 0):
        add(options.stage_epochs, schedules.constant(options.learning_rate), (*trunk[-i:], *heads))
    add(left, _rate(options, left, steps), None)
    return result


def _rate(options: Options, epochs: int, steps: int) -> schedules.Schedule:
    rising = min(options.warmup, epochs - 1) * steps
    rest = epochs * steps - rising
    peak = options.learning_rate
    if options.schedule is ScheduleName.constant or rest <= 0:
        then = schedules.constant(peak)
    elif options.schedule is ScheduleName.step:
        # A tenth after half and after three quarters of the way, as in He et al., arXiv:1512.03385, section 4.2.
        then = schedules.piecewise(peak, {rest // 2: 0.1, 3 * rest // 4: 0.01})
    elif options.schedule is ScheduleName.cosine:
        then = schedules.cosine(peak, rest)
    else:
        then = schedules.one_cycle(peak, rest)
    return schedules.warmup(rising, then) if rising > 0 else then


def _optimizer(options: Options, params: Tree, rate: float | schedules.Schedule) -> optimizers.Optimizer:
    def decay(path: str) -> bool:
        return path.endswith(".weight") and ".norm" not in path

    parts = [part for part in params if not part.startswith(("head", "aux"))]

    def scale(path: str) -> float:
        part = path.partition(".")[0]
        return options.stage_decay ** (len(parts) - parts.index(part)) if part in parts else 1.0

    common: dict[str, Any] = {
        "weight_decay": options.weight_decay,
        "decay": decay,
        "scale": None if options.stage_decay == 1 else scale,
    }
    momentum = options.momentum
    rule: optimizers.Optimizer = {
        OptimizerName.sgd: lambda: optimizers.sgd(rate, momentum=momentum, **common),
        OptimizerName.adamw: lambda: optimizers.adamw(rate, **common),
        OptimizerName.rmsprop: lambda: optimizers.rmsprop(rate, momentum=momentum, **common),
        OptimizerName.lars: lambda: optimizers.lars(rate, momentum=momentum, **common),
        OptimizerName.muon: lambda: optimizers.muon(rate, momentum=momentum, **common),
    }[options.optimizer]()
    return rule if options.clip is None else optimizers.clipped(rule, options.clip)
