"""A run that was killed, stopped or moved goes on as if nothing had happened."""

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import sklearn.datasets
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner, Result

import purecnn
from converters import cli, files, states, train_command
from converters.files import FileError
from purecnn import random
from purecnn.files import alone
from purecnn.optimizers import adamw
from purecnn.training import Position, TrainState
from tests.test_cli import fails

TRAIN = ("train", "lenet5", "--data", "digits", "--epochs", "2", "--batch-size", "128")
"""24 steps."""


def call(*words: str) -> Result:
    return CliRunner().invoke(cli.app, list(words))


def final(folder: Path) -> dict[str, Tensor]:
    """All tensors of where a run stands."""
    (path,) = (folder / "states").iterdir()  # nothing else: what a killed process left is cleared away
    return files.read(path)


def best(folder: Path) -> dict[str, Tensor]:
    return files.read(folder / "checkpoint.safetensors")


def rows(folder: Path) -> list[list[str]]:
    """``metrics.csv`` without the seconds."""
    return [line.split(",")[:-1] for line in (folder / "metrics.csv").read_text().splitlines()]


def assert_same(a: Path, b: Path) -> None:
    for one, other in ((final(a), final(b)), (best(a), best(b))):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert rows(a) == rows(b)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    result = call(*TRAIN, "--out", str(folder))
    assert result.exit_code == 0, result.output
    return folder


EXTRAS = {
    "plain": (),
    "average": ("--average", "0.9", "--mixup", "0.2", "--cutmix", "1", "--clip", "1", "--label-smoothing", "0.1"),
    "phases": ("--head-epochs", "1", "--stage-epochs", "0", "--optimizer", "sgd", "--stage-decay", "0.5"),
    "half": ("--precision", "float16", "--accumulate", "2", "--channels-last", "--remat"),
}


