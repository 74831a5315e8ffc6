"""Learning to tell digits apart from one example of each: MAML against training from scratch.

A task is a few random digits in random order, so only the examples of a task, its support set, say what its labels
mean. The network (LeNet-5) adapts to the support set with a few steps of gradient descent, and is tested on other
images of these digits, the query set. MAML learns initial parameters from which this works well (Finn et al. 2017,
arXiv:1703.03400).
"""

import time
from typing import Annotated, Any

import torch
import typer
from rich.progress import Progress
from torch import Tensor
from torch.func import grad_and_value, vmap

import purecnn
from converters.arguments import Seed
from converters.screen import notes, print_json, screen, table
from purecnn import data, meta, random, tree
from purecnn.meta import Tasks
from purecnn.model import Model
from purecnn.optimizers import adamw
from purecnn.tree import Tree

QUERIES = 5
"""Number of query images of each digit."""
SCRATCH = [(rate, steps) for rate in (0.03, 0.1, 0.3) for steps in (5, 20, 50)]
"""The settings of training from scratch: learning rates and numbers of steps. The best one is reported."""


def pool() -> Tensor:
    """Images of scikit-learn's digits, the same number of each digit: (digit, image, 1, 32, 32)."""
    digits = data.load("digits")
    prepare = digits.preprocessing.adapt(size=32).evaluation()
    found: list[list[Tensor]] = [[] for _ in digits.classes]
    for half in (digits.train, digits.test):
        for i in range(len(half)):
            image, label = half[i]
            found[label].append(prepare(image))
    fewest = min(map(len, found))
    return torch.stack([torch.stack(pictures[:fewest]) for pictures in found])


def draw_tasks(key: Tensor, pictures: Tensor, count: int, ways: int, shots: int) -> Tasks:
    """Draw random tasks: ``ways`` digits in random order, with ``shots`` support images each.

    >>> tasks = draw_tasks(random.key(0), torch.rand(10, 8, 1, 4, 4), count=2, ways=3, shots=1)
    >>> tasks.support[0].shape, tasks.query[1][0]
    (torch.Size([2, 3, 1, 4, 4]), tensor([0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2]))
    """

    def one(key: Tensor) -> tuple[Tensor, Tensor]:
        digits_key, pictures_key = random.split(key)
        digits = random.permutation(digits_key, len(pictures))[:ways]
        chosen = vmap(lambda key: random.permutation(key, pictures.shape[1])[: shots + QUERIES])
        images = pictures[digits[:, None], chosen(random.split(pictures_key, ways))]
        return images[:, :shots].flatten(0, 1), images[:, shots:].flatten(0, 1)

    support, query = vmap(one)(random.split(key, count))
    labels = [torch.arange(ways).repeat_interleave(each).expand(count, -1) for each in (shots, QUERIES)]
    return Tasks((support, labels[0]), (query, labels[1]))


def accuracy(
    model: Model, params: Tree, state: Tree, tasks: Tasks, learning_rate: meta.Rates, steps: int
) -> dict[str, Any]:
    """Mean accuracy on the query sets after adaptation, and its 95 % margin over tasks."""
    loss = meta.classification_loss(model, state)

    def one(support: Any, query: Any) -> Tensor:
        adapted = meta.adapt(loss, params, support, learning_rate, steps=steps)
        return (model.apply(adapted, state, query[0])[0].argmax(1) == query[1]).float().mean()

    found = vmap(one, chunk_size=50)(*tasks)
    return {"steps": steps, "accuracy": float(found.mean()), "margin": float(1.96 * found.std() / len(found) ** 0.5)}


