"""Effective rank and participation ratio: how many directions an embedding uses."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Float, Shaped

from gc_nc.array_types import Array, as_floating, as_weights, is_known, with_nan


class EmbeddingRank(NamedTuple):
    """Numbers of directions, 1 to min(K, B - 1); both are d if d directions vary equally.

    Attributes:
      effective: exp of the entropy of the singular values.
      participation: (sum of variances)^2 / sum of squared variances.
    """

    effective: Float[Array, ""]
    participation: Float[Array, ""]


def embedding_rank(
    embeddings: Shaped[Array, "B K"], *, weights: Shaped[Array, "B"] | None = None
) -> EmbeddingRank:
    """Effective rank and participation ratio of embeddings about their mean.

    With the singular values s_i of the rows sqrt(w_b) (z_b - mean z), p_i = s_i / sum s, and
    variances s_i^2 along the principal directions,

      effective     = exp(-sum p_i log p_i)           (Roy and Vetterli, EUSIPCO 2007)
      participation = (sum s_i^2)^2 / sum s_i^4       (Gao et al., bioRxiv 214262)

    Neither depends on scale, rotation or shift. For a collapsed network with k balanced classes
    both are k - 1. Singular values below max(B, K) eps times the largest are rounding error and are
    ignored. Takes O(B K min(B, K)) time.

    Args:
      embeddings: (B, K) embeddings; half precision and integers are cast to float32.
      weights: (B,) weights that are not negative, 1 each by default. A row of weight 0 is ignored
        and may contain anything, NaN included.

    Returns:
      EmbeddingRank; NaN if nothing varies or an embedding of positive weight is not finite.

    Raises:
      ValueError: `embeddings` is not (B, K) with at least one example, weights are invalid, or
        (outside jit; under jit NaN) all weights are 0.
    """
    embeddings = as_floating(embeddings, "embeddings")
    if embeddings.ndim != 2 or 0 in embeddings.shape:
        raise ValueError(
            f"embeddings of shape {embeddings.shape}; (B, K) is needed, B and K above 0"
        )
    num_rows = embeddings.shape[0]
    weights = jnp.ones(num_rows, jnp.float32) if weights is None else as_weights(weights, num_rows)
    if is_known(weights) and not bool(jnp.any(weights > 0)):
        raise ValueError("all weights are 0, so no example counts; give one a weight above 0")
    shares = (weights / jnp.max(weights))[:, None]
    shares = shares / jnp.sum(shares)
    embeddings = jnp.where(shares > 0, embeddings, 0)
    # One embedding is subtracted from all, and the results are divided by the largest, so that no
    # digits are lost if the mean is far from 0 and no squares are out of range.
    offsets = jnp.where(shares > 0, embeddings - embeddings[jnp.argmax(weights)][None], 0)
    size = jnp.max(jnp.abs(offsets))
    offsets = offsets / jnp.where(size > 0, size, 1)
    rows = jnp.sqrt(shares) * (offsets - jnp.sum(shares * offsets, axis=0, keepdims=True))
    finite = jnp.isfinite(size)
    singular = jnp.linalg.svd(jnp.where(finite, rows, 0), compute_uv=False)
    eps = float(jnp.finfo(jnp.float32).eps)
    counted = singular > max(embeddings.shape) * eps * jnp.max(singular)
    singular = jnp.where(counted, singular / jnp.max(singular), 0)
    varies = jnp.sum(singular) > 0
    parts = singular / jnp.sum(singular)
    entropy = -jnp.sum(jnp.where(counted, parts * jnp.log(jnp.where(counted, parts, 1)), 0))
    participation = jnp.sum(singular**2) ** 2 / jnp.sum(singular**4)
    known = finite & varies
    return EmbeddingRank(with_nan(~known, jnp.exp(entropy)), with_nan(~known, participation))
