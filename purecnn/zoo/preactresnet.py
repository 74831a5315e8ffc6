"""Pre-activation ResNet: the shortcuts are clean identities, so signals pass through 1001 layers.

    He, Zhang, Ren, Sun. Identity Mappings in Deep Residual Networks. ECCV 2016, arXiv:1603.05027.

Normalisation and ReLU move in front of each convolution, with one more pair at the end. Where the shape changes, the
shortcut is a 1x1 convolution of the block's first pre-activation. Deviations from the paper, those of timm's published
weights: the stride is on the 3x3; in the network for ImageNet, the stem's convolution has no normalisation of its own,
and the head is a 1x1 convolution of the pooled features.
"""

from collections.abc import Callable, Sequence

from purecnn.initializers import kaiming_normal
from purecnn.layer import Layer, add, numbered, serial
from purecnn.layers import (
    adaptive_avg_pool,
    batch_norm,
    conv,
    flatten,
    global_avg_pool,
    identity,
    linear,
    max_pool,
    relu,
)
from purecnn.paper import Group, Paper, Published, Variant

PAPER = Paper(
    "Identity Mappings in Deep Residual Networks",
    "He, Zhang, Ren, Sun",
    2016,
    "arXiv:1603.05027",
    groups=(Group.DEPTH, Group.MULTI_PATH),
)

he = kaiming_normal("fan_in")


def residual(inputs: int, width: int, stride: int, branch: Layer) -> Layer:
    """Figure 4e; ``branch`` begins after the first normalisation and ReLU."""
    first = serial(norm1=batch_norm(), relu1=relu)
    if stride == 1 and inputs == width:
        return add(identity, serial(first, branch))
    return serial(first, add(branch, shortcut=conv(width, 1, stride, init=he)))


def bottleneck(width: int, stride: int) -> Layer:
    """1x1 to a quarter of the width, 3x3, 1x1."""
    return serial(
        conv1=conv(width // 4, 1, init=he), norm2=batch_norm(), relu2=relu,
        conv2=conv(width // 4, 3, stride, init=he), norm3=batch_norm(), relu3=relu,
        conv3=conv(width, 1, init=he),
    )  # fmt: skip


def stages(
    branch: Callable[[int, int], Layer],
    inputs: int,
    widths: Sequence[int],
    depths: Sequence[int],
    block: Callable[[int, int, int, Layer], Layer] = residual,
) -> dict[str, Layer]:
    """Residual blocks around ``branch(width, stride)``, then the normalisation and the ReLU after the last block.

    Args:
        branch: the path parallel to the shortcut, without the first normalisation and ReLU.
        inputs: channels of the stem.
        widths: channels of each stage.
        depths: blocks of each stage.
        block: joins branch and shortcut; it has the arguments of `residual`.
    """
    parts: dict[str, Layer] = {}
    for i, (width, depth) in enumerate(zip(widths, depths, strict=True), start=1):
        blocks = []
        for j in range(depth):
            stride = 2 if i > 1 and not j else 1
            blocks.append(block(inputs, width, stride, branch(width, stride)))
            inputs = width
        parts[f"stage{i}"] = numbered(*blocks)
    return {**parts, f"stage{len(depths)}": serial(parts[f"stage{len(depths)}"], norm=batch_norm(), relu=relu)}


def preactresnet(
    depths: Sequence[int], *, widths: Sequence[int] = (256, 512, 1024, 2048), num_classes: int = 1000
) -> Layer:
    """The network for ImageNet, with bottlenecks.

    Args:
        depths: blocks of each stage.
        widths: channels of each stage.
        num_classes: outputs of the head.
    """
    return serial(
        stem=serial(conv=conv(64, 7, 2, init=he), pool=max_pool(3, 2, 1)),
        **stages(bottleneck, 64, widths, depths),
        head=serial(adaptive_avg_pool(1), conv=conv(num_classes, 1, bias=True), flatten=flatten),
    )


def preactresnet_cifar(
    depths: Sequence[int], *, widths: Sequence[int] = (64, 128, 256), num_classes: int = 10
) -> Layer:  # fmt: skip
    """The network for CIFAR, with bottlenecks: ``n`` in each of three stages make ``9n + 2`` layers.

    Args:
        depths: blocks of each stage.
        widths: channels of each stage.
        num_classes: outputs of the head.
    """
    return serial(
        stem=serial(conv=conv(16, 3, init=he)),
        **stages(bottleneck, 16, widths, depths),
        head=serial(global_avg_pool, linear=linear(num_classes)),
    )


VARIANTS = {
    "preactresnet50": Variant(
        preactresnet,
        PAPER,
        {"depths": (3, 4, 6, 3)},
        published=Published(80.41, "top-1 accuracy", "ImageNet", "timm's table, resnetv2_50.a1h_in1k, 224 pixels"),
    ),
    "preactresnet164_cifar": Variant(
        preactresnet_cifar,
        PAPER,
        {"depths": (18, 18, 18)},
        32,
        published=Published(5.46, "test error", "CIFAR-10", "quoted in arXiv:1605.07146"),
    ),
}
