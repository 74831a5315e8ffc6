"""The options that determine a training run's result, and what follows from them: optimizer, schedule, phases."""

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
    """Optimizers."""

    sgd = "sgd"
    adamw = "adamw"
    rmsprop = "rmsprop"
    lars = "lars"
    muon = "muon"


class ScheduleName(StrEnum):
    """Learning-rate schedules."""

    constant = "constant"
    step = "step"
    cosine = "cosine"
    one_cycle = "one-cycle"


class PrecisionName(StrEnum):
    """Dtypes to compute in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@dataclass(frozen=True)
class Options:
    """All options that determine a run's result, and those of its machine (`ELSEWHERE`)."""

    model: str
    data: str
    like: str | None
    """A data set whose preprocessing and augmentation are used for a folder's images."""
    source: str | None
    epochs: int
    batch_size: int
    optimizer: OptimizerName
    learning_rate: float
    schedule: ScheduleName
    warmup: int
    """Number of first epochs in which the learning rate rises."""
    momentum: float
    weight_decay: float
    clip: float | None
    """The maximum norm of the gradient; None for no clipping."""
    label_smoothing: float
    mixup: float | None
    cutmix: float | None
    average: float | None
    head_epochs: int
    """Number of first epochs in which only the head is trained."""
    stage_epochs: int
    """After these, one more stage is unfrozen every so many epochs, from the last to the first; 0 for all at once."""
    stage_decay: float
    """Each stage's learning rate as a fraction of the next stage's."""
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
    """Whether batch normalisation uses the whole batch of all processes."""

    @property
    def policy(self) -> Policy | None:
        """The precision policy; None for single precision everywhere."""
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
"""Options that may change when a run is resumed on another machine: they affect results only by rounding."""


def mixing(options: Options, classes: int) -> data.Mix | None:
    """How the images of a batch are mixed; with both mixup and cutmix, one of them is drawn for each batch."""
    ways = []
    if options.mixup is not None:
        ways.append(v2.MixUp(alpha=options.mixup, num_classes=classes))
    if options.cutmix is not None:
        ways.append(v2.CutMix(alpha=options.cutmix, num_classes=classes))
    return None if not ways else ways[0] if len(ways) == 1 else v2.RandomChoice(ways)


class Phase(NamedTuple):
    """Consecutive epochs in which the same layers are trained."""

    epochs: int
    optimizer: optimizers.Optimizer
    trainable: Callable[[str], bool] | None
    """Whether the parameter at a path is trained; None for all parameters."""


def phases(options: Options, params: Tree, steps: int) -> list[Phase]:
    """The phases of a run: first the head alone, then one more stage at a time from the last on, then all layers.

    The first gradients of a new head would spoil a trained network's features (Kumar et al., Fine-Tuning can Distort
    Pretrained Features, arXiv:2202.10054); unfreezing stages one by one is Howard and Ruder's gradual unfreezing
    (arXiv:1801.06146). While the head is trained alone, its learning rate is ten times higher.
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
        # A tenth after half of the steps, a hundredth after three quarters: He et al., arXiv:1512.03385, section 4.2.
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
