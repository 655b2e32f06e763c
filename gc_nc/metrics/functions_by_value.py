"""Which functions may share one compiled program without giving a stale answer."""

import contextlib
import dataclasses
import enum
import functools
import operator
import sys
import types
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import jax
import numpy as np

from gc_nc.array_types import EmbedFn

# What these libraries export does not change while a program runs.
_LIBRARIES = ("jax", "jaxlib", "numpy", "flax", "gc_nc")
_ATOMS = (bool, int, float, complex, str, bytes, type(None), type(...), np.dtype, np.generic)


def comparable(embed_fn: EmbedFn) -> jax.tree_util.Partial | None:
    """The same Partial in a form that equals another only if all that it closes over is equal.

    None for plain functions, whose identity says nothing of the values they close over, and for a
    Partial that holds or reads something that cannot be compared by value.
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
    """Something has an identity but no value: equal hashes would not mean equal contents."""


def _value_of(thing: Any, enclosing: tuple) -> Hashable:
    """What a function or a value it holds computes with, as something that compares by value.

    Only what is known to have a value: a module updated in place hashes by identity, inside a tuple
    too, and would give the GC of its old weights. Attributes of Python modules and of classes, and
    what methods read, are not followed: as under jax.jit, they must not change.
    """
    if isinstance(thing, (type, types.ModuleType)) or _is_of_a_library(thing):
        return thing
    # 1 == 1.0 == True and 0.0 == -0.0, but a network may tell them apart.
    if isinstance(thing, (*_ATOMS, enum.Enum)):
        return type(thing), repr(thing)
    if any(thing is other for other in enclosing):
        if isinstance(thing, types.FunctionType):
            return "recursion", [thing is other for other in enclosing].index(True)
        raise _NoValueError
    values_of = functools.partial(_values_of, (*enclosing, thing))
    if isinstance(thing, types.FunctionType):
        try:
            cells = [cell.cell_contents for cell in thing.__closure__ or ()]
        except ValueError as error:
            raise _NoValueError from error
        by_name = [thing.__kwdefaults__ or {}, vars(thing), _globals_read_by(thing)]
        held = [*cells, thing.__defaults__, *(tuple(sorted(d.items())) for d in by_name)]
        return thing.__code__, id(thing.__globals__), values_of(held)
    if isinstance(thing, types.MethodType):
        return values_of([thing.__func__, thing.__self__])
    if isinstance(thing, functools.partial):
        keywords = sorted(thing.keywords.items())
        return functools.partial, values_of([thing.func, thing.args, *map(tuple, keywords)])
    if type(thing) in (tuple, frozenset):
        # A frozenset iterates in the same order as long as nobody changes it, and nobody can.
        return type(thing), values_of(thing)
    if isinstance(thing, tuple) and hasattr(thing, "_fields"):
        return type(thing), values_of(thing)
    if dataclasses.is_dataclass(thing) and type(thing).__hash__ not in (None, object.__hash__):
        return type(thing), values_of(getattr(thing, f.name) for f in dataclasses.fields(thing))
    raise _NoValueError


def _values_of(enclosing: tuple, things: Iterable) -> tuple:
    return tuple(_value_of(one, enclosing) for one in things)


def _is_of_a_library(thing: Any) -> bool:
    """Whether it is a function that a library exports, wrapped by jit or not."""
    module, name = getattr(thing, "__module__", None), getattr(thing, "__qualname__", "<locals>")
    if isinstance(thing, types.BuiltinFunctionType):
        # A bound one, such as dict.get, has the object that it is bound to in __self__.
        return isinstance(thing.__self__, (types.ModuleType, type(None)))
    if not isinstance(module, str) or module.partition(".")[0] not in _LIBRARIES:
        return False
    # A wrapper bears the name of what it wraps, and may close over anything.
    try:
        return operator.attrgetter(name)(sys.modules[module]) is thing
    except (KeyError, AttributeError):
        return False


def _globals_read_by(function: types.FunctionType) -> dict[str, Any]:
    """The globals that the function's code names."""
    names, codes = set(), [function.__code__]
    while codes:
        code = codes.pop()
        names.update(code.co_names)
        codes.extend(c for c in code.co_consts if isinstance(c, types.CodeType))
    return {name: function.__globals__[name] for name in names if name in function.__globals__}
