"""What the trace of a function shows: how it is differentiated, and what it computes.

Tracing runs the function's Python once, on shapes alone, and leaves a jaxpr: the operations in
order, with the arrays that the function closes over beside them.
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
    """What a function computes, with all that it closes over as its constants; its results' shapes.

    Constants of `jax.jit` inside the function are among them. Those of other inner jaxprs, into
    which JAX itself puts hardly any, stay where they are.
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
    """The trace of function(constants, argument) and its product with a tangent of the argument.

    None where it has no such product: a part of it with jax.custom_vjp has none.
    """

    def product(constants, argument, tangent):
        return jax.jvp(functools.partial(function, constants), (argument,), (tangent,))

    traced, _ = trace(product, constants, argument, argument)
    # What JAX puts in the place of the product, and refuses to compile.
    lacks = any(equation.primitive.name == "custom_lin" for equation in _equations(traced))
    return None if lacks else traced


def draws_anew(function: Callable, argument: jax.ShapeDtypeStruct) -> bool:
    """Whether two traces differ: in numbers that Python drew, or in what they compute."""
    one, other = (trace(function, argument)[0] for _ in range(2))
    if _described(one, by_identity=False) != _described(other, by_identity=False):
        return True
    return not all(map(_same_number, one.consts, other.consts))


def staged() -> bool:
    """Whether we are inside jit, where a host loop would unroll into one program."""
    return isinstance(jnp.zeros(()), jax.core.Tracer)


def outside_transformations() -> bool:
    """Whether nothing is traced yet and something can be: jit is not disabled.

    Under jax.jit, grad or vmap a function may close over what is traced, and its program may be
    differentiated once more.
    """
    return not jax.config.jax_disable_jit and get_opaque_trace_state() == _untransformed()


@functools.cache
def _untransformed():
    """JAX's state where nothing is traced, as it is in every new thread."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(get_opaque_trace_state).result()


class Program:
    """What a trace computes, as a value: equal to another only if the same is computed.

    The constants of the trace are arguments of the program, known by their shapes and dtypes
    alone. Numbers written into it are compared by their bits, and what has no value, such as the
    function behind a callback, by identity. The rules of jax.custom_jvp and jax.custom_vjp are left
    out: they say how to differentiate, so an equal program must not be differentiated once more.
    """

    def __init__(self, traced: ClosedJaxpr):
        """Keeps the operations, not the constants."""
        self.jaxpr = traced.jaxpr
        self._description = _described(traced)
        self._hash = hash(self._description)

    def __eq__(self, other: object) -> bool:
        """Of the same computation."""
        return isinstance(other, Program) and self._description == other._description

    def __hash__(self) -> int:
        """Of the computation."""
        return self._hash


def _described(traced: ClosedJaxpr, *, by_identity: bool = True) -> tuple:
    return _Description(by_identity).of_jaxpr(traced.jaxpr)


class _Description:
    """Turns jaxprs into nested tuples that compare by value."""

    def __init__(self, by_identity):
        # Of what has no value, its identity or else its type alone.
        self._by_identity, self._of_jaxprs = by_identity, {}

    def of_jaxpr(self, jaxpr: Jaxpr) -> tuple:
        # Where a function is called often, as jax.nn.relu is, its one jaxpr is.
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
        # 1 == 1.0 == True and 0.0 == -0.0, but a network may tell them apart.
        if isinstance(value, (bool, int, float, complex, str, bytes, type(None))):
            return type(value), repr(value)
        if hasattr(value, "dtype") and hasattr(value, "shape"):
            return _bits(value)
        if not self._by_identity:
            return type(value)
        try:
            hash(value)
        except TypeError:
            # Equal to nothing else.
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
    """Runs a jaxpr; an inner jit with constants as if its operations stood in the jaxpr itself."""
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
    """What tells an array or a number from others."""
    if jax.dtypes.issubdtype(getattr(number, "dtype", None), jax.dtypes.prng_key):
        return jax.random.key_impl(number), *_bits(jax.random.key_data(number))
    array = np.asarray(number)
    return array.dtype, array.shape, hashlib.sha256(array.tobytes()).digest()
