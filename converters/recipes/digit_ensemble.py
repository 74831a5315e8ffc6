"""Sixteen networks trained in one step: do they equal networks trained alone, how fast is it, and what is gained?

    Lakshminarayanan, Pritzel, Blundell. Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles.
    NIPS 2017, arXiv:1612.01474.

LeNets, each with its own initial values and its own order of the data, learn handwritten digits in one mapped step.
Epoch by epoch, each network is also trained alone with the same key, and both ways are timed. Then the ensemble's
answers are compared with its members': accuracy, calibration, and the digits about which the members disagree.
"""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from einops import rearrange
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from rich.progress import track
from torch import Tensor
from torch.func import vmap

import purecnn
from converters.arguments import writable
from converters.screen import notes, print_json, screen, table
from purecnn import data, ensembles, random, tree
from purecnn.ensembles import Reliability
from purecnn.files import replacing
from purecnn.optimizers import sgd
from purecnn.schedules import cosine
from purecnn.step import Batch, TrainState, make_step

BINS = 10


def everything(examples: data.Examples, transform: data.Transform, device: torch.device, dtype: torch.dtype) -> Batch:
    """All images and labels of one split of a data set, as one batch."""
    images, labels = next(iter(data.batches(examples, transform, len(examples))))
    return images.to(device, dtype), labels.to(device)


def orders(keys: Tensor, epoch: int, images: int, batch_size: int) -> Tensor:
    """The images that each member sees in each batch of an epoch, (batches, members, batch); a rest is left out.

    >>> orders(random.split(random.key(0), 3), 1, images=10, batch_size=4).shape
    torch.Size([2, 3, 4])
    """
    count = images // batch_size
    order = vmap(lambda key: random.permutation(random.fold_in(key, epoch), images))(keys)
    return rearrange(order[:, : count * batch_size], "member (batch image) -> batch member image", batch=count)


