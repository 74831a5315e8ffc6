"""B6: what the host does for a call and a step of a small network, where the device has next to nothing to do.

The bare operators are torchvision's calls of torch's functions one after the other, as `straight` records them, without
modules, trees or names. What a call takes beyond them is its *overhead*: ours beside a module's, and beside that of
``functional_call``, which puts every tensor into its module and takes it out again. All of these read the same tensors.

Where JAX is installed, LeNet-5 is also written in it, and compiled by ``jax.jit``. What is compiled of ours is a
package, made ahead of time (`converters.export`), where there is a compiler of C++.
"""

import functools
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

import purecnn
from converters import torchvision as tv
from purecnn import random, tree
from purecnn.capture import captured
from purecnn.optimizers import sgd
from purecnn.training import TrainState, make_step
from purecnn.tree import Tree
from tests.benchmarks.race import Row, Setting, check, images, logits, package, pair, rows, signed, take_turns

WHAT = "host cost of a call and of a step"
NEEDS_GPU = False
RATE = 1e-4
GOALS = {"nn.Module": 1.0, "functional_call": 0.1}
Built: TypeAlias = tuple[purecnn.Model, Tree, Tree, nn.Module]
"""Ours, and a module, of the same tensors."""


class LeNet(nn.Module):
    """What a user writes for `purecnn.create("lenet5")`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5)
        self.linear1, self.linear2, self.linear3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.linear1(x.flatten(1)))
        return self.linear3(F.relu(self.linear2(x)))


def lenet(device: str) -> Built:
    model, module = purecnn.create("lenet5"), LeNet().to(device)
    params, state = model.init(random.key(0, device))
    leaves = tree.flatten(params).values()
    module.load_state_dict(dict(zip(module.state_dict(), leaves, strict=True)), assign=True)
    return model, params, state, module


def thin(device: str) -> Built:
    """MobileNet v2 with a tenth of its channels: 158 parameters and 156 statistics, and little to compute."""
    settings = {"dropout": 0.0, "num_classes": 10}
    return _shared("mobilenet_v2", device, {**settings, "width_mult": 0.1}, **settings, width=0.1)


def thin_resnet(device: str) -> Built:
    """ResNet-50 whose blocks have one inner channel where it has 64: 161 parameters and 159 statistics."""
    return _shared("resnet50", device, num_classes=10, width_per_group=1)


def _shared(name: str, device: str, peer: Mapping[str, Any] | None = None, **settings: Any) -> Built:
    """As `pair`, but of the same tensors: to fetch others into the caches takes as long as all that is measured."""
    model, *_, module = pair(name, device, peer, **settings)
    return model, *tv.LIBRARY.adopt(model, module.state_dict()), module


def run(setting: Setting) -> Iterator[Row]:
    for name, build in (("lenet5", lenet), ("thin mobilenet_v2", thin), ("thin resnet50", thin_resnet)):
        for batch in setting.pick((1, 32), (2,)):
            yield from evaluation(setting, name, build, batch)
            yield from training(setting, name, build, batch)


class _Recorder(TorchFunctionMode):
    """Notes the functions of torch that are called, and with what, as a graph."""

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.nodes = {id(tensor): self.graph.placeholder(f"input{i}") for i, tensor in enumerate(inputs)}
        self.alive = list(inputs)  # so that no other tensor is given the place, and with it the number, of one of them

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            args = tuple(map(self.node, args))
            kwargs = {name: self.node(value) for name, value in (kwargs or {}).items()}
            self.nodes[id(result)] = self.graph.call_function(func, args, kwargs)
            self.alive.append(result)
        return result

    def node(self, value: Any) -> Any:
        return self.nodes[id(value)] if isinstance(value, Tensor) else value


def straight(module: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """What a module does to an image, as one straight function."""
    tensors = [*module.parameters(), *module.buffers()]
    with _Recorder([x, *tensors]) as recorder:
        y = module(x)
    recorder.graph.output(recorder.node(y))
    function = fx.GraphModule({}, recorder.graph).forward
    return lambda x: function(x, *tensors)


def evaluation(setting: Setting, name: str, build: Callable[[str], Built], batch: int) -> Iterator[Row]:
    model, params, state, module = build(setting.device)
    module.eval()
    x, _ = images(setting, batch, 32, model.in_channels)
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    with torch.inference_mode():
        bare = straight(module, x)
        check(model.apply(params, state, x)[0], module(x))
        check(bare(x), module(x))
        ours = functools.partial(model.apply, params, state, x)
        peers = {
            "nn.Module": lambda: module(x),
            "functional_call": lambda: functional_call(module, tensors, (x,)),
            "the bare operators": lambda: bare(x),
        }
        compiled = _jax(params, x) if name == "lenet5" else None
        if compiled is not None:
            check(torch.tensor(np.asarray(compiled[0]())), module(x))
        jitted = {} if compiled is None else {"jax.jit": compiled[0]}
        yield from _rows(setting, f"{name}, call, batch {batch}", ours, peers, jitted)
        packaged = package(setting, functools.partial(logits, model), params, state, x)
        if packaged is not None:
            check(packaged(params, state, x), module(x))
            ready = functools.partial(packaged, params, state, x)
            yield from _rows(setting, f"{name}, call as a package, batch {batch}", ready, peers, jitted)
        if batch > 1:
            return
        times = take_turns(setting, {"": ours, **peers}, asynchronous=setting.cuda)
        floor = statistics.median(times.pop("the bare operators"))
        mine, *others = (statistics.median(each) - floor for each in times.values())
        for peer, theirs in zip(list(times)[1:], others, strict=True):
            what = f"{name}, overhead of a call"
            row = Row("B6", what, peer, mine, theirs, GOALS[peer], mine / theirs, len(times[""]))
            yield signed(setting, row)


def _step(model: purecnn.Model, train_state: TrainState, batch: tuple[Tensor, Tensor]) -> Any:
    return make_step(model, sgd(RATE, momentum=0.9))(train_state, batch)


def training(setting: Setting, name: str, build: Callable[[str], Built], batch: int) -> Iterator[Row]:
    """SGD with momentum, donated, against the loop that everybody writes, and against ``torch.func``."""
    model, params, state, module = build(setting.device)
    params, state = tree.map(torch.clone, params), tree.map(torch.clone, state)  # the module writes into its own
    module.train()
    x, labels = images(setting, batch, 32, model.in_channels, classes=10)
    if batch == 1 and state:
        return  # the last images are of one pixel, of which there are no statistics
    optimizer = sgd(RATE, momentum=0.9)
    reference = torch.optim.SGD(module.parameters(), lr=RATE, momentum=0.9)
    step = make_step(model, optimizer, donate=True)
    step = captured(step) if setting.cuda else step
    train_state = TrainState.start(tree.map(torch.clone, params), state, optimizer)
    packaged = package(setting, functools.partial(_step, model), train_state, (x, labels))
    packaged_state: Any = (tree.map(torch.clone, params), *train_state[1:])
    functional = {path: leaf.detach().clone() for path, leaf in module.named_parameters()}
    momenta = {path: torch.zeros_like(leaf) for path, leaf in functional.items()}
    buffers = {path: leaf.clone() for path, leaf in module.named_buffers()}

    def ours() -> Tensor:
        nonlocal train_state
        train_state, metrics = step(train_state, (x, labels))
        return metrics.loss

    def eager() -> Tensor:
        reference.zero_grad()
        loss = F.cross_entropy(module(x), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        reference.step()
        return loss

    def objective(leaves: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(module, {**leaves, **buffers}, (x,)), labels)

    def through_func() -> Tensor:
        nonlocal functional, momenta
        grads, loss = torch.func.grad_and_value(objective)(functional)
        momenta = {path: momenta[path] * 0.9 + grad for path, grad in grads.items()}
        functional = {path: leaf - RATE * momenta[path] for path, leaf in functional.items()}
        return loss

    def ready() -> Tensor:
        nonlocal packaged_state
        assert packaged is not None
        packaged_state, (loss, _) = packaged(packaged_state, (x, labels))
        return loss

    losses = ours(), eager()
    check(*losses)
    peers = {"nn.Module": eager}
    compiled = _jax(params, x, labels) if name == "lenet5" else None
    if compiled is not None:
        check(losses[0], torch.tensor(np.asarray(compiled[1]())))
    jitted = {} if compiled is None else {"jax.jit": compiled[1]}
    if not buffers:  # running statistics in place are refused under torch.func
        check(losses[0], through_func())
        peers["functional_call"] = through_func
    yield from _rows(setting, f"{name}, step, batch {batch}", ours, peers, jitted)
    if packaged is not None:
        check(losses[0], ready())
        yield from _rows(setting, f"{name}, step as a package, batch {batch}", ready, peers, jitted)


def _rows(
    setting: Setting,
    what: str,
    ours: Callable[[], Any],
    peers: Mapping[str, Callable[[], Any]],
    jitted: Mapping[str, Callable[[], Any]],
) -> Iterator[Row]:
    """Ours beside torch's, and then beside JAX, whose threads would take time from whoever comes after it."""
    yield from rows(setting, "B6", what, ours, peers, goals=GOALS, asynchronous=setting.cuda)
    if jitted:
        yield from rows(setting, "B6", what, ours, jitted, asynchronous=setting.cuda)


