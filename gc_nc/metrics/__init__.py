"""Geometric complexity and neural collapse as pure functions of arrays.

They know nothing of modules, configs or devices: `embed_fn` is any pure function
(B, *input) -> (B, K) in which examples do not mix, from any JAX library.
"""

from gc_nc.metrics.class_statistics import (
    ClassStatistics,
    init_class_statistics,
    merge_class_statistics,
    update_class_statistics,
)
from gc_nc.metrics.collapse import cdnv_matrix, geometric_collapse, neural_collapse
from gc_nc.metrics.jacobians import (
    Estimate,
    estimate_geometric_complexity,
    geometric_complexity,
    jacobian_norms,
)

__all__ = [
    "ClassStatistics",
    "Estimate",
    "cdnv_matrix",
    "estimate_geometric_complexity",
    "geometric_collapse",
    "geometric_complexity",
    "init_class_statistics",
    "jacobian_norms",
    "merge_class_statistics",
    "neural_collapse",
    "update_class_statistics",
]
