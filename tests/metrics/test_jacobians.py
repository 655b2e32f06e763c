"""Geometric complexity against closed forms, a float64 oracle and its invariances."""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from gc_nc.metrics import (
    estimate_geometric_complexity,
    geometric_complexity,
    squared_jacobian_norms,
)
from tests.metrics.metric_table import jit
from tests.rounding import assert_same_numbers

Partial = jax.tree_util.Partial

WEIGHT = jnp.array([[1.0, 2.0], [3.0, 4.0]])  # |W|_F^2 = 30


def linear(x, weight=WEIGHT):
    return x.reshape(x.shape[0], -1) @ weight.T


def mlp_weights(dims=(6, 9, 5)):
    rng = np.random.default_rng(0)
    return [rng.normal(size=(n, m)) for m, n in pairwise(dims)]


def mlp(weights, x):
    x = x.reshape(x.shape[0], -1)
    for weight in weights[:-1]:
        x = jnp.tanh(x @ jnp.asarray(weight, x.dtype).T)
    return x @ jnp.asarray(weights[-1], x.dtype).T


def mlp_fn(weights):
    """The network, compiled once for all weights of the same shapes."""
    return Partial(mlp, weights)


def mlp_norms_oracle(weights, x):
    """float64 NumPy: J = W_2 diag(1 - tanh^2) W_1."""
    hidden = np.tanh(x.reshape(len(x), -1) @ weights[0].T)
    jacobians = np.einsum("kh,bh,hd->bkd", weights[1], 1 - hidden**2, weights[0])
    return np.sum(jacobians**2, axis=(1, 2))


def inputs_of(batch, seed=1):
    return np.random.default_rng(seed).normal(size=(batch, 2, 3)).astype(np.float32)


# Exact value.


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("shape", [(2,), (1, 2, 1)])
def test_j4_linear_map_has_its_squared_frobenius_norm(batch, shape):
    inputs = jnp.ones((batch, *shape))
    # Small whole numbers, which float32 adds exactly.
    assert geometric_complexity(Partial(linear), inputs) == 30
    np.testing.assert_array_equal(
        squared_jacobian_norms(Partial(linear), inputs), np.full(batch, 30.0)
    )


def test_equals_a_float64_oracle():
    weights, x = mlp_weights(), inputs_of(7)
    expected = mlp_norms_oracle(weights, x.astype(np.float64))
    assert_same_numbers(squared_jacobian_norms(mlp_fn(weights), x), expected)
    assert_same_numbers(geometric_complexity(mlp_fn(weights), x), expected.mean())


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100, None])
def test_j3_chunks_and_their_remainder_change_nothing(chunk_size):
    weights, x = mlp_weights(), inputs_of(7)
    norms = squared_jacobian_norms(mlp_fn(weights), x, chunk_size=chunk_size)
    assert_same_numbers(norms, mlp_norms_oracle(weights, x))


def test_j3_chunks_of_one_program_and_its_device_loop(monkeypatch):
    weights, x = mlp_weights(), inputs_of(7)

    def norms(x):
        return squared_jacobian_norms(mlp_fn(weights), x, chunk_size=3)

    assert_same_numbers(jax.jit(norms)(x), mlp_norms_oracle(weights, x))
    monkeypatch.setattr("gc_nc.metrics.jacobian_products._MAX_UNROLLED_BLOCKS", 0)
    looped = jax.jit(lambda x: norms(x)).lower(x)
    assert "while" in looped.as_text()
    assert_same_numbers(looped.compile()(x), mlp_norms_oracle(weights, x))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_rows_that_do_not_fill_their_last_block(monkeypatch, wrap):
    monkeypatch.setattr("gc_nc.metrics.jacobian_products.PRODUCTS_PER_BLOCK", 2 * 7)
    weights, x = mlp_weights((6, 9, 5)), inputs_of(7)
    norms = wrap(lambda x: squared_jacobian_norms(mlp_fn(weights), x))(x)
    assert_same_numbers(norms, mlp_norms_oracle(weights, x))


