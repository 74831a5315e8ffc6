"""Files of tensors: ``.safetensors``, and state_dicts saved by torch. Only tensors are ever unpickled."""

import io
import json
import os
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import safetensors
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from purecnn.files import replacing


class FileError(ValueError):
    """A file is missing, damaged or of the wrong kind; the message names it."""


_VERSIONS = "torch_metadata"
"""The metadata key under which a safetensors file keeps a state_dict's ``_metadata``, the versions of its modules."""


class Contents(NamedTuple):
    """The contents of a file: its tensors and its metadata."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    """The metadata of a ``.safetensors`` file; empty for other files."""


def read(path: str | os.PathLike[str], entry: str | None = None) -> dict[str, Tensor]:
    """Read the tensors of a ``.safetensors`` file, or a state_dict saved by torch, alone or inside a dictionary.

    Args:
        path: the file.
        entry: the key of the state_dict in that dictionary, such as ``"model_ema"``; required if there are several.

    Raises:
        FileError: if the file is missing, damaged or of the wrong kind.
    """
    return contents(path, entry).tensors


def contents(path: str | os.PathLike[str], entry: str | None = None) -> Contents:
    """Read a file's tensors, as `read` does, and its metadata: both of the same file, even if it is replaced meanwhile.

    Raises:
        FileError: as `read` does.
    """
    if Path(path).suffix == ".safetensors":
        with opened(path) as file:
            tensors = OrderedDict((key, file.get_tensor(key)) for key in file.keys())  # noqa: SIM118, not a mapping
            metadata = file.metadata() or {}
        if entry is not None:
            raise FileError(f"{path} is a .safetensors file, which has no entries: leave out entry (found {entry!r})")
        return Contents(_as_state_dict(tensors, metadata), metadata)
    _check_there(path)
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise FileError(f"{path} {_refusal(path, error)}") from None  # torch's message advises trusting the file
    if _is_state_dict(found) and entry is None:
        return Contents(found, {})
    entries = found if isinstance(found, dict) else {}
    inside = {key: value for key, value in entries.items() if _is_state_dict(value) and value}
    wanted = next(iter(inside)) if entry is None and len(inside) == 1 else entry
    if wanted in inside:
        return Contents(inside[wanted], {})
    if inside or entry is not None:
        there = " and under ".join(map(repr, inside)) or "no name"
        say = "say which one to read with entry (purecnn convert: --entry)"
        raise FileError(
            f"{path} holds state_dicts under {there}: {say if entry is None else f'there is no entry {entry!r}'}"
        )
    what = f"a dictionary of {', '.join(map(str, entries))}" if entries else f"a {type(found).__name__}"
    raise FileError(f"{path} holds no dictionary of tensors but {what[:200]}")


def _as_state_dict(tensors: "OrderedDict[str, Tensor]", metadata: Mapping[str, str]) -> "OrderedDict[str, Tensor]":
    """Restore the written state_dict's order and ``_metadata``; if these do not fit, return the tensors as they are."""
    try:
        order, versions = json.loads(metadata[_VERSIONS])
        found = OrderedDict((key, tensors[key]) for key in order)
        found._metadata = OrderedDict(versions)  # type: ignore[attr-defined]
    except (KeyError, TypeError, ValueError):
        return tensors
    return found if found.keys() == tensors.keys() else tensors


def _check_there(path: str | os.PathLike[str]) -> None:
    if not Path(path).is_file():
        raise FileError(f"{path} {'is a folder' if Path(path).is_dir() else 'does not exist'}")
    if not Path(path).stat().st_size:
        raise FileError(f"{path} is empty")


_SAFETENSORS = "a .safetensors file"
_TORCHS = "a file that torch saved"


def _kind(path: str | os.PathLike[str]) -> str:
    """Guess the kind of a file from its first bytes."""
    with Path(path).open("rb") as file:
        beginning = file.read(16)
    if beginning[8:9] == b"{":  # after the length of the header
        return _SAFETENSORS
    if beginning.startswith((b"PK", b"\x80")):  # a zip archive, or a pickle from before torch 1.6
        return _TORCHS
    return f"damaged, or not a file of tensors: it begins with {beginning!r}"


def _refusal(path: str | os.PathLike[str], error: Exception) -> str:
    """Explain why torch refused to read a file."""
    kind, words = _kind(path), str(error)
    if kind != _TORCHS:
        return f"is {kind}{', so its name should end in .safetensors' if kind == _SAFETENSORS else ''}"
    if "TorchScript" in words:
        return "holds a TorchScript program: save its state_dict() instead"
    if refused := re.search(r"GLOBAL (\S+) was not", words):
        return (
            f"holds a whole module or other objects, which are not unpickled ({refused[1]}): save module.state_dict()"
        )
    if isinstance(error, UnpicklingError):
        return "holds a pickle of objects other than tensors: save module.state_dict() with torch.save"
    sentence = re.split(r"(?<=\w)\. ", words)[0]
    return f"is damaged, or not a state_dict saved by torch: {sentence}"


def _is_state_dict(found: Any) -> bool:
    return isinstance(found, dict) and all(isinstance(tensor, Tensor) for tensor in found.values())


def write(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors atomically, as safetensors, or as torch saves a state_dict if the name ends in ``.pth``.

    Raises:
        FileError: if the name has another ending, if there is metadata for a ``.pth`` file, which cannot store it, or
            if safetensors cannot write the file, such as on a full disk.
        OSError: if the file cannot be written for another reason.
    """
    suffix = Path(path).suffix
    allowed = (".safetensors",) if metadata else (".safetensors", ".pth")
    if suffix not in allowed:
        why = ": a .pth file cannot store metadata" if suffix == ".pth" else ""
        raise FileError(f"{path} should end in {' or '.join(allowed)}{why}")
    with replacing(path) as file:
        if suffix == ".pth":
            held = io.BytesIO()  # on a full disk torch would report neither that nor the file's name
            torch.save(tensors, held)
            with held.getbuffer() as view:
                file.write_bytes(view)
            return
        notes = dict(metadata or {})
        if versions := getattr(tensors, "_metadata", None):
            notes[_VERSIONS] = json.dumps([list(tensors), versions])
        try:
            save_file(_separate(tensors), file, notes)
        except safetensors.SafetensorError as error:
            raise FileError(f"{path} cannot be written: {error}") from error


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors where needed: safetensors takes none that share memory, are views or are not contiguous."""
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
    """Open a safetensors file for reading; header and tensors are of the same file, even if it is replaced meanwhile.

    Raises:
        FileError: if the file is missing, damaged or of the wrong kind.
    """
    _check_there(path)
    while True:
        with Path(path).open("rb") as held:  # while it is open, no new file gets its inode
            found: Any
            try:
                found = safe_open(path, framework="pt")
            except (safetensors.SafetensorError, RuntimeError) as error:
                found = error
            # safetensors opens a file twice, for the header and for the tensors, so it may have read two files.
            if os.path.samestat(os.fstat(held.fileno()), Path(path).stat()):
                break
    if not isinstance(found, Exception):
        return found
    words = f"damaged: {found}" if (kind := _kind(path)) == _SAFETENSORS else kind
    if kind == _TORCHS:
        words += (
            ", so its name should end in .pth"
            if Path(path).suffix == ".safetensors"
            else f", not a .safetensors file; convert it first: purecnn convert {path} NEW.safetensors --model NAME"
        )
    raise FileError(f"{path} is {words}") from found
