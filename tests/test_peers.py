"""Networks that torchvision lacks, beside pytorchcv's and timm's: the same outputs, gradients and statistics."""

import pytest
import torch
from torch import Tensor, nn

import purecnn
from converters import pytorchcv, timm, torchvision
from converters.library import Library
from converters.rules import ConversionError, leaves
from purecnn import random, tree
from tests.table import TABLE, assert_close, differences, drawn_state_dict, heads, loss_of, to

LIBRARIES = {"pytorchcv": pytorchcv.LIBRARY, "timm": timm.LIBRARY}
PAIRS = [("pytorchcv", name) for name in pytorchcv.FAMILIES] + [("timm", name) for name in timm.FAMILIES]

SMALL = {("timm", "nasnet_a_large"), ("timm", "pnasnet5_large")} | {
    (library, name) for library in LIBRARIES for name in ("dpn98", "dpn107", "dpn131", "resnest101")
}
"""Large networks, compared at a smaller size of images; NASNet and PNASNet also with pytorchcv at the published one."""


@pytest.mark.parametrize(("library", "name"), PAIRS)
def test_model_equals_the_library_s(library: str, name: str) -> None:
    pytest.importorskip(library, reason=f"{library} is not installed: nox -s peers has it")
    found: Library = LIBRARIES[library]
    model = purecnn.create(name, **dict.fromkeys(TABLE[name].draws, 0.0))
    module = found.to_module(model, *model.init(random.key(0)))
    state_dict = drawn_state_dict(module)
    module.load_state_dict(state_dict)
    params, state = found.from_state_dict(model, module.state_dict())
    assert differences(found.to_state_dict(model, params, state), state_dict) == []

    for layer in module.modules():
        if isinstance(layer, nn.Dropout | nn.Dropout2d):
            layer.p = 0.0

    # Some pool the published size of images alone.
    size = 96 if (library, name) in SMALL else model.image_size
    x = random.normal(random.key(1), (2, model.in_channels, size, size))
    if name != "cbam_resnet50":  # its perceptron sees means and maxima at once: another order of sums, other maxima
        with torch.no_grad():
            assert_close(model.apply(params, state, x)[0], module.eval()(x), rtol=1e-5, atol=0)

    # In training in double precision: through tens of normalisations, the last digits of single precision become the
    # third, wherever a library sums in another order (pytorchcv's last pool does).
    module, x = module.double(), x.double()
    params, state = to(torch.float64, params), to(torch.float64, state)
    theirs = module.train()(x)
    loss_of([theirs]).backward()
    theirs = theirs.detach()
    leaves = tree.map(lambda leaf: leaf.detach().requires_grad_(), params)
    output, new_state = model.apply(leaves, state, x, train=True)
    logits: Tensor = heads(output)[0]
    assert_close(logits.detach(), theirs, rtol=1e-9, atol=0)
    flat = tree.flatten(leaves)
    gradients = torch.autograd.grad(loss_of([logits]), list(flat.values()), allow_unused=True, materialize_grads=True)
    ours = found.to_state_dict(model, tree.unflatten(dict(zip(flat, gradients, strict=True))), new_state)
    named = dict(module.named_parameters())
    assert_close({key: ours[key] for key in named}, {key: p.grad for key, p in named.items()}, rtol=1e-9, atol=1e-12)
    buffers = dict(module.named_buffers())
    assert_close(
        {key: ours[key].double() for key in buffers}, {key: b.double() for key, b in buffers.items()}, rtol=1e-9
    )


@pytest.mark.parametrize("name", ["resnet18", "densenet121"])
def test_timm_has_some_of_torchvisions_names(name: str) -> None:
    peer = pytest.importorskip("timm", reason="timm is not installed: nox -s peers has it")
    model, module = purecnn.create(name), peer.create_model(name)
    module.load_state_dict(drawn_state_dict(module))
    params, state = torchvision.from_state_dict(model, module.state_dict())
    x = random.normal(random.key(1), (2, 3, 224, 224))
    with torch.no_grad():
        assert torch.equal(model.apply(params, state, x)[0], module.eval()(x))


@pytest.mark.parametrize("name", timm.NAMES)
def test_functions_of_timms_published_weights(name: str) -> None:
    peer = pytest.importorskip("timm", reason="timm is not installed: nox -s peers has it")
    assert peer.is_model_pretrained(timm.NAMES[name])
    model, module = purecnn.create(name), peer.create_model(timm.NAMES[name])
    module.load_state_dict(drawn_state_dict(module))
    params, state = timm.from_state_dict(model, module.state_dict())
    x = random.normal(random.key(1), (1, 3, 96, 96))
    bound = 0.03 if name == "nasnet_a_large" else 1e-6  # timm's means count the padding where the image shrinks
    with torch.no_grad():
        assert_close(model.apply(params, state, x)[0], module.eval()(x), rtol=bound, atol=0)


@pytest.mark.parametrize("library", LIBRARIES)
def test_models_of_torchvision_are_read_by_its_converter(library: str) -> None:
    with pytest.raises(ConversionError, match=r"no counterpart of resnet18: converters\.torchvision has it"):
        LIBRARIES[library].from_state_dict(purecnn.create("resnet18"), {})
    with pytest.raises(ConversionError, match=r"no counterpart of lenet5$"):
        LIBRARIES[library].from_state_dict(purecnn.create("lenet5"), {})


@pytest.mark.parametrize("library", LIBRARIES)
def test_rules_fill_every_leaf_once(library: str) -> None:
    """Without the library: its names and ours are one to one."""
    found = LIBRARIES[library]
    for name in (name for lib, name in PAIRS if lib == library):
        model = purecnn.create(name)
        params, state = leaves(model, found.family(model).rules(model))
        keys = [leaf.key for leaf in (*params, *state)]
        assert len(set(keys)) == len(keys)
        rules = found.family(model).rules(model)
        for leaf in (*params, *state):
            layer = leaf.key.rpartition(".")[0]
            assert rules.forward(layer) == leaf.path.rpartition(".")[0]
