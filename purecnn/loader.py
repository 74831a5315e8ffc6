"""Batches of pictures, whose order and variation come from a key alone.

Reading in many processes is torch's work (``torch.utils.data``). All public names are those of `purecnn.data`.
"""

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from purecnn import random
from purecnn.preprocessing import DataError, Preprocessing

Transform = Callable[[Any], Tensor]
"""From a picture, a PIL image, to a tensor (channels, height, width)."""


class Examples(Protocol):
    """One split of a data set: pictures with the index of their class, by position."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Image.Image, int]: ...


Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From images and labels of a batch to mixed images and shares of the classes: ``v2.MixUp``, ``v2.CutMix``."""


def batches(
    examples: Examples,
    transform: Transform,
    batch_size: int,
    *,
    key: Tensor | None = None,
    workers: int = 0,
    drop_last: bool = False,
    mix: Mix | None = None,
    part: tuple[int, int] = (0, 1),
) -> "Batches":
    """Batches of pictures, once through ``examples``.

    With a key the order is shuffled, and what ``transform`` draws for a picture depends on the key and the
    picture's index alone: not on ``workers`` or ``batch_size``, nor on torch's global generator, which is
    left as it was, nor on threads that go through other batches. Going through the same object twice gives the
    same batches: give every epoch its own key.
    Without a key the order is that of ``examples``, for transforms that draw nothing.

    Args:
        examples: one split of a :class:`DataSet`, or anything alike.
        transform: from a PIL image to a tensor (channels, height, width), the same shape for every picture.
        batch_size: the last batch may be smaller, unless ``drop_last`` leaves it out.
        workers: processes that prepare batches in advance; 0 prepares them in this one, when asked for.
        mix: mixes each batch's images; its draws depend on the key and the batch's number.
        part: ``(i, n)`` gives every n-th picture of each batch, from the i-th on, to the i-th of n processes. A batch
            of fewer pictures than processes is given to all if there is a key, since training steps are made together.

    Returns:
        An iterable with a ``len``, of images (batch, channels, height, width) and labels (batch,) int64; with
        ``mix``, of shares (batch, classes).

    Raises:
        DataError: when there would be no batch at all, or (while iterating, and from a worker too) when a
            picture cannot be read, naming its file.

    Example::

        for images, labels in data.batches(digits.train, transform, 64, key=random.fold_in(key, epoch)):
            ...
    """
    if workers < 0:
        raise DataError(f"workers must be at least 0, not {workers}")
    if mix is not None and key is None:
        raise DataError("to mix pictures is to draw: it needs a key")
    order = _Order(len(examples), batch_size, key, drop_last, part)
    return Batches(examples, transform, order, workers, mix)


@dataclass(frozen=True, eq=False)
class _Order:
    """Which pictures are in which batch."""

    count: int
    batch_size: int
    key: Tensor | None
    drop_last: bool
    part: tuple[int, int]
    first: int = 0
    """Batches to leave out at the beginning."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise DataError(f"batch_size must be at least 1, not {self.batch_size}")
        if self.count < (self.batch_size if self.drop_last else 1):
            raise DataError(f"{self.count} pictures make no batch of {self.batch_size}")

    def __len__(self) -> int:
        full, rest = divmod(self.count, self.batch_size)
        return max(0, full + (rest > 0 and not self.drop_last) - self.first)

    def groups(self) -> list[list[int]]:
        order = list(range(self.count))
        if self.key is not None:
            order = random.permutation(random.split(self.key)[0], self.count).tolist()
        begins = range(self.first * self.batch_size, self.count, self.batch_size)
        whole = [order[begin : begin + self.batch_size] for begin in begins][: len(self)]
        index, parts = self.part
        if self.key is None:  # to evaluate: each picture once, and nobody waits for a batch
            return [group[index::parts] for group in whole if group[index::parts]]
        return [group[index::parts] if len(group) >= parts else group for group in whole]


@dataclass(frozen=True, eq=False)
class Batches:
    """What :func:`batches` returns."""

    examples: Examples
    transform: Transform
    order: _Order
    workers: int
    mix: Mix | None

    def __len__(self) -> int:
        return len(self.order)

    def skip(self, count: int) -> "Batches":
        """The same without its first ``count`` batches, whose pictures are not read."""
        return replace(self, order=replace(self.order, first=self.order.first + count))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        key, seeds, mixing = self.order.key, None, None
        if key is not None:
            seeds = random.bits(random.split(key)[1], (len(self.examples),)).tolist()
            if self.mix is not None:
                mixing = random.bits(random.split(key, 3)[2], (self.order.first + len(self),)).tolist()
        loader: Iterable[tuple[Tensor, Tensor] | DataError] = DataLoader(
            _Prepared(self.examples, self.transform, seeds),
            batch_sampler=self.order.groups(),
            num_workers=self.workers,
            collate_fn=_collate,
            generator=torch.Generator(),  # else a loader draws from the global generator
        )
        started = _apart(lambda: iter(loader)) if self.workers else iter(loader)
        for number, batch in enumerate(started, self.order.first):
            if isinstance(batch, DataError):
                raise batch
            if mixing is not None and self.mix is not None:
                with _seeded(mixing[number]):
                    batch = self.mix(*batch)
            yield batch


_Result = TypeVar("_Result")


def _apart(start: Callable[[], _Result]) -> _Result:
    """What starts processes, run by a thread that belongs to no pool.

    A process that a thread of a ThreadPoolExecutor forks fails at its end: Python has it wait for all threads of pools,
    its own among them. torch then raises in the main thread, wherever that is.
    """
    if threading.current_thread() is threading.main_thread():
        return start()
    found: Future[_Result] = Future()

    def run() -> None:
        try:
            found.set_result(start())
        except BaseException as error:
            found.set_exception(error)

    with _STARTING:
        threading.Thread(target=run).start()
        return found.result()


_STARTING = threading.Lock()
"""Held by who starts processes from a thread: filelock, which torch brings along, lets two of them not fork at once."""


_GENERATOR = threading.RLock()
"""Held by the thread that draws from torch's global generator: torchvision's transforms know no other."""
if hasattr(os, "register_at_fork"):  # a worker's process must not begin with a lock that no thread of its own holds
    os.register_at_fork(
        before=_GENERATOR.acquire, after_in_parent=_GENERATOR.release, after_in_child=_GENERATOR.release
    )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """torch's global generator, begun anew from a seed, and afterwards as it was."""
    with _GENERATOR:
        before = torch.get_rng_state()
        # not torch.manual_seed, which seeds accelerators as well and is ten times slower
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            torch.set_rng_state(before)


