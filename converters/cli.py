"""The command line: ``purecnn list | inspect | train | evaluate | predict | convert | export | verify |
explain | recipe``.

It is built on both packages; arguments, files and the screen are handled here and in the modules that it uses.
Exit codes: 0 success, 1 failure, 2 misuse of the command line.
"""

import ctypes
import gc
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from enum import StrEnum
from itertools import chain, count
from pathlib import Path
from typing import Annotated, Any

# By default OpenMP's threads spin while they wait, which slows small networks tenfold where other programs use the same
# cores. OpenMP reads this variable when torch is imported, so it is set before.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import typer
from rich.progress import Progress
from rich.text import Text

import purecnn
from converters import checkpoint, explaining, files, pytorchcv, recipes, run, timm
from converters import torchvision as tv
from converters.arguments import (
    AsJson,
    BatchSize,
    Data,
    Device,
    ModelName,
    Root,
    SkipBad,
    Workers,
    create,
    load_data,
    load_source,
    pick_device,
    pictures_of,
    writable,
)
from converters.export_command import export_command
from converters.rules import ConversionError
from converters.screen import notes, print_json, screen, table
from converters.train_command import train
from converters.verify import CHECKS
from converters.verify import verify as verify_model
from purecnn import data, pictures
from purecnn.model import find
from purecnn.paper import Group, Published
from purecnn.summary import summarize
from purecnn.training import evaluate as evaluate_batches

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="CNN architectures from the whole history of the field, as pure functions.",
)
app.command()(train)
app.command("export")(export_command)
app.add_typer(recipes.commands(), name="recipe")


