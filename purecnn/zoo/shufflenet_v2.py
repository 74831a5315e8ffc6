"""ShuffleNet v2: split the channels, transform one half, concatenate both and shuffle.

Ma, Zhang, Zheng, Sun. ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design. ECCV 2018,
arXiv:1807.11164.
"""

from collections.abc import Sequence

from einops import rearrange

from purecnn.layer import Layer, concat, numbered, serial
from purecnn.layers import conv_norm, global_avg_pool, identity, linear, max_pool, stateless
from purecnn.paper import Group, Paper, Published, Variant

PAPER = Paper(
    "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design",
    "Ma, Zhang, Zheng, Sun",
    2018,
    "arXiv:1807.11164",
    groups=(Group.MOBILE,),
)

shuffle = stateless(lambda x: rearrange(x, "b (half c) h w -> b (c half) h w", half=2))
first_half = stateless(lambda x: x.chunk(2, dim=1)[0])
second_half = stateless(lambda x: x.chunk(2, dim=1)[1])


def depthwise(width: int, stride: int) -> Layer:
    """A depthwise 3x3 convolution and normalisation."""
    return conv_norm(width, 3, stride, groups=width, act=identity)


def branch(width: int, stride: int) -> Layer:
    """1x1, depthwise 3x3, 1x1."""
    return serial(reduce=conv_norm(width, 1), depthwise=depthwise(width, stride), project=conv_norm(width, 1))


def unit(width: int) -> Layer:
    """Figure 3c: half of the channels pass through unchanged."""
    return serial(concat(first_half, serial(second_half, main=branch(width // 2, 1))), shuffle)


def downsampling(inputs: int, width: int) -> Layer:
    """Figure 3d: both branches see all channels, and the image shrinks."""
    shortcut = serial(depthwise=depthwise(inputs, 2), project=conv_norm(width // 2, 1))
    return serial(concat(shortcut=shortcut, main=branch(width // 2, 2)), shuffle)


def shufflenet_v2(
    widths: Sequence[int], *, depths: Sequence[int] = (4, 8, 4), stem_width: int = 24, num_classes: int = 1000
) -> Layer:
    """Table 5 of the paper; the last 1x1 convolution is a stage.

    Args:
        widths: channels of each stage; all except the last must be even.
        depths: units of each stage except the last.
        stem_width: channels of the first convolution.
        num_classes: outputs of the head.

    Raises:
        ValueError: unless there is exactly one more width than depths, and all widths except the last are even.
    """
    if len(widths) != len(depths) + 1 or any(width % 2 for width in widths[:-1]):
        raise ValueError(f"{len(depths)} stages need as many even widths and a last one, found {tuple(widths)}")
    inputs, stages = (stem_width, *widths[:-2]), {}
    for i, depth in enumerate(depths):
        units = [unit(widths[i]) for _ in range(depth - 1)]
        stages[f"stage{i + 1}"] = numbered(downsampling(inputs[i], widths[i]), *units)
    return serial(
        stem=serial(conv_norm(stem_width, 3, 2), pool=max_pool(3, 2, 1)),
        **stages,
        **{f"stage{len(widths)}": conv_norm(widths[-1], 1)},
        head=serial(global_avg_pool, linear=linear(num_classes)),
    )


VARIANTS = {
    "shufflenet_v2_x0_5": Variant(
        shufflenet_v2,
        PAPER,
        {"widths": (48, 96, 192, 1024)},
        published=Published(38.9, "top-1 error", "ImageNet", "authors' repository"),
    ),
    "shufflenet_v2_x1_0": Variant(
        shufflenet_v2,
        PAPER,
        {"widths": (116, 232, 464, 1024)},
        published=Published(30.6, "top-1 error", "ImageNet", "authors' repository"),
    ),
    "shufflenet_v2_x1_5": Variant(
        shufflenet_v2,
        PAPER,
        {"widths": (176, 352, 704, 1024)},
        published=Published(27.4, "top-1 error", "ImageNet", "authors' repository"),
    ),
    "shufflenet_v2_x2_0": Variant(
        shufflenet_v2,
        PAPER,
        {"widths": (244, 488, 976, 2048)},
        published=Published(25.0, "top-1 error", "ImageNet", "authors' repository"),
    ),
}
