"""What `transform_features` does to embeddings, by hand."""

import jaxtyping
import numpy as np
import pytest

from gc_nc.transfer import transform_features
from tests.rounding import assert_same_numbers

Z = np.array([[3.0, 4.0], [1.0, 1.0], [0.0, 0.0]], np.float32)
CENTER = np.array([1.0, 1.0])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, Z),
        ({"l2": True}, [[0.6, 0.8], [0.5**0.5, 0.5**0.5], [0, 0]]),
        ({"center": CENTER}, [[2, 3], [0, 0], [-1, -1]]),
        # The row at the centre is a zero vector then, and the one at 0 is not.
        (
            {"center": CENTER, "l2": True},
            [[2 / 13**0.5, 3 / 13**0.5], [0, 0], [-(0.5**0.5), -(0.5**0.5)]],
        ),
    ],
)
def test_by_hand(options, expected):
    assert_same_numbers(transform_features(Z, **options), np.array(expected))


def test_lengths_whose_squares_are_out_of_range():
    scaled = Z * np.float32([[1e30], [1e-30], [1]])
    expected = np.array([[0.6, 0.8], [0.5**0.5, 0.5**0.5], [0, 0]])
    assert_same_numbers(transform_features(scaled, l2=True), expected)


def test_what_is_not_finite_has_no_direction():
    z = np.array([[np.inf, 1.0], [np.nan, 1], [3, 4]], np.float32)
    units = np.asarray(transform_features(z, l2=True))
    assert np.all(np.isnan(units[:2]))
    assert_same_numbers(units[2], np.array([0.6, 0.8]))


def test_half_precision_is_cast_up_first():
    half = transform_features(np.float16([[1000, 1000]] * 3), l2=True)
    assert half.dtype == np.float32
    assert_same_numbers(half, np.full((3, 2), 0.5**0.5))


@pytest.mark.parametrize(
    ("embeddings", "center", "message"),
    [
        (Z[0], None, r"embeddings of shape \(2,\)"),
        (Z, np.ones(3), r"center of shape \(3,\); \(2,\)"),
        (Z, np.ones((1, 2)), r"center of shape \(1, 2\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(embeddings, center, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        transform_features(embeddings, center=center)
