"""Arguments that several commands share, and their checks; a wrong name counts as misuse of the command line."""

import os
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torchvision.datasets.folder import IMG_EXTENSIONS

import purecnn
from converters import sources
from converters.screen import notes
from purecnn import data
from purecnn.data import DataError
from purecnn.model import UnknownModelError


def writable(folder: Path | None) -> Path | None:
    """Check, before any work is done, that the folder can be written into or created."""
    if folder is None:
        return None
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not there.is_dir():
        raise typer.BadParameter(f"{there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise typer.BadParameter(f"{there} cannot be written into: permission denied")
    return folder


ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="A name from `purecnn list`.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Data = Annotated[
    str,
    typer.Option(
        "--data",
        help=f"{', '.join(data.names())}; a folder with train/ and val/, each with class folders; or hf:NAME (Hub).",
    ),
]
Root = Annotated[Path | None, typer.Option(help="Folder that data sets are downloaded to.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out files that are not images.")]
Workers = Annotated[int, typer.Option(min=0, help="Number of processes that read images.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...; by default a GPU if there is one.")]
Out = Annotated[Path | None, typer.Option(callback=writable, help="Folder of the run; by default a new one in runs/.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in --out, if there is one.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of all random numbers.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images per batch.")]


def create(name: str, **settings: Any) -> purecnn.Model:
    """Call `purecnn.create`; an unknown name is misuse of the command line."""
    try:
        return purecnn.create(name, **settings)
    except UnknownModelError as error:
        raise typer.BadParameter(str(error), param_hint="MODEL") from None


def load_data(name: str, root: Path | None, skip_bad: bool, like: str | None = None) -> data.DataSet:
    """Call `purecnn.data.load`; an unknown name is misuse of the command line."""
    try:
        return data.load(name, root=root, skip_bad=skip_bad, like=like)
    except DataError as error:
        if name in data.names() or name.startswith("hf:") or Path(name).expanduser().is_dir():
            raise
        raise typer.BadParameter(str(error), param_hint="--data") from None


def existing(path: Path) -> Path:
    """Check that a file exists; a wrong name is misuse of the command line."""
    if not path.is_file():
        raise typer.BadParameter(f"{path} does not exist", param_hint="FILE")
    return path


def pictures_of(paths: list[Path]) -> list[Path]:
    """Check that the files exist, and replace each folder by its images: by file ending, sorted, not recursive."""
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(existing(path))
            continue
        inside = sorted(file for file in path.iterdir() if file.suffix.lower() in IMG_EXTENSIONS and file.is_file())
        inside = [file for file in inside if not file.name.startswith(".")]
        if not inside:
            raise typer.BadParameter(f"{path} contains no images ({', '.join(IMG_EXTENSIONS)})", param_hint="IMAGE")
        found += inside
    return found


def load_source(source: str, name: str | None, entry: str | None = None, *, as_stored: bool = False) -> sources.Source:
    """Call `converters.sources.load`, checking names as arguments; in single precision unless ``as_stored``.

    The folder of a run stands for its checkpoint.
    """
    if name is not None:
        create(name)
    if source.startswith(sources.TIMM):
        pass
    elif Path(source).is_dir():
        source = str(existing(Path(source, "checkpoint.safetensors")))
    elif Path(source).suffix:
        existing(Path(source))
    elif not Path(source).is_file() and not source.isupper():  # as all names of published weights are
        raise typer.BadParameter(f"there is no file or folder {source}", param_hint="--from")
    try:
        found = sources.load(source, name, entry)
    except sources.NamelessError as error:
        raise typer.BadParameter(f"{error} with --model NAME", param_hint="--model") from None
    if found.assumed:
        words = "does not have the name of a file of torchvision's; assuming ImageNet's classes and preprocessing"
        notes.print(f"note: {source} {words}", soft_wrap=True)
    return found if as_stored else found.single()


def pick_device(name: str) -> torch.device:
    """The device of this name; ``auto`` is a GPU if there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        zero = torch.zeros((), device=name)
        zero.item()  # fails on devices that hold no values, such as meta
        return zero.device
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(str(error).partition("\n")[0], param_hint="--device") from None
