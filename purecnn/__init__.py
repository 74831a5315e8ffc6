"""The whole evolution of CNN architectures, as pure functions.

    import purecnn
    from purecnn import random

    model = purecnn.create("resnet50")
    params, state = model.init(random.key(0))
    logits, state = model.apply(params, state, x, train=True, key=random.key(1))

``params`` and ``state`` are nested dictionaries of tensors, and both functions are pure.
"""

from purecnn import initializers, layers, random, tree
from purecnn.layer import Layer, Mode, Outputs, add, concat, fork, multiply, named, numbered, serial
from purecnn.model import Model, UnknownModelError, create, list_models, replace_head

__version__ = "0.1.0"

__all__ = [
    "Layer",
    "Mode",
    "Model",
    "Outputs",
    "UnknownModelError",
    "add",
    "concat",
    "create",
    "fork",
    "initializers",
    "layers",
    "list_models",
    "multiply",
    "named",
    "numbered",
    "random",
    "replace_head",
    "serial",
    "tree",
]
