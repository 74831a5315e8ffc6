"""LeNet from scratch on CIFAR-10, as in the chapter "Deep CNN Architectures"."""

from typing import Annotated

import typer

from converters.arguments import Device, Out, Resume, Root, Seed, Workers
from converters.options import OptimizerName, ScheduleName
from converters.train_command import train


def run(
    data: Annotated[str, typer.Option(help="cifar10, or a folder with its images.")] = "cifar10",
    out: Out = None,
    resume: Resume = False,
    epochs: Annotated[int, typer.Option(min=1, help="Number of epochs.")] = 50,
    seed: Seed = 0,
    root: Root = None,
    workers: Workers = 0,
    device: Device = "auto",
) -> None:
    """LeNet on CIFAR-10: Adam, 0.001, batches of 8, 50 epochs, crops and flips. Published: 68 % of the test split.

    Mastering PyTorch, 2nd edition, chapter 2. Images are normalised by the data set's mean and standard deviation;
    the book uses 0.5 for all.
    """
    train(
        "lenet5",
        data,
        like="cifar10",
        out=out,
        resume=resume,
        epochs=epochs,
        batch_size=8,
        optimizer=OptimizerName.adamw,
        learning_rate=1e-3,
        schedule=ScheduleName.constant,
        weight_decay=0.0,
        seed=seed,
        root=root,
        workers=workers,
        device=device,
    )
