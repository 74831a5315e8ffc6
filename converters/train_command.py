"""The command ``purecnn train``: from the command line to `converters.options.Options`, and the run's progress."""

import math
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from converters import run
from converters.arguments import (
    AsJson,
    BatchSize,
    Data,
    Device,
    ModelName,
    Out,
    Resume,
    Root,
    Seed,
    SkipBad,
    Workers,
    create,
    load_data,
    load_source,
    pick_device,
    writable,
)
from converters.options import OptimizerName, Options, PrecisionName, ScheduleName
from converters.screen import notes, print_json, screen
from purecnn import distributed

# typer's bounds are inclusive; these are exclusive.


def _positive(value: float | None) -> float | None:
    if value is not None and not 0 < value < math.inf:
        raise typer.BadParameter(f"{value} should be greater than 0")
    return value


def _share(value: float | None) -> float | None:
    if value is not None and not 0 < value < 1:
        raise typer.BadParameter(f"{value} should be between 0 and 1")
    return value


def _below_one(value: float) -> float:
    if not value < 1:
        raise typer.BadParameter(f"{value} should be less than 1")
    return value


def train(
    model: ModelName,
    data_name: Data = "digits",
    like: Annotated[
        str | None,
        typer.Option(help="Preprocess and augment a folder's images as cifar10, mnist ...; by default as photographs."),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--from", help="Weights to start from: a checkpoint, a file in torchvision's names, DEFAULT, or timm:NAME."
        ),
    ] = None,
    out: Out = None,
    resume: Resume = False,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Number of epochs; by default 10, or 30 without --from.")
    ] = None,
    batch_size: BatchSize = 32,
    optimizer: Annotated[OptimizerName, typer.Option(help="Optimizer.")] = OptimizerName.adamw,
    learning_rate: Annotated[
        float | None,
        typer.Option("--learning-rate", "--lr", min=0, help="Peak value; by default 0.002, with --from 0.00005."),
    ] = None,
    schedule: Annotated[ScheduleName, typer.Option(help="Learning-rate schedule.")] = ScheduleName.cosine,
    warmup: Annotated[int, typer.Option(min=0, help="Number of first epochs with a rising learning rate.")] = 0,
    momentum: Annotated[
        float, typer.Option(min=0, callback=_below_one, help="For sgd, rmsprop, lars and muon; less than 1.")
    ] = 0.9,
    weight_decay: Annotated[float, typer.Option(min=0, help="Not applied to biases and normalisation.")] = 1e-4,
    clip: Annotated[
        float | None, typer.Option(callback=_positive, help="Maximum gradient norm; larger gradients are scaled down.")
    ] = None,
    label_smoothing: Annotated[
        float, typer.Option(min=0, callback=_below_one, help="Less than 1; 0.1 is usual for ImageNet.")
    ] = 0.0,
    mixup: Annotated[
        float | None, typer.Option(callback=_positive, help="Mix images; alpha of the beta distribution.")
    ] = None,
    cutmix: Annotated[
        float | None, typer.Option(callback=_positive, help="Paste parts of images into others; alpha as for --mixup.")
    ] = None,
    average: Annotated[
        float | None,
        typer.Option(callback=_share, help="Decay of a moving average of the weights, which is evaluated; e.g. 0.999."),
    ] = None,
    head_epochs: Annotated[
        int | None,
        typer.Option(min=0, help="First epochs, which train only the head; by default a third of all with --from."),
    ] = None,
    stage_epochs: Annotated[
        int, typer.Option(min=0, help="Then unfreeze one more stage every so many epochs, the last stage first.")
    ] = 0,
    stage_decay: Annotated[
        float, typer.Option(min=0, max=1, help="Each stage's learning rate as a fraction of the next stage's.")
    ] = 1.0,
    accumulate: Annotated[int, typer.Option(min=1, help="Number of parts that a batch is processed in.")] = 1,
    precision: Annotated[PrecisionName, typer.Option(help="Dtype to compute in.")] = PrecisionName.float32,
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="Use PyTorch's channels_last memory format.")
    ] = False,
    remat: Annotated[
        bool, typer.Option("--remat", help="Save memory: recompute the insides of blocks in the backward pass.")
    ] = False,
    image_size: Annotated[int | None, typer.Option(min=1, help="Height and width of the images in pixels.")] = None,
    seed: Seed = 0,
    root: Root = None,
    skip_bad: SkipBad = False,
    workers: Workers = 0,
    device: Device = "auto",
    compile: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Use torch.compile; by default on a GPU.")
    ] = None,
    capture: Annotated[bool, typer.Option("--capture", help="On a GPU: run the step as one CUDA graph.")] = False,
    synchronize: Annotated[
        bool, typer.Option("--synchronize", help="Batch normalisation over all processes of torchrun.")
    ] = False,
    checkpoint_every: Annotated[
        float, typer.Option(min=0, help="Seconds between saved states; one is also saved after each epoch.")
    ] = 60.0,
    keep: Annotated[int, typer.Option(min=1, help="Number of saved states to keep.")] = 1,
    events: Annotated[bool, typer.Option("--tensorboard", help="Also write events for TensorBoard.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train a network, from scratch or from weights; all results are written to the run's folder.

    Under torchrun all processes train together: torchrun --nproc-per-node 2 -m converters.cli train ... --out FOLDER
    --resume. On SIGINT or SIGTERM a run saves its state and stops; --resume continues it bit for bit.
    """
    if epochs is None:
        epochs = 30 if source is None else 10
    with process_group(device) as where:
        options = Options(
            model=model,
            data=data_name,
            like=like,
            source=source,
            epochs=epochs,
            batch_size=batch_size,
            optimizer=optimizer,
            learning_rate=learning_rate if learning_rate is not None else (2e-3 if source is None else 5e-5),
            schedule=schedule,
            warmup=warmup,
            momentum=momentum,
            weight_decay=weight_decay,
            clip=clip,
            label_smoothing=label_smoothing,
            mixup=mixup,
            cutmix=cutmix,
            average=average,
            head_epochs=head_epochs if head_epochs is not None else (0 if source is None else -(-epochs // 3)),
            stage_epochs=stage_epochs,
            stage_decay=stage_decay,
            accumulate=accumulate,
            precision=precision,
            channels_last=channels_last,
            remat=remat,
            image_size=image_size,
            seed=seed,
            root=None if root is None else str(root),
            skip_bad=skip_bad,
            workers=workers,
            device=str(where),
            compile=compile,
            capture=capture,
            synchronize=synchronize,
        )
        folder = _run_folder(options, out, resume)
        create(model)
        dataset = load_data(data_name, root, skip_bad, like)
        weights = None if source is None else load_source(source, model)
        speaks = notes.is_terminal and distributed.rank() == 0
        with (
            Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[last]}"),
                console=notes,
                disable=not speaks,
            ) as progress,
            asked_to_stop() as stop,
        ):
            task = progress.add_task("training", total=None, last="")

            def on_epoch(row: dict[str, Any]) -> None:
                if speaks:
                    progress.update(task, last=f"accuracy {row['test_accuracy']:.2%}")
                elif distributed.rank() == 0:
                    notes.print(_line(row))

            hooks = run.Hooks(
                lambda done, total: progress.update(task, completed=done, total=total), on_epoch, lambda: bool(stop)
            )
            result = run.train(
                options, dataset, weights, folder, hooks, every=checkpoint_every, keep=keep, events=events
            )
        if distributed.rank() == 0:
            _tell(result, options, folder, len(dataset.skipped), as_json)
    if result.stopped:
        raise typer.Exit(128 + (stop[0] if stop else signal.SIGTERM))


def _run_folder(options: Options, out: Path | None, resume: bool) -> Path:
    """The folder of the run; nothing in it is overwritten."""
    if out is None:
        if resume or distributed.world_size() > 1:
            raise typer.BadParameter("--resume, and a run of several processes, need --out FOLDER", param_hint="--out")
        out = run.new_folder(options)
        writable(out)
        return out
    if run.holds_no_progress(out):
        return out
    if resume:
        run.check_resumable(options, out)
    else:
        raise typer.BadParameter(
            f"{out} is not empty, and nothing is overwritten: add --resume to continue the run in it, or choose "
            "another folder",
            param_hint="--out",
        )
    return out


@contextmanager
def process_group(device: str) -> Iterator[torch.device]:
    """Join torchrun's process group, if there is one; yields the device to work on."""
    where = pick_device(device)
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield where
        return
    if where.type == "cuda":
        where = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(where)
    store, rank, size = next(rendezvous("env://"))
    # The store, with the addresses of processes that are gone, survives a restart: each attempt uses its own keys.
    own = PrefixStore(f"attempt{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    backend = "nccl" if where.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=own, rank=rank, world_size=size)
    try:
        yield where
    finally:
        torch.distributed.destroy_process_group()


@contextmanager
def asked_to_stop() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list instead of stopping the program; a second signal stops it."""
    found: list[int] = []

    def note(number: int, frame: Any) -> None:
        if found:
            raise KeyboardInterrupt
        found.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tell(result: run.Outcome, options: Options, folder: Path, skipped: int, as_json: bool) -> None:
    """Print the result of a run."""
    best = result.best
    if as_json:
        facts = {"folder": str(folder), "stopped": result.stopped, "seconds": result.seconds, "skipped": skipped}
        print_json({**(best or {}), "epochs": options.epochs, **facts})
        return
    if best is not None:
        screen.print(
            f"{options.model} on {options.data}: test accuracy {best['test_accuracy']:.2%} after epoch "
            f"{best['epoch']}, the best of {result.epochs}; {result.seconds:.0f} s of training"
        )
    if result.stopped:
        screen.print(f"stopped; the same command with --out {folder} --resume continues bit for bit")
    screen.print(f"everything is in {folder}{'/' if not str(folder).endswith('/') else ''}")
    if skipped:
        screen.print(f"{skipped} files were not images and were left out; config.json names them")


def _line(row: dict[str, Any]) -> str:
    return (
        f"epoch {row['epoch']}: train loss {row['train_loss']:.4f}, accuracy {row['train_accuracy']:.2%}; "
        f"test loss {row['test_loss']:.4f}, accuracy {row['test_accuracy']:.2%}"
    )
