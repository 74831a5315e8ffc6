"""Networks that no other library has, beside their papers' formulas written out with torch alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import purecnn
from purecnn import Outputs, random
from purecnn.layer import DRAW
from purecnn.tree import Tree
from purecnn.zoo.capsnet import margin_loss, route
from tests.table import CASES, assert_close, to


def setting(family: str) -> tuple[Tree, Tree, Tensor]:
    """Parameters, statistics and images of a family's case, in double precision."""
    case = CASES[family]
    params, state = case.model().init(random.key(0))
    return to(torch.float64, params), to(torch.float64, state), case.images().double()


def squashed(s: Tensor) -> Tensor:
    """Equation 1 of CapsNet's paper, for one vector."""
    n = s.norm()
    return n**2 / (1 + n**2) * s / n


def test_capsules_go_where_their_votes_agree() -> None:
    """Procedure 1 of CapsNet's paper, image by image and capsule by capsule."""
    votes = random.normal(random.key(0), (2, 6, 3, 4), dtype=torch.float64)
    for rounds in (1, 3):
        for i, vote in enumerate(votes):
            logits = torch.zeros(6, 3, dtype=torch.float64)
            for _ in range(rounds):
                weights = logits.softmax(1)
                above = [squashed((weights[:, j, None] * vote[:, j]).sum(0)) for j in range(3)]
                logits = logits + torch.stack([vote[:, j] @ above[j] for j in range(3)], 1)
            assert_close(route(votes, rounds)[i], torch.stack(above), rtol=1e-10, atol=1e-10)


def test_resnets_have_two_kinds_of_blocks() -> None:
    with pytest.raises(ValueError, match="block is 'basic' or 'bottleneck', found 'basc'"):
        purecnn.create("resnet18", block="basc")


def test_capsnet_and_its_loss() -> None:
    """Figures 1 and 2 and equation 4, image by image."""
    params, state, x = setting("capsnet")
    labels = torch.tensor([3, 1])
    output, _ = CASES["capsnet"].model().apply(params, state, x, train=True)
    assert isinstance(output, Outputs)
    total = torch.zeros((), dtype=torch.float64)
    for image, label, lengths, drawn in zip(x, labels, output.logits, output.aux[0], strict=True):
        stem, primary = params["stem"]["conv"], params["stage1"]["conv"]
        maps = F.conv2d(F.conv2d(image, stem["weight"], stem["bias"]).relu(), primary["weight"], primary["bias"], 2)
        below = [squashed(maps[4 * m : 4 * m + 4, i, j]) for m in range(2) for i in range(3) for j in range(3)]
        votes = torch.stack([params["head"]["weight"][n] @ u for n, u in enumerate(below)])
        above = route(votes[None], 3)[0]
        assert_close(lengths, above.norm(dim=1), rtol=1e-9)
        for k in range(5):
            y = torch.zeros(5, 6, dtype=torch.float64)
            y[k] = above[k]
            y = y.flatten()
            for name in ("linear1", "linear2", "linear3"):
                y = params["aux1"][name]["weight"] @ y + params["aux1"][name]["bias"]
                y = y.sigmoid() if name == "linear3" else y.relu()
            assert_close(drawn[k], -(y - image.flatten()).square().sum(), rtol=1e-9)
        for k, length in enumerate(lengths):
            total += max(0.9 - length, 0) ** 2 if k == label else 0.5 * max(length - 0.1, 0) ** 2
        total -= 0.0005 * drawn[label]
    assert_close(margin_loss(output, labels), total / 2, rtol=1e-9)
    shares = F.one_hot(labels, 5).double()
    assert_close(margin_loss(output, shares), total / 2, rtol=1e-9)
    mixed = margin_loss(output, 0.25 * shares + 0.75 * shares.flip(0))
    assert_close(mixed, 0.25 * total / 2 + 0.75 * margin_loss(output, labels.flip(0)), rtol=1e-9)
    plain = margin_loss(output.logits, labels)
    assert_close(margin_loss(output, labels) - plain, -0.0005 * output.aux[0][[0, 1], labels].mean(), rtol=1e-9)


def test_routing_takes_a_round() -> None:
    with pytest.raises(ValueError, match="at least 1 round, found 0"):
        CASES["capsnet"].model(rounds=0).spec()


@pytest.mark.parametrize("width", [8, 18])
def test_amoebanet_has_no_narrower_cells(width: int) -> None:
    with pytest.raises(ValueError, match=f"a multiple of 4 and at least 16, found {width}"):
        CASES["amoebanet"].model(width=width)


def test_stochastic_depth_takes_images_of_any_size() -> None:
    model = CASES["stochastic_depth"].model(image_size=15)
    assert model.apply(*model.init(random.key(0)), torch.ones(2, 3, 15, 13))[0].shape == (2, 5)


def test_vectors_of_zeros_have_a_derivative() -> None:
    slope = torch.func.grad(lambda votes: route(votes, 3).sum())(torch.zeros(1, 4, 3, 2))
    assert slope.isfinite().all()


def test_blocks_survive_by_chance_and_count_by_it() -> None:
    """Equations 2 to 5 of stochastic depth: probabilities fall in equal steps to that of the last block."""
    params, state, x = setting("stochastic_depth")
    model = CASES["stochastic_depth"].model()
    paths = ["stage1.0", "stage2.0", "stage2.1", "stage3.0"]
    survival = dict(zip(paths, (0.875, 0.75, 0.625, 0.5), strict=True))

    def branch(path: str, x: Tensor) -> Tensor:
        stage, block = path.split(".")
        own, statistics, stride = (
            params[stage][block],
            state[stage][block],
            2 if path in ("stage2.0", "stage3.0") else 1,
        )
        for i in ("1", "2"):
            x = F.conv2d(x, own[f"conv{i}"]["weight"], None, stride if i == "1" else 1, 1)
            norm, moments = own[f"norm{i}"], statistics[f"norm{i}"]
            x = F.batch_norm(x, moments["mean"], moments["var"], norm["weight"], norm["bias"])
            x = x.relu() if i == "1" else x
        return x

    def expected(x: Tensor, factors: dict[str, float]) -> Tensor:
        x = F.conv2d(x, params["stem"]["conv"]["weight"], None, 1, 1)
        x = F.batch_norm(x, state["stem"]["norm"]["mean"], state["stem"]["norm"]["var"]).relu()
        for path in paths:
            y = factors[path] * branch(path, x)
            short = F.avg_pool2d(x, x.shape[2] // y.shape[2])
            short = torch.cat([short, short.new_zeros(len(x), y.shape[1] - x.shape[1], *y.shape[2:])], 1)
            x = (y + short).relu()
        return F.linear(x.mean((2, 3)), *params["head"]["linear"].values())

    assert_close(model.apply(params, state, x)[0], expected(x, survival), rtol=1e-10)
    for seed in range(3):
        masks: dict[str, Tensor] = {}

        def tap(path: str, p: float, mask: Tensor, masks: dict[str, Tensor] = masks) -> Tensor:
            if path.endswith(DRAW):
                assert p == survival[path.removesuffix(f".{DRAW}")]
                assert mask.numel() == 1
                masks[path.removesuffix(f".{DRAW}")] = mask
            return mask

        found, _ = model.apply(params, state, x, train=True, statistics="running", key=random.key(seed), tap=tap)
        assert_close(found, expected(x, {path: float(mask) for path, mask in masks.items()}), rtol=1e-10)
