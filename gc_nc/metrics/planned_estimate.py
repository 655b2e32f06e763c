"""Geometric complexity of a large set to a given relative error, at the least cost.

The estimate of the mean over N examples is a regression estimate (Cochran, Sampling Techniques,
1977, chapter 7): n random examples b give t_b, the mean of |J^T v|^2 over m probes v, which is
fitted by least squares on covariates whose mean over the whole set is known,

    t_b = GC + beta . (a_b - mean a) + residual,

so that only the residual is left to sampling. The covariates are cheap: pixel statistics of the
input and its class, known for all N; and (v . z)^2 - |z|^2 for the embedding z and for the units
that are not 0, which the product computes anyway and whose mean over v is 0.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped

from gc_nc.array_types import Array, EmbedFn
from gc_nc.metrics import jacobian_products as products
from gc_nc.metrics.jacobian_estimators import random_signs
from gc_nc.metrics.jacobians import jacobian_norms

# Cost of one VJP in forward passes: 0.9 to 1.6 was measured, and the plan is flat around it.
_PRODUCT_COST = 1.2
_CHUNK = 32
_MAX_ROUNDS = 8
# Examples a covariate needs before fitting it costs less than it explains.
_EXAMPLES_PER_COVARIATE = 10


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
    one that needs least work, n (1 + 1.2 m) forward passes, runs it, and goes on until the standard
    error that it measures is small enough. Sets of fewer than 64 examples, and errors that would
    take as many products as there are dimensions, are computed exactly.

    Unlike `estimate_geometric_complexity`, the standard error is about the GC of the N examples
    themselves, not of a population behind them.

    Args:
      embed_fn: pure function (B, *input) -> (B, K) in which examples do not mix; a
        `jax.tree_util.Partial` spares recompilation.
      inputs: (N, *input) in model-input units; a NumPy array stays on the host and is read once
        for its pixel statistics.
      key: a JAX random key.
      relative_error: of one standard error, above 0.
      labels: (N,) integers; classes then help to predict GC.
      num_pilot: at least 64.

    Returns:
      PlannedEstimate.

    Raises:
      ValueError: no examples, arguments out of range, `embed_fn` does not return (B, K), or traced
        arguments: the plan depends on values, so this function cannot run under jit.
    """
    if not (math.isfinite(relative_error) and relative_error > 0):
        raise ValueError(f"relative_error={relative_error} must be above 0, such as 0.01")
    if num_pilot < 64:
        raise ValueError(f"num_pilot={num_pilot} must be at least 64 to estimate variances")
    if products.staged() or isinstance(inputs, jax.core.Tracer):
        raise ValueError(
            "geometric_complexity_to_error chooses its plan from values and cannot be traced; use"
            " estimate_geometric_complexity under jit, vmap and grad"
        )
    inputs = inputs if isinstance(inputs, jax.Array) else np.asarray(inputs)
    num_examples = inputs.shape[0] if inputs.ndim else 0
    example, embedding_dim = products.check_embedding(embed_fn, inputs[:1])
    if labels is not None and np.shape(labels) != (num_examples,):
        raise ValueError(f"labels of shape {np.shape(labels)} for {num_examples} examples")
    full_rank = min(embedding_dim, example.size)
    if num_examples < 64:
        return _exact(embed_fn, inputs)
    known = _known_covariates(inputs, labels, num_pilot)
    order_key, probe_key = jax.random.split(key)
    order = np.asarray(jax.random.permutation(order_key, num_examples))

    def draw(first, last, num_probes, first_probe=0):
        """(last - first, 3): the products' squares and controls of examples order[first:last]."""
        rows = order[first:last]
        keys = jax.vmap(lambda row: jax.random.fold_in(probe_key, row))(jnp.asarray(rows))
        block = _ProbeBlock(num_probes, first_probe)
        chunk = max(1, min(_CHUNK, products.PRODUCTS_PER_BLOCK // num_probes))
        return np.asarray(
            products.sum_over_blocks(embed_fn, jnp.asarray(inputs[rows]), keys, block, chunk),
            np.float64,
        )

    drawn = min(num_pilot, num_examples)
    pilot = [draw(0, drawn, 1, probe) for probe in range(2)]
    if not np.isfinite(pilot).all():
        return PlannedEstimate(jnp.float32(jnp.nan), jnp.float32(jnp.nan), drawn, 2)
    fit = _regress(np.mean(pilot, axis=0), known[order[:drawn]])
    residuals = [probe[:, 0] - probe[:, 1:] @ fit.control_slopes for probe in pilot]
    within = float(np.mean((residuals[0] - residuals[1]) ** 2) / 2)
    between = max(0.0, fit.variance - within / 2)
    target = relative_error * abs(fit.mean)
    num_probes = _cheapest_num_probes(between, within, target, num_examples, full_rank)
    needed = _num_examples(between, within, target, num_examples, num_probes)
    values = np.mean(pilot[:num_probes], axis=0) if num_probes <= 2 else np.zeros((0, 3))
    for _ in range(_MAX_ROUNDS):
        if num_probes >= full_rank:
            break
        needed = min(num_examples, math.ceil(needed / _CHUNK) * _CHUNK)
        if needed > len(values):
            values = np.concatenate([values, draw(len(values), needed, num_probes)])
        fit = _regress(values, known[order[: len(values)]])
        between = max(0.0, fit.variance - within / num_probes)
        sampled = len(values) / num_examples
        sem = math.sqrt(max(0.0, fit.variance - sampled * between) / len(values))
        target = relative_error * abs(fit.mean)
        if sem <= target:
            mean, sem = jnp.float32(fit.mean), jnp.float32(sem)
            return PlannedEstimate(mean, sem, len(values), num_probes)
        shortfall = (sem / target) ** 2 if target else math.inf
        if len(values) < num_examples and math.isfinite(shortfall):
            needed = min(num_examples, math.ceil(len(values) * shortfall * 1.05))
        elif math.isfinite(shortfall):
            num_probes = math.ceil(num_probes * shortfall * 1.1) + 1
            values, needed = np.zeros((0, 3)), num_examples
        else:
            break
    return _exact(embed_fn, inputs)


def _exact(embed_fn, inputs):
    norms = jacobian_norms(embed_fn, inputs)
    return PlannedEstimate(jnp.mean(norms), jnp.zeros(()), norms.size, 0)


@dataclasses.dataclass(frozen=True)
class _ProbeBlock:
    """(n, 3): |J^T v|^2, and two controls of mean 0, each a mean over the probes."""

    num_probes: int
    first_probe: int

    def __call__(self, embed_fn, inputs, example_keys, first_row):
        del first_row
        probes = self.first_probe + jnp.arange(self.num_probes)
        embeddings, vjp_fn = jax.vjp(embed_fn, inputs)
        signs = random_signs(example_keys, probes, embeddings.shape[1])
        (pulled,) = jax.vmap(vjp_fn)(signs.astype(embeddings.dtype))
        squares = jnp.sum(pulled**2, axis=tuple(range(2, pulled.ndim)))

        def control(vectors):
            inside = jnp.einsum("rnk,nk->rn", signs, vectors)
            return inside**2 - jnp.sum(vectors**2, axis=1)[None]

        active = (embeddings != 0).astype(embeddings.dtype)
        columns = [squares, control(embeddings), control(active)]
        return jnp.stack([jnp.mean(column, axis=0) for column in columns], axis=1)


def _known_covariates(inputs, labels, num_pilot) -> np.ndarray:
    """(N, P) float64: mean and mean square of the pixels, and classes where there are few."""
    columns = []
    for first in range(0, inputs.shape[0], 1024):
        rows = np.asarray(inputs[first : first + 1024], np.float64)
        rows = rows.reshape(rows.shape[0], -1)
        columns.append(np.stack([rows.mean(axis=1), (rows**2).mean(axis=1)], axis=1))
    known = np.concatenate(columns)
    known = np.column_stack([known, np.sqrt(np.maximum(known[:, 1] - known[:, 0] ** 2, 0))])
    if labels is not None:
        classes = np.unique(np.asarray(labels))
        if len(classes) * _EXAMPLES_PER_COVARIATE <= min(num_pilot, len(known)):
            # One is the complement of the others.
            known = np.column_stack([known, np.asarray(labels)[:, None] == classes[1:]])
    return known - known.mean(axis=0)


class _Fit(NamedTuple):
    mean: float
    variance: float
    control_slopes: np.ndarray


def _regress(values: np.ndarray, known: np.ndarray) -> _Fit:
    """Least squares of the squares on covariates that are centred at their known means."""
    covariates = np.column_stack([values[:, 1:], known])
    scales = np.sqrt(np.mean(covariates**2, axis=0))
    scales[scales == 0] = 1
    design = np.column_stack([np.ones(len(values)), covariates / scales])
    slopes, _, rank, _ = np.linalg.lstsq(design, values[:, 0], rcond=None)
    residuals = values[:, 0] - design @ slopes
    variance = float(np.sum(residuals**2) / (len(values) - rank))
    return _Fit(float(slopes[0]), variance, slopes[1:3] / scales[:2])


def _num_examples(between, within, target, num_examples, num_probes) -> int:
    needed = target**2 + between / num_examples
    return math.ceil((between + within / num_probes) / needed) if needed else num_examples


def _cheapest_num_probes(between, within, target, num_examples, full_rank) -> int:
    """The m of least n (1 + cost m) that some n <= N can reach; full_rank means exact."""
    candidates = sorted({*range(1, 9), *(2**i for i in range(4, 20)), full_rank})
    costs = {full_rank: num_examples * (1 + _PRODUCT_COST * full_rank)}
    for m in candidates:
        n = _num_examples(between, within, target, num_examples, m)
        if m < full_rank and n <= num_examples:
            costs[m] = n * (1 + _PRODUCT_COST * m)
    return min(costs, key=costs.get)
