"""Laws of Kronecker-factored curvature; curvlinops and kronfluence beside it."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import jacrev, vmap
from torch.utils.data import TensorDataset

import purecnn
from purecnn import random, serial, tree
from purecnn.curvature import fisher_diagonal, frozen, ravel, unravel
from purecnn.influence import Solution, conjugate_gradient
from purecnn.kfac import Fisher, eigenvalues, ekfac, kfac, matrix_function, product, solve
from purecnn.layer import Layer, Mode
from purecnn.layers import batch_norm, conv, flatten, global_avg_pool, linear, relu, sigmoid
from purecnn.model import Model
from purecnn.per_sample import per_sample_gradients, per_sample_norms
from purecnn.step import Batch
from purecnn.tree import Tree
from tests.table import CASES, Case

CLASSES = 3
LABELS = torch.tensor([0, 1, 2, 0, 1])
Method = Callable[..., Tree]
each_method = pytest.mark.parametrize("method", [kfac, ekfac])


def double(params: Tree) -> Tree:
    return tree.map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, params)


def close(found: Tensor, expected: Tensor, rtol: float = 1e-9) -> None:
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=rtol * float(expected.abs().max()))


def model_of(layer: Layer, channels: int = 2, side: int = 6) -> Model:
    return Model.of(layer, num_classes=CLASSES, in_channels=channels, image_size=side)


MODEL = model_of(
    serial(
        stem=serial(conv=conv(4, 3, stride=2, padding=1, bias=True), norm=batch_norm(), act=sigmoid),
        stage1=serial(conv=conv(6, 3, padding=0, groups=2), act=sigmoid),
        head=serial(flatten, linear=linear(CLASSES)),
    )
)
PARAMS, STATE = map(double, MODEL.init(random.key(0)))
IMAGES = random.normal(random.key(1), (5, 2, 6, 6), torch.float64)
BATCHES = [(IMAGES[:3], LABELS[:3]), (IMAGES[3:], LABELS[3:])]
SETTINGS: list[dict[str, Any]] = [{"fisher": "empirical"}, {"fisher": "expected"}, {"key": random.key(2)}]
each_setting = pytest.mark.parametrize("settings", SETTINGS, ids=["empirical", "expected", "sampled"])


def vector(seed: int, like: Tree = PARAMS) -> Tree:
    return unravel(random.normal(random.key(seed), (tree.size(like),), torch.float64), like)


def matrix(curvature: Tree, like: Tree = PARAMS) -> Tensor:
    return vmap(lambda v: ravel(product(curvature, unravel(v, like))))(torch.eye(tree.size(like), dtype=torch.float64))


def scores(model: Model, params: Tree, state: Tree, fisher: Fisher, images: Tensor, labels: Tensor) -> Tensor:
    """Rows (images or more, parameters) whose outer products sum to the images' number times the Fisher information."""
    network = frozen(model, state)
    if fisher == "empirical":
        return vmap(ravel)(per_sample_gradients(model, params, state, (images, labels)))

    def logarithms(v: Tensor) -> Tensor:
        return F.log_softmax(network(unravel(v, params), images), 1)

    found = logarithms(ravel(params))
    return (jacrev(logarithms)(ravel(params)) * (found / 2).exp()[..., None]).flatten(0, 1)


def dense(fisher: Fisher) -> Tensor:
    rows = scores(MODEL, PARAMS, STATE, fisher, IMAGES, LABELS)
    return rows.T @ rows / len(IMAGES)


# What it is ----------------------------------------------------------------------------------------------------


