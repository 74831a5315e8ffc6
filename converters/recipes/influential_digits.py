"""Which training digits help a network to read a test digit, and which mislead it: predictions and the truth.

    Koh, Liang. Understanding Black-box Predictions via Influence Functions. ICML 2017, arXiv:1703.04730.

A LeNet-5 is trained on digits and frozen; a linear head with weight decay is fitted to its last features, which is a
strictly convex problem. Influence functions predict how two measures change when a training digit is left out: the mean
loss of the test digits, and the loss of the hardest one. Each measure takes one linear system. Then the head is
refitted without each training digit in turn, and predicted and actual changes are compared: over all digits, and
without the ten largest changes, since a few large ones can dominate a correlation.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from rich.progress import track
from torch import Tensor
from torch.func import grad, hessian, vmap

import purecnn
from converters.arguments import writable
from converters.screen import notes, print_json, screen, table
from purecnn import data, random, tree
from purecnn.curvature import hvp, ravel, unravel
from purecnn.files import replacing
from purecnn.influence import Influence, conjugate_gradient, influence
from purecnn.optimizers import sgd
from purecnn.schedules import cosine
from purecnn.training import fit
from purecnn.tree import Tree

Objective = Callable[[Tree, Tensor], Tensor]
"""The function that a head minimises: takes the head and the weights of the training digits, (digits,)."""


def head_logits(head: Tree, features: Tensor) -> Tensor:
    """The logits of the head: (examples, classes)."""
    return F.linear(features, head["linear"]["weight"], head["linear"]["bias"])


def losses(head: Tree, features: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of each example: (examples,)."""
    return F.cross_entropy(head_logits(head, features), labels, reduction="none")


def head_objective(features: Tensor, labels: Tensor, decay: float) -> Objective:
    """The mean loss with weight decay: ``sum_i weight_i loss_i / n + decay / 2 |head|^2``."""

    def objective(head: Tree, weights: Tensor) -> Tensor:
        mean = (weights * losses(head, features, labels)).sum() / len(labels)
        return mean + decay / 2 * ravel(head).square().sum()

    return objective


def minimum(objective: Callable[[Tree], Tensor], start: Tree, *, tolerance: float = 1e-10) -> Tree:
    """Find a minimum by Newton's method with conjugate gradients, halving steps that do not descend.

    The search ends when the norm of the gradient is at most ``tolerance``.

    Raises:
        ArithmeticError: if no minimum is found.
    """
    head = start
    for _ in range(100):
        slope = grad(objective)(head)
        if ravel(slope).norm() <= tolerance:
            return head
        step = conjugate_gradient(partial(hvp, objective, head), slope, tolerance=1e-3, max_iterations=1000).x
        value, share = objective(head), 1.0
        while share > 1e-4:
            there = tree.map(lambda leaf, move, share=share: leaf - share * move, head, step)
            if objective(there) <= value:
                break
            share /= 2
        head = there
    raise ArithmeticError(
        f"no minimum of the head's objective was found in 100 steps: the norm of its gradient is "
        f"{ravel(slope).norm():.1e}, expected at most {tolerance:.1e}"
    )


def minima_without(objective: Objective, head: Tree, left_out: Tensor, count: int, *, tolerance: float = 1e-9) -> Tree:
    """Find the minima of the objective, leaving out some training digits one at a time; returns a stacked tree.

    Newton's method starts at the minimum with all digits and uses the Hessian of this point, which is factored once.
    The remaining gradient of each problem is checked, so the result does not depend on this approximation.

    Args:
        objective: a function of a head and the weights of all digits.
        head: the minimum of the objective when all weights are 1.
        left_out: the digits to leave out, (k,).
        count: the number of all digits.
        tolerance: the norm of each gradient at which to stop.

    Raises:
        ArithmeticError: if a minimum is not found.
    """
    start = ravel(head)
    weights = 1 - F.one_hot(left_out, count).to(start.dtype)
    ones = torch.ones(count, dtype=start.dtype)
    factor = torch.linalg.cholesky(hessian(lambda x: objective(unravel(x, head), ones))(start))
    slope = vmap(grad(lambda x, weights: objective(unravel(x, head), weights)))
    heads = start.repeat(len(left_out), 1)
    moving = torch.arange(len(left_out))
    for _ in range(1000):
        slopes = slope(heads[moving], weights[moving])
        wanted = slopes.norm(dim=1) > tolerance
        moving = moving[wanted]
        if not len(moving):
            return vmap(lambda x: unravel(x, head))(heads)
        heads[moving] -= torch.cholesky_solve(slopes[wanted].T, factor).T
    raise ArithmeticError(
        f"refitting the head without one digit did not converge for {len(moving)} of {len(left_out)} digits"
    )


