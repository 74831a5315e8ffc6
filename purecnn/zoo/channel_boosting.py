"""Channel boosting: a convolution also sees what networks that were trained before make of the image.

    Khan, Sohail, Ali. A New Channel Boosted Convolutional Neural Network using Transfer Learning. 2018,
    arXiv:1804.08528. With several pretrained networks as learners: Khan et al. 2020, arXiv:2012.05073.

Three steps, and what they are here:

1. *Generation.* An auxiliary learner, trained on other data or for another aim, gives channels ``A_m`` for an image.
   It is any layer. Its trained tree lies in the *state*, since it is no parameter: no gradient, no moments in an
   optimizer, no weight decay, nothing to be excluded by name; yet it is there to see, to save and to replace. See
   `auxiliary`, and `features` for what a network computes inside.
2. *Boosting.* ``I_B = concat(I_C, A_1, ..., A_M)``, with each ``A_m`` brought to mean 0 and deviation 1 per channel by
   numbers that were measured once on the training images (`measured`) and lie beside the learner.
3. *Exploitation.* The convolution that reads ``I_B`` has more input channels, whose weights start at zero: the boosted
   network starts at the function of the network it came from. See `channel_boost`.

Zero columns in one wide convolution would not do for that: a kernel adds in another order when there is more to add,
and the last digits change. A convolution is linear, so here it is written as the sum that it is,
``conv(concat(I, A), [W V]) = conv(I, W) + conv(A, V)``: with V = 0 the second term adds exact zeros. The trained
network's tree also stays as it is, and V lies beside it, so any convolution of any network can be boosted.

Deviations: the paper's learners are stacked autoencoders on telephone records drawn as images; here they are any layer.
What it added to the story: channels as a place where knowledge comes in.
"""

from collections.abc import Iterable
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from purecnn import tree
from purecnn.layer import Layer, Mode, named
from purecnn.layers import Convolution, Leaf
from purecnn.paper import Paper
from purecnn.tree import Tree

PAPER = Paper(
    "A New Channel Boosted Convolutional Neural Network using Transfer Learning",
    "Khan, Sohail, Ali",
    2018,
    "arXiv:1804.08528",
)

BOOST = "boost"
"""The sub-tree of a boosted network that holds the learners and the weights of their channels."""

Norm = Literal["batch", "group"]
# By name, because the compiler cannot subscript types in functions inside of functions.
_Applied: TypeAlias = tuple[Any, Tree]


def features(layer: Layer, path: str) -> Layer:
    """What a network computes inside, as a layer: the output of its layer at ``path``, in evaluation mode.

    Parameters and statistics are the whole network's. What comes after ``path`` runs too, for nothing.

    Args:
        layer: the network.
        path: names joined by dots, such as ``"stage1"``.

    >>> import purecnn
    >>> model = purecnn.create("lenet5")
    >>> stem = features(model.layer, "stem")
    >>> stem.apply(*model.init(purecnn.random.key(0)), torch.zeros(1, 1, 32, 32), Mode())[0].shape
    torch.Size([1, 6, 14, 14])

    Raises:
        ValueError: when it runs, if no layer of that name does.
    """

    def run(params: Tree, state: Tree, x: Any, mode: Mode) -> Tensor:
        wanted = f"{mode.path}.{path}" if mode.path else path
        found: dict[str, Any] = {}

        def tap(here: str, x: Any, y: Any) -> Any:
            if mode.tap is not None:
                y = mode.tap(here, x, y)
            found[here] = y
            return y

        layer.apply(params, state, x, mode._replace(train=False, batch_statistics=False, tap=tap))
        if wanted not in found:
            raise ValueError(f"there is no layer {path!r}; there are {', '.join(found)}")
        y: Tensor = found[wanted]
        return y

    def init(x: Any, mode: Mode) -> tuple[Tree, Tree, Any]:
        params, state, _ = layer.init(x, mode)
        abstract = mode._replace(key=None)
        return params, state, run(*layer.init(x, abstract)[:2], x, abstract)

    return Layer(init, lambda params, state, x, mode: (run(params, state, x, mode), state), layer.names)


