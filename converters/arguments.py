"""Arguments that commands share, and their checks: a wrong name is misuse of the command line."""

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
    """A folder that can be written into, or made: to be known before the work, not after it."""
    if folder is None:
        return None
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not there.is_dir():
        raise typer.BadParameter(f"{there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise typer.BadParameter(f"{there} cannot be written into: permission denied")
    return folder


ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="A name of `purecnn list`.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Data = Annotated[
    str,
    typer.Option(
        "--data",
        help=f"{', '.join(data.names())}, a folder with train/ and val/ and class folders, or hf:NAME of the Hub.",
    ),
]
Root = Annotated[Path | None, typer.Option(help="Where data sets are downloaded to.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out files that are no pictures.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that read pictures.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...; by default a GPU if there is one.")]
Out = Annotated[Path | None, typer.Option(callback=writable, help="Folder of the run; by default a new one in runs/.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in --out, if there is one.")]
Seed = Annotated[int, typer.Option(min=0, help="Of all that is random.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Pictures in a batch.")]


def create(name: str, **settings: Any) -> purecnn.Model:
    """As `purecnn.create`; an unknown name is misuse of the command line."""
    try:
        return purecnn.create(name, **settings)
    except UnknownModelError as error:
        raise typer.BadParameter(str(error), param_hint="MODEL") from None


def load_data(name: str, root: Path | None, skip_bad: bool, like: str | None = None) -> data.DataSet:
    """As `purecnn.data.load`; an unknown name is misuse of the command line."""
    try:
        return data.load(name, root=root, skip_bad=skip_bad, like=like)
    except DataError as error:
        if name in data.names() or name.startswith("hf:") or Path(name).expanduser().is_dir():
            raise
        raise typer.BadParameter(str(error), param_hint="--data") from None


def existing(path: Path) -> Path:
    """A file that should be there; a wrong name is misuse of the command line."""
    if not path.is_file():
        raise typer.BadParameter(f"{path} does not exist", param_hint="FILE")
    return path


def pictures_of(paths: list[Path]) -> list[Path]:
    """Files that should be there, and of folders the pictures: by their endings, in order, none of folders inside."""
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(existing(path))
            continue
        inside = sorted(file for file in path.iterdir() if file.suffix.lower() in IMG_EXTENSIONS and file.is_file())
        inside = [file for file in inside if not file.name.startswith(".")]
        if not inside:
            raise typer.BadParameter(f"{path} holds no pictures ({', '.join(IMG_EXTENSIONS)})", param_hint="IMAGE")
        found += inside
    return found


def load_source(source: str, name: str | None, entry: str | None = None, *, as_stored: bool = False) -> sources.Source:
    """As `converters.sources.load`, with names checked as arguments, and in single precision unless ``as_stored``.

    A run's folder means its checkpoint.
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
        raise typer.BadParameter(f"{error} by --model NAME", param_hint="--model") from None
    if found.assumed:
        words = "is not named like a file of torchvision's; classes and preparation are taken for those of ImageNet"
        notes.print(f"note: {source} {words}", soft_wrap=True)
    return found if as_stored else found.single()


def pick_device(name: str) -> torch.device:
    """The device of that name."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        zero = torch.zeros((), device=name)
        zero.item()  # there are devices without numbers, such as meta
        return zero.device
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(str(error).partition("\n")[0], param_hint="--device") from None
