"""The command line: ``purecnn list | inspect | train | evaluate | predict | convert | verify | recipe``.

It stands on top of both packages and is the one place that looks at the world: arguments, files and screen.
Exit codes: 0 done, 1 failed, 2 misused.
"""

import ctypes
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

# Threads that spin while they wait slow small networks tenfold where other programs want the cores too. OpenMP
# looks at this as torch loads, so it comes first.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import purecnn
from converters import checkpoint, files, recipes, run, sources
from converters import torchvision as tv
from converters.rules import ConversionError
from converters.screen import notes, print_json, screen, table
from converters.verify import CHECKS
from converters.verify import verify as verify_model
from purecnn import data, pictures
from purecnn.data import DataError
from purecnn.model import UnknownModelError
from purecnn.summary import summarize
from purecnn.training import DivergedError
from purecnn.training import evaluate as evaluate_batches

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="The whole evolution of CNN architectures, as pure functions.",
)
app.add_typer(recipes.commands(), name="recipe")
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="A name of `purecnn list`.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Data = Annotated[
    str, typer.Option("--data", help=f"{', '.join(data.names())}, or a folder with train/ and val/ and class folders.")
]
Root = Annotated[Path | None, typer.Option(help="Where data sets are downloaded to.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out files that are no pictures.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that read pictures.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...; by default a GPU if there is one.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Pictures in a batch.")]


def create(name: str, **settings: Any) -> purecnn.Model:
    """As `purecnn.create`; an unknown name is misuse of the command line."""
    try:
        return purecnn.create(name, **settings)
    except UnknownModelError as error:
        raise typer.BadParameter(str(error), param_hint="MODEL") from None


def load_data(name: str, root: Path | None, skip_bad: bool) -> data.DataSet:
    """As `purecnn.data.load`; an unknown name is misuse of the command line."""
    try:
        return data.load(name, root=root, skip_bad=skip_bad)
    except DataError as error:
        if name in data.names() or Path(name).expanduser().is_dir():
            raise
        raise typer.BadParameter(str(error), param_hint="--data") from None


def existing(path: Path) -> Path:
    """A file that should be there; a wrong name is misuse of the command line."""
    if not path.is_file():
        raise typer.BadParameter(f"{path} does not exist", param_hint="FILE")
    return path


def load_source(source: str, name: str | None) -> sources.Source:
    """As `converters.sources.load`, with names checked as arguments."""
    if name is not None:
        create(name)
    if Path(source).suffix:
        existing(Path(source))
    return sources.load(source, name)


def pick_device(name: str) -> torch.device:
    """The device of that name."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(str(error).partition("\n")[0], param_hint="--device") from None


@app.command("list")
def list_command(
    pattern: Annotated[str, typer.Argument(help="A shell-style pattern, such as 'resnet*'.")] = "*",
    as_json: AsJson = False,
) -> None:
    """List the architectures, in the order of their history."""
    names = purecnn.list_models(pattern)
    if not names:
        raise typer.BadParameter(f"no model matches {pattern!r}", param_hint="PATTERN")
    rows: list[dict[str, Any]] = []
    with Progress(console=notes, disable=not notes.is_terminal, transient=True) as progress:
        for name in progress.track(names, description="counting"):
            model = purecnn.create(name)
            whole = summarize(model)[0]
            rows.append(
                {
                    "name": name,
                    "year": model.paper.year,
                    "parameters": whole.parameters,
                    "macs": whole.macs,
                    "image_size": model.image_size,
                    "paper": model.paper.title,
                    "reference": model.paper.reference,
                    "weights": {entry.name: tv.accuracies(entry) for entry in tv.weights_entries(model)},
                }
            )
    if as_json:
        print_json(rows)
        return
    result = table("name", "year>", "parameters>", "GMACs>", "paper", "weights, ImageNet top-1 %")
    for row in rows:
        result.add_row(
            row["name"],
            str(row["year"]),
            f"{row['parameters']:,}",
            f"{row['macs'] / 1e9:.3f}",
            row["reference"],
            ", ".join(_scored(name, scores) for name, scores in row["weights"].items()),
        )
    screen.print(result)


def _scored(name: str, scores: dict[str, float]) -> str:
    short = name.removeprefix("IMAGENET1K_")
    return f"{short} {scores['acc@1']:.1f}" if scores else short


@app.command()
def inspect(
    model: ModelName,
    depth: Annotated[int, typer.Option(min=1, help="Levels of names to show.")] = 2,
    classes: Annotated[int | None, typer.Option(min=1, help="Number of classes.")] = None,
    channels: Annotated[int | None, typer.Option(min=1, help="Channels of the images.")] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Side of the images, pixels.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show a network's tree: output shapes, parameters and multiplications of every stage."""
    settings = {} if classes is None else {"num_classes": classes}
    network = create(model, in_channels=channels, image_size=image_size, **settings)
    whole, *rows = summarize(network)
    if as_json:
        fields = ("path", "output", "parameters", "macs")
        print_json([{field: getattr(row, field) for field in fields} for row in (whole, *rows)])
        return
    paper = network.paper
    screen.print(f"[bold]{model}[/bold]  {paper.authors}, {paper.year}: {paper.title} ({paper.reference})")
    result = table("layer", "output>", "parameters>", "MMACs>")
    shown = [row for row in _parents_first(rows) if row.path.count(".") < depth and (row.parameters or row.macs)]
    for row in (*shown, whole):
        level = row.path.count(".")
        result.add_row(
            "  " * level + row.path.rpartition(".")[2] if row.path else "all",
            " x ".join(map(str, row.output)),
            f"{row.parameters:,}",
            f"{row.macs / 1e6:,.1f}",
            style="bold" if not level else None,
        )
    screen.print(result)


