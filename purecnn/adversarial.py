"""Adversarial images: small changes of images that raise the network's loss most.

    attacked = pgd(model, params, state, x, labels, epsilon=0.1, step_size=0.02, steps=10, key=random.key(0))

The network runs in evaluation mode. Both functions ascend the loss of the true class or, if ``targeted``, descend that
of a chosen class. They return images; for adversarial training, call them outside of the differentiated function.
"""

from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad

from purecnn import random
from purecnn.eager import is_transformed
from purecnn.model import Model
from purecnn.tree import Tree

__all__ = ["Bounds", "fgsm", "pgd"]

Bounds: TypeAlias = tuple[float | Tensor, float | Tensor]
"""The pixel values of black and white. For normalised images they differ by channel: tensors (channels, 1, 1)."""


def fgsm(
    model: Model,
    params: Tree,
    state: Tree,
    x: Tensor,
    labels: Tensor,
    *,
    epsilon: float | Tensor,
    bounds: Bounds | None = None,
    targeted: bool = False,
) -> Tensor:
    """The fast gradient sign method, ``x + epsilon * sign(d loss / d x)``: one step of `pgd`.

    Goodfellow et al. 2014, arXiv:1412.6572, section 4.

    Args:
        model, params, state, x, labels, epsilon, bounds, targeted: see `pgd`.

    Raises:
        ValueError: as from `pgd`.

    >>> import purecnn
    >>> model = purecnn.create("lenet5")
    >>> params, state = model.init(random.key(0))
    >>> x, labels = random.uniform(random.key(1), (2, 1, 32, 32)), torch.tensor([3, 8])
    >>> attacked = fgsm(model, params, state, x, labels, epsilon=0.1, bounds=(0, 1))
    >>> bool(((attacked - x).abs() <= 0.1 + 1e-6).all())
    True
    """
    return pgd(
        model, params, state, x, labels, epsilon=epsilon, step_size=epsilon, steps=1, bounds=bounds, targeted=targeted
    )


def pgd(
    model: Model,
    params: Tree,
    state: Tree,
    x: Tensor,
    labels: Tensor,
    *,
    epsilon: float | Tensor,
    step_size: float | Tensor,
    steps: int,
    norm: Literal["inf", "2"] = "inf",
    bounds: Bounds | None = None,
    key: Tensor | None = None,
    targeted: bool = False,
) -> Tensor:
    """Projected gradient descent: gradient steps that raise the loss, each projected back to the allowed changes.

    Madry et al. 2017, arXiv:1706.06083, section 2.1. The loss is the network's own (`Model.loss`), or cross-entropy.

    Args:
        model, params, state: the network.
        x: images (batch, channels, height, width), within the bounds.
        labels: the true classes (batch,), int64; if ``targeted``, the classes to imitate.
        epsilon: the largest change, in units of ``x``: of any pixel, or with ``norm="2"`` the Euclidean norm of an
            image's change. A tensor that broadcasts to ``x`` sets it for each image (batch, 1, 1, 1) or, with
            ``norm="inf"``, for each channel (channels, 1, 1): for images normalised by ``std``, a change of ``e`` in
            pixel values is ``e / std[:, None, None]``.
        step_size: the size of one step, in the same units.
        steps: number of steps.
        norm: ``"inf"``: a step is ``step_size * sign(gradient)``; ``"2"``: ``step_size * gradient / |gradient|``.
        bounds: smallest and largest pixel value; by default there are none.
        key: for a random start, uniform among all allowed changes; by default the start is ``x``.
        targeted: descend the loss instead of ascending it.

    Returns:
        Images like ``x``.

    Raises:
        ValueError: if ``norm`` is neither of these, ``epsilon`` is a negative number or, with ``norm="2"``, differs
            within an image, ``steps`` is less than 1, or images exceed the bounds.

    >>> import purecnn
    >>> model = purecnn.create("lenet5")
    >>> params, state = model.init(random.key(0))
    >>> x, labels = random.uniform(random.key(1), (2, 1, 32, 32)), torch.tensor([3, 8])
    >>> attacked = pgd(model, params, state, x, labels, epsilon=1.0, step_size=0.5, steps=5, norm="2")
    >>> bool(((attacked - x).flatten(1).norm(dim=1) <= 1 + 1e-5).all())
    True
    """
    if norm not in ("inf", "2"):
        raise ValueError(f"norm is 'inf' or '2', found {norm!r}")
    if steps < 1:
        raise ValueError(f"steps is at least 1, found {steps}")
    if isinstance(epsilon, (int, float)) and epsilon < 0:
        raise ValueError(f"epsilon is at least 0, found {epsilon}")
    if norm == "2" and isinstance(epsilon, Tensor) and epsilon.shape not in ((), (len(x), 1, 1, 1)):
        expected = f"one number, or one for each image, ({len(x)}, 1, 1, 1)"
        raise ValueError(f"with norm='2' epsilon is {expected}, found {tuple(epsilon.shape)}")
    if bounds is not None and not is_transformed(x) and not x.equal(x.clamp(*(_like(bound, x) for bound in bounds))):
        raise ValueError("some images exceed the bounds, which are in the images' own units: normalise them, too")
    limit, size = _like(epsilon, x), _like(step_size, x) * (-1 if targeted else 1)
    criterion = model.loss or F.cross_entropy

    def loss(x: Tensor) -> Tensor:
        return len(x) * criterion(model.apply(params, state, x)[0], labels)  # the sum: each image has its own step

    def project(change: Tensor) -> Tensor:
        """The image with the nearest allowed change."""
        if norm == "inf":
            change = change.clamp(-limit, limit)
        else:
            length = _length(change)
            change = torch.where(length > limit, change * (limit / length), change)
        return x + change if bounds is None else (x + change).clamp(*(_like(bound, x) for bound in bounds))

    attacked = x if key is None else project(limit * _start(key, x, norm))
    for _ in range(steps):
        gradient = grad(loss)(attacked)
        step = gradient.sign() if norm == "inf" else _unit(gradient)
        attacked = project(attacked - x + size * step)
    return attacked


def _like(value: float | Tensor, x: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=x.dtype, device=x.device)


def _length(x: Tensor) -> Tensor:
    """The Euclidean norm of each image, never 0: (batch, 1, 1, 1)."""
    return torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


def _unit(x: Tensor) -> Tensor:
    """Each image scaled to norm 1, or 0 if it is 0. A confident network's gradients may be so small that their squares
    underflow."""
    x = x / x.abs().amax((1, 2, 3), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    return x / _length(x)


def _start(key: Tensor, x: Tensor, norm: str) -> Tensor:
    """A random change, uniform among those of norm at most 1."""
    if norm == "inf":
        return random.uniform(key, x.shape, dtype=x.dtype) * 2 - 1
    direction_key, radius_key = random.split(key)
    direction = random.normal(direction_key, x.shape, dtype=x.dtype)
    radius = random.uniform(radius_key, (len(x), 1, 1, 1), dtype=x.dtype) ** (1 / x[0].numel())
    return radius * _unit(direction)
