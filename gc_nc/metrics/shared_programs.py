"""Compiled programs, which functions share if they compute the same.

A function's identity says nothing of what it closes over, and what it closes over may change. So
each call traces the function anew, which takes milliseconds, and looks whether a program of the
same operations has been compiled; the arrays that the function closes over are its arguments. Equal
functions of other weights share it, and no answer can be stale.
"""

import functools
from collections.abc import Callable

import jax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from gc_nc.compilation import jit_for_device
from gc_nc.metrics.traced_functions import Program, outside_transformations, trace

# The oldest go first. A caller that has this many networks at once has other costs.
MOST_PROGRAMS = 512


class SharedFunction:
    """A pure function of arrays that runs as the program of all that compute the same.

    It is traced once for arguments of the same shapes. Inside a transformation of the caller's it
    is jitted on its own.
    """

    def __init__(self, function: Callable):
        """`function`: of pytrees of arrays, with static keyword arguments."""
        self._function, self._programs, self._alone = function, {}, {}

    def __call__(self, *arguments, **static):
        """What the function returns."""
        if not outside_transformations():
            return self._jitted(static)(*arguments)
        program, constants, structure = self._traced(arguments, static)
        results = compiled(program)(constants, jax.tree.leaves(arguments))
        return jax.tree.unflatten(structure, results)

    def program(self, *arguments, **static) -> Program | None:
        """What tells the program from others; None where it is not shared."""
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
    """(constants, flat arguments) -> flat results; the same for equal programs."""

    def run(constants, arguments):
        return jaxpr_as_fun(ClosedJaxpr(program.jaxpr, constants))(*arguments)

    return jit_for_device(run, any_function=True)
