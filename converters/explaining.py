"""Explain a network's answers to images: the work of ``purecnn explain``."""

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
    """Methods of explanation."""

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
    """An image, the network's answer to it, and the explanations."""

    seen: Image.Image
    """The part of the image that the network saw, after preprocessing."""
    answer: str
    """The most probable class."""
    probability: float
    maps: dict[MethodName, Tensor]
    """One map per method, (height, width), at least 0, covering what the network saw. Methods that explain each channel
    are summed over channels, by magnitude."""
    gap: float | None
    """For integrated gradients: their sum minus the difference between the logits of this image and of an image of the
    mean colour; None if they were not asked for."""

    def to_dict(self) -> dict[str, Any]:
        """As values for JSON; each map is given by the position of its largest value in the image that was seen."""
        result: dict[str, Any] = {"class": self.answer, "probability": self.probability}
        result["peaks"] = {method.value: _peak(heat) for method, heat in self.maps.items()}
        return result if self.gap is None else {**result, "integrated_gap": self.gap}


def explain_picture(source: Source, image: Image.Image, methods: Sequence[MethodName]) -> Explained:
    """Explain the most probable class of one image; noise is drawn from ``random.key(0)``.

    Raises:
        ConversionError: if the source does not say how images are preprocessed for the network.
    """
    if source.preprocessing is None:
        raise ConversionError(
            f"{source.model.name}: the weights come without preprocessing, so images cannot be prepared for them; "
            "use a checkpoint that has it, such as that of a training run"
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
    """Position of the largest value, from the left and from the top, as fractions of width and height."""
    row, column = divmod(int(heat.argmax()), heat.shape[1])
    return [(column + 0.5) / heat.shape[1], (row + 0.5) / heat.shape[0]]
