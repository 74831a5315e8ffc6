"""The network of airbench: CIFAR-10 to 94% in seconds.

    Jordan. 94% on CIFAR-10 in 3.29 Seconds on a Single GPU. 2024, arXiv:2404.00498.

Three ideas let a small plain network train in a few epochs. First, the stem's convolution whitens its input: its
weight is not learned but computed from the covariance of the training images' patches (see `whitening`), with both
signs of each eigenvector; only its bias is learned. Second, the other convolutions start as close to the identity as
their shape allows, so that the network starts like a residual one. Third, batch normalisation has no scale, and the
logits are scaled down by a constant.

`init` draws the first weight like any other, because it sees no images. Insert the whitening weight before training:

    weight = whitening(patches(images))
    stem = {**params["stem"], "whiten": {**params["stem"]["whiten"], "weight": weight}}
    params = {**params, "stem": stem}

Its gradient is zero, but weight decay would shrink it, so exclude it from weight decay. The paper's training recipe
(alternating flips, Lookahead, a higher learning rate for biases) is not part of the network.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from purecnn.initializers import fan_in_uniform
from purecnn.layer import Layer, Mode, serial
from purecnn.layers import Leaf, Leaves, batch_norm, conv, flatten, gelu, linear, max_pool, parametric, stateless
from purecnn.paper import Group, Paper, Published, Variant
from purecnn.tree import Tree

PAPER = Paper(
    "94% on CIFAR-10 in 3.29 Seconds on a Single GPU",
    "Jordan",
    2024,
    "arXiv:2404.00498",
    groups=(Group.TRAINING_SPEED,),
)


def patches(images: Tensor, kernel: int = 2) -> Tensor:
    """All patches of the images, ``(b, c, h, w) -> (n, c, kernel, kernel)``."""
    windows = images.unfold(2, kernel, 1).unfold(3, kernel, 1)
    return rearrange(windows, "b c h w i j -> (b h w) c i j")


def whitening(patches: Tensor, eps: float = 5e-4) -> Tensor:
    """Section 3.2: the convolution's weight, ``(2 c h w, c, h, w)``, from patches ``(n, c, h, w)``.

    The filters are the eigenvectors of the patches' covariance (the mean is not subtracted), each divided by
    ``sqrt(eigenvalue + eps)``, from the largest eigenvalue to the smallest; then their negatives. Except for ``eps``,
    the outputs of the first half are uncorrelated and have variance 1.

    >>> x = torch.randn(1000, 3, 2, 2, generator=torch.Generator().manual_seed(0)).cumsum(dim=1)
    >>> y = F.conv2d(x, whitening(x, eps=0.0))[:, :12].flatten(1)
    >>> bool(torch.allclose(y.T @ y / 1000, torch.eye(12), atol=1e-4))
    True
    """
    _, c, h, w = patches.shape
    flat = rearrange(patches, "n c h w -> n (c h w)")
    values, vectors = torch.linalg.eigh(flat.T @ flat / len(flat))
    rows = (vectors / (values + eps).sqrt()).T.flip(0)
    return rearrange([rows, -rows], "sign k (c h w) -> (sign k) c h w", c=c, h=h, w=w)


def whitening_conv(kernel: int) -> Layer:
    """Has twice as many filters as a patch has values. Its weight is not learned: the gradient is zero."""

    def leaves(x: Tensor) -> Leaves:
        shape = (2 * x.shape[1] * kernel**2, x.shape[1], kernel, kernel)
        return {"weight": Leaf(shape, fan_in_uniform()), "bias": Leaf(shape[:1], 0.0)}, {}

    def apply(params: Tree, state: Tree, x: Tensor, mode: Mode) -> tuple[Tensor, Tree]:
        return torch.conv2d(x, params["weight"].detach(), params["bias"]), state

    return parametric(leaves, apply, "weight", "bias")


def identity_start(key: Tensor, shape: tuple[int, ...], /, dtype: torch.dtype = torch.float32) -> Tensor:
    """Section 3.3: each of the first filters passes one input channel through; the others are drawn as usual."""
    features, channels, height, width = shape
    drawn = fan_in_uniform()(key, shape, dtype)
    eye = torch.eye(min(features, channels), channels, dtype=dtype, device=key.device)
    middle = (width // 2, width - 1 - width // 2, height // 2, height - 1 - height // 2)
    return torch.cat([F.pad(eye[:, :, None, None], middle), drawn[len(eye) :]])


def norm() -> Layer:
    """Batch normalisation without scale."""
    return batch_norm(eps=1e-12, momentum=0.4, scale=False)


def group(width: int) -> Layer:
    """Two 3x3 convolutions; a pool halves the image between the first one and its normalisation."""
    return serial(
        conv1=conv(width, 3, init=identity_start), pool=max_pool(2, 2), norm1=norm(), act1=gelu,
        conv2=conv(width, 3, init=identity_start), norm2=norm(), act2=gelu,
    )  # fmt: skip


def airbench(
    *, widths: Sequence[int] = (64, 256, 256), kernel: int = 2, scale: float = 1 / 9, num_classes: int = 10
) -> Layer:
    """Section 3.1 of the paper.

    Args:
        widths: channels of each group.
        kernel: kernel size of the whitening convolution, pixels.
        scale: factor by which the logits are multiplied.
        num_classes: outputs of the head.
    """
    return serial(
        stem=serial(whiten=whitening_conv(kernel), act=gelu),
        **{f"stage{i}": group(width) for i, width in enumerate(widths, start=1)},
        head=serial(
            max_pool(3, 3), flatten, linear=linear(num_classes, bias=False), scale=stateless(lambda x: x * scale)
        ),
    )


VARIANTS = {
    "airbench94": Variant(
        airbench,
        PAPER,
        image_size=32,
        published=Published(94.01, "test accuracy", "CIFAR-10", "authors' repository, mean of runs"),
    )
}