@app.command("list")
def list_command(
    pattern: Annotated[str, typer.Argument(help="A shell-style pattern, such as 'resnet*'.")] = "*",
    by_year: Annotated[bool, typer.Option("--timeline", help="By year and group, with published results.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the architectures, in the order of their history."""
    names = purecnn.list_models(pattern)
    if not names:
        raise typer.BadParameter(f"no model matches {pattern!r}", param_hint="PATTERN")
    if by_year:
        _list_timeline(names, as_json)
        return
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
                    "elsewhere": {library: names[name] for library, names in ELSEWHERE.items() if name in names},
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
            ", ".join([*(_scored(name, scores) for name, scores in row["weights"].items()), *row["elsewhere"]]),
        )
    screen.print(result)


ELSEWHERE = {"timm": timm.NAMES, "pytorchcv": pytorchcv.NAMES}
"""Other libraries that publish weights, and their names for them."""


def _scored(name: str, scores: dict[str, float]) -> str:
    short = name.removeprefix("IMAGENET1K_")
    return f"{short} {scores['acc@1']:.1f}" if scores else short


def timeline(names: Iterable[str]) -> list[dict[str, Any]]:
    """A row for each model, sorted by year and then by its first group: its paper, its size and its published result.

    The published result is the one recorded in the zoo; if there is none, that of torchvision's weights.
    """
    rows: list[dict[str, Any]] = []
    for name in names:
        model, published = purecnn.create(name), find(name).published
        weights = {entry.name: tv.accuracies(entry) for entry in tv.weights_entries(model)}
        measured = [
            Published(s["acc@1"], "top-1 accuracy", "ImageNet", f"torchvision, {w}") for w, s in weights.items() if s
        ]
        result = published or (measured[0] if measured else None)
        rows.append(
            {
                "year": model.paper.year,
                "groups": list(model.paper.groups),
                "in_survey": model.paper.in_survey,
                "name": name,
                "parameters": purecnn.tree.size(model.spec()[0]),
                "published": asdict(result) if result else None,
                "paper": model.paper.title,
                "reference": model.paper.reference,
                "weights": weights,
            }
        )
    order = list(Group)
    return sorted(rows, key=lambda row: (row["year"], [order.index(group) for group in row["groups"][:1]]))


def _list_timeline(names: list[str], as_json: bool) -> None:
    with Progress(console=notes, disable=not notes.is_terminal, transient=True) as progress:
        rows = timeline(progress.track(names, description="counting"))
    if as_json:
        print_json(rows)
        return
    result = table("year>", "groups", "name", "parameters>", "published, %", "on", "source")
    for column in (result.columns[1], result.columns[-1]):  # the long ones
        column.no_wrap = False
    for row in rows:
        name = row["name"] if row["in_survey"] else f"{row['name']} *"
        cells = [str(row["year"]), ", ".join(row["groups"]), name, f"{row['parameters']:,}"]
        if (best := row["published"]) is not None:
            cells += [f"{best['value']} {best['metric']}", best["data"], best["source"]]
        result.add_row(*cells)
    screen.print(result)
    screen.print("* not in the survey that defines the groups, arXiv:1901.06032", soft_wrap=True)


@app.command()
def inspect(
    model: ModelName,
    depth: Annotated[int, typer.Option(min=1, help="Number of name levels to show.")] = 2,
    classes: Annotated[int | None, typer.Option(min=1, help="Number of classes.")] = None,
    channels: Annotated[int | None, typer.Option(min=1, help="Channels of the images.")] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Height and width of the images in pixels.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show a network's tree: output shape, parameters and multiplications of every stage and layer."""
    settings = {} if classes is None else {"num_classes": classes}
    network = create(model, in_channels=channels, image_size=image_size, **settings)
    whole, *rows = summarize(network)
    if as_json:
        fields = ("path", "output", "parameters", "macs")
        print_json([{field: getattr(row, field) for field in fields} for row in (whole, *rows)])
        return
    paper = network.paper
    screen.print(model, style="bold", end="")
    screen.print(f"  {paper.authors}, {paper.year}: {paper.title} ({paper.reference})")
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
    """Put each parent before its children; `summarize` lists layers as they finish, children first."""
    result: list[Any] = []
    for row in rows:
        children = next((i for i, other in enumerate(result) if other.path.startswith(f"{row.path}.")), len(result))
        result.insert(children, row)
    return result


@app.command()
def evaluate(
    source: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint or a run's folder; other weights with --model.")
    ],
    data_name: Data = "digits",
    model: Annotated[
        str | None, typer.Option("--model", help="Name of the model, if the weights do not say it.")
    ] = None,
    batch_size: BatchSize = 64,
    root: Root = None,
    skip_bad: SkipBad = False,
    workers: Workers = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Evaluate a network on the test split of a data set."""
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
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Images, or folders of images.")],
    source: Annotated[
        str,
        typer.Option("--from", help="A checkpoint; with --model a file in torchvision's names, DEFAULT, or timm:NAME."),
    ] = "DEFAULT",
    model: Annotated[
        str | None, typer.Option("--model", help="Name of the model, if the weights do not say it.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Number of classes to show, most probable first.")] = 5,
    out: Annotated[
        Path, typer.Option(callback=writable, help="Folder for the images with the answers drawn beside them.")
    ] = Path("predictions"),
    as_json: AsJson = False,
) -> None:
    """Classify images, and draw the answers beside them."""
    images = pictures_of(images)
    found = load_source(source, model)
    if found.preprocessing is None:
        raise ConversionError(
            f"{source} has no preprocessing, so it does not say how its images are prepared; use a checkpoint that has "
            "it, such as that of a training run"
        )
    classes = found.classes or tuple(f"class {i}" for i in range(found.model.num_classes))
    transform = found.preprocessing.evaluation()
    targets = [out / f"{name}-prediction.png" for name in _unique(path.stem for path in images)]
    _keep(targets, images)
    pictured = [(path, data.read_image(path)) for path in images]
    results: list[dict[str, Any]] = []
    for (path, image), target in zip(pictured, targets, strict=True):
        with torch.no_grad():
            logits, _ = found.model.apply(found.params, found.state, transform(image)[None])
        if not logits.isfinite().all():
            raise ConversionError(f"{found.model.name}'s logits are not finite for {path}: check the weights")
        best = found.model.probabilities(logits)[0].topk(min(top, len(classes)))
        answers = [(classes[i], p) for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
        pictures.prediction(image, answers, target)
        results.append(
            {
                "image": str(path),
                "answers": [{"class": answer, "probability": probability} for answer, probability in answers],
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


def _keep(targets: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Check that no input would be overwritten."""
    read = {path.resolve() for path in inputs}
    for target in targets:
        if target.resolve() in read:
            raise typer.BadParameter(f"{target} is an input and would be overwritten", param_hint="--out")


def _unique(stems: Iterable[str]) -> list[str]:
    """Make names unique, since images in different folders may share one: ``x``, ``x-2``, ``x-3``, in order."""
    names: list[str] = []
    for stem in stems:
        choices = chain([stem], (f"{stem}-{i}" for i in count(2)))
        names.append(next(name for name in choices if name not in names))
    return names


class FormatName(StrEnum):
    """The library whose names a file of weights uses."""

    purecnn = "purecnn"
    torchvision = "torchvision"


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A checkpoint, a file in torchvision's names, DEFAULT, or timm:NAME.")],
    target: Annotated[Path, typer.Argument(help="The file to write: .safetensors, or .pth with --to torchvision.")],
    model: Annotated[
        str | None, typer.Option("--model", help="Name of the model, if the weights do not say it.")
    ] = None,
    entry: Annotated[
        str | None, typer.Option(help="Which state_dict to take from a file with several, such as model_ema.")
    ] = None,
    to: Annotated[FormatName, typer.Option(help="Format to write.")] = FormatName.purecnn,
) -> None:
    """Convert torchvision's weights to a checkpoint, or a checkpoint to torchvision's state_dict."""
    if target.exists():
        raise typer.BadParameter(f"{target} exists and is not overwritten: choose another name", param_hint="TARGET")
    if to is FormatName.purecnn and target.suffix != ".safetensors":
        raise typer.BadParameter(
            f"a checkpoint's name ends in .safetensors; to write a state_dict to {target}, add --to torchvision",
            param_hint="TARGET",
        )
    writable(target.parent)
    found = load_source(source, model, entry, as_stored=True)
    if to is FormatName.purecnn:
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
    everything: Annotated[bool, typer.Option("--all", help="Every model that torchvision has too.")] = False,
    image_size: Annotated[int, typer.Option(min=64, help="Height and width of the random images in pixels.")] = 96,
    as_json: AsJson = False,
) -> None:
    """Check that models equal torchvision's bit for bit, and that weights survive conversion both ways unchanged."""
    if bool(models) == everything:
        raise typer.BadParameter("give either model names or --all", param_hint="MODEL")
    known = [name for name in purecnn.list_models() if tv.has(purecnn.create(name))]
    names = known if everything else [name for pattern in models or [] for name in _matching(pattern)]
    words: dict[Any, str | Text] = {True: "equal", False: Text("differs", "red"), None: "-"}
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
            shown.add_row(report.model, *found, "equal" if report.equal else Text("DIFFERS", "red"))
        screen.print(shown)
        equal = sum(report.equal for report in reports)
        screen.print(f"{equal} of {len(reports)} models equal torchvision's bit for bit")
        if any(report.model.startswith("efficientnet") for report in reports):
            screen.print(
                "gradients were compared under torch.autograd; under torch.func.grad PyTorch differentiates SiLU by "
                "another formula, so EfficientNet's gradients differ in the last digits"
            )
    if not all(report.equal for report in reports):
        raise typer.Exit(1)


def _matching(pattern: str) -> list[str]:
    return purecnn.list_models(pattern) or [create(pattern).name]


@app.command()
def explain(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Images, or folders of images.")],
    source: Annotated[
        str,
        typer.Option("--from", help="A checkpoint; with --model a file in torchvision's names, DEFAULT, or timm:NAME."),
    ] = "DEFAULT",
    model: Annotated[
        str | None, typer.Option("--model", help="Name of the model, if the weights do not say it.")
    ] = None,
    method: Annotated[
        list[explaining.MethodName] | None, typer.Option(help="Method; may be given several times. By default all.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The .png to write, with a row for each image.")] = Path("explanation.png"),
    as_json: AsJson = False,
) -> None:
    """Draw where a network looks: Grad-CAM, integrated gradients, SmoothGrad, input gradients."""
    images = pictures_of(images)
    if out.is_dir():
        out = out / "explanation.png"
    if out.suffix.lower() != ".png":
        raise typer.BadParameter(f"{out} should end in .png", param_hint="--out")
    _keep([out], images)
    writable(out.parent)
    found = load_source(source, model)
    methods = list(dict.fromkeys(method or explaining.MethodName))
    results = [explaining.explain_picture(found, data.read_image(path), methods) for path in images]
    rows = [
        (each.seen, f"{each.answer}: {each.probability:.1%}", {explaining.TITLES[m]: each.maps[m] for m in methods})
        for each in results
    ]
    pictures.explanations(rows, out)
    if as_json:
        reports = [{"image": str(path), **each.to_dict()} for path, each in zip(images, results, strict=True)]
        print_json({"picture": str(out), "images": reports})
        return
    for path, each in zip(images, results, strict=True):
        screen.print(f"{path}: {each.answer}, {each.probability:.2%}", soft_wrap=True)
    screen.print(f"where {found.model.name} looks is drawn in {out}", soft_wrap=True)


def keep_memory() -> None:
    """Make the C library keep freed memory: requesting it from the system again takes a quarter of a network's time.

    Only glibc has this setting; elsewhere nothing happens.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            mallopt(parameter, 1 << 30)


def main() -> None:
    """The ``purecnn`` command."""
    keep_memory()
    gc.freeze()  # imported objects stay alive, so the collector need not scan them again and again
    try:
        app()
    except (ArithmeticError, ImportError, OSError, RuntimeError, ValueError) as error:
        # One paragraph; the notes say where in the network it happened.
        words = [str(error), *getattr(error, "__notes__", [])]
        notes.print(Text.assemble(("error:", "red"), " ", "; ".join(words)), soft_wrap=True)
        sys.exit(1)
    finally:
        gc.unfreeze()  # else Triton 3.9, which comes with PyTorch 2.15, complains at exit about missing clean-up


if __name__ == "__main__":
    main()