def resident(
    examples: Examples,
    batch_size: int,
    *,
    preprocessing: Preprocessing,
    device: torch.device | str = "cpu",
    as_bytes: bool = True,
) -> "Resident":
    """All pictures in memory, on a device: for small data sets, whose reading would take longer than the training.

    They are scaled and cropped as ``preprocessing`` says. To train on, they are kept as bytes: `purecnn.augment` works
    on whole batches, inside of the training step, and its `purecnn.augment.normalize` takes the mean and deviation. To
    evaluate on, they are kept as the network reads them: ``as_bytes=False``.

    Args:
        examples: one split of a :class:`DataSet`.
        batch_size: the last batch may be smaller.
        preprocessing: of the pictures.
        device: where to keep them.
        as_bytes: as uint8, or normalised, as float32.

    Raises:
        DataError: when there would be no batch at all, or a picture cannot be read, naming its file.
    """
    order = _Order(len(examples), batch_size, None, False, (0, 1))
    keep = preprocessing.bytes() if as_bytes else preprocessing.evaluation()
    images, labels = zip(*(examples[i] for i in range(len(examples))), strict=True)
    stored = torch.stack([keep(image) for image in images]).to(device)
    return Resident(stored, torch.tensor(labels).to(device), order)


@dataclass(frozen=True, eq=False)
class Resident:
    """What :func:`resident` returns: batches of images (batch, channels, height, width) and labels (batch,)."""

    images: Tensor
    labels: Tensor
    order: _Order

    def __len__(self) -> int:
        return len(self.order)

    def skip(self, count: int) -> "Resident":
        """The same without its first ``count`` batches."""
        return replace(self, order=replace(self.order, first=self.order.first + count))

    def shuffled(self, key: Tensor, *, part: tuple[int, int] = (0, 1)) -> "Resident":
        """In a key's order; ``part`` as in :func:`batches`.

        Args:
            key: of the order; give every epoch its own.
            part: this process's, and of how many.
        """
        return replace(self, order=replace(self.order, key=key, part=part))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        groups = self.order.groups()
        # All at once: to bring each group to a GPU would be to wait for the step before.
        order = torch.tensor([i for group in groups for i in group], dtype=torch.int64, device=self.labels.device)
        for chosen in torch.split(order, [len(group) for group in groups]):
            yield self.images[chosen], self.labels[chosen]


@dataclass(frozen=True)
class _Prepared(Dataset[tuple[Tensor, int] | DataError]):
    """Examples, transformed. An error is a value: a worker's exception would arrive as a traceback."""

    examples: Examples
    transform: Transform
    seeds: Sequence[int] | None

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | DataError:
        try:
            image, label = self.examples[index]
        except DataError as error:
            return error
        if self.seeds is None:
            return self.transform(image), label
        with _seeded(self.seeds[index]):
            return self.transform(image), label


def _collate(examples: Sequence[tuple[Tensor, int] | DataError]) -> tuple[Tensor, Tensor] | DataError:
    for example in examples:
        if isinstance(example, DataError):
            return example
    images, labels = zip(*examples, strict=True)
    return torch.stack(images), torch.tensor(labels)