@pytest.mark.parametrize("name", EXTRAS)
def test_a_stopped_run_goes_on_bit_for_bit(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped by the signal after some steps; again and again in one folder."""
    moments = (1, 12, 19)  # the first, the last of an epoch, and in the midst of one
    words = (*TRAIN, *EXTRAS[name])
    assert call(*words, "--out", str(tmp_path / "whole")).exit_code == 0
    steps = 0
    update = train_command.Progress.update

    def interrupt(*args: Any, **kwargs: Any) -> None:
        nonlocal steps
        if "completed" in kwargs:
            steps += 1
            if steps in moments:
                os.kill(os.getpid(), signal.SIGTERM)
        update(*args, **kwargs)

    monkeypatch.setattr(train_command.Progress, "update", interrupt)
    part = tmp_path / "part"
    for _ in moments:
        result = call(*words, "--out", str(part), "--resume")
        assert result.exit_code == 128 + signal.SIGTERM, result.output
        assert "--resume continues bit for bit" in result.output
    result = call(*words, "--out", str(part), "--resume")
    assert result.exit_code == 0, result.output
    assert steps == 24
    assert_same(tmp_path / "whole", part)


def start(*words: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "converters.cli", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # as in this process: sums in the same order
    )


def wait_for_progress(folder: Path, before: set[str], process: "subprocess.Popen[bytes]") -> None:
    """Until a file that was not there tells of a further step, or the process has ended."""
    while process.poll() is None:
        if {path.name for path in (folder / "states").glob("*.safetensors")} - before:
            return
        time.sleep(0.01)


def kill_repeatedly(folder: Path, times: int, whole: Path) -> None:
    words = (*TRAIN, "--out", str(folder), "--resume", "--checkpoint-every", "0")
    delays = (random.uniform(random.key(times), (times,)) * 0.3).tolist()
    for delay in delays:
        before = {path.name for path in (folder / "states").glob("*.safetensors")}
        process = start(*words)
        wait_for_progress(folder, before, process)
        time.sleep(delay)
        process.kill()
        process.wait()
        for path in folder.rglob("*.safetensors"):
            if not path.name.startswith("."):  # those are not yet in their place
                files.read(path)
        if (folder / "config.json").exists():
            json.loads((folder / "config.json").read_text())
        standing = states.load(folder / "states")
        assert standing is None or standing.position.epoch <= 3
    result = call(*words)
    assert result.exit_code == 0, result.output
    assert_same(whole, folder)


def test_a_killed_run_goes_on_bit_for_bit(whole: Path, tmp_path: Path) -> None:
    kill_repeatedly(tmp_path / "killed", 2, whole)


@pytest.mark.slow
def test_a_run_killed_twenty_times_goes_on_bit_for_bit(whole: Path, tmp_path: Path) -> None:
    kill_repeatedly(tmp_path / "killed", 20, whole)


def test_a_finished_run_is_left_as_it_is(whole: Path) -> None:
    before = final(whole)
    half = whole / f".checkpoint.safetensors.{platform.node()}.0123456789abcdef"
    half.mkdir()
    (half / ".checkpoint.safetensors").write_bytes(b"half of")
    result = call(*TRAIN, "--out", str(whole), "--resume")
    assert result.exit_code == 0, result.output
    assert not half.exists()
    assert all(torch.equal(leaf, before[key]) for key, leaf in final(whole).items())


def test_other_options_are_refused(whole: Path) -> None:
    words = [*TRAIN[:-1], "64", "--seed", "3", "--out", str(whole), "--resume"]
    result = call(*words)
    assert result.exit_code != 0
    assert "batch_size was 128, now it is 64, seed was 0, now it is 3" in str(result.exception)
    assert call(*TRAIN, "--out", str(whole), "--resume", "--workers", "0", "--device", "cpu").exit_code == 0


def test_other_data_are_refused(tmp_path: Path) -> None:
    for half in ("train", "val"):
        for name in ("ants", "bees"):
            for i in range(12):
                path = tmp_path / "insects" / half / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8), (i, i, i)).save(path)
    ants = tmp_path / "insects" / "train" / "ants"
    words = ("train", "lenet5", "--data", str(tmp_path / "insects"), "--like", "cifar10", "--epochs", "1")
    resume = (*words, "--out", str(tmp_path / "run"), "--resume")
    assert call(*resume).exit_code == 0
    before = final(tmp_path / "run")

    (ants / "0.png").rename(ants / "renamed.png")
    assert "names, order or classes have changed" in str(call(*resume).exception)
    for i in range(1, 9):
        (ants / f"{i}.png").unlink()
    assert "train was 24 images, now it is 16 images." in str(call(*resume).exception)
    for half in ("train", "val"):
        (tmp_path / "insects" / half / "bees").rename(tmp_path / "insects" / half / "wasps")
    assert "classes was ants, bees, now it is ants, wasps; train was 24" in str(call(*resume).exception)
    assert all(torch.equal(leaf, before[key]) for key, leaf in final(tmp_path / "run").items())


def test_other_pictures_in_memory_are_refused(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pixel, as many pictures and classes."""
    bundle = sklearn.datasets.load_digits()
    bundle.images[-1, -1, 3] += 1
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda: bundle)
    result = call(*TRAIN, "--out", str(whole), "--resume")
    assert "the images, their names, order or classes have changed" in str(result.exception)
    bundle.images[-1, -1, 3] -= 1
    assert call(*TRAIN, "--out", str(whole), "--resume").exit_code == 0


def test_what_was_just_written_is_kept(tmp_path: Path) -> None:
    start = TrainState.start(*purecnn.create("lenet5").init(random.key(0)), adamw(1e-3))
    standing = states.Standing(0, Position.start(start), ())
    for number, keep, left in ((8, 1, [8]), (2, 1, [2]), (9, 2, [2, 9]), (3, 2, [3, 9]), (4, 5, [3, 4, 9])):
        states.save(tmp_path, number, standing, keep)
        assert sorted(int(path.stem) for path in tmp_path.iterdir()) == left


