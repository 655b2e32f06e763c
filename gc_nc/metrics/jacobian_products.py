"""Squares of Jacobian products, summed in blocks of examples and rows.

Examples do not mix, so one vector-Jacobian or Jacobian-vector product serves a whole chunk of them.
Memory depends on the size of a block, not on B x K x D.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from gc_nc.array_types import (
    Array,
    with_nan,
)
from gc_nc.compilation import jit_for_device
from gc_nc.metrics import mixing_check
from gc_nc.metrics.embedding_functions import Embedding, Replay, chunk_length
from gc_nc.metrics.shared_programs import MOST_PROGRAMS, SharedFunction
from gc_nc.metrics.traced_functions import staged

#: The number of examples times products in one block. It is large enough for a CPU's matmuls to run
# at full speed, and small enough for its activations to fit if those of a training batch do.
PRODUCTS_PER_BLOCK = 256
# The most blocks that are unrolled on the CPU under jit. With more, compilation would cost more
# than is lost because convolutions are slow inside an XLA loop.
_MAX_UNROLLED_BLOCKS = 64

# Blocks and products also return the embeddings, which they have computed anyway.

#: (embed_fn, inputs (n, *input), auxiliary of the examples, first row)
#: -> (n, ...), not negative, and the embeddings (n, K)
Block = Callable[[Callable, jax.Array, jax.Array | None, jax.Array], tuple[jax.Array, jax.Array]]
#: (embed_fn, inputs (n, *input), auxiliary of the examples, rows (R,)) -> (R, n), (n, K)
SquaresFn = Callable[
    [Callable, jax.Array, jax.Array | None, jax.Array], tuple[jax.Array, jax.Array]
]


def pull_back_squares(embed_fn, inputs, cotangents_fn) -> tuple[jax.Array, jax.Array]:
    """Returns |c^T J(x)|^2 (R, n) for cotangents_fn(embeddings) (R, n, K), by one VJP each."""
    products, embeddings = pull_back(embed_fn, inputs, cotangents_fn)
    return _squared_norms(products), embeddings


def pull_back(embed_fn, inputs, cotangents_fn) -> tuple[jax.Array, jax.Array]:
    """Returns c^T J(x), (R, n, *input)."""
    embeddings, vjp_fn = jax.vjp(embed_fn, inputs)
    cotangents = varying_like(cotangents_fn(embeddings).astype(embeddings.dtype), embeddings)
    if len(cotangents) == 1:
        # A single product needs no vmap, which would make tracing take 1.5 times as long.
        products = vjp_fn(cotangents[0])[0][None]
    else:
        (products,) = jax.vmap(vjp_fn)(cotangents)
    return _where_finite(embeddings, products), embeddings


def push_forward(embed_fn, inputs, tangents) -> tuple[jax.Array, jax.Array]:
    """Returns J(x) u (R, n, K) for tangents (R, n, D), by one JVP each."""

    def product(tangent):
        embeddings, product = jax.jvp(embed_fn, (inputs,), (tangent.reshape(inputs.shape),))
        return _where_finite(embeddings, product[None])[0], embeddings

    return jax.vmap(product, out_axes=(0, None))(tangents.astype(inputs.dtype))


def _where_finite(embeddings, products):
    """Makes products NaN where the embedding is not finite: ReLU's slope at NaN would be 0."""
    finite = jnp.all(jnp.isfinite(embeddings), axis=1)
    return with_nan(~finite.reshape(1, -1, *[1] * (products.ndim - 2)), products)


def push_forward_squares(embed_fn, inputs, tangents) -> tuple[jax.Array, jax.Array]:
    """Returns |J(x) u|^2, (R, n)."""
    products, embeddings = push_forward(embed_fn, inputs, tangents)
    return _squared_norms(products), embeddings


def _squared_norms(products):
    return jnp.sum(products**2, axis=tuple(range(2, products.ndim)))


@dataclasses.dataclass(frozen=True)
class RowBlock:
    """Sums `size` rows, starting at a first one; there are `num_rows` in all."""

    squares_fn: SquaresFn
    size: int
    num_rows: int

    def __call__(self, embed_fn, inputs, auxiliary, first_row) -> tuple[jax.Array, jax.Array]:
        """Returns (n,) and the embeddings."""
        rows = first_row + jnp.arange(self.size, dtype=jnp.int32)
        squares, embeddings = self.squares_fn(embed_fn, inputs, auxiliary, rows)
        squares = jnp.where((rows < self.num_rows)[:, None], squares, 0)
        return jnp.sum(squares, axis=0), embeddings


