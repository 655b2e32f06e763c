"""The six estimators: closed forms, bias and coverage, and their errors."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gc_nc.metrics import (
    ESTIMATION_METHODS,
    estimate_geometric_complexity,
    estimate_squared_jacobian_norms,
    squared_jacobian_norms,
)
from gc_nc.metrics.weighted_means import weighted_mean
from tests.metrics.metric_table import jit
from tests.rounding import assert_same_numbers

WEIGHT = jnp.array([[1.0, 2.0], [3.0, 4.0]])  # |W|_F^2 = 30


def linear(weight, x):
    return x.reshape(x.shape[0], -1) @ weight.T


def collapsed_weights(inputs=6, hidden=16, outputs=12):
    """A ReLU network whose Jacobian has a few dominant directions."""
    rng = np.random.default_rng(0)
    decay = 0.5 ** np.arange(outputs)
    first = rng.normal(size=(hidden, inputs)).astype(np.float32)
    rotation, _ = np.linalg.qr(rng.normal(size=(outputs, outputs)))
    second = rotation @ (decay[:, None] * rng.normal(size=(outputs, hidden)))
    return jnp.asarray(first), jnp.asarray(second, jnp.float32)


def network(weights, x):
    first, second = weights
    return jax.nn.relu(x.reshape(x.shape[0], -1) @ first.T) @ second.T


def inputs_of(batch, seed=1):
    return np.random.default_rng(seed).normal(size=(batch, 2, 3)).astype(np.float32)


def norms_oracle(weights, x):
    first, second = (np.asarray(w, np.float64) for w in weights)
    slopes = x.reshape(len(x), -1).astype(np.float64) @ first.T > 0
    jacobians = np.einsum("kh,bh,hd->bkd", second, slopes, first)
    return np.sum(jacobians**2, axis=(1, 2))


@pytest.mark.parametrize(("method", "num_probes"), [("output_dims", 12), ("input_dims", 6)])
def test_all_dimensions_are_exact(method, num_probes):
    # Drawn without replacement: any other draw would miss some and count others twice.
    weights, x = collapsed_weights(), inputs_of(7)
    estimates = estimate_squared_jacobian_norms(
        jax.tree_util.Partial(network, weights),
        x,
        jax.random.key(0),
        method=method,
        num_probes=num_probes,
    )
    assert_same_numbers(estimates, norms_oracle(weights, x))


def test_deflation_by_as_many_products_as_the_rank_is_exact():
    rank_two = jnp.asarray(np.random.default_rng(0).normal(size=(9, 2)) @ np.eye(2, 5), jnp.float32)
    measure = partial(estimate_squared_jacobian_norms, partial(linear, rank_two), method="deflated")
    # Just enough, more, and more than there are dimensions.
    estimates = jit(
        lambda x, key: [measure(x, key, num_probes=num_probes) for num_probes in (6, 9, 40)]
    )(jnp.ones((4, 5)), jax.random.key(0))
    assert_same_numbers(estimates, [np.full(4, np.sum(rank_two**2))] * 3)


def test_deflation_of_a_zero_map_is_zero_with_a_finite_gradient():
    def estimate(weight):
        return estimate_geometric_complexity(
            partial(linear, weight),
            jnp.ones((3, 4)),
            jax.random.key(0),
            method="deflated",
            num_probes=6,
        ).mean

    value, gradient = jit(jax.value_and_grad(estimate))(jnp.zeros((3, 4)))
    assert value == 0
    np.testing.assert_array_equal(gradient, np.zeros((3, 4)))


@functools.cache
def standardized_errors():
    """By method, (estimate - exact) / standard error of 100 random subsets of a large set."""
    weights, x = collapsed_weights(), inputs_of(4000)
    exact = norms_oracle(weights, x).mean()

    @jit
    def estimate(subset, key):
        measure = partial(
            estimate_geometric_complexity, partial(network, weights), subset, key, num_probes=4
        )
        return {method: measure(method=method, chunk_size=400) for method in ESTIMATION_METHODS}

    rng = np.random.default_rng(0)
    errors = {method: [] for method in ESTIMATION_METHODS}
    for trial in range(100):
        subset = x[rng.choice(len(x), 400, replace=False)]
        for method, (mean, sem) in estimate(subset, jax.random.key(trial)).items():
            errors[method].append(float((mean - exact) / sem))
    return errors


@pytest.mark.parametrize("method", ESTIMATION_METHODS)
def test_unbiased_with_intervals_that_cover(method):
    z = standardized_errors()[method]
    assert np.max(np.abs(z[:3])) < 4
    # A bias of 0.4 standard errors would show.
    assert abs(np.mean(z)) < 4 / np.sqrt(100)
    assert 90 <= np.sum(np.abs(z) < 1.96) <= 99


#: Of W above: K or D times a row's or column's squared norm, K D times an entry's square.
VARIANCES = {
    "output_dims": np.var([2 * 5.0, 2 * 25.0]),
    "input_dims": np.var([2 * 10.0, 2 * 20.0]),
    "jacobian_entries": np.var([4 * 1.0, 4 * 4.0, 4 * 9.0, 4 * 16.0]),
    "output_probes": 2 * 2 * 11.0**2,
    "input_probes": 2 * 2 * 14.0**2,
}


@functools.cache
def estimates_of_one_map():
    """By method, of 4000 examples that differ in what they draw alone."""

    def measure(key):
        measured = partial(
            estimate_squared_jacobian_norms, partial(linear, WEIGHT), jnp.ones((4000, 2)), key
        )
        return {method: measured(method=method, chunk_size=4000) for method in VARIANCES}

    return jit(measure)(jax.random.key(0))


@pytest.mark.parametrize("method", VARIANCES)
def test_variance_is_that_of_the_theory(method):
    estimates, variance = estimates_of_one_map()[method], VARIANCES[method]
    np.testing.assert_allclose(np.mean(estimates), 30, atol=4 * np.sqrt(variance / 4000))
    np.testing.assert_allclose(np.var(estimates), variance, rtol=0.1)


@functools.cache
def whole_and_in_chunks():
    """By method, estimates of 7 examples at once and by 3, in one program."""
    weights, x = collapsed_weights(), inputs_of(7)

    def measure(key, x):
        return {
            method: [
                estimate_squared_jacobian_norms(
                    partial(network, weights),
                    x,
                    key,
                    method=method,
                    num_probes=5,
                    chunk_size=chunk_size,
                )
                for chunk_size in (None, 3)
            ]
            for method in ESTIMATION_METHODS
        }

    return jit(measure)(jax.random.key(3), x)


@pytest.mark.parametrize("method", ESTIMATION_METHODS)
def test_chunks_change_nothing(method):
    whole, in_chunks = whole_and_in_chunks()[method]
    assert_same_numbers(in_chunks, whole)
    # Examples draw independently, and none is another's copy.
    assert len(set(np.asarray(whole).round(3).tolist())) == 7


def test_outside_of_jit_chunks_are_the_same():
    estimates = estimate_squared_jacobian_norms(
        jax.tree_util.Partial(network, collapsed_weights()),
        inputs_of(7),
        jax.random.key(3),
        method="deflated",
        num_probes=5,
        chunk_size=3,
    )
    assert_same_numbers(estimates, whole_and_in_chunks()["deflated"][0])


def test_forward_mode_of_a_wide_embedding_equals_reverse_mode():
    weights, x = collapsed_weights(outputs=40), inputs_of(9)
    embed = partial(network, weights)
    text = str(jax.make_jaxpr(lambda x: squared_jacobian_norms(embed, x))(x))
    assert "transpose" not in text or "9,6,40" in text or "6,9,40" in text
    assert_same_numbers(squared_jacobian_norms(embed, x), norms_oracle(weights, x))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"method": "magic"}, "method='magic' is not one of output_probes, input_probes"),
        ({"num_probes": 0}, "num_probes=0"),
        ({"method": "output_dims", "num_probes": 3}, "there are only 2 dimensions"),
        ({"method": "input_dims", "num_probes": 3}, "there are only 2 dimensions"),
        ({"chunk_size": 0}, "chunk_size=0"),
    ],
)
def test_bad_input_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        estimate_geometric_complexity(
            partial(linear, WEIGHT), jnp.ones((2, 2)), jax.random.key(0), **kwargs
        )


@pytest.mark.slow
def test_weights_that_go_with_spread():
    """A tenth of the examples, of weight 9, carry all of it."""
    heavy = np.arange(500) % 10 == 0
    weights = jnp.asarray(np.where(heavy, 9, 1), jnp.float32)
    draws = np.random.default_rng(0).normal(size=(4000, 500)).astype(np.float32) * heavy
    means, sems = jax.vmap(partial(weighted_mean, weights=weights))(draws)
    # Relative error of a variance of 4,000 draws: sqrt(2 / 4000).
    np.testing.assert_allclose(np.mean(sems**2), np.var(means), rtol=4 * np.sqrt(2 / 4000))


def test_standard_error_of_weighted_means():
    rng = np.random.default_rng(0)
    values, weights = rng.normal(size=7), rng.uniform(0.1, 3, 7)
    equal = weighted_mean(jnp.float32(values), None)[1]
    assert_same_numbers(equal, np.std(values, ddof=1) / np.sqrt(7))
    # Unbiased for values of one spread: E x x^T = I, whatever the weights.
    shares = weights / weights.sum()
    residual = np.eye(7) - shares
    expected = np.sum(shares**2 * np.sum(residual**2, axis=1))
    squares = np.sum(shares**2 * (residual @ values) ** 2)
    sem = np.sqrt(squares * np.sum(shares**2) / expected)
    found = weighted_mean(jnp.float32(values), jnp.float32(weights))[1]
    assert_same_numbers(found, sem)
    for lonely in ([1, 0, 0], [1e20, 1, 0]):
        _, sem = weighted_mean(jnp.arange(3.0), jnp.asarray(lonely, jnp.float32))
        assert np.isnan(sem)


SEED = jax.random.key(0)


@pytest.mark.slow
def test_a_sampler_of_one_s_own():
    weights, x = collapsed_weights(), inputs_of(8)
    embed = jax.tree_util.Partial(network, weights)
    factor = 1.0

    def gaussian(key, z):
        return factor * jax.random.normal(key, z.shape)

    estimate = partial(
        estimate_squared_jacobian_norms, embed, key=SEED, method=gaussian, num_probes=256
    )
    found, exact = estimate(x), norms_oracle(weights, x)
    # Var |J^T c|^2 = 2 |J J^T|_F^2, at most 2 |J|^4.
    assert np.all(np.abs(found - exact) < 4.5 * exact * np.sqrt(2 / 256))
    assert abs(np.mean(found / exact) - 1) < 4.5 * np.sqrt(2 / 256 / 8)
    # What it closes over may change.
    factor = 2.0
    assert_same_numbers(estimate(x), 4 * found)
    assert jax.eval_shape(estimate, x).shape == (8,)


def test_a_sampler_along_the_embedding_is_exact_for_a_jacobian_that_points_there():
    def embed(x):
        return jnp.sum(x**2, axis=(1, 2))[:, None] * jnp.arange(1.0, 5)[None]

    def along(key, z):
        unit = z / jnp.linalg.norm(z)
        rest = jax.random.normal(key, z.shape)
        return unit + rest - unit * jnp.dot(unit, rest)

    x = inputs_of(5)
    found = estimate_squared_jacobian_norms(embed, x, SEED, method=along)
    assert_same_numbers(found, squared_jacobian_norms(embed, x))


def test_a_sampler_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"cotangent of shape \(3,\) for an embedding of shape"):
        estimate_geometric_complexity(
            partial(linear, WEIGHT),
            np.ones((4, 2), np.float32),
            SEED,
            method=lambda key, z: jnp.ones(3),
        )
    with pytest.raises(ValueError, match="method='probes' is not one of output_probes"):
        estimate_geometric_complexity(
            partial(linear, WEIGHT), np.ones((4, 2)), SEED, method="probes"
        )