def convolutional_embedding(channels=16):
    rng = np.random.default_rng(0)
    kernels = [
        jnp.asarray(rng.normal(size=(3, 3, a, channels), scale=0.2), jnp.float32)
        for a in (3, channels)
    ]

    def embed(x):
        for kernel in kernels:
            x = nn.relu(
                jax.lax.conv_general_dilated(
                    x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
                )
            )
        return x.mean(axis=(1, 2))

    return embed


def test_j3_peak_memory_follows_the_chunk_not_the_batch():
    embed = convolutional_embedding()

    def temporary_bytes(batch):
        x = jax.ShapeDtypeStruct((batch, 8, 8, 3), jnp.float32)
        lowered = jax.jit(lambda x: geometric_complexity(embed, x, chunk_size=4)).lower(x)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    small, large = temporary_bytes(8), temporary_bytes(64)
    # The inputs, padded and in chunks, are all that may grow.
    input_bytes = 64 * 8 * 8 * 3 * 4
    assert large <= small + 2 * input_bytes
    assert small > input_bytes


def test_j1_batch_norm_with_running_statistics():
    norm = nn.BatchNorm(use_running_average=True, use_bias=False, use_scale=False, epsilon=0.0)
    variables = {"batch_stats": {"mean": jnp.zeros(1), "var": jnp.full(1, 4.0)}}
    embed = Partial(norm.apply, variables)
    norms = squared_jacobian_norms(embed, jnp.array([[-1.0], [1.0]]))
    np.testing.assert_allclose(norms, 0.25, rtol=1e-6)
    # One program: what an example's neighbours are cannot change its last bit.
    changed = squared_jacobian_norms(embed, jnp.array([[-1.0], [50.0]]))
    assert changed[0] == norms[0]


def test_j2_dropout_of_a_deterministic_network():
    dropout = nn.Dropout(0.5, deterministic=True)

    def embed(x):
        return dropout.apply({}, x, rngs={"dropout": jax.random.key(0)})

    assert geometric_complexity(embed, jnp.ones((3, 4))) == 4


def test_j7_integer_inputs_are_cast_once():
    x = np.array([[1, 2], [255, 0]], np.uint8)

    def embed(x):
        return (x[:, :1] - x[:, 1:]) ** 2

    # Whole numbers below 2^24, which float32 holds.
    assert geometric_complexity(embed, x) == (8 + 8 * 255**2) / 2


def test_half_precision_embeddings_are_cast_up():
    x = jnp.ones((2, 2), jnp.bfloat16)
    # The squares sum to 90000, which float16 cannot hold.
    embed = partial(linear, weight=jnp.full((1, 2), 212.0, jnp.float16))
    assert squared_jacobian_norms(embed, x).dtype == jnp.float32
    np.testing.assert_allclose(geometric_complexity(embed, x), 2 * 212.0**2)


def test_s1_gradient_at_a_zero_map_is_zero():
    def gc(weight):
        return geometric_complexity(partial(linear, weight=weight), jnp.ones((3, 4)))

    value, gradient = jit(jax.value_and_grad(gc))(jnp.zeros((3, 4)))
    assert value == 0
    np.testing.assert_array_equal(gradient, np.zeros((3, 4)))


def test_gradient_is_two_w():
    gradient = jax.grad(
        lambda w: geometric_complexity(partial(linear, weight=w), jnp.ones((3, 2)))
    )(WEIGHT)
    np.testing.assert_allclose(gradient, 2 * WEIGHT, rtol=1e-6)


def test_scales_with_the_square_of_the_input_unit():
    weights, x = mlp_weights(), inputs_of(7)
    gc = geometric_complexity(mlp_fn(weights), x)
    stretched = geometric_complexity(lambda u: mlp(weights, 4 * u), x / 4)
    assert_same_numbers(stretched, 16 * gc)


@pytest.mark.parametrize(
    "shape",
    [pytest.param((4, 6), id="columns"), pytest.param((8, 3), id="rows", marks=pytest.mark.slow)],
)
def test_a_matmul_by_a_broadcast_number(shape):
    """XLA's YNNPACK takes what lies behind it in memory, so metrics do not multiply by it."""
    x = np.random.default_rng(0).normal(size=(64, shape[0])).astype(np.float32)

    def embed(x):
        return jnp.tanh(x @ jnp.ones(shape))

    # All entries of J are 1 - tanh^2, also for a basis of the whole space.
    expected = 24 * (1 - np.tanh(x.sum(axis=1, dtype=np.float64)) ** 2) ** 2
    assert_same_numbers(squared_jacobian_norms(embed, x), expected)
    deflated = estimate_geometric_complexity(
        embed, x, jax.random.key(0), method="deflated", num_probes=3 * shape[1]
    )
    assert_same_numbers(deflated.mean, expected.mean())


