"""Squares of Jacobian products, summed in blocks of examples and rows.

Examples do not mix, so one vector-Jacobian or Jacobian-vector product serves a whole chunk of them.
Memory follows the size of a block, not B x K x D.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from gc_nc.array_types import (
    Array,
    EmbedFn,
    as_floating,
    as_weights,
    check_whole,
    is_known,
    with_nan,
)
from gc_nc.compilation import jit_for_device
from gc_nc.metrics import mixing_check
from gc_nc.metrics.argument_checks import check_function
from gc_nc.metrics.functions_by_value import comparable

#: Examples times products that one block carries. Large enough for a CPU's matmuls to run at full
# rate, small enough that its activations fit where those of a training batch do.
PRODUCTS_PER_BLOCK = 256
_DEFAULT_CHUNK_SIZE = 32
# Unrolled blocks a traced caller may get on the CPU before compilation costs more than the
# slowness of convolutions inside an XLA loop.
_MAX_UNROLLED_BLOCKS = 64

# Blocks and products return the embeddings too, which they have computed anyway.

#: (embed_fn, inputs (n, *input), auxiliary of the examples, first row)
#: -> (n, ...), not negative, and the embeddings (n, K)
Block = Callable[[EmbedFn, jax.Array, jax.Array | None, jax.Array], tuple[jax.Array, jax.Array]]
#: (embed_fn, inputs (n, *input), auxiliary of the examples, rows (R,)) -> (R, n), (n, K)
SquaresFn = Callable[[EmbedFn, jax.Array, jax.Array | None, jax.Array], tuple[jax.Array, jax.Array]]


def pull_back_squares(embed_fn, inputs, cotangents_fn) -> tuple[jax.Array, jax.Array]:
    """(R, n): |c^T J(x)|^2 for cotangents_fn(embeddings) of shape (R, n, K), by one VJP each."""
    products, embeddings = pull_back(embed_fn, inputs, cotangents_fn)
    return _squared_norms(products), embeddings


def pull_back(embed_fn, inputs, cotangents_fn) -> tuple[jax.Array, jax.Array]:
    """(R, n, *input): c^T J(x)."""
    embeddings, vjp_fn = jax.vjp(embed_fn, inputs)
    cotangents = varying_like(cotangents_fn(embeddings).astype(embeddings.dtype), embeddings)
    (products,) = jax.vmap(vjp_fn)(cotangents)
    return _where_finite(embeddings, products), embeddings


def push_forward(embed_fn, inputs, tangents) -> tuple[jax.Array, jax.Array]:
    """(R, n, K): J(x) u for tangents (R, n, D), by one JVP each."""

    def product(tangent):
        embeddings, product = jax.jvp(embed_fn, (inputs,), (tangent.reshape(inputs.shape),))
        return _where_finite(embeddings, product[None])[0], embeddings

    return jax.vmap(product, out_axes=(0, None))(tangents.astype(inputs.dtype))


def _where_finite(embeddings, products):
    """NaN for examples without a finite embedding: ReLU takes NaN to slope 0, "perfectly flat"."""
    finite = jnp.all(jnp.isfinite(embeddings), axis=1)
    return with_nan(~finite.reshape(1, -1, *[1] * (products.ndim - 2)), products)


def push_forward_squares(embed_fn, inputs, tangents) -> tuple[jax.Array, jax.Array]:
    """(R, n): |J(x) u|^2."""
    products, embeddings = push_forward(embed_fn, inputs, tangents)
    return _squared_norms(products), embeddings


def _squared_norms(products):
    return jnp.sum(products**2, axis=tuple(range(2, products.ndim)))


@dataclasses.dataclass(frozen=True)
class RowBlock:
    """The sum of `size` rows from the first on, of which there are `num_rows` in all."""

    squares_fn: SquaresFn
    size: int
    num_rows: int

    def __call__(self, embed_fn, inputs, auxiliary, first_row) -> tuple[jax.Array, jax.Array]:
        """Returns (n,) and the embeddings."""
        rows = first_row + jnp.arange(self.size, dtype=jnp.int32)
        squares, embeddings = self.squares_fn(embed_fn, inputs, auxiliary, rows)
        squares = jnp.where((rows < self.num_rows)[:, None], squares, 0)
        return jnp.sum(squares, axis=0), embeddings


def chunk_length(num_examples: int, chunk_size: int | None) -> int:
    """Examples in a chunk: equal ones, which waste least on the remainder.

    Raises:
      ValueError: `chunk_size` below 1 or not whole.
    """
    if chunk_size is not None:
        chunk_size = check_whole(chunk_size, 1, "chunk_size")
    return math.ceil(num_examples / math.ceil(num_examples / (chunk_size or _DEFAULT_CHUNK_SIZE)))


def sum_over_rows(
    embed_fn: EmbedFn,
    inputs: jax.Array,
    auxiliary: Array | None,
    squares_fn: SquaresFn,
    num_rows: int,
    *,
    chunk_size: int | None = None,
    num_walked: np.ndarray | int | None = None,
) -> jax.Array:
    """(B,): the squares of `squares_fn`, summed over rows.

    Args:
      embed_fn: as everywhere.
      inputs: (B, *input), floating.
      auxiliary: (B, ...) what `squares_fn` needs of each example.
      squares_fn: a module-level function, which its identity describes.
      num_rows: how many there are.
      chunk_size: examples at a time.
      num_walked: how many rows to walk: one number, or (B,) of which the largest in a chunk counts.
    """
    chunk = chunk_length(inputs.shape[0], chunk_size)
    size = min(num_rows, max(1, PRODUCTS_PER_BLOCK // chunk))
    walked = num_rows if num_walked is None else num_walked
    return sum_over_blocks(
        embed_fn, inputs, auxiliary, RowBlock(squares_fn, size, num_rows), chunk, walked, size
    )


def sum_over_blocks(
    embed_fn: EmbedFn,
    inputs: jax.Array,
    auxiliary: Array | None,
    block: Block,
    chunk: int,
    num_rows: np.ndarray | int = 1,
    rows_per_block: int = 1,
) -> jax.Array:
    """(B,): the sum of a block's values over first rows 0, rows_per_block, ... < num_rows.

    With concrete inputs a host loop over one compiled block; when traced a device loop, or on the
    CPU blocks chained by a data dependency.
    """
    num_examples = inputs.shape[0]
    num_chunks = math.ceil(num_examples / chunk)
    # The remainder is filled up with copies of the last example, where embed_fn is as well defined
    # as it is there, and then cut off.
    padded = np.minimum(np.arange(num_chunks * chunk), num_examples - 1).reshape(-1, chunk)

    def take(index):
        return inputs[index], None if auxiliary is None else auxiliary[index]

    if not staged():
        compiled = compile_block(embed_fn)
        if chunk == 1 < num_examples and not mixing_check.is_switched_off():
            # Alone, an example has no other to mix with.
            compiled(inputs[:2], None, 0, block=embeddings_of)
        sums = []
        for index in padded:
            x, aux = take(index)
            limit = int(np.max(np.broadcast_to(num_rows, num_examples)[index]))
            first_rows = range(0, max(limit, 1), rows_per_block)
            sums.append(sum(compiled(x, aux, row, block=block) for row in first_rows))
        return jnp.concatenate(sums)[:num_examples]

    first_rows = range(0, max(int(np.max(num_rows)), 1), rows_per_block)
    evaluate = partial(_evaluate_block, embed_fn, block=block)

    def block(*arguments):
        return evaluate(*arguments)[0]

    if jax.default_backend() == "cpu" and num_chunks * len(first_rows) <= _MAX_UNROLLED_BLOCKS:
        sums = _chained_blocks(block, take, padded, first_rows)
    else:
        sums = _looped_blocks(block, take, padded, jnp.asarray(first_rows, jnp.int32))
    return sums.reshape(-1, *sums.shape[2:])[:num_examples]


def embeddings_of(embed_fn, inputs, auxiliary, first_row):
    """A block of the embeddings alone."""
    del auxiliary, first_row
    embeddings = embed_fn(inputs)
    return embeddings, embeddings


def _evaluate_block(embed_fn, inputs, auxiliary, first_row, *, block):
    def embed(x):
        return _embed(embed_fn, x).astype(jnp.float32)

    # TF32 and bfloat16 passes would ruin the norm; this governs what embed_fn itself left open.
    with jax.default_matmul_precision("highest"):
        # The derivative by inputs that all devices share would be summed over the devices.
        inputs = varying_like(inputs, jax.eval_shape(embed, inputs))
        return block(embed, inputs, auxiliary, first_row)


def varying_like(array, like) -> jax.Array:
    """`array`, as one that differs between the devices of a shard_map if `like` does."""
    return array + jnp.zeros_like(like, shape=(), dtype=array.dtype)


_evaluate_compiled = jit_for_device(_evaluate_block, any_function=True, static_argnames="block")


def compile_block(embed_fn: EmbedFn) -> Callable:
    """A compiled block, shared between calls only where a shared one cannot be stale.

    At its first call with concrete arrays it looks whether examples mix, and warns.
    """
    shared = comparable(embed_fn)
    if shared is not None:
        evaluate = partial(_evaluate_compiled, shared)
        check = mixing_check.MixingCheck(embed_fn, mixing_check.program_of(shared))
    else:
        evaluate = jit_for_device(
            partial(_evaluate_block, embed_fn), any_function=True, static_argnames="block"
        )
        check = mixing_check.MixingCheck(embed_fn)

    def compiled(inputs, auxiliary, first_row, *, block):
        values, embeddings = evaluate(inputs, auxiliary, first_row, block=block)
        check(lambda x: evaluate(x, auxiliary, first_row, block=block)[1], inputs, embeddings)
        return values

    return compiled


def _chained_blocks(block, take, padded, first_rows):
    """Unrolled, since XLA's CPU loops run convolutions about 4.5 times slower than outside.

    Each block's inputs depend on the sum of the block before: free to run at once, XLA's scheduler
    would keep all their activations alive, and it drops optimization barriers on the CPU before it
    schedules. Blocks have no negative values, which XLA does not know.
    """
    sums = []
    previous = jnp.zeros((), jnp.float32)
    for index in padded:
        total = 0.0
        for row in first_rows:
            x, aux = take(index)
            x = jnp.where(previous < 0, jnp.nan, x)
            values = block(x, aux, row)
            total = total + values
            previous = values.ravel()[0]
        sums.append(total)
    return jnp.stack(sums)


def _looped_blocks(block, take, padded, first_rows):
    def chunk_sums(index):
        x, aux = take(index)

        def add_block(total, row):
            return total + block(x, aux, row), None

        like = jax.eval_shape(block, x, aux, first_rows[0])
        return jax.lax.scan(add_block, jnp.zeros_like(like), first_rows)[0]

    return jax.lax.map(chunk_sums, jnp.asarray(padded, jnp.int32))


def staged() -> bool:
    """Whether we are inside jit, where a host loop would unroll into one program."""
    return isinstance(jnp.zeros(()), jax.core.Tracer)


def _embed(embed_fn, inputs):
    try:
        return embed_fn(inputs)
    except (TypeError, ValueError, AssertionError) as error:
        cause = next(iter(str(error).splitlines()), "")
        raise ValueError(
            f"embed_fn fails for {inputs.shape[0]} examples of shape {inputs.shape[1:]}"
            f" ({type(error).__name__}: {cause}); it must take any number of examples, or else"
            " chunk_size must be the number that it takes"
        ) from error


def check_embedding(embed_fn: EmbedFn, inputs: Array) -> tuple[jax.Array, int]:
    """Returns the inputs in a differentiable dtype, and K.

    Raises:
      ValueError: no examples, or `embed_fn` does not return real (B, K).
    """
    check_function(embed_fn, "embed_fn", "(B, *input) -> (B, K)")
    inputs = as_floating(inputs, "inputs")
    if inputs.ndim == 0 or inputs.shape[0] == 0:
        raise ValueError(f"inputs of shape {inputs.shape} hold no example; at least 1 is needed")
    # Inside jit nothing is gained, and leaves that are Python numbers may stay such.
    shared = None if staged() else comparable(embed_fn)
    if shared is not None:
        output = jax.eval_shape(_embed, shared, inputs)
    else:
        # A new function each time: eval_shape would remember the shape of an old state.
        output = jax.eval_shape(lambda x: _embed(embed_fn, x), inputs)
    shape = getattr(output, "shape", None)
    if shape is None:
        raise ValueError(
            f"embed_fn returned a {type(output).__name__}, not one array (B, K); return the"
            " embedding alone, as in: lambda x: model.apply(variables, x)[1]"
        )
    if len(shape) != 2 or shape[0] != inputs.shape[0] or shape[1] == 0:
        raise ValueError(
            f"embed_fn returned shape {shape} for {inputs.shape[0]} examples; (B, K) ="
            f" ({inputs.shape[0]}, K) is needed, so flatten each example's features"
        )
    if not jnp.issubdtype(output.dtype, jnp.floating):
        raise ValueError(f"embed_fn returned {output.dtype}; real floating point is needed")
    return inputs, shape[1]


def mask_inputs(inputs: Array, weights: Array | None) -> tuple[jax.Array, jax.Array | None]:
    """Replaces rows of weight 0 by a row that counts, so that nothing they hold can leak."""
    inputs = as_floating(inputs, "inputs")
    if weights is None or inputs.ndim == 0 or inputs.shape[0] == 0:
        return inputs, None
    weights = as_weights(weights, inputs.shape[0])
    if is_known(weights) and not bool(jnp.any(weights > 0)):
        raise ValueError("all weights are 0, so no example counts; give one a weight above 0")
    counts = (weights > 0).reshape(-1, *[1] * (inputs.ndim - 1))
    stand_in = inputs[jnp.argmax(weights)][None]
    return jnp.where(counts, inputs, stand_in), weights


def weighted_mean(values: Array, weights: Array | None) -> tuple[jax.Array, jax.Array]:
    """The mean and its standard error; for equal weights std(ddof=1) / sqrt(B).

    With shares s = w / sum w, sem^2 = sum s^2 (x - mean)^2 / u, where
    u = 1 - (2 sum s^3 - (sum s^2)^2) / sum s^2 makes it unbiased if the spread is the same for all
    weights; if not, it is right for many examples.
    """
    if weights is None:
        weights = jnp.ones_like(values)
    # Sums and squares of what float32 only just holds would be out of range. A power of two, since
    # XLA may multiply by a reciprocal, which it flushes to 0.
    weights = weights / power_of_two_near(jnp.max(weights))
    size = power_of_two_near(jnp.max(jnp.where(weights > 0, jnp.abs(values), 0)))
    values = values / size
    total = jnp.sum(weights)
    shares = weights / total
    # Divided last: equal values have just that mean.
    mean = jnp.sum(weights * values) / total
    inverse_count = jnp.sum(shares**2)
    # What of E (x - mean)^2 is left for each, written so that nothing cancels.
    left = (1 - shares) ** 2 + (inverse_count - shares**2)
    left = jnp.sum(shares**2 * left) / inverse_count
    # The spread of one example is unknown, not 0.
    known = (jnp.sum(weights > 0, dtype=jnp.int32) > 1) & (left > 0)
    variance = jnp.sum(shares**2 * (values - mean) ** 2) / jnp.where(known, left, 1)
    varies = variance > 0
    # At 0 the gradient of a square root is NaN; it is taken to be 0. NaN stays NaN.
    sem = jnp.where(varies, jnp.sqrt(jnp.where(varies, variance, 1)), 0 * variance)
    return size * mean, with_nan(~known, size * sem)


def power_of_two_near(size: jax.Array) -> jax.Array:
    """The power of two at or below a size, by which dividing is exact; 1 for 0, inf and NaN.

    At most 2^125, whose reciprocal XLA may multiply by instead and does not flush to 0.
    """
    size = jax.lax.stop_gradient(size)
    usable = (size > 0) & jnp.isfinite(size)
    exponent = jnp.frexp(jnp.where(usable, size, 1))[1] - 1
    return jnp.ldexp(jnp.ones_like(size), jnp.minimum(exponent, 125))
