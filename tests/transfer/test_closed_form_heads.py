"""Nearest mean, cosine and ridge: hand values, oracles in float64, scales, ties."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.neighbors import NearestCentroid

from gc_nc.transfer import cosine_predictions, nearest_mean_predictions, ridge_predictions

nearest_mean, cosine, ridge = map(
    jax.jit, (nearest_mean_predictions, cosine_predictions, ridge_predictions)
)


def example(num_ways=4, num_shots=4, dim=20, seed=0, num_queries=200):
    """Classes that overlap, far from 0.

    Predictions of these are compared exactly, and so they are of test_episode_evaluation's: the
    lead of the best way is at least 17 times what eight roundings of each input can change.
    """
    rng = np.random.default_rng(seed)
    centres = 2 + rng.normal(size=(num_ways, 1, dim)) / np.sqrt(dim / 4)
    support = centres + rng.normal(size=(num_ways, num_shots, dim))
    ways = rng.integers(num_ways, size=num_queries)
    query = centres[ways, 0] + rng.normal(size=(num_queries, dim))
    return support.astype(np.float32), query.astype(np.float32)


def flat(support):
    num_ways, num_shots, dim = support.shape
    return support.reshape(-1, dim).astype(np.float64), np.repeat(np.arange(num_ways), num_shots)


def test_nearest_mean_and_cosine_by_hand():
    """Means (2, 0) and (0, 6)."""
    support = np.array([[[1.0, 0], [3, 0]], [[0, 5], [0, 7]]], np.float32)
    query = np.array([[1.5, 2], [2, 3.1], [8, 9], [-1, -1]], np.float32)
    # Squared distances 4.25 < 18.25; 9.61 < 12.41; 117 > 73; 10 < 50.
    np.testing.assert_array_equal(nearest_mean(support, query), [0, 0, 1, 0])
    # The larger coordinate; equal at last, so the lowest.
    np.testing.assert_array_equal(cosine(support, query), [1, 1, 1, 0])


def test_ridge_by_hand():
    """X^T X = (8 4; 4 4) and A_0 - A_1 is along (4 + lambda, -4): (1, 2) is its border at 4."""
    origin = np.array([10.0, -20], np.float32)
    support = origin + np.array([[[2.0, 1], [0, -1]], [[-2, -1], [0, 1]]], np.float32)
    query = origin + np.array([[1.0, 2], [-1, -2]], np.float32)
    np.testing.assert_array_equal(ridge(support, query, regularization=3.99), [1, 0])
    np.testing.assert_array_equal(ridge(support, query, regularization=4.01), [0, 1])
    # With dimensions that say nothing the other of the two systems is solved.
    wide = np.zeros((2, 2, 9), np.float32), np.zeros((2, 9), np.float32)
    for narrow, array in zip((support, query), wide, strict=True):
        array[..., :2] = narrow
    np.testing.assert_array_equal(ridge(*wide, regularization=3.99), [1, 0])
    np.testing.assert_array_equal(ridge(*wide, regularization=4.01), [0, 1])


def test_nearest_mean_equals_an_oracle():
    support, query = example()
    expected = NearestCentroid().fit(*flat(support)).predict(query.astype(np.float64))
    assert len(set(expected)) == 4
    np.testing.assert_array_equal(nearest_mean(support, query), expected)


def test_cosine_equals_an_oracle():
    support, query = example()
    expected = cosine_similarity(query.astype(np.float64), support.mean(1)).argmax(1)
    assert np.mean(expected != nearest_mean(support, query)) > 0.02
    np.testing.assert_array_equal(cosine(support, query), expected)


@pytest.mark.parametrize("regularization", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("dim", [5, 20])
def test_ridge_equals_an_oracle(dim, regularization):
    """More examples than dimensions, and fewer."""
    support, query = example(dim=dim)
    x, ways = flat(support)
    oracle = Ridge(alpha=regularization).fit(x, np.eye(4)[ways])
    expected = oracle.predict(query.astype(np.float64)).argmax(1)
    predicted = ridge(support, query, regularization=regularization)
    np.testing.assert_array_equal(predicted, expected)
    other = ridge(support, query, regularization=2 / regularization)
    assert np.any(other != predicted)


def test_ridge_with_hardly_any_penalty():
    """The centred Gram matrix is singular whatever the support, and float32 has 7 digits."""
    for seed in range(8):
        support, query = example(seed=seed)
        x, ways = flat(support)
        oracle = Ridge(alpha=1e-9).fit(x, np.eye(4)[ways])
        expected = oracle.predict(query.astype(np.float64)).argmax(1)
        assert np.mean(ridge(support, query, regularization=1e-9) == expected) > 0.98


@pytest.mark.parametrize("head", [nearest_mean, ridge])
def test_close_means_are_told_apart_at_a_large_norm(head):
    # Squared norms of 1e8 resolve 8; the distances here are of order 1.
    support = (np.full(100, 1000.0) + np.eye(100)[:5]).astype(np.float32)[:, None]
    np.testing.assert_array_equal(head(support, support[::-1, 0]), [4, 3, 2, 1, 0])


def test_close_directions_are_told_apart():
    support = (np.full(100, 1.0) + 1e-3 * np.eye(100)[:5]).astype(np.float32)[:, None]
    np.testing.assert_array_equal(cosine(support, support[::-1, 0]), [4, 3, 2, 1, 0])


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e25])
def test_predictions_do_not_depend_on_the_scale(scale):
    support, query = example()
    for head in (nearest_mean, cosine):
        scaled = head((support * scale).astype(np.float32), (query * scale).astype(np.float32))
        np.testing.assert_array_equal(scaled, head(support, query))


def test_ridge_scales_with_the_square_of_the_embeddings():
    support, query = example()
    for scale in (1e-3, 1e3):
        np.testing.assert_array_equal(
            ridge(support * scale, query * scale, regularization=scale**2),
            ridge(support, query, regularization=1.0),
        )
    # Past the range of float32 an infinite lambda, whose limit it is.
    tiny = ridge(support * np.float32(1e-25), query * np.float32(1e-25))
    np.testing.assert_array_equal(tiny, ridge(support, query, regularization=1e9))


def test_cosine_of_a_zero_vector_is_zero():
    support = np.array([[[0.0, 0.0]], [[-1.0, 0.0]]], np.float32)
    # To way 1: 0 (a tie), 1 and -1, against 0.
    query = np.array([[0.0, 0], [-3, 0], [2, 0]], np.float32)
    np.testing.assert_array_equal(cosine(support, query), [0, 1, 0])


def test_half_precision_and_integers_are_cast_up():
    support, query = example()
    half = support.astype(jnp.bfloat16), query.astype(jnp.bfloat16)
    up = half[0].astype(np.float32), half[1].astype(np.float32)
    for head in (nearest_mean, cosine, ridge):
        np.testing.assert_array_equal(head(*half), head(*up))
    whole = np.array([[[0, 0]], [[255, 0]]], np.uint8)
    np.testing.assert_array_equal(nearest_mean(whole, whole[:, 0]), [0, 1])


@pytest.mark.parametrize("value", [0.0, -1.0, np.inf, np.nan])
def test_ridge_refuses_a_regularization_that_is_not_above_0(value):
    support, query = example()
    with pytest.raises(ValueError, match=r"regularization=.* must be"):
        ridge_predictions(support, query, regularization=value)


@pytest.mark.parametrize(
    ("support", "query", "message"),
    [
        ((1, 5, 3), (2, 3), r"support_embeddings of shape \(1, 5, 3\).*2 or more ways"),
        ((2, 0, 3), (2, 3), r"support_embeddings of shape \(2, 0, 3\)"),
        ((2, 3), (2, 3), r"support_embeddings of shape \(2, 3\)"),
        ((2, 5, 3), (2, 4), r"query_embeddings of shape \(2, 4\); \(N, 3\)"),
        ((2, 5, 3), (3,), r"query_embeddings of shape \(3,\); \(N, 3\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(support, query, message, monkeypatch):
    # Users do not have the tests' type checks, which would come first.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    for head in (nearest_mean_predictions, cosine_predictions, ridge_predictions):
        with pytest.raises(ValueError, match=message):
            head(np.ones(support, np.float32), np.ones(query, np.float32))
