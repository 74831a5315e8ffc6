"""Optimizers as pairs of pure functions.

    optimizer = sgd(0.1, momentum=0.9)
    opt_state = optimizer.init(params)
    params, opt_state = optimizer.update(grads, opt_state, params)

`Optimizer.update` does not change its inputs, unless the caller *donates* them: with ``donate=True`` the results reuse
the buffers of ``params`` and ``opt_state``, like ``jax.jit``'s ``donate_argnums``.

Each rule is written twice, side by side: as a formula, which works under ``vmap``, ``grad`` and ``torch.compile``, and
as a kernel of torch's fused or foreach operations, which is many times faster outside of these transforms and works in
place, on donated buffers or on copies. On a CPU the formulas equal torch's single-tensor implementations (those of sgd,
adamw and muon bit for bit), and the kernels of sgd and adamw are those of ``fused=True``. Formula and kernel differ in
rounding: after 100 steps, a parameter differs by a few units in the last place in single and double precision, and by
much more in 16 bits.

All rules take ``weight_decay``, ``decay`` (which parameters are decayed) and ``scale`` (a factor of the learning rate);
the last two are functions of the parameter's path. `purecnn.optimizer` makes optimizers from others.
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
