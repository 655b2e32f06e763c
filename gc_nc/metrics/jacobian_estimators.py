"""Unbiased estimates of geometric complexity from a few Jacobian products per example.

Every method gives an unbiased estimate of each example's |J|_F^2, with random products drawn for
that example alone. So the spread of the estimates over examples includes the randomness of both.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Shaped

from gc_nc.array_types import Array, EmbedFn, check_whole
from gc_nc.metrics import jacobian_products as products
from gc_nc.metrics.argument_checks import as_key, check_choice
from gc_nc.metrics.embedding_functions import check_embedding, chunk_length
from gc_nc.metrics.weighted_means import mask_inputs, weighted_mean


class Estimate(NamedTuple):
    """A mean over samples and its standard error (NaN for one sample)."""

    mean: Float[Array, ""]
    sem: Float[Array, ""]


def estimate_squared_jacobian_norms(
    embed_fn: EmbedFn,
    inputs: Shaped[Array, "B ..."],
    key: jax.Array,
    *,
    method: str | Callable = "output_probes",
    num_probes: int = 1,
    chunk_size: int | None = None,
) -> Float[Array, "B"]:
    """Unbiased estimates of each example's |J(x_b)|_F^2; see `estimate_geometric_complexity`.

    Args:
      embed_fn: pure function (B, *input) -> (B, K) in which examples do not mix.
      inputs: (B, *input) in model-input units.
      key: a JAX random key; example b uses `fold_in(key, b)`.
      method: as in `estimate_geometric_complexity`.
      num_probes: m, as in `estimate_geometric_complexity`.
      chunk_size: number of examples differentiated at a time (default 32), which limits memory.

    Returns:
      (B,) float32, in (embedding units / input units)^2.

    Raises:
      ValueError: in the cases in which `estimate_geometric_complexity` raises it.
    """
    if not callable(method):
        or_else = "; nor a function (key, embedding) -> cotangent"
        check_choice(method, ESTIMATION_METHODS, "method", or_else)
    num_probes, key = check_whole(num_probes, 1, "num_probes"), as_key(key)
    embed_fn, inputs = check_embedding(embed_fn, inputs, chunk_size)
    embedding_dim, input_dim = embed_fn.dim, inputs[0].size
    # Every example has its own key, so padding the batch does not change what the others draw.
    examples = jnp.arange(inputs.shape[0], dtype=jnp.int32)
    example_keys = jax.vmap(partial(jax.random.fold_in, key))(examples)
    if callable(method):
        sums = products.sum_over_rows(
            embed_fn, inputs, example_keys, _GivenSquares(method), num_probes, chunk_size=chunk_size
        )
        return sums / num_probes
    forward = method.startswith("input") or (method == "deflated" and num_probes > 2)
    if forward and not embed_fn.has_forward_mode():
        raise ValueError(
            f"method={method!r} needs Jacobian-vector products, but a part of this embed_fn uses"
            " jax.custom_vjp, which does not provide them; use method='output_probes'"
        )
    if method == "deflated":
        chunk = chunk_length(inputs.shape[0], chunk_size)
        chunk = max(1, min(chunk, products.PRODUCTS_PER_BLOCK // num_probes))
        return products.sum_over_blocks(
            embed_fn, inputs, example_keys, _DeflatedBlock(num_probes), chunk
        )
    squares_fn, scale, most = {
        "output_probes": (_output_probe_squares, 1, None),
        "input_probes": (_input_probe_squares, 1, None),
        "output_dims": (_output_dim_squares, embedding_dim, embedding_dim),
        "input_dims": (_input_dim_squares, input_dim, input_dim),
        "jacobian_entries": (_entry_squares, embedding_dim * input_dim, None),
    }[method]
    if most is not None and num_probes > most:
        raise ValueError(
            f"num_probes={num_probes} with method={method!r}: there are only {most} dimensions;"
            f" use {most} or fewer ({most} are already exact)"
        )
    sums = products.sum_over_rows(
        embed_fn, inputs, example_keys, squares_fn, num_probes, chunk_size=chunk_size
    )
    return sums * (scale / num_probes)


def estimate_geometric_complexity(
    embed_fn: EmbedFn,
    inputs: Shaped[Array, "B ..."],
    key: jax.Array,
    *,
    method: str | Callable = "output_probes",
    num_probes: int = 1,
    weights: Shaped[Array, "B"] | None = None,
    chunk_size: int | None = None,
) -> Estimate:
    """Unbiased estimate of geometric complexity from `num_probes` = m products per example.

    With random signs v in R^K and u in R^D, drawn separately for each example:

    * `output_probes`: mean of |J^T v|^2 over m draws of v, one VJP each (Hutchinson 1990).
      Its variance per probe is 2 (|J J^T|_F^2 - sum_i (J J^T)_ii^2).
    * `input_probes`: mean of |J u|^2 over m draws of u, one JVP each. Its variance is the same
      with J^T J in place of J J^T.
    * `output_dims`: K/m times the squared norms of m rows of J, drawn without replacement.
    * `input_dims`: D/m times those of m columns, drawn without replacement.
    * `jacobian_entries`: K D/m times m squared entries of J, drawn with replacement. Here m is the
      number of entries, and each costs a VJP.
    * `deflated`: q = m // 3 JVPs with Gaussian tangents span a space with orthonormal basis Q. q
      VJPs give |Q^T J|_F^2 exactly, and the remaining m - 2q products are output probes of
      (I - Q Q^T) J (the idea of Hutch++, arXiv 2010.09649). With m < 3 it is `output_probes`. Q is
      held fixed when it is differentiated, and the gradient stays unbiased.

    A function (key, z) -> c may be given instead of a name. c (K,) is the cotangent of one probe of
    one example, whose embedding is z (K,), and the estimate is the mean of |J^T c|^2 over m draws.
    Its author must make sure that E[c c^T] = I for every z; then it is unbiased. `output_probes` is
    lambda key, z: jax.random.rademacher(key, z.shape). z is held fixed when it is differentiated.

    The three estimates of arXiv 2405.15706, figure 2, are a subset of the examples, `output_dims`
    and `jacobian_entries`.

    The standard error is std(estimates of the examples, ddof=1) / sqrt(B). It covers both examples
    and probes, and is about the GC of the population that the inputs were drawn from. With weights
    w it is sqrt(sum s^2 (x - mean)^2 / u), where s = w / sum w, x are the examples' estimates and
    u = 1 - (2 sum s^3 - (sum s^2)^2) / sum s^2, which is 1 - 1/B for equal weights.

    Args:
      embed_fn: pure function (B, *input) -> (B, K) in which examples do not mix.
      inputs: (B, *input) in model-input units.
      key: a JAX random key; the same key gives the same estimate.
      method: one of the names above, or a function.
      num_probes: m, the number of Jacobian products per example (entries for `jacobian_entries`).
      weights: (B,) weights, as in `geometric_complexity`.
      chunk_size: number of examples differentiated at a time (default 32).

    Returns:
      Estimate(mean, sem), float32 scalars; sem is NaN for one example.

    Raises:
      ValueError: in the cases in which `geometric_complexity` raises it; the method is unknown, its
        cotangents are not (K,), `num_probes` is below 1, or it exceeds the number of dimensions.
    """
    inputs, weights = mask_inputs(inputs, weights)
    norms = estimate_squared_jacobian_norms(
        embed_fn, inputs, key, method=method, num_probes=num_probes, chunk_size=chunk_size
    )
    return Estimate(*weighted_mean(norms, weights))


#: The values of `method`.
ESTIMATION_METHODS = (
    "output_probes",
    "input_probes",
    "output_dims",
    "input_dims",
    "jacobian_entries",
    "deflated",
)


def _draw(example_keys, rows, draw_fn):
    """Returns draw_fn(key) with a key for each row and example, (R, n, ...)."""

    def draw(row, example_key):
        return draw_fn(jax.random.fold_in(example_key, row))

    return jax.vmap(jax.vmap(draw, (None, 0)), (0, None))(rows, example_keys)


def random_signs(example_keys, rows, dim) -> jax.Array:
    """Returns independent signs (R, n, dim)."""
    return _draw(example_keys, rows, lambda key: signs(key, (dim,)))


def signs(key, shape) -> jax.Array:
    """Returns independent signs, as jax.random.rademacher draws them without jax_enable_x64."""
    positive = jax.random.bernoulli(key, jnp.float32(0.5), shape)
    return (2 * positive.astype(jnp.int32) - 1).astype(jnp.float32)


def _output_probe_squares(embed_fn, inputs, example_keys, rows):
    return products.pull_back_squares(
        embed_fn, inputs, lambda z: random_signs(example_keys, rows, z.shape[1])
    )


@dataclasses.dataclass(frozen=True)
class _GivenSquares:
    """Squares for cotangents from the user's function, which may close over things that change."""

    sampler: Callable
    traced_anew = True

    def __call__(self, embed_fn, inputs, example_keys, rows):
        def cotangents(embeddings):
            def draw(row, example_key, embedding):
                drawn = jnp.asarray(self.sampler(jax.random.fold_in(example_key, row), embedding))
                if drawn.shape != embedding.shape:
                    raise ValueError(
                        f"method returned a cotangent of shape {drawn.shape} for an embedding of"
                        f" shape {embedding.shape}; the same shape is needed"
                    )
                return drawn

            of_examples = jax.vmap(jax.vmap(draw, (None, 0, 0)), (0, None, None))
            return of_examples(rows, example_keys, jax.lax.stop_gradient(embeddings))

        return products.pull_back_squares(embed_fn, inputs, cotangents)


