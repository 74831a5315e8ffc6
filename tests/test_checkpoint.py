"""Checkpoints and files of tensors: what is saved comes back, and bad files are refused by name."""

import errno
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.func import vmap

import purecnn
from converters import checkpoint, files, sources, states
from converters import torchvision as tv
from converters.arguments import load_source
from converters.rules import ConversionError
from purecnn import Model, ensembles, random, serial, tree
from purecnn.data import Preprocessing
from purecnn.fold import fold
from purecnn.layers import stateless
from purecnn.optimizers import sgd
from purecnn.training import Position, TrainState


def same(first: tree.Tree, second: tree.Tree) -> bool:
    a, b = tree.flatten(first), tree.flatten(second)
    return list(a) == list(b) and all(torch.equal(a[path], b[path]) for path in a)


@given(
    name=st.sampled_from(["lenet5", "squeezenet1_1"]),
    classes=st.integers(1, 20),
    channels=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_save_then_load_is_the_identity(
    tmp_path_factory: pytest.TempPathFactory, name: str, classes: int, channels: int, seed: int
) -> None:
    path = tmp_path_factory.mktemp("checkpoint") / "x.safetensors"
    model = purecnn.create(name, num_classes=classes, in_channels=channels)
    params, state = model.init(random.key(seed))
    prepare = Preprocessing(size=32, resize=40)
    checkpoint.save(path, model, params, state, preprocessing=prepare, classes=[f"class {i}" for i in range(classes)])
    loaded, params_again, state_again = checkpoint.load(path)
    assert (loaded.name, json.dumps(dict(loaded.settings))) == (name, json.dumps(dict(model.settings)))
    assert same(params, params_again)
    assert same(state, state_again)
    about = checkpoint.about(path)
    assert about.preprocessing == prepare
    assert about.classes == tuple(f"class {i}" for i in range(classes))


def test_statistics_and_their_order_come_back(tmp_path: Path) -> None:
    model = purecnn.create("resnet18", num_classes=3, in_channels=1)
    params, state = model.init(random.key(0))
    checkpoint.save(tmp_path / "x.safetensors", model, params, state)
    _, params_again, state_again = checkpoint.load(tmp_path / "x.safetensors")
    assert same(params, params_again)
    assert same(state, state_again)


def test_shared_strided_and_partial_tensors_are_written(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(2, 3, 2, 2)
    tensors = {
        "whole": base,
        "again": base,
        "part": base[1],
        "turned": base.transpose(0, 1),
        "channels_last": base.contiguous(memory_format=torch.channels_last),
    }
    files.write(tmp_path / "x.safetensors", tensors)
    found = files.read(tmp_path / "x.safetensors")
    assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_state_dict_keeps_order_and_versions(tmp_path: Path, suffix: str) -> None:
    model = purecnn.create("resnet18", num_classes=2)
    state_dict = tv.to_state_dict(model, *model.init(random.key(0)))
    files.write(tmp_path / f"x{suffix}", state_dict)
    found = files.read(tmp_path / f"x{suffix}")
    assert list(found) == list(state_dict)
    assert found._metadata == state_dict._metadata  # type: ignore[attr-defined]
    assert all(torch.equal(found[key], tensor) for key, tensor in state_dict.items())


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = purecnn.create("lenet5")
    path = tmp_path / "x.safetensors"
    params, state = model.init(random.key(0))
    checkpoint.save(path, model, params, state)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(files, "save_file", fail)
    with pytest.raises(OSError, match="full"):
        checkpoint.save(path, model, *model.init(random.key(1)))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


WRITER = """
import sys
from purecnn.files import replacing
with replacing(sys.argv[1]) as file:
    file.write_text("new")
    (file.parent / ".tmpPmyP8I").write_text("half of")  # as safetensors does
    print(flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(os.name != "posix", reason="locks are POSIX's")
def test_what_a_killed_process_left_goes_and_what_a_live_one_writes_stays(tmp_path: Path) -> None:
    path = tmp_path / "[x].safetensors"
    words = [sys.executable, "-c", WRITER, str(path)]
    killed, live = (subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2))
    with killed, live:
        for process in (killed, live):
            assert process.stdout is not None
            process.stdout.readline()
        killed.kill()
        killed.wait()
        halves = {folder.name for folder in tmp_path.iterdir()}
        assert len(halves) == 2
        others = {f"{next(iter(halves))[:-17]}.{word}" for word in ("0123", "backup", "g" * 16)}
        others |= {".[x].safetensors.another-machine.0123456789abcdef", ".tmpPmyP8I"}
        for name in others:
            (tmp_path / name).mkdir()
            (tmp_path / name / "file").touch()
        files.write(path, {"x": torch.zeros(1)})
        assert files.read(path)["x"] == 0
        assert len({folder.name for folder in tmp_path.iterdir()} & halves) == 1
        live.communicate()
    assert path.read_text() == "new"
    assert {folder.name for folder in tmp_path.iterdir()} == {path.name, *others}


@pytest.mark.skipif(os.name != "posix", reason="rights are POSIX's")
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_rights_are_those_of_the_umask(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a change of it, which other threads would see."""
    before = os.umask(0o027)
    with monkeypatch.context() as patched:
        patched.setattr(os, "umask", None)
        try:
            files.write(tmp_path / f"x{suffix}", {"x": torch.zeros(1)})
        finally:
            patched.undo()
            os.umask(before)
    assert (tmp_path / f"x{suffix}").stat().st_mode & 0o777 == 0o640
    assert len(list(tmp_path.iterdir())) == 1


def write_checkpoint(path: Path, number: int) -> None:
    model = purecnn.create("lenet5", num_classes=number)
    checkpoint.save(path, model, *model.init(random.key(0)), classes=[str(i) for i in range(number)])


def read_checkpoint(path: Path) -> tuple[int, int]:
    model, params, _ = checkpoint.load(path)
    return model.num_classes, len(params["head"]["linear"]["bias"])


def read_source(path: Path) -> tuple[int, int]:
    source = sources.load(path)
    return len(source.classes or ()), len(source.params["head"]["linear"]["bias"])


def write_state(path: Path, number: int) -> None:
    begin = TrainState.start(*purecnn.create("lenet5").init(random.key(0)), sgd(0.1))
    position = Position.start(begin._replace(step=begin.step + number))._replace(epoch=number)
    states.save(path.parent, 1, states.Standing(0, position, ()), keep=1)


def read_state(path: Path) -> tuple[int, int]:
    standing = states.load(path.parent)
    assert standing is not None
    return standing.position.epoch, int(standing.position.train_state.step)


@pytest.mark.parametrize("when", ["after it was opened", "between its description and its numbers"])
@pytest.mark.parametrize(
    ("write", "read"),
    [(write_checkpoint, read_checkpoint), (write_checkpoint, read_source), (write_state, read_state)],
    ids=["checkpoint", "source", "state"],
)
def test_of_a_file_that_is_replaced_one_is_read(
    write: Callable[[Path, int], None],
    read: Callable[[Path], tuple[int, int]],
    when: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "00000001.safetensors"
    others = [tmp_path / "second", tmp_path / "third"]
    for number, other in enumerate(others, start=2):
        write(path, number)
        path.rename(other)
    write(path, 1)

    def replaces(function: Callable[..., Any], first: bool) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            result = None if first else function(*args, **kwargs)
            if others:
                others.pop(0).replace(path)
            return function(*args, **kwargs) if first else result

        return run

    if when == "after it was opened":
        monkeypatch.setattr(files, "safe_open", replaces(files.safe_open, first=False))
    else:  # safetensors has torch open the file for the second time
        storage = torch.UntypedStorage
        monkeypatch.setattr(storage, "from_file", replaces(storage.from_file, first=True))
    described, held = read(path)
    assert described == held
    assert not others


def test_trees_of_another_model_are_not_saved(tmp_path: Path) -> None:
    params, state = purecnn.create("lenet5", num_classes=3).init(random.key(0))
    with pytest.raises(ConversionError, match=r"head\.linear\.weight .*expected \(10, 84\), found \(3, 84\)"):
        checkpoint.save(tmp_path / "x.safetensors", purecnn.create("lenet5"), params, state)
    assert not any(tmp_path.iterdir())


def test_members_are_saved_one_by_one(tmp_path: Path) -> None:
    model = purecnn.create("resnet18", num_classes=2)
    stacked = vmap(model.init)(random.split(random.key(0), 3))
    with pytest.raises(ConversionError, match=r"first axis of 3 members\), .*unstack\(\(params, state\)\)"):
        checkpoint.save(tmp_path / "x.safetensors", model, *stacked)
    for params, state in ensembles.unstack(stacked)[2:]:
        checkpoint.save(tmp_path / "x.safetensors", model, params, state)
        _, params_again, state_again = checkpoint.load(tmp_path / "x.safetensors")
        assert same(params, params_again)
        assert same(state, state_again)


def test_folded_networks_are_not_saved(tmp_path: Path) -> None:
    model = purecnn.create("resnet18", num_classes=2)
    with pytest.raises(ConversionError, match="save the network before it is folded"):
        checkpoint.save(tmp_path / "x.safetensors", *fold(model, *model.init(random.key(0))))
    doubled = serial(stateless(lambda x: 2 * x), model.layer)  # the names and shapes of the parameters are the same
    for other in (replace(model, layer=doubled), Model.of(doubled, num_classes=2, name="resnet18")):
        with pytest.raises(ConversionError, match="not folded or otherwise changed"):
            checkpoint.save(tmp_path / "x.safetensors", other, *model.init(random.key(0)))
        with pytest.raises(ConversionError, match=r"no counterpart of resnet18 with a layer that"):
            tv.to_module(other, *model.init(random.key(0)))
    assert not any(tmp_path.iterdir())


def test_names_are_as_many_as_the_classes(tmp_path: Path) -> None:
    model = purecnn.create("lenet5", num_classes=3)
    with pytest.raises(ConversionError, match="lenet5 has 3 classes, but 2 class names are given"):
        checkpoint.save(tmp_path / "x.safetensors", model, *model.init(random.key(0)), classes=["a", "b"])
    assert not any(tmp_path.iterdir())


def test_a_checkpoint_is_no_state_dict_of_torch(tmp_path: Path) -> None:
    """A .pth file would lose the metadata, and could not be loaded again."""
    model = purecnn.create("lenet5")
    with pytest.raises(files.FileError, match=r"x\.pth should end in \.safetensors"):
        checkpoint.save(tmp_path / "x.pth", model, *model.init(random.key(0)))
    assert not any(tmp_path.iterdir())


def test_bad_files_are_named(tmp_path: Path) -> None:
    model = purecnn.create("lenet5")
    good = tmp_path / "good.safetensors"
    checkpoint.save(good, model, *model.init(random.key(0)))
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(good.read_bytes()[:1000])
    foreign = tmp_path / "foreign.safetensors"
    save_file({"x": torch.zeros(1)}, foreign)
    noise = tmp_path / "noise.pth"
    noise.write_bytes(b"this is no pickle")
    pickled = tmp_path / "pickled.pth"
    torch.save({"model": object}, pickled)
    for path, read in [
        (tmp_path / "none.safetensors", checkpoint.load),
        (tmp_path / "none.pth", files.read),
        (cut, checkpoint.load),
        (foreign, checkpoint.load),
        (noise, files.read),
        (pickled, files.read),
    ]:
        with pytest.raises(files.FileError, match=path.name):
            read(path)
    with pytest.raises(files.FileError, match=r"\.safetensors or \.pth"):
        files.write(tmp_path / "x.txt", {})


def test_what_else_a_file_may_hold_is_named(tmp_path: Path) -> None:
    weights = {"weight": torch.zeros(1)}
    for found, message in [
        (
            {"state_dict": weights, "ema": weights, "x": weights["weight"]},
            "under 'state_dict' and under 'ema': say which",
        ),
        ({"epoch": 3, "optimizer": {}}, "a dictionary of epoch, optimizer"),
        ([torch.zeros(1)], "of tensors but a list"),
        (torch.zeros(1), "of tensors but a Tensor"),
    ]:
        torch.save(found, tmp_path / "x.pth")
        with pytest.raises(files.FileError, match=rf"x\.pth holds .*{message}"):
            files.read(tmp_path / "x.pth")


def test_a_state_dict_in_a_training_checkpoint(tmp_path: Path) -> None:
    first, second = {"weight": torch.zeros(1)}, {"weight": torch.ones(1)}
    path = tmp_path / "x.pth"
    torch.save({"model": first, "optimizer": {"state": {0: second}}, "epoch": 3}, path)
    assert files.read(path) == files.read(path, "model") == first
    torch.save({"model": first, "model_ema": second}, path)
    assert files.read(path, "model_ema") == second
    with pytest.raises(files.FileError, match="under 'model' and under 'model_ema': there is no entry 'ema'"):
        files.read(path, "ema")
    torch.save(first, path)
    with pytest.raises(files.FileError, match="under no name: there is no entry 'model'"):
        files.read(path, "model")
    files.write(tmp_path / "x.safetensors", first)
    with pytest.raises(files.FileError, match=r"no entries: leave out entry \(found 'model'\)"):
        files.read(tmp_path / "x.safetensors", "model")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
def test_files_of_another_kind_say_what_they_are(tmp_path: Path) -> None:
    module = nn.Linear(2, 2)
    torch.save(module, tmp_path / "whole.pth")
    torch.save(module, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.save(module.state_dict(), tmp_path / "good.pth")
    files.write(tmp_path / "good.safetensors", module.state_dict())
    (tmp_path / "other.pth").write_bytes(pickle.dumps({"x": 1}, protocol=4))
    good = {ending: (tmp_path / f"good{ending}").read_bytes() for ending in (".pth", ".safetensors")}
    (tmp_path / "renamed.pth").write_bytes(good[".safetensors"])
    (tmp_path / "renamed.safetensors").write_bytes(good[".pth"])
    for ending, whole in good.items():
        (tmp_path / f"cut{ending}").write_bytes(whole[:-20])
        (tmp_path / f"page{ending}").write_text("<!DOCTYPE html><html></html>")
        (tmp_path / f"empty{ending}").touch()
        (tmp_path / f"folder{ending}").mkdir()
    for name, words in {
        "whole.pth": r"holds a whole module .*\(torch\.nn\.modules\.linear\.Linear\): save module\.state_dict\(\)",
        "old.pth": r"holds a whole module .*: save module\.state_dict\(\)",
        "other.pth": r"holds a pickle of .*save module\.state_dict\(\)",
        "renamed.pth": r"is a \.safetensors file, so its name should end in \.safetensors",
        "renamed.safetensors": r"is a file that torch saved, so its name should end in \.pth",
        "cut.pth": "is damaged",
        "cut.safetensors": "is damaged",
        **{f"page{ending}": "is damaged, or not a file of tensors: it begins with b'<!DOCTYPE" for ending in good},
        **{f"empty{ending}": "is empty" for ending in good},
        **{f"folder{ending}": "is a folder" for ending in good},
    }.items():
        with pytest.raises(files.FileError, match=rf"{name} {words}") as caught:
            files.read(tmp_path / name)
        assert "weights_only" not in str(caught.value)
        assert "\x1b" not in str(caught.value)
    with pytest.raises(
        files.FileError, match=r"good\.pth is not a purecnn checkpoint; .*: purecnn convert .* --model NAME"
    ):
        checkpoint.load(tmp_path / "good.pth")


def test_a_checkpoint_of_an_unknown_model(tmp_path: Path) -> None:
    metadata = {
        "format": checkpoint.FORMAT,
        "model": "lenet6",
        "settings": "{}",
        "preprocessing": "null",
        "classes": "null",
    }
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors", metadata)
    with pytest.raises(files.FileError, match=r"lenet6.*did you mean lenet5"):
        checkpoint.load(tmp_path / "x.safetensors")


def test_sources(tmp_path: Path) -> None:
    model = purecnn.create("squeezenet1_1", num_classes=7)
    params, state = model.init(random.key(0))
    checkpoint.save(tmp_path / "ours.safetensors", model, params, state, classes=list("abcdefg"))
    files.write(tmp_path / "theirs.pth", tv.to_state_dict(model, params, state))
    ours = sources.load(tmp_path / "ours.safetensors")
    theirs = sources.load(tmp_path / "theirs.pth", "squeezenet1_1")
    assert same(ours.params, theirs.params)
    assert (ours.classes, theirs.classes) == (tuple("abcdefg"), None)
    assert theirs.model.num_classes == 7  # counted in the file
    assert not ours.assumed
    assert not theirs.assumed
    with pytest.raises(ConversionError, match="checkpoint of squeezenet1_1, not of lenet5"):
        sources.load(tmp_path / "ours.safetensors", "lenet5")
    with pytest.raises(ConversionError, match="which model its weights are for: name it"):
        sources.load(tmp_path / "theirs.pth")
    with pytest.raises(ConversionError, match="does not say which model"):
        sources.load("DEFAULT")


def test_weights_with_a_thousand_classes_are_imagenets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = purecnn.create("squeezenet1_1")
    files.write(tmp_path / "x.safetensors", tv.to_state_dict(model, *model.init(random.key(0))))
    found = sources.load(tmp_path / "x.safetensors", "squeezenet1_1")
    assert found.classes is not None
    assert found.assumed
    load_source(str(tmp_path / "x.safetensors"), "squeezenet1_1")
    assert "does not have the name of a file of torchvision's" in capsys.readouterr().err
    assert found.classes[:2] == ("tench", "goldfish")
    assert found.preprocessing == Preprocessing()


def test_a_file_that_others_changed_keeps_all_its_tensors(tmp_path: Path) -> None:
    module = torch.nn.Linear(2, 3)
    path = tmp_path / "x.safetensors"
    for change in ({"extra": torch.zeros(1)}, {"bias": None}):
        files.write(path, module.state_dict())
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        changed = {key: leaf for key, leaf in {**module.state_dict(), **change}.items() if leaf is not None}
        save_file(changed, path, metadata)
        assert files.read(path).keys() == changed.keys()
        save_file(changed, path, {**metadata, "torch_metadata": "5"})
        assert files.read(path).keys() == changed.keys()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_full_disk_is_an_error_that_names_the_file(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **named: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def refused(*args: Any, **named: Any) -> None:
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr(files, "save_file", refused)
    path = tmp_path / f"x{suffix}"
    with pytest.raises((OSError, files.FileError), match=rf"x{suffix}") as caught:
        files.write(path, {"w": torch.zeros(3)})
    assert "No space left" in str(caught.value)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("classes", "words"),
    [(["a", "b"], "10 classes, found 2 class names"), (list(range(10)), "a list of strings"), ("0123456789", "list")],
)
def test_names_in_a_file_are_those_of_its_classes(classes: Any, words: str, tmp_path: Path) -> None:
    model, path = purecnn.create("lenet5"), tmp_path / "x.safetensors"
    checkpoint.save(path, model, *model.init(random.key(0)))
    found = files.contents(path)
    files.write(path, found.tensors, {**found.metadata, "classes": json.dumps(classes)})
    with pytest.raises(files.FileError, match=words):
        checkpoint.load(path)


def test_a_checkpoint_holds_a_network_and_nothing_else(tmp_path: Path) -> None:
    model, path = purecnn.create("lenet5"), tmp_path / "x.safetensors"
    checkpoint.save(path, model, *model.init(random.key(0)))
    found = files.contents(path)
    files.write(path, {**found.tensors, "junk": torch.zeros(1)}, found.metadata)
    with pytest.raises(ConversionError, match=r"x\.safetensors holds tensors outside of params and state: junk"):
        checkpoint.load(path)
    fewer = {key: leaf for key, leaf in found.tensors.items() if not key.endswith("linear2.bias")}
    files.write(path, fewer, found.metadata)
    with pytest.raises(ConversionError, match=r"x\.safetensors: .*linear2\.bias"):
        checkpoint.load(path)
    files.write(path, found.tensors, {**found.metadata, "format": "purecnn-99"})
    with pytest.raises(files.FileError, match="of the format purecnn-99"):
        sources.load(path)