def measures(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """Measures of the members and of the ensemble; logits are (members, images, classes)."""

    def of(probabilities: Tensor) -> dict[str, float]:
        return {
            "accuracy": float((probabilities.argmax(-1) == labels).double().mean()),
            "loss": float(F.nll_loss(probabilities.log(), labels)),
            "calibration error": ensembles.reliability(probabilities, labels, BINS).expected_calibration_error,
        }

    own = [of(member) for member in logits.double().softmax(-1)]
    return {
        "members": {name: [row[name] for row in own] for name in own[0]},
        "mean probability": of(ensembles.mean_probability(logits.double())),
        "vote": {"accuracy": float((ensembles.vote(logits).argmax(-1) == labels).double().mean())},
        "disagreement": float(ensembles.disagreement(logits).mean()),
        "mutual information": float(ensembles.mutual_information(logits.double()).mean()),
    }


def draw_reliability(curves: dict[str, Reliability], path: Path) -> None:
    """Draw accuracy by confidence, and below it the share of images of each confidence."""
    figure = Figure(figsize=(5.6, 6.4), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    axes, counts = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3, 1]})
    axes.plot([0, 1], [0, 1], color="#777777", linestyle=":", linewidth=1.2, label="calibrated")
    marks = zip(curves.items(), ("#d55e00", "#0072b2"), ("s--", "o-"), (-1, 1), strict=True)
    for (name, curve), color, mark, side in marks:
        filled = curve.images > 0
        error = curve.expected_calibration_error
        line = curve.confidence[filled].numpy(), curve.accuracy[filled].numpy()
        axes.plot(*line, mark, color=color, label=f"{name}, calibration error {error:.1%}")
        middles = (torch.arange(BINS) + 0.5 + 0.2 * side) / BINS
        counts.bar(middles.numpy(), (curve.images / curve.images.sum()).numpy(), width=0.4 / BINS, color=color)
    axes.set_title("reliability", loc="left", fontsize=13, fontweight="bold")
    axes.set_ylabel("share that is right")
    axes.set_ylim(-0.02, 1.02)
    axes.legend(frameon=False, loc="lower right")
    counts.set_yscale("log")
    counts.set_xlabel("confidence, the largest probability")
    counts.set_ylabel("share of images")
    for each in (axes, counts):
        each.set_xlim(0, 1)
        each.grid(color="#e4e4e4")
        each.set_axisbelow(True)
        each.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def draw_quarrels(images: Tensor, labels: list[str], logits: Tensor, classes: tuple[str, ...], path: Path) -> None:
    """Draw the twelve images on which the members disagree most, with the members' answers."""
    found = ensembles.disagreement(logits)
    votes = ensembles.vote(logits) * len(logits)
    order = found.argsort(descending=True, stable=True)[:12].tolist()
    columns = min(len(order), 6)
    rows = -(-len(order) // columns)
    figure = Figure(figsize=(1.75 * columns, 2.15 * rows), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, i in zip(grid.flat, order, strict=False):
        axes.imshow(images[i, 0].numpy(), cmap="gray_r", interpolation="nearest")
        answers = votes[i].argsort(descending=True, stable=True)[:3].tolist()
        said = ", ".join(f"{int(votes[i, answer])} for {classes[answer]}" for answer in answers if votes[i, answer] > 0)
        axes.set_title(f"{labels[i]} ({float(found[i]):.0%})\n{said}", fontsize=9)
    figure.suptitle("what it is (pairs of members that disagree), and the members' votes", fontsize=11)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically."""
    with replacing(path) as file:
        FigureCanvasAgg(figure).print_figure(file, format="png", dpi=130, metadata={"Software": None})


def run(
    out: Annotated[Path, typer.Option(callback=writable, help="Folder for pictures and results.json.")] = Path(
        "runs/digit-ensemble"
    ),
    members: Annotated[int, typer.Option(min=2, help="Number of networks.")] = 16,
    data_name: Annotated[str, typer.Option("--data", help=f"Data set: {', '.join(data.names())}.")] = "digits",
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of each network.")] = 10,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per network and step.")] = 32,
    learning_rate: Annotated[float, typer.Option(min=0, help="Initial value; it falls along a cosine.")] = 0.05,
    limit: Annotated[int, typer.Option(min=0, help="Number of training images to use; 0 for all.")] = 0,
    solo: Annotated[bool, typer.Option(help="Also train each network alone, to compare.")] = True,
    double: Annotated[bool, typer.Option("--double", help="Use double precision, for less rounding.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of initial values and orders of the data.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """Train an ensemble of LeNets in one step: its time, accuracy, calibration and disagreements."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float64 if double else torch.float32
    source = data.load(data_name)
    model = purecnn.create("lenet5", num_classes=len(source.classes))
    transform = source.preprocessing.adapt(size=model.image_size, channels=1).evaluation()
    (images, labels), (test_images, test_labels) = (
        everything(half, transform, device, dtype) for half in (source.train, source.test)
    )
    if limit:
        images, labels = images[:limit], labels[:limit]
    steps = len(images) // batch_size
    if not steps:
        raise typer.BadParameter(
            f"--batch-size {batch_size} is larger than the number of training images, {len(images)}"
        )
    keys = random.split(random.key(seed, device), members)
    optimizer = sgd(cosine(learning_rate, epochs * steps), momentum=0.9)
    params = tree.map(lambda leaf: leaf.to(dtype), vmap(model.init)(keys)[0])
    together = ensembles.start(params, {}, optimizer)
    step = ensembles.make_ensemble_step(model, optimizer, own_batch=True, donate=True)
    # Copies, since the step overwrites the ensemble's parameters.
    own_params = [tree.map(torch.clone, own) for own in ensembles.unstack(params)]
    alone = [TrainState.start(own, {}, optimizer) for own in own_params] if solo else []
    solo_step = make_step(model, optimizer, compile=False, donate=True)
    times: list[tuple[float, float]] = []
    for epoch in track(range(1, epochs + 1), "training", console=notes, transient=True):
        order = orders(keys, epoch, len(images), batch_size)
        begin = time.perf_counter()
        for chosen in order:
            together, metrics = step(together, (images[chosen], labels[chosen]))
        metrics.loss.tolist()  # waits for the accelerator
        middle = time.perf_counter()
        for i in range(len(alone)):
            for chosen in order[:, i]:
                alone[i], own = solo_step(alone[i], (images[chosen], labels[chosen]))
            own.loss.item()
        times.append((middle - begin, time.perf_counter() - middle))

    logits = ensembles.logits(model, together.params, together.state, test_images).cpu()
    test_images, test_labels = test_images.cpu(), test_labels.cpu()
    seconds = sum(each for each, _ in times)
    results: dict[str, Any] = {
        "members": members,
        "data": data_name,
        "training pictures": len(images),
        "test pictures": len(test_labels),
        "epochs": epochs,
        "batch size": batch_size,
        "learning rate": learning_rate,
        "type": str(dtype).removeprefix("torch."),
        "seed": seed,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "results": measures(logits, test_labels),
    }
    if solo:
        lone = torch.stack([model.apply(one.params, one.state, test_images.to(device))[0] for one in alone]).cpu()
        ratios = sorted(each / other for each, other in times)
        results["alone"] = {
            "seconds": sum(other for _, other in times),
            "time of the ensemble as a share, median of the epochs": ratios[len(ratios) // 2],
            "answers that are the same": float((lone.argmax(-1) == logits.argmax(-1)).double().mean()),
            "largest difference of a logit": float((lone - logits).abs().max()),
        }
    flat = logits.double().softmax(-1).flatten(0, 1)
    curves = {
        "members": ensembles.reliability(flat, test_labels.repeat(members), BINS),
        "ensemble": ensembles.reliability(ensembles.mean_probability(logits.double()), test_labels, BINS),
    }
    draw_reliability(curves, out / "reliability.png")
    truth = [source.classes[label] for label in test_labels.tolist()]
    draw_quarrels(test_images, truth, logits, source.classes, out / "disagreement.png")
    with replacing(out / "results.json") as file:
        file.write_text(json.dumps(results, indent=2) + "\n")
    if as_json:
        print_json(results)
        return
    report(results)
    notes.print(f"pictures and results in {out}")


def report(results: dict[str, Any]) -> None:
    """Print the results."""
    found = results["results"]
    shown = table("", "accuracy>", "loss>", "calibration error>")
    own = found["members"]
    for name, pick in (("worst member", min), ("best member", max)):
        i = own["accuracy"].index(pick(own["accuracy"]))
        shown.add_row(name, f"{own['accuracy'][i]:.2%}", f"{own['loss'][i]:.4f}", f"{own['calibration error'][i]:.2%}")
    mean = {name: sum(values) / len(values) for name, values in own.items()}
    for name, row in (("mean of the members", mean), ("ensemble, mean probability", found["mean probability"])):
        shown.add_row(name, f"{row['accuracy']:.2%}", f"{row['loss']:.4f}", f"{row['calibration error']:.2%}")
    shown.add_row("ensemble, vote", f"{found['vote']['accuracy']:.2%}", "", "")
    screen.print(shown)
    screen.print(f"{found['disagreement']:.2%} of the pairs of members disagree about a picture")
    if "alone" in results:
        lone = results["alone"]
        screen.print(
            f"trained in {results['seconds']:.1f} s together, in {lone['seconds']:.1f} s one by one; "
            f"ratio {lone['time of the ensemble as a share, median of the epochs']:.2f} "
            f"(median of the epochs); {lone['answers that are the same']:.2%} of the answers are the same"
        )
