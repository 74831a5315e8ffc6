"""DelugeNet beside the authors' Torch7 code, read anew with torch.nn: tables of tensors, the newest first."""

import pytest
import torch
from torch import Tensor, nn

import purecnn
from purecnn import random, tree
from purecnn.tree import Tree
from tests.table import assert_computes_as, drawn_state_dict


class CrossLayer(nn.Module):
    """CrossLayerDepthwiseConvolution.lua: each tensor of a table normalised by itself, and all added."""

    def __init__(self, planes: int, layers: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(planes) for _ in range(layers))

    def forward(self, table: list[Tensor]) -> Tensor:
        return torch.stack([norm(x) for norm, x in zip(self.norms, table, strict=True)]).sum(0)


class Layer(nn.Module):
    """``bottleneck`` of delugenet.lua; ``first`` of its block, it keeps nothing of the table."""

    def __init__(self, planes: int, n: int, layers: int, first: bool) -> None:
        super().__init__()
        self.first, self.transition = first, first and layers > 1
        self.inflow = CrossLayer(planes, layers) if layers > 1 else None
        self.norm1 = nn.BatchNorm2d(planes)
        if self.transition:
            self.conv = nn.Conv2d(planes, 2 * n, 3, 2, 1, bias=False)
            return
        self.conv1, self.norm2 = nn.Conv2d(planes, n, 1, bias=False), nn.BatchNorm2d(n)
        self.conv2, self.norm3 = nn.Conv2d(n, n, 3, padding=1, bias=False), nn.BatchNorm2d(n)
        self.conv3 = nn.Conv2d(n, 2 * n, 1, bias=False)

    def forward(self, table: list[Tensor]) -> list[Tensor]:
        x = self.norm1(table[0] if self.inflow is None else self.inflow(table))
        if self.transition:
            return [self.conv(x)]
        y = self.conv3(self.norm3(self.conv2(self.norm2(self.conv1(x.relu())).relu())).relu())
        return [y] if self.first else [y, *table]


class Reference(nn.Module):
    """The model for CIFAR: ``n`` layers in the first block, ``n`` times 2 and 3 after a transition."""

    def __init__(self, n: int, base: int, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, base, 3, padding=1, bias=False)
        planes, layers = base, 1
        self.units = nn.ModuleList()
        for features, count in ((base, n), (2 * base, 2 * n + 1), (4 * base, 3 * n + 1)):
            for i in range(count):
                self.units.append(Layer(planes, features, layers, first=not i))
                planes, layers = 2 * features, layers + 1 if i else 1
        self.inflow, self.norm = CrossLayer(planes, layers), nn.BatchNorm2d(planes)
        self.linear = nn.Linear(planes, classes)

    def forward(self, x: Tensor) -> Tensor:
        table = [self.conv(x)]
        for unit in self.units:
            table = unit(table)
        found: Tensor = self.linear(self.norm(self.inflow(table)).relu().mean((2, 3)))
        return found

    def parts(self) -> dict[str, nn.Module]:
        """Its layers by our names."""
        found: dict[str, nn.Module] = {"stem.conv": self.conv}
        stage, i = 1, 0
        for unit in self.units:
            path = f"stage{stage}.transition" if unit.transition else f"stage{stage}.{i}"
            names = {"norm1": "norm"} if unit.transition else {}
            found |= {f"{path}.{names.get(name, name)}": part for name, part in unit.named_children()}
            stage, i = (stage + 1, 0) if unit.transition else (stage, i + 1)
        return {
            **found,
            f"stage{stage}.inflow": self.inflow,
            f"stage{stage}.norm": self.norm,
            "head.linear": self.linear,
        }


STATISTICS = {"mean": "running_mean", "var": "running_var", "count": "num_batches_tracked"}


def trees(module: Reference, gradients: bool = False) -> tuple[Tree, Tree]:
    """Its tensors, or its gradients in place of the parameters, as our trees."""
    params: dict[str, Tensor] = {}
    state: dict[str, Tensor] = {}
    for path, part in module.parts().items():
        oldest_first = list(part.norms)[::-1] if isinstance(part, CrossLayer) else [part]
        for name in ("weight", "bias"):
            if getattr(oldest_first[0], name) is not None:
                tensors = [getattr(norm, name) for norm in oldest_first]
                params[f"{path}.{name}"] = torch.cat([t.grad if gradients else t.detach() for t in tensors])
        for name, theirs in STATISTICS.items():
            if hasattr(oldest_first[0], theirs):
                values = [getattr(norm, theirs) for norm in oldest_first]
                state[f"{path}.{name}"] = values[0].clone() if name == "count" else torch.cat(values)
    return tree.unflatten(params), tree.unflatten(state)


@pytest.mark.parametrize(("name", "n", "width"), [("delugenet146_cifar", 2, 8), ("wide_delugenet146_cifar", 3, 14)])
def test_equals_the_authors_code(name: str, n: int, width: int) -> None:
    model = purecnn.create(name, depths=(n, 2 * n, 3 * n), width=width, num_classes=5)
    module = Reference(n, width // 2, 5)
    module.load_state_dict(drawn_state_dict(module))
    params, state = trees(module)
    model.check(params, state)
    x = random.normal(random.key(1), (2, 3, 32, 32))
    assert_computes_as(model, params, state, module, x, lambda: (trees(module, gradients=True)[0], trees(module)[1]))


@pytest.mark.parametrize(
    ("name", "millions"), [("delugenet146_cifar", 6.7), ("delugenet218_cifar", 10.0), ("wide_delugenet146_cifar", 20.2)]
)
def test_has_the_parameters_that_the_authors_print(name: str, millions: float) -> None:
    model = purecnn.create(name)
    n, width = model.settings["depths"][0], model.settings["width"]
    count = sum(leaf.numel() for leaf in tree.flatten(model.spec()[0]).values())
    assert round(count / 1e6, 1) == millions
    assert count == sum(p.numel() for p in Reference(n, width // 2, 10).parameters())


def test_cross_layer_convolutions_begin_as_means() -> None:
    params, _ = purecnn.create("delugenet146_cifar", depths=(2, 1, 2), width=8).init(random.key(0))
    for path, layers in (("stage1.transition", 2), ("stage2.transition", 2), ("stage3.1", 2), ("stage3", 3)):
        inflow = {name: leaf for name, leaf in tree.flatten(params).items() if name.startswith(f"{path}.inflow.")}
        width = inflow[f"{path}.inflow.weight"].numel() // layers
        assert torch.equal(inflow[f"{path}.inflow.weight"], torch.full((layers * width,), 1 / layers))
        assert not inflow[f"{path}.inflow.bias"].any()
