"""``torch.func``, ``torch.compile`` and ``torch.export`` apply to the functions of every family as they are."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import grad, grad_and_value, jacrev, jvp, vjp, vmap

import purecnn
from purecnn import Model, Outputs, random, tree
from purecnn.tree import Tree
from tests.table import CASES, Mutations, assert_close, differences, heads, loss_of, pick, stack, to, unsettled


class Setting(NamedTuple):
    """A network with dropout and drawn weights."""

    model: Model
    params: Tree
    state: Tree
    x: Tensor
    key: Tensor

    def double(self) -> "Setting":
        """In float64, where derivatives can be compared closely."""
        params, state = to(torch.float64, self.params), to(torch.float64, self.state)
        return self._replace(params=params, state=state, x=self.x.double())

    def loss(self, params: Tree, **how: Any) -> Tensor:
        return loss_of(heads(self.model.apply(params, self.state, self.x, **how)[0]))


# These cannot be made small, and have no layer that others do not have.
HEAVY = ("inception_v4", "polynet")


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.slow) if name in HEAVY else name for name in CASES]
)
def setting(request: pytest.FixtureRequest) -> Setting:
    case = CASES[request.param]
    model = case.model()
    params, state = model.init(random.key(0))
    return Setting(model, params, unsettled(state), case.images(4), random.key(1))


TWO_MODES = pytest.mark.parametrize("how", [{}, {"train": True}], ids=["evaluation", "training"])
MODES = pytest.mark.parametrize(
    "how", [{}, {"train": True}, {"train": True, "statistics": "running"}], ids=["evaluation", "training", "frozen"]
)


def drawing(setting: Setting, how: dict[str, Any]) -> dict[str, Any]:
    """With a key where there is something to draw."""
    return {**how, "key": setting.key} if how else {}


def like(params: Tree, seed: int) -> Tree:
    """A random direction in the space of the parameters."""
    generator = torch.Generator().manual_seed(seed)
    return tree.map(lambda leaf: torch.randn(leaf.shape, dtype=leaf.dtype, generator=generator), params)


def dot(a: Tree, b: Tree) -> Tensor:
    return torch.stack(
        [x.flatten() @ y.flatten() for x, y in zip(tree.flatten(a).values(), tree.flatten(b).values(), strict=True)]
    ).sum()


# Purity ------------------------------------------------------------------------------------------------------


@MODES
def test_inputs_are_never_changed(setting: Setting, how: dict[str, Any]) -> None:
    how = drawing(setting, how)
    given = {"params": setting.params, "state": setting.state, "x": setting.x, "key": setting.key}
    names = list(tree.flatten(given))
    before = tree.map(torch.clone, given)
    versions = tree.map(lambda leaf: leaf._version, given)
    setting.model.apply(setting.params, setting.state, setting.x, **how)
    grad(setting.loss)(setting.params, **how)
    assert list(tree.flatten(given)) == names
    assert differences(given, before) == []
    assert tree.map(lambda leaf: leaf._version, given) == versions


@MODES
def test_no_operator_writes_into_its_arguments(setting: Setting, how: dict[str, Any]) -> None:
    how = drawing(setting, how)
    with Mutations() as mutations:
        setting.model.apply(setting.params, setting.state, setting.x, **how)
    assert mutations.found == []
    with Mutations() as mutations:
        grad(setting.loss)(setting.params, **how)
    # Where a second derivative may follow, torch differentiates SiLU in Python's stead by a formula that fills and
    # subtracts in a tensor of its own.
    own = {"aten.fill_.Scalar", "aten.sub_.Tensor"} if setting.model.name.startswith("efficientnet") else set()
    assert set(mutations.found) <= own


@MODES
def test_same_arguments_give_same_results(setting: Setting, how: dict[str, Any]) -> None:
    how = drawing(setting, how)
    (a, first), (b, second) = (setting.model.apply(setting.params, setting.state, setting.x, **how) for _ in range(2))
    assert all(map(torch.equal, heads(a), heads(b)))
    assert differences(first, second) == []


# Maps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [False, True], ids=["evaluation", "frozen"])
def test_gradients_per_sample_equal_a_loop(setting: Setting, train: bool) -> None:
    """In double precision: in single, a value near a rectifier's edge may fall on either side of it."""
    setting = setting.double()
    keys, images = random.split(setting.key, 2), setting.x[:2]

    def loss(params: Tree, image: Tensor, key: Tensor) -> Tensor:
        how: dict[str, Any] = {"train": True, "statistics": "running", "key": key} if train else {}
        return loss_of(heads(setting.model.apply(params, setting.state, image[None], **how)[0]))

    mapped = vmap(grad(loss), in_dims=(None, 0, 0))(setting.params, images, keys)
    for i, (image, key) in enumerate(zip(images, keys, strict=True)):
        assert_close(pick(mapped, i), grad(loss)(setting.params, image, key))


