"""Which functions may share one compiled program without ever giving a stale answer."""

import contextlib
import dataclasses
import types
from collections.abc import Callable, Hashable
from typing import Any

import jax

from gc_nc.array_types import EmbedFn


def comparable(embed_fn: EmbedFn) -> jax.tree_util.Partial | None:
    """The same Partial in a form that equals another only if all that it closes over is equal.

    None for plain functions, whose identity says nothing of the values they close over, and for a
    Partial that holds something without a value.
    """
    if isinstance(embed_fn, jax.tree_util.Partial):
        with contextlib.suppress(_NoValueError):
            function = _FunctionByValue(embed_fn.func, _value_of(embed_fn.func, ()))
            return jax.tree_util.Partial(function, *embed_fn.args, **embed_fn.keywords)
    return None


@dataclasses.dataclass(frozen=True)
class _FunctionByValue:
    """A function that is equal to another only if all that it closes over is."""

    function: Callable = dataclasses.field(compare=False)
    value: Hashable

    def __call__(self, *args, **kwargs):
        return self.function(*args, **kwargs)


class _NoValueError(Exception):
    """Something hashes by identity: equal hashes would not mean equal values."""


def _value_of(thing: Any, enclosing: tuple) -> Hashable:
    """What a function or a value it holds computes with, as something that compares by value.

    A module updated in place hashes by identity and would give the GC of its old weights, so it has
    no value here. Globals cannot be followed: as under jax.jit, they must not change.
    """
    if any(thing is other for other in enclosing):
        raise _NoValueError
    enclosing = (*enclosing, thing)
    if isinstance(thing, types.FunctionType):
        cells = [cell.cell_contents for cell in thing.__closure__ or ()]
        held = [*cells, *(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values()]
        return thing.__code__, id(thing.__globals__), *(_value_of(h, enclosing) for h in held)
    if isinstance(thing, types.MethodType):
        return thing.__func__, _value_of(thing.__self__, enclosing)
    if type(thing).__hash__ in (None, object.__hash__) or type(thing).__module__.startswith("jax."):
        # The latter: jax wraps a functools.partial, whatever it holds, into a hashable shim.
        if isinstance(thing, (type, types.ModuleType, types.BuiltinFunctionType)):
            return thing
        raise _NoValueError
    try:
        hash(thing)
    except TypeError as error:
        raise _NoValueError from error
    # 1 == 1.0 == True, but a network may tell them apart.
    return type(thing), thing
