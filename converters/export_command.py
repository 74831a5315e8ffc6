"""The command ``purecnn export``: write a network for other programs, and check that the file gives its logits."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import torch
import typer
from torch import Tensor

from converters import export
from converters.arguments import AsJson, load_source, writable
from converters.export import ExportError
from converters.screen import notes, print_json, screen
from converters.sources import Source
from purecnn import Model, random
from purecnn.files import replacing
from purecnn.fold import fold as fold_norms
from purecnn.tree import Tree

Run: TypeAlias = Callable[[Tensor], Tensor]

_BOUND = 1e-3
"""How far a file's logits may differ from the network's, relative to the largest logit; summing in another order alone
makes a difference of 1e-5."""


def export_command(
    source: Annotated[
        str, typer.Argument(help="A checkpoint or a run's folder; with --model other weights, DEFAULT, or timm:NAME.")
    ],
    target: Annotated[Path, typer.Argument(help="The file to write: .onnx, or .pt2 for torch.export.")],
    model: Annotated[
        str | None, typer.Option("--model", help="Name of the model, if the weights do not say it.")
    ] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the .pt2 for this kind of machine.")] = False,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Height and width of the images in pixels; by default the model's.")
    ] = None,
    fold: Annotated[bool, typer.Option("--fold", help="Fold normalisations into convolutions, for speed.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a network as ONNX or for torch.export (a batch of any size to logits), then run the file and compare.

    The file's metadata hold the class names and the preprocessing. If its logits differ from the network's by more
    than 0.001 of the largest, no file is left.
    """
    if target.suffix not in (".onnx", ".pt2"):
        raise typer.BadParameter(f"{target} should end in .onnx or .pt2", param_hint="TARGET")
    if target.exists():
        raise typer.BadParameter(f"{target} exists and is not overwritten: choose another name", param_hint="TARGET")
    if compiled and target.suffix == ".onnx":
        raise typer.BadParameter("an .onnx file is not compiled: choose a .pt2 file", param_hint="--compile")
    writable(target.parent)
    found = load_source(source, model)
    network = found.model, found.params, found.state
    about = _about(found)
    with notes.status("exporting"), replacing(target) as file:
        written = fold_norms(*network) if fold else network
        images = export.example(found.model, found.params, image_size)
        if compiled:
            export.package(file, _logits(*written), images, open_batch=True, notes=about)
        elif target.suffix == ".pt2":
            export.save_program(file, export.program(*written, image_size=image_size), about)
        else:
            export.save_onnx(file, export.program(*written, image_size=image_size), about)
        difference = _difference(_reader(file, compiled), _logits(*network), images.shape[1:])
        if difference is not None and not difference <= _BOUND:  # also true of NaN
            raise ExportError(
                f"{target} is not written: its logits would differ from purecnn's by {difference:.1e} of the largest, "
                f"but at most {_BOUND:.0e} is allowed"
            )
    if as_json:
        print_json({"model": found.model.name, "file": str(target), "folded": fold, "difference": difference})
        return
    words = "not compared: onnxruntime is not installed"
    if difference == 0:
        words = "its logits equal purecnn's bit for bit"
    elif difference is not None:
        words = f"its logits differ from purecnn's by at most {difference:.1e} of the largest"
    screen.print(f"{found.model.name} written to {target}; {words}", soft_wrap=True)


def _about(source: Source) -> dict[str, str]:
    known: dict[str, Any] = {
        "model": source.model.name,
        "classes": source.classes,
        "preprocessing": source.preprocessing.to_dict() if source.preprocessing else None,
    }
    return {name: json.dumps(value) for name, value in known.items() if value is not None}


def _logits(model: Model, params: Tree, state: Tree) -> Run:
    return lambda images: model.apply(params, state, images)[0]


def _difference(run: Run | None, network: Run, shape: torch.Size) -> float | None:
    """The largest difference between the file's and the network's logits, relative to the largest logit.

    Measured on batches of one and of three images; None if the file cannot be run.
    """
    if run is None:
        return None
    shares = []
    for count in (1, 3):
        images = random.normal(random.key(count), (count, *shape))
        with torch.no_grad():
            expected = network(images)
            farthest = (run(images) - expected).abs().max()
        # If all logits are zero, there is nothing to divide by, but they may be equal.
        shares.append(torch.where(farthest == 0, farthest, farthest / expected.abs().max()))
    return float(torch.stack(shares).max())


def _reader(path: Path, compiled: bool) -> Run | None:
    if path.suffix == ".pt2":
        with warnings.catch_warnings():
            # PyTorch 2.11 warns about its own way of reading a file.
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            result: Run = export.load(path) if compiled else torch.export.load(path).module()
        return result
    try:
        from onnxruntime import InferenceSession
    except ImportError:
        return None
    session = InferenceSession(path)
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