def test_blocks_are_products_of_second_moments() -> None:
    """Written out, position by position, from what torch's hooks see."""
    layer = serial(conv=conv(3, 3, padding=1, bias=True), act=sigmoid, flatten=flatten, linear=linear(CLASSES))
    model = model_of(layer)
    params, state = map(double, model.init(random.key(3)))
    read, signal = nn.Conv2d(2, 3, 3, padding=1).double(), nn.Linear(108, CLASSES).double()
    read.load_state_dict(params["conv"])
    signal.load_state_dict(params["linear"])
    first = read(IMAGES)
    hidden = first.sigmoid().flatten(1)
    last = signal(hidden)
    flowing = torch.autograd.grad(F.cross_entropy(last, LABELS, reduction="sum"), [first, last])
    padded = F.pad(IMAGES, (1, 1, 1, 1))
    inputs = torch.stack(
        [
            torch.cat([padded[n, :, i : i + 3, j : j + 3].flatten(), torch.ones(1, dtype=torch.float64)])
            for n in range(5)
            for i in range(6)
            for j in range(6)
        ]
    )
    outputs = flowing[0].permute(0, 2, 3, 1).reshape(180, 3)
    expected = torch.kron(outputs.T @ outputs / 180, inputs.T @ inputs / 5)
    curvature = kfac(model, params, state, [(IMAGES, LABELS)], fisher="empirical")
    block = curvature["conv"]["weight"]
    assert block.values.shape == (1, 3, 19)
    vectors = torch.kron(block.outputs[0], block.inputs[0])
    close(vectors @ block.values.flatten().diag() @ vectors.T, expected)
    inputs = torch.cat([hidden.detach(), torch.ones(5, 1, dtype=torch.float64)], 1)
    block = curvature["linear"]["weight"]
    vectors = torch.kron(block.outputs[0], block.inputs[0])
    expected = torch.kron(flowing[1].T @ flowing[1] / 5, inputs.T @ inputs / 5)
    close(vectors @ block.values.flatten().diag() @ vectors.T, expected)


@each_method
@each_setting
def test_of_one_image_a_layer_of_one_position_is_exact(method: Method, settings: dict[str, Any]) -> None:
    batches = [(IMAGES[:1], LABELS[:1])]
    head, whole = "head.linear", method(MODEL, PARAMS, STATE, batches, **settings)
    if "key" in settings:
        gradients = [per_sample_gradients(MODEL, PARAMS, STATE, (IMAGES[:1], torch.tensor([c]))) for c in range(3)]
        candidates = [ravel(each["head"]["linear"]).outer(ravel(each["head"]["linear"])) for each in gradients]
    else:
        rows = scores(MODEL, PARAMS, STATE, settings["fisher"], *batches[0])
        places = [i for i, path in enumerate(names(PARAMS)) if path.startswith(head)]
        candidates = [rows[:, places].T @ rows[:, places]]
    found = matrix(whole["head"]["linear"], PARAMS["head"]["linear"])
    assert any(torch.allclose(found, each, rtol=0, atol=1e-9 * float(each.abs().max())) for each in candidates)


def names(params: Tree) -> list[str]:
    """The path of each number of `ravel`."""
    return [path for path, leaf in tree.flatten(params).items() for _ in range(leaf.numel())]


@pytest.mark.parametrize("fisher", ["empirical", "expected"])
def test_corrected_eigenvalues_are_the_matrix_along_the_eigenvectors(fisher: Fisher) -> None:
    exact = dense(fisher)
    curvature = ekfac(MODEL, PARAMS, STATE, BATCHES, fisher=fisher)
    found = matrix(curvature)
    # Along each eigenvector of the approximation it has the exact matrix's value.
    values, vectors = torch.linalg.eigh(found)
    close((vectors * (exact @ vectors)).sum(0), values, 1e-8)
    close(eigenvalues(curvature).sum(), exact.trace())
    others = [i for i, path in enumerate(names(PARAMS)) if ".norm." in path]
    close(found[others][:, others], exact[others][:, others].diag().diag())


@given(seed=st.integers(0, 1000), groups=st.sampled_from([1, 2]), bias=st.booleans(), stride=st.sampled_from([1, 2]))
def test_corrected_is_nearer(seed: int, groups: int, bias: bool, stride: int) -> None:
    """In each layer's own block, beside all matrices with these eigenvectors."""
    layer = serial(conv=conv(4, 2, stride, groups=groups, bias=bias), relu=relu, pool=global_avg_pool, head=linear(3))
    model = model_of(layer)
    params, state = map(double, model.init(random.key(seed)))
    images = random.normal(random.key(seed), (4, 2, 6, 6), torch.float64)
    batches = [(images, LABELS[:4])]
    rows = scores(model, params, state, "expected", images, LABELS)
    exact, paths = rows.T @ rows / 4, names(params)
    plain, corrected = (
        matrix(each(model, params, state, batches, fisher="expected"), params) for each in (kfac, ekfac)
    )
    for layer_name in ("conv", "head"):
        own = [i for i, path in enumerate(paths) if path.startswith(layer_name)]
        error, better = ((exact - each)[own][:, own].norm() for each in (plain, corrected))
        assert better <= error * (1 + 1e-9)
        away = (exact - corrected)[own][:, own]
        assert abs((away * corrected[own][:, own]).sum()) <= 1e-9 * exact.norm() ** 2  # a projection