def test_training_of_an_ensemble_equals_a_loop(setting: Setting) -> None:
    """Each member has its own weights, statistics, images and masks."""
    setting = setting.double()
    keys = random.split(setting.key, 2)
    params, state = (
        stack([setting.params, tree.map(lambda leaf: 1.1 * leaf, setting.params)]),
        stack([setting.state] * 2),
    )
    images = torch.stack([setting.x, setting.x.flip(0) * 0.9])

    def loss(params: Tree, state: Tree, x: Tensor, key: Tensor) -> tuple[Tensor, Tree]:
        output, new_state = setting.model.apply(params, state, x, train=True, key=key)
        return loss_of(heads(output)), new_state

    step = grad_and_value(loss, has_aux=True)
    gradients, (value, new_state) = vmap(step)(params, state, images, keys)
    for i in range(2):
        expected, (number, statistics) = step(pick(params, i), pick(state, i), images[i], keys[i])
        assert_close(value[i], number, rtol=1e-9)
        assert_close(pick(gradients, i), expected, rtol=1e-6)
        assert_close(pick(new_state, i), statistics, rtol=1e-6)


def test_mapped_init_makes_an_ensemble(setting: Setting) -> None:
    keys = random.split(setting.key, 2)
    params, state = vmap(setting.model.init)(keys)
    for i, key in enumerate(keys):
        one_params, one_state = setting.model.init(key)
        assert differences(pick(params, i), one_params) == []
        assert differences(pick(state, i), one_state) == []


def test_init_compiles_into_one_graph() -> None:
    model = purecnn.create("resnet18", num_classes=3)
    torch.compiler.reset()
    compiled = torch.compile(model.init, fullgraph=True, backend="aot_eager")(random.key(0))
    assert differences(compiled[0], model.init(random.key(0))[0]) == []
    assert differences(compiled[1], model.init(random.key(0))[1]) == []


def test_mapped_apply_runs_an_ensemble(setting: Setting) -> None:
    params, state = (
        stack([setting.params, tree.map(lambda leaf: 1.1 * leaf, setting.params)]),
        stack([setting.state] * 2),
    )
    logits, same = vmap(setting.model.apply, in_dims=(0, 0, None))(params, state, setting.x)
    assert differences(same, state) == []
    for i in range(2):
        assert_close(logits[i], setting.model.apply(pick(params, i), pick(state, i), setting.x)[0])


def test_map_over_images_equals_the_batch(setting: Setting) -> None:
    def one(image: Tensor) -> Tensor:
        return setting.model.apply(setting.params, setting.state, image[None])[0][0]

    assert_close(vmap(one)(setting.x), setting.model.apply(setting.params, setting.state, setting.x)[0])