def sum_over_rows(
    embed_fn: Embedding,
    inputs: jax.Array,
    auxiliary: Array | None,
    squares_fn: SquaresFn,
    num_rows: int,
    *,
    chunk_size: int | None = None,
    num_walked: np.ndarray | int | None = None,
) -> jax.Array:
    """Returns the squares of `squares_fn`, summed over rows, (B,).

    Args:
      embed_fn: the function, as `check_embedding` returns it.
      inputs: (B, *input) floating-point inputs.
      auxiliary: (B, ...) what `squares_fn` needs for each example.
      squares_fn: a module-level function, so that equal functions are identical.
      num_rows: number of rows.
      chunk_size: number of examples at a time.
      num_walked: number of rows to compute, if not all; if it is (B,), the largest in each chunk.
    """
    chunk = chunk_length(inputs.shape[0], chunk_size)
    size = min(num_rows, max(1, PRODUCTS_PER_BLOCK // chunk))
    walked = num_rows if num_walked is None else num_walked
    return sum_over_blocks(
        embed_fn, inputs, auxiliary, RowBlock(squares_fn, size, num_rows), chunk, walked, size
    )


def sum_over_blocks(
    embed_fn: Embedding,
    inputs: jax.Array,
    auxiliary: Array | None,
    block: Block,
    chunk: int,
    num_rows: np.ndarray | int = 1,
    rows_per_block: int = 1,
) -> jax.Array:
    """Returns the sum (B,) of a block's values over first rows 0, rows_per_block, ... < num_rows.

    Outside jit a loop on the host runs one compiled block. Under jit the blocks are run by a loop
    on the device or, on the CPU, are unrolled and chained by a data dependency.
    """
    num_examples = inputs.shape[0]
    num_chunks = math.ceil(num_examples / chunk)
    # The last chunk is padded with copies of the last example, for which embed_fn is certainly
    # defined; their values are cut off again.
    padded = np.minimum(np.arange(num_chunks * chunk), num_examples - 1).reshape(-1, chunk)

    def take(index):
        return inputs[index], None if auxiliary is None else auxiliary[index]

    if not staged():
        compiled = compile_block(embed_fn)
        if chunk == 1 < num_examples and not mixing_check.is_switched_off():
            # In chunks of one example, mixing could not be noticed.
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
    """A block whose values are the embeddings."""
    del auxiliary, first_row
    embeddings = embed_fn(inputs)
    return embeddings, embeddings


def _evaluate_block(embed_fn, inputs, auxiliary, first_row, *, block):
    def embed(x):
        return embed_fn(x).astype(jnp.float32)

    # TF32 and bfloat16 passes would ruin the norm; this applies where embed_fn sets no precision.
    with jax.default_matmul_precision("highest"):
        # A derivative with respect to inputs that all devices share would be summed over devices.
        inputs = varying_like(inputs, jax.eval_shape(embed, inputs))
        return block(embed, inputs, auxiliary, first_row)


def varying_like(array, like) -> jax.Array:
    """Returns `array`, marked as varying between the devices of a shard_map if `like` does."""
    return array + jnp.zeros_like(like, shape=(), dtype=array.dtype)


def compile_block(embed_fn: Embedding) -> Callable:
    """Returns a compiled block, which is shared by functions that compute the same.

    At its first call with concrete arrays it checks whether examples mix, and warns if they do.
    """
    alone = SharedFunction(partial(_evaluate_block, embed_fn))
    replays = {}

    def evaluate(inputs, auxiliary, first_row, *, block):
        shape = jax.typeof(inputs)
        if shape not in replays:
            replays[shape] = embed_fn.replay(inputs)
        if replays[shape] is None or _is_traced_anew(block):
            return alone(inputs, auxiliary, first_row, block=block)
        replay, constants = replays[shape]
        return compiled_blocks(replay)(constants, inputs, auxiliary, first_row, block=block)

    check = mixing_check.MixingCheck(embed_fn.function, embed_fn.program)

    def compiled(inputs, auxiliary, first_row, *, block):
        values, embeddings = evaluate(inputs, auxiliary, first_row, block=block)
        check(lambda x: evaluate(x, auxiliary, first_row, block=block)[1], inputs, embeddings)
        return values

    return compiled


def _is_traced_anew(block: Block) -> bool:
    """Whether it has a user's function, whose identity does not determine what it computes."""
    return getattr(getattr(block, "squares_fn", None), "traced_anew", False)


@functools.lru_cache(maxsize=MOST_PROGRAMS)
def compiled_blocks(replay: Replay) -> Callable:
    """Compiled blocks for embeddings that compute the same; blocks differentiate only once."""

    def run(constants, inputs, auxiliary, first_row, *, block):
        embed = partial(replay, constants)
        return _evaluate_block(embed, inputs, auxiliary, first_row, block=block)

    return jit_for_device(run, any_function=True, static_argnames="block")


def _chained_blocks(block, take, padded, first_rows):
    """Unrolls the blocks, since convolutions are about 4.5 times slower in XLA's loops on the CPU.

    Each block's inputs depend on the sum of the block before. Without that, XLA's scheduler could
    run all blocks at once and keep all their activations; optimization barriers do not help, as XLA
    drops them on the CPU before scheduling. XLA does not know that no value is ever negative.
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
