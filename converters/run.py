"""A training run: from options to a folder with all results.

checkpoint.safetensors   the network after its best epoch, with preprocessing and class names
states/                  the saved state of the run, from which ``--resume`` continues
metrics.csv              one row per epoch
curves.png               the metrics as curves
confusion.png            the best network's confusion matrix
report.html              everything on one page
config.json              the options, the versions, and the command that repeats the run
example.png              the first image of the test split, to try a prediction on
"""

import csv
import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision

import purecnn
from converters import checkpoint, report, states
from converters.files import FileError
from converters.options import ELSEWHERE, Options, Phase, mixing, phases
from converters.rules import ConversionError
from converters.sources import Source
from converters.states import Standing
from purecnn import Model, data, distributed, pictures, random, training, tree
from purecnn.data import DataSet, Preprocessing
from purecnn.files import alone, clear, replacing
from purecnn.tree import Tree


class RunError(ValueError):
    """A run cannot be resumed in a folder."""


class Hooks(NamedTuple):
    """Functions that are called during a run."""

    on_batch: Callable[[int, int], None]
    """Called after each batch with the number of batches done and the total number."""
    on_epoch: Callable[[dict[str, Any]], None]
    """Called with each row of ``metrics.csv``."""
    stop: Callable[[], bool]
    """Called after each batch; if it returns True, the run saves its state and stops."""


def new_folder(options: Options) -> Path:
    """A folder in ``runs`` that does not exist yet."""
    name = f"{options.model}-{Path(options.data).name}"
    numbers = ["", *(f"-{i}" for i in range(2, 10_000))]
    return next(folder for number in numbers if not (folder := Path("runs", name + number)).exists())


def preprocessing(model: Model, known: Preprocessing | None, dataset: DataSet) -> Preprocessing:
    """How the data set's images become the model's input: as the weights were trained, if that is known."""
    chosen = (known or dataset.preprocessing).adapt(size=model.image_size, channels=model.in_channels)
    if known is not None or model.pixels is None:
        return chosen
    return chosen.between(*model.pixels)


def check_classes(source: Source, dataset: DataSet) -> None:
    """Check that a network has the classes of a data set.

    Raises:
        ConversionError: if it has not.
    """
    count = len(dataset.classes)
    if source.model.num_classes != count:
        raise ConversionError(
            f"{source.model.name} has {source.model.num_classes} classes, but {dataset.name} has {count} classes"
        )
    if source.classes not in (None, dataset.classes):
        raise ConversionError(
            f"the network's classes ({_some(source.classes)}) are not {dataset.name}'s ({_some(dataset.classes)})"
        )


def _some(names: Sequence[str] | None) -> str:
    return ", ".join((names or ())[:5]) + (", ..." if len(names or ()) > 5 else "")


def _shown(value: Any) -> str:
    return f"{value} images" if isinstance(value, int) else _some(value)


def to(device: torch.device, params: Tree) -> Tree:
    """Move a tree to a device."""
    return tree.map(lambda leaf: leaf.to(device), params)


def holds_no_progress(folder: Path) -> bool:
    """Whether a folder holds at most what a run writes before its first saved state, so a new run may start there."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if not names:
        return True
    early = {"config.json", "example.png", "events", "states"}
    ours = names <= early and "config.json" in names and '"purecnn train' in (folder / "config.json").read_text()
    return ours and states.is_empty(folder / "states")


def check_resumable(options: Options, folder: Path) -> None:
    """Check that the run in a folder was started with the same options.

    Raises:
        RunError: if it was not; the message names what differs.
    """
    before = _config(folder, "options")
    if before is None:
        return
    now = json.loads(json.dumps(asdict(options)))
    different = [name for name in now if name not in ELSEWHERE and before.get(name) != now[name]]
    if different:
        words = ", ".join(f"{name} was {before.get(name)}, now it is {now[name]}" for name in different)
        raise RunError(f"the run in {folder} was started with other options: {words}")


def check_same_data(dataset: DataSet, folder: Path) -> None:
    """Check that the run in a folder was started with the same images, since their number decides their order.

    Raises:
        RunError: if it was not; the message names what was and what is.
    """
    before, now = _config(folder, "data"), json.loads(json.dumps(_data(dataset)))
    if before is None:
        return
    different = [name for name in ("classes", "train", "test") if before.get(name) != now[name]]
    words = [f"{name} was {_shown(before.get(name))}, now it is {_shown(now[name])}" for name in different]
    if not words and (before.get("digest") or now["digest"]) != now["digest"]:
        words = ["the images, their names, order or classes have changed"]
    if words:
        raise RunError(
            f"the run in {folder} was started with other data: {'; '.join(words)}. Restore the images, or start a "
            f"new run in another folder"
        )


def _config(folder: Path, part: str) -> dict[str, Any] | None:
    """The options or data in a run's ``config.json``; None if no run was started in the folder.

    Raises:
        RunError: if the file is damaged, or missing beside saved states.
    """
    path = folder / "config.json"
    if not path.is_file():
        if states.is_empty(folder / "states"):
            return None
        raise RunError(f"{folder} has the saved state of a run, but not its options: {path} is missing")
    try:
        found = json.loads(path.read_text())[part]
    except (KeyError, TypeError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise RunError(f"{path} is damaged: it does not say the {part} that the run was started with")
    return found


class Outcome(NamedTuple):
    """How a run ended."""

    best: dict[str, Any] | None
    """The best epoch's row; None if no epoch was finished."""
    epochs: int
    """Number of finished epochs."""
    stopped: bool
    """Whether the run was asked to stop; it can then be resumed."""
    seconds: float
    """Time spent on the finished epochs."""


