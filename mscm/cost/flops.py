"""Floating-point operations, counted from the mathematics: a walk over a jaxpr.

A multiplication and the addition that follows it are two operations; only matrix products and convolutions count, as in
published figures. XLA's own count is not used because it counts the body of a loop once.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr


def count(jaxpr: ClosedJaxpr | Jaxpr) -> int:
    """Operations of one evaluation; the body of a scan counts once per iteration, of branches the largest.

    Raises:
      ValueError: operations inside a loop whose length is not known before it runs.
    """
    inner = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    return sum(_of_equation(equation.primitive.name, equation) for equation in inner.eqns)


def _of_equation(name: str, equation: Any) -> int:
    params = equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel, (_, in_features, *window) = equation.invars[1].aval.shape, params["dimension_numbers"].rhs_spec
        # The kernel's own number of input features: with groups it is already the number of one group.
        return 2 * equation.outvars[0].aval.size * math.prod(kernel[axis] for axis in (in_features, *window))
    inside = [count(jaxpr) for jaxpr in _jaxprs(params)]
    if name == "cond":
        return max(inside)
    if name == "while" and any(inside):
        raise ValueError("flops: got products inside a while loop, whose length is not known; expected a scan")
    return sum(inside) * _repetitions(name, params)


def _repetitions(name: str, params: Mapping[str, Any]) -> int:
    """How often an equation evaluates the jaxprs in its parameters."""
    if name == "scan":
        return params["length"]
    if name == "shard_map":  # its shapes are those of one device
        return math.prod(size for axis, size in params["mesh"].shape.items() if axis in params["newly_manual_axes"])
    if name == "pallas_call":  # its shapes are those of one block
        return math.prod(params["grid_mapping"].grid)
    return 1


def _jaxprs(params: Mapping[str, Any]) -> Iterator[ClosedJaxpr | Jaxpr]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr | Jaxpr):
                yield item
