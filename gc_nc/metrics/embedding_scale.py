"""The size of an embedding, and geometric complexity relative to it.

An embedding that is a times as large has a^2 times the geometric complexity, but the same neural
collapse and geometric collapse. So GC alone cannot tell a smooth embedding from a small one.
"""

import jax.numpy as jnp
from jaxtyping import Float

from gc_nc.array_types import Array, as_scalar
from gc_nc.metrics.class_statistics import ClassStatistics, as_statistics
from gc_nc.metrics.collapse import checked_pairs, number_of, squared_distances, unless_too_few


def squared_embedding_norm(stats: ClassStatistics) -> Float[Array, ""]:
    """Mean over examples of |z|^2 = sum_i (n_i |mu_i|^2 + S_i) / sum_i n_i.

    In (embedding unit)^2. It depends on where the origin lies; `squared_class_distance` does not.

    Args:
      stats: class statistics of the embeddings.

    Returns:
      Scalar; NaN if there are no examples.
    """
    stats = as_statistics(stats)
    present = stats.present
    means = jnp.where(present[:, None], stats.means, 0)
    # Only averages are used, since sums over many examples lose digits or overflow float32.
    shares = stats.counts / jnp.sum(stats.counts)
    squares = jnp.sum(means**2, axis=1) + stats.known_variances
    return jnp.sum(shares * squares)


def squared_class_distance(stats: ClassStatistics) -> Float[Array, ""]:
    """1 / (k (k - 1)) sum over ordered pairs i != j of |mu_i - mu_j|^2.

    This is the mean squared distance between two class means, in (embedding unit)^2; k is the
    number of classes that have an example.

    Args:
      stats: class statistics of the embeddings.

    Returns:
      Scalar; 0 where all class means are equal.

    Raises:
      ValueError: fewer than two classes have an example (outside jit; under jit NaN).
    """
    stats = as_statistics(stats)
    pairs = checked_pairs(stats)
    # Divided before they are summed, because their sum may overflow float32.
    shares = jnp.where(pairs, squared_distances(stats), 0) / number_of(pairs)
    return unless_too_few(jnp.sum(shares), stats)


def relative_geometric_complexity(
    gc: Float[Array, ""] | float, stats: ClassStatistics
) -> Float[Array, ""]:
    """GC / (mean squared distance of two class means): GC of an embedding of unit size.

    Unlike GC, but like geometric collapse, it does not depend on the scale of the embedding.
    Geometric collapse is k times GC over the harmonic mean of the same squared distances; this is
    GC over their arithmetic mean, so a single pair of close classes cannot make it large. In
    1 / (input unit)^2. It is at most 1 / k times geometric collapse.

    Args:
      gc: geometric complexity of the embedding whose class statistics are `stats`; a scalar.
      stats: class statistics of the embeddings.

    Returns:
      Scalar; inf where all class means are equal (NaN if gc is 0 as well).

    Raises:
      ValueError: `gc` is not a scalar or (outside jit; under jit NaN) is negative; fewer than two
        classes have an example (outside jit; under jit NaN).
    """
    return as_scalar(gc, "gc") / squared_class_distance(stats)
