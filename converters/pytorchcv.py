"""pytorchcv: its state_dicts and modules, to and from our trees; for networks that torchvision does not have.

    params, state = from_state_dict(model, module.state_dict())
    module = to_module(model, params, state)

`converters.library` has the functions' descriptions. pytorchcv itself is needed but for building its modules, which
`to_state_dict` and `to_module` do: ``pip install pytorchcv``.
"""

from converters import peers_historic, peers_inception, peers_multipath, peers_residual
from converters.library import Library

FAMILIES = peers_historic.PYTORCHCV | peers_residual.PYTORCHCV | peers_inception.PYTORCHCV | peers_multipath.PYTORCHCV
"""By the model's name."""

LIBRARY = Library("pytorchcv", lambda model: FAMILIES.get(model.name))

has = LIBRARY.has
from_state_dict = LIBRARY.from_state_dict
to_state_dict = LIBRARY.to_state_dict
to_module = LIBRARY.to_module