def _input_probe_squares(embed_fn, inputs, example_keys, rows):
    signs = random_signs(example_keys, rows, inputs[0].size)
    return products.push_forward_squares(embed_fn, inputs, signs)


def _random_units(example_keys, rows, dim):
    """Returns one-hot vectors (R, n, dim) of place `row` in a random order that each key gives."""
    places = jnp.arange(dim, dtype=jnp.int32)
    order = jax.vmap(lambda key: jax.random.permutation(key, places))(example_keys)
    return jax.nn.one_hot(order[:, jnp.minimum(rows, dim - 1)].T, dim, dtype=jnp.float32)


def _output_dim_squares(embed_fn, inputs, example_keys, rows):
    return products.pull_back_squares(
        embed_fn, inputs, lambda z: _random_units(example_keys, rows, z.shape[1])
    )


def _input_dim_squares(embed_fn, inputs, example_keys, rows):
    units = _random_units(example_keys, rows, inputs[0].size)
    return products.push_forward_squares(embed_fn, inputs, units)


def _entry_squares(embed_fn, inputs, example_keys, rows):
    """Draws entries with replacement: a permutation of all K D entries may not fit in memory."""

    def random_units(embeddings):
        dim = embeddings.shape[1]
        drawn = _draw(example_keys, rows, lambda key: _random_place(key, dim))
        return jax.nn.one_hot(drawn, dim, dtype=jnp.float32)

    jacobian_rows, embeddings = products.pull_back(embed_fn, inputs, random_units)
    jacobian_rows = jacobian_rows.reshape(*jacobian_rows.shape[:2], -1)
    dim = jacobian_rows.shape[2]
    column_keys = jax.vmap(lambda key: jax.random.fold_in(key, 2**32 - 1))(example_keys)
    drawn = _draw(column_keys, rows, lambda key: _random_place(key, dim))
    return jnp.take_along_axis(jacobian_rows, drawn[..., None], axis=2)[..., 0] ** 2, embeddings


