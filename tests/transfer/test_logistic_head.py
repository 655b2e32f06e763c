"""Logistic regression: scikit-learn in float64, scales, limits, and what has not converged."""

import jax
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from gc_nc.transfer import (
    logistic_head,
    logistic_regression_predictions,
)
from gc_nc.transfer.logistic_head import logistic_regression_scores
from tests.transfer.test_closed_form_heads import example, flat, nearest_mean, ridge

predict = jax.jit(logistic_regression_predictions)
scores_of = jax.jit(logistic_regression_scores)


@pytest.mark.parametrize("regularization", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("dim", [4, 20])
def test_scores_equal_an_oracle(dim, regularization):
    """More examples than dimensions, which cannot be told apart, and fewer."""
    support, query = example(dim=dim, num_shots=4)
    scores, converged = scores_of(support, query, regularization=regularization)
    assert converged
    oracle = LogisticRegression(C=1 / regularization, tol=1e-10, max_iter=1000, solver="newton-cg")
    expected = oracle.fit(*flat(support)).decision_function(query.astype(np.float64))
    expected -= expected.mean(1, keepdims=True)
    scores = scores - np.mean(scores, axis=1, keepdims=True)
    # The solver stops at 1e-4.
    np.testing.assert_allclose(scores, expected, atol=1e-3 * np.abs(expected).max())


def test_by_hand_for_two_examples():
    """x = -d and d of two ways: A_1 - A_0 = a, lambda a / 2 = 2 d / (1 + exp(d a))."""
    d, a = 0.5, 3.0
    regularization = 4 * d / (1 + np.exp(d * a)) / a
    support = np.array([[[1 - d]], [[1 + d]]], np.float32)
    scores, _ = scores_of(
        support, np.array([[1.0], [3.0]], np.float32), regularization=regularization
    )
    np.testing.assert_allclose(scores[:, 1] - scores[:, 0], [0, 2 * a], atol=2e-3)


def test_at_a_large_norm_and_with_hardly_any_penalty():
    support, query = example(num_shots=4)
    far = (1000 + support).astype(np.float32), (1000 + query).astype(np.float32)
    back = far[0] - np.float32(1000), far[1] - np.float32(1000)
    for regularization in (1e-6, 1.0):
        predicted = predict(*far, regularization=regularization)
        np.testing.assert_array_equal(predicted, predict(*back, regularization=regularization))
        assert np.all(predicted >= 0)


def test_much_penalty_is_the_limit_of_ridge():
    support, query = example()
    expected = ridge(support, query, regularization=1e9)
    for scale in (1.0, 1e-25):
        scale = np.float32(scale)
        predicted = predict(support * scale, query * scale, regularization=1e9)
        assert np.mean(predicted == expected) > 0.98
    assert np.any(predict(support, query, regularization=1e-3) != expected)


def test_what_has_not_converged_has_no_prediction(monkeypatch):
    support, query = example()
    assert np.all(predict(support, query) >= 0)
    monkeypatch.setattr(logistic_head, "_MAX_NEWTON_STEPS", 1)
    unfinished = jax.jit(lambda *arrays: logistic_regression_predictions(*arrays))
    np.testing.assert_array_equal(unfinished(support, query), -1)


def test_equal_examples_are_a_tie():
    support = np.ones((3, 2, 4), np.float32)
    np.testing.assert_array_equal(predict(support, support[:, 0]), 0)
    np.testing.assert_array_equal(nearest_mean(support, support[:, 0]), 0)


@pytest.mark.parametrize("value", [0.0, -1.0, np.inf, np.nan])
def test_a_regularization_that_is_not_above_0_is_refused(value):
    support, query = example()
    with pytest.raises(ValueError, match=r"regularization=.* must be"):
        logistic_regression_predictions(support, query, regularization=value)
