"""How programs are compiled: options where they may be, and a cache on the disk."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from gc_nc import compilation
from gc_nc.compilation import jit_for_device
from gc_nc.data.datasets import ImageSplit
from gc_nc.data.device_batches import Augmentation, Normalization
from gc_nc.errors import InputError
from gc_nc.models import build_model
from gc_nc.training.penalties import GCPenalty
from gc_nc.training.step import init_state, train_step
from tests.rounding import assert_same_numbers

X = np.eye(3, dtype=np.float32) + 1


def cube(x):
    """The sum of x^3; of whole numbers exactly, whatever the order of the terms."""
    return jnp.sum(x @ x @ x)


def test_works_inside_every_transformation():
    compiled = jit_for_device(cube)
    ones, squared = np.ones((3, 3)), X @ X
    value = (squared @ X).sum()
    gradient = (ones @ squared + X @ ones @ X + squared @ ones).T
    for transform, expected in (
        (lambda f: f(X), value),
        (lambda f: jax.jit(f)(X), value),
        (lambda f: jax.grad(f)(X), gradient),
        (lambda f: jax.vmap(f)(X[None]), value[None]),
        (lambda f: jax.vmap(jax.grad(f))(X[None]), gradient[None]),
        # The gradient is homogeneous of degree 2.
        (lambda f: jax.jvp(jax.grad(f), (X,), (X,))[1], 2 * gradient),
        (lambda f: jax.lax.map(f, X[None]), value[None]),
        (lambda f: jax.jit(jax.grad(jax.checkpoint(f)))(X), gradient),
    ):
        np.testing.assert_array_equal(transform(compiled), expected)


def test_options_that_this_jaxlib_lacks_are_left_out(monkeypatch):
    monkeypatch.setattr(compilation, "_CPU_OPTIONS", {"xla_cpu_no_such_option": "x"})
    probed = functools.cache(compilation.compiler_options.__wrapped__)
    monkeypatch.setattr(compilation, "compiler_options", probed)
    assert compilation.compiler_options() == {}
    assert jit_for_device(cube)(X) == 4**3 * 3


def test_the_options_are_given_to_jax(monkeypatch):
    given = []
    monkeypatch.setattr(compilation, "compiler_options", lambda **_: {"xla_cpu_option": "1"})
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
    x = np.random.default_rng(0).normal(size=(200, 300)).astype(np.float32)

    def product(x):
        return x.T @ x

    results = [np.asarray(jit_for_device(product)(x)) for _ in range(3)]
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])
    exact = x.astype(np.float64)
    assert_same_numbers(results[0], exact.T @ exact, num_terms=len(x))


@pytest.fixture
def _own_cache():
    """What the test sets of JAX's cache is undone; JAX opens one cache until it is reset."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.mark.usefixtures("_own_cache")
def test_the_cache_has_a_place_and_serves_the_next_start(tmp_path):
    place = tmp_path / "new" / "cache"
    compilation.use_persistent_cache(place)
    # Of these, too, that compile in no time.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    events = []
    jax.monitoring.register_event_listener(
        lambda event, **_: events.append(event.rpartition("/")[2])
    )
    hits = []
    for _ in range(2):
        # Another function with the same program, as after a start.
        jax.jit(lambda x: x * 3 + 0.12345)(np.ones(7, np.float32))
        hits.append(events.count("cache_hits"))
        compilation_cache.reset_cache()
    assert hits == [0, 1]
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


@pytest.mark.skipif(not compilation.compiler_options(), reason="this jaxlib has no such options")
@pytest.mark.parametrize(
    "name",
    ["mlp", *(pytest.param(n, marks=pytest.mark.slow) for n in ("vgg11", "resnet18"))],
)
@pytest.mark.parametrize("penalty", [None, GCPenalty()])
def test_a_training_step_with_the_options_is_the_plain_one(name, penalty):
    # XLA's YNNPACK matmuls are wrong where the right operand is one number broadcast; this would
    # find such a matmul in a step of our networks.
    model, optimizer = build_model(name, 3, width=0.05), optax.sgd(0.1)
    rng = np.random.default_rng(0)
    batch = ImageSplit(
        rng.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8), np.array([0, 1, 2, 0], np.int32)
    )
    step = partial(
        train_step,
        model=model,
        optimizer=optimizer,
        normalization=Normalization((0.5,) * 3, (0.25,) * 3),
        augmentation=Augmentation(),
        l2=1e-3,
        penalty=penalty,
    )
    state = init_state(0, model, optimizer, (32, 32, 3))
    key = jax.random.key(0)
    arguments = (state, batch, key, key, jnp.float32(0.01))
    expected = jax.device_get(jax.jit(step)(*arguments))
    actual = jax.device_get(jit_for_device(step)(*arguments))
    assert_same_numbers(actual, expected, num_terms=2048)
