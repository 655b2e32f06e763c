"""How programs are compiled: options where they may be, and a cache on the disk."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gc_nc import compilation
from gc_nc.compilation import jit_for_device
from gc_nc.errors import InputError


def cube(x):
    return jnp.sum(x @ x @ x)


@pytest.mark.parametrize("options", [compilation._CPU_OPTIONS, {"xla_cpu_no_such_option": "x"}])
def test_works_inside_every_transformation(monkeypatch, options):
    monkeypatch.setattr(compilation, "_CPU_OPTIONS", options)
    monkeypatch.setattr(
        compilation,
        "compiler_options",
        functools.cache(compilation.compiler_options.__wrapped__),
    )
    compiled = jit_for_device(cube)
    x = jnp.eye(3) + 1
    for transform in (
        lambda f: f(x),
        lambda f: jax.jit(f)(x),
        lambda f: jax.grad(f)(x),
        lambda f: jax.vmap(f)(x[None]),
        lambda f: jax.vmap(jax.grad(f))(x[None]),
        lambda f: jax.jvp(jax.grad(f), (x,), (x,))[1],
        lambda f: jax.lax.map(f, x[None]),
        lambda f: jax.jit(jax.grad(jax.checkpoint(f)))(x),
    ):
        np.testing.assert_allclose(transform(compiled), transform(cube), rtol=1e-5)


def test_the_options_are_given_to_jax(monkeypatch):
    given = []
    monkeypatch.setattr(compilation, "compiler_options", lambda: {"xla_cpu_option": "1"})
    monkeypatch.setattr(
        jax, "jit", lambda f, compiler_options=None, **_: given.append(compiler_options) or f
    )
    assert jit_for_device(cube)(jnp.eye(2)) == 2
    assert given == [None, {"xla_cpu_option": "1"}]


def test_errors_of_the_function_itself_are_its_own():
    def fails(x):
        raise ValueError(f"no {x.shape}")

    with pytest.raises(ValueError, match=r"no \(2,\)"):
        jit_for_device(fails)(jnp.ones(2))


@pytest.mark.skipif(not compilation.compiler_options(), reason="this jaxlib has no such options")
def test_results_with_the_options_repeat_and_are_right():
    # Other tests compile without most optimizations, this one with them.
    jax.config.update("jax_disable_most_optimizations", False)
    x = jax.random.normal(jax.random.key(0), (200, 300))

    def product(x):
        return x.T @ x

    results = [np.asarray(jit_for_device(product)(x)) for _ in range(3)]
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])
    exact = np.asarray(x, np.float64)
    np.testing.assert_allclose(results[0], exact.T @ exact, rtol=1e-5, atol=1e-4)


def test_the_cache_has_a_place_and_serves_the_next_start(tmp_path):
    # A process of its own: JAX opens one cache a process.
    program = """
import sys
from pathlib import Path
import jax
from gc_nc import compilation
compilation._MIN_CACHED_SECONDS = 0.0
compilation.use_persistent_cache(Path(sys.argv[1]))
hits = []
jax.monitoring.register_event_listener(
    lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None
)
jax.jit(lambda x: x * 3 + 0.12345)(jax.numpy.ones(7)).block_until_ready()
print(len(hits) > 0)
"""
    place = tmp_path / "new" / "cache"
    command = [sys.executable, "-c", program, str(place)]
    said = [subprocess.run(command, capture_output=True, text=True).stdout for _ in range(2)]
    assert said == ["False\n", "True\n"]
    assert list(place.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file cannot be made"):
        compilation.use_persistent_cache(tmp_path / "file")


def test_the_default_place_is_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compilation.default_cache_dir().parent == tmp_path / "gc_nc" / "xla"
    assert compilation.default_cache_dir() == compilation.default_cache_dir()
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert compilation.default_cache_dir().parts[-4:-1] == (".cache", "gc_nc", "xla")
