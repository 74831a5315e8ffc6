"""Convert pytorchcv's state_dicts and modules to and from our trees, for networks that torchvision does not have.

    params, state = from_state_dict(model, module.state_dict())
    module = to_module(model, params, state)
    params, state = pretrained(model)          # the weights that pytorchcv publishes

`converters.library` documents the functions. pytorchcv itself is needed only for `pretrained`, and for `to_state_dict`
and `to_module`, which build its modules: ``pip install pytorchcv``.
"""

import purecnn
from converters import files, peers_historic, peers_inception, peers_multipath, peers_residual
from converters.files import FileError
from converters.library import Library
from converters.rules import ConversionError
from purecnn import Model
from purecnn.tree import Tree

FAMILIES = peers_historic.PYTORCHCV | peers_residual.PYTORCHCV | peers_inception.PYTORCHCV | peers_multipath.PYTORCHCV
"""The rules and module of each network, by the model's name."""

LIBRARY = Library("pytorchcv", lambda model: FAMILIES.get(model.name))

has = LIBRARY.has
from_state_dict = LIBRARY.from_state_dict
to_state_dict = LIBRARY.to_state_dict
to_module = LIBRARY.to_module

NAMES = {
    "zfnet": "zfnet",
    "zfnetb": "zfnetb",
    "nin_cifar": "nin_cifar10",
    "bn_inception": "bninception",
    "resnet50_v1": "resnet50",
    "preactresnet164_cifar": "preresnet164bn_cifar10",
    "wideresnet28_10_cifar": "wrn28_10_cifar10",
    "densenetbc100_k12_cifar": "densenet100_k12_bc_cifar10",
    "seresnet50": "seresnet50b",
    "seresnext50_32x4d": "seresnext50_32x4d",
    "senet154": "senet154",
    "bam_resnet50": "bam_resnet50",
    "cbam_resnet50": "cbam_resnet50",
    "pyramidnet110_a48_cifar": "pyramidnet110_a48_cifar10",
    "inception_resnet_v1": "inceptionresnetv1",
    "mobilenet_v1": "mobilenet_w1",
    "shufflenet_g3": "shufflenet_g3_w1",
    "polynet": "polynet",
    "nasnet_a_large": "nasnet_6a4032",
    "nasnet_a_mobile": "nasnet_4a1056",
    "pnasnet5_large": "pnasnet5large",
    "dpn68": "dpn68",
    "dpn98": "dpn98",
    "dpn131": "dpn131",
    "resnest50": "resnesta50",
    "resnest101": "resnesta101",
}
"""Our model names, each with pytorchcv's name for published weights that fit it."""


def pretrained(model: Model, weights: str | None = None) -> tuple[Tree, Tree]:
    """The weights that pytorchcv publishes on GitHub, downloaded, checked and cached by pytorchcv.

    They are read by `converters.files`, which unpickles only tensors; pytorchcv itself would unpickle anything. Both
    networks are run on an image and compared, because matching names and shapes are not enough: pytorchcv's
    ``resnet50b`` has those of ``resnet50``, but another stride.

    Args:
        model: created with the settings that the weights were trained with.
        weights: pytorchcv's name for them, such as ``"bninception"``; by default the one in `NAMES`.

    Raises:
        ConversionError: if pytorchcv has no such weights, if they cannot be downloaded, or if pytorchcv computes
            something else with them.
    """
    if model.name not in NAMES:
        raise ConversionError(f"pytorchcv publishes no weights that fit {model.name}; it does for {', '.join(NAMES)}")
    try:
        from pytorchcv.model_provider import get_model
        from pytorchcv.models.common import model_store
    except ImportError as error:
        raise ConversionError("pytorchcv is not installed: pip install pytorchcv") from error
    name = weights or NAMES[model.name]
    try:
        module = get_model(name)
        state_dict = files.read(model_store.get_model_file(name))
    except (OSError, ValueError, RuntimeError, FileError) as error:
        raise ConversionError(f"pytorchcv's {name} cannot be loaded: {str(error).splitlines()[0]}") from error
    module.load_state_dict(state_dict)
    return LIBRARY.from_module(model, module, name, purecnn.create(model.name).image_size, 1e-3)
