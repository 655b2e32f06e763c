"""The spectral norm of an embedding's input Jacobian, as a complement to its Frobenius norm.

|J|_2 is the largest factor by which a change of the input is stretched. |J|_F^2 / |J|_2^2, the
stable rank, says how many directions of the embedding move. GC is the mean of |J|_2^2 times it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped

from gc_nc.array_types import Array, EmbedFn, check_whole
from gc_nc.metrics import jacobian_products as products
from gc_nc.metrics.argument_checks import as_key
from gc_nc.metrics.embedding_functions import check_embedding, chunk_length


def squared_jacobian_spectral_norms(
    embed_fn: EmbedFn,
    inputs: Shaped[Array, "B ..."],
    key: jax.Array,
    *,
    num_iterations: int = 20,
    chunk_size: int | None = None,
) -> Float[Array, "B"]:
    """|J(x_b)|_2^2, the largest eigenvalue of J J^T, by power iteration.

    Starting with a Gaussian c, c <- J J^T c / |J J^T c| is repeated `num_iterations` times. The
    result |J^T c|^2 is at most the true value (up to rounding). Each iteration multiplies the error
    by (l_2 / l_1)^2, where l_1 and l_2 are the largest eigenvalues of J J^T. It is exact for K = 1.
    It takes 2 `num_iterations` + 1 Jacobian products per example: a VJP and a JVP per iteration,
    and a final VJP.

    `squared_jacobian_norms` divided by this is the stable rank |J|_F^2 / |J|_2^2, between 1 and the
    rank.

    Args:
      embed_fn: pure function (B, *input) -> (B, K) in which examples do not mix.
      inputs: (B, *input) in model-input units.
      key: random key of the start vectors; example b uses `fold_in(key, b)`.
      num_iterations: number of iterations, at least 1.
      chunk_size: number of examples differentiated at a time (default 32).

    Returns:
      (B,) float32, in (embedding units / input units)^2; 0 where J is 0, NaN for an example whose
      embedding is not finite.

    Raises:
      ValueError: there are no examples, a number is below 1, or `embed_fn` does not return (B, K)
        or uses `jax.custom_vjp`, which does not provide Jacobian-vector products.
    """
    num_iterations, key = check_whole(num_iterations, 1, "num_iterations"), as_key(key)
    embed_fn, inputs = check_embedding(embed_fn, inputs, chunk_size)
    embedding_dim, num_examples = embed_fn.dim, inputs.shape[0]
    chunk = chunk_length(num_examples, chunk_size)
    if inputs[0].size == 0:
        return jnp.zeros(num_examples, inputs.dtype)
    if not embed_fn.has_forward_mode():
        raise ValueError(
            "the spectral norm needs Jacobian-vector products, but a part of this embed_fn uses"
            " jax.custom_vjp, which does not provide them; use jax.custom_jvp there"
        )
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num_examples, dtype=jnp.int32))
    start = jax.vmap(lambda key: jax.random.normal(key, (embedding_dim,), jnp.float32))(keys)
    if products.staged():
        block = _PowerIteration(num_iterations)
        return products.sum_over_blocks(embed_fn, inputs, start, block, chunk)
    # The loop runs on the host, since XLA's CPU loops make convolutions several times slower.
    compiled = products.compile_block(embed_fn)
    found = []
    for first in range(0, num_examples, chunk):
        index = np.minimum(np.arange(first, first + chunk), num_examples - 1)
        x, vectors = inputs[index], start[index]
        for _ in range(num_iterations):
            vectors = compiled(x, vectors, 0, block=_step)
        found.append(compiled(x, vectors, 0, block=_rayleigh_quotients))
    return jnp.concatenate(found)[:num_examples]


def _step(embed_fn, inputs, vectors, first_row):
    """Returns J J^T c, normalised to length 1, (n, K)."""
    del first_row
    pulled, embeddings = products.pull_back(embed_fn, inputs, lambda z: _unit(vectors)[None])
    # Also normalised between the two products, because the square of |J| may be out of range.
    pulled = _unit(pulled.reshape(len(inputs), -1))
    pushed, _ = products.push_forward(embed_fn, inputs, pulled[None])
    return _unit(pushed[0]), embeddings


def _rayleigh_quotients(embed_fn, inputs, vectors, first_row):
    """Returns |J^T c|^2, (n,)."""
    del first_row
    squares, embeddings = products.pull_back_squares(
        embed_fn, inputs, lambda z: _unit(vectors)[None]
    )
    return squares[0], embeddings


def _unit(vectors):
    """Returns the rows normalised to length 1; rows of 0 stay 0."""
    largest = jnp.max(jnp.abs(vectors), axis=1, keepdims=True)
    scaled = vectors / jnp.where(largest > 0, largest, 1)
    length = jnp.sqrt(jnp.sum(scaled**2, axis=1, keepdims=True))
    return scaled / jnp.where(length > 0, length, 1)


@dataclasses.dataclass(frozen=True)
class _PowerIteration:
    """Runs all iterations in one program."""

    num_iterations: int

    def __call__(self, embed_fn, inputs, start, first_row):
        def iterate(_, vectors):
            return _step(embed_fn, inputs, vectors, first_row)[0]

        start = products.varying_like(start, jax.eval_shape(embed_fn, inputs))
        vectors = jax.lax.fori_loop(0, self.num_iterations, iterate, start)
        return _rayleigh_quotients(embed_fn, inputs, vectors, first_row)
