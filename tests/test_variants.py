"""The laws of every variant at its full width and depth; `test_transforms` has them for each family's smallest."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

import purecnn
from purecnn import random, tree
from purecnn.tree import Tree
from tests.table import TABLE, Mutations, assert_close, heads, loss_of, pick, to, unsettled

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", TABLE)
def test_laws(name: str) -> None:
    model = purecnn.create(name)
    params, state = model.init(random.key(0))
    state, key = unsettled(state), random.key(1)
    x = random.normal(random.key(2), (2, model.in_channels, TABLE[name].image_size, TABLE[name].image_size))
    given = {"params": params, "state": state, "x": x}
    versions = tree.map(lambda leaf: leaf._version, given)
    frozen: dict[str, Any] = {"train": True, "statistics": "running", "key": key}

    def loss(params: Tree, x: Tensor) -> Tensor:
        return loss_of(heads(model.apply(params, state, x, **frozen)[0]))

    # Gradients per sample equal a loop; in double, where rounding says nothing, unless that takes too much memory.
    dtype = torch.float64 if tree.size(params) < 10**8 else torch.float32
    own, fixed = to(dtype, params), to(dtype, state)

    def sample_loss(params: Tree, image: Tensor) -> Tensor:
        return loss_of(heads(model.apply(params, fixed, image[None], **frozen)[0]))

    mapped = vmap(grad(sample_loss), in_dims=(None, 0))(own, x.to(dtype))
    assert_close(pick(mapped, 0), grad(sample_loss)(own, x[0].to(dtype)))
    del mapped, own
    one = grad(loss)(params, x[:1])

    # Forward mode gives the gradient's product with a direction.
    direction = tree.map(torch.sign, one)
    _, forward = jvp(lambda params: loss(params, x[:1]), (params,), (direction,))
    assert_close(forward, torch.stack([leaf.abs().sum() for leaf in tree.flatten(one).values()]).sum(), rtol=1e-3)
    del one, direction

    # One graph, compiled and exported, equals eager; nothing is written into.
    for how in ({}, {"train": True, "key": key}):

        def run(params: Tree, state: Tree, x: Tensor, how: dict[str, Any] = how) -> tuple[tuple[Tensor, ...], Tree]:
            output, new_state = model.apply(params, state, x, **how)
            return tuple(heads(output)), new_state

        with Mutations() as mutations:
            expected = run(params, state, x)
        assert mutations.found == []
        torch.compiler.reset()
        assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(params, state, x), expected)
        exported = torch.export.export(Called(run), (params, state, x), strict=False).module()
        assert_close(exported(params, state, x), expected)
    assert tree.map(lambda leaf: leaf._version, given) == versions


class Called(torch.nn.Module):
    """torch.export takes modules alone."""

    def __init__(self, function: Any):
        super().__init__()
        self.function = function

    def forward(self, params: Tree, state: Tree, x: Tensor) -> Any:
        return self.function(params, state, x)
