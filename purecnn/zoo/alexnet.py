"""AlexNet on one GPU.

    Krizhevsky. One weird trick for parallelizing convolutional neural networks. 2014, arXiv:1404.5997.

The network of Krizhevsky, Sutskever and Hinton (NIPS 2012) without its two towers and local response
normalisation. Deviation from the paper, as in torchvision: an adaptive average pool before the first
fully-connected layer, so that images of any size from 63 pixels up are accepted. 61,100,840 parameters.
"""

from purecnn import layers
from purecnn.initializers import Initializer, normal
from purecnn.layer import Layer, serial
from purecnn.layers import adaptive_avg_pool, conv, flatten, linear, max_pool, relu
from purecnn.paper import Group, Paper, Variant

PAPER = Paper(
    "One weird trick for parallelizing convolutional neural networks",
    "Krizhevsky",
    2014,
    "arXiv:1404.5997",
    groups=(Group.SPATIAL,),
)


def alexnet(*, num_classes: int = 1000, dropout: float = 0.5) -> Layer:
    """Five convolutions, three fully-connected layers; the last one is the head."""
    return serial(
        stem=serial(conv=conv(64, 11, 4, 2, bias=True), relu=relu, pool=max_pool(3, 2)),
        stage1=serial(conv=conv(192, 5, bias=True), relu=relu, pool=max_pool(3, 2)),
        stage2=serial(
            conv1=conv(384, 3, bias=True), relu1=relu,
            conv2=conv(256, 3, bias=True), relu2=relu,
            conv3=conv(256, 3, bias=True), relu3=relu, pool=max_pool(3, 2),
        ),
        stage3=serial(
            adaptive_avg_pool(6), flatten,
            dropout1=layers.dropout(dropout), linear1=linear(4096), relu1=relu,
            dropout2=layers.dropout(dropout), linear2=linear(4096), relu2=relu,
        ),
        head=serial(linear=linear(num_classes)),
    )  # fmt: skip


def paper_law(path: str, shape: tuple[int, ...]) -> Initializer | float | None:
    """Section 5 of the NIPS paper: weights from N(0, 0.01**2); biases are 1 where ReLUs should start active, else 0."""
    if len(shape) > 1:
        return normal(0.01)
    return 1.0 if path.startswith(("stage1.", "stage2.conv2.", "stage2.conv3.", "stage3.")) else 0.0


VARIANTS = {"alexnet": Variant(alexnet, PAPER, paper_law=paper_law)}
