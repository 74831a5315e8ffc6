"""Files of networks and functions do what the functions do."""

import errno
import functools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.testing import assert_close

import purecnn
from converters import checkpoint, export
from converters.export import ExportError
from converters.files import FileError
from purecnn import ensembles, random
from purecnn.optimizers import adamw, sgd
from purecnn.per_sample import per_sample_gradients
from purecnn.privacy import make_private_step
from purecnn.step import TrainState, make_step
from tests.table import CASES, COMPILER, Case
from tests.test_cli import call, fails

onnxruntime = pytest.importorskip("onnxruntime")

compiles = pytest.mark.skipif(not COMPILER, reason="packages need a compiler of C++")
LENET = purecnn.create("lenet5")
KEY = random.key(0)


def run_onnx(path: Path, images: Tensor) -> Tensor:
    return torch.from_numpy(onnxruntime.InferenceSession(path).run(None, {"images": images.numpy()})[0])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_family_as_program_and_as_onnx(case: Case, tmp_path: Path) -> None:
    model = case.model()
    params, state = model.init(KEY)
    program = export.program(model, params, state, image_size=case.image_size)
    export.save_onnx(tmp_path / "model.onnx", program)
    for batch in (1, 3):
        images = case.images(batch)
        expected = model.apply(params, state, images)[0]
        assert torch.equal(program.module()(images), expected)
        # ONNX Runtime sums in another order.
        bound = 1e-5 * float(expected.abs().max())
        assert_close(run_onnx(tmp_path / "model.onnx", images), expected, rtol=0, atol=bound)


