"""A training run: from options to a folder that holds all that was found.

checkpoint.safetensors   the network after its best epoch, with preprocessing and class names
metrics.csv              a row for each epoch
curves.png               the same as a picture
confusion.png            which classes the best network takes for which
config.json              the options, the versions, and the command that runs it again
example.png              the first picture of the held-out half, to try a prediction on
"""

import csv
import json
import platform
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision

import purecnn
from converters import checkpoint
from converters.rules import ConversionError
from converters.sources import Source
from purecnn import Model, data, optimizers, pictures, random, schedules, training, tree
from purecnn.data import DataSet, Preprocessing
from purecnn.files import replacing
from purecnn.tree import Tree


class FormatName(StrEnum):
    """Whose names a file of weights has."""

    purecnn = "purecnn"
    torchvision = "torchvision"


class OptimizerName(StrEnum):
    """Update rules."""

    sgd = "sgd"
    adamw = "adamw"


class ScheduleName(StrEnum):
    """Courses of the learning rate."""

    constant = "constant"
    cosine = "cosine"
    one_cycle = "one-cycle"


@dataclass(frozen=True)
class Options:
    """All that decides how a run ends."""

    model: str
    data: str
    source: str | None
    epochs: int
    batch_size: int
    optimizer: OptimizerName
    learning_rate: float
    schedule: ScheduleName
    momentum: float
    weight_decay: float
    label_smoothing: float
    head_epochs: int
    """Of all epochs the first, in which the head alone is trained."""
    image_size: int | None
    seed: int
    root: str | None
    skip_bad: bool
    workers: int
    device: str
    compile: bool | None

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


def new_folder(options: Options) -> Path:
    """A folder in ``runs`` that does not exist yet."""
    name = f"{options.model}-{Path(options.data).name}"
    numbers = ["", *(f"-{i}" for i in range(2, 10_000))]
    return next(folder for number in numbers if not (folder := Path("runs", name + number)).exists())


def preprocessing(model: Model, known: Preprocessing | None, dataset: DataSet) -> Preprocessing:
    """How the data set's pictures become the model's input: as the weights were trained, if they say so."""
    return (known or dataset.preprocessing).adapt(size=model.image_size, channels=model.in_channels)


def check_classes(source: Source, dataset: DataSet) -> None:
    """That a network's classes are a data set's.

    Raises:
        ConversionError: if they are not.
    """
    count = len(dataset.classes)
    if source.model.num_classes != count:
        raise ConversionError(f"{source.model.name} has {source.model.num_classes} classes, {dataset.name} has {count}")
    if source.classes not in (None, dataset.classes):
        raise ConversionError(
            f"the network's classes ({_some(source.classes)}) are not {dataset.name}'s ({_some(dataset.classes)})"
        )


def _some(names: tuple[str, ...] | None) -> str:
    return ", ".join((names or ())[:5]) + (", ..." if len(names or ()) > 5 else "")


def to(device: torch.device, params: Tree) -> Tree:
    """A tree on a device."""
    return tree.map(lambda leaf: leaf.to(device), params)


