"""Class statistics and neural collapse of embeddings that are given as one array."""

import numpy as np
from jaxtyping import Float, Shaped

from gc_nc.array_types import Array, as_floating, as_weights, is_known
from gc_nc.metrics.argument_checks import as_labels
from gc_nc.metrics.class_statistics import (
    ClassStatistics,
    init_class_statistics,
    update_class_statistics,
)
from gc_nc.metrics.collapse import neural_collapse


def class_statistics_of(
    embeddings: Shaped[Array, "B K"],
    labels: Shaped[Array, "B"],
    num_classes: int | None = None,
    *,
    weights: Shaped[Array, "B"] | None = None,
    scatter: bool = False,
) -> ClassStatistics:
    """Returns class statistics of one array of embeddings; see also `update_class_statistics`.

    Args:
      embeddings: (B, K) embeddings; all real numbers are cast to float32.
      labels: (B,) integers in 0..C-1.
      num_classes: C; by default one more than the largest label of a row of positive weight.
        Classes without an example do not change any metric.
      weights: (B,) weights, as in `update_class_statistics`.
      scatter: whether to gather the pooled (K, K) scatter too, for `nc1`.

    Raises:
      ValueError: in the cases in which `update_class_statistics` raises it; there are no examples;
        labels are traced and `num_classes` is not given.
    """
    embeddings = as_floating(embeddings, "embeddings")
    if embeddings.ndim != 2 or embeddings.size == 0:
        raise ValueError(f"embeddings of shape {embeddings.shape}; (B, K) with B, K > 0 is needed")
    if num_classes is None:
        num_classes = _num_classes(labels, weights, len(embeddings))
    stats = init_class_statistics(num_classes, embeddings.shape[1], scatter=scatter)
    return update_class_statistics(stats, embeddings, labels, weights=weights)


def neural_collapse_of(
    embeddings: Shaped[Array, "B K"],
    labels: Shaped[Array, "B"],
    num_classes: int | None = None,
    *,
    weights: Shaped[Array, "B"] | None = None,
) -> Float[Array, ""]:
    """`neural_collapse` of one array of embeddings: the mean CDNV over pairs of classes.

    Args:
      embeddings: (B, K) embeddings; all real numbers are cast to float32.
      labels: (B,) integers in 0..C-1.
      num_classes: C, as in `class_statistics_of`.
      weights: (B,) weights, as in `update_class_statistics`.

    Raises:
      ValueError: in the cases in which `class_statistics_of` or `neural_collapse` raises it.
    """
    return neural_collapse(class_statistics_of(embeddings, labels, num_classes, weights=weights))


def _num_classes(labels, weights, num_rows: int) -> int:
    if not is_known(labels, weights):
        raise ValueError(
            "num_classes cannot be seen in traced labels; give it, as in class_statistics_of("
            "embeddings, labels, num_classes=10)"
        )
    labels = np.asarray(as_labels(labels, num_rows))
    if weights is not None:
        # Rows of weight 0 may have any label.
        labels = np.where(np.asarray(as_weights(weights, num_rows)) != 0, labels, 0)
    return max(int(labels.max()), 0) + 1