def _random_place(key, dim):
    return jax.random.randint(key, (), 0, dim, jnp.int32)


@dataclasses.dataclass(frozen=True)
class _DeflatedBlock:
    """Computes all products of a chunk at once, since the probes need the basis."""

    num_probes: int

    def __call__(self, embed_fn, inputs, example_keys, first_row):
        num_basis = self.num_probes // 3
        num_rest = self.num_probes - 2 * num_basis
        probe_rows = first_row + jnp.arange(num_rest, dtype=jnp.int32)
        if not num_basis:
            squares, embeddings = _output_probe_squares(embed_fn, inputs, example_keys, probe_rows)
            return jnp.mean(squares, axis=0), embeddings
        tangents = _draw(
            example_keys,
            num_rest + jnp.arange(num_basis, dtype=jnp.int32),
            lambda key: jax.random.normal(key, (inputs[0].size,), jnp.float32),
        )
        sketch = jax.lax.stop_gradient(products.push_forward(embed_fn, inputs, tangents)[0])
        # (n, K, q). Any orthonormal basis is valid, so a sketch of low rank does no harm.
        basis = jnp.linalg.qr(jnp.moveaxis(sketch, 0, 2))[0]
        num_basis = basis.shape[2]

        def cotangents(embeddings):
            signs = random_signs(example_keys, probe_rows, embeddings.shape[1])
            inside = jnp.einsum("nkq,rnk->rnq", basis, signs)
            rest = signs - jnp.einsum("nkq,rnq->rnk", basis, inside)
            return jnp.concatenate([jnp.moveaxis(basis, 2, 0), rest])

        squares, embeddings = products.pull_back_squares(embed_fn, inputs, cotangents)
        inside, rest = squares[:num_basis], squares[num_basis:]
        return jnp.sum(inside, axis=0) + jnp.mean(rest, axis=0), embeddings