def _jax(params: Tree, x: Tensor, labels: Tensor | None = None) -> tuple[Callable[[], Any], Callable[[], Any]] | None:
    """LeNet-5's call, and its step with SGD and momentum, which gives the loss; None without JAX on the same device."""
    try:
        import jax
    except ImportError:
        return None
    if x.device.type != {"cpu": "cpu", "gpu": "cuda"}.get(jax.default_backend()):
        return None
    lax, numpy = jax.lax, jax.numpy
    names = ("stem.conv", "stage1.conv", "stage2.linear1", "stage2.linear2", "head.linear")
    flat = {path: numpy.array(leaf.cpu().numpy()) for path, leaf in tree.flatten(params).items()}
    weights = [(flat[f"{name}.weight"], flat[f"{name}.bias"]) for name in names]
    images = numpy.array(x.cpu().numpy())
    truth = None if labels is None else numpy.array(labels.cpu().numpy())

    def network(weights: Any, x: Any) -> Any:
        for weight, bias in weights[:2]:
            x = jax.nn.relu(lax.conv(x, weight, (1, 1), "VALID") + bias[:, None, None])
            x = lax.reduce_window(x, -numpy.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
        x = x.reshape(len(x), -1)
        for weight, bias in weights[2:4]:
            x = jax.nn.relu(x @ weight.T + bias)
        weight, bias = weights[4]
        return x @ weight.T + bias

    def loss(weights: Any, x: Any) -> Any:
        return -jax.nn.log_softmax(network(weights, x))[numpy.arange(len(x)), truth].mean()

    def update(weights: Any, momenta: Any, x: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(weights, x)
        momenta = jax.tree.map(lambda momentum, grad: 0.9 * momentum + grad, momenta, grads)
        return jax.tree.map(lambda weight, momentum: weight - RATE * momentum, weights, momenta), momenta, value

    call, compiled = jax.jit(network), jax.jit(update, donate_argnums=(0, 1))
    trained = jax.tree.map(numpy.copy, weights)
    momenta = jax.tree.map(numpy.zeros_like, weights)

    def step() -> Any:
        nonlocal trained, momenta
        trained, momenta, value = jax.block_until_ready(compiled(trained, momenta, images))
        return value

    return lambda: jax.block_until_ready(call(weights, images)), step
