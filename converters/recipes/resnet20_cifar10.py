"""ResNet-20 on CIFAR-10, trained as in its paper."""

from typing import Annotated

import typer

from converters.arguments import Device, Out, Resume, Root, Seed, Workers
from converters.options import OptimizerName, ScheduleName
from converters.train_command import train


def run(
    data: Annotated[str, typer.Option(help="cifar10, or a folder with its images.")] = "cifar10",
    out: Out = None,
    resume: Resume = False,
    epochs: Annotated[int, typer.Option(min=1, help="Number of epochs; 164 are the paper's 64,000 steps.")] = 164,
    seed: Seed = 0,
    root: Root = None,
    workers: Workers = 0,
    device: Device = "auto",
) -> None:
    """ResNet-20 on CIFAR-10: SGD, 0.1, divided by 10 after 1/2 and 3/4, batches of 128. Published error: 8.75 %.

    He, Zhang, Ren, Sun, Deep Residual Learning for Image Recognition, arXiv:1512.03385, section 4.2 and table 6.
    The weight decay of 0.0001 is not applied to biases and normalisation; the paper does not mention such an exception.
    """
    train(
        "resnet20_cifar",
        data,
        like="cifar10",
        out=out,
        resume=resume,
        epochs=epochs,
        batch_size=128,
        optimizer=OptimizerName.sgd,
        learning_rate=0.1,
        schedule=ScheduleName.step,
        momentum=0.9,
        weight_decay=1e-4,
        seed=seed,
        root=root,
        workers=workers,
        device=device,
    )
