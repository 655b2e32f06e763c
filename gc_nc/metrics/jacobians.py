"""Geometric complexity: the mean squared Frobenius norm of an embedding's input Jacobian.

GC = 1/B sum_b |J(x_b)|_F^2,  J(x) = df/dx in R^(K x D)          (arXiv 2209.13083, 2405.15706)

It is a squared norm summed over all K x D entries: no square root (whose gradient is NaN at 0), no
mean over entries. x is in the units the network sees, so pixels divided by sigma scale GC by
sigma^2.

Every function here takes one pass over *Jacobian products*: cotangents c in R^K pulled back to
c^T J by one VJP for a whole chunk of examples at once, which is right because examples do not mix.
One-hot cotangents give the rows of J and so the exact value, random signs an unbiased estimate.
"""

import contextlib
import dataclasses
import types
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Shaped

from gc_nc.array_types import Array, EmbedFn, as_floating, as_weights

# Examples times cotangents that one VJP carries. Large enough for a CPU's matmuls to run at full
# rate, small enough that its activations fit where those of a training batch do.
_PRODUCTS_PER_VJP = 256
_DEFAULT_CHUNK_SIZE = 32
# Unrolled blocks a traced caller may get on the CPU before compilation costs more than the
# slowness of convolutions inside an XLA loop.
_MAX_UNROLLED_BLOCKS = 64


class Estimate(NamedTuple):
    """A mean over examples and its standard error (NaN for one example)."""

    mean: Float[Array, ""]
    sem: Float[Array, ""]


def jacobian_norms(
    embed_fn: EmbedFn, inputs: Shaped[Array, "B ..."], *, chunk_size: int | None = None
) -> Float[Array, "B"]:
    """Exact |J(x_b)|_F^2 of each example, J = d embed_fn / dx.

    Costs K vector-Jacobian products an example. With concrete inputs a host loop runs one compiled
    block over chunks of examples and blocks of rows; inside jit the same blocks are chained by a
    data dependency on the CPU and looped on the device elsewhere. Either way the memory in use
    follows `chunk_size`, not B x K x D.

    A plain `embed_fn` is compiled at every call, because its identity says nothing of the values it
    closes over. Give a `jax.tree_util.Partial`, whose leaves are traced, to compile once.

    Args:
      embed_fn: pure function (B, *input) -> (B, K) in which examples do not mix.
      inputs: (B, *input) in model-input units; integers and half precision are cast to float32.
      chunk_size: examples differentiated at a time (default 32); need not divide B.

    Returns:
      (B,) float32, in (embedding units / input units)^2.

    Raises:
      ValueError: no examples, `chunk_size` below 1, or `embed_fn` does not return (B, K).
    """
    inputs, embedding_dim = _check_embedding(embed_fn, inputs)
    return _sum_of_squared_products(
        embed_fn, inputs, None, _one_hot_cotangents, embedding_dim, embedding_dim, chunk_size
    )


def geometric_complexity(
    embed_fn: EmbedFn,
    inputs: Shaped[Array, "B ..."],
    *,
    weights: Shaped[Array, "B"] | None = None,
    chunk_size: int | None = None,
) -> Float[Array, ""]:
    """Exact geometric complexity sum_b w_b |J(x_b)|_F^2 / sum_b w_b (arXiv 2405.15706, section 3).

    Args:
      embed_fn: pure function (B, *input) -> (B, K) in which examples do not mix.
      inputs: (B, *input) in model-input units.
      weights: (B,) not negative; 1 each by default. A row of weight 0 counts nowhere and may hold
        anything, NaN included.
      chunk_size: examples differentiated at a time, as in `jacobian_norms`.

    Returns:
      Scalar, float32.

    Raises:
      ValueError: as `jacobian_norms`; weights of another length, negative or (outside jit) all 0.
        Under jit all-zero weights give NaN.
    """
    inputs, weights = _mask_inputs(inputs, weights)
    norms = jacobian_norms(embed_fn, inputs, chunk_size=chunk_size)
    return _weighted_estimate(norms, weights).mean