def test_permuted_images_give_permuted_logits(setting: Setting) -> None:
    order = torch.tensor([2, 0, 3, 1])
    logits, _ = setting.model.apply(setting.params, setting.state, setting.x)
    permuted, _ = setting.model.apply(setting.params, setting.state, setting.x[order])
    assert_close(permuted, logits[order])


# Derivatives -------------------------------------------------------------------------------------------------


def in_double(setting: Setting, how: dict[str, Any]) -> tuple[Any, Tree]:
    """The loss in float64 as a function of all but the largest parameters, which say nothing new; and these."""
    double = setting.double()
    leaves = tree.flatten(double.params)
    variables = {path: leaf for path, leaf in leaves.items() if leaf.numel() < 1_000_000}

    def loss(variables: Tree) -> Tensor:
        return double.loss(tree.unflatten({**leaves, **variables}), **how)

    return loss, variables


@MODES
def test_forward_derivative_is_the_gradients_product(setting: Setting, how: dict[str, Any]) -> None:
    loss, variables = in_double(setting, drawing(setting, how))
    direction = like(variables, 1)
    value, forward = jvp(loss, (variables,), (direction,))
    assert_close(value, loss(variables), rtol=1e-9)
    assert_close(forward, dot(grad(loss)(variables), direction), rtol=1e-6)


@MODES
def test_product_with_the_hessian_is_symmetric(setting: Setting, how: dict[str, Any]) -> None:
    loss, variables = in_double(setting, drawing(setting, how))
    u, v = like(variables, 1), like(variables, 2)

    def product(direction: Tree) -> Tree:
        return jvp(grad(loss), (variables,), (direction,))[1]

    assert_close(dot(u, product(v)), dot(v, product(u)), rtol=1e-6)
    _, pull = vjp(grad(loss), variables)
    assert_close(dot(u, pull(v)[0]), dot(v, product(u)), rtol=1e-6)


@TWO_MODES
def test_tangents_of_forward_ad_and_gradients_of_a_forward_derivative(setting: Setting, how: dict[str, Any]) -> None:
    """Torch has two ways to differentiate forward, and two to differentiate that; all agree."""
    loss, variables = in_double(setting, drawing(setting, how))
    direction = like(variables, 1)
    expected = jvp(loss, (variables,), (direction,))[1]
    with forward_ad.dual_level():
        dual = tree.map(forward_ad.make_dual, variables, direction)
        assert_close(forward_ad.unpack_dual(loss(dual)).tangent, expected)

    def squared(variables: Tree) -> Tensor:
        return jvp(loss, (variables,), (direction,))[1].square()

    inner = grad(squared)(variables)
    leaves = tree.map(lambda leaf: leaf.detach().requires_grad_(), variables)
    found = torch.autograd.grad(squared(leaves), list(tree.flatten(leaves).values()), materialize_grads=True)
    assert_close(dict(zip(tree.flatten(inner), found, strict=True)), tree.flatten(inner), rtol=1e-6)


def test_jacobian_of_the_head(setting: Setting) -> None:
    def logits(head: Tree) -> Tensor:
        return setting.model.apply({**setting.params, "head": head}, setting.state, setting.x)[0]

    jacobian = jacrev(logits)(setting.params["head"])
    direction = like(setting.params["head"], 3)
    _, forward = jvp(logits, (setting.params["head"],), (direction,))
    products = [
        torch.einsum("bkn,n->bk", j.flatten(2), v.flatten())
        for j, v in zip(tree.flatten(jacobian).values(), tree.flatten(direction).values(), strict=True)
    ]
    assert_close(torch.stack(products).sum(0), forward)


# Compilers ---------------------------------------------------------------------------------------------------


def test_compiled_evaluation_equals_eager(setting: Setting) -> None:
    torch.compiler.reset()
    arguments = (setting.params, setting.state, setting.x)
    output, state = torch.compile(setting.model.apply, fullgraph=True, backend="aot_eager")(*arguments)
    expected, new_state = setting.model.apply(*arguments)
    assert_close(output, expected)
    assert_close(state, new_state)