def test_expected_is_the_mean_over_labels() -> None:
    shares = frozen(MODEL, STATE)(PARAMS, IMAGES[:1]).softmax(1)[0]
    expected = ekfac(MODEL, PARAMS, STATE, [(IMAGES[:1], LABELS[:1])], fisher="expected")
    each = [
        fisher_diagonal(frozen(MODEL, STATE), PARAMS, IMAGES[:1], torch.tensor([label])) for label in range(CLASSES)
    ]
    mean = torch.stack([share * e["stem"]["norm"]["weight"] for share, e in zip(shares, each, strict=True)]).sum(0)
    close(expected["stem"]["norm"]["weight"], mean)


def test_drawn_labels_have_the_models_distribution() -> None:
    many = [(IMAGES[:1].expand(4000, -1, -1, -1), torch.zeros(4000, dtype=torch.int64))]
    sampled = kfac(MODEL, PARAMS, STATE, many, key=random.key(4), trainable=lambda path: path.endswith("linear.bias"))
    expected = fisher_diagonal(frozen(MODEL, STATE), PARAMS, IMAGES[:1])
    torch.testing.assert_close(sampled["head"]["linear"]["bias"], expected["head"]["linear"]["bias"], rtol=0.1, atol=0)


# Over all networks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_trace_is_the_mean_of_the_squared_gradients(case: Case) -> None:
    """Of stem and head, of every family."""
    model = case.model()
    params, state = model.init(random.key(0))
    x = random.normal(random.key(1), (2, model.in_channels, model.image_size, model.image_size))
    batch = x, torch.tensor([0, 1])

    def small(path: str) -> bool:
        leaf = tree.flatten(params)[path]
        return not path.startswith("stage") and leaf.numel() < 30_000 and leaf[0].numel() < 2_000

    curvature = ekfac(model, params, state, [batch], fisher="empirical", trainable=small)
    squares = per_sample_norms(model, params, state, batch, trainable=small).square()
    torch.testing.assert_close(eigenvalues(curvature).sum(), squares.mean(), rtol=1e-4, atol=0)
    trained = tree.unflatten({path: leaf for path, leaf in tree.flatten(params).items() if small(path)})
    assert tree.differences(trained, solve(curvature, trained, damping=0.1)) == []


# What is done with it ------------------------------------------------------------------------------------------


@each_method
@each_setting
def test_functions_of_the_matrix(method: Method, settings: dict[str, Any]) -> None:
    curvature = method(MODEL, PARAMS, STATE, BATCHES, **settings)
    found = matrix(curvature)
    close(found, found.T)
    values = torch.linalg.eigvalsh(found)
    close(eigenvalues(curvature).sort().values, values, 1e-8)
    assert eigenvalues(curvature).min() >= 0
    v = vector(5)
    solved = solve(curvature, v, damping=0.3)
    assert list(tree.flatten(solved)) == list(tree.flatten(PARAMS))
    close(found @ ravel(solved) + 0.3 * ravel(solved), ravel(v))
    root = matrix_function(curvature, torch.sqrt, matrix_function(curvature, torch.sqrt, v))
    close(ravel(root), ravel(product(curvature, v)))


def test_a_part_of_the_parameters() -> None:
    def chosen(path: str) -> bool:
        return path in ("stem.conv.bias", "stage1.conv.weight", "head.linear.weight")

    curvature = ekfac(MODEL, PARAMS, STATE, BATCHES, fisher="empirical", trainable=chosen)
    part = tree.unflatten({path: leaf for path, leaf in tree.flatten(PARAMS).items() if chosen(path)})
    assert tree.flatten(curvature).keys() == tree.flatten(part).keys()
    assert isinstance(curvature["stem"]["conv"]["bias"], Tensor)  # of a bias alone there is the diagonal
    assert tree.differences(part, solve(curvature, part, damping=1.0)) == []
    own = [i for i, path in enumerate(names(PARAMS)) if chosen(path)]
    close(eigenvalues(curvature).sum(), dense("empirical")[own][:, own].trace())


