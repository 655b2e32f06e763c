"""What the trace of a function shows: how it is differentiated, and what it computes.

Tracing runs the function's Python code once, with shapes only. It gives a jaxpr, which is the list
of operations, and the arrays that the function closes over.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, get_opaque_trace_state, jaxpr_as_fun
from jax.extend.core.primitives import custom_jvp_call_p, custom_vjp_call_p, jit_p


def trace(function: Callable, *arguments: Any) -> tuple[ClosedJaxpr, Any]:
    """Returns the trace of a function, with all it closes over as constants, and result shapes.

    The constants include those of `jax.jit` inside the function. The constants of other inner
    jaxprs stay where they are; JAX itself hardly ever puts any there.
    """
    # A new function each time: JAX would remember the trace of an old state.
    traced, results = jax.make_jaxpr(lambda *a: function(*a), return_shape=True)(*arguments)
    if any(equation.primitive is jit_p and _holds_constants(equation) for equation in traced.eqns):
        closed = traced
        leaves = jax.tree.leaves(arguments)
        traced = jax.make_jaxpr(lambda *a: _opened(closed.jaxpr, closed.consts, a))(*leaves)
    return traced, results


def trace_derivative(
    function: Callable, constants: list, argument: jax.Array
) -> ClosedJaxpr | None:
    """Returns the trace of function(constants, argument) and its Jacobian-vector product.

    Returns None if there is no such product, as when a part of the function has jax.custom_vjp.
    """

    def product(constants, argument, tangent):
        return jax.jvp(functools.partial(function, constants), (argument,), (tangent,))

    traced, _ = trace(product, constants, argument, argument)
    # If there is no product, JAX puts this placeholder in its place, which cannot be compiled.
    lacks = any(equation.primitive.name == "custom_lin" for equation in _equations(traced))
    return None if lacks else traced


def draws_anew(function: Callable, argument: jax.ShapeDtypeStruct) -> bool:
    """Returns whether two traces differ, in what they compute or in numbers that Python drew."""
    one, other = (trace(function, argument)[0] for _ in range(2))
    if _described(one, by_identity=False) != _described(other, by_identity=False):
        return True
    return not all(map(_same_number, one.consts, other.consts))


def staged() -> bool:
    """Returns whether we are inside jit, where a host loop would be unrolled into one program."""
    return isinstance(jnp.zeros(()), jax.core.Tracer)


def outside_transformations() -> bool:
    """Returns whether we are outside all JAX transformations, and jit is not disabled.

    Under jax.jit, grad or vmap a function may close over traced values, and its program may be
    differentiated again.
    """
    return not jax.config.jax_disable_jit and get_opaque_trace_state() == _untransformed()


@functools.cache
def _untransformed():
    """Returns JAX's state outside all transformations, which every new thread starts with."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(get_opaque_trace_state).result()


class Program:
    """What a trace computes; two programs are equal only if they compute the same.

    The constants of the trace are arguments of the program, so only their shapes and dtypes matter.
    Numbers that are part of the program are compared by their bits. Things that are not values,
    such as the function behind a callback, are compared by identity. The rules of jax.custom_jvp
    and jax.custom_vjp are left out: they determine derivatives, so an equal program must not be
    differentiated again.
    """

    def __init__(self, traced: ClosedJaxpr):
        """Keeps the operations, not the constants."""
        self.jaxpr = traced.jaxpr
        self._description = _described(traced)
        self._hash = hash(self._description)

    def __eq__(self, other: object) -> bool:
        """Returns whether both compute the same."""
        return isinstance(other, Program) and self._description == other._description

    def __hash__(self) -> int:
        """Returns a hash of what is computed."""
        return self._hash


def _described(traced: ClosedJaxpr, *, by_identity: bool = True) -> tuple:
    return _Description(by_identity).of_jaxpr(traced.jaxpr)


