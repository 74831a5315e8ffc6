"""Training steps as CUDA graphs: the kernels are recorded once, and the host then starts all of them with one call.

    step = captured(make_step(model, optimizer, donate=True))
    train_state, metrics = step(train_state, batch, key)

A GPU waits for the host if each kernel has little to do: with small images, small networks or small batches. A step can
be recorded because it is pure: its draws depend only on keys and the step's number, which are on the device.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from purecnn import tree
from purecnn.eager import is_transformed
from purecnn.step import Batch, Metrics, Step, TrainState

__all__ = ["captured"]

_WARM = 3
"""Runs before the recording, during which libraries choose their kernels and the compiler compiles."""


def captured(step: Step) -> Step:
    """The same step, recorded as a CUDA graph at its first call and replayed at later calls.

    The train state of the first call is copied. The next call overwrites the train state that a call returns, as with
    ``make_step(..., donate=True)``, which is best used with it; metrics are not overwritten. Batches of other shapes or
    types than the first one, such as the last of an epoch, run without the recording. Without a GPU nothing is
    recorded, and under ``vmap`` or ``torch.compile`` the given step runs.

    Args:
        step: the step. What it does must not depend on values that the host reads.

    Raises:
        ValueError: if a later train state has other paths or shapes than the first.
    """
    recording: _Recording | None = None

    def run(train_state: TrainState, batch: Batch, key: Tensor | None = None) -> tuple[TrainState, Metrics]:
        nonlocal recording
        if is_transformed(train_state.step, *batch):
            return step(train_state, batch, key)
        if recording is None:
            recording = _Recording(step, train_state, batch, key)
        return recording(train_state, batch, key)

    return run


class _Recording:
    """The recording, and the tensors that its kernels read and write."""

    def __init__(self, step: Step, train_state: TrainState, batch: Batch, key: Tensor | None) -> None:
        self.step = step
        self.train_state = TrainState(**tree.map(torch.clone, train_state._asdict()))
        self.leaves = tree.flatten(self.train_state._asdict())
        # On the state's device: the recording would keep the values of a key that is on the host.
        device = train_state.step.device
        self.inputs = [each.to(device, copy=True) for each in _inputs(batch, key)]
        self.replay: Callable[[], Metrics] = lambda: self.advance(self.inputs)
        if device.type == "cuda":
            with torch.cuda.device(device):
                self.replay = _recorded(self.replay)

    def __call__(self, train_state: TrainState, batch: Batch, key: Tensor | None) -> tuple[TrainState, Metrics]:
        if train_state is not self.train_state:  # always so at the first call, whose warm-up runs have changed ours
            if different := tree.differences(self.train_state._asdict(), train_state._asdict()):
                raise ValueError(f"the recorded train state has other tensors: {tree.some(different)}")
            self.fill(train_state)
        inputs = _inputs(batch, key)
        if [(each.shape, each.dtype) for each in inputs] == [(each.shape, each.dtype) for each in self.inputs]:
            for mine, given in zip(self.inputs, inputs, strict=True):
                mine.copy_(given)
            metrics = self.replay()
        else:
            metrics = self.advance([each.to(self.train_state.step.device) for each in inputs])
        return self.train_state, Metrics(*map(torch.clone, metrics))

    def advance(self, inputs: list[Tensor]) -> Metrics:
        """Run one step that reads the train state's tensors and overwrites them."""
        images, labels, *key = inputs
        after, metrics = self.step(self.train_state, (images, labels), *key)
        self.fill(after)
        return metrics

    def fill(self, train_state: TrainState) -> None:
        """Overwrite the train state's tensors, except those that a donating step has already overwritten."""
        given = tree.flatten(train_state._asdict())
        pairs = [(mine, given[path]) for path, mine in self.leaves.items() if given[path] is not mine]
        torch._foreach_copy_([mine for mine, _ in pairs], [theirs for _, theirs in pairs])


def _inputs(batch: Batch, key: Tensor | None) -> list[Tensor]:
    return [*batch] if key is None else [*batch, key]


def _recorded(work: Callable[[], Metrics]) -> Callable[[], Metrics]:
    """A function that replays the kernels that ``work`` starts, without running its host code."""
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(_WARM):
            work()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    # Other threads, which read pictures, may allocate memory meanwhile; only this thread's calls may fail the capture.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        metrics = work()

    def replay() -> Metrics:
        graph.replay()
        return metrics

    return replay
