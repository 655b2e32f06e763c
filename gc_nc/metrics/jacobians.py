"""Geometric complexity: the mean squared Frobenius norm of an embedding's input Jacobian.

GC = 1/B sum_b |J(x_b)|_F^2,  J(x) = df/dx in R^(K x D)          (arXiv 2209.13083, 2405.15706)

It is a squared norm, summed over all K x D entries. There is no square root (its gradient would be
NaN at 0) and no mean over entries. x is in the units that the network sees, so dividing pixels by
sigma multiplies GC by sigma^2.

This module computes it exactly: row by row of J with vector-Jacobian products, or column by column
with Jacobian-vector products if inputs have fewer dimensions than embeddings.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped

from gc_nc.array_types import Array, EmbedFn, check_whole, described, is_known, with_nan
from gc_nc.metrics import jacobian_products as products
from gc_nc.metrics.embedding_functions import check_embedding, chunk_length
from gc_nc.metrics.weighted_means import mask_inputs, weighted_mean


def squared_jacobian_norms(
    embed_fn: EmbedFn,
    inputs: Shaped[Array, "B ..."],
    *,
    chunk_size: int | None = None,
    skip_inactive: bool = False,
    most_active: int | None = None,
) -> Float[Array, "B"]:
    """Exact |J(x_b)|_F^2 of each example, J = d embed_fn / dx.

    This costs min(K, D) Jacobian products per example: K by reverse mode, or D by forward mode. An
    `embed_fn` with `jax.custom_vjp` has no forward mode, so reverse mode is used. Outside jit a
    loop on the host runs one compiled block over chunks of examples and blocks of rows. Inside jit
    the blocks are run by a loop on the device or, on the CPU, are chained by a data dependency.
    Either way, memory depends on `chunk_size`, not on B x K x D.

    Outside jit `embed_fn` is traced once per call, which takes milliseconds, so changes in what it
    closes over are seen. Functions that compute the same share a compiled program; only another
    computation or shape is compiled again.

    `skip_inactive` is for embeddings that end in ReLU, where the row of a unit at 0 is 0. For each
    example only the rows of units that are not 0 are computed, so the cost is the largest number of
    those in a chunk instead of K. One product with Gaussian cotangents checks that the other rows
    are 0. The result cannot be differentiated.

    Args:
      embed_fn: pure function (B, *input) -> (B, K) in which examples do not mix.
      inputs: (B, *input) in model-input units; integers and half precision are cast to float32.
      chunk_size: number of examples differentiated at a time (default 32); need not divide B.
      skip_inactive: whether to skip inactive units. They are counted on the host, which needs
        concrete arrays, unless `most_active` is given.
      most_active: with `skip_inactive`, the largest number of active units in any example; works
        under jit and vmap too.

    Returns:
      (B,) float32, in (embedding units / input units)^2. NaN for an example whose embedding is not
      finite and, under jit, for one that has more than `most_active` active units or whose row of
      an inactive unit is not 0.

    Raises:
      ValueError: there are no examples, `chunk_size` is below 1, or `embed_fn` does not return
        (B, K); with `skip_inactive`, also the cases that give NaN under jit, and differentiation;
        `most_active` is given without `skip_inactive`.
    """
    most_active = _checked_most_active(skip_inactive, most_active)
    embed_fn, inputs = check_embedding(embed_fn, inputs, chunk_size)
    embedding_dim, input_dim = embed_fn.dim, inputs[0].size
    if input_dim == 0:
        return jnp.zeros(inputs.shape[0], inputs.dtype)
    if skip_inactive:
        return _active_norms(embed_fn, inputs, embedding_dim, chunk_size, most_active)
    if input_dim < embedding_dim and embed_fn.has_forward_mode():
        squares_fn, num_rows = _column_squares, input_dim
    else:
        squares_fn, num_rows = _row_squares, embedding_dim
    return products.sum_over_rows(
        embed_fn, inputs, None, squares_fn, num_rows, chunk_size=chunk_size
    )


def geometric_complexity(
    embed_fn: EmbedFn,
    inputs: Shaped[Array, "B ..."],
    *,
    weights: Shaped[Array, "B"] | None = None,
    chunk_size: int | None = None,
    skip_inactive: bool = False,
    most_active: int | None = None,
) -> Float[Array, ""]:
    """Exact geometric complexity sum_b w_b |J(x_b)|_F^2 / sum_b w_b (arXiv 2405.15706, section 3).

    Args:
      embed_fn: pure function (B, *input) -> (B, K) in which examples do not mix.
      inputs: (B, *input) in model-input units.
      weights: (B,) weights that are not negative, 1 each by default. A row of weight 0 is ignored
        and may contain anything, NaN included.
      chunk_size: number of examples differentiated at a time, as in `squared_jacobian_norms`.
      skip_inactive: whether to skip inactive units, as in `squared_jacobian_norms`.
      most_active: largest number of active units, as in `squared_jacobian_norms`.

    Returns:
      Scalar, float32.

    Raises:
      ValueError: in the cases in which `squared_jacobian_norms` raises it; weights have another
        length or (outside jit; under jit NaN) are negative, not finite or all 0.
    """
    inputs, weights = mask_inputs(inputs, weights)
    norms = squared_jacobian_norms(
        embed_fn,
        inputs,
        chunk_size=chunk_size,
        skip_inactive=skip_inactive,
        most_active=most_active,
    )
    return weighted_mean(norms, weights)[0]


def _checked_most_active(skip_inactive, most_active) -> int | None:
    if not isinstance(skip_inactive, (bool, np.bool_)):
        raise ValueError(
            f"skip_inactive={described(skip_inactive)} must be True or False; the largest number of"
            " active units is another argument, as in skip_inactive=True, most_active=64"
        )
    if most_active is None:
        return None
    if not skip_inactive:
        raise ValueError(f"most_active={described(most_active)} needs skip_inactive=True")
    return check_whole(most_active, 1, "most_active")


def _row_squares(embed_fn, inputs, auxiliary, rows):
    """Squared norms of the rows with the given numbers, for every example; rows past K give 0."""
    del auxiliary

    def unit_cotangents(embeddings):
        unit = jax.nn.one_hot(rows, embeddings.shape[1], dtype=jnp.float32)
        return jnp.broadcast_to(unit[:, None, :], (rows.size, *embeddings.shape))

    return products.pull_back_squares(embed_fn, inputs, unit_cotangents)


def _column_squares(embed_fn, inputs, auxiliary, columns):
    del auxiliary
    unit = jax.nn.one_hot(columns, inputs[0].size, dtype=jnp.float32)
    tangents = jnp.broadcast_to(unit[:, None, :], (columns.size, len(inputs), inputs[0].size))
    return products.push_forward_squares(embed_fn, inputs, tangents)


def _listed_row_squares(embed_fn, inputs, units, rows):
    """Squared norms of rows; row r of an example is the unit in place r of its list in `units`."""
    listed = units[:, jnp.minimum(rows, units.shape[1] - 1)]

    def unit_cotangents(embeddings):
        return jax.nn.one_hot(listed.T, embeddings.shape[1], dtype=jnp.float32)

    return products.pull_back_squares(embed_fn, inputs, unit_cotangents)


def _active_units(embed_fn, inputs, auxiliary, first_row):
    del auxiliary, first_row
    embeddings = embed_fn(inputs)
    return (embeddings != 0).astype(jnp.float32), embeddings


def _inactive_squares(embed_fn, inputs, auxiliary, first_row):
    """|c^T J|^2 for a Gaussian c on the units at 0; almost surely 0 only if all their rows are."""
    del auxiliary, first_row

    def cotangents(embeddings):
        gaussian = jax.random.normal(jax.random.key(0), embeddings.shape, jnp.float32)
        return jnp.where(embeddings == 0, gaussian, 0)[None]

    squares, embeddings = products.pull_back_squares(embed_fn, inputs, cotangents)
    return squares[0], embeddings


@jax.custom_jvp
def _not_differentiable(norms):
    return norms


@_not_differentiable.defjvp
def _refuse(primals, tangents):
    raise ValueError(
        "squared_jacobian_norms with skip_inactive cannot be differentiated; leave it out"
    )


def _active_norms(embed_fn, inputs, embedding_dim, chunk_size, most_active):
    """Returns norms that are computed from the rows of active units only."""
    chunk = chunk_length(inputs.shape[0], chunk_size)

    def over_chunks(block):
        return products.sum_over_blocks(embed_fn, inputs, None, block, chunk)

    active = over_chunks(_active_units) > 0
    counts = jnp.sum(active, axis=1, dtype=jnp.int32)
    concrete = is_known(counts)
    if most_active is not None:
        walked = min(most_active, embedding_dim)
    elif concrete:
        walked = np.asarray(counts)
    else:
        raise ValueError(
            "skip_inactive=True counts active units on the host and needs concrete arrays; under"
            " jit or vmap also pass the largest number there can be, as in most_active=64; under"
            " grad leave it out"
        )
    wrong = over_chunks(_inactive_squares) != 0
    short = counts > np.int32(np.max(walked))
    if concrete and bool(jnp.any(wrong)):
        raise ValueError(
            f"skip_inactive is wrong for this embed_fn: example {int(jnp.argmax(wrong))} has units"
            " at 0 whose Jacobian rows are not 0; it is for embeddings that end in ReLU"
        )
    if concrete and bool(jnp.any(short)):
        raise ValueError(
            f"most_active={most_active}, but an example has {int(jnp.max(counts))} active units;"
            " pass that or more"
        )
    if inputs[0].size <= np.max(walked) and embed_fn.has_forward_mode():
        norms = products.sum_over_rows(
            embed_fn, inputs, None, _column_squares, inputs[0].size, chunk_size=chunk_size
        )
    else:
        # Active units come first; apart from that the order stays as it is.
        units = jnp.argsort(~active, axis=1, stable=True).astype(jnp.int32)
        norms = products.sum_over_rows(
            embed_fn,
            inputs,
            units,
            _listed_row_squares,
            embedding_dim,
            chunk_size=chunk_size,
            num_walked=walked,
        )
    return _not_differentiable(with_nan(wrong | short, norms))