# Weights.


def test_weights_are_a_mean_over_examples_and_padding_counts_nowhere():
    weights, x = mlp_weights(), inputs_of(7)
    norms = mlp_norms_oracle(weights, x)
    embed, key = mlp_fn(weights), jax.random.key(0)
    w = np.array([1.0, 0.0, 2.0, 0.0, 0.5, 1.5, 0.0], np.float32)
    x[1] = np.nan

    @jit
    def measure(x, w):
        gc, gradient = jax.value_and_grad(lambda x: geometric_complexity(embed, x, weights=w))(x)
        # Rows that are appended do not change what the others draw.
        estimate = estimate_geometric_complexity(embed, x[:5], key, weights=w[:5])
        cut = jnp.where(jnp.arange(7) < 5, w, 0)
        return gc, gradient, estimate, estimate_geometric_complexity(embed, x, key, weights=cut)

    gc, gradient, estimate, padded = measure(x, w)
    assert_same_numbers(gc, np.average(norms, weights=w))
    assert np.isfinite(gradient).all()
    assert_same_numbers(padded, estimate)


def test_a_row_that_counts_stands_in_for_padding():
    def direction(x):  # undefined at 0
        return x / jnp.linalg.norm(x, axis=1, keepdims=True)

    x = np.array([[3.0, 4.0], [0.0, 0.0]], np.float32)

    def gc(s):
        return geometric_complexity(lambda u: s * direction(u), x, weights=np.array([1, 0]))

    # |J|_F^2 = (D - 1) / |x|^2.
    np.testing.assert_allclose(jit(jax.grad(gc))(1.0), 2 / 25, rtol=1e-5)


def test_standard_error_is_over_examples_with_ddof_1_or_by_shares_of_the_weights():
    only = [np.ones((1, 6)), np.ones((1, 1))]  # K = 1: a probe is exact
    embed, x, key = mlp_fn(only), inputs_of(3), jax.random.key(0)
    norms = mlp_norms_oracle(only, x)
    estimate = estimate_geometric_complexity(embed, x, key)
    assert_same_numbers(tuple(estimate), (norms.mean(), norms.std(ddof=1) / np.sqrt(3)))
    weights = np.array([1.0, 2.0, 5.0])
    mean, shares = np.average(norms, weights=weights), weights / weights.sum()
    squares = np.sum(shares**2)
    unbiased = 1 - (2 * np.sum(shares**3) - squares**2) / squares
    variance = np.sum(shares**2 * (norms - mean) ** 2) / unbiased
    estimate = estimate_geometric_complexity(embed, x, key, weights=weights)
    assert_same_numbers(tuple(estimate), (mean, np.sqrt(variance)))
    for weight in (0.1, 0.3, 0.7):
        one = estimate_geometric_complexity(embed, x, key, weights=np.array([0.0, weight, 0.0]))
        assert np.isnan(one.sem)
    one = estimate_geometric_complexity(embed, x[:1], key)
    assert np.isnan(one.sem)
    assert_same_numbers(one.mean, norms[0])


def test_64_bit_integers_do_not_wrap():
    x = np.array([[2**40], [1]], np.int64)
    squared = jax.tree_util.Partial(lambda x: x**2 / 2)
    np.testing.assert_allclose(squared_jacobian_norms(squared, x), [2.0**80, 1], rtol=1e-6)


def test_all_zero_weights():
    with pytest.raises(ValueError, match="all weights are 0"):
        geometric_complexity(linear, jnp.ones((2, 2)), weights=np.zeros(2))
    under_jit = jax.jit(lambda w: geometric_complexity(linear, jnp.ones((2, 2)), weights=w))
    assert np.isnan(under_jit(jnp.zeros(2)))


# Estimate.


