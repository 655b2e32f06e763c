"""Compiled programs that are shared by functions that compute the same.

A function's identity does not determine what it closes over, and that may change. So each call
traces the function again, which takes milliseconds, and looks for a compiled program with the same
operations; the arrays that the function closes over become arguments of the program. So functions
that differ only in their weights share a program, and no result can be out of date.
"""

import functools
from collections.abc import Callable

import jax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from gc_nc.compilation import jit_for_device
from gc_nc.metrics.traced_functions import Program, outside_transformations, trace

# Beyond this number the least recently used are dropped. So many networks have other costs.
MOST_PROGRAMS = 512


class SharedFunction:
    """A pure function of arrays that shares its compiled program with all that compute the same.

    It is traced once for arguments of the same shapes. Inside a transformation of the caller, it is
    jitted separately.
    """

    def __init__(self, function: Callable):
        """`function` takes pytrees of arrays and static keyword arguments."""
        self._function, self._programs, self._alone = function, {}, {}

    def __call__(self, *arguments, **static):
        """Returns what the function returns."""
        if not outside_transformations():
            return self._jitted(static)(*arguments)
        program, constants, structure = self._traced(arguments, static)
        results = compiled(program)(constants, jax.tree.leaves(arguments))
        return jax.tree.unflatten(structure, results)

    def program(self, *arguments, **static) -> Program | None:
        """Returns the program, which can be compared with others; None if it is not shared."""
        return self._traced(arguments, static)[0] if outside_transformations() else None

    def _jitted(self, static):
        key = tuple(static.items())
        if key not in self._alone:
            function = functools.partial(self._function, **static)
            self._alone[key] = jit_for_device(function, any_function=True)
        return self._alone[key]

    def _traced(self, arguments, static):
        leaves, structure = jax.tree.flatten(arguments)
        key = structure, tuple(map(jax.typeof, leaves)), tuple(static.items())
        if key not in self._programs:
            traced, results = trace(functools.partial(self._function, **static), *arguments)
            self._programs[key] = Program(traced), traced.consts, jax.tree.structure(results)
        return self._programs[key]


@functools.lru_cache(maxsize=MOST_PROGRAMS)
def compiled(program: Program) -> Callable:
    """Returns (constants, flat arguments) -> flat results, compiled once for equal programs."""

    def run(constants, arguments):
        return jaxpr_as_fun(ClosedJaxpr(program.jaxpr, constants))(*arguments)

    return jit_for_device(run, any_function=True)