def test_compiled_gradient_equals_eager(setting: Setting) -> None:
    """The training's outputs and new statistics, too."""

    def loss(params: Tree, state: Tree, x: Tensor, key: Tensor) -> tuple[Tensor, tuple[Any, Tree]]:
        output, new_state = setting.model.apply(params, state, x, train=True, key=key)
        return loss_of(heads(output)), (output, new_state)

    torch.compiler.reset()
    setting = setting.double()
    arguments = (setting.params, setting.state, setting.x, setting.key)
    step = grad(loss, has_aux=True)
    compiled = torch.compile(lambda *arguments: step(*arguments), fullgraph=True, backend="aot_eager")
    gradients, (output, state) = compiled(*arguments)
    expected, (logits, new_state) = step(*arguments)
    assert type(output) is type(logits)
    assert_close((gradients, state), (expected, new_state), rtol=1e-6)
    assert_close(tuple(heads(output)), tuple(heads(logits)), rtol=1e-6)


class Wrapped(nn.Module):
    """torch.export takes modules alone."""

    def __init__(self, model: Model, how: dict[str, Any]):
        super().__init__()
        self.model, self.how = model, how

    def forward(self, params: Tree, state: Tree, x: Tensor, key: Tensor) -> Any:
        output, state = self.model.apply(params, state, x, **self.how, key=key)
        return heads(output), state


def export(setting: Setting, how: dict[str, Any], strict: bool) -> None:
    """For a batch of any size, also where it has statistics."""
    module, (params, state, x, key) = Wrapped(setting.model, how), setting[1:5]
    fixed = [tree.map(lambda _: None, each) for each in (params, state)]
    shapes = (*fixed, {0: torch.export.Dim("batch", min=2)}, None)
    exported = torch.export.export(module, (params, state, x, key), dynamic_shapes=shapes, strict=strict).module()
    for images in (x, torch.cat([x, x, x[:1]])):
        output, new = exported(params, state, images, key)
        expected, expected_new = module(params, state, images, key)
        assert_close(tuple(output), tuple(expected))
        assert_close(new, expected_new)


@TWO_MODES
def test_exported_equals_eager(setting: Setting, how: dict[str, Any]) -> None:
    export(setting, how, strict=False)


def test_exported_from_source_equals_eager() -> None:
    case = CASES["densenet"]
    params, state = case.model().init(random.key(0))
    export(Setting(case.model(), params, state, case.images(), random.key(1)), {"train": True}, strict=True)


# Types -------------------------------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_type_of_the_parameters_is_the_type_of_the_results(
    setting: Setting, how: dict[str, Any], dtype: torch.dtype
) -> None:
    params, state, x = to(dtype, setting.params), to(dtype, setting.state), setting.x.to(dtype)
    how = drawing(setting, how)
    output, new_state = setting.model.apply(params, state, x, **how)
    assert {logits.dtype for logits in heads(output)} == {dtype}
    assert all(logits.isfinite().all() for logits in heads(output))
    assert tree.map(lambda leaf: leaf.dtype, new_state) == tree.map(lambda leaf: leaf.dtype, state)
    if dtype == torch.float64:
        expected, statistics = setting.model.apply(setting.params, setting.state, setting.x, **how)
        assert_close(tuple(logits.float() for logits in heads(output)), tuple(heads(expected)))
        assert_close(to(torch.float32, new_state), statistics)
    elif not how:
        expected = setting.model.apply(setting.params, setting.state, setting.x)[0]
        assert_close(output.float(), expected, rtol=0.1)


def test_outputs_are_a_tuple_of_tensors_to_torch() -> None:
    leaves, _ = torch.utils._pytree.tree_flatten(Outputs(torch.zeros(1), (torch.ones(1), torch.ones(2))))
    assert [leaf.shape for leaf in leaves] == [(1,), (1,), (2,)]
