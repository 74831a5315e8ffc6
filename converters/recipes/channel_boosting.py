"""Channel boosting on a transfer task with few labels; results are paired by seed.

    Khan, Sohail, Ali. A New Channel Boosted Convolutional Neural Network using Transfer Learning. 2018,
    arXiv:1804.08528.

The first half of a data set's classes is the source task; the second half is the target task, with few labelled images.
Two learners with the same encoder are trained on the source: a classifier, and an autoencoder, which needs no labels.
Then a network learns the target with their channels in addition to the image's. The controls are channels of noise, and
channels of the learner before training.

For each seed, all arms have the same images and the same order of batches. All arms except the fine-tuned one also have
the same initial weights; the weights of additional channels start at zero, so these arms start as the same function,
and only the channels differ.
"""

import dataclasses
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.progress import Progress
from torch import Tensor

import purecnn
from converters.arguments import writable
from converters.screen import notes, print_json, screen, table
from purecnn import data, pictures, random, tree
from purecnn.files import replacing
from purecnn.layer import Layer, Mode, serial
from purecnn.layers import conv, conv_norm, global_avg_pool, linear, relu, stateless
from purecnn.model import Model, UnknownModelError
from purecnn.optimizers import adamw
from purecnn.paper import Loss
from purecnn.schedules import cosine
from purecnn.training import Batch, TrainState, evaluate, make_step
from purecnn.tree import Tree
from purecnn.zoo.channel_boosting import BOOST, PAPER, auxiliary, channel_boost, measured

SIDE, WIDTH = 32, 16  # pixels of the images, channels of a learner
TUNED = "fine-tuned, not boosted"
ARMS: Mapping[str, tuple[str, ...]] = {
    "plain": (),
    "noise": ("noise",),
    "untrained": ("untrained",),
    "autoencoder": ("autoencoder",),
    "transferred": ("transferred",),
    "autoencoder + transferred": ("autoencoder", "transferred"),
    TUNED: (),
}
"""Each arm's learners. The last arm is not boosted: it transfers weights instead of channels."""

BASES = ("plain", "noise", "untrained")  # the arms that boosting should exceed
Trees = tuple[Tree, Tree]

# Three convolutions, at half the image's resolution
encoder = serial(conv1=conv_norm(WIDTH, 3, 2), conv2=conv_norm(WIDTH, 3), conv3=conv_norm(WIDTH, 3))


def classifier(classes: int) -> Layer:
    """The encoder with a classification head."""
    rest = serial(conv1=conv_norm(2 * WIDTH, 3, 2), conv2=conv_norm(2 * WIDTH, 3))
    return serial(encoder=encoder, stage1=rest, head=serial(global_avg_pool, linear=linear(classes)))


