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

#: With these, XLA's CPU backend runs matmuls, convolutions and sums with YNNPACK, which is up to
# ten times faster on a VGG's gradients, closer to float64, and gives the same result each time.
_CPU_OPTIONS = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_REDUCE"
}

#: For programs that run users' functions. If the right operand of a matmul is a broadcast number,
# as in x @ jnp.ones((4, 6)), YNNPACK reads past it in memory (jaxlib 0.10.2). No network of
# gc_nc.models has such a matmul.
_CPU_OPTIONS_OF_ANY_FUNCTION = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"
}

# Programs that compile faster are not cached: reading one takes a few hundredths of a second.
_MIN_CACHED_SECONDS = 0.2


@functools.cache
def compiler_options(*, any_function: bool = False) -> dict[str, str]:
    """The `compiler_options` of jax.jit for the default backend; {} if this jaxlib has none.

    Args:
      any_function: whether the program runs users' functions and not only `gc_nc.models`.
    """
    if jax.default_backend() != "cpu":
        return {}
    options = _CPU_OPTIONS_OF_ANY_FUNCTION if any_function else _CPU_OPTIONS
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(0.0).compile()
    except Exception:
        # The program is trivial, so an error can only come from the experimental option.
        return {}
    return options


def jit_for_device(fn: Callable, *, any_function: bool = False, **jit_options) -> Callable:
    """jax.jit with `compiler_options()`; no backend starts before the first call.

    Args:
      fn: the function to compile.
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
            # Inside another jit, or under grad, fn may close over traced values. The options of the
            # outermost program apply, and JAX refuses others before anything is run or donated.
            if "compiler_options" not in str(error):
                raise
            return plain(*arguments, **keywords)

    # The number of compiled programs, as functions of jax.jit report it.
    call._cache_size = lambda: plain._cache_size() + with_options()._cache_size()
    return call


def default_cache_dir() -> Path:
    """Where compiled programs are kept: below XDG_CACHE_HOME, by default ~/.cache.

    Each kind of processor has its own folder, because programs for a CPU are machine code and
    machines with different instruction sets may share a home directory.
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
    """Keeps programs that are slow to compile on disk, so that the next process only reads them.

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
