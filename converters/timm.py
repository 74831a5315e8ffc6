"""timm: its state_dicts and modules, to and from our trees; for networks that torchvision does not have.

    params, state = from_state_dict(model, module.state_dict())
    params, state = pretrained(model)          # the weights that timm publishes, through timm's own loading

`converters.library` has the functions' descriptions. timm itself is needed but for building its modules and for
`pretrained`: ``pip install timm``.
"""

from converters import peers_inception, peers_multipath, peers_residual
from converters.library import Library
from converters.rules import ConversionError
from purecnn import Model
from purecnn.tree import Tree

FAMILIES = peers_residual.TIMM | peers_inception.TIMM | peers_multipath.TIMM
"""By the model's name."""

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
}
"""Ours, and timm's names of the published weights that fit; those of MobileNet v1 go with ReLU6."""

LIBRARY = Library("timm", lambda model: FAMILIES.get(model.name))

has = LIBRARY.has
from_state_dict = LIBRARY.from_state_dict
to_state_dict = LIBRARY.to_state_dict
to_module = LIBRARY.to_module


def pretrained(model: Model, weights: str | None = None) -> tuple[Tree, Tree]:
    """The weights that timm publishes on the Hugging Face hub, downloaded, checked and cached by timm.

    Args:
        model: created with the settings that the weights were trained with.
        weights: timm's name of them, as in ``"inception_v4.tf_in1k"``; by default the one in `NAMES`.

    Raises:
        ConversionError: if timm has no such weights, or they cannot be had.
    """
    import timm

    if not LIBRARY.has(model) or model.name not in NAMES:
        raise ConversionError(f"timm publishes no weights that fit {model.name}; it does of {', '.join(NAMES)}")
    name = weights or NAMES[model.name]
    try:
        module = timm.create_model(name, pretrained=True)
    except (OSError, RuntimeError) as error:
        raise ConversionError(f"timm's {name} cannot be had ({str(error).splitlines()[0]})") from error
    return LIBRARY.adopt(model, module.state_dict())
