"""Logistic regression: what scikit-learn predicts in float64, at any norm, and no convergence."""

import jax
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from gc_nc.transfer import logistic_head, logistic_regression_predictions
from tests.transfer.test_closed_form_heads import example, flat

predict = jax.jit(logistic_regression_predictions)


@pytest.mark.parametrize("regularization", [1e-2, 1.0, 30.0])
@pytest.mark.parametrize("dim", [4, 20])
def test_equals_an_oracle_by_another_solver(dim, regularization):
    """More examples than dimensions, which cannot be told apart, and fewer."""
    support, query = example(dim=dim)
    oracle = LogisticRegression(C=1 / regularization, tol=1e-8, max_iter=1000, solver="newton-cg")
    expected = oracle.fit(*flat(support)).predict(query.astype(np.float64))
    predicted = predict(support, query, regularization=regularization)
    # lbfgs stops at 1e-4, so that queries on a border may fall to the other side.
    assert np.mean(predicted == expected) > 0.98


def test_regularization_is_lambda_and_not_its_inverse():
    support, query = example()
    strong, weak = (predict(support, query, regularization=r) for r in (1e4, 1e-4))
    oracle = LogisticRegression(C=1e-4, tol=1e-8, max_iter=1000).fit(*flat(support))
    expected = oracle.predict(query.astype(np.float64))
    assert np.mean(strong == expected) > 0.98
    assert np.any(weak != strong)


def test_at_a_large_norm():
    support, query = example()
    far = (1000 + support).astype(np.float32), (1000 + query).astype(np.float32)
    back = far[0] - np.float32(1000), far[1] - np.float32(1000)
    np.testing.assert_array_equal(predict(*far), predict(*back))


def test_vmap_equals_a_loop():
    support, query = example(num_shots=2)
    supports, queries = np.stack([support, -support]), np.stack([query, query])
    together = jax.vmap(logistic_regression_predictions)(supports, queries)
    for i in range(2):
        np.testing.assert_array_equal(together[i], predict(supports[i], queries[i]))


def test_what_has_not_converged_has_no_prediction(monkeypatch):
    support, query = example()
    assert np.all(predict(support, query, regularization=1.0) >= 0)
    monkeypatch.setattr(logistic_head, "_MAX_ITERATIONS", 1)
    np.testing.assert_array_equal(logistic_regression_predictions(support, query), -1)


def test_what_is_not_finite_has_no_prediction():
    support, query = example()
    query[1] = np.nan
    predicted = np.asarray(predict(support, query, regularization=1.0))
    assert predicted[1] == -1
    assert np.all(np.delete(predicted, 1) >= 0)
    support[0, 0, 0] = np.inf
    np.testing.assert_array_equal(predict(support, query, regularization=1.0), -1)
    under_jit = predict(*example(), regularization=np.float32(-1))
    np.testing.assert_array_equal(under_jit, -1)


def test_equal_examples_are_a_tie():
    support = np.ones((3, 2, 4), np.float32)
    np.testing.assert_array_equal(predict(support, support[:, 0]), 0)


@pytest.mark.parametrize("value", [0.0, -1.0, np.inf, np.nan])
def test_a_regularization_that_is_not_above_0_is_refused(value):
    support, query = example()
    with pytest.raises(ValueError, match=r"regularization=.* must be"):
        logistic_regression_predictions(support, query, regularization=value)
