"""Convert timm's state_dicts and modules to and from our trees, also for torchvision's networks with weights in timm.

    params, state = from_state_dict(model, module.state_dict())
    params, state = pretrained(model)          # the weights that timm publishes, through timm's own loading

`converters.library` documents the functions. timm itself is needed only for `about` and `pretrained`, and for
`to_state_dict` and `to_module`, which build its modules: ``pip install timm``.
"""

from typing import Any

import purecnn
from converters import peers_inception, peers_multipath, peers_residual, peers_shared
from converters.library import Library
from converters.rules import ConversionError
from purecnn import Model
from purecnn.data import Preprocessing
from purecnn.tree import Tree

FAMILIES = peers_residual.TIMM | peers_inception.TIMM | peers_multipath.TIMM | peers_shared.TIMM
"""The rules and module of each network, by the model's name."""

NAMES = {
    "inception_v4": "inception_v4.tf_in1k",
    "inception_resnet_v2": "inception_resnet_v2.tf_in1k",
    "xception": "legacy_xception.tf_in1k",
    "mnasnet_a1": "semnasnet_100.rmsp_in1k",
    "preactresnet50": "resnetv2_50.a1h_in1k",
    "seresnet50": "seresnet50.a1_in1k",
    "seresnext50_32x4d": "seresnext50_32x4d.gluon_in1k",
    "senet154": "senet154.gluon_in1k",
    "nasnet_a_large": "nasnetalarge.tf_in1k",
    "pnasnet5_large": "pnasnet5large.tf_in1k",
    "dpn68": "dpn68.mx_in1k",
    "dpn92": "dpn92.mx_in1k",
    "dpn98": "dpn98.mx_in1k",
    "dpn131": "dpn131.mx_in1k",
    "dpn107": "dpn107.mx_in1k",
    "resnest50": "resnest50d.in1k",
    "resnest101": "resnest101e.in1k",
    "resnet18": "resnet18.a1_in1k",
    "resnet34": "resnet34.a1_in1k",
    "resnet50": "resnet50.a1_in1k",
    "resnet101": "resnet101.a1h_in1k",
    "resnet152": "resnet152.a1h_in1k",
    "wide_resnet50_2": "wide_resnet50_2.racm_in1k",
    "wide_resnet101_2": "wide_resnet101_2.tv2_in1k",
    "resnext50_32x4d": "resnext50_32x4d.a1h_in1k",
    "resnext101_32x8d": "resnext101_32x8d.tv2_in1k",
    "resnext101_64x4d": "resnext101_64x4d.c1_in1k",
    "densenet121": "densenet121.ra_in1k",
    "densenet161": "densenet161.tv_in1k",
    "densenet169": "densenet169.tv_in1k",
    "densenet201": "densenet201.tv_in1k",
    "inception_v3": "inception_v3.tf_in1k",
    "mobilenet_v2": "mobilenetv2_100.ra_in1k",
    "mnasnet1_0": "mnasnet_100.rmsp_in1k",
    "efficientnet_b0": "efficientnet_b0.ra_in1k",
    "efficientnet_b1": "efficientnet_b1.ra4_e3600_r240_in1k",
    "efficientnet_b2": "efficientnet_b2.ra_in1k",
    "efficientnet_b3": "efficientnet_b3.ra2_in1k",
    "efficientnet_b4": "efficientnet_b4.ra2_in1k",
    "regnet_x_400mf": "regnetx_004_tv.tv2_in1k",
    "regnet_x_800mf": "regnetx_008.tv2_in1k",
    "regnet_x_1_6gf": "regnetx_016.tv2_in1k",
    "regnet_x_3_2gf": "regnetx_032.tv2_in1k",
    "regnet_x_8gf": "regnetx_080.tv2_in1k",
    "regnet_x_16gf": "regnetx_160.tv2_in1k",
    "regnet_x_32gf": "regnetx_320.tv2_in1k",
    "regnet_y_400mf": "regnety_004.tv2_in1k",
    "regnet_y_800mf": "regnety_008_tv.tv2_in1k",
    "regnet_y_1_6gf": "regnety_016.tv2_in1k",
    "regnet_y_3_2gf": "regnety_032.ra_in1k",
    "regnet_y_8gf": "regnety_080_tv.tv2_in1k",
    "regnet_y_16gf": "regnety_160.swag_ft_in1k",
    "regnet_y_32gf": "regnety_320.tv2_in1k",
    "convnext_tiny": "convnext_tiny.in12k_ft_in1k",
    "convnext_small": "convnext_small.in12k_ft_in1k",
    "convnext_base": "convnext_base.fb_in22k_ft_in1k",
    "convnext_large": "convnext_large.fb_in22k_ft_in1k",
}
"""Our model names, each with timm's name for published weights that fit it: the default ones if there are several.
MobileNet v1 is missing, because timm's weights were trained with ReLU6."""