def autoencoder(channels: int) -> Layer:
    """The encoder with a decoder that reconstructs the image."""
    double = stateless(lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"))
    decoder = serial(conv1=conv(WIDTH, 3, bias=True), relu=relu, double=double, conv2=conv(channels, 3, bias=True))
    return serial(encoder=encoder, decoder=decoder)


def noise(channels: int) -> Layer:
    """Standard normal noise in the shape of an encoder's output, always the same for the same image."""

    def init(x: Tensor, mode: Mode) -> tuple[Tree, Tree, Tensor]:
        return {}, {}, x.new_empty(x.shape[0], channels, x.shape[2] // 2, x.shape[3] // 2)

    def apply(params: Tree, state: Tree, x: Tensor, mode: Mode) -> tuple[Tensor, Tree]:
        shape = channels, x.shape[2] // 2, x.shape[3] // 2
        numbers = x.contiguous().view(torch.int32).long().sum((1, 2, 3)) % 2**32
        return torch.vmap(lambda number: random.normal(random.fold_in(random.key(0), number), shape))(numbers), state

    return Layer(init, apply)


def parts(x: Tensor, size: int) -> list[Tensor]:
    """Split a tensor into parts of ``size`` along the first axis; the last part may be smaller."""
    return [x[i : i + size] for i in range(0, len(x), size)]


def learn(
    model: Model, start: Trees, examples: Batch, epochs: int, rate: float, key: Tensor, loss: Loss | None = None
) -> Trees:
    """Train with AdamW in batches of 32; the learning rate falls from ``rate`` to zero along a cosine."""
    images, labels = examples
    count = len(images)
    full = max(1, count // 32)
    optimizer = adamw(cosine(rate, epochs * full))
    step = make_step(model, optimizer, loss=loss, donate=True)
    params, state = (tree.map(torch.clone, part) for part in start)  # the step overwrites them
    train_state = TrainState.start(params, state, optimizer)
    for epoch in range(epochs):
        order = random.permutation(random.fold_in(key, epoch), count)
        for chosen in parts(order[: full * 32], 32):
            train_state, _ = step(train_state, (images[chosen], labels[chosen]), key)
    return train_state.params, train_state.state


def draw(
    examples: data.Examples, transform: data.Transform, wanted: Mapping[int, int], key: Tensor
) -> dict[int, Tensor]:
    """Draw random images, for each class at most the wanted number: (number, channels, height, width)."""
    found: dict[int, list[Tensor]] = {label: [] for label in wanted}
    missing = {label for label in wanted if wanted[label]}
    for index in random.permutation(key, len(examples)).tolist():
        if not missing:
            break
        image, label = examples[index]
        if label in missing:
            found[label].append(transform(image))
            if len(found[label]) == wanted[label]:
                missing.remove(label)
    return {label: torch.stack(images) for label, images in found.items()}


def together(images: Mapping[int, Tensor], classes: Sequence[int]) -> Batch:
    """The images of some classes as one batch, with labels counted from the first of these classes."""
    labels = [torch.full((len(images[label]),), label - classes[0]) for label in classes]
    return torch.cat([images[label] for label in classes]), torch.cat(labels)


def accuracy(model: Model, trees: Trees, examples: Batch) -> float:
    """The accuracy on some examples, in percent."""
    images, labels = (parts(each, 256) for each in examples)
    return 100 * evaluate(model, *trees, zip(images, labels, strict=True)).accuracy


@dataclasses.dataclass(frozen=True)
class Task:
    """What all seeds have in common."""

    dataset: data.DataSet
    network: str
    labels: int
    source_images: int
    epochs: int
    source_epochs: int

    @property
    def classes(self) -> tuple[range, range]:
        """The classes of the source and of the target."""
        count = len(self.dataset.classes)
        return range(count // 2), range(count // 2, count)

    @property
    def transform(self) -> data.Transform:
        """Preprocessing that scales the whole image to 32 x 32."""
        return dataclasses.replace(self.dataset.preprocessing.adapt(size=SIDE), resize=SIDE).evaluation()

    def create(self, classes: int) -> Model:
        """The network to boost, for a number of classes."""
        channels = self.dataset.preprocessing.channels
        return purecnn.create(self.network, num_classes=classes, in_channels=channels, image_size=SIDE)


def trial(task: Task, tests: Mapping[int, Tensor], seed: int) -> Iterator[tuple[str, float]]:
    """Run one seed: yield the transferred learner's test accuracy on the source, then each arm's on the target, in
    percent.

    Args:
        task: what all seeds have in common.
        tests: test images of all classes.
        seed: seed of all random numbers.
    """
    keys = random.split(random.key(seed), 7)
    source, target = task.classes
    wanted = dict.fromkeys(source, task.source_images) | dict.fromkeys(target, task.labels)
    drawn = draw(task.dataset.train, task.transform, wanted, keys[0])
    many, few = together(drawn, source), together(drawn, target)
    images = many[0]

    def of(layer: Layer) -> Model:
        return Model("learner", layer, {}, PAPER, images.shape[1], SIDE)

    def learn_source(model: Model, start: Trees, examples: Batch, key: Tensor, loss: Loss | None = None) -> Trees:
        return learn(model, start, examples, task.source_epochs, 3e-3, key, loss)

    teller, rebuilder = of(classifier(len(source))), of(autoencoder(images.shape[1]))
    blank = teller.init(keys[1])
    told = learn_source(teller, blank, many, keys[2])
    yield "source", accuracy(teller, told, together(tests, source))
    rebuilt = learn_source(rebuilder, rebuilder.init(keys[1]), (images, images), keys[3], F.mse_loss)
    learners: dict[str, tuple[Layer, Tree, Tree]] = {"noise": (noise(WIDTH), {}, {})}
    for name, (params, state) in (("untrained", blank), ("autoencoder", rebuilt), ("transferred", told)):
        learners[name] = encoder, params["encoder"], state["encoder"]

    plain = task.create(len(target))
    for arm, names in ARMS.items():
        layer = channel_boost(plain.layer, None, **{name: auxiliary(learners[name][0]) for name in names})
        model = dataclasses.replace(plain, layer=layer)
        params, state = model.init(keys[4])  # the plain network's values, since each key depends on the path
        if names:
            state = {**state, BOOST: {name: measured(*learners[name], parts(few[0], 256)) for name in names}}
        if arm == TUNED:
            whole = task.create(len(source))
            trained, state = learn_source(whole, whole.init(keys[4]), many, keys[5])
            params = {**trained, "head": params["head"]}
        trees = learn(model, (params, state), few, task.epochs, 2e-3, keys[6])
        yield arm, accuracy(model, trees, together(tests, target))


def summary(accuracies: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Any]]:
    """Summarise each arm: mean, standard deviation, and differences from plain and controls, paired by seed.

    >>> found = summary({"plain": [50.0, 60.0], "noise": [49.0, 58.0], "untrained": [50.0, 59.0]})
    >>> found["noise"]["mean"], found["noise"]["above"]["plain"]
    (53.5, {'difference': -1.5, 'standard_error': 0.5, 't': -3.0})
    """

    def above(values: Sequence[float], others: Sequence[float]) -> dict[str, float | None]:
        gains = [value - other for value, other in zip(values, others, strict=True)]
        error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else None
        gain = statistics.fmean(gains)
        return {"difference": gain, "standard_error": error, "t": gain / error if error else None}

    return {
        arm: {
            "accuracies": list(values),
            "mean": statistics.fmean(values),
            "std": statistics.stdev(values) if len(values) > 1 else None,
            "above": {other: above(values, accuracies[other]) for other in BASES if other != arm},
        }
        for arm, values in accuracies.items()
    }


def _signed(row: Mapping[str, float | None] | None) -> str:
    """A difference with its standard error and t."""
    if row is None:
        return ""
    difference = f"{row['difference']:+.1f}"
    return difference if row["t"] is None else f"{difference} ± {row['standard_error']:.1f} (t {row['t']:.1f})"


def run(
    data_name: Annotated[
        str,
        typer.Option("--data", help=f"{', '.join(data.names())}, or a folder with train/ and val/ of class folders."),
    ] = "digits",
    root: Annotated[Path | None, typer.Option(help="Folder that data sets are downloaded to.")] = None,
    network: Annotated[str, typer.Option("--model", help="Network to boost, from `purecnn list`.")] = "lenet5",
    seeds: Annotated[int, typer.Option(min=1, help="Number of trials, one per seed.")] = 5,
    first_seed: Annotated[int, typer.Option(min=0, help="First seed; choose settings on other seeds.")] = 0,
    labels: Annotated[int, typer.Option(min=1, help="Training images of each target class.")] = 40,
    source_images: Annotated[int, typer.Option(min=1, help="Maximum number of images per source class.")] = 1000,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs on the target.")] = 40,
    source_epochs: Annotated[int, typer.Option(min=1, help="Epochs on the source.")] = 8,
    out: Annotated[Path, typer.Option(callback=writable, help="Folder for results.json and boosting.png.")] = Path(
        "runs/channel-boosting"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """Channel boosting with few labels: do a frozen network's channels help more than noise or an untrained one's?"""
    try:
        purecnn.create(network)
    except UnknownModelError as error:
        raise typer.BadParameter(str(error), param_hint="--model") from None
    dataset = data.load(data_name, root=root)
    if len(dataset.classes) < 4:
        raise data.DataError(
            f"{data_name} has {len(dataset.classes)} classes, expected at least 4: two for source and two for target"
        )
    task = Task(dataset, network, labels, source_images, epochs, source_epochs)
    chosen = range(first_seed, first_seed + seeds)
    found: dict[str, list[float]] = {name: [] for name in ("source", *ARMS)}
    with Progress(console=notes, disable=not notes.is_terminal) as progress:
        bar = progress.add_task("reading", total=seeds * len(found))
        everything = dict.fromkeys(range(len(dataset.classes)), len(dataset.test))
        tests = draw(dataset.test, task.transform, everything, random.key(0))
        for seed in chosen:
            for name, percent in trial(task, tests, seed):
                found[name].append(percent)
                progress.update(bar, advance=1, description=f"seed {seed}: {name} {percent:.1f} %")
            if not notes.is_terminal:
                line = ", ".join(f"{name} {values[-1]:.1f}" for name, values in found.items())
                notes.print(f"seed {seed}: {line}", soft_wrap=True)
    source = found.pop("source")
    arms = summary(found)
    settings = {"labels": labels, "source_images": source_images, "epochs": epochs, "source_epochs": source_epochs}
    result = {
        "data": data_name,
        "model": network,
        "seeds": list(chosen),
        "settings": settings,
        "source_accuracies": source,
        "arms": arms,
    }
    with replacing(out / "results.json") as file:
        file.write_text(json.dumps(result, indent=2) + "\n")
    pictures.paired(found, out / "boosting.png")
    if as_json:
        print_json(result)
        return
    shown = table("channels beside the image", "accuracy, %>", "std>", *(f"above {base}>" for base in BASES))
    for arm, row in arms.items():
        std = "" if row["std"] is None else f"{row['std']:.1f}"
        shown.add_row(arm, f"{row['mean']:.1f}", std, *(_signed(row["above"].get(base)) for base in BASES))
    screen.print(shown)
    screen.print(f"{network} on {data_name}, {labels} labels a class, {seeds} seeds; everything is in {out}/")