def train(
    options: Options,
    dataset: DataSet,
    source: Source | None,
    folder: Path,
    hooks: Hooks,
    *,
    every: float = 60.0,
    keep: int = 1,
    events: bool = False,
) -> Outcome:
    """Train, and write the run's folder; each file is written atomically as soon as its contents are known.

    If the folder has a saved state, the run continues from it. In a process group all processes train, and the first
    one writes.

    Args:
        options: the options of the run.
        dataset: the data set to train on.
        source: weights to start from. Their heads are replaced if their classes are not the data set's.
        folder: the run's folder.
        hooks: functions to call during the run.
        every: seconds after which to save the state, in addition to after each epoch.
        keep: how many saved states to keep.
        events: whether to also write the metrics for TensorBoard, into ``events/``.

    Raises:
        RunError: if the folder's run was started with other data, lacks a file, or another process trains there.
        ModuleNotFoundError: if ``events`` is set and ``tensorboard`` is not installed.
        DivergedError: if the loss becomes NaN or infinite; the folder keeps the last good state.
    """
    with ExitStack() as held:
        run = _Run(options, dataset, source, folder, hooks, every, keep, events, held)
        for index in range(run.standing.phase, len(run.phases)):
            if run.train_phase(index):
                return run.outcome(stopped=True)
        run.conclude()
        return run.outcome(stopped=False)