def run(
    ways: Annotated[int, typer.Option(min=2, max=10, help="Number of digits in a task.")] = 3,
    shots: Annotated[int, typer.Option(min=1, help="Support images of each digit.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Steps of adaptation.")] = 3,
    learning_rate: Annotated[float, typer.Option(min=0, help="Learning rate of the adaptation.")] = 0.1,
    iterations: Annotated[int, typer.Option(min=1, help="Steps of MAML, each on 8 tasks.")] = 400,
    first_order: Annotated[bool, typer.Option("--first-order", help="Leave out second derivatives.")] = False,
    learn_rates: Annotated[bool, typer.Option("--learn-rates", help="Learn a learning rate for each tensor.")] = False,
    unseen: Annotated[
        int, typer.Option(min=0, max=8, help="Number of digits that MAML never sees; tests then use only these.")
    ] = 0,
    test_tasks: Annotated[int, typer.Option(min=2, help="Number of tasks to test on.")] = 200,
    seed: Seed = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """Learn to tell digits apart from one example of each: MAML against training from scratch."""
    if unseen and not ways <= min(unseen, 10 - unseen):
        raise typer.BadParameter(
            f"tasks of {ways} digits need as many unseen and as many other digits, found {unseen} and {10 - unseen}: "
            "choose a smaller --ways or another --unseen"
        )
    init_key, train_key, test_key = random.split(random.key(seed), 3)
    pictures = pool()
    half = pictures.shape[1] // 2
    if shots + QUERIES > half:
        raise typer.BadParameter(
            f"--shots is at most {half - QUERIES}, found {shots}: each half of the data has {half} images of a digit, "
            f"and {QUERIES} are for the query set"
        )
    # Tests use other images than MAML, or even other digits.
    known, new = (pictures[:-unseen], pictures[-unseen:]) if unseen else (pictures[:, :half], pictures[:, half:])
    model = purecnn.create("lenet5", num_classes=ways)
    params, state = model.init(init_key)
    loss = meta.classification_loss(model, state)
    test = draw_tasks(test_key, new, test_tasks, ways, shots)

    tried = [
        {"method": f"from scratch, learning rate {rate:g}", **accuracy(model, params, state, test, rate, count)}
        for rate, count in SCRATCH
    ]
    scratch = max(tried, key=lambda row: row["accuracy"])

    optimizer = adamw(1e-3, weight_decay=0.0)
    learned = {"params": params, **({"rates": meta.learned_rates(params, learning_rate)} if learn_rates else {})}
    opt_state = optimizer.init(learned)
    begin = time.perf_counter()
    with Progress(console=notes, disable=not notes.is_terminal, transient=True) as progress:
        for i in progress.track(range(iterations), description="MAML"):
            tasks = draw_tasks(random.fold_in(train_key, i), known, 8, ways, shots)

            def objective(learned: Tree, tasks: Tasks = tasks) -> Tensor:
                rates = learned.get("rates", learning_rate)
                return meta.maml_loss(loss, learned["params"], tasks, rates, steps=steps, first_order=first_order)

            gradients, _ = grad_and_value(objective)(learned)
            learned, opt_state = optimizer.update(gradients, opt_state, learned)
    seconds = time.perf_counter() - begin

    rates = learned.get("rates", learning_rate)
    name = ("first-order " if first_order else "") + "MAML" + (", learned rates" if learn_rates else "")
    rows = [
        scratch,
        *({"method": name, **accuracy(model, learned["params"], state, test, rates, n)} for n in (0, steps, 10)),
    ]
    report: dict[str, Any] = {"ways": ways, "shots": shots, "unseen": unseen, "seconds": seconds, "results": rows}
    if learn_rates:
        report["rates"] = tree.map(float, learned["rates"])
    if as_json:
        print_json(report)
        return
    shown = table("method", "steps>", "accuracy>", "95 %>")
    for row in rows:
        shown.add_row(row["method"], str(row["steps"]), f"{row['accuracy']:.1%}", f"± {row['margin']:.1%}")
    screen.print(shown)
    what = f"{ways} digits, {shots} example{'s' if shots > 1 else ''} of each, {test_tasks} tasks of "
    screen.print(what + (f"the {unseen} digits that MAML never saw" if unseen else "images that MAML never saw"))
    screen.print(f"MAML was trained for {seconds:.0f} s; from scratch is the best of {len(SCRATCH)} settings")
    if learn_rates:
        for path, rate in tree.flatten(learned["rates"]).items():
            screen.print(f"  {path}: learning rate {float(rate):.3f}")
