"""Which transformations are active: for the few places where torch has a faster or an exacter way outside of them."""

import operator
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch.autograd import forward_ad

_REQUIRES_GRAD = operator.attrgetter("requires_grad")
_TRACER = torch._C._TorchDispatchModeKey.PROXY


def is_transformed(*tensors: Tensor) -> bool:
    """Whether a compiler, a tracer, ``torch.func`` or autograd watches what is done to the tensors."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_dispatch_mode(_TRACER) is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0  # a dual level, where tensors may carry tangents
        or (torch.is_grad_enabled() and any(map(_REQUIRES_GRAD, tensors)))
    )


def is_mapped() -> bool:
    """Whether a ``vmap`` is active. The compiler cannot look; it may be, so it counts as active."""
    if torch.compiler.is_compiling():
        return True
    stack = torch._C._functorch.get_interpreter_stack()
    return stack is not None and any(level.key() == TransformType.Vmap for level in stack)


class Derivatives(NamedTuple):
    """Differentiations by ``torch.func`` and ``forward_ad``, one within the other."""

    reverse: int
    forward: int

    @property
    def nested(self) -> bool:
        """Whether there are several, for which some of torch's operators have wrong formulas.

        A forward derivative may be differentiated by ``torch.autograd`` later, unless that is off.
        """
        return self.reverse + self.forward > 1 or (self.forward > 0 and torch.is_grad_enabled())


def derivatives() -> Derivatives:
    """Which differentiations are active; none where the compiler cannot look."""
    if torch.compiler.is_compiling():
        return Derivatives(0, 0)
    return _derivatives([level.key() for level in torch._C._functorch.get_interpreter_stack() or ()])


def _derivatives(kinds: list[TransformType]) -> Derivatives:
    # Within torch.func.jvp there is a dual level, too.
    dual = int(forward_ad._current_level >= 0)
    return Derivatives(kinds.count(TransformType.Grad), max(kinds.count(TransformType.Jvp), dual))


def is_mapped_or_nested() -> bool:
    """Whether a ``vmap`` is active, or one differentiation within another; asked once, which costs half."""
    if torch.compiler.is_compiling():
        return True
    stack = torch._C._functorch.get_interpreter_stack()
    if not stack and forward_ad._current_level < 0:  # as most often
        return False
    kinds = [level.key() for level in stack or ()]
    return TransformType.Vmap in kinds or _derivatives(kinds).nested
