"""The command line, as a user calls it; what it prints, what it leaves, and its exit codes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

import purecnn
from converters import checkpoint, cli, files
from converters import torchvision as tv
from purecnn import data, random


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*words: str) -> Result:
    return CliRunner().invoke(cli.app, list(words))


def fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str]:
    """Exit code and error of the whole program."""
    monkeypatch.setattr("sys.argv", ["purecnn", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0), " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().err).split())


def make_pictures(root: Path, broken: bool = False) -> Path:
    """Dark and bright squares, in the layout of ImageFolder."""
    for half in ("train", "val"):
        for name, level in (("bright", 220), ("dark", 30)):
            for i in range(6):
                path = root / half / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (40, 36), (level + i, level, level - i)).save(path)
    if broken:
        (root / "train" / "dark" / "notes.txt").write_text("no picture")
    return root


def test_list() -> None:
    result = call("list", "resnet*")
    assert result.exit_code == 0
    assert "resnet18" in result.output
    assert "25,557,032" in result.output
    assert "V1 76.1, V2 80.9" in result.output
    rows = json.loads(call("list", "mobilenet*", "--json").output)
    assert [row["name"] for row in rows] == purecnn.list_models("mobilenet*")
    rows = [row for row in rows if row["name"] == "mobilenet_v2"]
    assert rows[0]["weights"]["IMAGENET1K_V2"] == {"acc@1": 72.154, "acc@5": 90.822}
    assert rows[0]["elsewhere"] == {"timm": "mobilenetv2_100.ra_in1k"}
    assert re.search(r"xception .*arXiv:1610\.02357\s+timm\s*\n", call("list", "xception").output)


def test_a_command_has_nothing_to_complain_about() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from converters.cli import main; main()", "inspect", "lenet5"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "61,706" in done.stdout
    assert done.stderr == ""


def test_inspect() -> None:
    result = call("inspect", "lenet5")
    assert "61,706" in result.output
    assert re.search(r"stage1\s+16 x 5 x 5\s+2,416", result.output)
    rows = json.loads(call("inspect", "resnet50", "--json").output)
    assert rows[0] == {"path": "", "output": [1000], "parameters": 25557032, "macs": 4089184256}
    assert json.loads(call("inspect", "resnet18", "--classes", "7", "--json").output)[0]["output"] == [7]


def test_train_evaluate_predict(folder: Path) -> None:
    result = call("train", "lenet5", "--data", "digits", "--epochs", "2", "--out", "run", "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["test_accuracy"] > 0.5
    names = "checkpoint.safetensors metrics.csv curves.png confusion.png report.html config.json example.png states"
    assert {path.name for path in (folder / "run").iterdir()} == set(names.split())
    assert len((folder / "run" / "metrics.csv").read_text().splitlines()) == 3

    found = json.loads(call("evaluate", "run/checkpoint.safetensors", "--data", "digits", "--json").stdout)
    assert found["accuracy"] == pytest.approx(summary["test_accuracy"])
    assert found["per_class"].keys() == set("0123456789")

    answer = json.loads(call("predict", "run/example.png", "--from", "run/checkpoint.safetensors", "--json").stdout)
    assert len(answer[0]["answers"]) == 5
    assert Path(answer[0]["picture"]).read_bytes().startswith(b"\x89PNG")

    # Pictures of one name in different folders do not overwrite each other's answers.
    for place in ("a/x.png", "b/x.png", "c/x-2.png"):
        Path(place).parent.mkdir()
        Path(place).write_bytes(Path("run/example.png").read_bytes())
    words = ("predict", "a/x.png", "b/x.png", "c/x-2.png", "--from", "run/checkpoint.safetensors", "--json")
    found = [Path(answer["picture"]).name for answer in json.loads(call(*words).stdout)]
    assert found == ["x-prediction.png", "x-2-prediction.png", "x-2-2-prediction.png"]
    assert {path.name for path in Path("predictions").iterdir()} == {*found, "example-prediction.png"}

    again = json.loads((folder / "run" / "config.json").read_text())["command"].split()
    assert call(*again[1:], "--out", "again").exit_code == 0
    first, second = (files.read(folder / run / "checkpoint.safetensors") for run in ("run", "again"))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_folders_in_place_of_files(folder: Path) -> None:
    assert call("train", "lenet5", "--epochs", "1", "--batch-size", "500", "--out", "run").exit_code == 0
    assert call("evaluate", "run").exit_code == 0
    for name in ("some/b.png", "some/a.PNG", "some/deep/c.png", "some/.d.png", "empty/notes.txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(Path("run/example.png").read_bytes())
    for command in ("predict", "explain"):
        words = (command, "some", "run/example.png", "--from", "run", "--out", "run", "--json")
        found = json.loads(call(*words).stdout)
        found = found["images"] if command == "explain" else found
        assert [each["image"] for each in found] == ["some/a.PNG", "some/b.png", "run/example.png"]
    assert Path("run/explanation.png").is_file()
    for words, message in (
        (("predict", "empty", "--from", "run"), "empty contains no images"),
        (("evaluate", "some"), "some/checkpoint.safetensors does not exist"),
    ):
        result = call(*words)
        assert result.exit_code == 2
        assert message in " ".join(re.sub("[│╭╮╰╯─]", " ", result.output).split())


def test_events_on_request(folder: Path) -> None:
    words = ("train", "lenet5", "--epochs", "1", "--batch-size", "500", "--out", "run", "--tensorboard")
    result = call(*words)
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        assert "pip install tensorboard" in str(result.exception)
    else:
        assert result.exit_code == 0, result.output
        assert list((folder / "run" / "events").iterdir())


def test_a_run_overwrites_nothing(folder: Path) -> None:
    (folder / "run").mkdir()
    (folder / "run" / "thesis.txt").write_text("mine")
    result = call("train", "lenet5", "--out", "run")
    assert result.exit_code == 2
    assert "not empty" in result.output
    assert [path.name for path in (folder / "run").iterdir()] == ["thesis.txt"]
    (folder / "x.safetensors").touch()
    assert call("convert", "x.safetensors", "x.safetensors").exit_code == 2


@pytest.mark.parametrize(
    "words",
    [
        ("train", "lenet5", "--out"),
        ("train", "lenet5", "--resume", "--out"),
        ("predict", "x.png", "--from", "x.safetensors", "--out"),
        ("recipe", "lenet-cifar10", "--out"),
        ("recipe", "digit-ensemble", "--out"),
    ],
)
def test_a_place_that_cannot_be_written_to_is_known_at_once(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.setattr(data, "load", None)
    (folder / "x.png").write_text("mine")
    for place in ("x.png", "x.png/deep/run"):
        code, error = fails(capsys, monkeypatch, *words, place)
        assert (code, "'--out': x.png is not a folder" in error) == (2, True), error
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked" or not mode & os.W_OK)
    (folder / "locked").mkdir()
    for place in ("locked", "locked/run"):
        code, error = fails(capsys, monkeypatch, *words, place)
        assert (code, "locked cannot be written into: permission denied" in error) == (2, True), error
    assert (folder / "x.png").read_text() == "mine"


def test_fine_tune_from_torchvisions_names(folder: Path) -> None:
    model = purecnn.create("squeezenet1_1", num_classes=5)
    files.write("weights.pth", tv.to_state_dict(model, *model.init(random.key(0))))
    make_pictures(folder / "pictures")
    words = ["train", "squeezenet1_1", "--from", "weights.pth", "--data", "pictures", "--epochs", "1"]
    result = call(*words, "--image-size", "40", "--head-epochs", "1", "--out", "run")
    assert result.exit_code == 0, result.output
    tuned, params, _ = checkpoint.load("run/checkpoint.safetensors")
    assert tuned.num_classes == 2
    before = tv.from_state_dict(model, files.read("weights.pth"))[0]
    assert torch.equal(params["stem"]["conv"]["weight"], before["stem"]["conv"]["weight"])
    assert checkpoint.about("run/checkpoint.safetensors").classes == ("bright", "dark")


def test_convert_there_and_back(folder: Path) -> None:
    model = purecnn.create("squeezenet1_1")
    state_dict = tv.to_state_dict(model, *model.init(random.key(0)))
    files.write("theirs.pth", state_dict)
    assert call("convert", "theirs.pth", "ours.safetensors", "--model", "squeezenet1_1").exit_code == 0
    assert checkpoint.about("ours.safetensors").classes is not None
    assert call("convert", "ours.safetensors", "back.pth", "--to", "torchvision").exit_code == 0
    back = files.read("back.pth")
    assert list(back) == list(state_dict)
    assert all(torch.equal(back[key], tensor) for key, tensor in state_dict.items())


def test_convert_what_a_wrapped_grey_network_left_of_its_training(folder: Path) -> None:
    model = purecnn.create("squeezenet1_1", num_classes=7, in_channels=1)
    state_dict = tv.to_state_dict(model, *model.init(random.key(0)))
    wrapped = {f"module.{key}": tensor for key, tensor in state_dict.items()}
    torch.save({"model": wrapped, "ema": wrapped, "epoch": 3}, "run.pth")
    words = ("convert", "run.pth", "ours.safetensors", "--model", "squeezenet1_1")
    assert "say which" in str(call(*words).exception)
    assert not Path("ours.safetensors").exists()
    assert "an entry is part of a file" in str(call("convert", "DEFAULT", *words[2:], "--entry", "model").exception)
    result = call(*words, "--entry", "model")
    assert result.exit_code == 0, result.output
    found, params, state = checkpoint.load("ours.safetensors")
    assert (found.num_classes, found.in_channels) == (7, 1)
    assert all(torch.equal(tensor, state_dict[key]) for key, tensor in tv.to_state_dict(found, params, state).items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_weights_of_other_types_are_computed_with_and_converted_as_they_are(folder: Path, dtype: torch.dtype) -> None:
    model = purecnn.create("lenet5")
    params, state = (
        purecnn.tree.map(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, part)
        for part in model.init(random.key(0))
    )
    prepare = data.load("digits").preprocessing.adapt(size=32)
    checkpoint.save("x.safetensors", model, params, state, preprocessing=prepare, classes=list("0123456789"))
    Image.new("L", (8, 8)).save("x.png")
    for words in (
        ("evaluate", "x.safetensors"),
        ("predict", "x.png", "--from", "x.safetensors"),
        ("explain", "x.png", "--from", "x.safetensors", "--method", "input"),
        ("train", "lenet5", "--from", "x.safetensors", "--epochs", "1", "--batch-size", "500"),
        ("convert", "x.safetensors", "y.safetensors"),
    ):
        result = call(*words)
        assert result.exit_code == 0, (words, result.output, result.exception)
    assert {leaf.dtype for leaf in files.read("y.safetensors").values()} == {dtype}


def test_verify() -> None:
    rows = json.loads(call("verify", "squeezenet1_1", "--image-size", "64", "--json").stdout)
    assert rows[0]["model"] == "squeezenet1_1"
    assert rows[0]["equal"] is True


def test_verify_notices_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*words: object, **settings: object) -> object:
        params, state = right(*words, **settings)  # type: ignore[arg-type]
        params["head"]["conv"]["bias"] = params["head"]["conv"]["bias"] + 1
        return params, state

    right = tv.from_state_dict
    monkeypatch.setattr(tv, "from_state_dict", wrong)
    result = call("verify", "squeezenet1_1", "--image-size", "64")
    assert result.exit_code == 1
    assert "DIFFERS" in result.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "resnt50"], "did you mean resnet50"),
        (["train", "lenet5", "--data", "digts"], "digits"),
        (["train", "lenet5", "--epochs", "0"], "--epochs"),
        (["train", "lenet5", "--bogus"], "--bogus"),
        (["train", "lenet5", "--mixup", "0"], "0.0 should be greater than 0"),
        (["train", "lenet5", "--cutmix", "0"], "'--cutmix'"),
        (["train", "lenet5", "--average", "0"], "0.0 should be between 0 and 1"),
        (["train", "lenet5", "--average", "1"], "'--average'"),
        (["train", "lenet5", "--device", "abacus"], "abacus"),
        (["train", "lenet5", "--device", "meta"], "meta"),
        (["train", "lenet5", "--momentum", "1"], "1.0 should be less than 1"),
        (["train", "lenet5", "--clip", "0"], "0.0 should be greater than 0"),
        (["train", "lenet5", "--lr", "-1"], "greater than or equal to 0"),
        (["evaluate", "none.safetensors"], "none.safetensors does not exist"),
        (["predict", "none.png", "--from", "x.safetensors"], "none.png does not exist"),
        (["predict", __file__], "DEFAULT does not say which model its weights are for: name it with --model NAME"),
        (["convert", "x.safetensors", "out.pth"], "to write a state_dict to out.pth, add --to torchvision"),
        (["list", "xyz*"], "xyz"),
        (["verify"], "--all"),
        (["inspect"], "MODEL"),
    ],
)
def test_misuse(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    message: str,
) -> None:
    code, error = fails(capsys, monkeypatch, *words)
    assert code == 2
    assert message in error
    assert not any(folder.iterdir())


def test_weights_of_no_model(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "weights.pth"
    torch.save({"weight": torch.zeros(1)}, file)
    code, error = fails(capsys, monkeypatch, "predict", __file__, "--from", str(file))
    assert code == 2
    assert "does not say which model its weights are for: name it with --model NAME" in error


def test_failures(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = purecnn.create("lenet5")
    checkpoint.save("good.safetensors", model, *model.init(random.key(0)), classes=list("abcdefghij"))
    Path("cut.safetensors").write_bytes(Path("good.safetensors").read_bytes()[:500])
    make_pictures(folder / "pictures", broken=True)
    Path("text.png").write_text("no picture")
    for words, message in [
        (["evaluate", "cut.safetensors"], "cut.safetensors is damaged"),
        (["evaluate", "good.safetensors", "--data", "digits"], "classes"),
        (["train", "squeezenet1_1", "--from", "good.safetensors"], "a checkpoint of lenet5, not of squeezenet1_1"),
        (["train", "squeezenet1_1", "--data", "pictures"], "notes.txt"),
        (["train", "lecun1989", "--data", "digits", "--mixup", "0.2"], "lecun1989 has a loss of its own"),
        (["train", "resnet18", "--data", "digits", "--image-size", "8", "--lr", "1e30", "--epochs", "1"], "loss is"),
        (
            ["train", "squeezenet1_1", "--image-size", "8"],
            "of 8 x 8 pixels are too small for squeezenet1_1, which needs",
        ),
        (["inspect", "alexnet", "--image-size", "4"], "of 4 x 4 pixels are too small for alexnet, which needs 63 x 63"),
        (["predict", "text.png", "--from", "good.safetensors"], "how its images are prepared"),
    ]:
        code, error = fails(capsys, monkeypatch, *words)
        assert (code, message in error) == (1, True), f"{words}: {error}"


def test_what_is_written_may_be_a_folder_and_names_may_look_like_markup(folder: Path) -> None:
    model = purecnn.create("lenet5", num_classes=2, in_channels=1)
    seen = data.Preprocessing(size=32, channels=1, resize=32, mean=(0.0,), std=(1.0,))
    names = ["[bold]", "[/red]"]
    checkpoint.save("c.safetensors", model, *model.init(random.key(0)), preprocessing=seen, classes=names)
    (folder / "[red]").mkdir()
    Image.new("L", (32, 32)).save(folder / "[red]" / "x.png")
    result = call("predict", "[red]/x.png", "--from", "c.safetensors", "--out", "[red]")
    assert result.exit_code == 0, result.output
    assert all(name in result.output for name in ("[red]/x.png", "[bold]", "[/red]"))
    result = call("explain", "[red]/x.png", "--from", "c.safetensors", "--method", "input", "--out", "[red]")
    assert result.exit_code == 0, result.output
    assert {path.name for path in (folder / "[red]").iterdir()} == {"x.png", "x-prediction.png", "explanation.png"}


def test_what_is_read_is_not_overwritten(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = purecnn.create("lenet5")
    seen = data.Preprocessing(size=32, channels=1, resize=32, mean=(0.0,), std=(1.0,))
    checkpoint.save("c.safetensors", model, *model.init(random.key(0)), preprocessing=seen)
    for name in ("a.png", "a-prediction.png"):
        Image.new("L", (32, 32), 99).save(name)
    before = Path("a-prediction.png").read_bytes()
    for words, message in (
        (("explain", "a.png", "--out", "a.png"), "a.png is an input and would be overwritten"),
        (("explain", "a.png", "--out", "why.jpg"), "why.jpg should end in .png"),
        (("explain", "a.png", "--out", "c.safetensors"), "should end in .png"),
        (("predict", ".", "--out", "."), "a-prediction.png is an input and would be overwritten"),
        (("predict", "a.png", "--from", "run99"), "there is no file or folder run99"),
    ):
        code, error = fails(capsys, monkeypatch, *words, *(() if "--from" in words else ("--from", "c.safetensors")))
        assert (code, message in error) == (2, True), error
    assert Path("a-prediction.png").read_bytes() == before


def test_numbers_that_are_none(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = purecnn.create("lenet5")
    params, state = model.init(random.key(0))
    seen = data.load("digits").preprocessing.adapt(size=32)
    nothing = purecnn.tree.map(lambda leaf: leaf * torch.nan, params)
    checkpoint.save("c.safetensors", model, nothing, state, preprocessing=seen, classes=list("0123456789"))
    Image.new("L", (32, 32)).save("x.png")
    code, error = fails(capsys, monkeypatch, "predict", "x.png", "--from", "c.safetensors")
    assert (code, "not finite for x.png" in error) == (1, True), error
    result = call("evaluate", "c.safetensors", "--data", "digits", "--json")
    assert json.loads(result.stdout, parse_constant=pytest.fail)["loss"] is None


def test_a_batch_of_one_picture_is_refused_at_once_where_a_network_cannot_have_it(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_pictures(folder / "pictures")
    words = ("--data", "pictures", "--image-size", "32", "--epochs", "1", "--out", "run")
    for sizes in (("--batch-size", "11"), ("--batch-size", "3", "--accumulate", "2")):
        code, error = fails(capsys, monkeypatch, "train", "resnet18", *words, *sizes)
        assert code == 1
        assert f"with 12 training images and --batch-size {sizes[1]}, some step gets a single image" in error
        assert not (folder / "run").exists()
    assert call("train", "squeezenet1_1", *words, "--batch-size", "11").exit_code == 0


def test_what_is_no_picture_can_be_skipped(folder: Path) -> None:
    make_pictures(folder / "pictures", broken=True)
    words = ["train", "squeezenet1_1", "--data", "pictures", "--image-size", "40", "--epochs", "1", "--skip-bad"]
    result = call(*words, "--out", "run")
    assert result.exit_code == 0, result.output
    assert "notes.txt" in (folder / "run" / "config.json").read_text()


def test_the_library_does_not_know_the_converters() -> None:
    package = Path(purecnn.__file__).parent
    assert not [path for path in package.rglob("*.py") if re.search(r"(import|from) converters", path.read_text())]
    assert data.names()[0] == "digits"
