"""AmoebaNet-D beside the authors' TensorFlow code, read anew with torch.nn: its numbering, its padding."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import purecnn
from converters.rules import Rules, to_trees
from purecnn import random, tree
from tests.table import assert_computes_as, drawn_state_dict, trained_tensors

# models/official/amoeba_net/model_specs.py: operations, their inputs, and which states are not joined.
NORMAL = (
    ("1x1", "max3", "none", "7", "1x1", "7", "max3", "none", "avg3", "1x1"),
    (1, 1, 1, 0, 0, 0, 2, 2, 1, 5),
    (0, 1, 1, 0, 0, 1, 0),
)
REDUCTION = (
    ("max2", "max3", "none", "3", "7", "max3", "none", "max2", "avg3", "1x1"),
    (0, 0, 2, 1, 2, 2, 3, 1, 2, 3),
    (1, 1, 1, 1, 0, 0, 0),
)


def padded(x: Tensor, kernel: tuple[int, ...], stride: int, value: float = 0.0) -> Tensor:
    """TensorFlow's SAME."""
    sides = []
    for size, k in zip(x.shape[:1:-1], kernel[::-1], strict=True):
        total = max((-(-size // stride) - 1) * stride + k - size, 0)
        sides += [total // 2, total - total // 2]
    return F.pad(x, sides, value=value)


class Conv(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int] = (1, 1), stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, bias=False)
        self.norm = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.norm(self.conv(padded(x.relu(), self.conv.kernel_size, self.conv.stride[0])))
        return found


class Pool(nn.Module):
    def __init__(self, name: str, stride: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.largest, self.kernel, self.stride = name.startswith("max"), int(name[-1]), stride
        self.post = None
        if inputs != outputs:
            self.post = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs, eps=1e-3))

    def forward(self, x: Tensor) -> Tensor:
        k, stride = self.kernel, self.stride
        if self.largest:
            y = F.max_pool2d(padded(x, (k, k), stride, -torch.inf), k, stride)
        else:
            total, inside = (F.avg_pool2d(padded(z, (k, k), stride), k, stride) for z in (x, torch.ones_like(x)))
            y = total / inside
        return y if self.post is None else self.post(y)


class Factorized(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.even, self.odd = (nn.Conv2d(inputs, outputs // 2, 1, 2, bias=False) for _ in range(2))
        self.norm = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        shifted = F.pad(x.relu(), (0, 1, 0, 1))[:, :, 1:, 1:]
        found: Tensor = self.norm(torch.cat([self.even(x.relu()), self.odd(shifted)], dim=1))
        return found


def operation(name: str, inputs: int, width: int, stride: int) -> nn.Module:
    if name == "none":
        return nn.Identity()
    if name == "1x1":
        return Conv(inputs, width, stride=stride)
    if name[:3] in ("max", "avg"):
        return Pool(name, stride, inputs, width)
    inner = width // 4
    middle = [Conv(inner, inner, (3, 3), stride)] if name == "3" else [Conv(inner, inner, k) for k in ((1, 7), (7, 1))]
    return nn.Sequential(Conv(inputs, inner), *middle, Conv(inner, width))


class Cell(nn.Module):
    """``net`` and ``before``: channels and size of the last cell's output, and of the one's before it."""

    def __init__(self, spec, width, stride, net, before) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        names, self.inputs, self.used = spec
        self.current = Conv(net[0], width)
        channels = [width] * 7
        self.previous: nn.Module = nn.Identity()
        if before is None:
            channels[1] = net[0]
        elif before[1] != net[1]:
            self.previous = Factorized(before[0], width)
        elif before[0] != width:
            self.previous = Conv(before[0], width)
        self.operations = nn.ModuleList(
            operation(name, channels[i], width, stride if i < 2 else 1)
            for name, i in zip(names, self.inputs, strict=True)
        )
        self.gives = (width * self.used.count(0), -(-net[1] // stride))

    def forward(self, net: Tensor, before: Tensor) -> Tensor:
        states = [self.current(net), self.previous(before)]
        pairs = list(zip(self.operations, self.inputs, strict=True))
        for (left, i), (right, j) in zip(pairs[::2], pairs[1::2], strict=True):
            states.append(left(states[i]) + right(states[j]))
        return torch.cat([state for state, used in zip(states, self.used, strict=True) if not used], dim=1)


class Reference(nn.Module):
    """model_builder._build_network_base, without the auxiliary head."""

    def __init__(self, num_cells: int, width: int, stem_width: int, classes: int, size: int) -> None:
        super().__init__()
        self.conv0, self.norm0 = nn.Conv2d(3, stem_width, 3, 2, bias=False), nn.BatchNorm2d(stem_width, eps=1e-3)
        plan = [(REDUCTION, width // 4, 2), (REDUCTION, width // 2, 2)]
        for i in range(num_cells):
            if i in (num_cells // 3, 2 * num_cells // 3):
                width *= 2
                plan.append((REDUCTION, width, 2))
            plan.append((NORMAL, width, 1))
        shapes = [None, (stem_width, (size - 3) // 2 + 1)]
        self.cells = nn.ModuleList()
        for spec, cell_width, stride in plan:
            self.cells.append(cell := Cell(spec, cell_width, stride, shapes[-1], shapes[-2]))
            shapes.append(cell.gives)
        self.linear = nn.Linear(shapes[-1][0], classes)  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        net = self.norm0(self.conv0(x))
        outputs = [net, net]
        for cell in self.cells:
            outputs.append(cell(outputs[-1], outputs[-2]))
        found: Tensor = self.linear(outputs[-1].relu().mean((2, 3)))
        return found


def names(depth: int) -> Rules:
    """From the reference's names to ours."""
    counts = {1: depth + 2, 2: depth + 1, 3: depth + 1}
    ours = [f"stage{s}.{i}" for s, count in counts.items() for i in range(count)]
    pairs = [("conv0", "stem.conv"), ("norm0", "stem.norm"), ("linear", "head.linear")]
    for n, cell in enumerate(ours):
        pairs += [(f"cells.{n}.current.{part}", f"{cell}.current.{part}") for part in ("conv", "norm")]
        halves = cell in ("stage1.1", "stage1.2", "stage2.1", "stage3.1")
        parts = [("even", "conv.even"), ("odd", "conv.odd"), ("norm", "norm")]
        parts = parts if halves else [("conv", "conv"), ("norm", "norm")]
        pairs += [(f"cells.{n}.previous.{left}", f"{cell}.previous.{right}") for left, right in parts]
        for k in range(10):
            theirs, block = f"cells.{n}.operations.{k}", f"{cell}.block{k // 2 + 1}.{('left', 'right')[k % 2]}"
            kind = (REDUCTION if cell[-2:] == ".0" or cell == "stage1.1" else NORMAL)[0][k]
            inside = {"3": ("reduce", "conv", "expand"), "7": ("reduce", "row", "column", "expand")}.get(kind, ())
            for i, name in enumerate(inside):
                pairs += [(f"{theirs}.{i}.{part}", f"{block}.{name}.{part}") for part in ("conv", "norm")]
            if kind == "1x1":
                pairs += [(f"{theirs}.{part}", f"{block}.{part}") for part in ("conv", "norm")]
            if kind == "max2":
                pairs += [(f"{theirs}.post.{i}", f"{block}.{part}") for i, part in enumerate(("conv", "norm"))]
    return Rules(*pairs)


@pytest.mark.parametrize(
    ("depth", "stem_width", "size"), [(2, 6, 64), (2, 6, 67), (2, 4, 75), (3, 6, 96)], ids=lambda value: str(value)
)
def test_equals_the_authors_code(depth: int, stem_width: int, size: int) -> None:
    """Images of even and odd size at every reduction, for there padding differs."""
    model = purecnn.create(
        "amoebanet_d", depth=depth, width=16, stem_width=stem_width, num_classes=5, dropout=0.0, image_size=size
    )
    module, rules = Reference(3 * depth, 16, stem_width, 5, size), names(depth)
    state_dict = drawn_state_dict(module)
    module.load_state_dict(state_dict)
    params, state = to_trees(model, rules, state_dict)
    x = random.normal(random.key(1), (3, 3, size, size))
    assert_computes_as(model, params, state, module, x, lambda: to_trees(model, rules, trained_tensors(module)))


@pytest.mark.parametrize(
    ("cells", "width", "millions"), [(18, 208, 82), (18, 416, 318), (18, 544, 542), (36, 544, 1050), (72, 512, 1800)]
)
def test_has_the_parameters_that_gpipe_prints(cells: int, width: int, millions: float) -> None:
    """Table 1 of GPipe, arXiv:1811.06965, whose network has an auxiliary head in addition."""
    model = purecnn.create("amoebanet_d", depth=cells // 3, width=width)
    count = sum(leaf.numel() for leaf in tree.flatten(model.spec()[0]).values())
    assert abs(count / 1e6 / millions - 1) < (0.025 if millions == 1800 else 0.011)  # printed as 1.8 billion


def test_draws_by_the_authors_law_unless_told_otherwise() -> None:
    model = purecnn.create("amoebanet_d", width=64)
    params, _ = model.init(random.key(0))
    weight = params["stage3"]["2"]["block2"]["right"]["row"]["conv"]["weight"]
    assert float(weight.std()) == pytest.approx((2 / (64 * 7)) ** 0.5, rel=0.02)
    assert float(weight.abs().max()) < 2.3 * (2 / (64 * 7)) ** 0.5  # cut at two deviations of the uncut law
    half, _ = model.init(random.key(0), law=lambda path, shape: 0.5 if path.startswith("head") else None)
    assert float(half["head"]["linear"]["weight"].std()) == 0.0
    assert torch.equal(half["stage3"]["2"]["block2"]["right"]["row"]["conv"]["weight"], weight)
