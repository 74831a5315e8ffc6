"""What a network looks at: input gradients, SmoothGrad, integrated gradients, Grad-CAM.

    heat = grad_cam(model, params, state, x)          # where: (batch, h, w)
    values, gap = integrated_gradients(model, params, state, x, target)        # which pixels: as x

All run the network in evaluation mode, where the images of a batch do not influence each other: one backward pass of
the sum of the batch's logits gives the gradient of each image. The logit of a class, before the softmax, is explained.
"""

import operator
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.func import grad

from purecnn import random
from purecnn.eager import is_transformed
from purecnn.model import Model
from purecnn.tree import Tree

__all__ = ["Integrated", "Target", "grad_cam", "input_gradient", "integrated_gradients", "smooth_gradient"]

Target: TypeAlias = Tensor | int | None
"""The class to explain: one for each image (batch,), int64; one for all; or None for each image's most likely class."""


def input_gradient(model: Model, params: Tree, state: Tree, x: Tensor, target: Target = None) -> Tensor:
    """The gradient of a class's logit with respect to the image, ``d logit[target] / d x``.

    Simonyan et al. 2013, arXiv:1312.6034, section 3; they display its largest magnitude over the channels.

    Args:
        model, params, state: the network.
        x: images (batch, channels, height, width).
        target: the class.

    Returns:
        Gradients in the shape of ``x``.

    Raises:
        ValueError: if there are not as many targets as images, or no such class.

    >>> import purecnn
    >>> model = purecnn.create("lenet5")
    >>> params, state = model.init(random.key(0))
    >>> input_gradient(model, params, state, torch.zeros(2, 1, 32, 32), target=3).shape
    torch.Size([2, 1, 32, 32])
    """
    target = _classes(model, params, state, x, target)
    return grad(lambda x: _scores(model.apply(params, state, x)[0], target).sum())(x)


def smooth_gradient(
    model: Model,
    params: Tree,
    state: Tree,
    x: Tensor,
    target: Target = None,
    *,
    key: Tensor,
    noise: float = 0.15,
    samples: int = 50,
    chunk_size: int = 32,
) -> Tensor:
    """SmoothGrad: the mean of the input gradient over noisy copies of the image.

    Smilkov et al. 2017, arXiv:1706.03825, section 3; the defaults are theirs.

    Args:
        model, params, state: the network.
        x: images (batch, channels, height, width).
        target: the class; None is the most likely class of the image without noise.
        key: for the noise; sample ``i`` draws ``random.normal(random.fold_in(key, i), x.shape)``.
        noise: standard deviation of the Gaussian noise, as a share of the range of each image's values.
        samples: number of noisy copies.
        chunk_size: about how many images to process at a time; only the memory depends on it.

    Returns:
        Gradients in the shape of ``x``.

    Raises:
        ValueError: if ``noise`` is negative, ``samples`` is less than 1, there are not as many targets as images, or no
            such class.
    """
    if noise < 0:
        raise ValueError(f"noise is at least 0, found {noise}")
    if samples < 1:
        raise ValueError(f"samples is at least 1, found {samples}")
    target = _classes(model, params, state, x, target)
    deviation = noise * (x.amax((1, 2, 3), keepdim=True) - x.amin((1, 2, 3), keepdim=True))

    def sample(i: int) -> Tensor:
        return x + deviation * random.normal(random.fold_in(key, i), x.shape, dtype=x.dtype)

    return _mean_gradient(model, params, state, target, sample, [1 / samples] * samples, chunk_size)


class Integrated(NamedTuple):
    """Integrated gradients, and their error of completeness."""

    values: Tensor
    """What each pixel adds to the logit, compared with the baseline, in the shape of the images."""
    gap: Tensor
    """``values.sum() - (logit(x) - logit(baseline))`` of each image (batch,): 0 with infinitely many steps."""


def integrated_gradients(
    model: Model,
    params: Tree,
    state: Tree,
    x: Tensor,
    target: Target = None,
    *,
    baseline: Tensor | None = None,
    steps: int = 50,
    chunk_size: int = 32,
) -> Integrated:
    """Integrated gradients: the mean input gradient on the line from a baseline to the image, times their difference.

    ``values = (x - baseline) * integral_0^1 gradient(baseline + a (x - baseline)) da``, by the Gauss-Legendre rule.
    Sundararajan et al. 2017, arXiv:1703.01365, section 3. They are complete: the values add up to the difference of
    the logits. If the gap is large, use more steps.

    Args:
        model, params, state: the network.
        x: images (batch, channels, height, width).
        target: the class.
        baseline: an image without information, in a shape that broadcasts to that of ``x``; by default zeros, which
            for normalised images is the mean colour.
        steps: number of points on the line.
        chunk_size: about how many images to process at a time; only the memory depends on it.

    Raises:
        ValueError: if ``steps`` is less than 1, or there are not as many targets as images, or no such class.

    >>> import purecnn
    >>> model = purecnn.create("lenet5")
    >>> params, state = model.init(random.key(0))
    >>> x = random.normal(random.key(1), (2, 1, 32, 32))
    >>> values, gap = integrated_gradients(model, params, state, x, target=3)
    >>> values.shape, bool((gap.abs() < 1e-2).all())
    (torch.Size([2, 1, 32, 32]), True)
    """
    if steps < 1:
        raise ValueError(f"steps is at least 1, found {steps}")
    baseline = (torch.zeros_like(x) if baseline is None else baseline).expand_as(x)
    target = _classes(model, params, state, x, target)
    nodes, weights = np.polynomial.legendre.leggauss(steps)  # on [-1, 1]; the weights sum to 2
    way = x - baseline

    def point(i: int) -> Tensor:
        return baseline + float(1 + nodes[i]) / 2 * way

    mean = _mean_gradient(model, params, state, target, point, (weights / 2).tolist(), chunk_size)
    values = way * mean
    ends = [_scores(model.apply(params, state, end)[0], target) for end in (x, baseline)]
    return Integrated(values, values.sum((1, 2, 3)) - (ends[0] - ends[1]))


