"""The one place that decides how XLA compiles for the device at hand."""

import functools
from collections.abc import Callable

import jax

#: XLA's CPU backend runs matmuls and convolutions by YNNPACK then, not Eigen: up to ten times
# faster on a VGG's gradients and closer to float64, the same result each time.
_CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT"}


@functools.cache
def compiler_options() -> dict[str, str]:
    """The `compiler_options` of jax.jit for the default backend; {} where this jaxlib has none."""
    if jax.default_backend() != "cpu":
        return {}
    try:
        jax.jit(lambda x: x, compiler_options=_CPU_OPTIONS).lower(0.0).compile()
    except Exception:
        # Any error of a trivial program is about the option, which is experimental.
        return {}
    return _CPU_OPTIONS


def jit_for_device(fn: Callable, **jit_options) -> Callable:
    """jax.jit with `compiler_options()`; no backend starts before the first call.

    Args:
      fn: to compile.
      **jit_options: other arguments of jax.jit, such as static_argnames.
    """
    plain = jax.jit(fn, **jit_options)

    @functools.cache
    def with_options():
        return jax.jit(fn, compiler_options=compiler_options(), **jit_options)

    @functools.wraps(fn)
    def call(*arguments, **keywords):
        if not compiler_options():
            return plain(*arguments, **keywords)
        try:
            return with_options()(*arguments, **keywords)
        except ValueError as error:
            # Inside another jit, or under grad, the outermost program's options hold, and JAX
            # refuses others while it traces, before anything ran or was donated.
            if "compiler_options" not in str(error):
                raise
            return plain(*arguments, **keywords)

    return call
