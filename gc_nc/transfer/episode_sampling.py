"""Few-shot episodes: W classes with S support and Q query images each, drawn from labels.

Episodes are as in matching networks (Vinyals et al., arXiv 1606.04080) and prototypical networks
(Snell, Swersky, Zemel, arXiv 1703.05175).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, Shaped

from gc_nc.array_types import Array, as_numbers, check_whole
from gc_nc.compilation import jit_for_device
from gc_nc.metrics.argument_checks import as_key

# Larger than any image's index, in JAX's default int32.
_NO_PICK = np.iinfo(np.int32).max


class Episode(NamedTuple):
    """One episode, or E of them with a leading axis; a pytree. Way w is the class `classes[w]`.

    Attributes:
      classes: (W,) label values, all different.
      support: (W, S) indices into the labels.
      query: (W, Q) indices into the labels, none of them in `support`.
    """

    classes: Int[Array, "*E W"]
    support: Int[Array, "*E W S"]
    query: Int[Array, "*E W Q"]


class _ClassTable(NamedTuple):
    """Which images each class has: order[starts[c] : starts[c] + counts[c]] are those of c."""

    values: np.ndarray
    order: np.ndarray
    starts: np.ndarray
    counts: np.ndarray


def sample_episode(
    key: Array, labels: Shaped[Array, "N"], *, num_ways: int, num_shots: int, num_queries: int
) -> Episode:
    """Draws W classes, and S support and Q query images of each, all without replacement.

    Every set of W classes is equally likely, and so is every order of S + Q images of a class, up
    to the 2^-32 resolution of the random bits. The first S images of a class are its support. Only
    integer arithmetic on random bits is used, so the same key and labels give the same episode on
    every machine and device.

    Args:
      key: a key from `jax.random.key` (threefry, JAX's default); may be traced.
      labels: (N,) integers of any value; concrete, because the classes determine shapes.
      num_ways: W, 2 or more.
      num_shots: S, the number of support images of each class, 1 or more.
      num_queries: Q, the number of query images of each class, 1 or more.

    Raises:
      ValueError: more ways than classes; a class, drawn or not, with fewer than S + Q images; a
        number that is too small; labels that are traced, not (N,), not integers, or outside int32;
        a key of another generator, which may differ between machines.
    """
    table, sizes = _class_table(labels, num_ways, num_shots, num_queries)
    return _draw_compiled(_checked_key(key), table, **sizes)


def sample_episodes(
    key: Array,
    labels: Shaped[Array, "N"],
    num_episodes: int,
    *,
    num_ways: int,
    num_shots: int,
    num_queries: int,
) -> Episode:
    """Draws E independent episodes, in arrays with a leading axis E.

    Episode i is `sample_episode(jax.random.fold_in(key, i), labels, ...)` for any E, so a longer
    evaluation begins with the episodes of a shorter one.

    Args:
      key: as for `sample_episode`.
      labels: as for `sample_episode`.
      num_episodes: E, 1 or more.
      num_ways: W.
      num_shots: S.
      num_queries: Q.

    Raises:
      ValueError: as `sample_episode`, or `num_episodes` below 1.
    """
    num_episodes = check_whole(num_episodes, 1, "num_episodes")
    table, sizes = _class_table(labels, num_ways, num_shots, num_queries)
    return _draw_many_compiled(_checked_key(key), table, num_episodes=num_episodes, **sizes)


def _draw(key, table, *, num_ways, num_shots, num_queries):
    # Without jit these would be NumPy arrays, which a traced index cannot index.
    table = _ClassTable(*map(jnp.asarray, table))
    class_key, image_key = jax.random.split(key)
    class_bits = jax.random.bits(class_key, (num_ways,), jnp.uint32)
    ways = _without_replacement(class_bits[:, None], jnp.full(1, table.counts.size, jnp.int32))[
        :, 0
    ]
    image_bits = jax.random.bits(image_key, (num_shots + num_queries, num_ways), jnp.uint32)
    picks = _without_replacement(image_bits, table.counts[ways]).T
    images = table.order[table.starts[ways][:, None] + picks]
    return Episode(table.values[ways], images[:, :num_shots], images[:, num_shots:])


def _draw_many(key, table, *, num_episodes, **sizes):
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num_episodes, dtype=jnp.int32))
    return jax.vmap(lambda key: _draw(key, table, **sizes))(keys)


_SIZES = ("num_ways", "num_shots", "num_queries")
_draw_compiled = jit_for_device(_draw, static_argnames=_SIZES)
_draw_many_compiled = jit_for_device(_draw_many, static_argnames=("num_episodes", *_SIZES))


def _without_replacement(bits, counts):
    """(T, M) indices, distinct in each column m and in 0..counts[m]-1, from (T, M) random bits.

    Draw i picks the r-th index that was not picked before, with r in 0..count-i-1. The earlier
    picks p_0 < p_1 < ... leave p_j - j free indices below p_j, so those with p_j - j <= r come
    before the new pick. Sorting all images of a class would cost about a hundred times more.
    """
    num_draws, num_columns = bits.shape
    before = jnp.arange(num_draws, dtype=jnp.int32)[:, None]

    def pick(earlier, draw):
        i, bits = draw
        rank = _scaled_down(bits, (counts - i).astype(jnp.uint32)).astype(jnp.int32)
        passed = (earlier < _NO_PICK) & (earlier - before <= rank[None])
        picked = rank + jnp.sum(passed, axis=0, dtype=jnp.int32)
        # Insert the pick in order: larger picks move up by one.
        lower = jnp.concatenate([jnp.full_like(earlier[:1], -1), earlier[:-1]])
        return jnp.maximum(lower, jnp.minimum(earlier, picked[None])), picked

    nothing = jnp.full((num_draws, num_columns), _NO_PICK, jnp.int32)
    return jax.lax.scan(pick, nothing, (jnp.arange(num_draws, dtype=jnp.int32), bits))[1]


def _scaled_down(bits, count):
    """floor(bits * count / 2^32) of uint32, which is a number in 0..count-1.

    The product has 64 bits, which JAX lacks by default (Warren, Hacker's Delight, 8-2).
    """
    low = jnp.uint32(0xFFFF)
    bits_high, bits_low = bits >> 16, bits & low
    count_high, count_low = count >> 16, count & low
    middle = bits_high * count_low + (bits_low * count_low >> 16)
    carry = bits_low * count_high + (middle & low)
    return bits_high * count_high + (middle >> 16) + (carry >> 16)


def _class_table(labels, num_ways, num_shots, num_queries):
    num_ways = check_whole(num_ways, 2, "num_ways")
    num_shots = check_whole(num_shots, 1, "num_shots")
    num_queries = check_whole(num_queries, 1, "num_queries")
    if isinstance(labels, jax.core.Tracer):
        raise ValueError("labels are traced; pass concrete ones, outside jit's arguments")
    labels = np.asarray(as_numbers(labels, "labels"))
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"labels are {labels.dtype} of shape {labels.shape}; (N,) integers are needed"
        )
    values, counts = np.unique(labels, return_counts=True)
    if num_ways > values.size:
        raise ValueError(
            f"num_ways={num_ways} but labels have {values.size} classes; take at most as many ways"
        )
    limits = np.iinfo(np.int32)
    if values[0] < limits.min or values[-1] > limits.max:
        raise ValueError(
            f"labels are in {values[0]}..{values[-1]}; they must be in {limits.min}..{limits.max}"
        )
    needed, fewest = num_shots + num_queries, int(np.argmin(counts))
    if counts[fewest] < needed:
        raise ValueError(
            f"class {values[fewest]} has {counts[fewest]} images, but num_shots={num_shots} +"
            f" num_queries={num_queries} needs {needed} of each class; lower them or leave it out"
        )
    starts = np.cumsum(counts) - counts
    # Stable, so that the table is the same on every machine.
    order = np.argsort(labels, kind="stable")
    table = _ClassTable(*(part.astype(np.int32) for part in (values, order, starts, counts)))
    return table, {"num_ways": num_ways, "num_shots": num_shots, "num_queries": num_queries}


def _checked_key(key):
    key = as_key(key)
    implementation = str(jax.random.key_impl(key))
    if implementation != "threefry2x32":
        raise ValueError(
            f"key is of {implementation}, whose numbers differ between machines; take"
            " jax.random.key(seed, impl='threefry2x32')"
        )
    return key
