"""Directional CDNV: a float64 oracle, a closed form, and what it does not see."""

import numpy as np
import pytest

from gc_nc.metrics import (
    cdnv_matrix,
    directional_cdnv,
    init_class_statistics,
    update_class_statistics,
)
from tests.rounding import assert_same_numbers


def statistics(z, labels, num_classes):
    z = np.asarray(z, np.float32)
    return update_class_statistics(init_class_statistics(num_classes, z.shape[1]), z, labels)


def test_equals_a_float64_oracle():
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 1, 3], 60, p=[0.5, 0.3, 0.2])
    z = rng.normal(size=(60, 6)) + 4 * rng.normal(size=(4, 6))[labels] + 50
    z = z.astype(np.float32)
    matrix = np.asarray(directional_cdnv(z, labels, statistics(z, labels, 4)))
    z = z.astype(np.float64)
    means = {c: z[labels == c].mean(0) for c in (0, 1, 3)}
    for i, mean in means.items():
        assert np.isnan(matrix[i, i])
        for j, other in means.items():
            if i != j:
                line = (mean - other) / np.linalg.norm(mean - other)
                variance = np.var(z[labels == i] @ line)
                expected = variance / np.sum((mean - other) ** 2)
                np.testing.assert_allclose(matrix[i, j], expected, rtol=1e-3)
    assert np.isnan(matrix[2]).all()
    assert np.isnan(matrix[:, 2]).all()


def test_variance_across_the_line_does_not_count():
    # Two classes 4 apart along the first axis; the first varies by 1 along it, the other across it.
    z = np.array([[-1, 0], [1, 0], [4, -3], [4, 3]], np.float32)
    labels = np.array([0, 0, 1, 1])
    stats = statistics(z, labels, 2)
    matrix = np.asarray(directional_cdnv(z, labels, stats))
    np.testing.assert_allclose([matrix[0, 1], matrix[1, 0]], [1 / 16, 0], atol=1e-6)
    assert_same_numbers(cdnv_matrix(stats)[0, 1], (1 + 9) / 2 / 16)


def test_bad_shapes_labels_and_equal_means():
    z, labels = np.ones((4, 2), np.float32), np.array([0, 0, 1, 1])
    stats = statistics(z, labels, 2)
    assert np.isnan(directional_cdnv(z, labels, stats)).all()
    with pytest.raises(ValueError, match=r"\(B, 2\) is needed"):
        directional_cdnv(z[:, :1], labels, stats)
    with pytest.raises(ValueError, match=r"label 2 is outside 0\.\.1"):
        directional_cdnv(z, labels + 1, stats)
    with pytest.raises(ValueError, match="1 of 2 classes have an example"):
        directional_cdnv(z, labels, statistics(z, 0 * labels, 2))
