"""Differentially private training on handwritten digits: learning them without memorising any single one.

    Abadi et al. Deep Learning with Differential Privacy. CCS 2016, arXiv:1607.00133.

DP-SGD with Poisson sampling; the accountant computes the noise for a given epsilon. The learning rate, the clip and the
batch size were tuned on other runs, whose privacy cost is not counted here; the papers do not count theirs either.
"""

import gzip
import json
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from rich.progress import track
from torch import Tensor

import purecnn
from converters.arguments import Seed, writable
from converters.screen import notes, print_json, screen, table
from purecnn import data as data_sets
from purecnn import random
from purecnn.files import replacing
from purecnn.optimizers import sgd
from purecnn.privacy import epsilon, make_private_step, noise_for, poisson_sample
from purecnn.training import Batch, TrainState, evaluate

SIZE = 32
"""Height and width of the images in pixels, as LeNet-5 needs them."""


def idx(path: Path) -> Tensor:
    """Read a file of bytes in the IDX format, with or without gzip (http://yann.lecun.com/exdb/mnist)."""
    raw = path.read_bytes()
    raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    if raw[:3] != b"\0\0\x08":
        raise data_sets.DataError(f"{path} is not an IDX file of bytes: expected it to begin with 00 00 08 (hex)")
    shape = np.frombuffer(raw, ">i4", raw[3], offset=4)
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(*shape).copy())


def load(name: str, key: Tensor) -> tuple[Batch, Batch]:
    """Training and test digits, 32 x 32, from a data set of `purecnn.data` or a folder with one pair of IDX files.

    Of the IDX files a tenth, drawn from the key, is for testing.
    """
    pictures = sorted(Path(name).expanduser().glob("*images*idx3*")) if Path(name).expanduser().is_dir() else []
    if len(pictures) == 1:
        labels = idx(pictures[0].with_name(pictures[0].name.replace("images-idx3", "labels-idx1"))).long()
        pixels = idx(pictures[0])[:, None] / 255
        # MNIST's published mean and deviation, because computing them from these digits would cost privacy.
        images = (F.pad(pixels, [(SIZE - pixels.shape[-1]) // 2] * 4) - 0.1307) / 0.3081
        order, cut = random.permutation(key, len(labels)), len(labels) * 9 // 10
        train, test = order[:cut], order[cut:]
        return (images[train], labels[train]), (images[test], labels[test])
    found = data_sets.load(name)
    prepare = found.preprocessing.adapt(size=SIZE, channels=1).evaluation()

    def whole(half: data_sets.Examples) -> Batch:
        rows = [half[i] for i in range(len(half))]
        return torch.stack([prepare(picture) for picture, _ in rows]), torch.tensor([label for _, label in rows])

    return whole(found.train), whole(found.test)


def run(
    data: Annotated[str, typer.Option(help="A data set of digits by name, or a folder with a pair of IDX files.")],
    budget: Annotated[float, typer.Option("--epsilon", help="Privacy budget epsilon.")] = 3.0,
    delta: Annotated[float, typer.Option(help="The delta of (epsilon, delta) privacy.")] = 1e-5,
    steps: Annotated[int, typer.Option(min=1, help="Number of training steps.")] = 150,
    expected_batch: Annotated[int, typer.Option(min=1, help="Mean number of digits in a batch.")] = 1024,
    learning_rate: Annotated[float, typer.Option(help="Learning rate of plain SGD.")] = 2.0,
    clip: Annotated[float, typer.Option(help="Maximum norm of each digit's gradient.")] = 1.0,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(callback=writable, help="Folder for results.json and curve.png.")] = Path(
        "runs/private-digits"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """LeNet-5 on digits by DP-SGD: the accuracy within a privacy budget, by default an epsilon of 3."""
    split_key, init_key, sample_key, step_key = random.split(random.key(seed), 4)
    (images, labels), test = load(data, split_key)
    rate = min(expected_batch / len(labels), 1.0)
    noise = noise_for(budget, rate, steps, delta)
    notes.print(f"{len(labels)} digits, each in a batch with probability {rate:.3f}; noise {noise:.3f} times the clip")
    model, optimizer = purecnn.create("lenet5"), sgd(learning_rate)
    step = make_private_step(
        model, optimizer, clip=clip, noise=noise, expected_batch=rate * len(labels), microbatch=256
    )
    train_state = TrainState.start(*model.init(init_key), optimizer)
    rows: list[dict[str, Any]] = []
    begin = time.perf_counter()
    marks = {round(steps * part / 10) for part in range(1, 11)}
    for done in track(range(1, steps + 1), "training", console=notes):
        chosen = poisson_sample(random.fold_in(sample_key, done), len(labels), rate)
        train_state, _ = step(train_state, (images[chosen], labels[chosen]), step_key)
        if done in marks:
            score = evaluate(model, train_state.params, train_state.state, [test])
            rows.append({"step": done, "epsilon": epsilon(noise, rate, done, delta), "accuracy": score.accuracy})
    results = {
        **rows[-1], "delta": delta, "noise": noise, "clip": clip, "sampling_rate": rate, "steps": steps,
        "learning_rate": learning_rate, "seed": seed, "train": len(labels), "test": len(test[1]),
        "seconds": round(time.perf_counter() - begin, 1), "curve": rows,
    }  # fmt: skip
    with replacing(out / "results.json") as file:
        file.write_text(json.dumps(results, indent=2) + "\n")
    draw(rows, delta, out / "curve.png")
    if as_json:
        print_json(results)
        return
    shown = table("steps>", "epsilon>", "accuracy>")
    for row in rows:
        shown.add_row(str(row["step"]), f"{row['epsilon']:.2f}", f"{row['accuracy']:.1%}")
    screen.print(shown)
    notes.print(f"delta {delta:g}; {out / 'results.json'}, {out / 'curve.png'}")


def draw(rows: list[dict[str, Any]], delta: float, path: Path) -> None:
    """Draw accuracy against the epsilon spent."""
    figure = Figure(figsize=(6, 4), layout=ConstrainedLayoutEngine())
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot([row["epsilon"] for row in rows], [100 * row["accuracy"] for row in rows], "o-", color="#0072b2")
    axes.set_title("digits, privately", loc="left", fontsize=13, fontweight="bold")
    axes.set_xlabel(f"epsilon spent (delta {delta:g})")
    axes.set_ylabel("test accuracy, %")
    axes.grid(color="#e4e4e4")
    axes.spines[["top", "right"]].set_visible(False)
    with replacing(path) as file:
        figure.savefig(file, dpi=150)