def test_a_layer_used_twice() -> None:
    twice = purecnn.named("same", linear(4))
    model = model_of(serial(pool=global_avg_pool, stem=linear(4), twice=shared(twice), head=linear(CLASSES)))
    params, state = map(double, model.init(random.key(0)))
    curvature = ekfac(model, params, state, [(IMAGES, LABELS)], fisher="empirical")
    rows = vmap(ravel)(per_sample_gradients(model, params, state, (IMAGES, LABELS)))
    close(eigenvalues(curvature).sum(), rows.square().sum(1).mean())


def shared(layer: Layer) -> Layer:
    """One layer, two times with the same parameters."""

    def apply(params: Tree, state: Tree, x: Any, mode: Mode) -> tuple[Any, Tree]:
        y, state = layer.apply(params, state, x, mode)
        return layer.apply(params, state, y.tanh(), mode)

    return Layer(layer.init, apply, layer.names)


def test_what_a_network_does_not_run_has_no_curvature() -> None:
    model = model_of(purecnn.fork(serial(pool=global_avg_pool, linear=linear(CLASSES)), aux=serial(flatten, linear(3))))
    params, state = model.init(random.key(0))
    curvature = kfac(model, params, state, [(IMAGES.float(), LABELS)], fisher="empirical")
    assert not curvature["aux"]["weight"].any()
    assert not solve(curvature, params, 1.0)["aux"]["bias"].isnan().any()


@each_method
def test_nothing_is_changed_and_batches_do_not_matter(method: Method) -> None:
    inputs = [IMAGES, *tree.flatten(PARAMS).values(), *tree.flatten(STATE).values()]
    versions = [leaf._version for leaf in inputs]
    whole = matrix(method(MODEL, PARAMS, STATE, [(IMAGES, LABELS)], fisher="expected"))
    close(matrix(method(MODEL, PARAMS, STATE, BATCHES, fisher="expected")), whole)
    empty = IMAGES[:0], LABELS[:0]
    close(matrix(method(MODEL, PARAMS, STATE, [empty, *BATCHES, empty], fisher="expected")), whole)
    sampled = matrix(method(MODEL, PARAMS, STATE, BATCHES, key=random.key(2)))
    close(matrix(method(MODEL, PARAMS, STATE, [empty, *BATCHES], key=random.key(2))), sampled)
    assert versions == [leaf._version for leaf in inputs]


def test_each_batch_draws_labels_of_its_own() -> None:
    often = kfac(MODEL, PARAMS, STATE, [BATCHES[0]] * 8, key=random.key(2))
    once = kfac(MODEL, PARAMS, STATE, BATCHES[:1], key=random.key(2))
    assert not torch.allclose(matrix(often), matrix(once), rtol=1e-3, atol=0)


def test_no_derivative_passes() -> None:
    params = tree.map(lambda leaf: leaf.clone().requires_grad_(), PARAMS)
    assert not eigenvalues(ekfac(MODEL, params, STATE, BATCHES, fisher="empirical")).requires_grad


def test_short_numbers_are_summed_in_long_ones() -> None:
    model = purecnn.create("lenet5")
    params, state = model.init(random.key(0))
    images = random.normal(random.key(1), (300, 1, 32, 32))
    batches = [(image[None], torch.tensor([i % 10])) for i, image in enumerate(images)]
    short = [(image.bfloat16(), label) for image, label in batches]
    long = eigenvalues(kfac(model, params, state, batches, fisher="empirical")).sum()
    params = tree.map(Tensor.bfloat16, params)
    curvature = kfac(model, params, state, short, fisher="empirical")
    torch.testing.assert_close(eigenvalues(curvature).sum(), long, rtol=0.05, atol=0)
    assert solve(curvature, params, 0.1)["head"]["linear"]["weight"].dtype == torch.bfloat16


