"""Geometric complexity of a large set to a given relative error, at the least cost.

Two things make it cheap. **Between examples**, a regression estimate (Cochran, Sampling Techniques,
1977, chapter 7): n random examples b give t_b, the mean of |J^T c|^2 over m probes c, which is
fitted by least squares on covariates whose mean over the whole set is known (pixel statistics of
the input, and its class),

    t_b = GC + beta . (a_b - mean a) + residual,

so that only the residual is left to sampling. **Between probes**, random signs in a basis of the
example's own: c = Q s + (I - Q Q^T) v, with s and v random signs and Q an orthonormal basis of the
embedding z and of the main directions in which embeddings vary, cut down to the units that are not
0. E[c c^T] = I whatever Q, so |J^T c|^2 is unbiased, and its variance is twice the squared
off-diagonal of J J^T in that basis (and in Q's complement). Q comes near its main eigenvectors.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped

from gc_nc.array_types import Array, EmbedFn, as_floating, as_numbers, check_whole
from gc_nc.metrics import jacobian_products as products
from gc_nc.metrics.argument_checks import as_key, as_labels, as_number
from gc_nc.metrics.jacobian_estimators import random_signs
from gc_nc.metrics.jacobians import squared_jacobian_norms
from gc_nc.metrics.regression_estimate import RegressionEstimate, known_covariates, regress

# Cost of one VJP in forward passes: 0.9 to 1.2 was measured on VGG.
_PRODUCT_COST = 1.1
_CHUNK = 32
# Of the embeddings of so many examples, so many main directions; the gain is flat around both.
_DIRECTION_EXAMPLES, _NUM_DIRECTIONS = 64, 8


class PlannedEstimate(NamedTuple):
    """A mean, its standard error about the mean over the given set, and what was spent on it.

    Attributes:
      mean: geometric complexity.
      sem: its standard error; 0 where it is exact.
      num_examples: distinct examples that were differentiated.
      num_probes: Jacobian products an example; 0 where each example's norm is exact.
    """

    mean: Float[Array, ""]
    sem: Float[Array, ""]
    num_examples: int
    num_probes: int


def geometric_complexity_to_error(
    embed_fn: EmbedFn,
    inputs: Shaped[Array, "N ..."],
    key: jax.Array,
    *,
    relative_error: float = 0.01,
    labels: Shaped[Array, "N"] | None = None,
    num_pilot: int = 256,
) -> PlannedEstimate:
    """Geometric complexity of a set of N examples, to a standard error of `relative_error` * GC.

    A pilot run of `num_pilot` random examples, two probes each, tells the variance between examples
    S_b and between probes S_w, after regression. Of the plans of n examples and m probes with

        sem^2 = (S_b + S_w / m) / n - S_b / N  <=  (relative_error * GC)^2

    (a sample without replacement: with all N examples only the probes' error is left) it takes the
    one that needs least work, n (1 + 1.1 m) forward passes, runs it, measures S_b and S_w anew on
    all that it has drawn, and goes on until the standard error is small enough. With one probe an
    example S_b cannot be told from S_w, and the last term is left out. Exact norms of the n
    examples are one of the plans; sets of fewer than 64 examples, and samples in which nothing but
    0 was seen, are computed exactly as a whole.

    Unlike `estimate_geometric_complexity`, the standard error is about the GC of the N examples
    themselves, not of a population behind them. Like every standard error it knows only what was
    drawn: where a few of very many examples carry most of GC, a sample can miss them. It stops at
    the first draw that passes, so it covers slightly less than a standard error of fixed n.

    Args:
      embed_fn: pure function (B, *input) -> (B, K) in which examples do not mix; a
        `jax.tree_util.Partial` spares recompilation.
      inputs: (N, *input) in model-input units; a NumPy array stays on the host and is read once
        for its pixel statistics.
      key: a JAX random key.
      relative_error: of one standard error, above 0.
      labels: (N,) integers; classes then help to predict GC.
      num_pilot: examples that are drawn at least, 64 or more.

    Returns:
      PlannedEstimate; mean and sem are NaN where a product that was drawn is not finite.

    Raises:
      ValueError: no examples, arguments out of range, labels that are not integers, `embed_fn` does
        not return (B, K), or traced arguments: the plan depends on values, so this function cannot
        run under jit, vmap or grad.
    """
    relative_error = as_number(
        relative_error,
        "relative_error",
        lambda e: 0 < e < math.inf,
        "must be above 0, such as 0.01",
    )
    num_pilot = check_whole(num_pilot, 64, "num_pilot")
    leaves = jax.tree.leaves((embed_fn, inputs, key, labels))
    if products.staged() or any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        raise ValueError(
            "geometric_complexity_to_error chooses its plan from values and cannot be traced; use"
            " estimate_geometric_complexity under jit, vmap and grad"
        )
    inputs, key = as_numbers(inputs, "inputs"), as_key(key)
    example, embedding_dim = products.check_embedding(
        embed_fn, inputs[:1] if inputs.ndim else inputs
    )
    num_examples = inputs.shape[0]
    if labels is not None:
        labels = np.asarray(as_labels(labels, num_examples))
    sample = _Sample(embed_fn, inputs, key, full_rank=min(embedding_dim, example[0].size))
    if num_examples < 64:
        return sample.exact()
    known = known_covariates(inputs, labels, num_pilot)[sample.order]
    num_pilot = min(num_pilot, num_examples)
    # Two products or fewer are exact already.
    m, needed = sample.full_rank, num_pilot
    if sample.full_rank > 2:
        pilot = sample.draw(num_pilot, 2)
        if np.isfinite(pilot).all():
            fit = regress(pilot, known)
            target = relative_error * fit.mean
            m = _cheapest_num_probes(fit, target, num_examples, sample.full_rank)
            # A pilot tells it to a fifth, and too high. Too few are made up for, too many are lost.
            needed = 0.75 * _num_examples(fit, target, num_examples, m, exact=m == sample.full_rank)
        else:
            m = 2
    # Every round draws more examples or, once all are drawn, more probes.
    while True:
        needed = min(num_examples, max(num_pilot, math.ceil(needed / _CHUNK) * _CHUNK))
        values = sample.draw(needed, m)
        probes = 0 if m == sample.full_rank else m
        if not np.isfinite(values).all():
            return PlannedEstimate(jnp.float32(jnp.nan), jnp.float32(jnp.nan), len(values), probes)
        fit = regress(values, known, exact=m == sample.full_rank)
        # The share first: of all examples it is 1, and nothing is left.
        share = len(values) / num_examples
        sem = math.sqrt(max(0.0, fit.variance - fit.between * share))
        sem = sem / math.sqrt(len(values))
        target = relative_error * fit.mean
        # An all-zero sample says nothing about the examples that were not drawn.
        if target > 0 and sem <= target:
            return PlannedEstimate(jnp.float32(fit.mean), jnp.float32(sem), len(values), probes)
        shortfall = (sem / target) ** 2 if target > 0 else math.inf
        if not math.isfinite(shortfall):
            return sample.exact()
        if len(values) < num_examples:
            needed = math.ceil(len(values) * shortfall * 1.01)
        else:
            m = min(sample.full_rank, math.ceil(m * shortfall * 1.1) + 1)


class _Sample:
    """Examples in a random order, with what their probes gave; only what is missing is computed."""

    def __init__(self, embed_fn, inputs, key, full_rank):
        order_key, self._probe_key = jax.random.split(key)
        self.order = np.asarray(jax.random.permutation(order_key, inputs.shape[0]))
        self.full_rank = full_rank
        self._embed_fn, self._inputs = embed_fn, inputs
        self._compiled = products.compile_block(embed_fn)
        self._probed, self._norms = np.zeros((0, 0)), np.zeros((0, 1))
        self._directions = None

    def draw(self, num_examples: int, num_probes: int) -> np.ndarray:
        """(n, m): squares of each probe; (n, 1), exact norms, for full rank."""
        if num_probes == self.full_rank:
            first = len(self._norms)
            if first < num_examples:
                x = self._examples(np.arange(first, num_examples))
                norms = np.asarray(squared_jacobian_norms(self._embed_fn, x), np.float64)
                self._norms = np.concatenate([self._norms, norms[:, None]])
            return self._norms[:num_examples]
        if num_probes < self._probed.shape[1]:
            self._probed = self._probed[:, :num_probes]
        rows, there = self._probed.shape
        if num_probes > there:
            added = self._probes(0, rows, there, num_probes)
            self._probed = np.concatenate([self._probed, added], axis=1)
        if num_examples > rows:
            added = self._probes(rows, num_examples, 0, num_probes)
            self._probed = np.concatenate([self._probed, added])
        return self._probed[:num_examples]

    def exact(self) -> PlannedEstimate:
        """The mean of the exact norms of all."""
        mean = jnp.float32(np.mean(self.draw(len(self.order), self.full_rank)))
        return PlannedEstimate(mean, 0 * mean, len(self.order), 0)

    def _examples(self, places):
        return as_floating(self._inputs[self.order[places]], "inputs")

    def _chunks(self, first, last, size, auxiliary_of, block):
        """The block's values of examples in the drawn order, `size` at a time."""
        values = []
        for start in range(first, last, size):
            # The remainder is filled up, which keeps the program's shape.
            places = np.minimum(np.arange(start, start + size), last - 1)
            auxiliary = auxiliary_of(self.order[places])
            chunk = self._compiled(self._examples(places), auxiliary, 0, block=block)
            values.append(chunk[: last - start])
        return np.concatenate([np.asarray(chunk, np.float64) for chunk in values])

    def _probes(self, first, last, first_probe, last_probe):
        num_probes = last_probe - first_probe
        if first == last:
            return np.zeros((0, num_probes))
        if self._directions is None:
            num_embedded = min(_DIRECTION_EXAMPLES, len(self.order))
            embedded = self._chunks(
                0, num_embedded, _CHUNK, lambda rows: None, products.embeddings_of
            )
            self._directions = _main_directions(embedded)

        def auxiliary_of(rows):
            return _example_keys(self._probe_key, jnp.asarray(rows)), self._directions

        size = max(1, min(_CHUNK, products.PRODUCTS_PER_BLOCK // num_probes))
        return self._chunks(first, last, size, auxiliary_of, _ProbeBlock(num_probes, first_probe))


@jax.jit
def _example_keys(key, rows):
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)


def _main_directions(embeddings: np.ndarray) -> jax.Array:
    """(K, q): principal directions; any others are as right, if not as good."""
    size = np.max(np.abs(embeddings))
    if not (np.isfinite(size) and size > 0):
        return jnp.eye(embeddings.shape[1], _NUM_DIRECTIONS, dtype=jnp.float32)
    centred = embeddings / size - np.mean(embeddings / size, axis=0)
    return jnp.asarray(
        np.linalg.svd(centred, full_matrices=False)[2][:_NUM_DIRECTIONS].T, "float32"
    )


@dataclasses.dataclass(frozen=True)
class _ProbeBlock:
    """(n, m): |J^T c|^2 of m probes."""

    num_probes: int
    first_probe: int

    def __call__(self, embed_fn, inputs, auxiliary, first_row):
        del first_row
        example_keys, directions = auxiliary
        probes = self.first_probe + jnp.arange(self.num_probes, dtype=jnp.int32)

        def cotangents(embeddings):
            active = (embeddings != 0).astype(jnp.float32)[:, :, None]
            largest = jnp.max(jnp.abs(embeddings), axis=1, keepdims=True)
            z = embeddings / jnp.where(largest > 0, largest, 1)
            spanning = jnp.concatenate([z[:, :, None], directions[None] * active], axis=2)
            basis = jnp.linalg.qr(jnp.nan_to_num(spanning))[0]
            num_basis, num_units = basis.shape[2], embeddings.shape[1]
            signs = random_signs(example_keys, probes, num_units + num_basis)
            rest, inside = signs[:, :, :num_units], signs[:, :, num_units:]
            inside = inside - _dot("nkq,rnk->rnq", basis, rest)
            return rest + _dot("nkq,rnq->rnk", basis, inside)

        squares, embeddings = products.pull_back_squares(embed_fn, inputs, cotangents)
        return squares.T, embeddings


_dot = functools.partial(jnp.einsum, precision="highest")


def _num_examples(fit: RegressionEstimate, target, num_examples, num_probes, *, exact=False) -> int:
    """How many examples a plan needs; more than there are where it cannot reach the target."""
    within = 0.0 if exact else fit.within / num_probes
    # With one probe the finite set is not made use of.
    saved = fit.between / num_examples if exact or num_probes > 1 else 0.0
    allowed = max(target, 0.0) ** 2 + saved
    needed = (fit.between + within) / allowed if allowed > 0 else math.inf
    return math.ceil(min(needed, 2.0 * num_examples))


def _cheapest_num_probes(fit: RegressionEstimate, target, num_examples, full_rank) -> int:
    """The m of least n (1 + cost m) that some n <= N can reach; full_rank means exact."""
    costs = {}
    for m in sorted({*range(1, 9), *(2**i for i in range(4, 20)), full_rank}):
        n = _num_examples(fit, target, num_examples, m, exact=m == full_rank)
        if m <= full_rank and (n <= num_examples or m == full_rank):
            costs[m] = n * (1 + _PRODUCT_COST * m)
    return min(costs, key=costs.get)
