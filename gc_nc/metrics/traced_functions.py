"""What the trace of a function shows: how it can be differentiated, and whether it stays the same.

Tracing runs the function's Python once, on shapes alone.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal


def has_forward_mode(function: Callable, argument: jax.Array) -> bool:
    """False where a part of the function has jax.custom_vjp, and so no Jacobian-vector product."""
    traced = jax.make_jaxpr(lambda x: jax.jvp(function, (x,), (x,))[1])(argument)
    # What JAX puts in the place of the product, and refuses to compile.
    return all(equation.primitive.name != "custom_lin" for equation in _equations(traced))


def draws_anew(function: Callable, argument: jax.ShapeDtypeStruct) -> bool:
    """Whether two traces differ: in numbers that Python drew, or in what they compute."""
    # A new function each time: make_jaxpr would remember the first trace.
    one, other = (jax.make_jaxpr(lambda x: function(x))(argument) for _ in range(2))
    return not _same_program(one, other)


def _equations(traced: ClosedJaxpr | Jaxpr) -> Iterator:
    jaxpr = traced.jaxpr if isinstance(traced, ClosedJaxpr) else traced
    for equation in jaxpr.eqns:
        yield equation
        for parameter in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_traced):
            if _is_traced(parameter):
                yield from _equations(parameter)


def _is_traced(thing: Any) -> bool:
    return isinstance(thing, (ClosedJaxpr, Jaxpr))


def _constants(traced: ClosedJaxpr | Jaxpr) -> list:
    return list(traced.consts) if isinstance(traced, ClosedJaxpr) else []


def _same_program(one: ClosedJaxpr, other: ClosedJaxpr) -> bool:
    ones, others = list(_equations(one)), list(_equations(other))
    if [e.primitive for e in ones] != [e.primitive for e in others]:
        return False
    if not _same_numbers(_constants(one), _constants(other)):
        return False
    return all(_same_equation(*pair) for pair in zip(ones, others, strict=True))


def _same_equation(one: Any, other: Any) -> bool:
    literals = [
        [v.val for v in equation.invars if isinstance(v, Literal)] for equation in (one, other)
    ]
    if not _same_numbers(*literals):
        return False
    for name, parameter in one.params.items():
        pair = parameter, other.params.get(name)
        # By their bytes: a gather's fill value may be NaN, which is not equal to itself.
        if all(isinstance(p, (bool, int, float, str)) for p in pair) and not _same_number(*pair):
            return False
        if _is_traced(parameter) and not _same_numbers(*map(_constants, pair)):
            return False
    return True


def _same_numbers(ones: list, others: list) -> bool:
    return len(ones) == len(others) and all(map(_same_number, ones, others))


def _same_number(one: Any, other: Any) -> bool:
    if one is other:
        return True
    one, other = map(_as_array, (one, other))
    return one.dtype == other.dtype and one.tobytes() == other.tobytes()


def _as_array(constant: Any) -> np.ndarray:
    if jax.dtypes.issubdtype(getattr(constant, "dtype", None), jax.dtypes.prng_key):
        constant = jax.random.key_data(constant)
    return np.asarray(constant)
