"""Blocks are composition: what one paper puts on a branch, any residual network can take."""

from collections.abc import Callable

import pytest
import torch
from torch.func import grad, vmap

from converters import checkpoint
from converters.rules import ConversionError
from purecnn import Layer, Model, add, fork, random, serial, tree
from purecnn.layer import DRAW
from purecnn.layers import global_avg_pool, identity, linear, stochastic_depth
from purecnn.optimizers import sgd
from purecnn.step import TrainState, make_step
from purecnn.zoo import preactresnet, resnet
from purecnn.zoo.cbam import attended
from purecnn.zoo.resnet import projection
from purecnn.zoo.senet import excited
from tests.table import assert_close

Wrap = Callable[[Layer, int], Layer]
"""From a branch and the channels of its output to a branch."""

WRAPS: dict[str, Wrap] = {
    "plain": lambda branch, width: branch,
    "se": lambda branch, width: excited(branch, width, 16),
    "cbam": lambda branch, width: attended(branch, width, 16),
    "depth": lambda branch, width: stochastic_depth(branch, 0.5),
    "se and depth": lambda branch, width: stochastic_depth(excited(branch, width, 16), 0.5),
    "both gates": lambda branch, width: excited(attended(branch, width, 16), width, 8),
}


def head() -> Layer:
    return serial(global_avg_pool, linear=linear(5))


def post_activation(wrap: Wrap) -> Layer:
    def block(w: int, stride: int) -> Layer:
        branch = resnet.bottleneck((w // 4, w // 4, 4 * w), (1, stride), groups=4)
        return resnet.residual(wrap(branch, 4 * w), projection(4 * w, stride))

    return resnet.network(block, (1, 2), num_classes=5)


def pre_activation(wrap: Wrap) -> Layer:
    parts = preactresnet.stages(
        lambda width, stride: wrap(preactresnet.bottleneck(width, stride), width), 64, (64, 128), (1, 2)
    )
    return serial(stem=resnet.stem(), **parts, head=head())


def sum_of_blocks(wrap: Wrap) -> Layer:
    def block(width: int) -> Layer:
        return add(identity, named=wrap(resnet.bottleneck((16, 16, width)), width))

    return resnet.network(lambda w, stride: serial(projection(4 * w, stride), block(4 * w)), (1,), num_classes=5)


NETWORKS = {"post": post_activation, "pre": pre_activation, "sum": sum_of_blocks}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("wrap", WRAPS)
def test_any_residual_network_takes_any_branch(network: str, wrap: str) -> None:
    model = Model.of(NETWORKS[network](WRAPS[wrap]), num_classes=5, image_size=32)
    params, state = model.init(random.key(0))
    plain = Model.of(NETWORKS[network](WRAPS["plain"]), num_classes=5, image_size=32).init(random.key(0))[0]
    mine, theirs = tree.flatten(params), tree.flatten(plain)
    # The branch keeps its names and values; a gate adds to them.
    assert theirs.keys() <= mine.keys()
    assert all(torch.equal(mine[path], leaf) for path, leaf in theirs.items())
    assert (len(mine) > len(theirs)) == (wrap not in ("plain", "depth"))

    x, labels = random.normal(random.key(1), (4, 3, 32, 32)), torch.arange(4)
    optimizer = sgd(0.01)
    _, metrics = make_step(model, optimizer)(TrainState.start(params, state, optimizer), (x, labels), random.key(2))
    assert metrics.loss.isfinite()

    def loss(params: tree.Tree, image: torch.Tensor) -> torch.Tensor:
        return model.apply(params, state, image[None])[0].square().sum()

    each = vmap(grad(loss), in_dims=(None, 0))(params, x)
    together = grad(lambda params: model.apply(params, state, x)[0].square().sum())(params)
    assert_close(tree.map(lambda leaf: leaf.sum(0), each), together, rtol=1e-4)


def test_a_dropped_branch_leaves_the_shortcut() -> None:
    branch = resnet.bottleneck((8, 8, 16))
    layer = add(identity, stochastic_depth(branch, 0.5))
    model = Model.of(serial(stem=layer), num_classes=16, in_channels=16, image_size=4)
    params, state = model.init(random.key(0))
    x = random.normal(random.key(1), (32, 16, 4, 4))
    kept: dict[str, torch.Tensor] = {}

    def tap(path: str, before: object, after: torch.Tensor) -> torch.Tensor:
        kept[path] = after
        return after

    y, _ = model.apply(params, state, x, train=True, key=random.key(2), statistics="running", tap=tap)
    mask = kept[f"stem.{DRAW}"].flatten()
    assert 0 < mask.sum() < 32
    assert torch.equal(y[~mask], x[~mask])
    assert not torch.equal(y[mask], x[mask])


def test_an_auxiliary_head_is_a_fork_of_any_stage() -> None:
    rest = serial(stage2=resnet.bottleneck((8, 8, 32)), head=head())
    layer = serial(stem=resnet.stem(), body=fork(rest, aux1=head()))
    model = Model.of(layer, num_classes=5, image_size=32)
    params, state = model.init(random.key(0))
    outputs, _ = model.apply(params, state, torch.zeros(2, 3, 32, 32), train=True)
    assert outputs.logits.shape == outputs.aux[0].shape == (2, 5)


def test_a_model_of_ones_own_has_no_checkpoint(tmp_path: pytest.TempPathFactory) -> None:
    model = Model.of(post_activation(WRAPS["se"]), num_classes=5, image_size=32, name="mine")
    with pytest.raises(ConversionError, match="has no 'mine'"):
        checkpoint.save(f"{tmp_path}/x.safetensors", model, *model.init(random.key(0)))
