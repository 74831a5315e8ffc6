"""The saved states of a training run: everything that is needed to resume it bit for bit.

``states/00000120.safetensors`` is the run after 120 steps: parameters, statistics, optimizer state, averages, and as
metadata the epoch, the batch in it, and the metrics of the epochs before. Random keys, the order of the data and
schedules are functions of the options and the step, so nothing else has to be saved. Files are written atomically, and
never unpickled.
"""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch

from converters.files import FileError, contents, write
from purecnn import tree
from purecnn.training import Epoch, Position, TrainState
from purecnn.tree import Tree

FORMAT = "purecnn-run-2"


class Standing(NamedTuple):
    """The saved state of a run, which trains in phases, each of which is one `purecnn.training.fit`."""

    phase: int
    """Index of the phase."""
    position: Position
    rows: tuple[dict[str, Any], ...]
    """The rows of ``metrics.csv`` so far."""


def save(folder: Path, number: int, standing: Standing, keep: int) -> None:
    """Write the run's state after ``number`` steps, and remove all but the last ``keep`` files.

    Half-written files of a killed process are removed too, since a run has only one writer.

    Args:
        folder: the run's ``states`` folder.
        number: steps done in all phases; names the file.
        standing: the state to save.
        keep: how many files to keep, at least 1.
    """
    phase, position, rows = standing
    params, state, opt_state, step, extra = position.train_state
    trees = {
        "params": params, "state": state, "opt_state": opt_state, "extra": extra, "step": step, "sums": position.sums,
    }  # fmt: skip
    metadata = {
        "format": FORMAT,
        "standing": json.dumps(
            {
                "phase": phase,
                "epoch": position.epoch,
                "batch": position.batch,
                "seconds": position.seconds,
                "history": [row._asdict() for row in position.history],
                "learning_rate": position.learning_rate,
                "rows": rows,
            }
        ),
    }
    written = folder / f"{number:08}.safetensors"
    write(written, tree.flatten(trees), metadata)
    others = [path for path in _files(folder) if path != written]  # the last by name may be from another run
    for old in others[: max(0, len(others) + 1 - keep)]:
        old.unlink(missing_ok=True)
    for half in folder.glob(".[0-9]*.safetensors.*"):  # temporary folders of `replacing`
        shutil.rmtree(half, ignore_errors=True)


def load(folder: Path) -> Standing | None:
    """Read the last saved state of a run; None if there is none.

    Raises:
        FileError: if its file is damaged or of the wrong kind.
    """
    files = _files(folder)
    if not files:
        return None
    path = files[-1]
    tensors, metadata = contents(path)
    if metadata.get("format") != FORMAT:
        raise FileError(
            f"{path} is not a saved state of this version of purecnn: expected the format {FORMAT}, "
            f"found {metadata.get('format')}"
        )
    try:
        found = json.loads(metadata["standing"])
        trees = tree.unflatten(tensors)
        train_state = TrainState(
            trees["params"], trees.get("state", {}), trees["opt_state"], trees["step"], trees.get("extra", {})
        )
        position = Position(
            train_state,
            found["epoch"],
            found["batch"],
            trees["sums"],
            found["seconds"],
            tuple(Epoch(**row) for row in found["history"]),
            found["learning_rate"],
        )
        return Standing(found["phase"], position, tuple(found["rows"]))
    except (KeyError, TypeError, ValueError) as error:
        raise FileError(f"{path} is not a valid saved state of a run: {error!r}") from error


def like(standing: Standing, start: TrainState, device: torch.device) -> Standing:
    """Move a saved state to a device, with its trees in the order of a fresh train state, since a file sorts its keys.

    Raises:
        FileError: if the trees differ in names or shapes.
    """

    def sort(what: str, model: Tree, found: Tree) -> Tree:
        if different := tree.differences(model, found):
            raise FileError(
                f"the {what} in the run's saved state does not fit the network and optimizer: {tree.some(different)}"
            )
        return _ordered(model, found, device)

    given = standing.position.train_state
    parts = {name: sort(name, getattr(start, name), getattr(given, name)) for name in _PARTS}
    train_state = TrainState(**parts, step=given.step.to(device))
    position = standing.position._replace(train_state=train_state, sums=standing.position.sums.to(device))
    return standing._replace(position=position)


_PARTS = ("params", "state", "opt_state", "extra")


def _ordered(model: Tree, found: Tree, device: torch.device) -> Tree:
    """Copy ``found`` into the order and memory layout of ``model``, with its empty branches, which files lack."""
    return {
        name: _ordered(child, found.get(name, {}), device)
        if isinstance(child, dict)
        else torch.empty_like(child, device=device).copy_(found[name])
        for name, child in model.items()
    }


def is_empty(folder: Path) -> bool:
    """Whether a folder contains no saved state; it need not exist."""
    return not _files(folder)


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9]*.safetensors"))
