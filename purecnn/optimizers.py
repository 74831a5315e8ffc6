"""Optimizers as pairs of pure functions.

    optimizer = sgd(0.1, momentum=0.9)
    opt_state = optimizer.init(params)
    params, opt_state = optimizer.update(grads, opt_state, params)

`Optimizer.update` leaves its inputs alone, unless the caller *donates* them: with ``donate=True`` the buffers of
``params`` and ``opt_state`` become those of the results, as ``jax.jit``'s ``donate_argnums`` does it.

Each rule is here twice, side by side: as a formula, which works under ``vmap``, ``grad`` and ``torch.compile``, and
as a kernel of torch's fused or foreach operations, which is many times faster outside of them and works in place, on
donated buffers or on copies. On a CPU the formulas equal torch's single-tensor implementations, those of sgd, adamw and
muon bit for bit, and the kernels of sgd and adamw are those of ``fused=True``. Formula and kernel differ in rounding: a
parameter by a few units in the last place after 100 steps, in single and double precision; in 16 bits by much more.

All rules take ``weight_decay``, ``decay`` (which parameters are pulled to zero) and ``scale`` (a factor of the learning
rate), the last two as functions of the parameter's path. `purecnn.optimizer` makes optimizers of others.
"""

from purecnn.elementwise import adamw, rmsprop, sgd
from purecnn.layerwise import lamb, lars, muon
from purecnn.optimizer import LearningRate, Optimizer, clipped, from_transformation, partitioned

__all__ = [
    "LearningRate",
    "Optimizer",
    "adamw",
    "clipped",
    "from_transformation",
    "lamb",
    "lars",
    "muon",
    "partitioned",
    "rmsprop",
    "sgd",
]