def test_a_borrowed_weight_beside_another_bias() -> None:
    """Its block is the weight's alone, and both biases have the diagonal."""
    own = linear(2)

    def apply(params: Tree, state: Tree, x: Tensor, mode: Mode) -> tuple[Tensor, Tree]:
        y, _ = own.apply(params["a"], {}, x, mode.enter("a"))
        return own.apply({**params["a"], "bias": params["b"]["bias"]}, {}, y.tanh(), mode.enter("b"))[0], state

    def init(x: Any, mode: Mode) -> tuple[Tree, Tree, Any]:
        params, _, y = own.init(x, mode.enter("a"))
        return {"a": params, "b": {"bias": params["bias"] + 1}}, {}, y

    model = model_of(serial(pool=global_avg_pool, twice=Layer(init, apply, frozenset(("a", "b"))), head=linear(3)))
    params, state = map(double, model.init(random.key(0)))
    curvature = ekfac(model, params, state, [(IMAGES, LABELS)], fisher="empirical")
    rows = vmap(ravel)(per_sample_gradients(model, params, state, (IMAGES, LABELS)))
    close(eigenvalues(curvature).sum(), rows.square().sum(1).mean())
    assert curvature["twice"]["a"]["bias"].shape == curvature["twice"]["b"]["bias"].shape == (2,)


def test_members_of_an_ensemble() -> None:
    keys = random.split(random.key(6), 2)
    members, states = vmap(MODEL.init)(keys)
    images, v = IMAGES.float(), PARAMS

    def solved(params: Tree, state: Tree) -> Tree:
        curvature = ekfac(MODEL, params, state, [(images, LABELS)], fisher="empirical")
        return solve(curvature, tree.map(Tensor.float, v), damping=0.1)

    together = vmap(solved)(members, states)
    for i in range(2):
        alone = solved(*(tree.map(lambda leaf, i=i: leaf[i], each) for each in (members, states)))
        torch.testing.assert_close(
            ravel(tree.map(lambda leaf, i=i: leaf[i], together)), ravel(alone), rtol=1e-3, atol=1e-4
        )


def test_it_makes_conjugate_gradients_converge_sooner() -> None:
    """Where channels are of very different sizes."""
    model = model_of(serial(conv=conv(3, 3), act=sigmoid, pool=global_avg_pool, head=linear(CLASSES)))
    params, state = map(double, model.init(random.key(0)))
    images = random.normal(random.key(1), (64, 2, 6, 6), torch.float64) * torch.tensor([1.0, 30.0])[:, None, None]
    labels = torch.arange(64) % CLASSES
    rows = scores(model, params, state, "expected", images, labels)
    exact, b = rows.T @ rows / 64, vector(7, params)
    curvature = ekfac(model, params, state, [(images, labels)], fisher="expected")

    def run(preconditioner: Callable[[Tree], Tree] | None) -> Solution:
        return conjugate_gradient(
            lambda v: unravel(exact @ ravel(v), params),
            b,
            damping=1e-6,
            tolerance=1e-8,
            max_iterations=500,
            preconditioner=preconditioner,
        )

    plain, better = run(None), run(lambda r: solve(curvature, r, damping=1e-6))
    assert bool(better.converged)
    close(ravel(better.x), torch.linalg.solve(exact + 1e-6 * torch.eye(len(exact)), ravel(b)), 1e-5)
    assert 2 * better.iterations < plain.iterations


# Misuse --------------------------------------------------------------------------------------------------------


HEAD = kfac(MODEL, PARAMS, STATE, BATCHES, fisher="empirical")["head"]


def _of_capsules(fisher: Fisher) -> Tree:
    model = CASES["capsnet"].model()
    return kfac(model, *model.spec(), BATCHES, fisher=fisher)


