"""Examples that mix, and random numbers drawn anew, are noticed; ordinary networks are not."""

import functools
import itertools
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gc_nc import metrics, transfer

X = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
W = np.random.default_rng(1).normal(size=(8, 16)).astype(np.float32)
KEY = jax.random.key(0)


class Net(nn.Module):
    dtype: object = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(16, dtype=self.dtype)(x)
        x = nn.BatchNorm(use_running_average=not train, dtype=self.dtype)(x)
        return nn.relu(x)


def batch_norm(dtype, train):
    model = Net(dtype)

    @functools.cache
    def variables():
        # Not while tests are collected: that takes a second.
        return jax.jit(model.init, static_argnums=2)(KEY, X, False)

    def embed(x):
        with jax.ensure_compile_time_eval():
            fixed = variables()
        return model.apply(fixed, x, train, mutable=["batch_stats"])[0]

    return embed


def warnings_of(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", metrics.ImpureEmbeddingWarning)
        call()
    assert all(w.filename == __file__ for w in caught)
    return [str(w.message) for w in caught]


def probes(embed_fn, x=X, **options):
    return metrics.estimate_squared_jacobian_norms(embed_fn, x, KEY, **options)


MIXING = {
    "BatchNorm": batch_norm(jnp.float32, True),
    "BatchNorm in bfloat16": batch_norm(jnp.bfloat16, True),
    "centred": lambda x: x - jnp.mean(x, axis=0, keepdims=True),
    "far from 0": lambda x: 1e4 + x - jnp.mean(x, axis=0, keepdims=True),
    "over the largest": lambda x: x / jnp.max(jnp.abs(x)),
    "softmax over the wrong axis": lambda x: jax.nn.softmax(x, axis=0),
    "the first": lambda x: x - x[:1],
    "the last": lambda x: x - x[-1:],
    "one in the middle": lambda x: x - x[7:8],
    "the odd ones with their neighbours": lambda x: x.at[1::2].add(x[::2]),
    "its neighbour": lambda x: x + jnp.roll(x, 1, axis=0),
    "those before": lambda x: jnp.cumsum(x, axis=0),
    "attention": lambda x: jax.nn.softmax(x @ x.T, axis=1) @ x,
}


#: One of each kind quickly: a statistic, a place in the batch, a half of it, all pairs.
QUICK = ("BatchNorm", "the last", "the odd ones with their neighbours", "attention")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in MIXING],
)
def test_examples_that_mix_are_warned_of(name):
    (message,) = warnings_of(lambda: probes(MIXING[name]))
    assert message.startswith("examples mix")
    assert "evaluation mode" in message


@pytest.mark.slow
def test_e8_every_metric_of_a_jacobian_looks():
    embed = batch_norm(jnp.float32, True)
    for call in (
        lambda: metrics.geometric_complexity(embed, X),
        lambda: metrics.squared_jacobian_norms(embed, X, chunk_size=64),
        lambda: metrics.squared_jacobian_norms(embed, X[:2]),
        lambda: metrics.estimate_geometric_complexity(embed, X, KEY),
        lambda: probes(embed, method="deflated", num_probes=4),
        lambda: probes(embed, chunk_size=1),
        lambda: probes(embed, X[:5]),
    ):
        assert len(warnings_of(call)) == 1, call
    assert warnings_of(
        lambda: metrics.geometric_complexity_to_error(embed, np.tile(X, (2, 1)), KEY)
    )


@pytest.mark.slow
def test_fine_tuning_looks():
    model = Net()
    variables = model.init(KEY, X, False)

    def embed(train, params, x):
        stats = {"batch_stats": variables["batch_stats"], "params": params}
        return model.apply(stats, x, train, mutable=["batch_stats"])[0]

    def tune(train):
        return transfer.fine_tune_predictions(
            lambda params, x: embed(train, params, x),
            variables["params"],
            X.reshape(2, 32, 8),
            X,
            num_steps=0,
            learning_rate=0.1,
        )

    assert len(warnings_of(lambda: tune(True))) == 1
    assert not warnings_of(lambda: tune(False))


_numbers = itertools.count(1)
_keys = iter([*jax.random.split(KEY, 100)])
DRAWING = {
    "NumPy": lambda x: x * np.random.default_rng().normal(),
    "a mask of NumPy's": lambda x: (
        x * np.random.default_rng().normal(size=(1, 8)).astype("float32")
    ),
    "keys that are used up": lambda x: x * jax.random.bernoulli(next(_keys), 0.5, x.shape),
    "a count": lambda x: x * next(_numbers),
    "a callback": lambda x: (
        x
        * jax.pure_callback(lambda: np.float32(next(_numbers)), jax.ShapeDtypeStruct((), "float32"))
    ),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if i == 0 else pytest.mark.slow)
        for i, name in enumerate(DRAWING)
    ],
)
def test_random_numbers_drawn_anew_are_warned_of(name):
    embed = DRAWING[name]
    if name == "a callback":
        # It has no derivative.
        embed = lambda x: jax.lax.stop_gradient(DRAWING[name](jax.lax.stop_gradient(x))) + x  # noqa: E731
    (message,) = warnings_of(lambda: probes(embed))
    assert message.startswith("embed_fn draws new random numbers")


