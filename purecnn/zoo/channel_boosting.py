"""Channel boosting: a convolution also reads feature maps that pretrained networks compute from the image.

    Khan, Sohail, Ali. A New Channel Boosted Convolutional Neural Network using Transfer Learning. 2018,
    arXiv:1804.08528. With several pretrained networks as learners: Khan et al. 2020, arXiv:2012.05073.

The method has three steps, implemented here as follows:

1. *Generation.* An auxiliary learner, trained on other data or for another task, computes channels ``A_m`` from an
   image. Any layer can be a learner. Its trained tree is part of the *state*, not of the parameters: it has no
   gradient, no optimizer moments and no weight decay, so nothing has to be excluded by name, and it can still be
   inspected, saved and replaced. See `auxiliary`, and `features` for intermediate outputs of a network.
2. *Boosting.* ``I_B = concat(I_C, A_1, ..., A_M)``. Each channel of ``A_m`` is standardised to mean 0 and standard
   deviation 1 by statistics measured once on the training images (`measured`) and stored beside the learner.
3. *Exploitation.* The convolution that reads ``I_B`` has more input channels, whose weights start at zero: the boosted
   network starts as the same function as the original one. See `channel_boost`.

Zero columns in one wider convolution would not give exactly the same function: a convolution with more inputs sums in
another order, and the last digits change. A convolution is linear, so here it is computed as a sum,
``conv(concat(I, A), [W V]) = conv(I, W) + conv(A, V)``: with V = 0 the second term adds exact zeros. The trained
network's tree also stays unchanged, with V beside it, so any convolution without groups can be boosted, in any network.

Deviation: the paper's learners are stacked autoencoders on telephone records drawn as images; here they are any layer.
What it added: channels as a way to bring in knowledge from other networks.
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
# By name, because the compiler cannot subscript types in nested functions.
_Applied: TypeAlias = tuple[Any, Tree]


def features(layer: Layer, path: str) -> Layer:
    """An intermediate output of a network as a layer: the output of the layer at ``path``, in evaluation mode.

    Parameters and statistics are those of the whole network. The layers after ``path`` run too; their output is
    discarded.

    Args:
        layer: the network.
        path: the names from the root to the layer, joined by dots, such as ``"stage1"``.

    >>> import purecnn
    >>> model = purecnn.create("lenet5")
    >>> stem = features(model.layer, "stem")
    >>> stem.apply(*model.init(purecnn.random.key(0)), torch.zeros(1, 1, 32, 32), Mode())[0].shape
    torch.Size([1, 6, 14, 14])

    Raises:
        ValueError: when it runs, if the network has no layer at that path.
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
    """A frozen network's output channels, standardised: ``(A(x) - mean) / std``, ``(b, c, h, w) -> (b, c', h', w')``.

    It has no parameters. Its state is the learner's ``params`` and ``state``, and its channels' ``mean`` and ``std``,
    ``(c',)``. The learner runs in evaluation mode and its tree is detached, so even derivatives with respect to the
    state leave it unchanged; derivatives with respect to the image pass through.

    Args:
        learner: a layer that outputs images.
        norm: the normalisation it was trained with, see `purecnn.create`; it may differ from the boosted network's.

    Raises:
        ValueError: when it runs, if the learner's output is not a batch of images.

    >>> from purecnn.layers import conv
    >>> params, state, _ = auxiliary(conv(2, 3)).init(torch.empty(1, 3, 8, 8, device="meta"), Mode())
    >>> params, {path: tuple(leaf.shape) for path, leaf in tree.flatten(state).items()}
    ({}, {'params.weight': (2, 3, 3, 3), 'mean': (2,), 'std': (2,)})
    """

    def run(state: Tree, x: Any, mode: Mode) -> Tensor:
        params, statistics = (tree.map(torch.detach, state.get(part, {})) for part in ("params", "state"))
        # No `around`, which is for layers with parameters, and no key, because evaluation draws nothing.
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
    """The state of ``auxiliary(learner)``: the trained trees, and each channel's mean and deviation over the images.

    Args:
        learner: as in `auxiliary`.
        params: the learner's trained parameters.
        state: the learner's running statistics.
        images: batches (batch, channels, height, width) of the training images, iterated over once. A channel whose
            deviation is at most a millionth of its mean counts as constant and gets the deviation 1.
        norm: as in `auxiliary`.

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
            # Sums of squares about a nearby value, because sums about zero lose digits where the mean is large.
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
    """All convolutions with their weights (meta tensors) by path in the network, in the order in which they run."""
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
    """A network in which one convolution also reads the channels of auxiliary learners.

    The tree is the network's own plus ``boost``: in the parameters, ``boost.weight`` (features, all learners' channels,
    height, width), the convolution's additional columns, initially zero; in the state, ``boost.NAME``, each learner's
    state. So trained trees are inserted by name::

        model = dataclasses.replace(plain, layer=channel_boost(plain.layer, encoder=auxiliary(encoder)))
        params, state = model.init(key)
        params = {**params, **plain_params}
        state = {**state, **plain_state, "boost": {"encoder": measured(encoder, *trained, images)}}

    Learners see the network's input. If their output differs in size from the convolution's input, it is resized
    (bilinear).

    Args:
        network: any layer that takes images and has a convolution, such as ``purecnn.create("resnet18").layer``.
        at: the path of the convolution, such as ``"stage2.0.conv1"``; by default the first one, so that the image is
            boosted.
        learners: layers from the image to channels, made by `auxiliary`, by name. Without any, the network is returned
            unchanged.

    >>> import purecnn
    >>> from purecnn.layers import conv
    >>> plain = purecnn.create("resnet18", num_classes=10)
    >>> boosted = channel_boost(plain.layer, random=auxiliary(conv(5, 3)))
    >>> params, state, y = boosted.init(torch.empty(1, 3, 64, 64, device="meta"), Mode())
    >>> tuple(params["stem"]["conv"]["weight"].shape), tuple(params["boost"]["weight"].shape), tuple(y.shape)
    ((64, 3, 7, 7), (64, 5, 7, 7), (1, 10))

    Raises:
        ValueError: if the network is already boosted; in initialisation, if there is no such convolution or it is
            grouped, or if a learner has parameters.
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
        # Without the law, which applies to the network's own tensors.
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
            # The same convolution, with other weights and without the bias; an outer `around` sees it too.
            z, _ = run(layer, params[BOOST], {}, channels, inner)
            return y + z, own_state

        # Rematerialised layers know only the tensors they are given, but this convolution also uses the learners'.
        return network.apply(params, state, x, mode._replace(around=around, remat=False))

    return Layer(init, apply, network.names | {BOOST})


def _run(layer: Layer, params: Tree, state: Tree, x: Any, mode: Mode) -> _Applied:
    return layer.apply(params, state, x, mode)
