"""What a network with weights looks at in pictures: the work of ``purecnn explain``."""

from collections.abc import Sequence
from enum import StrEnum
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from converters.rules import ConversionError
from converters.sources import Source
from purecnn import explain, random


class MethodName(StrEnum):
    """How to explain."""

    grad_cam = "grad-cam"
    integrated = "integrated"
    smooth = "smooth"
    input = "input"


TITLES = {
    MethodName.grad_cam: "Grad-CAM",
    MethodName.integrated: "integrated gradients",
    MethodName.smooth: "SmoothGrad",
    MethodName.input: "input gradient",
}


class Explained(NamedTuple):
    """A picture, the answer to it, and the reasons."""

    seen: Image.Image
    """What the network saw of it."""
    answer: str
    """The likeliest class."""
    probability: float
    maps: dict[MethodName, Tensor]
    """(height, width), at least 0, covering what it saw. Of methods that explain channels too, the sum of their
    magnitudes."""
    gap: float | None
    """By how much integrated gradients, if asked for, miss the logit's difference from the mean colour's."""

    def to_dict(self) -> dict[str, Any]:
        """As values that JSON can hold; of each map, where in the picture the network saw it is the largest."""
        result: dict[str, Any] = {"class": self.answer, "probability": self.probability}
        result["peaks"] = {method.value: _peak(heat) for method, heat in self.maps.items()}
        return result if self.gap is None else {**result, "integrated_gap": self.gap}


def explain_picture(source: Source, image: Image.Image, methods: Sequence[MethodName]) -> Explained:
    """Explain the likeliest class of one picture; noise is drawn from ``random.key(0)``.

    Raises:
        ConversionError: if nobody knows how pictures are prepared for the network.
    """
    if source.preprocessing is None:
        raise ConversionError(
            f"{source.model.name}: the weights do not say how images are prepared; convert them first"
        )
    x = source.preprocessing.evaluation()(image)[None]
    network = source.model, source.params, source.state
    with torch.no_grad():
        logits, _ = source.model.apply(source.params, source.state, x)
    probability, best = (float(value) for value in source.model.probabilities(logits)[0].max(0))
    target = int(best)
    maps: dict[MethodName, Tensor] = {}
    gap = None
    for method in methods:
        if method is MethodName.grad_cam:
            maps[method] = explain.grad_cam(*network, x, target)[0]
            continue
        if method is MethodName.integrated:
            values, gaps = explain.integrated_gradients(*network, x, target)
            gap = float(gaps[0])
        elif method is MethodName.smooth:
            values = explain.smooth_gradient(*network, x, target, key=random.key(0))
        else:
            values = explain.input_gradient(*network, x, target)
        maps[method] = values[0].abs().sum(0)
    mean, std = (torch.tensor(value)[:, None, None] for value in (source.preprocessing.mean, source.preprocessing.std))
    pixels = ((x[0] * std + mean).clamp(0, 1) * 255).round().byte().expand(3, -1, -1)
    seen = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    answer = source.classes[target] if source.classes else f"class {target}"
    return Explained(seen, answer, probability, maps, gap)


def _peak(heat: Tensor) -> list[float]:
    """From left and from top, as shares of width and height."""
    row, column = divmod(int(heat.argmax()), heat.shape[1])
    return [(column + 0.5) / heat.shape[1], (row + 0.5) / heat.shape[0]]