class _Run:
    """What the phases of a run share; a class with mutable state, because it keeps track of files."""

    def __init__(
        self,
        options: Options,
        dataset: DataSet,
        source: Source | None,
        folder: Path,
        hooks: Hooks,
        every: float,
        keep: int,
        events: bool,
        held: ExitStack,
    ) -> None:
        self.options, self.dataset, self.folder, self.hooks = options, dataset, folder, hooks
        self.every, self.keep = every, keep
        self.device = torch.device(options.device)
        init_key, self.key = random.split(random.key(options.seed))
        self.model, params, state = _start(options, dataset, source, init_key)
        if options.channels_last:
            params = tree.map(_channels_last, params)
        self.weights = to(self.device, params), to(self.device, state)
        self.prepare = preprocessing(self.model, source.preprocessing if source else None, dataset)
        self.part = distributed.rank(), distributed.world_size()
        self.test = data.batches(
            dataset.test, self.prepare.evaluation(), options.batch_size, workers=options.workers, part=self.part
        )
        self.steps = -(-len(dataset.train) // options.batch_size)
        self.phases = phases(options, params, self.steps)
        self.mix = mixing(options, len(dataset.classes))
        if self.mix is not None and self.model.loss is not None:
            raise ValueError(f"mixup and cutmix need cross-entropy, but {self.model.name} has a loss of its own")
        self.writes = distributed.rank() == 0
        self.events = _events(folder / "events") if events and self.writes else None
        self.written = time.monotonic()
        for phase in self.phases:  # impossible combinations fail here, before anything is written
            training.make_step(self.model, phase.optimizer, **self._settings(phase))
        self._check_single_pictures()
        held_before = self.writes and folder.is_dir()
        if held_before:
            _hold(folder, held)
        found = distributed.from_first(_found(folder / "states") if self.writes else None)
        if found:
            check_same_data(dataset, folder)
            self._check_fits(found)
        self.rows: list[dict[str, Any]] = list(found.rows) if found else []
        self.standing = found or Standing(0, self._begin(self.phases[0]), ())
        if found:
            template = self._begin(self.phases[found.phase]).train_state
            self.standing = states.like(found, template, self.device)
            if self.writes:
                clear(folder / "checkpoint.safetensors")  # it is written again only after a better epoch
        elif self.writes:
            folder.mkdir(parents=True, exist_ok=True)
            if not held_before:
                _hold(folder, held)
            _write_config(folder, options, self.model, dataset, self.prepare)
            with replacing(folder / "example.png") as file:
                dataset.test[0][0].save(file, format="PNG")

    def _check_fits(self, found: Standing) -> None:
        """Check that a saved state is possible in this run, and that the checkpoint of its best epoch exists."""
        if not (0 <= found.phase < len(self.phases) and 0 <= found.position.batch <= self.steps):
            raise RunError(
                f"the saved state in {self.folder / 'states'} is outside the run: phase {found.phase} of "
                f"{len(self.phases)}, batch {found.position.batch} of {self.steps}"
            )
        best = self.folder / "checkpoint.safetensors"
        if self.writes and found.rows and not best.is_file():
            raise RunError(f"the run in {self.folder} cannot be resumed: {best}, its best network, is missing")

    def _check_single_pictures(self) -> None:
        """If some step has a single image, check that the network can train on it: batch statistics may need more."""
        size, count, parts = self.options.batch_size, len(self.dataset.train), distributed.world_size()
        batches = min(size, count), count % size or size
        fewest = min(len(torch.empty(batch // parts or batch).chunk(self.options.accumulate)[-1]) for batch in batches)
        if fewest > 1 or all(phase.trainable is not None for phase in self.phases):
            return
        side = self.model.image_size
        picture = torch.empty(1, self.model.in_channels, side, side, device="meta")
        try:
            self.model.apply(*self.model.spec(), picture, train=True, key=self.key.to("meta"))
        except (RuntimeError, ValueError) as error:
            error.add_note(
                f"with {count} training images and --batch-size {size}, some step gets a single image: choose another "
                f"--batch-size"
            )
            raise

    def _settings(self, phase: Phase) -> dict[str, Any]:
        """The settings of a phase's training steps."""
        options = self.options
        whole = phase.trainable is None
        return {
            "trainable": phase.trainable,
            "policy": options.policy,
            "average": options.average,
            "label_smoothing": options.label_smoothing,
            "statistics": ("global" if options.synchronize else "batch") if whole else "running",
            "accumulate": options.accumulate,
            "remat": options.remat,
            "compile": options.compile,
        }

    def _begin(self, phase: Phase) -> training.Position:
        train_state = training.TrainState.start(
            *self.weights,
            phase.optimizer,
            trainable=phase.trainable,
            policy=self.options.policy,
            average=self.options.average is not None,
        )
        return training.Position.start(train_state)

    def train_phase(self, index: int) -> bool:
        """Train one phase, and say whether it was stopped."""
        options, phase = self.options, self.phases[index]
        position = self.standing.position if index == self.standing.phase else self._begin(phase)
        before = sum(each.epochs for each in self.phases[:index])
        total = sum(each.epochs for each in self.phases) * self.steps
        vary = self.prepare.training(self.dataset.augmentation)

        def batches(key: torch.Tensor) -> data.Batches:
            return data.batches(
                self.dataset.train,
                vary,
                options.batch_size,
                key=key,
                workers=options.workers,
                mix=self.mix,
                part=self.part,
            )

        def step_done(now: training.Position, metrics: training.Metrics) -> bool:
            done = (before + now.epoch - 1) * self.steps + now.batch
            self.hooks.on_batch(done, total)
            stop = distributed.agreed(self.hooks.stop())
            if (stop or time.monotonic() - self.written >= self.every) and math.isfinite(float(metrics.loss)):
                self.write(done, Standing(index, now, tuple(self.rows)))
            return stop

        def epoch_done(row: training.Epoch, train_state: training.TrainState) -> None:
            self.rows.append({**row._asdict(), "epoch": before + row.epoch})
            if self.writes:
                _write_metrics(self.folder / "metrics.csv", self.rows)
                if self.rows[-1] is report.best_row(self.rows):
                    self.write_best(train_state)
                if self.events is not None:
                    for name, value in row._asdict().items():
                        self.events.add_scalar(name, value, before + row.epoch)
                    self.events.flush()
            history.append(row)
            now = training.Position.start(train_state)._replace(epoch=row.epoch + 1, history=tuple(history))
            self.write((before + row.epoch) * self.steps, Standing(index, now, tuple(self.rows)))
            self.hooks.on_epoch(self.rows[-1])

        history = list(position.history)
        try:
            fitted = training.fit(
                self.model,
                phase.optimizer,
                batches,
                self.test,
                epochs=phase.epochs,
                key=random.fold_in(self.key, before),
                position=position,
                on_step=step_done,
                on_epoch=epoch_done,
                capture=options.capture,
                **self._settings(phase),
            )
        finally:
            if self.rows and self.writes:
                pictures.curves(self.rows, self.folder / "curves.png")
        self.weights = fitted.train_state.params, fitted.train_state.state
        return fitted.stopped

    def write(self, number: int, standing: Standing) -> None:
        """Save the state of the run."""
        if self.writes:
            states.save(self.folder / "states", number, standing, self.keep)
        self.written = time.monotonic()

    def write_best(self, train_state: training.TrainState) -> None:
        """Write the current network as the best one."""
        params, state = train_state.averaged
        checkpoint.save(
            self.folder / "checkpoint.safetensors",
            self.model,
            tree.map(lambda leaf: leaf.float(), params),
            state,
            preprocessing=self.prepare,
            classes=self.dataset.classes,
        )

    def conclude(self) -> None:
        """Evaluate the best network, and write the confusion matrix and the report."""
        best = checkpoint.load(self.folder / "checkpoint.safetensors")[1:] if self.writes else self.weights
        params, state = distributed.from_first(best)
        params, state = to(self.device, params), to(self.device, state)
        found = training.evaluate(self.model, params, state, self.test, policy=self.options.policy)
        if self.writes:
            pictures.confusion(found.confusion, self.dataset.classes, self.folder / "confusion.png")
            report.write(self.folder, self.model, params, state, self.dataset, self.prepare, self.rows, found)

    def outcome(self, stopped: bool) -> Outcome:
        """How it ended."""
        best = report.best_row(self.rows) if self.rows else None
        return Outcome(best, len(self.rows), stopped, sum(row["seconds"] for row in self.rows))


def _hold(folder: Path, held: ExitStack) -> None:
    """Lock a run's folder against other processes until ``held`` is closed."""
    if not held.enter_context(alone(folder)):
        raise RunError(f"another process trains in {folder}")


def _found(folder: Path) -> Standing | None:
    """Call `states.load`; an error also says what to do."""
    try:
        return states.load(folder)
    except FileError as error:
        error.add_note("remove that file to resume from the one before it, or to start again if there is none")
        raise


def _events(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ModuleNotFoundError("--tensorboard needs a package: pip install tensorboard") from None
    return SummaryWriter(str(folder))


def _channels_last(leaf: torch.Tensor) -> torch.Tensor:
    return leaf.contiguous(memory_format=torch.channels_last) if leaf.ndim == 4 else leaf


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


def _write_config(folder: Path, options: Options, model: Model, dataset: DataSet, prepare: Preprocessing) -> None:
    config = {
        "command": options.command(),
        "options": asdict(options),
        "settings": dict(model.settings),
        "preprocessing": prepare.to_dict(),
        "augmentation": asdict(dataset.augmentation),
        "data": _data(dataset),
        "versions": {
            "purecnn": purecnn.__version__,
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "python": platform.python_version(),
        },
    }
    with replacing(folder / "config.json") as file:
        file.write_text(json.dumps(config, indent=2) + "\n")


def _data(dataset: DataSet) -> dict[str, Any]:
    return {
        "name": dataset.name,
        "classes": dataset.classes,
        "train": len(dataset.train),
        "test": len(dataset.test),
        "digest": dataset.digest,
        "skipped": [str(path) for path in dataset.skipped],
    }


def _write_metrics(path: Path, rows: list[dict[str, Any]]) -> None:
    with replacing(path) as file, file.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, rows[0])
        writer.writeheader()
        writer.writerows(rows)
