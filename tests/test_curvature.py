"""Laws of curvature products, Fisher information, traces and spectra; curvlinops and BackPACK beside them."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, vmap

import purecnn
from purecnn import random, serial, tree
from purecnn.curvature import (
    Spectrum,
    dot,
    fisher_blocks,
    fisher_diagonal,
    frozen,
    ggn_product,
    hutchinson_trace,
    hvp,
    lanczos,
    rademacher,
    ravel,
    restrict,
    spectral_density,
    unravel,
)
from purecnn.layers import batch_norm, conv, dropout, flatten, global_avg_pool, linear, max_pool, sigmoid
from purecnn.model import Model
from purecnn.paper import Paper
from purecnn.tree import Tree

CLASSES = 3
TINY = Model(
    "tiny",
    serial(
        stem=serial(conv=conv(3, 3, bias=True), norm=batch_norm(), act=sigmoid, pool=max_pool(2, 2)),
        stage1=serial(conv=conv(4, 3, bias=True), act=sigmoid, drop=dropout(0.5)),
        head=serial(global_avg_pool, linear=linear(CLASSES)),
    ),
    {},
    Paper("", "", 2000, ""),
    1,
    8,
)


def double(params: Tree) -> Tree:
    return tree.map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, params)


PARAMS, STATE = map(double, TINY.init(random.key(0)))
IMAGES, LABELS = random.normal(random.key(1), (5, 1, 8, 8), torch.float64), torch.tensor([0, 1, 2, 0, 1])
NETWORKS = {"evaluation": frozen(TINY, STATE), "training": frozen(TINY, STATE, train=True, key=random.key(2))}


def loss_of(network: Callable[..., Tensor]) -> Callable[[Tree], Tensor]:
    return lambda params: F.cross_entropy(network(params, IMAGES), LABELS)


def ggn_of(network: Callable[..., Tensor]) -> Callable[[Tree, Tree], Tree]:
    return partial(ggn_product, lambda params: network(params, IMAGES), lambda logits: F.cross_entropy(logits, LABELS))


LOSS, GGN = loss_of(NETWORKS["evaluation"]), ggn_of(NETWORKS["evaluation"])


def vector(seed: int, like: Tree = PARAMS) -> Tree:
    return unravel(random.normal(random.key(seed), (tree.size(like),), torch.float64), like)


def matrix(product: Callable[[Tree], Tree], like: Tree = PARAMS) -> Tensor:
    """By its columns, all at once."""
    return vmap(lambda v: ravel(product(unravel(v, like))))(torch.eye(tree.size(like), dtype=torch.float64)).T


def dense_hessian(loss: Callable[[Tree], Tensor], params: Tree) -> Tensor:
    return hessian(lambda v: loss(unravel(v, params)))(ravel(params))


def close(a: Any, b: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(ravel({"": b}).abs().max()))


# Products ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", NETWORKS)
def test_hvp_is_the_hessian_times_a_vector(mode: str) -> None:
    loss = loss_of(NETWORKS[mode])
    explicit = dense_hessian(loss, PARAMS)
    v = vector(0)
    close(ravel(hvp(loss, PARAMS, v)), explicit @ ravel(v))
    close(matrix(partial(hvp, loss, PARAMS)), explicit)  # under vmap


@settings(max_examples=10)
@given(st.integers(0, 99), st.floats(-2, 2), st.sampled_from([partial(hvp, LOSS, PARAMS), partial(GGN, PARAMS)]))
def test_products_are_symmetric_and_linear(seed: int, scale: float, product: Callable[[Tree], Tree]) -> None:
    u, v = vector(seed), vector(seed + 100)
    torch.testing.assert_close(ravel(u) @ ravel(product(v)), ravel(v) @ ravel(product(u)), rtol=1e-9, atol=1e-12)
    both = product(tree.map(lambda a, b: a + scale * b, u, v))
    torch.testing.assert_close(ravel(both), ravel(product(u)) + scale * ravel(product(v)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mode", NETWORKS)
def test_ggn_is_positive_and_is_the_jacobian_around_the_hessian_of_the_outputs(mode: str) -> None:
    network = NETWORKS[mode]
    dense = matrix(partial(ggn_of(network), PARAMS))
    assert torch.linalg.eigvalsh(dense).min() > -1e-15
    jacobian = torch.func.jacrev(lambda v: network(unravel(v, PARAMS), IMAGES).flatten())(ravel(PARAMS))
    logits = network(PARAMS, IMAGES)
    outputs = hessian(lambda y: F.cross_entropy(y.reshape(logits.shape), LABELS))(logits.flatten())
    close(dense, jacobian.T @ outputs @ jacobian)


def test_ggn_of_a_head_is_its_hessian() -> None:
    """The logits are linear in the last layer."""
    head, network = restrict(NETWORKS["evaluation"], PARAMS, lambda path: path.startswith("head."))
    assert list(tree.flatten(head)) == ["head.linear.weight", "head.linear.bias"]
    explicit = dense_hessian(loss_of(network), head)
    close(matrix(partial(ggn_of(network), head), head), explicit)
    whole = list(tree.flatten(PARAMS))
    start = sum(tree.flatten(PARAMS)[path].numel() for path in whole if not path.startswith("head."))
    close(explicit, dense_hessian(LOSS, PARAMS)[start:, start:])


def test_restrict_names_paths_when_nothing_is_chosen() -> None:
    with pytest.raises(ValueError, match=r"no parameter is chosen; paths are .*head\.linear\.bias"):
        restrict(LOSS, PARAMS, lambda path: path == "head")


def test_ravel_and_unravel_are_inverse() -> None:
    again = unravel(ravel(PARAMS), PARAMS)
    assert all(
        torch.equal(a, b) for a, b in zip(tree.flatten(again).values(), tree.flatten(PARAMS).values(), strict=True)
    )


@pytest.mark.parametrize(
    ("name", "train"), [("squeezenet1_1", True), ("resnet18", False), ("mobilenet_v3_small", True)]
)
def test_products_of_registered_networks_are_those_of_reverse_mode(name: str, train: bool) -> None:
    model = purecnn.create(name, num_classes=4)
    params, state = map(double, model.init(random.key(0)))
    x = random.normal(random.key(1), (2, 3, 64, 64), torch.float64)
    network = frozen(model, state, train=train, key=random.key(2))

    def loss(params: Tree) -> Tensor:
        return F.cross_entropy(network(params, x), torch.tensor([1, 2]))

    v = rademacher(random.key(3), params)
    reverse = grad(lambda params: ravel(grad(loss)(params)) @ ravel(v))(params)
    close(ravel(hvp(loss, params, v)), ravel(reverse))


# Fisher information --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", NETWORKS)
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_fisher_is_the_ggn_of_cross_entropy(mode: str, chunk_size: int | None) -> None:
    network = NETWORKS[mode]
    dense = matrix(partial(ggn_of(network), PARAMS)) if mode == "evaluation" else None
    diagonal = fisher_diagonal(network, PARAMS, IMAGES, chunk_size=chunk_size)
    blocks = fisher_blocks(network, PARAMS, IMAGES, chunk_size=chunk_size)
    close(ravel(diagonal), torch.cat([block.diagonal() for block in tree.flatten(blocks).values()]))
    if dense is not None:  # in training, a batch's masks are not those of single images
        close(ravel(diagonal), dense.diagonal())
        start = 0
        for block in tree.flatten(blocks).values():
            close(block, dense[start : start + len(block), start : start + len(block)])
            start += len(block)


def test_empirical_fisher_is_of_the_labels_gradients() -> None:
    network = NETWORKS["evaluation"]

    def gradient(image: Tensor, label: Tensor) -> Tensor:
        return ravel(grad(lambda params: F.cross_entropy(network(params, image[None]), label[None]))(PARAMS))

    gradients = torch.stack([gradient(image, label) for image, label in zip(IMAGES, LABELS, strict=True)])
    close(ravel(fisher_diagonal(network, PARAMS, IMAGES, LABELS, chunk_size=3)), gradients.square().mean(0))
    head, of_head = restrict(network, PARAMS, lambda path: path == "head.linear.weight")
    block = fisher_blocks(of_head, head, IMAGES, LABELS)["head"]["linear"]["weight"]
    mine = gradients[:, -CLASSES - block.shape[0] : -CLASSES]
    close(block, mine.T @ mine / 5)


def test_fisher_wants_a_label_for_each_image() -> None:
    with pytest.raises(ValueError, match=r"each of 5 images, found \(4,\)"):
        fisher_diagonal(NETWORKS["evaluation"], PARAMS, IMAGES, LABELS[:4])


# Trace and spectrum --------------------------------------------------------------------------------------------


def test_trace_is_within_its_error() -> None:
    exact = dense_hessian(LOSS, PARAMS).trace()
    mean, error = hutchinson_trace(partial(hvp, LOSS, PARAMS), PARAMS, random.key(5), 60)
    assert (mean - exact).abs() < 3 * error
    assert error < 0.3 * exact.abs()
    assert hutchinson_trace(lambda v: v, PARAMS, random.key(5), 1).standard_error.isnan()
    with pytest.raises(ValueError, match="at least one product, found 0"):
        hutchinson_trace(lambda v: v, PARAMS, random.key(5), 0)


def test_the_mean_of_all_signs_is_the_trace() -> None:
    a = random.normal(random.key(0), (3, 3), torch.float64)
    signs = torch.tensor([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], dtype=torch.float64)
    assert torch.einsum("si,ij,sj->s", signs, a, signs).mean() == pytest.approx(float(a.trace()))
    drawn = vmap(lambda key: rademacher(key, {"w": signs[0]}))(random.split(random.key(1), 200))["w"]
    assert set(map(tuple, drawn.tolist())) == set(map(tuple, signs.tolist()))


def test_lanczos_finds_the_extreme_eigenvalues() -> None:
    exact = torch.linalg.eigvalsh(dense_hessian(LOSS, PARAMS))
    spectrum = lanczos(partial(hvp, LOSS, PARAMS), PARAMS, random.key(0), 30)
    close(spectrum.values[[0, -1]], exact[[0, -1]], 1e-8)
    assert spectrum.weights.sum() == pytest.approx(1)
    nearest = (spectrum.values[:, None] - exact).abs().min(1).values
    assert (nearest <= spectrum.residuals + 1e-12).all()


@given(st.integers(1, 12), st.integers(1, 14), st.integers(0, 99), st.sampled_from([torch.float32, torch.float64]))
def test_lanczos_of_any_symmetric_matrix(n: int, steps: int, seed: int, dtype: torch.dtype) -> None:
    a = random.normal(random.key(seed), (n, n), dtype)
    a = a + a.T
    v = {"w": torch.zeros(n, dtype=dtype)}
    spectrum = lanczos(lambda v: {"w": a @ v["w"]}, v, random.key(seed + 100), steps)
    exact = torch.linalg.eigvalsh(a)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-9
    assert len(spectrum.values) == min(n, steps)
    if steps >= n:
        torch.testing.assert_close(spectrum.values, exact, rtol=tolerance, atol=tolerance * float(exact.abs().max()))
    slack = tolerance * exact.abs().max()
    assert exact[0] - slack <= spectrum.values[0]
    assert spectrum.values[-1] <= exact[-1] + slack


def test_lanczos_in_an_invariant_space() -> None:
    """Two eigenvalues span a space of two vectors, whatever the first one; zero spans one."""
    a = torch.tensor([1.0, 1.0, 1.0, 4.0, 4.0], dtype=torch.float64)
    spectrum = lanczos(lambda v: {"w": a * v["w"]}, {"w": a}, random.key(0), 5)
    assert spectrum.values[[0, -1]].tolist() == pytest.approx([1, 4])
    heavy = spectrum.weights > 1e-12
    assert heavy.sum() == 2
    assert spectrum.residuals[heavy].max() < 1e-12
    assert spectrum.residuals[~heavy].isinf().all()
    zero = lanczos(lambda v: {"w": 0 * v["w"]}, {"w": a}, random.key(0), 3)
    assert torch.equal(zero.values, torch.zeros(3, dtype=torch.float64))


def test_spectra_of_an_ensemble() -> None:
    """Under vmap, each member has the spectrum it has alone."""
    members = vmap(TINY.init)(random.split(random.key(9), 3))[0]
    members = double(members)

    def spectrum(params: Tree) -> Spectrum:
        return lanczos(partial(hvp, LOSS, params), params, random.key(1), 8)

    together = vmap(spectrum)(members)
    for i in range(3):
        alone = spectrum(tree.map(lambda leaf, i=i: leaf[i], members))
        close(together.values[i], alone.values, 1e-8)
    places, density = spectral_density(together, points=2000)
    assert torch.trapezoid(density, places) == pytest.approx(1, abs=1e-4)
    mean = torch.trapezoid(density * places, places)
    assert mean == pytest.approx(float((together.values * together.weights).sum() / 3), abs=1e-6)


def test_what_stands_in_has_no_bound() -> None:
    """Where every direction is used up before the last step."""
    diagonal = torch.tensor([1.0, 1.0, 1.0, 5.0, 5.0, 5.0], dtype=torch.float64)
    spectrum = lanczos(lambda v: {"w": diagonal * v["w"]}, {"w": diagonal}, random.key(0), 6)
    found = spectrum.residuals.isfinite()
    close(spectrum.values[found], torch.tensor([1.0, 5.0], dtype=torch.float64))
    assert spectrum.weights[~found].tolist() == [0] * 4


def test_density_of_equal_eigenvalues() -> None:
    spectrum = lanczos(lambda v: v, {"w": torch.zeros(4)}, random.key(0), 4)
    places, density = spectral_density(spectrum)
    assert torch.isfinite(density).all()
    assert places.mean() == pytest.approx(1, abs=1e-3)


def test_lanczos_wants_a_step() -> None:
    with pytest.raises(ValueError, match="at least one step, found 0"):
        lanczos(lambda v: v, PARAMS, random.key(0), 0)


def test_products_compile() -> None:
    v = vector(0)
    compiled = torch.compile(lambda params, v: (hvp(LOSS, params, v), GGN(params, v)), fullgraph=True, backend="eager")
    for ours, theirs in zip(compiled(PARAMS, v), (hvp(LOSS, PARAMS, v), GGN(PARAMS, v)), strict=True):
        close(ravel(ours), ravel(theirs))


# Peers ---------------------------------------------------------------------------------------------------------


def peer_network() -> tuple[nn.Module, Tree, Callable[[Tree, Tensor], Tensor]]:
    """A small network that all sides read: a module, and the tree and function of the same layers."""
    layer = serial(conv1=conv(3, 3, bias=True), act1=sigmoid, flatten=flatten, linear=linear(CLASSES))
    params, state, _ = layer.init(torch.empty(1, 1, 6, 6, device="meta"), purecnn.layer.Mode(key=random.key(0)))
    module = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Sigmoid(), nn.Flatten(), nn.Linear(108, CLASSES)).double()
    params = double(params)
    module.load_state_dict(
        {"0.weight": params["conv1"]["weight"], "0.bias": params["conv1"]["bias"],
         "3.weight": params["linear"]["weight"], "3.bias": params["linear"]["bias"]}
    )  # fmt: skip
    return module, params, lambda params, x: layer.apply(params, state, x, purecnn.layer.Mode())[0]


X = random.normal(random.key(7), (5, 1, 6, 6), torch.float64)


def peer_loss(network: Callable[[Tree, Tensor], Tensor]) -> Callable[[Tree], Tensor]:
    return lambda params: F.cross_entropy(network(params, X), LABELS)


def test_products_equal_curvlinops() -> None:
    pytest.importorskip("curvlinops", reason="curvlinops is not installed")
    from curvlinops import GGNLinearOperator, HessianLinearOperator

    module, params, network = peer_network()
    v = vector(0, params)
    arguments = (module, nn.CrossEntropyLoss(), list(module.parameters()), [(X, LABELS)])
    operators = [HessianLinearOperator(*arguments), GGNLinearOperator(*arguments)]
    ggn = ggn_product(lambda p: network(p, X), lambda y: F.cross_entropy(y, LABELS), params, v)
    for operator, ours in zip(operators, [hvp(peer_loss(network), params, v), ggn], strict=True):
        close(ravel(ours), (operator @ ravel(v)).detach())


def test_fisher_and_variance_equal_backpack() -> None:
    pytest.importorskip("backpack", reason="BackPACK is not installed")
    from backpack import backpack, extend
    from backpack.extensions import BatchDiagGGNExact, DiagGGNExact, SumGradSquared, Variance

    module, params, network = peer_network()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module, criterion = extend(module), extend(nn.CrossEntropyLoss(reduction="sum"))
        with backpack(DiagGGNExact(), BatchDiagGGNExact(), Variance(), SumGradSquared()):
            criterion(module(X), LABELS).backward()
    theirs = {
        what: torch.cat([getattr(p, what).flatten() for p in module.parameters()])
        for what in ("diag_ggn_exact", "variance", "sum_grad_squared")
    }
    close(5 * ravel(fisher_diagonal(network, params, X)), theirs["diag_ggn_exact"])
    squares = ravel(fisher_diagonal(network, params, X, LABELS))
    close(5 * squares, theirs["sum_grad_squared"])
    close(squares - ravel(grad(peer_loss(network))(params)).square(), theirs["variance"])


def test_hessian_equals_torch_on_the_module() -> None:
    module, params, network = peer_network()
    named = {name: p.detach() for name, p in module.named_parameters()}
    blocks = hessian(lambda p: F.cross_entropy(functional_call(module, p, (X,)), LABELS))(named)
    explicit = torch.cat([torch.cat([blocks[a][b].reshape(named[a].numel(), -1) for b in named], 1) for a in named])
    close(matrix(partial(hvp, peer_loss(network), params), params), explicit)


def test_the_order_of_names_does_not_matter() -> None:
    v = vector(3)
    turned = tree.unflatten(dict(reversed(tree.flatten(v).items())))
    tree.map(torch.testing.assert_close, hvp(LOSS, PARAMS, turned), hvp(LOSS, PARAMS, v))
    tree.map(torch.testing.assert_close, GGN(PARAMS, turned), GGN(PARAMS, v))


def test_products_of_long_vectors_keep_their_digits() -> None:
    v = random.uniform(random.key(0), (1 << 22,))
    exact = float(v.double() @ v.double())
    assert abs(float(dot(v, v)) / exact - 1) < 1e-6
