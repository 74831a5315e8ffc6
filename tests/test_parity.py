"""Every model computes what torchvision's computes, to the last bit: outputs, gradients and running statistics."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad_and_value
from torchvision.models import get_model_weights

from converters import torchvision as tv
from purecnn import Model, random, tree
from purecnn.tree import Tree
from tests.table import CASES, PEERS, TABLE, assert_close, drawn_state_dict, heads, loss_of, peer, quiet

FAMILIES = [family for family, case in CASES.items() if case.name in PEERS]


def pair(model: Model, module: nn.Module, dtype: torch.dtype = torch.float32) -> tuple[Model, Tree, Tree, nn.Module]:
    """Both with the same random weights, in the same memory: the largest are gigabytes. Statistics have their own."""
    drawn = {
        key: leaf.to(dtype) if leaf.is_floating_point() else leaf for key, leaf in drawn_state_dict(module).items()
    }
    params, state = tv.from_state_dict(model, drawn)
    module.load_state_dict(tv.to_state_dict(model, params, tree.map(torch.clone, state)), assign=True)
    return model, params, state, module.requires_grad_()


def small_pair(family: str, dtype: torch.dtype = torch.float32) -> tuple[Model, Tree, Tree, nn.Module]:
    model = CASES[family].quiet()
    return pair(model, tv.to_module(model, *model.init(random.key(0))), dtype)


def torchvision_heads(output: Any) -> list[Tensor]:
    """torchvision has the auxiliary heads from deep to shallow."""
    if isinstance(output, Tensor):
        return [output]
    if output._fields == ("logits", "aux_logits"):  # Inception v3
        return [*output]
    assert output._fields == ("logits", "aux_logits2", "aux_logits1")
    return [output.logits, output.aux_logits1, output.aux_logits2]


def by_autograd(function: Any, has_aux: bool) -> Any:
    """`torch.func.grad_and_value` by way of `torch.autograd`, which is how torchvision's modules are differentiated."""
    assert has_aux

    def run(params: Tree) -> Any:
        leaves = tree.map(lambda leaf: leaf.detach().requires_grad_(), params)
        value, aux = function(leaves)
        flat = tree.flatten(leaves)
        return tree.unflatten(dict(zip(flat, torch.autograd.grad(value, list(flat.values())), strict=True))), (
            value,
            aux,
        )

    return run


def check(model: Model, params: Tree, state: Tree, module: nn.Module, x: Tensor, **how: Any) -> None:
    """One evaluation and one step of training on both sides."""
    with torch.no_grad():
        theirs = module.eval()(x)
    ours, same = model.apply(params, state, x)
    assert same is state
    assert theirs.isfinite().all()
    assert torch.equal(ours, theirs)

    module.train()
    if how.get("statistics") == "running":
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eval()
    outputs = torchvision_heads(module(x))
    loss_of(outputs).backward()

    def loss(params: Tree) -> tuple[Tensor, tuple[list[Tensor], Tree]]:
        output, new_state = model.apply(params, state, x, train=True, **how)
        return loss_of(heads(output)), (heads(output), new_state)

    for differentiate in (by_autograd, grad_and_value):
        gradients, (_, (logits, new_state)) = differentiate(loss, has_aux=True)(params)
        assert len(logits) == len(outputs)
        assert all(map(torch.equal, logits, outputs))
        found = tv.to_state_dict(model, gradients, new_state)
        expected = {key: p.grad for key, p in module.named_parameters()}
        if differentiate is grad_and_value and model.name.startswith("efficientnet"):
            # Where a second derivative may follow, torch differentiates SiLU by another formula.
            if x.dtype.itemsize > 2:  # short numbers round the difference up, layer by layer
                assert_close({key: found[key] for key in expected}, expected, rtol=1e-4, atol=1e-6)
        else:
            assert [key for key, gradient in expected.items() if not torch.equal(gradient, found[key])] == []  # type: ignore[arg-type]
        assert [key for key, buffer in module.named_buffers() if not torch.equal(buffer, found[key])] == []
        del gradients, found
    moved = [key for key, p in module.named_parameters() if p.grad is not None and p.grad.count_nonzero()]
    assert moved == [key for key, _ in module.named_parameters()]


@pytest.mark.parametrize("name", PEERS)
def test_model_equals_torchvision(name: str) -> None:
    size = TABLE[name].image_size
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    check(*pair(quiet(name), peer(name)), x)


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_statistics_equal_torchvision_with_normalisations_in_evaluation(family: str) -> None:
    check(*small_pair(family), CASES[family].images(), statistics="running")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        (torch.float64, torch.contiguous_format),
        (torch.float32, torch.channels_last),
        (torch.bfloat16, torch.contiguous_format),
        (torch.float16, torch.contiguous_format),
    ],
    ids=["float64", "channels_last", "bfloat16", "float16"],
)
def test_other_types_and_layouts_equal_torchvision(
    family: str, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    model, params, state, module = small_pair(family, dtype)
    module.to(memory_format=layout)  # type: ignore[call-overload]
    params = tree.map(lambda leaf: leaf.to(memory_format=layout) if leaf.ndim == 4 else leaf, params)
    check(model, params, state, module, CASES[family].images(3).to(dtype).to(memory_format=layout))


@pytest.mark.parametrize("name", PEERS)
def test_parameter_count_is_torchvisions(name: str) -> None:
    params, _ = quiet(name).spec()
    assert tree.size(params) == sum(p.numel() for p in peer(name).parameters())
    # The metadata count Inception v3's auxiliary head, but not GoogLeNet's.
    extra = tree.size({part: params[part] for part in params if part.startswith("aux") and name == "googlenet"})
    weights = get_model_weights(name)
    assert {tree.size(params) - extra} == {entry.meta["num_params"] for entry in weights}  # type: ignore[attr-defined]
