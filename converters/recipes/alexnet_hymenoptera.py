"""A pretrained AlexNet, fine-tuned to tell ants from bees, as in the chapter "Deep CNN Architectures"."""

from typing import Annotated

import typer

from converters.arguments import Device, Out, Resume, Seed, Workers
from converters.options import OptimizerName, ScheduleName
from converters.train_command import train


def run(
    data: Annotated[str, typer.Option(help="The folder hymenoptera_data, with train/ and val/.")],
    source: Annotated[str, typer.Option("--from", help="Weights: DEFAULT for torchvision's, or a file.")] = "DEFAULT",
    model: Annotated[str, typer.Option(help="The network.")] = "alexnet",
    out: Out = None,
    resume: Resume = False,
    epochs: Annotated[int, typer.Option(min=1, help="Number of epochs.")] = 10,
    seed: Seed = 0,
    workers: Workers = 0,
    device: Device = "auto",
) -> None:
    """AlexNet on ants and bees: all layers, SGD 0.0001, batches of 8, 10 epochs. Published: 90.2 % (1st edition 93.5).

    Mastering PyTorch, 2nd edition, chapter 2. The momentum of 0.9 is our choice.
    """
    train(
        model,
        data,
        source=source,
        out=out,
        resume=resume,
        epochs=epochs,
        batch_size=8,
        optimizer=OptimizerName.sgd,
        learning_rate=1e-4,
        schedule=ScheduleName.constant,
        momentum=0.9,
        weight_decay=0.0,
        head_epochs=0,
        seed=seed,
        workers=workers,
        device=device,
    )