def grad_cam(
    model: Model, params: Tree, state: Tree, x: Tensor, target: Target = None, *, path: str | None = None
) -> Tensor:
    """Grad-CAM: where in the image a layer's channels support a class.

    ``relu(sum_c a_c A_c)``, where ``A`` is the layer's output and ``a_c`` the mean over its pixels of
    ``d logit[target] / d A_c``. Selvaraju et al. 2016, arXiv:1610.02391, section 3. If a global average and one
    linear map follow the layer, it is the class activation map (arXiv:1512.04150) divided by the number of pixels.

    Args:
        model, params, state: the network.
        x: images (batch, channels, height, width).
        target: the class.
        path: the layer's path, such as ``"stage2.0.conv1"``; by default the last of the stem and the stages whose
            output is an image of more than one pixel.

    Returns:
        A map of values of at least 0, (batch, height, width) of the layer's output.

    Raises:
        ValueError: if there is no such layer, or if its output is not an image.

    >>> import purecnn
    >>> model = purecnn.create("lenet5")
    >>> params, state = model.init(random.key(0))
    >>> grad_cam(model, params, state, torch.zeros(2, 1, 32, 32)).shape  # of stage1; stage2 is a vector
    torch.Size([2, 5, 5])
    """
    found: dict[str, Tensor] = {}
    names: list[str] = []

    def record(name: str, x: Tensor, y: Tensor) -> Tensor:
        names.append(name)
        image = isinstance(y, Tensor) and y.ndim == 4
        if image and (name == path or (path is None and "." not in name and y.shape[2:].numel() > 1)):
            found[name] = y
        return y

    logits, _ = model.apply(params, state, x, tap=record)
    if not found:
        what = "no stage gives an image" if path is None else f"{path!r} gives no image"
        if path is not None and path not in names:
            what = f"there is no {path!r}"
        stages = ", ".join(name for name in names if "." not in name)
        raise ValueError(f"{model.name}: {what}; the layers are {stages} and those inside of them")
    path, activation = list(found.items())[-1]
    target = logits.argmax(1) if target is None else _classes(model, params, state, x, target)

    def score(activation: Tensor) -> Tensor:
        def replace(name: str, x: Tensor, y: Tensor) -> Tensor:
            return activation if name == path else y

        return _scores(model.apply(params, state, x, tap=replace)[0], target).sum()

    weights = grad(score)(activation).mean((2, 3), keepdim=True)
    return torch.relu((weights * activation).sum(1))


def _classes(model: Model, params: Tree, state: Tree, x: Tensor, target: Target) -> Tensor:
    """The class of each image: (batch,)."""
    if target is None:
        return model.apply(params, state, x)[0].argmax(1)
    if not isinstance(target, Tensor):
        target = operator.index(target)
        if not 0 <= target < model.num_classes:
            raise ValueError(f"target is a class from 0 to {model.num_classes - 1}, found {target}")
        return torch.full((len(x),), target, device=x.device)
    if target.shape != x.shape[:1]:
        raise ValueError(f"targets must be one for each of {len(x)} images, found shape {tuple(target.shape)}")
    if not is_transformed(target) and len(target) and not 0 <= target.min() <= target.max() < model.num_classes:
        raise ValueError(f"targets are classes from 0 to {model.num_classes - 1}, found {target.tolist()}")
    return target


def _scores(logits: Tensor, target: Tensor) -> Tensor:
    """The logit of each image's class: (batch,)."""
    return logits.gather(1, target[:, None])[:, 0]


def _mean_gradient(
    model: Model,
    params: Tree,
    state: Tree,
    target: Tensor,
    point: Callable[[int], Tensor],
    weights: list[float],
    chunk_size: int,
) -> Tensor:
    """``sum_i weights[i] * gradient(point(i))``, with about ``chunk_size`` images at once."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, found {chunk_size}")
    total: Tensor | float = 0.0
    batch = len(target)
    some = max(1, chunk_size // max(1, batch))
    for start in range(0, len(weights), some):
        part = range(start, min(start + some, len(weights)))
        images = torch.cat([point(i) for i in part])
        gradients = input_gradient(model, params, state, images, target.repeat(len(part)))
        share = torch.tensor(weights[start : part.stop], dtype=images.dtype, device=images.device)
        total = total + torch.tensordot(share, gradients.reshape(len(part), batch, *images.shape[1:]), 1)
    assert isinstance(total, Tensor)
    return total