ORDINARY = {
    "linear": lambda x: x @ W,
    "far from 0": lambda x: x @ W + 1e6,
    "BatchNorm": batch_norm(jnp.float32, False),
    "BatchNorm in bfloat16": batch_norm(jnp.bfloat16, False),
    "BatchNorm in float16": batch_norm(jnp.float16, False),
    "bfloat16": lambda x: jnp.tanh(x.astype(jnp.bfloat16) @ W.astype(jnp.bfloat16)),
    "LayerNorm": lambda x: (x - x.mean(axis=1, keepdims=True)) / x.std(axis=1, keepdims=True),
    "dropout with a key of its own": lambda x: x * jax.random.bernoulli(KEY, 0.5, x.shape),
    "NaN for some": jnp.log,
    "NaN": lambda x: x * jnp.nan,
    "infinite": lambda x: x * jnp.inf,
    "constant": lambda x: 0 * x,
    "compiled": jax.jit(lambda x: jnp.tanh(x @ W)),
    "a table of embeddings": lambda x: x @ jnp.take(W, jnp.arange(8), axis=0),
}


#: The others are slow.
TYPICAL = (
    "linear",
    "BatchNorm",
    "BatchNorm in bfloat16",
    "LayerNorm",
    "NaN for some",
    "a table of embeddings",
)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in TYPICAL else pytest.mark.slow) for name in ORDINARY],
)
def test_ordinary_networks_are_not(name):
    # Warnings are errors.
    probes(ORDINARY[name])


@pytest.mark.parametrize("x", [0 * X, np.ones_like(X), X[:1], X[:2], 1e37 * X, 1e-37 * X])
def test_odd_inputs_of_an_ordinary_network(x):
    probes(ORDINARY["linear"], x)


def test_rows_that_do_not_count_may_hold_anything():
    x, weights = X.copy(), np.ones(64)
    x[3], weights[3] = np.nan, 0
    metrics.geometric_complexity(jax.tree_util.Partial(jnp.sin), x, weights=weights)


def test_it_is_switched_off_and_silent_under_jit():
    embed = MIXING["centred"]
    with metrics.examples_may_mix():
        assert not warnings_of(lambda: probes(embed))
    assert not warnings_of(lambda: metrics.examples_may_mix()(probes)(embed))
    assert not warnings_of(lambda: jax.jit(lambda x: probes(embed, x))(X))
    assert not warnings_of(lambda: jax.grad(lambda x: jnp.sum(probes(embed, x)))(X))
    assert len(warnings_of(lambda: probes(embed))) == 1


def test_a_program_is_looked_at_once(monkeypatch):
    from gc_nc.metrics import mixing_check

    looks = []
    look = mixing_check.MixingCheck._look
    monkeypatch.setattr(
        mixing_check.MixingCheck, "_look", lambda *given: looks.append(1) or look(*given)
    )

    def embed(scale, x):
        return scale * x

    def mixing(scale, x):
        return scale * (x - jnp.mean(x, axis=0, keepdims=True))

    for scale in (1.0, 2.0, 3.0):
        probes(jax.tree_util.Partial(embed, jnp.float32(scale)))
    assert len(looks) == 1
    # Of another shape, another program.
    probes(jax.tree_util.Partial(embed, jnp.float32(1)), X[:9])
    assert len(looks) == 2
    # A key among the leaves is as good as any.
    drop = jax.tree_util.Partial(lambda key, x: x * jax.random.bernoulli(key, 0.5, x.shape), KEY)
    probes(drop)
    probes(drop)
    assert len(looks) == 3
    # What was found is said again, to whoever calls next.
    for scale in (1.0, 2.0):
        bad = jax.tree_util.Partial(mixing, jnp.float32(scale))
        assert len(warnings_of(lambda bad=bad: probes(bad))) == 1
    assert len(looks) == 4


def test_it_compiles_nothing(compilations):
    def count(embed):
        before = len(compilations)
        probes(embed)
        return len(compilations) - before

    probes(jnp.tanh)
    with metrics.examples_may_mix():
        without = count(jnp.sin)
    assert count(jnp.cos) == without == 1


def test_it_can_be_filtered():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", metrics.ImpureEmbeddingWarning)
        probes(MIXING["centred"])
    assert issubclass(metrics.ImpureEmbeddingWarning, UserWarning)
