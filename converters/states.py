"""Where a training run stands, as files: all that is needed to go on bit for bit.

``states/00000120.safetensors`` is the run after 120 steps: parameters, statistics, what the optimizer keeps, averages,
and as metadata the epoch, the batch in it, and the rows of the epochs before. Keys, the order of the data and schedules
are functions of the options and the step, so nothing else has to be kept. Files are written whole or not at all, and
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
    """A run's position: a training in phases, each of which is a `purecnn.training.fit`."""

    phase: int
    """Index of the phase."""
    position: Position
    rows: tuple[dict[str, Any], ...]
    """Of ``metrics.csv`` so far."""


def save(folder: Path, number: int, standing: Standing, keep: int) -> None:
    """Write a file for where the run stands after ``number`` steps, and remove all but the last ``keep``.

    Half-written files of a process that was killed go, too: a run has one writer.

    Args:
        folder: the run's ``states``.
        number: steps done in all phases; names the file.
        standing: where the run stands.
        keep: how many files are left, at least 1.
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
    others = [path for path in _files(folder) if path != written]  # the last by name may be another run's
    for old in others[: max(0, len(others) + 1 - keep)]:
        old.unlink(missing_ok=True)
    for half in folder.glob(".[0-9]*.safetensors.*"):  # `replacing`'s folders
        shutil.rmtree(half, ignore_errors=True)


def load(folder: Path) -> Standing | None:
    """The last position of a run, if there is one.

    Raises:
        FileError: if its file is damaged or of another kind.
    """
    files = _files(folder)
    if not files:
        return None
    path = files[-1]
    tensors, metadata = contents(path)
    if metadata.get("format") != FORMAT:
        raise FileError(f"{path} does not hold where a run of this version of purecnn stands")
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
        raise FileError(f"{path} does not say where a run stands: {error!r}") from error


def like(standing: Standing, start: TrainState, device: torch.device) -> Standing:
    """The same on a device, its trees in the order of a fresh train state's: a file sorts its keys.

    Raises:
        FileError: if the trees differ in names or shapes.
    """

    def sort(what: str, model: Tree, found: Tree) -> Tree:
        if different := tree.differences(model, found):
            raise FileError(f"the run's {what} is another network's or optimizer's: {tree.some(different)}")
        return _ordered(model, found, device)

    given = standing.position.train_state
    parts = {name: sort(name, getattr(start, name), getattr(given, name)) for name in _PARTS}
    train_state = TrainState(**parts, step=given.step.to(device))
    position = standing.position._replace(train_state=train_state, sums=standing.position.sums.to(device))
    return standing._replace(position=position)


_PARTS = ("params", "state", "opt_state", "extra")


def _ordered(model: Tree, found: Tree, device: torch.device) -> Tree:
    """By the model's order, with its empty branches, which no path in a file tells of, and its layout in memory."""
    return {
        name: _ordered(child, found.get(name, {}), device)
        if isinstance(child, dict)
        else torch.empty_like(child, device=device).copy_(found[name])
        for name, child in model.items()
    }


def is_empty(folder: Path) -> bool:
    """Whether a folder holds no position of a run; it need not be there."""
    return not _files(folder)


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9]*.safetensors"))
