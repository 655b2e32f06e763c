"""The one place that decides how XLA compiles for the device at hand."""

import contextlib
import functools
import hashlib
import os
import platform
from collections.abc import Callable
from pathlib import Path

import jax

from gc_nc.errors import InputError

#: XLA's CPU backend then runs matmuls, convolutions and sums by YNNPACK: up to ten times
# faster on a VGG's gradients and closer to float64, the same result each time.
_CPU_OPTIONS = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_REDUCE"
}

#: Of programs that run functions of users. Of a matmul whose right operand is one number broadcast,
# as in x @ jnp.ones((4, 6)), YNNPACK's takes what lies behind it in memory (jaxlib 0.10.2). No
# network of gc_nc.models has such a matmul.
_CPU_OPTIONS_OF_ANY_FUNCTION = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"
}

# Reading one from the disk costs a few hundredths of a second.
_MIN_CACHED_SECONDS = 0.2


@functools.cache
def compiler_options(*, any_function: bool = False) -> dict[str, str]:
    """The `compiler_options` of jax.jit for the default backend; {} where this jaxlib has none.

    Args:
      any_function: for programs that run functions of users rather than `gc_nc.models` alone.
    """
    if jax.default_backend() != "cpu":
        return {}
    options = _CPU_OPTIONS_OF_ANY_FUNCTION if any_function else _CPU_OPTIONS
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(0.0).compile()
    except Exception:
        # Any error of a trivial program is about the option, which is experimental.
        return {}
    return options


def jit_for_device(fn: Callable, *, any_function: bool = False, **jit_options) -> Callable:
    """jax.jit with `compiler_options()`; no backend starts before the first call.

    Args:
      fn: to compile.
      any_function: as in `compiler_options`.
      **jit_options: other arguments of jax.jit, such as static_argnames.
    """
    plain = jax.jit(fn, **jit_options)

    @functools.cache
    def with_options():
        options = compiler_options(any_function=any_function)
        return jax.jit(fn, compiler_options=options, **jit_options)

    @functools.wraps(fn)
    def call(*arguments, **keywords):
        leaves = jax.tree.leaves((arguments, keywords))
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
        if traced or not compiler_options():
            return plain(*arguments, **keywords)
        try:
            return with_options()(*arguments, **keywords)
        except ValueError as error:
            # Inside another jit, or under grad, fn may close over what is traced. The outermost
            # program's options hold, and JAX refuses others before anything ran or was donated.
            if "compiler_options" not in str(error):
                raise
            return plain(*arguments, **keywords)

    # As jax.jit's functions have it: how many programs there are.
    call._cache_size = lambda: plain._cache_size() + with_options()._cache_size()
    return call


def default_cache_dir() -> Path:
    """Where compiled programs are kept: below XDG_CACHE_HOME, by default ~/.cache.

    A folder for each kind of processor: a home may be shared by machines whose instructions differ,
    and programs for a CPU are machine code.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "gc_nc" / "xla" / _processor()


def _processor() -> str:
    """A short name of the processor's instruction set."""
    description = platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        description += "".join(sorted({x for x in lines if x.startswith(("flags", "Features"))}))
    return f"{platform.machine()}-{hashlib.sha256(description.encode()).hexdigest()[:8]}"


def use_persistent_cache(directory: Path) -> None:
    """Keeps programs that take long to compile, so that the next process only reads them.

    Raises:
      InputError: the directory cannot be made or written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"compilation cache {directory} cannot be made ({error})") from error
    if not os.access(directory, os.W_OK | os.X_OK):
        raise InputError(f"compilation cache {directory} cannot be written to")
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_CACHED_SECONDS)