def test_a_program_on_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **named: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    model = purecnn.create("lenet5")
    program = export.program(model, *model.init(KEY))
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        export.save_program(tmp_path / "x.pt2", program)
    assert not any(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # PyTorch 2.11 reads its file so
def test_files_keep_notes_and_names(tmp_path: Path) -> None:
    params, state = LENET.init(KEY)
    program = export.program(LENET, params, state)
    export.save_onnx(tmp_path / "model.onnx", program, {"classes": "0 to 9"})
    export.save_program(tmp_path / "model.pt2", program, {"classes": "0 to 9"})
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert session.get_modelmeta().custom_metadata_map["classes"] == "0 to 9"
    assert [(end.name, end.shape) for end in (*session.get_inputs(), *session.get_outputs())] == [
        ("images", ["batch", 1, 32, 32]),
        ("logits", ["batch", 10]),
    ]
    extra = {"classes": ""}
    loaded = torch.export.load(tmp_path / "model.pt2", extra_files=extra)
    assert extra == {"classes": "0 to 9"}
    images = random.normal(KEY, (5, 1, 32, 32))
    assert torch.equal(loaded.module()(images), LENET.apply(params, state, images)[0])


def arguments() -> tuple[TrainState, tuple[Tensor, Tensor], Tensor]:
    params, state = LENET.init(KEY)
    batch = random.normal(random.key(1), (4, 1, 32, 32)), torch.tensor([3, 1, 4, 1])
    return TrainState.start(params, state, sgd(0.1, momentum=0.9)), batch, random.key(2)


@pytest.fixture(scope="module")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "step.pt2"
    export.package(path, make_step(LENET, sgd(0.1, momentum=0.9)), *arguments(), notes={"who": "lenet"})
    return path


@compiles
def test_package_of_a_whole_step_trains_as_the_step_does(packaged: Path) -> None:
    step, loaded = make_step(LENET, sgd(0.1, momentum=0.9)), export.load(packaged)
    train_state, batch, key = arguments()
    ours, theirs = train_state, train_state
    for _ in range(3):
        ours, metrics = step(ours, batch, key)
        result, measured = loaded(theirs, batch, key)
        theirs = TrainState(*result)
        assert_close(tuple(measured), tuple(metrics))
    assert int(theirs.step) == 3
    assert_close(theirs.params, ours.params)
    assert_close(theirs.opt_state, ours.opt_state)


@compiles
def test_package_goes_by_names_not_by_order(packaged: Path) -> None:
    def backwards(branch: Any) -> Any:
        return (
            {name: backwards(part) for name, part in reversed(branch.items())} if isinstance(branch, dict) else branch
        )

    loaded = export.load(packaged)
    train_state, batch, key = arguments()
    turned = TrainState(*map(backwards, train_state))
    assert list(turned.params) != list(train_state.params)
    assert_close(loaded(turned, batch, key)[0], loaded(train_state, batch, key)[0], rtol=0, atol=0)


@compiles
def test_package_refuses_other_arguments(packaged: Path) -> None:
    loaded = export.load(packaged)
    train_state, (images, labels), key = arguments()
    with pytest.raises(ExportError, match=r"argument 1.0 should be of shape \(4, 1, 32, 32\).* found \(3, 1, 32, 32\)"):
        loaded(train_state, (images[:3], labels), key)
    with pytest.raises(ExportError, match=r"argument 1.0 should .*float32, found .*float64"):
        loaded(train_state, (images.double(), labels), key)
    with pytest.raises(ExportError, match=r"made for other tensors; missing or unexpected: 0\.0\.head"):
        loaded(train_state._replace(params={**train_state.params, "head": {}}), (images, labels), key)
    with pytest.raises(ExportError, match=r"found float at '1\.1'"):
        loaded(train_state, (images, 1.0), key)
    with pytest.raises(ExportError, match="made for tensors on cpu"):
        loaded(train_state, (images.to("meta"), labels), key)
    with pytest.raises(ExportError, match="cannot be differentiated"):
        loaded(train_state, (images.clone().requires_grad_(), labels), key)
    with pytest.raises(ExportError, match="cannot be differentiated"):
        vmap(lambda images: loaded(train_state, (images, labels), key))(images[None])


@compiles
def test_package_takes_any_layout(packaged: Path) -> None:
    loaded = export.load(packaged)
    train_state, (images, labels), key = arguments()
    other = images.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(other, images)
    assert other.stride() != images.stride()
    assert_close(loaded(train_state, (other, labels), key), loaded(train_state, (images, labels), key), rtol=0, atol=0)


@compiles
def test_package_with_a_batch_of_open_size(tmp_path: Path) -> None:
    params, state = LENET.init(KEY)
    path = tmp_path / "logits.pt2"
    export.package(
        path, lambda images: LENET.apply(params, state, images)[0], torch.zeros(2, 1, 32, 32), open_batch=True
    )
    loaded = export.load(path)
    for count in (1, 2, 7):
        images = random.normal(KEY, (count, 1, 32, 32))
        assert_close(loaded(images), LENET.apply(params, state, images)[0])
    with pytest.raises(ExportError, match=r"shape \(any, 1, 32, 32\)"):
        loaded(torch.zeros(2, 3, 32, 32))


@compiles
def test_package_of_mapped_derivatives_with_draws_and_tensors_of_its_own(tmp_path: Path) -> None:
    own = torch.tensor([2.0, 0.5])
    params = {"w": torch.tensor([1.0, 2.0]), "still": torch.tensor(3.0)}

    def loss(params: dict[str, Tensor], image: Tensor, key: Tensor) -> Tensor:
        noise = random.normal(key, (2,))
        return (params["w"] * own * image + noise).sum().tanh() + params["still"].detach()

    def each(params: dict[str, Tensor], images: Tensor, key: Tensor) -> dict[str, Any]:
        grads = vmap(grad(loss), (None, 0, 0))(params, images, random.split(key, 3))
        return {"grads": grads, "given": [params["still"]]}

    images = random.normal(KEY, (3, 2))
    export.package(tmp_path / "each.pt2", each, params, images, KEY)
    loaded = export.load(tmp_path / "each.pt2")
    for key in (KEY, random.key(1)):
        found, expected = loaded(params, images, key), each(params, images, key)
        assert_close(found["grads"], expected["grads"])
        assert found["given"] == (params["still"],)


def ensemble() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    keys, optimizer = random.split(KEY, 3), adamw(1e-2)
    train_state = ensembles.start(*vmap(LENET.init)(keys), optimizer)
    return ensembles.make_ensemble_step(LENET, optimizer), (train_state, arguments()[1], keys)


def private() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    step = make_private_step(LENET, sgd(0.1, momentum=0.9), clip=1.0, noise=1.0, expected_batch=4)
    return step, arguments()


def per_image() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    params, state = LENET.init(KEY)
    return functools.partial(per_sample_gradients, LENET), (params, state, arguments()[1])


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("make", [ensemble, private, per_image])
def test_package_of_other_functions(make: Callable[[], Any], tmp_path: Path) -> None:
    function, given = make()
    export.package(tmp_path / "x.pt2", function, *given)
    found, expected = export.load(tmp_path / "x.pt2")(*given), function(*given)
    assert_close(torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(expected))


def test_what_cannot_be_exported_is_named(tmp_path: Path) -> None:
    images = torch.zeros(2, 3)
    with pytest.raises(ExportError, match=r"without torch\.func's transformations"):
        export.package(tmp_path / "x.pt2", lambda x: grad(lambda x: (x**2).sum())(x), images, open_batch=True)
    with pytest.raises(ExportError, match=r"found int at '1'"):
        export.package(tmp_path / "x.pt2", torch.sum, images, 1)
    for write in (export.save_onnx, export.save_program):
        with pytest.raises(FileError, match="should end in"):
            write(tmp_path / "x.bin", None)  # type: ignore[arg-type]
    with pytest.raises(FileError, match=r"should end in \.pt2"):
        export.package(tmp_path / "x.so", torch.sum, images)
    assert not list(tmp_path.iterdir())


def test_load_of_what_is_no_package(tmp_path: Path) -> None:
    path = tmp_path / "x.pt2"
    with pytest.raises(FileError, match="does not exist"):
        export.load(path)
    path.write_bytes(b"nothing")
    with pytest.raises(FileError, match="is not a package"):
        export.load(path)
    params, state = LENET.init(KEY)
    export.save_program(path, export.program(LENET, params, state))
    with pytest.raises(FileError, match="is not a package"):
        export.load(path)


# The command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpointed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    params, state = LENET.init(KEY)
    checkpoint.save("lenet.safetensors", LENET, params, state, classes=[f"digit {i}" for i in range(10)])
    return tmp_path


@pytest.mark.parametrize("words", [("x.onnx",), ("x.pt2",), ("x.onnx", "--fold"), ("y.onnx", "--image-size", "32")])
def test_export(checkpointed: Path, words: tuple[str, ...]) -> None:
    result = call("export", "lenet.safetensors", *words, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["difference"] < 1e-5
    assert (checkpointed / words[0]).is_file()


@compiles
def test_export_compiled(checkpointed: Path) -> None:
    result = call("export", "lenet.safetensors", "x.pt2", "--compile")
    assert result.exit_code == 0, result.output
    assert "lenet5 written to x.pt2; its logits differ" in result.output
    assert export.load("x.pt2")(torch.zeros(5, 1, 32, 32)).shape == (5, 10)


def test_exported_file_knows_its_classes(checkpointed: Path) -> None:
    assert call("export", "lenet.safetensors", "x.onnx").exit_code == 0
    found = onnxruntime.InferenceSession("x.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(found["classes"])[3] == "digit 3"
    assert json.loads(found["model"]) == "lenet5"


@pytest.mark.parametrize("wrong", [0.1, math.nan])
@pytest.mark.parametrize("target", ["x.onnx", "x.pt2"])
def test_a_file_with_other_logits_is_not_left(
    checkpointed: Path,
    target: str,
    wrong: float,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = export.program

    def program(model: purecnn.Model, params: Any, state: Any, **settings: Any) -> Any:
        linear = params["head"]["linear"]
        head = {**params["head"], "linear": {**linear, "bias": linear["bias"] + wrong}}
        return real(model, {**params, "head": head}, state, **settings)

    monkeypatch.setattr(export, "program", program)
    code, error = fails(capsys, monkeypatch, "export", "lenet.safetensors", target)
    assert code == 1
    found = "nan" if math.isnan(wrong) else r"\d\.\de[+-]0\d"
    assert re.search(rf"{re.escape(target)} is not written: .* by {found} of the largest, but at most 1e-03", error)
    assert [path.name for path in checkpointed.iterdir()] == ["lenet.safetensors"]


def test_logits_that_are_all_zero_are_compared(checkpointed: Path) -> None:
    params, state = LENET.init(KEY, law=lambda path, shape: 0.0)
    checkpoint.save("lenet.safetensors", LENET, params, state)
    result = call("export", "lenet.safetensors", "x.onnx", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["difference"] == 0


def test_export_refuses(
    checkpointed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*words: str) -> str:
        code, error = fails(capsys, monkeypatch, "export", "lenet.safetensors", *words)
        assert code == 2
        return error

    assert "should end in .onnx or .pt2" in refused("x.bin")
    assert "an .onnx file is not compiled" in refused("x.onnx", "--compile")
    (checkpointed / "x.onnx").write_text("mine")
    assert "x.onnx exists and is not overwritten" in refused("x.onnx")
    assert (checkpointed / "x.onnx").read_text() == "mine"


@compiles
def test_an_open_batch_is_one_number(tmp_path: Path) -> None:
    """Machine code would read beyond the shorter one."""
    path, x = tmp_path / "x.pt2", torch.ones(3, 4)
    with pytest.raises(export.ExportError, match="the batch, of one size: 0 has 3, 1 has 2"):
        export.package(path, lambda a, b: a.sum(1) + b.sum(), x, torch.ones(2), open_batch=True)
    export.package(path, lambda a, b: a.sum(1) + b, x, torch.ones(3), open_batch=True)
    loaded = export.load(path)
    assert loaded(torch.ones(5, 4), torch.ones(5)).tolist() == [5] * 5
    with pytest.raises(export.ExportError, match="the batch, of one size: 0 has 5, 1 has 2"):
        loaded(torch.ones(5, 4), torch.ones(2))


@pytest.mark.parametrize(
    ("function", "arguments", "words"),
    [
        (lambda: torch.ones(1), (), "at least one tensor"),
        (lambda x: x[0], ({0: torch.ones(1)},), "trees must be strings, found 0"),
        (lambda x: {0: x}, (torch.ones(1),), "trees must be strings, found 0"),
        (lambda x: x["a.b"], ({"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)},), r"have the same name '0\.a\.b'"),
    ],
)
def test_each_tensor_of_a_package_has_a_name(
    function: Any, arguments: tuple[Any, ...], words: str, tmp_path: Path
) -> None:
    with pytest.raises(export.ExportError, match=words):
        export.package(tmp_path / "x.pt2", function, *arguments)
    assert not any(tmp_path.iterdir())