def estimate_geometric_complexity(
    embed_fn: EmbedFn,
    inputs: Shaped[Array, "B ..."],
    key: jax.Array,
    *,
    method: str = "output_probes",
    num_probes: int = 1,
    weights: Shaped[Array, "B"] | None = None,
) -> Estimate:
    """Unbiased estimate of geometric complexity from `num_probes` Jacobian products an example.

    `output_probes`: |J^T v|^2 averaged over v with independent random signs in R^K, drawn for each
    example on its own. E = |J|_F^2 and Var = 2 (|J J^T|_F^2 - sum_i (J J^T)_ii^2) a probe
    (Hutchinson 1990).

    The standard error is std(estimates of the examples, ddof=1) / sqrt(B): it covers examples and
    probes, and is about the GC of the population that the inputs were drawn from. With weights it
    is the same over the effective number of examples (sum w)^2 / sum w^2.

    Args:
      embed_fn: pure function (B, *input) -> (B, K) in which examples do not mix.
      inputs: (B, *input) in model-input units.
      key: a JAX random key; the same key gives the same estimate.
      method: "output_probes".
      num_probes: Jacobian products an example.
      weights: (B,) as in `geometric_complexity`.

    Returns:
      Estimate(mean, sem), float32 scalars; sem is NaN for one example.

    Raises:
      ValueError: as `geometric_complexity`; an unknown method or `num_probes` below 1.
    """
    if method not in _COTANGENTS_BY_METHOD:
        allowed = ", ".join(sorted(_COTANGENTS_BY_METHOD))
        raise ValueError(f"method={method!r} is not one of: {allowed}")
    if num_probes < 1:
        raise ValueError(f"num_probes={num_probes} must be at least 1")
    inputs, weights = _mask_inputs(inputs, weights)
    inputs, embedding_dim = _check_embedding(embed_fn, inputs)
    # A key an example: padding the batch does not change what the others draw.
    example_keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(inputs.shape[0]))
    sums = _sum_of_squared_products(
        embed_fn,
        inputs,
        example_keys,
        _COTANGENTS_BY_METHOD[method],
        num_probes,
        embedding_dim,
        chunk_size=None,
    )
    return _weighted_estimate(sums / num_probes, weights)


def _one_hot_cotangents(example_keys, num_examples, rows, embedding_dim):
    """(R, n, K): cotangent r is the unit vector of row r for every example; rows past K are 0."""
    del example_keys
    unit = jax.nn.one_hot(rows, embedding_dim, dtype=jnp.float32)
    return jnp.broadcast_to(unit[:, None, :], (rows.size, num_examples, embedding_dim))


def _rademacher_cotangents(example_keys, num_examples, rows, embedding_dim):
    """(R, n, K) random signs, independent over probes and examples."""
    del num_examples

    def draw(row, example_key):
        return jax.random.rademacher(
            jax.random.fold_in(example_key, row), (embedding_dim,), jnp.float32
        )

    return jax.vmap(jax.vmap(draw, (None, 0)), (0, None))(rows, example_keys)


_COTANGENTS_BY_METHOD = {"output_probes": _rademacher_cotangents}


def _squared_products(
    embed_fn, inputs, example_keys, first_row, *, cotangents_fn, rows_per_block, num_rows, dim
):
    """(n,): sum over one block of rows of |c^T J|^2 for the examples of one chunk."""
    rows = first_row + jnp.arange(rows_per_block)

    def embed(x):
        return embed_fn(x).astype(jnp.promote_types(x.dtype, jnp.float32))

    # TF32 and bfloat16 passes would ruin the norm; this governs what embed_fn itself left open.
    with jax.default_matmul_precision("highest"):
        embeddings, pull_back = jax.vjp(embed, inputs)
        cotangents = cotangents_fn(example_keys, inputs.shape[0], rows, dim)
        in_range = (rows < num_rows)[:, None, None]
        cotangents = jnp.where(in_range, cotangents, 0).astype(embeddings.dtype)
        (products,) = jax.vmap(pull_back)(cotangents)
    return jnp.sum(products**2, axis=(0, *range(2, products.ndim)))


