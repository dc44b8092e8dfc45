"""Counts the operations of matrix products and convolutions in a traced program.

XLA's own cost analysis counts the body of a loop once, and on a CPU it does not see the products
that a library computes. The traced program has all of them, with the lengths of its loops.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Var


def flops(function: Callable, *args) -> float:
    """Returns the operations of a call, two for a multiplication and its addition.

    Args:
      function: may be jitted.
      args: arrays or their shapes.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr: Jaxpr) -> float:
    """Returns the operations of what the results depend on; a compiler leaves out the rest."""
    total, needed = 0.0, {x for x in jaxpr.outvars if isinstance(x, Var)}
    for equation in reversed(jaxpr.eqns):
        if needed.intersection(equation.outvars):
            needed.update(x for x in equation.invars if isinstance(x, Var))
            total += _of(equation)
    return total


def _of(equation) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        depth = math.prod(shape[axis] for axis in contracted)
        return 2.0 * depth * math.prod(equation.outvars[0].aval.shape)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        depth = math.prod(kernel) // kernel[params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * depth * math.prod(equation.outvars[0].aval.shape)
    inner = [_count(body) for body in _bodies(params)]
    if name == "cond":
        return max(inner)
    times = {"scan": params.get("length"), "shard_map": getattr(params.get("mesh"), "size", 1)}
    return times.get(name, 1) * sum(inner)


def _bodies(params: dict) -> list[Jaxpr]:
    values = [x for v in params.values() for x in (v if isinstance(v, tuple | list) else (v,))]
    found = [x.jaxpr if isinstance(x, ClosedJaxpr) else x for x in values]
    return [x for x in found if isinstance(x, Jaxpr)]
