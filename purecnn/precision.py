"""Mixed precision: the dtypes in which parameters are kept, the network computes, and outputs are returned.

Autocast chooses dtypes operation by operation, implicitly, and chooses differently under ``torch.func``. A policy is
explicit, as in DeepMind's jmp: parameters and images are cast once, where they enter the network, and the output where
it leaves. Running statistics are not cast, since small updates would be lost in float16 or bfloat16.

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
    """The floating-point dtypes of parameters, computation and outputs.

    >>> import purecnn
    >>> model = purecnn.create("lenet5")
    >>> params, state = model.init(purecnn.random.key(0))
    >>> Policy(compute=torch.bfloat16).apply(model, params, state, torch.zeros(2, 1, 32, 32))[0].dtype
    torch.float32
    """

    parameters: torch.dtype = torch.float32
    """Dtype of the parameters and of the optimizer's state."""
    compute: torch.dtype = torch.float32
    """Dtype of everything that flows through the network."""
    output: torch.dtype = torch.float32
    """Dtype of the logits and the loss."""

    @property
    def scaled(self) -> bool:
        """Whether gradients would underflow unless the loss is scaled: only float16 has such a small exponent range."""
        return self.compute == torch.float16

    def keep(self, params: Tree) -> Tree:
        """The parameters, cast to the dtype that they are kept in."""
        return tree.map(lambda leaf: _cast(leaf, self.parameters), params)

    def apply(self, model: Model, params: Tree, state: Tree, x: Tensor, **settings: Any) -> tuple[Any, Tree]:
        """Run `Model.apply` in these dtypes."""
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
"""Policies by the name of the dtype that they compute in; parameters and logits are float32."""