_STATIC = ("cotangents_fn", "rows_per_block", "num_rows", "dim")
_compiled_squared_products = partial(jax.jit, static_argnames=_STATIC)(_squared_products)


def _sum_of_squared_products(
    embed_fn, inputs, example_keys, cotangents_fn, num_rows, dim, chunk_size
):
    """(B,): sum over `num_rows` cotangents of |c^T J|^2, in blocks of examples and rows."""
    num_examples = inputs.shape[0]
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1")
    num_chunks = -(-num_examples // (chunk_size or _DEFAULT_CHUNK_SIZE))
    # Chunks of equal size waste least on the remainder; it is filled up with copies of the last
    # example, where embed_fn is as well defined as it is there, and then cut off.
    chunk = -(-num_examples // num_chunks)
    rows_per_block = min(num_rows, max(1, _PRODUCTS_PER_VJP // chunk))
    first_rows = range(0, num_rows, rows_per_block)
    padded = jnp.minimum(jnp.arange(num_chunks * chunk), num_examples - 1)
    padded = padded.reshape(num_chunks, chunk)
    static = {
        "cotangents_fn": cotangents_fn,
        "rows_per_block": rows_per_block,
        "num_rows": num_rows,
        "dim": dim,
    }

    def take(index):
        keys = None if example_keys is None else example_keys[index]
        return inputs[index], keys

    if not _staged():
        block = _compile_block(embed_fn)
        chunks = []
        for index in padded:
            x, keys = take(index)
            chunks.append(sum(block(x, keys, row, **static) for row in first_rows))
        return jnp.concatenate(chunks)[:num_examples]

    block = partial(_squared_products, embed_fn, **static)
    num_blocks = num_chunks * len(first_rows)
    if jax.default_backend() == "cpu" and num_blocks <= _MAX_UNROLLED_BLOCKS:
        sums = _chained_blocks(block, take, padded, first_rows)
    else:
        sums = _looped_blocks(block, take, padded, jnp.asarray(first_rows))
    return sums.reshape(-1)[:num_examples]


def _chained_blocks(block, take, padded, first_rows):
    """Unrolled, since XLA's CPU loops run convolutions about 4.5 times slower than outside.

    Each block's inputs depend on the sum of the block before: free to run at once, XLA's scheduler
    would keep all their activations alive, and it drops optimization barriers on the CPU before it
    schedules. A sum of squares is never negative, which XLA does not know.
    """
    sums = []
    previous = jnp.zeros(())
    for index in padded:
        total = 0.0
        for row in first_rows:
            x, keys = take(index)
            x = jnp.where(previous < 0, jnp.nan, x)
            norms = block(x, keys, row)
            total = total + norms
            previous = norms[0]
        sums.append(total)
    return jnp.stack(sums)


def _looped_blocks(block, take, padded, first_rows):
    def chunk_sums(index):
        x, keys = take(index)

        def add_block(total, row):
            return total + block(x, keys, row), None

        dtype = jnp.promote_types(x.dtype, jnp.float32)
        return jax.lax.scan(add_block, jnp.zeros(index.shape, dtype), first_rows)[0]

    return jax.lax.map(chunk_sums, padded)


def _compile_block(embed_fn: EmbedFn) -> Callable:
    """A compiled block, shared between calls only where a shared one cannot be stale."""
    if isinstance(embed_fn, jax.tree_util.Partial):
        with contextlib.suppress(_NoValueError):
            function = _FunctionByValue(embed_fn.func, _value_of(embed_fn.func, ()))
            embed_fn = jax.tree_util.Partial(function, *embed_fn.args, **embed_fn.keywords)
            return partial(_compiled_squared_products, embed_fn)
    return jax.jit(partial(_squared_products, embed_fn), static_argnames=_STATIC)


@dataclasses.dataclass(frozen=True)
class _FunctionByValue:
    """A function that is equal to another only if all that it closes over is."""

    function: Callable = dataclasses.field(compare=False)
    value: Hashable

    def __call__(self, *args, **kwargs):
        return self.function(*args, **kwargs)


class _NoValueError(Exception):
    """Something hashes by identity: equal hashes would not mean equal values."""


def _value_of(thing: Any, enclosing: tuple) -> Hashable:
    """What a function or a value it holds computes with, as something that compares by value.

    A module updated in place hashes by identity and would give the GC of its old weights, so it has
    no value here. Globals cannot be followed: as under jax.jit, they must not change.
    """
    if any(thing is other for other in enclosing):
        raise _NoValueError
    enclosing = (*enclosing, thing)
    if isinstance(thing, types.FunctionType):
        cells = [cell.cell_contents for cell in thing.__closure__ or ()]
        held = [*cells, *(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values()]
        return thing.__code__, id(thing.__globals__), *(_value_of(h, enclosing) for h in held)
    if isinstance(thing, types.MethodType):
        return thing.__func__, _value_of(thing.__self__, enclosing)
    if type(thing).__hash__ in (None, object.__hash__) or type(thing).__module__.startswith("jax."):
        # The latter: jax wraps a functools.partial, whatever it holds, into a hashable shim.
        if isinstance(thing, (type, types.ModuleType, types.BuiltinFunctionType)):
            return thing
        raise _NoValueError
    try:
        hash(thing)
    except TypeError as error:
        raise _NoValueError from error
    # 1 == 1.0 == True, but a network may tell them apart.
    return type(thing), thing


def _staged() -> bool:
    """Whether we are inside jit, where a host loop would unroll into one program."""
    return isinstance(jnp.zeros(()), jax.core.Tracer)


def _check_embedding(embed_fn: EmbedFn, inputs: Array) -> tuple[jax.Array, int]:
    """Returns the inputs in a differentiable dtype, and K."""
    inputs = as_floating(inputs, "inputs")
    if inputs.ndim == 0 or inputs.shape[0] == 0:
        raise ValueError(f"inputs of shape {inputs.shape} hold no example; at least 1 is needed")
    # A new function each time: eval_shape would remember the shape of an old state.
    output = jax.eval_shape(lambda x: embed_fn(x), inputs)
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


def _mask_inputs(inputs: Array, weights: Array | None) -> tuple[jax.Array, jax.Array | None]:
    """Replaces rows of weight 0 by a row that counts, so that nothing they hold can leak."""
    inputs = as_floating(inputs, "inputs")
    if weights is None or inputs.ndim == 0 or inputs.shape[0] == 0:
        return inputs, None
    weights = as_weights(weights, inputs.shape[0])
    if not isinstance(weights, jax.core.Tracer) and not bool(jnp.any(weights > 0)):
        raise ValueError("all weights are 0, so no example counts; give one a weight above 0")
    counts = (weights > 0).reshape(-1, *[1] * (inputs.ndim - 1))
    stand_in = inputs[jnp.argmax(weights)][None]
    return jnp.where(counts, inputs, stand_in), weights


def _weighted_estimate(values: Array, weights: Array | None) -> Estimate:
    """Mean and its standard error; for equal weights std(ddof=1) / sqrt(B)."""
    if weights is None:
        weights = jnp.ones_like(values)
    total = jnp.sum(weights)
    shares = weights / total
    # Divided last: equal values have just that mean.
    mean = jnp.sum(weights * values) / total
    inverse_count = jnp.sum(shares**2)
    variance = jnp.sum(shares * (values - mean) ** 2) * inverse_count
    # The spread of one example is unknown, not 0.
    known = jnp.sum(weights > 0) > 1
    return Estimate(mean, jnp.where(known, jnp.sqrt(variance / (1 - inverse_count)), jnp.nan))
