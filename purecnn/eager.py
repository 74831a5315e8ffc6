"""Which transforms are active: for the few places where torch has a faster or more exact method outside of them."""

import operator
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch.autograd import forward_ad

_REQUIRES_GRAD = operator.attrgetter("requires_grad")
_TRACER = torch._C._TorchDispatchModeKey.PROXY


def is_transformed(*tensors: Tensor) -> bool:
    """Whether a compiler, a tracer, ``torch.func`` or autograd records operations on the tensors."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_dispatch_mode(_TRACER) is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0  # a dual level, where tensors may carry tangents
        or (torch.is_grad_enabled() and any(map(_REQUIRES_GRAD, tensors)))
    )


def is_mapped() -> bool:
    """Whether a ``vmap`` is active. Compiled code cannot find out, so there it counts as active."""
    if torch.compiler.is_compiling():
        return True
    stack = torch._C._functorch.get_interpreter_stack()
    return stack is not None and any(level.key() == TransformType.Vmap for level in stack)


class Derivatives(NamedTuple):
    """How many differentiations by ``torch.func`` and ``forward_ad`` are active, nested in each other."""

    reverse: int
    forward: int

    @property
    def nested(self) -> bool:
        """Whether several are nested, for which some of torch's operators have wrong formulas.

        A single forward derivative counts, too, while gradients are enabled: ``torch.autograd`` may differentiate it.
        """
        return self.reverse + self.forward > 1 or (self.forward > 0 and torch.is_grad_enabled())


def derivatives() -> Derivatives:
    """Which differentiations are active; in compiled code none, since it cannot find out."""
    if torch.compiler.is_compiling():
        return Derivatives(0, 0)
    return _derivatives([level.key() for level in torch._C._functorch.get_interpreter_stack() or ()])


def _derivatives(kinds: list[TransformType]) -> Derivatives:
    # torch.func.jvp opens a dual level, too, so the two are not added.
    dual = int(forward_ad._current_level >= 0)
    return Derivatives(kinds.count(TransformType.Grad), max(kinds.count(TransformType.Jvp), dual))


def is_mapped_or_nested() -> bool:
    """Whether a ``vmap`` or nested differentiations are active; one check, in half the time of two."""
    if torch.compiler.is_compiling():
        return True
    stack = torch._C._functorch.get_interpreter_stack()
    if not stack and forward_ad._current_level < 0:  # the usual case
        return False
    kinds = [level.key() for level in stack or ()]
    return TransformType.Vmap in kinds or _derivatives(kinds).nested