@pytest.mark.parametrize("resume", [(), ("--resume",)], ids=["anew", "resume"])
def test_a_failed_start_does_not_spoil_the_folder(resume: tuple[str, ...], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = ("train", "lenet5", "--epochs", "1", "--batch-size", "500", "--out", str(folder))
    assert call(*words, "--label-smoothing", "2").exit_code == 2
    assert call(*words, "--synchronize", "--lr", "1e30").exit_code == 1
    assert {path.name for path in folder.iterdir()} == {"config.json", "example.png"}
    result = call(*words, "--seed", "3", *resume)
    assert result.exit_code == 0, result.output
    assert json.loads((folder / "config.json").read_text())["options"]["seed"] == 3
    assert call(*words, "--seed", "4").exit_code == 2


def test_another_programs_configuration_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"command": "else"}')
    assert call(*TRAIN, "--out", str(tmp_path)).exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_what_cannot_be_trained_is_known_before_anything_is_written(tmp_path: Path) -> None:
    result = call("train", "lenet5_1998", "--label-smoothing", "0.1", "--out", str(tmp_path / "run"))
    assert "another loss" in str(result.exception)
    assert not any(tmp_path.iterdir())


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path) -> None:
    half = tmp_path / ".00000003.safetensors.another-machine.0123456789abcdef"
    half.mkdir()
    (half / ".00000003.safetensors").write_bytes(b"half of")
    start = TrainState.start(*purecnn.create("lenet5").init(random.key(0)), adamw(1e-3))
    states.save(tmp_path, 4, states.Standing(0, Position.start(start), ()), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["00000004.safetensors"]


@pytest.mark.parametrize("classes", [1, 5])
def test_another_networks_tensors_are_refused(classes: int) -> None:
    """Of whatever shape: one class must not spread over ten."""
    start, other = (
        TrainState.start(*purecnn.create("lenet5", num_classes=n).init(random.key(0)), adamw(1e-3))
        for n in (10, classes)
    )
    standing = states.Standing(0, Position.start(other), ())
    words = rf"params .*head\.linear\.weight \(expected \(10, 84\), found \({classes}, 84\)\)"
    with pytest.raises(FileError, match=words):
        states.like(standing, start, torch.device("cpu"))


def test_misuse(tmp_path: Path) -> None:
    result = call(*TRAIN, "--resume")
    assert result.exit_code == 2
    assert "need --out FOLDER" in " ".join(re.sub("[│╭╮╰╯─]", " ", result.output).split())


def test_a_cut_file_can_be_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (*TRAIN, "--out", str(tmp_path / "run"))
    assert call(*words, "--keep", "2").exit_code == 0
    last = sorted((tmp_path / "run" / "states").iterdir())[-1]
    whole = last.read_bytes()
    last.write_bytes(whole[:500])
    code, error = fails(capsys, monkeypatch, *words, "--keep", "2", "--resume")
    assert code == 1
    assert "is damaged: " in error
    assert "; remove that file to resume from the one before it" in error
    last.unlink()
    assert call(*words, "--keep", "2", "--resume").exit_code == 0
    assert last.is_file()


def test_the_last_files_are_kept(tmp_path: Path) -> None:
    result = call(*TRAIN, "--out", str(tmp_path / "run"), "--checkpoint-every", "0", "--keep", "3")
    assert result.exit_code == 0, result.output
    assert sorted(path.stem for path in (tmp_path / "run" / "states").iterdir()) == ["00000022", "00000023", "00000024"]


def test_damaged_files_are_named(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "states"
    folder.mkdir()
    assert states.load(folder) is None
    (folder / "00000001.safetensors").write_bytes(b"not at all")
    with pytest.raises(FileError, match=r"00000001\.safetensors is damaged"):
        states.load(folder)
    files.write(folder / "00000002.safetensors", {"x": torch.zeros(1)})
    with pytest.raises(FileError, match=r"is not a saved state of this version of purecnn: .*, found None"):
        states.load(folder)


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("config.json", None, "config.json is missing"),
        ("config.json", "{}", "config.json is damaged"),
        ("config.json", "", "config.json is damaged"),
        ("checkpoint.safetensors", None, "its best network, is missing"),
    ],
)
def test_a_run_that_lacks_a_file_does_not_go_on(
    file: str,
    text: str | None,
    words: str,
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / file).unlink()
    if text is not None:
        (folder / file).write_text(text)
    before = sorted(path.name for path in folder.iterdir())
    code, error = fails(capsys, monkeypatch, *TRAIN, "--out", str(folder), "--resume")
    assert (code, words in error) == (1, True), error
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize(
    "change",
    [
        {"standing": "{}"},
        {"standing": "no JSON"},
        {"phase": 7},
        {"batch": 9999},
        {"history": [{"epoch": 1}]},
    ],
    ids=lambda change: "-".join(map(str, change.items())),
)
def test_where_a_run_never_stands(
    change: dict[str, Any],
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (path,) = (folder / "states").iterdir()
    tensors, metadata = files.contents(path)
    standing = change.get("standing") or json.dumps({**json.loads(metadata["standing"]), **change})
    files.write(path, tensors, {**metadata, "standing": standing})
    code, error = fails(capsys, monkeypatch, *TRAIN, "--out", str(folder), "--resume")
    assert (code, "saved state" in error) == (1, True), error


def test_two_processes_do_not_train_in_one_folder(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    with alone(folder) as free:
        assert free
        code, error = fails(capsys, monkeypatch, *TRAIN, "--out", str(folder), "--resume")
    assert (code, "another process trains in" in error) == (1, True), error
    assert call(*TRAIN, "--out", str(folder), "--resume").exit_code == 0