def call(method: Method = kfac, batches: Any = BATCHES, **settings: Any) -> Tree:
    return method(MODEL, PARAMS, STATE, batches, **settings)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: call(), r"pass key=purecnn\.random\.key\(seed\)"),
        (lambda: call(fisher="exact"), "'sampled', 'expected' or 'empirical', found 'exact'"),
        (lambda: call(fisher="expected", loss=F.cross_entropy), "a loss only with fisher='empirical'"),
        (lambda: call(batches=[], fisher="empirical"), "no images"),
        (lambda: list(_of_capsules("expected")), "capsnet gives no logits, so it has no expected Fisher information"),
        (lambda: call(ekfac, iter(BATCHES), fisher="empirical"), "this is an iterator"),
        (lambda: solve({"w": torch.ones(1)}, {"w": torch.ones(1)}, 0.0), "damping must be positive, found 0.0"),
        (lambda: product({"w": torch.ones(1)}, {"v": torch.ones(1)}), "different parameters"),
        (lambda: product({"w": torch.ones(3)}, {"w": torch.ones(1)}), r"at 'w' expected \(3,\), found \(1,\)"),
        (lambda: product(HEAD, {"linear": {"weight": PARAMS["head"]["linear"]["weight"]}}), r"found \(3, 6\)"),
        (lambda: product(HEAD, {"linear": {"weight": torch.ones(5, 6), "bias": torch.ones(5)}}), r"found \(5, 7\)"),
        (lambda: call(batches=[(IMAGES * torch.nan, LABELS)], fisher="empirical"), "gradients of 'stem.conv.weight'"),
        (lambda: product(call(fisher="empirical")["head"], {"linear": {"bias": torch.ones(3)}}), "different param"),
    ],
)
def test_misuse(run: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run()


# Peers ---------------------------------------------------------------------------------------------------------


@each_method
@pytest.mark.parametrize("fisher", ["empirical", "expected"])
def test_equals_curvlinops(method: Method, fisher: Fisher) -> None:
    pytest.importorskip("curvlinops", reason="curvlinops is not installed")
    from curvlinops import EKFACLinearOperator, KFACLinearOperator

    model = model_of(serial(conv1=conv(3, 3, bias=True), act1=sigmoid, flatten=flatten, linear=linear(CLASSES)))
    params, state = map(double, model.init(random.key(3)))
    module = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Sigmoid(), nn.Flatten(), nn.Linear(108, CLASSES)).double()
    flat = {"0": params["conv1"], "3": params["linear"]}
    module.load_state_dict(tree.flatten(flat))
    peer = KFACLinearOperator if method is kfac else EKFACLinearOperator
    operator = peer(
        module,
        nn.CrossEntropyLoss(),
        list(module.parameters()),
        [(IMAGES, LABELS)],
        fisher_type={"empirical": "empirical", "expected": "type-2"}[fisher],
        separate_weight_and_bias=False,
    )
    v = vector(8, params)
    ours = product(method(model, params, state, [(IMAGES, LABELS)], fisher=fisher), v)
    close(ravel(ours), (operator @ ravel(v)).detach(), 1e-7)


def test_influence_equals_kronfluence(tmp_path: Path) -> None:
    pytest.importorskip("kronfluence", reason="kronfluence is not installed")
    layer = serial(conv1=conv(3, 3, bias=True), act1=sigmoid, flatten=flatten, linear=linear(CLASSES))
    model = model_of(layer)
    params, state = model.init(random.key(3))
    module = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Sigmoid(), nn.Flatten(), nn.Linear(108, CLASSES))
    module.load_state_dict(tree.flatten({"0": params["conv1"], "3": params["linear"]}))
    train = random.normal(random.key(4), (12, 2, 6, 6)), torch.arange(12) % CLASSES
    test = IMAGES.float(), LABELS
    theirs = kronfluence_scores(module, train, test, tmp_path)

    curvature = ekfac(model, params, state, [train], fisher="empirical")
    queries = per_sample_gradients(model, params, state, test)
    # Its damping is a tenth of a block's mean.
    damped = vmap(lambda v: matrix_function(curvature, lambda values: 1 / (values + values.mean() / 10), v))(queries)
    ours = vmap(ravel)(damped) @ vmap(ravel)(per_sample_gradients(model, params, state, train)).T
    close(ours, theirs, 1e-4)


def kronfluence_scores(module: nn.Module, train: Batch, test: Batch, folder: Path) -> Tensor:
    """Its influence of each training image on the loss of each test image, by EK-FAC: (test, train)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments, ScoreArguments
        from kronfluence.task import Task

        class Losses(Task):  # type: ignore[misc]
            def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
                return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

            def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
                return self.compute_train_loss(batch, model)

        task = Losses()
        model = prepare_model(module, task)
        analyzer = Analyzer(
            "peer", model, task, cpu=True, output_dir=str(folder), disable_tqdm=True, disable_model_save=True
        )
        factors = FactorArguments(strategy="ekfac", use_empirical_fisher=True)
        halves = [TensorDataset(*half) for half in (train, test)]
        analyzer.fit_all_factors("factors", halves[0], per_device_batch_size=len(train[1]), factor_args=factors)
        analyzer.compute_pairwise_scores(
            "scores", "factors", halves[1], halves[0], len(test[1]), score_args=ScoreArguments(damping_factor=None)
        )
        scores: Tensor = analyzer.load_pairwise_scores("scores")["all_modules"]
    return scores
