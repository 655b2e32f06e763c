"""Transformations of embeddings before a head sees them."""

import jax
from jaxtyping import Float, Shaped

from gc_nc.array_types import Array, as_floating
from gc_nc.metrics.argument_checks import check_flag
from gc_nc.transfer.closed_form_heads import unit_vectors


def transform_features(
    embeddings: Shaped[Array, "N K"],
    *,
    center: Shaped[Array, "K"] | None = None,
    l2: bool = False,
) -> Float[Array, "N K"]:
    """z, z - c, z / |z| or (z - c) / |z - c|: centred first, then scaled to length 1.

    Source: Wang, Chao, Weinberger, van der Maaten, SimpleShot (arXiv 1911.04623), section 3: UN,
    L2N and CL2N.

    Args:
      embeddings: (N, K); all real numbers are cast to float32.
      center: (K,) c, usually the mean embedding of the source classes; None to leave embeddings as
        they are. A mean over an episode's queries would not be inductive.
      l2: whether to divide by the Euclidean norm. A zero vector stays zero; one that is not finite
        becomes NaN.

    Returns:
      (N, K).

    Raises:
      ValueError: shapes that do not fit; complex numbers; an `l2` that is no truth value.
    """
    check_flag(l2, "l2")
    embeddings = as_floating(embeddings, "embeddings")
    if embeddings.ndim != 2:
        raise ValueError(f"embeddings of shape {embeddings.shape}; (N, K) is needed")
    if center is not None:
        center = as_floating(center, "center")
        if center.shape != embeddings.shape[1:]:
            raise ValueError(f"center of shape {center.shape}; {embeddings.shape[1:]} is needed")
        embeddings = embeddings - center[None]
    return _unit_vectors_compiled(embeddings) if l2 else embeddings


# Compiled into one pass over all images instead of a dozen.
_unit_vectors_compiled = jax.jit(unit_vectors)
