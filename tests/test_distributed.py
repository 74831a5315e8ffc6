"""Two processes of torch.distributed are one process with the joined batch."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from typer.testing import CliRunner

from converters import cli, files
from purecnn import data, distributed, random, serial, tree
from purecnn.ensembles import make_ensemble_step
from purecnn.layer import Mode
from purecnn.layers import batch_norm, conv, relu
from purecnn.optimizers import sgd
from purecnn.privacy import make_private_step
from purecnn.step import TrainState, make_step
from purecnn.training import evaluate
from tests.test_training import FORKED, batch, head, leaves, model_of

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")

QUIET = model_of(serial(stem=serial(conv=conv(4, 3), norm=batch_norm(), relu=relu), head=head()))
"""Without dropout: a mask's shape is that of the part, so its draws are not the whole batch's."""
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "synchronized": (QUIET, {"statistics": "global"}),
    "frozen": (QUIET, {"statistics": "running"}),
    "no norm": (FORKED, {"accumulate": 2, "average": 0.9}),
    "private": (QUIET, {"clip": 0.5, "noise": 0.2, "expected_batch": 7, "statistics": "running"}),
}
PARTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "synchronized parts": (QUIET, {"statistics": "global", "accumulate": 4}),
}
"""In one process the parts would be of other images."""


def trained(name: str, part: tuple[int, int]) -> TrainState:
    """After 20 steps."""
    model, settings = (CASES | PARTS)[name]
    optimizer = sgd(0.05, momentum=0.9)
    step = (make_private_step if "clip" in settings else make_step)(model, optimizer, **settings)
    now = TrainState.start(*model.init(random.key(0)), optimizer, average="average" in settings)
    for i in range(20):
        # Seven images: one process has one more than the other.
        images, labels = batch(i, 7)
        index, parts = part
        now, metrics = step(now, (images[index::parts], labels[index::parts]), random.key(1))
    found = evaluate(model, *now.averaged, [tuple(each[part[0] :: part[1]] for each in batch(50, 9))])  # type: ignore[list-item]
    sums = torch.tensor([found.loss, found.accuracy, float(metrics.loss), float(metrics.correct)])
    return now._replace(extra={**now.extra, "sums": {"": sums}})


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    assert (distributed.rank(), distributed.world_size()) == (rank, 2)
    assert distributed.agreed(rank == 1)
    assert not distributed.agreed(False)
    assert distributed.from_first(rank) == 0
    one = batch(0, 1)
    assert evaluate(QUIET, *QUIET.init(random.key(0)), [one] if rank == 0 else []).confusion.sum() == 1
    params, state = QUIET.init(random.key(0))
    images, _ = batch(rank, 3)

    def loss(params: Any) -> torch.Tensor:
        return QUIET.apply(params, state, images, train=True, statistics="global")[0].square().sum()

    slopes = torch.func.grad(loss)(params)
    leaves_ = {path: leaf.clone().requires_grad_() for path, leaf in tree.flatten(params).items()}
    expected = torch.autograd.grad(loss(tree.unflatten(leaves_)), list(leaves_.values()))
    for x, y in zip(tree.flatten(slopes).values(), expected, strict=True):
        torch.testing.assert_close(x, y)
    assert distributed.least(rank + 3) == 3
    check_uneven_parts(rank)
    with pytest.raises(ValueError, match="an ensemble trains in one process"):
        make_ensemble_step(QUIET, sgd(0.1))
    one_each = torch.full((1, 2, 1, 1), float(rank))
    norm, mode = batch_norm(), Mode(train=True, batch_statistics=True, synchronized=True)
    y, _ = norm.apply(*norm.init(one_each, Mode(key=random.key(0)))[:2], one_each, mode)
    torch.testing.assert_close(y, torch.full_like(y, 2 * rank - 1), atol=1e-4, rtol=0)
    for name in CASES | PARTS:
        now = trained(name, (rank, 2))
        if name == "frozen":
            begun = tree.flatten(CASES[name][0].init(random.key(0))[1])
            assert all(torch.equal(leaf, begun[path]) for path, leaf in tree.flatten(now.state).items())
        found = leaves(now)
        torch.save(found, f"{folder}/{name}-{rank}.pt")
    dist.destroy_process_group()


def check_uneven_parts(rank: int) -> None:
    """Five and three images in two parts each: normalised by what both processes have of a part, all count the same."""
    params, state = QUIET.init(random.key(0))
    halves = [(images[:n], labels[:n]) for n, (images, labels) in ((5, batch(1, 7)), (3, batch(2, 7)))]

    def loss(params: Any) -> torch.Tensor:
        chunks = [[each.tensor_split(2) for each in half] for half in halves]
        sums = []
        for i in range(2):
            images, labels = (torch.cat([half[j][i] for half in chunks]) for j in range(2))
            logits = QUIET.apply(params, state, images, train=True, statistics="batch")[0]
            sums.append(F.cross_entropy(logits, labels, reduction="sum"))
        return sum(sums) / torch.tensor(8.0)

    step, optimizer = make_step(QUIET, sgd(1.0), statistics="global", accumulate=2), sgd(1.0)
    now, metrics = step(TrainState.start(params, state, optimizer), halves[rank])
    torch.testing.assert_close(metrics.loss, loss(params))
    for x, y, z in zip(
        *(tree.flatten(t).values() for t in (now.params, params, torch.func.grad(loss)(params))), strict=True
    ):
        torch.testing.assert_close(x, y - z, rtol=1e-5, atol=1e-6)


def test_two_processes_are_one(tmp_path: Path) -> None:
    mp.spawn(work, (str(tmp_path),), nprocs=2)
    for name in CASES:
        alone = leaves(trained(name, (0, 1)))
        for rank in (0, 1):
            together = torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True)
            for x, y in zip(together, alone, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)
    for name in PARTS:
        one, other = (torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1))
        assert all(map(torch.equal, one, other))


def test_parts_make_up_the_batch() -> None:
    digits = data.load("digits")
    transform = digits.preprocessing.evaluation()
    key = random.key(0)
    whole = list(data.batches(digits.test, transform, 50, key=key))
    parts = [list(data.batches(digits.test, transform, 50, key=key, part=(i, 3))) for i in range(3)]
    for i, (images, labels) in enumerate(whole):
        assert sum(len(part[i][1]) for part in parts) == len(labels)
        for j, part in enumerate(parts):
            assert torch.equal(part[i][0], images[j::3])
    few = [list(data.batches(digits.test, transform, 358, key=key, part=(i, 3))) for i in range(3)]
    assert all(torch.equal(part[1][0], few[0][1][0]) for part in few)  # two pictures for three processes
    once = [list(data.batches(digits.test, transform, 358, part=(i, 3))) for i in range(3)]
    assert sum(len(labels) for part in once for _, labels in part) == 360


def test_a_killed_worker_is_started_again_and_the_run_ends_the_same(tmp_path: Path) -> None:
    words = ["train", "lenet5", "--data", "digits", "--epochs", "2", "--batch-size", "128", "--resume"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    folder = tmp_path / "killed"
    process = subprocess.Popen(
        [
            *torchrun,
            "--max-restarts",
            "1",
            "-m",
            "converters.cli",
            *words,
            "--out",
            str(folder),
            "--checkpoint-every",
            "0",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while process.poll() is None and not list((folder / "states").glob("*.safetensors")):
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        pytest.skip("this system does not list a process's children in /proc")
    os.kill(int(children.read_text().split()[-1]), signal.SIGKILL)
    output, _ = process.communicate()
    assert process.returncode == 0, output.decode()
    result = CliRunner().invoke(cli.app, [*words, "--out", str(tmp_path / "alone")])
    assert result.exit_code == 0, result.output
    (after,), (alone,) = ((tmp_path / name / "states").iterdir() for name in ("killed", "alone"))
    assert after.name == alone.name == "00000024.safetensors"
    for key, leaf in files.read(alone).items():
        torch.testing.assert_close(files.read(after)[key], leaf, rtol=1e-4, atol=1e-4)
