"""Functions that compute the same share a compiled program, and no answer is stale."""

import dataclasses
import functools
import gc
import types
import weakref
from collections import namedtuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gc_nc import metrics
from gc_nc.metrics import geometric_complexity
from gc_nc.metrics.jacobian_products import compiled_blocks
from gc_nc.metrics.shared_programs import MOST_PROGRAMS, SharedFunction, compiled
from tests.rounding import assert_same_numbers

Partial = jax.tree_util.Partial
Pair = namedtuple("Pair", "module other")
SCALE, LINEAR = 3.0, nnx.Linear(1, 1, use_bias=False, rngs=nnx.Rngs(0))
X, W = np.ones((3, 2), np.float32), np.array([[1.0, 2], [3, 4]], np.float32)
KEY = jax.random.key(0)


def set_linear(value):
    LINEAR.kernel[...] = jnp.full((1, 1), value)


@dataclasses.dataclass(frozen=True)
class Holder:
    module: object

    def __call__(self, x):
        return self.module(x)


def scaled_by_global(x):
    return SCALE * x


def twice_removed(x):
    return scaled_by_global(x)


def with_attribute(module):
    def function(x):
        return function.module(x)

    function.module = module
    return function


def closure_over(held):
    return lambda x: held[0](x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LINEAR,
        lambda: lambda x: LINEAR(x),
        lambda: closure_over((LINEAR,)),
        lambda: closure_over(Pair(LINEAR, 1)),
        lambda: closure_over([LINEAR]),
        lambda: (lambda held: lambda x: next(iter(held))(x))(frozenset([LINEAR])),
        lambda: Holder(LINEAR),
        lambda: LINEAR.__call__,
        lambda: functools.partial(lambda m, x: m(x), LINEAR),
        lambda: types.MethodType(lambda self, x: self(x), LINEAR),
        lambda: jax.vmap(LINEAR),
        lambda: jax.jit(lambda x: LINEAR(x)),
        lambda: functools.wraps(jnp.tanh)(lambda x: LINEAR(x)),
        lambda: with_attribute(LINEAR),
    ],
)
@pytest.mark.parametrize("wrap", [lambda f: f, Partial])
def test_a_module_updated_in_place_is_measured_anew_by_the_same_program(make, wrap, compilations):
    set_linear(3.0)
    assert_same_numbers(geometric_complexity(wrap(make()), X[:, :1]), 9.0)
    before = len(compilations)
    set_linear(2.0)
    assert_same_numbers(geometric_complexity(wrap(make()), X[:, :1]), 4.0)
    assert len(compilations) == before


@pytest.mark.parametrize("function", [scaled_by_global, twice_removed])
@pytest.mark.parametrize("wrap", [lambda f: f, Partial])
def test_a_changed_global_is_seen(function, wrap, monkeypatch):
    for value in (3.0, 1.0):
        monkeypatch.setitem(function.__globals__, "SCALE", value)
        assert geometric_complexity(wrap(function), X) == 2 * value**2


def test_a_closure_or_a_default_that_changed_is_seen():
    scale = 1.0
    scales = [1.0]

    def closure(x):
        return scale * x

    def default(x, held=scales):
        return held[0] * x

    fns = [closure, default, functools.partial(lambda held, x: held[0] * x, scales)]
    for value in (1.0, 3.0):
        scale = scales[0] = value
        for fn in fns:
            assert geometric_complexity(fn, X) == 2 * value**2
            assert geometric_complexity(Partial(fn), X) == 2 * value**2


def test_a_function_that_holds_itself():
    def embed(x, depth=1):
        return embed(3 * x, depth - 1) if depth else x

    assert geometric_complexity(embed, X) == 18


def linen(w):
    model = nn.Dense(2, use_bias=False)
    return lambda x: model.apply({"params": {"kernel": w}}, x)


def nested(w):
    inner = jax.jit(lambda x: x @ w)
    return jax.jit(lambda x: jax.jit(lambda y: inner(y) * 1)(x))


def scanned(w):
    return lambda x: jax.lax.scan(lambda h, _: (h @ w, None), x, length=1)[0]


def with_a_rule(w):
    function = jax.custom_jvp(lambda x: x @ w)
    function.defjvp(lambda primals, tangents: (function(*primals), tangents[0] @ w))
    return function


@pytest.mark.parametrize(
    "make",
    [
        lambda w: lambda x: x @ w,
        lambda w: Partial(lambda w, x: x @ w, w),
        lambda w: jax.jit(lambda x: x @ w),
        lambda w: jax.checkpoint(lambda x: x @ w),
        lambda w: jax.vmap(lambda x: x @ w),
        lambda w: lambda x: jax.nn.relu(x @ w),
        lambda w: lambda x: jax.lax.cond(jnp.sum(x) > 0, lambda: x @ w, lambda: x),
        nested,
        linen,
        scanned,
        with_a_rule,
    ],
)
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_other_weights_are_other_arguments_of_one_program(make, kind, compilations):
    np.testing.assert_allclose(geometric_complexity(make(kind(W)), X), 30, rtol=1e-6)
    before = len(compilations)
    values = [geometric_complexity(make(kind(s * W)), X) for s in (2, 3)]
    np.testing.assert_allclose(values, [120, 270], rtol=1e-6)
    assert len(compilations) == before


