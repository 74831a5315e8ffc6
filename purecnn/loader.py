"""Batches of pictures, whose order and augmentation depend only on a key.

torch (``torch.utils.data``) reads them in several processes. Import the public names from `purecnn.data`.
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
"""A function from a PIL image to a tensor (channels, height, width)."""


class Examples(Protocol):
    """One split of a data set: a sequence of pictures, each with the index of its class."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Image.Image, int]: ...


Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""A function from a batch's images and labels to mixed images and class probabilities: ``v2.MixUp``, ``v2.CutMix``."""


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
    """One pass through a data set in batches, shuffled if there is a key.

    With a key, what ``transform`` draws for a picture depends only on the key and the picture's index: not on
    ``workers`` or ``batch_size``, not on torch's global generator (which is restored), and not on threads that
    iterate over other batches. Iterating over the same object twice gives the same batches, so give every epoch
    its own key. Without a key the order is that of ``examples``; use transforms that draw nothing.

    Args:
        examples: one split of a :class:`DataSet`, or a similar sequence.
        transform: from a PIL image to a tensor (channels, height, width), of the same shape for every picture.
        batch_size: pictures per batch; the last batch may be smaller.
        key: key of the order and of the random augmentation.
        workers: processes that prepare batches in advance; 0 prepares each batch in this process, on demand.
        drop_last: leave out a last batch that is smaller than the others.
        mix: mixes each batch's images; its draws depend on the key and the batch's number.
        part: ``(i, n)`` gives every n-th picture of each batch, starting at the i-th, to the i-th of n processes. With
            a key, every process gets the whole of a batch with fewer than n pictures, since all processes must take
            part in a training step.

    Returns:
        An iterable with a ``len``, of pairs of images (batch, channels, height, width) and labels (batch,) int64; with
        ``mix``, the labels are class probabilities (batch, classes).

    Raises:
        DataError: if there would be no batch; while iterating, also from a worker, if a picture cannot be read, naming
            its file.

    Example::

        for images, labels in data.batches(digits.train, transform, 64, key=random.fold_in(key, epoch)):
            ...
    """
    if workers < 0:
        raise DataError(f"workers must be at least 0, not {workers}")
    if mix is not None and key is None:
        raise DataError("mix draws random numbers: it needs a key")
    order = _Order(len(examples), batch_size, key, drop_last, part)
    return Batches(examples, transform, order, workers, mix)


@dataclass(frozen=True, eq=False)
class _Order:
    """The assignment of pictures to batches."""

    count: int
    batch_size: int
    key: Tensor | None
    drop_last: bool
    part: tuple[int, int]
    first: int = 0
    """The number of batches to leave out at the beginning."""

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
        if self.key is None:  # for evaluation: each picture once; no process waits for another
            return [group[index::parts] for group in whole if group[index::parts]]
        return [group[index::parts] if len(group) >= parts else group for group in whole]


@dataclass(frozen=True, eq=False)
class Batches:
    """The batches that :func:`batches` returns: iterate over them."""

    examples: Examples
    transform: Transform
    order: _Order
    workers: int
    mix: Mix | None

    def __len__(self) -> int:
        return len(self.order)

    def skip(self, count: int) -> "Batches":
        """The same batches without the first ``count``, whose pictures are not read."""
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
            generator=torch.Generator(),  # without it, the loader draws from the global generator
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
    """Run a function that starts processes, in a thread that belongs to no pool.

    A process that was forked by a thread of a ThreadPoolExecutor fails when it ends, because Python makes it wait for
    all pool threads, including its own. torch then raises an error in the main thread, whatever that is doing.
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
"""Held while a thread starts processes: filelock, a dependency of torch, does not let two threads fork at once."""


_GENERATOR = threading.RLock()
"""Held by the thread that draws from torch's global generator, the only one that torchvision's transforms can use."""
if hasattr(os, "register_at_fork"):  # a worker process must not start with a lock that none of its threads holds
    os.register_at_fork(
        before=_GENERATOR.acquire, after_in_parent=_GENERATOR.release, after_in_child=_GENERATOR.release
    )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generator, and restore its state afterwards."""
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
    """Keep all pictures in memory, on a device: for small data sets, which take longer to read than to train on.

    They are scaled and cropped as ``preprocessing`` says. For training, keep them as bytes: `purecnn.augment` works on
    whole batches inside the training step, and `purecnn.augment.normalize` applies the mean and deviation. For
    evaluation, keep them as the network reads them: ``as_bytes=False``.

    Args:
        examples: one split of a :class:`DataSet`.
        batch_size: pictures per batch; the last batch may be smaller.
        preprocessing: how to prepare the pictures.
        device: where to keep them.
        as_bytes: keep them as uint8; otherwise normalised, as float32.

    Raises:
        DataError: if there would be no batch, or a picture cannot be read, naming its file.
    """
    order = _Order(len(examples), batch_size, None, False, (0, 1))
    keep = preprocessing.bytes() if as_bytes else preprocessing.evaluation()
    images, labels = zip(*(examples[i] for i in range(len(examples))), strict=True)
    stored = torch.stack([keep(image) for image in images]).to(device)
    return Resident(stored, torch.tensor(labels).to(device), order)


@dataclass(frozen=True, eq=False)
class Resident:
    """The batches that :func:`resident` returns: images (batch, channels, height, width) and labels (batch,)."""

    images: Tensor
    labels: Tensor
    order: _Order

    def __len__(self) -> int:
        return len(self.order)

    def skip(self, count: int) -> "Resident":
        """The same batches without the first ``count``."""
        return replace(self, order=replace(self.order, first=self.order.first + count))

    def shuffled(self, key: Tensor, *, part: tuple[int, int] = (0, 1)) -> "Resident":
        """The same pictures in an order that depends on a key; ``part`` is as in :func:`batches`.

        Args:
            key: key of the order; give every epoch its own.
            part: ``(i, n)``, for the i-th of n processes.
        """
        return replace(self, order=replace(self.order, key=key, part=part))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        groups = self.order.groups()
        # All indices at once: copying each group to a GPU would wait for the previous step.
        order = torch.tensor([i for group in groups for i in group], dtype=torch.int64, device=self.labels.device)
        for chosen in torch.split(order, [len(group) for group in groups]):
            yield self.images[chosen], self.labels[chosen]


@dataclass(frozen=True)
class _Prepared(Dataset[tuple[Tensor, int] | DataError]):
    """Transformed examples. Errors are returned as values: a worker's exception would arrive as a traceback."""

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