def _parents_first(rows: list[Any]) -> list[Any]:
    """`summarize` lists layers as they end, children before parents; here each parent goes first."""
    result: list[Any] = []
    for row in rows:
        children = next((i for i, other in enumerate(result) if other.path.startswith(f"{row.path}.")), len(result))
        result.insert(children, row)
    return result


@app.command()
def train(
    model: ModelName,
    data_name: Data = "digits",
    source: Annotated[
        str | None,
        typer.Option("--from", help="Weights to begin with: a checkpoint, a file in torchvision's names, or DEFAULT."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; by default a new one in runs/.")] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Times through the data; by default 30, with --from 10.")
    ] = None,
    batch_size: BatchSize = 32,
    optimizer: Annotated[run.OptimizerName, typer.Option(help="Update rule.")] = run.OptimizerName.adamw,
    learning_rate: Annotated[
        float | None,
        typer.Option("--learning-rate", "--lr", min=0, help="At its peak; by default 0.002, with --from 0.00005."),
    ] = None,
    schedule: Annotated[run.ScheduleName, typer.Option(help="Course of the learning rate.")] = run.ScheduleName.cosine,
    momentum: Annotated[float, typer.Option(min=0, max=1, help="Of sgd.")] = 0.9,
    weight_decay: Annotated[float, typer.Option(min=0, help="Not applied to biases and normalisation.")] = 1e-4,
    label_smoothing: Annotated[float, typer.Option(min=0, max=1, help="0.1 is usual for ImageNet.")] = 0.0,
    head_epochs: Annotated[
        int | None,
        typer.Option(min=0, help="First epochs, that train the head alone; by default a third of all with --from."),
    ] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Side of the images, pixels.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of all that is random.")] = 0,
    root: Root = None,
    skip_bad: SkipBad = False,
    workers: Workers = 0,
    device: Device = "auto",
    compile: Annotated[bool | None, typer.Option("--compile/--no-compile", help="By default on a GPU.")] = None,
    as_json: AsJson = False,
) -> None:
    """Train a network, from scratch or from weights; the run leaves a folder with all that it found."""
    if epochs is None:
        epochs = 30 if source is None else 10
    options = run.Options(
        model=model,
        data=data_name,
        source=source,
        epochs=epochs,
        batch_size=batch_size,
        optimizer=optimizer,
        learning_rate=learning_rate if learning_rate is not None else (2e-3 if source is None else 5e-5),
        schedule=schedule,
        momentum=momentum,
        weight_decay=weight_decay,
        label_smoothing=label_smoothing,
        head_epochs=head_epochs if head_epochs is not None else (0 if source is None else -(-epochs // 3)),
        image_size=image_size,
        seed=seed,
        root=None if root is None else str(root),
        skip_bad=skip_bad,
        workers=workers,
        device=str(pick_device(device)),
        compile=compile,
    )
    if out is not None and out.is_dir() and any(out.iterdir()):
        raise typer.BadParameter(f"{out} is not empty: nothing is overwritten", param_hint="--out")
    create(model)
    dataset = load_data(data_name, root, skip_bad)
    weights = None if source is None else load_source(source, model)
    folder = out or run.new_folder(options)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[last]}"),
        console=notes,
        disable=not notes.is_terminal,
    ) as progress:
        task = progress.add_task("training", total=None, last="")
        result = run.train(
            options,
            dataset,
            weights,
            folder,
            on_batch=lambda done, total: progress.update(task, completed=done, total=total),
            on_epoch=lambda row: (
                progress.update(task, last=f"accuracy {row['test_accuracy']:.2%}")
                if notes.is_terminal
                else notes.print(_line(row))
            ),
        )
    if as_json:
        print_json({"folder": str(folder), **result})
        return
    screen.print(
        f"{model} on {data_name}: test accuracy {result['test_accuracy']:.2%} after epoch {result['epoch']}, "
        f"the best of {result['epochs']}; {result['seconds']:.0f} s of training"
    )
    screen.print(f"everything is in {folder}{'/' if not str(folder).endswith('/') else ''}")
    if result["skipped"]:
        screen.print(f"{result['skipped']} files were no pictures and left out; config.json names them")


