"""k nearest neighbours and the linear probe: scikit-learn's, ties, edges."""

import jax
import jaxtyping
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from gc_nc.transfer import k_nearest_predictions, linear_probe_predictions


def example(num=120, seed=0):
    """(examples, labels, queries, labels), of 3 unequal classes that overlap, far from 0."""
    rng = np.random.default_rng(seed)
    labels = rng.choice([2, 5, 11], 2 * num, p=[0.5, 0.3, 0.2])
    z = 100 + labels[:, None] / 2 * np.eye(1, 6) + rng.normal(size=(2 * num, 6))
    z = z.astype(np.float32)
    return z[:num], labels[:num], z[num:], labels[num:]


@pytest.mark.parametrize("k", [1, 7])
def test_nearest_neighbours_equal_scikit_learn_s(k):
    train, labels, query, truth = example()
    oracle = KNeighborsClassifier(k, algorithm="brute").fit(train.astype(float), labels)
    found = k_nearest_predictions(train, labels, query, num_neighbors=k)
    np.testing.assert_array_equal(found, oracle.predict(query.astype(float)))
    assert np.mean(found == truth) > 0.6


def test_the_lowest_label_at_ties_and_the_first_example():
    train = np.array([[1.0], [-1], [3], [-3]])
    found = k_nearest_predictions(train, np.array([7, 4, 4, 7]), np.zeros((1, 1)), num_neighbors=2)
    np.testing.assert_array_equal(found, [4])
    found = k_nearest_predictions(train, np.array([7, 4, 4, 7]), np.zeros((1, 1)), num_neighbors=1)
    np.testing.assert_array_equal(found, [7])


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_nearest_neighbours_at_any_scale(scale):
    train, labels, query, _ = example()
    expected = k_nearest_predictions(train, labels, query)
    scaled = [np.float32(scale) * z for z in (train, query)]
    # Rounding of the product may turn one tie.
    assert np.mean(k_nearest_predictions(scaled[0], labels, scaled[1]) == expected) > 0.98


def test_the_probe_equals_scikit_learn_s():
    train, labels, query, truth = example()
    oracle = LogisticRegression(C=1 / 3, tol=1e-8, max_iter=1000)
    expected = oracle.fit(train - 100.0, labels).predict(query - 100.0)
    found = linear_probe_predictions(train, labels, query, regularization=3.0)
    assert np.mean(found == expected) > 0.98
    assert np.mean(found == truth) > 0.6


@pytest.mark.parametrize("predict", [k_nearest_predictions, linear_probe_predictions])
def test_edges(predict, monkeypatch):
    # Without the tests' type checks, which would come first.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    train, labels, query, _ = example(30)
    query[3] = np.nan
    found = np.asarray(predict(train, labels, query))
    assert found[3] == -1
    assert set(found[4:]) <= {2, 5, 11}
    train[0] = np.inf
    np.testing.assert_array_equal(predict(train, labels, query), -1)
    for arguments, message in (
        ((train, labels[:-1], query), "labels of shape"),
        ((train, labels / 2, query), "labels are float64"),
        ((train, 0 * labels, query), "hold one label only"),
        ((train, labels, query[:, :-1]), r"query_embeddings of shape \(30, 5\)"),
        ((train[:0], labels[:0], query), r"train_embeddings of shape \(0, 6\)"),
    ):
        with pytest.raises(ValueError, match=message):
            predict(*arguments)


@pytest.mark.slow
def test_what_is_asked_for_must_exist():
    train, labels, query, _ = example(10)
    with pytest.raises(ValueError, match="num_neighbors=11 of 10 examples"):
        k_nearest_predictions(train, labels, query, num_neighbors=11)
    with pytest.raises(ValueError, match=r"regularization=0\.0 must be"):
        linear_probe_predictions(train, labels, query, regularization=0.0)
    with pytest.raises(ValueError, match="train_labels are traced"):
        jax.jit(k_nearest_predictions)(train, labels, query)
    with pytest.raises(ValueError, match="cannot be traced"):
        jax.jit(lambda z: linear_probe_predictions(z, labels, query))(train)
