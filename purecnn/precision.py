"""Types of numbers: what parameters are kept in, what is computed in, what comes out.

Autocast chooses types operation by operation, behind the scenes, and chooses differently under ``torch.func``. A policy
is explicit, as DeepMind's jmp has it: parameters and images are cast once, at the network's entrance, and the output at
its exit. Running statistics stay as they are, since small updates would be lost in short numbers.

Micikevicius et al., Mixed Precision Training, arXiv:1710.03740.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from purecnn import tree
from purecnn.model import Model
from purecnn.tree import Tree

__all__ = ["POLICIES", "Policy"]


class Policy(NamedTuple):
    """Types of floating-point numbers.

    >>> import purecnn
    >>> model = purecnn.create("lenet5")
    >>> params, state = model.init(purecnn.random.key(0))
    >>> Policy(compute=torch.bfloat16).apply(model, params, state, torch.zeros(2, 1, 32, 32))[0].dtype
    torch.float32
    """

    parameters: torch.dtype = torch.float32
    """Of parameters and what an optimizer keeps."""
    compute: torch.dtype = torch.float32
    """Of all that flows through the network."""
    output: torch.dtype = torch.float32
    """Of logits, and of the loss."""

    @property
    def scaled(self) -> bool:
        """Whether gradients would underflow unless the loss is scaled: only half precision has so few exponents."""
        return self.compute == torch.float16

    def keep(self, params: Tree) -> Tree:
        """Parameters in the type that they are kept in."""
        return tree.map(lambda leaf: _cast(leaf, self.parameters), params)

    def apply(self, model: Model, params: Tree, state: Tree, x: Tensor, **settings: Any) -> tuple[Any, Tree]:
        """`Model.apply` in these types."""
        params = tree.map(lambda leaf: _cast(leaf, self.compute), params)
        outputs, state = model.apply(params, state, _cast(x, self.compute), **settings)
        return pytree.tree_map(lambda leaf: _cast(leaf, self.output), outputs), state


def _cast(leaf: Tensor, dtype: torch.dtype) -> Tensor:
    return leaf.to(dtype) if leaf.is_floating_point() else leaf


POLICIES = {
    "float32": Policy(),
    "bfloat16": Policy(compute=torch.bfloat16),
    "float16": Policy(compute=torch.float16),
}
"""By the name of the type that is computed in; parameters and logits are in single precision."""