LIBRARY = Library("timm", lambda model: FAMILIES.get(model.name))

has = LIBRARY.has
from_state_dict = LIBRARY.from_state_dict
to_state_dict = LIBRARY.to_state_dict
to_module = LIBRARY.to_module


def pretrained(model: Model, weights: str | None = None) -> tuple[Tree, Tree]:
    """The weights that timm publishes on the Hugging Face Hub, downloaded, checked and cached by timm.

    Both networks are run on an image and compared, because matching names and shapes are not enough: timm's
    ``tf_efficientnet_b0`` has those of ``efficientnet_b0``, but TensorFlow's padding.

    Args:
        model: created with the settings that the weights were trained with.
        weights: timm's name for them, such as ``"inception_v4.tf_in1k"``; by default the one in `NAMES`.

    Raises:
        ConversionError: if timm has no such weights, if they cannot be downloaded, or if timm computes something else
            with them.
    """
    name = _known(model, weights)
    try:
        module = _timm().create_model(name, pretrained=True)
    except (OSError, RuntimeError) as error:
        raise ConversionError(f"timm's {name} cannot be loaded: {str(error).splitlines()[0]}") from error
    return LIBRARY.from_module(model, module, name, model.image_size, _BOUNDS.get(model.name, 1e-3))


_BOUNDS = {"nasnet_a_large": 0.03}
"""Larger bounds for networks where timm is known to compute something else: its means count the padding in NASNet."""


def about(model: Model, weights: str | None = None) -> tuple[Model, Preprocessing, dict[str, Any]]:
    """The model, the preprocessing and the origin of published weights, as timm describes them.

    Args:
        model: one of those in `NAMES`.
        weights: as in `pretrained`.

    Returns:
        The model with as many classes as the weights, without auxiliary heads, and for the image size that they are
        evaluated at; the preprocessing; the source of the weights (JSON-serialisable).

    Raises:
        ConversionError: if timm has no such weights, if they have no head, or if they need a crop other than the centre
            crop.
    """
    name = _known(model, weights)
    timm = _timm()
    if not timm.is_model_pretrained(name):
        raise ConversionError(f"timm has no weights {name!r}")
    found = timm.get_pretrained_cfg(name)
    if found.num_classes < 1 or found.crop_mode != "center":
        what = "have no head" if found.num_classes < 1 else f"need the crop {found.crop_mode!r}, expected 'center'"
        raise ConversionError(f"timm's weights {name!r} {what}")
    channels, size, _ = found.input_size
    preprocessing = Preprocessing(
        size, channels, int(size / found.crop_pct), tuple(found.mean), tuple(found.std), found.interpolation
    )
    bare = peers_shared.BARE.get(model.name, {})
    settings = {**model.settings, **bare, "num_classes": found.num_classes, "in_channels": channels, "image_size": size}
    origin = {"weights": f"timm/{name}", "url": f"https://huggingface.co/timm/{name}", "license": found.license}
    return purecnn.create(model.name, **settings), preprocessing, origin


def _known(model: Model, weights: str | None) -> str:
    """timm's name for the weights: the given one, or the model's default."""
    if not LIBRARY.has(model) or model.name not in NAMES:
        raise ConversionError(f"timm publishes no weights that fit {model.name}; it does for {', '.join(NAMES)}")
    return weights or NAMES[model.name]


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise ConversionError("timm is not installed: pip install timm") from error
    return timm