def train(
    options: Options,
    dataset: DataSet,
    source: Source | None,
    folder: Path,
    on_batch: Callable[[int, int], None],
    on_epoch: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Train and write the folder; files appear as their contents become known, each at once and whole.

    Args:
        options: of the run.
        dataset: what to train on.
        source: weights to begin with. Their heads are replaced if their classes are not the data set's.
        folder: the run's.
        on_batch: called with the number of batches done and in all.
        on_epoch: called with each row of ``metrics.csv``.

    Returns:
        The best epoch's row, and a few words on the run.

    Raises:
        DivergedError: if the loss is no longer a number; the folder keeps what came before.
    """
    device = torch.device(options.device)
    init_key, fit_key = random.split(random.key(options.seed))
    model, params, state = _start(options, dataset, source, init_key)
    prepare = preprocessing(model, source.preprocessing if source else None, dataset)
    folder.mkdir(parents=True, exist_ok=True)
    _write_config(folder, options, model, dataset, prepare)
    dataset.test[0][0].save(folder / "example.png")

    vary = prepare.training(dataset.augmentation)
    test = data.batches(dataset.test, prepare.evaluation(), options.batch_size, workers=options.workers)
    steps = -(-len(dataset.train) // options.batch_size)
    rows: list[dict[str, Any]] = []

    def epoch_done(row: training.Epoch, train_state: training.TrainState) -> None:
        rows.append({**row._asdict(), "epoch": len(rows) + 1})
        _write_metrics(folder / "metrics.csv", rows)
        if rows[-1] is max(rows, key=_merit):
            checkpoint.save(
                folder / "checkpoint.safetensors",
                model,
                train_state.params,
                train_state.state,
                preprocessing=prepare,
                classes=dataset.classes,
            )
        on_epoch(rows[-1])

    weights = to(device, params), to(device, state)
    try:
        for phase in _phases(options, steps):
            fitted = training.fit(
                model,
                phase.optimizer,
                lambda key: data.batches(dataset.train, vary, options.batch_size, key=key, workers=options.workers),
                test,
                epochs=phase.epochs,
                key=random.fold_in(fit_key, len(rows)),
                start=weights,
                label_smoothing=options.label_smoothing,
                trainable=(lambda path: path.startswith("head.")) if phase.head_only else None,
                statistics="running" if phase.head_only else "batch",
                compile=options.compile,
                on_batch=lambda _, batch, metrics: on_batch(len(rows) * steps + batch, options.epochs * steps),
                on_epoch=epoch_done,
            )
            weights = fitted.train_state.params, fitted.train_state.state
    finally:
        if rows:
            pictures.curves(rows, folder / "curves.png")
    model, params, state = checkpoint.load(folder / "checkpoint.safetensors")
    found = training.evaluate(model, to(device, params), to(device, state), test)
    pictures.confusion(found.confusion, dataset.classes, folder / "confusion.png")
    best = max(rows, key=_merit)
    return {
        **best,
        "epochs": options.epochs,
        "seconds": sum(row["seconds"] for row in rows),
        "skipped": len(dataset.skipped),
    }


def _start(options: Options, dataset: DataSet, source: Source | None, key: torch.Tensor) -> tuple[Model, Tree, Tree]:
    classes = len(dataset.classes)
    if source is None:
        model = purecnn.create(
            options.model,
            num_classes=classes,
            in_channels=dataset.preprocessing.channels,
            image_size=options.image_size,
        )
        return model, *model.init(key)
    model, params, state = source.model, source.params, source.state
    if options.image_size not in (None, model.image_size):
        model = purecnn.create(model.name, **{**model.settings, "image_size": options.image_size})
        checkpoint.check(model, params, state)
    if source.classes == dataset.classes:
        return model, params, state
    return purecnn.replace_head(model, params, state, classes, key)


class _Phase(NamedTuple):
    epochs: int
    optimizer: optimizers.Optimizer
    head_only: bool


def _phases(options: Options, steps: int) -> list[_Phase]:
    """First the head alone, then all: a fresh head's first gradients would spoil a trained network's features.

    Kumar et al., Fine-Tuning can Distort Pretrained Features, arXiv:2202.10054. The head's rate is ten times higher.
    """
    head = min(options.head_epochs, options.epochs)
    rest = options.epochs - head
    phases = [
        _Phase(head, _optimizer(options, schedules.constant(10 * options.learning_rate)), True),
        _Phase(rest, _optimizer(options, _rate(options, rest * steps)), False),
    ]
    return [phase for phase in phases if phase.epochs]


def _rate(options: Options, steps: int) -> schedules.Schedule:
    if options.schedule is ScheduleName.constant or not steps:
        return schedules.constant(options.learning_rate)
    if options.schedule is ScheduleName.cosine:
        return schedules.cosine(options.learning_rate, steps)
    return schedules.one_cycle(options.learning_rate, steps)


def _optimizer(options: Options, rate: schedules.Schedule) -> optimizers.Optimizer:
    def decay(path: str) -> bool:
        return path.endswith(".weight") and ".norm" not in path

    if options.optimizer is OptimizerName.sgd:
        return optimizers.sgd(rate, momentum=options.momentum, weight_decay=options.weight_decay, decay=decay)
    return optimizers.adamw(rate, weight_decay=options.weight_decay, decay=decay)


def _merit(row: dict[str, Any]) -> tuple[float, float]:
    """As `training.Fitted` chooses the best epoch."""
    return row["test_accuracy"], -row["test_loss"]


def _write_config(folder: Path, options: Options, model: Model, dataset: DataSet, prepare: Preprocessing) -> None:
    config = {
        "command": options.command(),
        "options": asdict(options),
        "settings": dict(model.settings),
        "preprocessing": prepare.to_dict(),
        "augmentation": asdict(dataset.augmentation),
        "data": {
            "name": dataset.name,
            "classes": dataset.classes,
            "train": len(dataset.train),
            "test": len(dataset.test),
            "skipped": [str(path) for path in dataset.skipped],
        },
        "versions": {
            "purecnn": purecnn.__version__,
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "python": platform.python_version(),
        },
    }
    with replacing(folder / "config.json") as file:
        file.write_text(json.dumps(config, indent=2) + "\n")


def _write_metrics(path: Path, rows: list[dict[str, Any]]) -> None:
    with replacing(path) as file, file.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, rows[0])
        writer.writeheader()
        writer.writerows(rows)
