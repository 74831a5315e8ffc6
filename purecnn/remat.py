"""Rematerialisation: recompute in the backward pass what the forward pass did not keep.

Chen et al., Training Deep Nets with Sublinear Memory Cost, arXiv:1604.06174. ``torch.utils.checkpoint`` does this with
hooks that ``torch.func`` does not run; here the recomputation is a function like any other, so it can be mapped and
differentiated again. It draws the same random numbers, because keys are explicit.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from purecnn.eager import derivatives

__all__ = ["rematerialize"]


class _Run:
    """A function of trees as a function of leaves. It stores the structure of its outputs, known only after a run."""

    def __init__(self, function: Callable[..., tuple[Any, Any]], inputs: pytree.TreeSpec) -> None:
        self.function, self.inputs = function, inputs
        self.outputs: tuple[pytree.TreeSpec, pytree.TreeSpec] | None = None
        self.flowing = 0
        """The number of leaves of the output; the leaves that no gradient flows through come after them."""

    def __call__(self, *leaves: Tensor) -> tuple[Tensor, ...]:
        output, aside = self.function(*pytree.tree_unflatten(list(leaves), self.inputs))
        ys, y_structure = pytree.tree_flatten(output)
        rest, rest_structure = pytree.tree_flatten(aside)
        self.flowing, self.outputs = len(ys), (y_structure, rest_structure)
        return *ys, *(leaf.detach() for leaf in rest)


class _Recompute(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(run: _Run, *leaves: Tensor) -> tuple[Tensor, ...]:
        return run(*leaves)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.run, *leaves = inputs
        ctx.save_for_backward(*leaves)
        ctx.mark_non_differentiable(*output[ctx.run.flowing :])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        leaves = ctx.saved_tensors
        chosen = [i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed]
        flowing = [i for i, grad in enumerate(grads[: ctx.run.flowing]) if grad is not None]
        signals = tuple(grads[i] for i in flowing)

        def outputs(*some: Tensor) -> tuple[Tensor, ...]:
            every = list(leaves)
            for i, leaf in zip(chosen, some, strict=True):
                every[i] = leaf
            found = ctx.run(*every)
            return tuple(found[i] for i in flowing)

        if torch._C._functorch.peek_interpreter_stack() is None and not torch.is_grad_enabled():
            # Without recording what a further derivative would need.
            with torch.enable_grad():
                fresh = [leaves[i].detach().requires_grad_() for i in chosen]
                pulled = torch.autograd.grad(outputs(*fresh), fresh, signals, allow_unused=True)
        else:
            pulled = torch.func.vjp(outputs, *(leaves[i] for i in chosen))[1](signals)
        result: list[Tensor | None] = [None] * len(leaves)
        for i, grad in zip(chosen, pulled, strict=True):
            result[i] = grad
        return None, *result


def rematerialize(function: Callable[..., tuple[Any, Any]], *args: Any) -> tuple[Any, Any]:
    """Call ``function(*args)``, and keep only the arguments for the backward pass.

    The compiler decides by itself what to keep, and forward-mode differentiation keeps nothing: in both cases the
    function is simply called.

    Args:
        function: returns an output, and something that no gradient flows through, such as running statistics.
        args: trees of tensors. They must contain all tensors that the function needs, because under ``vmap`` it cannot
            use others from outside.

    >>> def function(x):
    ...     return torch.sin(torch.cos(x)), {}
    >>> x = torch.tensor([1.0, 2.0])
    >>> slope = torch.func.vmap(torch.func.grad(lambda x: rematerialize(function, x)[0]))(x)
    >>> bool((slope == torch.func.vmap(torch.func.grad(lambda x: function(x)[0]))(x)).all())
    True
    """
    if torch.compiler.is_compiling() or derivatives().forward:
        return function(*args)
    leaves, structure = pytree.tree_flatten(args)
    run = _Run(function, structure)
    found = _Recompute.apply(run, *leaves)
    assert run.outputs is not None
    output, aside = run.outputs
    ys, rest = found[: run.flowing], found[run.flowing :]
    return pytree.tree_unflatten(list(ys), output), pytree.tree_unflatten(list(rest), aside)
