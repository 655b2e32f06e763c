"""Geometric complexity and neural collapse as pure functions of arrays.

They do not depend on modules, configs or devices: `embed_fn` is any pure function
(B, *input) -> (B, K) in which examples do not mix, from any JAX library.
"""

from gc_nc.metrics.bounds import (
    ConfidenceInterval,
    NeuralCollapseBound,
    class_geometric_complexity,
    geometric_complexity_interval,
    nearest_mean_error_bound,
    neural_collapse_bound,
    poincare_constant,
)
from gc_nc.metrics.class_statistics import (
    ClassStatistics,
    init_class_statistics,
    merge_class_statistics,
    update_class_statistics,
)
from gc_nc.metrics.collapse import cdnv_matrix, geometric_collapse, neural_collapse
from gc_nc.metrics.collapse_geometry import NC2, nc1, nc2, nc3, scatter_ratio
from gc_nc.metrics.directional_collapse import directional_cdnv, directional_error_bound
from gc_nc.metrics.embedding_rank import EmbeddingRank, embedding_rank
from gc_nc.metrics.embedding_scale import (
    relative_geometric_complexity,
    squared_class_distance,
    squared_embedding_norm,
)
from gc_nc.metrics.flatness import (
    hessian_top_eigenvalue,
    hessian_trace,
    sam_sharpness,
    squared_gradient_norm,
)
from gc_nc.metrics.generalized_collapse import GNC2, gnc2, gnc3
from gc_nc.metrics.jackknife import jackknife, jackknife_groups
from gc_nc.metrics.jacobian_estimators import (
    ESTIMATION_METHODS,
    Estimate,
    estimate_geometric_complexity,
    estimate_squared_jacobian_norms,
)
from gc_nc.metrics.jacobians import geometric_complexity, squared_jacobian_norms
from gc_nc.metrics.mixing_check import ImpureEmbeddingWarning, examples_may_mix
from gc_nc.metrics.nearest_means import nc4, nearest_class_mean
from gc_nc.metrics.penalty import PENALTY_METHODS, geometric_complexity_with_outputs
from gc_nc.metrics.planned_estimate import PlannedEstimate, geometric_complexity_to_error
from gc_nc.metrics.population_collapse import population_cdnv_matrix, population_neural_collapse
from gc_nc.metrics.spectral_norms import squared_jacobian_spectral_norms
from gc_nc.metrics.statistics_of_arrays import class_statistics_of, neural_collapse_of

__all__ = [
    "ESTIMATION_METHODS",
    "GNC2",
    "NC2",
    "PENALTY_METHODS",
    "ClassStatistics",
    "ConfidenceInterval",
    "EmbeddingRank",
    "Estimate",
    "ImpureEmbeddingWarning",
    "NeuralCollapseBound",
    "PlannedEstimate",
    "cdnv_matrix",
    "class_geometric_complexity",
    "class_statistics_of",
    "directional_cdnv",
    "directional_error_bound",
    "embedding_rank",
    "estimate_geometric_complexity",
    "estimate_squared_jacobian_norms",
    "examples_may_mix",
    "geometric_collapse",
    "geometric_complexity",
    "geometric_complexity_interval",
    "geometric_complexity_to_error",
    "geometric_complexity_with_outputs",
    "gnc2",
    "gnc3",
    "hessian_top_eigenvalue",
    "hessian_trace",
    "init_class_statistics",
    "jackknife",
    "jackknife_groups",
    "merge_class_statistics",
    "nc1",
    "nc2",
    "nc3",
    "nc4",
    "nearest_class_mean",
    "nearest_mean_error_bound",
    "neural_collapse",
    "neural_collapse_bound",
    "neural_collapse_of",
    "poincare_constant",
    "population_cdnv_matrix",
    "population_neural_collapse",
    "relative_geometric_complexity",
    "sam_sharpness",
    "scatter_ratio",
    "squared_class_distance",
    "squared_embedding_norm",
    "squared_gradient_norm",
    "squared_jacobian_norms",
    "squared_jacobian_spectral_norms",
    "update_class_statistics",
]
