"""Files of tensors: ``.safetensors``, and state_dicts that torch saved. Nothing is ever unpickled but tensors."""

import json
import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from purecnn.files import replacing


class FileError(ValueError):
    """A file is missing, damaged or of another kind; the message names it."""


_VERSIONS = "torch_metadata"
"""Where a safetensors file keeps a state_dict's ``_metadata``, the versions of its modules."""


class Contents(NamedTuple):
    """What a file holds."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    """What a ``.safetensors`` file says of itself; of another file nothing is known."""


def read(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file, or of any other that holds nothing but a state_dict saved by torch.

    Raises:
        FileError: if the file is missing, damaged or of another kind.
    """
    return contents(path).tensors


def contents(path: str | os.PathLike[str]) -> Contents:
    """As `read`, with what the file says of its tensors: both are of one file, even if somebody replaces it meanwhile.

    Raises:
        FileError: as from `read`.
    """
    if Path(path).suffix == ".safetensors":
        with opened(path) as file:
            tensors = OrderedDict((key, file.get_tensor(key)) for key in file.keys())  # noqa: SIM118, not a mapping
            metadata = file.metadata() or {}
        if _VERSIONS in metadata:
            order, versions = json.loads(metadata[_VERSIONS])
            tensors = OrderedDict((key, tensors[key]) for key in order)
            tensors._metadata = OrderedDict(versions)  # type: ignore[attr-defined]
        return Contents(tensors, metadata)
    if not Path(path).is_file():
        raise FileError(f"{path} does not exist")
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise FileError(f"{path} is neither a .safetensors file nor a state_dict saved by torch: {reason}") from error
    if _is_state_dict(found):
        return Contents(found, {})
    entries = found if isinstance(found, dict) else {}
    inside = " and under ".join(repr(key) for key, entry in entries.items() if _is_state_dict(entry) and entry)
    if inside:
        raise FileError(f"{path} holds tensors under {inside}: save such an entry in a file of its own")
    what = f"a dictionary of {', '.join(map(str, entries))}" if entries else f"a {type(found).__name__}"
    raise FileError(f"{path} holds something else than a dictionary of tensors: {what[:200]}")


def _is_state_dict(found: Any) -> bool:
    return isinstance(found, dict) and all(isinstance(tensor, Tensor) for tensor in found.values())


def write(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors, wholly or not at all: safetensors, or a state_dict of torch where the name ends in ``.pth``.

    Raises:
        FileError: if the name has another ending, or there is metadata for a ``.pth`` file, which has no place for it.
    """
    suffix = Path(path).suffix
    if suffix not in (".safetensors", ".pth"):
        raise FileError(f"{path} should end in .safetensors or .pth")
    if suffix == ".pth" and metadata:
        raise FileError(f"{path} should end in .safetensors: a .pth file cannot say what its tensors are")
    with replacing(path) as file:
        if suffix == ".pth":
            torch.save(tensors, file)
        else:
            notes = dict(metadata or {})
            if versions := getattr(tensors, "_metadata", None):
                notes[_VERSIONS] = json.dumps([list(tensors), versions])
            save_file(_separate(tensors), file, notes)


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """safetensors takes no tensors that share memory, are parts of others or are not contiguous."""
    storages: set[int] = set()
    result = {}
    for key, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        result[key] = tensor
    return result


def opened(path: str | os.PathLike[str]) -> Any:
    """A safetensors file, open for reading: one file, even if somebody replaces it meanwhile.

    Raises:
        FileError: if it is missing, damaged or of another kind.
    """
    if not Path(path).is_file():
        raise FileError(f"{path} does not exist")
    while True:
        with Path(path).open("rb") as held:  # while it is open, no later file can pass for it
            found: Any
            try:
                found = safe_open(path, framework="pt")
            except (safetensors.SafetensorError, RuntimeError) as error:
                found = error
            # safetensors opens a file twice, for the description and for the numbers, so it may have got two.
            if os.path.samestat(os.fstat(held.fileno()), Path(path).stat()):
                break
    if isinstance(found, Exception):
        raise FileError(f"{path} is damaged or not a safetensors file: {found}") from found
    return found