class _Description:
    """Turns jaxprs into nested tuples that compare by value."""

    def __init__(self, by_identity):
        # Whether things that are not values are compared by identity; if not, only by their type.
        self._by_identity, self._of_jaxprs = by_identity, {}

    def of_jaxpr(self, jaxpr: Jaxpr) -> tuple:
        # A function that is called often, such as jax.nn.relu, has one jaxpr for all its calls.
        if id(jaxpr) not in self._of_jaxprs:
            self._of_jaxprs[id(jaxpr)] = self._of_new_jaxpr(jaxpr)
        return self._of_jaxprs[id(jaxpr)]

    def _of_new_jaxpr(self, jaxpr):
        places = {}

        def defined(variables):
            return tuple((places.setdefault(v, len(places)), v.aval) for v in variables)

        def read(atoms):
            return tuple(
                (_bits(a.val), a.aval) if isinstance(a, Literal) else places[a] for a in atoms
            )

        return (
            (defined(jaxpr.constvars), defined(jaxpr.invars)),
            *(
                (e.primitive, e.ctx, read(e.invars), defined(e.outvars), self._of_parameters(e))
                for e in jaxpr.eqns
            ),
            read(jaxpr.outvars),
        )

    def _of_parameters(self, equation):
        has_rules = equation.primitive in (custom_jvp_call_p, custom_vjp_call_p)
        return tuple(
            (name, self._of_value(value))
            for name, value in sorted(equation.params.items())
            if _is_traced(value) or not has_rules
        )

    def _of_value(self, value):
        if isinstance(value, Jaxpr):
            return self.of_jaxpr(value)
        if isinstance(value, ClosedJaxpr):
            return self.of_jaxpr(value.jaxpr), tuple(map(_bits, value.consts))
        if isinstance(value, (tuple, list)):
            return type(value), tuple(map(self._of_value, value))
        if isinstance(value, dict):
            return dict, tuple((repr(key), self._of_value(value[key])) for key in value)
        # 1 == 1.0 == True and 0.0 == -0.0, but a network may treat them differently.
        if isinstance(value, (bool, int, float, complex, str, bytes, type(None))):
            return type(value), repr(value)
        if hasattr(value, "dtype") and hasattr(value, "shape"):
            return _bits(value)
        if not self._by_identity:
            return type(value)
        try:
            hash(value)
        except TypeError:
            # A new object is not equal to anything else.
            return object()
        return type(value), value


def _equations(traced: ClosedJaxpr | Jaxpr) -> Iterator:
    jaxpr = traced.jaxpr if isinstance(traced, ClosedJaxpr) else traced
    for equation in jaxpr.eqns:
        yield equation
        for inner in _inner(equation):
            yield from _equations(inner)


def _inner(equation) -> list[ClosedJaxpr | Jaxpr]:
    parameters = jax.tree.leaves(list(equation.params.values()), is_leaf=_is_traced)
    return list(filter(_is_traced, parameters))


def _is_traced(thing: Any) -> bool:
    return isinstance(thing, (ClosedJaxpr, Jaxpr))


def _constants_of(equation) -> list:
    return [c for inner in _inner(equation) if isinstance(inner, ClosedJaxpr) for c in inner.consts]


def _holds_constants(equation) -> bool:
    inner = [e for jaxpr in _inner(equation) for e in jaxpr.eqns if e.primitive is jit_p]
    return bool(_constants_of(equation)) or any(map(_holds_constants, inner))


def _opened(jaxpr: Jaxpr, constants, arguments) -> list:
    """Runs a jaxpr; an inner jit with constants is inlined."""
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *arguments), strict=True))

    def value_of(atom):
        return atom.val if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        if equation.primitive is jit_p and _holds_constants(equation):
            inner = equation.params["jaxpr"]
            results = _opened(inner.jaxpr, inner.consts, map(value_of, equation.invars))
        else:
            read = [*dict.fromkeys(v for v in equation.invars if not isinstance(v, Literal))]
            alone = jaxpr.replace(
                constvars=(), invars=read, outvars=equation.outvars, eqns=[equation]
            )
            results = jaxpr_as_fun(ClosedJaxpr(alone, ()))(*map(values.get, read))
        values.update(zip(equation.outvars, results, strict=True))
    return list(map(value_of, jaxpr.outvars))


def _same_number(one: Any, other: Any) -> bool:
    return one is other or _bits(one) == _bits(other)


def _bits(number: Any) -> tuple:
    """Returns the dtype, shape and a hash of the bits of an array or a number."""
    if jax.dtypes.issubdtype(getattr(number, "dtype", None), jax.dtypes.prng_key):
        return jax.random.key_impl(number), *_bits(jax.random.key_data(number))
    array = np.asarray(number)
    return array.dtype, array.shape, hashlib.sha256(array.tobytes()).digest()
