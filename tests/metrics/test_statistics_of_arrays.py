"""Statistics and NC of two arrays in one call: what the calls for batches give."""

import jax
import jaxtyping
import numpy as np
import pytest

from gc_nc import metrics
from tests.rounding import assert_same_numbers

Z = np.array([[0.0, 0], [2, 0], [10, 0], [12, 0], [np.nan, 0]])
LABELS, WEIGHTS = np.array([0, 0, 2, 2, 10**9]), np.array([1.0, 1, 1, 1, 0])


def test_the_same_as_by_batches():
    stats = metrics.init_class_statistics(3, 2, scatter=True)
    for rows in (slice(3), slice(3, 5)):
        stats = metrics.update_class_statistics(stats, Z[rows], LABELS[rows], weights=WEIGHTS[rows])
    found = metrics.class_statistics_of(Z, LABELS, weights=WEIGHTS, scatter=True)
    assert found.counts.shape == (3,)
    for name in ("counts", "means", "variances", "scatter"):
        assert_same_numbers(getattr(found, name), getattr(stats, name))
    assert metrics.class_statistics_of(Z[:4], LABELS[:4], 7).scatter is None
    for found in (
        metrics.neural_collapse_of(Z, LABELS, weights=WEIGHTS),
        metrics.neural_collapse_of(Z[:4], LABELS[:4].astype(np.uint8)),
        jax.jit(lambda z: metrics.neural_collapse_of(z, LABELS[:4]))(Z[:4]),
        jax.jit(lambda z, y: metrics.neural_collapse_of(z, y, 3))(Z[:4], LABELS[:4]),
    ):
        assert_same_numbers(found, 0.01)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: jax.jit(metrics.neural_collapse_of)(Z[:4], LABELS[:4]),
            r"num_classes cannot be seen in traced labels; give it, as in .*num_classes=10\)",
        ),
        (lambda: metrics.neural_collapse_of(Z[:4], LABELS[:4], 2), r"label 2 is outside 0\.\.1"),
        (lambda: metrics.neural_collapse_of(Z[:4], -LABELS[:4] - 1), r"label -1 is outside 0\.\.0"),
        (lambda: metrics.class_statistics_of(Z[:0], LABELS[:0]), r"embeddings of shape \(0, 2\)"),
        (lambda: metrics.class_statistics_of(Z[:, 0], LABELS), r"embeddings of shape \(5,\); \(B"),
        (lambda: metrics.class_statistics_of(Z, LABELS[:, None]), r"labels\[:, 0\]"),
        (lambda: metrics.class_statistics_of(Z[:3], np.eye(3)), r"labels.argmax\(axis=1\)"),
        (lambda: metrics.class_statistics_of(Z, LABELS / 1), "labels are float64; integers"),
        (lambda: metrics.class_statistics_of(Z, LABELS[:4]), r"labels of shape \(4,\) for 5"),
    ],
)
def test_what_it_cannot_take_is_one_line(call, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
