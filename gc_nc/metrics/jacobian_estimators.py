"""Unbiased estimates of geometric complexity from a few Jacobian products an example.

Every method gives an unbiased estimate of each example's |J|_F^2 from random products of its own,
so that the spread of the estimates over examples covers examples and products alike.
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
    """An unbiased estimate of each example's |J(x_b)|_F^2; see `estimate_geometric_complexity`.

    Args:
      embed_fn: pure function (B, *input) -> (B, K) in which examples do not mix.
      inputs: (B, *input) in model-input units.
      key: a JAX random key; each example draws from `fold_in(key, b)`.
      method: as in `estimate_geometric_complexity`.
      num_probes: m, as there.
      chunk_size: examples differentiated at a time (default 32), which bounds the memory in use.

    Returns:
      (B,) float32, in (embedding units / input units)^2.

    Raises:
      ValueError: as `estimate_geometric_complexity`.
    """
    if not callable(method):
        or_else = "; nor a function (key, embedding) -> cotangent"
        check_choice(method, ESTIMATION_METHODS, "method", or_else)
    num_probes, key = check_whole(num_probes, 1, "num_probes"), as_key(key)
    embed_fn, inputs = check_embedding(embed_fn, inputs, chunk_size)
    embedding_dim, input_dim = embed_fn.dim, inputs[0].size
    # A key an example: padding the batch does not change what the others draw.
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
            f"method={method!r} needs Jacobian-vector products, but a part of this embed_fn has"
            " jax.custom_vjp, which gives none; take method='output_probes'"
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
            f"num_probes={num_probes} with method={method!r}: there are only {most} dimensions, and"
            " that many are already exact"
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
    """Unbiased estimate of geometric complexity from `num_probes` = m products an example.

    With v and u random signs in R^K and R^D, drawn for each example on its own:

    * `output_probes`: mean of |J^T v|^2 over m draws of v, a VJP each (Hutchinson 1990).
      Var = 2 (|J J^T|_F^2 - sum_i (J J^T)_ii^2) a probe.
    * `input_probes`: mean of |J u|^2 over m draws of u, a JVP each. Var as above, of J^T J.
    * `output_dims`: K/m times the squared norms of m rows of J, drawn without replacement.
    * `input_dims`: D/m times those of m columns, drawn without replacement.
    * `jacobian_entries`: K D/m times m squared entries of J, drawn with replacement. Here m counts
      entries; each costs a VJP.
    * `deflated`: q = m // 3 JVPs with Gaussian tangents span a space with orthonormal basis Q;
      |Q^T J|_F^2 exactly by q VJPs, and the m - 2q that remain are output probes of (I - Q Q^T) J
      (the idea of Hutch++, arXiv 2010.09649). With m < 3 it is `output_probes`. Differentiated, it
      holds Q fixed, which leaves the gradient unbiased.

    A function (key, z) -> c takes the place of a name: c (K,) is the cotangent of one probe of one
    example, whose embedding is z (K,), and the estimate is the mean of |J^T c|^2 over m draws. It
    is unbiased if E[c c^T] = I for every z, which is for its author to see to; `output_probes` is
    lambda key, z: jax.random.rademacher(key, z.shape). z is held fixed when it is differentiated.

    The three of arXiv 2405.15706, figure 2, are subsets of examples with `output_dims` and with
    `jacobian_entries`.

    The standard error is std(estimates of the examples, ddof=1) / sqrt(B): it covers examples and
    probes, and is about the GC of the population that the inputs were drawn from. With weights w it
    is sqrt(sum s^2 (x - mean)^2 / u), s = w / sum w, x the examples' estimates and
    u = 1 - (2 sum s^3 - (sum s^2)^2) / sum s^2, which is 1 - 1/B for equal weights.

    Args:
      embed_fn: pure function (B, *input) -> (B, K) in which examples do not mix.
      inputs: (B, *input) in model-input units.
      key: a JAX random key; the same key gives the same estimate.
      method: one of the above, or a function.
      num_probes: m, Jacobian products an example (entries, for `jacobian_entries`).
      weights: (B,) as in `geometric_complexity`.
      chunk_size: examples differentiated at a time (default 32).

    Returns:
      Estimate(mean, sem), float32 scalars; sem is NaN for one example.

    Raises:
      ValueError: as `geometric_complexity`; an unknown method, a function whose cotangents are not
        (K,), `num_probes` below 1, or more dimensions asked for than there are.
    """
    inputs, weights = products.mask_inputs(inputs, weights)
    norms = estimate_squared_jacobian_norms(
        embed_fn, inputs, key, method=method, num_probes=num_probes, chunk_size=chunk_size
    )
    return Estimate(*products.weighted_mean(norms, weights))


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
    """(R, n, ...): draw_fn of a key for each row and example."""

    def draw(row, example_key):
        return draw_fn(jax.random.fold_in(example_key, row))

    return jax.vmap(jax.vmap(draw, (None, 0)), (0, None))(rows, example_keys)


def random_signs(example_keys, rows, dim) -> jax.Array:
    """(R, n, dim) independent signs."""
    return _draw(example_keys, rows, lambda key: signs(key, (dim,)))


def signs(key, shape) -> jax.Array:
    """Independent signs, as jax.random.rademacher draws them where 64 bits are off."""
    positive = jax.random.bernoulli(key, jnp.float32(0.5), shape)
    return (2 * positive.astype(jnp.int32) - 1).astype(jnp.float32)


def _output_probe_squares(embed_fn, inputs, example_keys, rows):
    return products.pull_back_squares(
        embed_fn, inputs, lambda z: random_signs(example_keys, rows, z.shape[1])
    )


@dataclasses.dataclass(frozen=True)
class _GivenSquares:
    """Of cotangents that the caller draws, by a function that may close over what changes."""

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
    """(R, n, dim): one-hot of place `row` in a random order of the dimensions, an order a key."""
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
    """With replacement: an order of all K D entries would not fit where J itself does not."""

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
    """All products of a chunk at once, since the probes need the basis."""

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
        # (n, K, q); any orthonormal basis is right, so that a sketch of low rank does no harm.
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