def test_output_probes_are_exact_for_orthogonal_rows():
    # J J^T diagonal: no variance over probes, so probes, mean and exact value coincide. Whole
    # numbers, which float32 adds exactly.
    embed = Partial(linear, weight=jnp.diag(jnp.array([1.0, 2.0, 3.0])))
    estimate = estimate_geometric_complexity(embed, jnp.ones((4, 3)), jax.random.key(0))
    assert tuple(estimate) == (14, 0)


@pytest.mark.parametrize(("num_probes", "wrap"), [(1, lambda f: f), (3, jax.jit)])
def test_output_probes_mean_and_error_are_those_of_the_theory(num_probes, wrap):
    count = 4000
    x = jnp.ones((count, 2))
    estimate = wrap(
        lambda key: estimate_geometric_complexity(
            Partial(linear), x, key, num_probes=num_probes, chunk_size=count
        )
    )(jax.random.key(0))
    gram = np.asarray(WEIGHT @ WEIGHT.T, np.float64)
    variance = 2 * (np.sum(gram**2) - np.sum(np.diag(gram) ** 2)) / num_probes
    np.testing.assert_allclose(estimate.sem, np.sqrt(variance / count), rtol=0.05)
    assert abs(estimate.mean - 30) < 4 * estimate.sem


def test_probes_differ_between_keys():
    @jit
    def estimates(seeds):
        def of_seed(seed):
            return estimate_geometric_complexity(
                linear, jnp.ones((1, 2)), jax.random.key(seed)
            ).mean

        return jax.vmap(of_seed)(seeds)

    assert len(set(np.asarray(estimates(jnp.arange(20))).tolist())) == 2  # 30 +- 22


def test_tf32_is_never_used():
    jaxpr = str(jax.make_jaxpr(lambda x: geometric_complexity(linear, x))(jnp.ones((2, 2))))
    assert "HIGHEST" in jaxpr
    assert "precision=None" not in jaxpr


# Bad input.


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: geometric_complexity(linear, jnp.ones((0, 2))), "no example"),
        (lambda: jax.jit(partial(geometric_complexity, linear))(jnp.ones((0, 2))), "no example"),
        (lambda: squared_jacobian_norms(lambda x: x.sum(), jnp.ones((2, 2))), r"\(B, K\)"),
        (lambda: squared_jacobian_norms(lambda x: x[:1], jnp.ones((2, 2))), r"\(2, K\)"),
        (
            lambda: squared_jacobian_norms(lambda x: (x[:, 0], x, None), jnp.ones((2, 2))),
            r"take the embedding among its elements \[1\] of shape \(2, 2\), as in: .*\(x\)\[i\]",
        ),
        (
            lambda: squared_jacobian_norms(lambda x: {"z": x, "y": x[:, :1]}, jnp.ones((2, 2))),
            r"elements \['y'\] of shape \(2, 1\) or \['z'\] of shape \(2, 2\), as in",
        ),
        (lambda: squared_jacobian_norms(lambda x: [x.sum()], jnp.ones((2, 2))), "return the embed"),
        (lambda: squared_jacobian_norms(linear, jnp.ones((2, 2)), chunk_size=0), "chunk_size=0"),
        (
            lambda: geometric_complexity(linear, jnp.ones((2, 2)), weights=np.ones(3)),
            r"weights of shape \(3,\) for 2",
        ),
        (
            lambda: geometric_complexity(linear, jnp.ones((2, 2)), weights=np.array([1.0, -1.0])),
            "weight=-1",
        ),
        (
            lambda: geometric_complexity(linear, jnp.ones((2, 2)), weights=np.array([1, np.nan])),
            "weight=nan",
        ),
        (lambda: squared_jacobian_norms(linear, jnp.ones((2, 2), complex)), "are complex64"),
        (
            lambda: estimate_geometric_complexity(
                linear, jnp.ones((2, 2)), jax.random.key(0), method="magic"
            ),
            "method='magic' is not one of output_probes",
        ),
        (
            lambda: estimate_geometric_complexity(
                linear, jnp.ones((2, 2)), jax.random.key(0), num_probes=0
            ),
            "num_probes=0",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    # A mismatch of two arguments' lengths is caught by the tests' shape checks before our own.
    message = None if "weights of shape" in message else message
    with pytest.raises((ValueError, TypeError), match=message):
        call()