def _line(row: dict[str, Any]) -> str:
    return (
        f"epoch {row['epoch']}: train loss {row['train_loss']:.4f}, accuracy {row['train_accuracy']:.2%}; "
        f"test loss {row['test_loss']:.4f}, accuracy {row['test_accuracy']:.2%}"
    )


@app.command()
def evaluate(
    source: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint, or weights with --model.")],
    data_name: Data = "digits",
    model: Annotated[str | None, typer.Option("--model", help="Of weights that do not say it themselves.")] = None,
    batch_size: BatchSize = 64,
    root: Root = None,
    skip_bad: SkipBad = False,
    workers: Workers = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Evaluate a network on the held-out half of a data set."""
    where = pick_device(device)
    dataset = load_data(data_name, root, skip_bad)
    found = load_source(source, model)
    run.check_classes(found, dataset)
    transform = run.preprocessing(found.model, found.preprocessing, dataset).evaluation()
    batches = data.batches(dataset.test, transform, batch_size, workers=workers)
    params, state = run.to(where, found.params), run.to(where, found.state)
    with Progress(console=notes, disable=not notes.is_terminal, transient=True) as progress:
        result = evaluate_batches(found.model, params, state, progress.track(batches, description="evaluating"))
    per_class = dict(zip(dataset.classes, result.class_accuracy.tolist(), strict=True))
    if as_json:
        print_json(
            {
                "model": found.model.name,
                "data": data_name,
                "images": len(dataset.test),
                "accuracy": float(result.accuracy),
                "loss": float(result.loss),
                "per_class": per_class,
                "confusion": result.confusion.tolist(),
            }
        )
        return
    shown = table("class", "accuracy>")
    for name, accuracy in per_class.items():
        shown.add_row(name, f"{accuracy:.2%}")
    screen.print(shown)
    screen.print(f"{found.model.name} on {data_name}: accuracy {result.accuracy:.2%}, loss {result.loss:.4f}")


@app.command()
def predict(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Pictures.")],
    source: Annotated[
        str, typer.Option("--from", help="A checkpoint, a file in torchvision's names, or DEFAULT (with --model).")
    ] = "DEFAULT",
    model: Annotated[str | None, typer.Option("--model", help="Of weights that do not say it themselves.")] = None,
    top: Annotated[int, typer.Option(min=1, help="How many answers.")] = 5,
    out: Annotated[Path, typer.Option(help="Folder for the pictures with the answers on them.")] = Path("predictions"),
    as_json: AsJson = False,
) -> None:
    """Say what is in pictures, and draw the answers beside them."""
    for path in images:
        existing(path)
    found = load_source(source, model)
    if found.preprocessing is None:
        raise ConversionError(f"{source} does not say how its images are prepared; train or convert it first")
    classes = found.classes or tuple(f"class {i}" for i in range(found.model.num_classes))
    transform = found.preprocessing.evaluation()
    pictured = [(path, data.read_image(path)) for path in images]
    results: list[dict[str, Any]] = []
    for path, image in pictured:
        with torch.no_grad():
            logits, _ = found.model.apply(found.params, found.state, transform(image)[None])
        best = logits[0].softmax(0).topk(min(top, len(classes)))
        answers = [(classes[i], p) for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
        target = out / f"{path.stem}-prediction.png"
        pictures.prediction(image, answers, target)
        results.append(
            {
                "image": str(path),
                "answers": [{"class": name, "probability": probability} for name, probability in answers],
                "picture": str(target),
            }
        )
    if as_json:
        print_json(results)
        return
    for result in results:
        screen.print(f"{result['image']}, drawn in {result['picture']}", soft_wrap=True)
        shown = table("class", "probability>")
        for answer in result["answers"]:
            shown.add_row(answer["class"], f"{answer['probability']:.2%}")
        screen.print(shown)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A checkpoint, a file in torchvision's names, or DEFAULT.")],
    target: Annotated[Path, typer.Argument(help="The file to write: .safetensors, or .pth with --to torchvision.")],
    model: Annotated[str | None, typer.Option("--model", help="Of weights that do not say it themselves.")] = None,
    to: Annotated[run.FormatName, typer.Option(help="Whose names the file has.")] = run.FormatName.purecnn,
) -> None:
    """Convert torchvision's weights to a checkpoint, or a checkpoint to torchvision's state_dict."""
    if target.exists():
        raise typer.BadParameter(f"{target} exists: nothing is overwritten", param_hint="TARGET")
    found = load_source(source, model)
    if to is run.FormatName.purecnn:
        checkpoint.save(
            target,
            found.model,
            found.params,
            found.state,
            preprocessing=found.preprocessing,
            classes=found.classes,
            origin=found.origin,
        )
    else:
        files.write(target, tv.to_state_dict(found.model, found.params, found.state))
    screen.print(f"{found.model.name}: {purecnn.tree.size(found.params):,} parameters written to {target}")


@app.command()
def verify(
    models: Annotated[list[str] | None, typer.Argument(metavar="[MODEL...]", help="Names or patterns.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All that torchvision has too.")] = False,
    image_size: Annotated[int, typer.Option(min=64, help="Side of the random images, pixels.")] = 96,
    as_json: AsJson = False,
) -> None:
    """Prove that models equal torchvision's bit for bit, and that weights go both ways unchanged."""
    if bool(models) == everything:
        raise typer.BadParameter("name models, or say --all", param_hint="MODEL")
    known = [name for name in purecnn.list_models() if tv.has(purecnn.create(name))]
    names = known if everything else [name for pattern in models or [] for name in _matching(pattern)]
    words = {True: "equal", False: "[red]differs[/red]", None: "-"}
    reports = []
    with Progress(console=notes, disable=not notes.is_terminal, transient=True) as progress:
        for name in progress.track(names, description="verifying"):
            reports.append(verify_model(name, image_size=image_size))
    if as_json:
        print_json([report.to_dict() for report in reports])
    else:
        shown = table("model", *(check.replace("_", " ") for check in CHECKS), "")
        for report in reports:
            found = [words[getattr(report, check)] for check in CHECKS]
            shown.add_row(report.model, *found, "equal" if report.equal else "[red]DIFFERS[/red]")
        screen.print(shown)
        equal = sum(report.equal for report in reports)
        screen.print(f"{equal} of {len(reports)} models equal torchvision's bit for bit")
        if any(report.model.startswith("efficientnet") for report in reports):
            screen.print(
                "gradients are torch.autograd's; under torch.func.grad torch itself differentiates SiLU by another "
                "formula, and EfficientNet's differ in the last digits"
            )
    if not all(report.equal for report in reports):
        raise typer.Exit(1)


def _matching(pattern: str) -> list[str]:
    return purecnn.list_models(pattern) or [create(pattern).name]


def keep_memory() -> None:
    """Have the C library keep freed memory: to get it from the system again costs a network a quarter of its time.

    glibc alone has this; elsewhere nothing happens.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            mallopt(parameter, 1 << 30)


def main() -> None:
    """The ``purecnn`` command."""
    keep_memory()
    try:
        app()
    except (ConversionError, DataError, DivergedError, files.FileError, OSError, RuntimeError, ValueError) as error:
        # One paragraph; where in the network it happened is in the notes.
        words = [str(error), *getattr(error, "__notes__", [])]
        notes.print(f"[red]error:[/red] {'; '.join(words)}", soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