def auxiliary(learner: Layer, *, norm: Norm = "batch") -> Layer:
    """A frozen network's channels, standardised: ``(A(x) - mean) / std``, ``(b, c, h, w) -> (b, c', h', w')``.

    It has no parameters. Its state is ``params`` and ``state`` of the learner, and ``mean`` and ``std``, ``(c',)``, of
    its channels. The learner runs in evaluation mode and its tree is detached, so that it stays as it is also for who
    differentiates by the state; derivatives with respect to the image go through.

    Args:
        learner: a layer that gives images.
        norm: what it was trained with; see `purecnn.create`. The network that it is part of may have another one.

    Raises:
        ValueError: when it runs, if the learner gives no images.

    >>> from purecnn.layers import conv
    >>> params, state, _ = auxiliary(conv(2, 3)).init(torch.empty(1, 3, 8, 8, device="meta"), Mode())
    >>> params, {path: tuple(leaf.shape) for path, leaf in tree.flatten(state).items()}
    ({}, {'params.weight': (2, 3, 3, 3), 'mean': (2,), 'std': (2,)})
    """

    def run(state: Tree, x: Any, mode: Mode) -> Tensor:
        params, statistics = (tree.map(torch.detach, state.get(part, {})) for part in ("params", "state"))
        # Not `around`, whose layers have parameters, nor a key: nothing is drawn in evaluation.
        y, _ = learner.apply(params, statistics, x, Mode(tap=mode.tap, norm=norm, path=mode.path))
        if not isinstance(y, Tensor) or y.ndim != 4:
            found = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(f"a learner gives images (batch, channels, height, width), found {found}")
        return y

    def init(x: Any, mode: Mode) -> tuple[Tree, Tree, Any]:
        def draw(mode: Mode) -> Tree:
            params, state, _ = learner.init(x, mode._replace(norm=norm))
            return {"params": params, "state": state}

        y = run(draw(mode._replace(key=None)), x, mode)
        shape = (y.shape[1],)
        numbers = {name: Leaf(shape, value).draw(name, mode) for name, value in (("mean", 0.0), ("std", 1.0))}
        return {}, {**draw(mode), **numbers}, y

    def apply(params: Tree, state: Tree, x: Any, mode: Mode) -> tuple[Any, Tree]:
        mean, std = (state[name].detach()[:, None, None] for name in ("mean", "std"))
        return (run(state, x, mode) - mean) / std, state

    return Layer(init, apply, frozenset(("params", "state", "mean", "std")))


def measured(learner: Layer, params: Tree, state: Tree, images: Iterable[Tensor], *, norm: Norm = "batch") -> Tree:
    """The state of ``auxiliary(learner)``: the trained trees, with mean and deviation of each channel over images.

    Args:
        learner: as in `auxiliary`; ``norm`` too.
        params: its trained parameters.
        state: its running statistics.
        images: batches (batch, channels, height, width) of the training half; gone through once. The deviation of a
            channel that never changes, but by a millionth of its mean, is given as 1.

    >>> from purecnn.layers import identity
    >>> images = torch.tensor([1.0, 5.0]).reshape(2, 1, 1, 1)
    >>> measured(identity, {}, {}, [images])["mean"], measured(identity, {}, {}, [images])["std"]
    (tensor([3.]), tensor([2.]))

    Raises:
        ValueError: if there are no images.
    """
    mode = Mode(norm=norm)
    count, total, square = 0, torch.zeros(()), torch.zeros(())
    shift: Tensor | None = None
    dtype = torch.float32
    with torch.no_grad():
        for batch in images:
            y, _ = learner.apply(params, state, batch, mode)
            dtype = y.dtype
            values = y.double().transpose(0, 1).flatten(1)
            # Sums of squares about a value nearby, because those about zero lose digits where the mean is large.
            shift = values[:, :1] if shift is None else shift
            count += values.shape[1]
            total = total + (values - shift).sum(1)
            square = square + (values - shift).square().sum(1)
    if shift is None:
        raise ValueError("there are no images to measure the learner's channels on")
    mean = total / count
    std = (square / count - mean.square()).clamp(min=0).sqrt()
    std = torch.where(std > 1e-6 * (shift[:, 0] + mean).abs(), std, 1.0)
    numbers = {"mean": (shift[:, 0] + mean).to(dtype), "std": std.to(dtype)}
    return {"params": params, "state": state, **numbers}


def _convolutions(network: Layer, x: Tensor, mode: Mode) -> dict[str, tuple[Layer, Tensor]]:
    """All convolutions with their weights, meta tensors, in the order in which they run, by path in the network."""
    found: dict[str, tuple[Layer, Tensor]] = {}

    def around(layer: Layer, params: Tree, state: Tree, h: Any, here: Mode) -> tuple[Any, Tree]:
        if isinstance(layer.kind, Convolution):
            found[here.path] = layer, params["weight"]
        return layer.apply(params, state, h, here)

    abstract = Mode(norm=mode.norm)
    params, state, _ = network.init(x, abstract)
    network.apply(params, state, x, abstract._replace(around=around))
    return found


