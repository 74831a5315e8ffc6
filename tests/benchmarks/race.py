"""What all races share: turns on the clock, a check before it starts, and rows that know where they come from."""

import datetime
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torchvision
from torch import Tensor, nn

import purecnn
from converters import export
from converters import torchvision as tv
from purecnn import tree
from purecnn.tree import Tree
from tests.table import COMPILER


class Setting(NamedTuple):
    """Where and how large a race is run."""

    device: str = "cpu"
    toy: bool = False
    """As small as can be: to see that it runs, not how fast."""
    seconds: float = 20.0
    """For each comparison."""
    clock: Literal["wall", "cpu"] = "wall"
    """``"cpu"``, with one thread, bears other processes better."""
    kept: bool = False
    """The C library keeps freed memory."""
    data: Path | None = None
    """CIFAR-10 as `purecnn.data.load` takes it: a folder."""

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")

    def compile(self, function: Any, **settings: Any) -> Any:
        """``torch.compile``; in a toy race the function itself, since to compile takes longer than all else."""
        return torch.compile(function, **settings, disable=self.toy)

    def pick(self, full: Any, toy: Any) -> Any:
        return toy if self.toy else full


class Row(NamedTuple):
    """One comparison. Times are medians in milliseconds; below 1 the ratio says that we are faster."""

    race: str
    what: str
    peer: str
    ours: float | None = None
    theirs: float | None = None
    goal: float | None = None
    """The largest ratio that was aimed at."""
    ratio: float | None = None
    """The median over the rounds of ours / theirs, each pair measured one after the other."""
    rounds: int = 0
    note: str = ""
    device: str = "cpu"
    machine: str = ""
    versions: str = ""
    date: str = ""

    @property
    def key(self) -> tuple[str, str, str, str]:
        """Rows of the same key replace each other."""
        return self.race, self.what, self.peer, self.machine


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def machine(setting: Setting) -> str:
    """The accelerator's name, or the processor's and how many threads are used."""
    if setting.cuda:
        return torch.cuda.get_device_name(setting.device)
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    threads = torch.get_num_threads()
    time = ", processor time" if setting.clock == "cpu" else ""
    kept = ", memory kept" if setting.kept else ""
    return f"{name.removesuffix(' Processor')}, {threads} thread{'s' if threads > 1 else ''}{time}{kept}"


def signed(setting: Setting, row: Row) -> Row:
    """The row with its machine, versions and date."""
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, Python {platform.python_version()}"
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return row._replace(
        device="cuda" if setting.cuda else "cpu", machine=machine(setting), versions=versions, date=today
    )