def correlation(predicted: Tensor, actual: Tensor) -> float:
    """Pearson's correlation."""
    return float(torch.corrcoef(torch.stack([predicted, actual]))[0, 1])


def without_largest(predicted: Tensor, actual: Tensor, count: int = 10) -> float:
    """The correlation without the ``count`` examples of the largest actual changes."""
    rest = actual.abs().argsort()[:-count]
    return correlation(predicted[rest], actual[rest])


def scatter(panels: dict[str, tuple[Tensor, Tensor]], path: Path) -> None:
    """Draw predicted against actual changes, one panel per measure."""
    figure = Figure(figsize=(5 * len(panels), 4.6), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    for axes, (title, (predicted, actual)) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        ends = [float(torch.cat([predicted, actual]).min()), float(torch.cat([predicted, actual]).max())]
        axes.plot(ends, ends, color="#777777", linestyle=":", linewidth=1.2, zorder=1)
        axes.scatter(actual.numpy(), predicted.numpy(), s=10, color="#0072b2", alpha=0.6, linewidths=0)
        axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
        axes.set_title(f"correlation {correlation(predicted, actual):.3f}", loc="right", fontsize=10, color="#d55e00")
        axes.set_xlabel("actual change, fitted again")
        axes.set_ylabel("predicted change")
        axes.ticklabel_format(style="sci", scilimits=(-2, 2))
        axes.grid(color="#e4e4e4")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def gallery(test: tuple[Tensor, str], rows: dict[str, list[tuple[Tensor, str]]], path: Path) -> None:
    """Draw a test digit, and beside it rows of training digits; each image (height, width) has a caption."""
    longest = max(map(len, rows.values()))
    figure = Figure(figsize=(1.1 * (longest + 1) + 0.4, 1.7 * len(rows)))
    room = {"left": 0.02, "right": 0.98, "bottom": 0.03, "top": 0.8, "hspace": 0.7, "wspace": 0.15}
    grid = figure.subplots(len(rows), longest + 1, squeeze=False, gridspec_kw=room)
    for axes in grid.flat:
        axes.set_axis_off()
    cells = [(grid[0, 0], test)]
    for line, (title, row) in zip(grid, rows.items(), strict=True):
        line[1].text(0, 1.35, title, transform=line[1].transAxes, fontsize=10, fontweight="bold")
        cells += zip(line[1:], row, strict=False)
    for axes, (picture, caption) in cells:
        axes.imshow(picture.numpy(), cmap="gray_r", interpolation="nearest")
        axes.set_title(caption, fontsize=8)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically."""
    with replacing(path) as file:
        FigureCanvasAgg(figure).print_figure(file, format="png", dpi=130, metadata={"Software": None})


def everything(examples: data.Examples, transform: data.Transform) -> tuple[Tensor, Tensor]:
    """All images and labels of one split of a data set, as one batch."""
    return next(iter(data.batches(examples, transform, len(examples))))


def run(
    out: Annotated[Path, typer.Option(callback=writable, help="Folder for pictures and results.json.")] = Path(
        "runs/influential-digits"
    ),
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of the LeNet-5 whose features are used.")] = 5,
    decay: Annotated[float, typer.Option(min=1e-6, help="Weight decay of the head.")] = 1e-2,
    limit: Annotated[int, typer.Option(min=0, help="Number of digits to leave out in turn; 0 for all.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of initial values, data order and digits left out.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """Influence functions on handwritten digits: predicted and actual changes when one training digit is left out."""
    fit_key, choice_key = random.split(random.key(seed))
    digits = data.load("digits")
    model = purecnn.create("lenet5")
    prepare = digits.preprocessing.adapt(size=model.image_size)
    notes.print(f"training a LeNet-5 for {epochs} epochs")
    batches = partial(data.batches, digits.train, prepare.training(digits.augmentation), 32)
    test_batches = data.batches(digits.test, prepare.evaluation(), 256)
    steps = epochs * -(-len(digits.train) // 32)
    optimizer = sgd(cosine(0.05, steps), momentum=0.9)
    fitted = fit(
        model, optimizer, lambda key: batches(key=key), test_batches, epochs=epochs, key=fit_key, compile=False
    )
    params, state = fitted.train_state.params, fitted.train_state.state

    halves = [everything(half, prepare.evaluation()) for half in (digits.train, digits.test)]
    with torch.no_grad():
        features = [model.features(params, state, images)["stage2"].double() for images, _ in halves]
    (images, labels), (test_images, test_labels) = halves
    count = len(labels)
    objective = head_objective(features[0], labels, decay)
    ones = torch.ones(count, dtype=torch.float64)
    head = minimum(lambda head: objective(head, ones), tree.map(Tensor.double, params["head"]))
    test_losses = losses(head, features[1], test_labels)
    hardest = int(test_losses.argmax())
    names = ("mean loss of the test digits", "loss of the hardest test digit")

    def measures(head: Tree) -> Tensor:
        found = losses(head, features[1], test_labels)
        return torch.stack([found.mean(), found[hardest]])

    product = partial(hvp, lambda head: objective(head, ones), head)
    train_losses = partial(losses, features=features[0], labels=labels)

    def predict(i: int) -> Influence:
        return influence(
            product, train_losses, lambda head: measures(head)[i], head, tolerance=1e-6, max_iterations=1000
        )

    found = [predict(i) for i in range(len(names))]
    left_out = random.permutation(choice_key, count)[:limit] if limit else torch.arange(count)
    parts = track(torch.split(left_out, 64), "fitting again", console=notes, transient=True)
    at = measures(head)
    actual = torch.cat([vmap(measures)(minima_without(objective, head, part, count)) - at for part in parts])
    pairs = {name: (found[i].changes[left_out], actual[:, i]) for i, name in enumerate(names)}

    results: dict[str, Any] = {
        "training digits": count,
        "left out": len(left_out),
        "parameters of the head": tree.size(head),
        "weight decay": decay,
        "seed": seed,
        "test accuracy of the head": float((head_logits(head, features[1]).argmax(1) == test_labels).double().mean()),
        "measures": {
            name: {
                "at": float(at[i]),
                "correlation": correlation(*pairs[name]),
                "correlation without the ten largest": without_largest(*pairs[name]) if len(left_out) > 12 else None,
                "products": int(found[i].solution.iterations),
                "residual": float(found[i].solution.residual),
                "converged": bool(found[i].solution.converged),
            }
            for i, name in enumerate(names)
        },
    }
    order = found[1].changes.argsort()
    rows = {
        title: [(images[j, 0], f"{labels[j]}: {float(found[1].changes[j]):+.2g}") for j in chosen.tolist()]
        for title, chosen in (
            ("most helpful: the loss would grow without them", order.flip(0)[:6]),
            ("most harmful: it would fall without them", order[:6]),
        )
    }
    answer = int(head_logits(head, features[1][hardest : hardest + 1]).argmax())
    caption = f"a {test_labels[hardest]}, read as {answer}"
    scatter(pairs, out / "influence.png")
    gallery((test_images[hardest, 0], caption), rows, out / "digits.png")
    with replacing(out / "results.json") as file:
        file.write_text(json.dumps(results, indent=2) + "\n")
    if as_json:
        print_json(results)
        return
    shown = table("measure", "correlation>", "without ten largest>", "products>", "residual>")
    for name, row in results["measures"].items():
        rest = row["correlation without the ten largest"]
        shown.add_row(
            name,
            f"{row['correlation']:.4f}",
            "" if rest is None else f"{rest:.4f}",
            str(row["products"]),
            f"{row['residual']:.1e}",
        )
    screen.print(shown)
    notes.print(f"pictures and results in {out}")