def _resize(y: Tensor, size: torch.Size) -> Tensor:
    return y if y.shape[2:] == size else F.interpolate(y, size, mode="bilinear")


def channel_boost(network: Layer, at: str | None = None, **learners: Layer) -> Layer:
    """A network, one of whose convolutions reads the channels of auxiliary learners beside its own.

    The tree is the network's own, and ``boost``: in the parameters ``boost.weight`` (features, all learners' channels,
    height, width), the columns by which the convolution is wider, zero at first; in the state ``boost.NAME``, the
    learner's. So trained trees are put in by their names::

        model = dataclasses.replace(plain, layer=channel_boost(plain.layer, encoder=auxiliary(encoder)))
        params, state = model.init(key)
        params = {**params, **plain_params}
        state = {**state, **plain_state, "boost": {"encoder": measured(encoder, *trained, images)}}

    Learners see the network's input. Where their channels are of another size than what the convolution reads, they are
    resized (bilinear).

    Args:
        network: any layer that takes images and has a convolution, such as ``purecnn.create("resnet18").layer``.
        at: the path of the convolution, such as ``"stage2.0.conv1"``; by default the first one, so that the image is
            boosted.
        learners: layers from the image to channels, as `auxiliary` makes them, by name. None leaves the network.

    >>> import purecnn
    >>> from purecnn.layers import conv
    >>> plain = purecnn.create("resnet18", num_classes=10)
    >>> boosted = channel_boost(plain.layer, random=auxiliary(conv(5, 3)))
    >>> params, state, y = boosted.init(torch.empty(1, 3, 64, 64, device="meta"), Mode())
    >>> tuple(params["stem"]["conv"]["weight"].shape), tuple(params["boost"]["weight"].shape), tuple(y.shape)
    ((64, 3, 7, 7), (64, 5, 7, 7), (1, 10))

    Raises:
        ValueError: if the network is boosted already; in initialisation, if it has no such convolution or one in
            groups, or if a learner has parameters.
    """
    if not learners:
        return network
    if BOOST in network.names:
        raise ValueError("the network is boosted already: give all learners at once")

    children = [named(name, learner) for name, learner in learners.items()]

    def init(x: Any, mode: Mode) -> tuple[Tree, Tree, Any]:
        params, state, y = network.init(x, mode)
        found = _convolutions(network, x, mode)
        if not found or (at is not None and at not in found):
            raise ValueError(f"there is no convolution {at or ''!r} to boost; there are {', '.join(found) or 'none'}")
        layer, weight = found[next(iter(found)) if at is None else at]
        if layer.kind.groups != 1:
            raise ValueError(f"a convolution in {layer.kind.groups} groups cannot be boosted: which should see what?")
        # Without the law, which is about the network's own tensors.
        inner = mode.enter(BOOST)._replace(law=None)
        learned: Tree = {}
        count = 0
        for child in children:
            own, own_state, channels = child.init(x, inner)
            if own:
                raise ValueError(f"the learner {next(iter(own))!r} has parameters: freeze it with auxiliary()")
            learned |= own_state
            count += channels.shape[1]
        columns = Leaf((weight.shape[0], count, *weight.shape[2:]), 0.0).draw("weight", inner)
        return {**params, BOOST: {"weight": columns}}, {**state, BOOST: learned}, y

    def apply(params: Tree, state: Tree, x: Any, mode: Mode) -> _Applied:
        wanted = at and (f"{mode.path}.{at}" if mode.path else at)
        inner = mode.enter(BOOST)
        run = mode.around or _run
        boosted = False

        def around(layer: Layer, own: Tree, own_state: Tree, h: Any, here: Mode) -> _Applied:
            nonlocal boosted
            y, own_state = run(layer, own, own_state, h, here._replace(around=mode.around))
            if boosted or not isinstance(layer.kind, Convolution) or wanted not in (None, here.path):
                return y, own_state
            boosted = True
            outputs = [child.apply({}, state[BOOST], x, inner)[0] for child in children]
            channels = torch.cat([_resize(output, h.shape[2:]) for output in outputs], dim=1)
            # The same convolution, with other weights and without the bias; who runs layers sees it.
            z, _ = run(layer, params[BOOST], {}, channels, inner)
            return y + z, own_state

        # Rematerialised layers know of the tensors that they are given alone, and here they see the learners' too.
        return network.apply(params, state, x, mode._replace(around=around, remat=False))

    return Layer(init, apply, network.names | {BOOST})


def _run(layer: Layer, params: Tree, state: Tree, x: Any, mode: Mode) -> _Applied:
    return layer.apply(params, state, x, mode)