def take_turns(
    setting: Setting, runners: Mapping[str, Callable[[], Any]], *, warmup: int = 3, asynchronous: bool = False
) -> dict[str, list[float]]:
    """Milliseconds of each runner, round by round: A B C, B C A, ..., so that none always follows the same one.

    Args:
        setting: the device, which is waited for, and the time to spend.
        runners: what to time.
        warmup: rounds before the clock starts.
        asynchronous: measure until the call returns, without waiting for the device: the host's cost.
    """

    def wait() -> None:
        if setting.cuda:
            torch.cuda.synchronize()

    clock = CLOCKS[setting.clock]
    names = list(runners)
    for _ in range(warmup):
        for name in names:
            runners[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + setting.seconds
    least = 1 if setting.toy else 5
    while time.perf_counter() < end or len(times[names[0]]) < least:
        first = len(times[names[0]]) % len(names)
        for name in names[first:] + names[:first]:
            wait()
            begin = clock()
            runners[name]()
            if not asynchronous:
                wait()
            times[name].append((clock() - begin) * 1e3)
        if setting.toy:
            break
    return times


def rows(
    setting: Setting,
    race: str,
    what: str,
    ours: Callable[[], Any],
    peers: Mapping[str, Callable[[], Any]],
    *,
    goals: Mapping[str, float] | None = None,
    note: str = "",
    warmup: int = 3,
    asynchronous: bool = False,
) -> list[Row]:
    """Ours against each peer, all in one interleaved run."""
    runners = {"": ours, **peers}
    times = take_turns(setting, runners, warmup=1 if setting.toy else warmup, asynchronous=asynchronous)
    result = []
    for peer in peers:
        ratio = statistics.median(a / b for a, b in zip(times[""], times[peer], strict=True))
        goal = (goals or {}).get(peer)
        medians = statistics.median(times[""]), statistics.median(times[peer])
        result.append(signed(setting, Row(race, what, peer, *medians, goal, ratio, len(times[""]), note)))
    return result


def check(ours: Any, theirs: Any, *, exact: bool = False, rtol: float = 1e-4, atol: float = 1e-4) -> None:
    """Both computed the same. Called before the clock starts; tolerances are relative to the largest value.

    Raises:
        AssertionError: if they did not.
    """
    if isinstance(ours, Mapping):
        for name in ours:
            check(ours[name], theirs[name], exact=exact, rtol=rtol, atol=atol)
        return
    ours, theirs = ours.detach().float().cpu(), theirs.detach().float().cpu()
    if exact:
        assert torch.equal(ours, theirs), f"differs by up to {(ours - theirs).abs().max()}"
    else:
        scale = float(theirs.abs().max())
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol + rtol * scale)


def pair(
    name: str, device: str = "cpu", peer: Mapping[str, Any] | None = None, **settings: Any
) -> tuple[purecnn.Model, Tree, Tree, nn.Module]:
    """Our model and torchvision's with the same weights, but no shared memory.

    Args:
        name: of both.
        device: where they are.
        peer: torchvision's settings, if they are called otherwise than ours.
        settings: ours.
    """
    torch.manual_seed(0)
    module: nn.Module = torchvision.models.get_model(name, weights=None, **(settings if peer is None else peer))
    model = purecnn.create(name, **settings)
    state_dict = {key: value.clone().to(device) for key, value in module.state_dict().items()}
    return model, *tv.from_state_dict(model, state_dict), module.to(device)


def package(setting: Setting, function: Callable[..., Any], *arguments: Any) -> Callable[..., Any] | None:
    """The function, compiled ahead of time; None at toy size, since to compile takes longer than all else.

    By a process of its own, so ``function`` can be pickled: what a compilation leaves behind slows Python down.
    """
    if setting.toy or not COMPILER:
        return None
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, get_context("spawn")) as maker:
        file = Path(folder, "package.pt2")
        maker.submit(export.package, file, function, *arguments).result()
        return export.load(file)


def logits(model: purecnn.Model, params: Tree, state: Tree, x: Tensor) -> Tensor:
    """A network in evaluation, for `package`."""
    y: Tensor = model.apply(params, state, x)[0]
    return y


class Constant(nn.Module):
    """A network with its trees as buffers, which a compiler may take for constants and rearrange ("freezing")."""

    def __init__(self, model: purecnn.Model, params: Tree, state: Tree) -> None:
        super().__init__()
        self.model = model
        self.paths: list[str] = []
        for path, leaf in tree.flatten({"params": params, "state": state}).items():
            self.register_buffer(f"leaf{len(self.paths)}", leaf)
            self.paths.append(path)

    def forward(self, x: Tensor) -> Tensor:
        trees = tree.unflatten({path: getattr(self, f"leaf{i}") for i, path in enumerate(self.paths)})
        return self.model.apply(trees["params"], trees.get("state", {}), x)[0]


def images(setting: Setting, batch: int, size: int, channels: int = 3, classes: int = 1000) -> tuple[Tensor, Tensor]:
    """Random pictures and labels."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, channels, size, size, generator=generator)
    labels = torch.randint(classes, (batch,), generator=generator)
    return x.to(setting.device), labels.to(setting.device)