class OfNNX(nnx.Module):
    def __init__(self):
        self.hidden = nnx.Linear(2, 8, rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(8, rngs=nnx.Rngs(0))

    def embed(self, x):
        return nnx.relu(self.norm(self.hidden(x)))


def nnx_models():
    model = OfNNX()
    model.eval()
    while True:
        yield model
        model.hidden.kernel[...] *= 2


def nnx_partials():
    """What was once needed to compile once; GraphDef holds lists, which have no value."""
    for model in nnx_models():
        graph, state = nnx.split(model)
        yield Partial(lambda state, x, graph=graph: nnx.merge(graph, state).embed(x), state)


def equinox_models():
    layer = eqx.nn.Linear(2, 8, key=KEY)
    while True:
        yield eqx.nn.inference_mode(eqx.nn.Sequential([layer, eqx.nn.Dropout(0.5)]))
        layer = eqx.tree_at(lambda layer: layer.weight, layer, 2 * layer.weight)


@pytest.mark.parametrize(
    "embeddings",
    [
        lambda: (model.embed for model in nnx_models()),
        lambda: (lambda x, model=model: model.embed(x) for model in nnx_models()),
        nnx_partials,
        lambda: (jax.vmap(model) for model in equinox_models()),
    ],
    ids=["nnx", "nnx in a lambda", "nnx in a Partial", "equinox"],
)
def test_what_the_docs_do_compiles_once(embeddings, compilations):
    """The recipes of docs/other_libraries.md, with weights that double from call to call."""
    embeddings, x = embeddings(), jax.random.normal(KEY, (5, 2))
    values, counts = [], []
    # The second time the weights are doubled, whose program is not ours.
    for _ in range(3):
        embed = next(embeddings)
        values.append(geometric_complexity(embed, x))
        metrics.estimate_geometric_complexity(embed, x, KEY)
        counts.append(len(compilations))
    assert counts[1] == counts[2]
    assert values[0] < values[1] < values[2]


@pytest.mark.slow
def test_flatness_and_fine_tuning_share_programs_too(compilations):
    from gc_nc import transfer

    def calls(scale):
        w = scale * W

        def loss(params):
            return jnp.sum((w @ params["w"]) ** 2)

        params = {"w": jnp.ones((2, 2))}
        metrics.hessian_trace(loss, params, KEY, num_probes=2)
        metrics.hessian_top_eigenvalue(loss, params, KEY, num_iterations=2)
        transfer.fine_tune_predictions(
            lambda p, x: x @ (w @ p["w"]),
            params,
            X[:2, None] * W[:, None],
            X,
            num_steps=2,
            learning_rate=0.1,
        )
        return metrics.squared_gradient_norm(loss, params)

    first = calls(1)
    before = len(compilations)
    assert_same_numbers(calls(2), 16 * first)
    assert len(compilations) == before


def test_the_function_is_traced_once_a_call():
    runs = []

    def embed(x):
        runs.append(x.shape)
        return jnp.sin(x @ jnp.ones((2, 300)))

    x = np.ones((70, 2), np.float32)
    for call in (
        lambda: metrics.squared_jacobian_norms(embed, x, chunk_size=30),
        lambda: metrics.squared_jacobian_norms(embed, x, chunk_size=30, skip_inactive=True),
        lambda: metrics.estimate_geometric_complexity(embed, x, KEY, num_probes=20),
    ):
        call()  # looks whether examples mix, for which it traces twice more
        runs.clear()
        call()
        assert len(runs) == 1
    metrics.geometric_complexity_to_error(embed, x, KEY, relative_error=0.5)
    runs.clear()
    metrics.geometric_complexity_to_error(embed, x, KEY, relative_error=0.5)
    assert len(runs) == len(set(runs)), "once for each shape"


def rule(slope, kind):
    """The identity, differentiated as slope * x."""
    if kind == "jvp":
        function = jax.custom_jvp(lambda x: x)
        function.defjvp(lambda primals, tangents: (primals[0], slope * tangents[0]))
    else:
        function = jax.custom_vjp(lambda x: x)
        function.defvjp(lambda x: (x, None), lambda _, g: (slope * g,))
    return function


@pytest.mark.parametrize("kind", ["jvp", "vjp"])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_other_rules_of_differentiation_are_another_program(kind, wrap):
    for slope in (1.0, 3.0):
        for value in (slope, jnp.float32(slope)):
            assert geometric_complexity(wrap(rule(value, kind)), X) == 2 * slope**2


def test_what_is_written_into_a_program_is_compared_by_its_bits():
    tables = [np.where(np.arange(3000) == 2999, last, 0).astype(np.float32) for last in (1, 2)]

    def layer(table):
        # Inside a scan the constants of jit are part of the program, however large.
        inner = jax.jit(lambda x: x * table[2999] + jnp.sum(table))
        return lambda x: jax.lax.scan(lambda h, _: (inner(h), None), x, length=1)[0]

    for table in tables:
        held = jnp.asarray(table)
        assert geometric_complexity(layer(held), X) == 2 * table[2999] ** 2
    for one, other in ((0.0, -0.0), (1, 1.0), (1, True)):
        ones, others = (
            SharedFunction(lambda x, v=v: jnp.where(x > 0, v, x)).program(X) for v in (one, other)
        )
        assert ones != others
    assert SharedFunction(lambda x: x + 1).program(X) == SharedFunction(lambda x: x + 1).program(X)


def test_callbacks_are_told_apart_by_the_function_on_the_host():
    def scaled(scale):
        def on_host(x):
            return np.asarray(scale * x)

        def embed(x):
            shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
            constant = jax.pure_callback(on_host, shape, jax.lax.stop_gradient(x))
            return jax.lax.stop_gradient(constant) * x

        return embed

    for scale in (1.0, 3.0):
        assert geometric_complexity(scaled(scale), X) == 2 * scale**2


@pytest.mark.slow
def test_keys_half_precision_and_64_bits_as_constants():
    def drop(key):
        return lambda x: x * jax.random.bernoulli(key, 0.5, (1, 2))

    keys = jax.random.split(KEY, 4)
    for key in keys:
        expected = jnp.sum(jax.random.bernoulli(key, 0.5, (1, 2)))
        assert geometric_complexity(drop(key), X) == expected
    for dtype in (np.float16, jnp.bfloat16, np.float64, np.int32):
        for scale in (1, 2):
            w = (scale * W).astype(dtype)
            assert geometric_complexity(lambda x, w=w: x @ w, X) == 30 * scale**2
    with jax.enable_x64(True):
        for scale in (1, 2):
            w = jnp.asarray(scale * W, jnp.float64)
            assert geometric_complexity(lambda x, w=w: x @ w, X) == 30 * scale**2


@pytest.mark.slow
def test_weights_on_many_devices():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    along = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    for scale in (1.0, 2.0):
        w = jax.device_put(scale * np.ones((8, 2), np.float32), along)
        assert geometric_complexity(lambda x, w=w: x @ w, np.ones((3, 8))) == 16 * scale**2


@pytest.mark.slow
def test_it_differentiates_by_what_it_closes_over():
    def of(w, slope=1.0):
        return geometric_complexity(jax.jit(lambda x: rule(slope, "jvp")(w * x)), X)

    # |J|^2 = 2 (slope w)^2, and by the rule dw/dx is slope times dx.
    assert of(2.0, 3.0) == 72
    for slope in (1.0, 3.0):
        assert_same_numbers(jax.grad(of)(2.0, slope), 8 * slope**2)
    assert_same_numbers(jax.vmap(of)(jnp.array([1.0, 3])), np.array([2.0, 18]))


def test_a_program_is_not_shared_where_it_is_differentiated_once_more():
    """Two functions whose first derivatives are the same program, and whose second are not."""

    def embed(slope):
        inner = rule(slope, "jvp")
        function = jax.custom_jvp(lambda x: x**2 / 2)
        function.defjvp(lambda xs, dxs: (xs[0] ** 2 / 2, inner(xs[0]) * dxs[0]))
        return function

    for slope in (1.0, 3.0):
        of = functools.partial(geometric_complexity, embed(slope))
        assert of(X) == 2
        gradient = jax.grad(of)(X)
        assert_same_numbers(gradient, 2 * slope * X / 3)


@pytest.mark.slow
def test_settings_are_another_program():
    def embed(x):
        return x @ W

    assert geometric_complexity(embed, X) == 30
    for context in (jax.disable_jit, lambda: jax.default_matmul_precision("bfloat16")):
        with context():
            assert geometric_complexity(embed, X) == 30
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        geometric_complexity(lambda x: x @ W / (x[:, :1] - 1), X)


def test_programs_are_bounded_and_hold_no_weights():
    for programs in (compiled, compiled_blocks):
        assert programs.cache_info().maxsize == MOST_PROGRAMS
    weights = jnp.asarray(W) + 1
    held = weakref.ref(weights)
    geometric_complexity(lambda x: jax.nn.relu(x @ weights), X)  # noqa: F821 - deleted below
    geometric_complexity(jax.jit(lambda x: x @ weights), X)  # noqa: F821
    del weights
    gc.collect()
    assert held() is None
