"""Data-parallel training of one network in many processes: sums over processes, as functions.

Every process holds the whole network and works on its part of each batch. Gradients, the numbers of
`purecnn.training.Metrics`, and with ``statistics="global"`` the statistics of batch normalisation are summed over the
processes. ``torchrun`` starts the processes, and ``torch.distributed.init_process_group`` joins them.
"""

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["agreed", "from_first", "least", "rank", "share", "total", "total_flowing", "world_size"]

_T = TypeVar("_T")


def rank() -> int:
    """The index of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def total(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sum each tensor over all processes, in one message for each dtype."""
    if world_size() == 1:
        return leaves
    result: dict[str, Tensor] = dict(leaves)
    for dtype in sorted({leaf.dtype for leaf in leaves.values()}, key=str):  # in the same order in all processes
        group = {path: leaf for path, leaf in leaves.items() if leaf.dtype == dtype}
        message = torch.cat([leaf.detach().flatten() for leaf in group.values()])
        dist.all_reduce(message)
        parts = torch.split(message, [leaf.numel() for leaf in group.values()])
        result |= {path: part.view(leaf.shape) for (path, leaf), part in zip(group.items(), parts, strict=True)}
    return result


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return total({"": x})[""]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _Sum.apply(*grads)


def total_flowing(x: Tensor) -> Tensor:
    """Sum a tensor over all processes, differentiably: gradients flow back to all of them."""
    return x if world_size() == 1 else _Sum.apply(x)


def share(images: int, device: torch.device) -> Tensor:
    """This process's share of the images of all processes: a float64 scalar.

    Args:
        images: how many images this process has.
        device: the device of the result.
    """
    count = torch.full((), float(images), dtype=torch.float64, device=device)
    return count / total({"": count})[""]


def agreed(wish: bool) -> bool:
    """Whether ``wish`` is true in any process."""
    return bool(total({"": torch.tensor(int(wish), device=_device())})[""]) if world_size() > 1 else wish


def least(number: int) -> int:
    """The smallest of the processes' numbers."""
    if world_size() == 1:
        return number
    message = torch.tensor(number, device=_device())
    dist.all_reduce(message, dist.ReduceOp.MIN)
    return int(message)


def from_first(value: _T) -> _T:
    """The value of the first process, in all processes."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def _device() -> torch.device:
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
