"""Every public metric as a call of named arguments, for tests that hold for all of them."""

import functools
import inspect
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gc_nc import metrics

#: C and K are those of most other tests of metrics, so that they share compiled programs.
B, C, K, SHAPE = 16, 5, 6, (3, 2)
KEY = jax.random.key(0)
#: A fifth of the compile time, for programs that run once and whose tests are not about rounding.
#: What is called outside of `jit` here is compiled as for users.
QUICK = {
    "xla_cpu_use_fusion_emitters": False,
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
jit = partial(jax.jit, compiler_options=QUICK)
#: Arguments of one row an example, which can be padded and sharded.
OF_EXAMPLES = ("inputs", "embeddings", "norms", "logits", "labels", "weights")


def example_data():
    """Arguments of metrics by name, float64."""
    rng = np.random.default_rng(0)

    empty = jax.tree.map(
        lambda x: np.asarray(x, float if jnp.issubdtype(x.dtype, jnp.floating) else None),
        metrics.init_class_statistics(C, K, scatter=True),
    )

    def statistics():
        scatter = rng.normal(size=(K, K))
        return empty._replace(
            counts=rng.uniform(3, 9, C),
            origin=rng.normal(size=K),
            mean_offsets=2 * rng.normal(size=(C, K)),
            squared_deviations=rng.uniform(1, 3, C),
            scatter=scatter @ scatter.T,
        )

    stats = statistics()
    labels = np.arange(B) % C
    return {
        "params": {"w": rng.normal(size=(6, 5)) / 2, "v": rng.normal(size=(5, K)) / 2},
        "stats": stats,
        "other": statistics(),
        "inputs": rng.normal(size=(B, *SHAPE)),
        "embeddings": stats.mean_offsets[labels] + rng.normal(size=(B, K)),
        "labels": labels,
        "weights": rng.uniform(0.5, 2, B),
        "norms": rng.uniform(1, 2, B),
        "logits": rng.normal(size=(B, C)),
        "class_gc": rng.uniform(1, 3, C),
        "head_kernel": rng.normal(size=(K, C)),
        "gc": np.array(1.7),
        "constant": np.array(0.3),
        "nc": np.array(0.01),
    }


DATA = example_data()


def embed(params, x):
    return jnp.tanh(x.reshape(len(x), -1) @ params["w"]) @ params["v"]


def embed_wide(params, x):
    """K > D, which takes the Jacobian by columns."""
    return jnp.tile(embed(params, x), (1, 2))


def embed_relu(params, x):
    return jax.nn.relu(embed(params, x))


def of(embed_fn, params):
    return jax.tree_util.Partial(embed_fn, params)


def loss(params, inputs=None):
    """Smooth, with an indefinite Hessian."""
    inputs = DATA["inputs"].astype(np.float32) if inputs is None else inputs
    return jnp.mean(embed(params, inputs) ** 3)


def statistics(embeddings, labels, weights=None):
    empty = metrics.init_class_statistics(C, K, scatter=True)
    return metrics.update_class_statistics(empty, embeddings, labels, weights=weights)


def observed(stats):
    """What statistics say, whatever origin they hold their means against."""
    return stats.counts, stats.means, stats.variances, stats.scatter


class Metric(NamedTuple):
    """A call of named arguments, the first of which is stacked to be mapped over."""

    call: Callable
    #: Arguments it is differentiated by.
    smooth: str = ""
    #: False for methods of an estimate that differ from another's in their products alone.
    typical: bool = True
    #: False for those that differ from another's in what they draw alone.
    mapped: bool = True

    @property
    def names(self):
        return tuple(inspect.signature(self.call).parameters)


def of_loss(metric, **options):
    return Metric(lambda params: metric(jax.tree_util.Partial(loss), params, **options), "params")


def estimate(method, num_probes):
    def call(params, inputs, weights):
        return metrics.estimate_geometric_complexity(
            of(embed, params), inputs, KEY, method=method, num_probes=num_probes, weights=weights
        )

    typical = method == "output_probes"
    mapped = method in ("output_probes", "input_probes", "deflated")
    return Metric(call, "params inputs weights", typical=typical, mapped=mapped)


METRICS = {
    "squared_jacobian_norms": Metric(
        lambda params, inputs: metrics.squared_jacobian_norms(of(embed, params), inputs),
        "params inputs",
    ),
    "squared_jacobian_norms by columns": Metric(
        lambda params, inputs: metrics.squared_jacobian_norms(of(embed_wide, params), inputs),
        "params inputs",
    ),
    "squared_jacobian_norms skip_inactive": Metric(
        lambda params, inputs: metrics.squared_jacobian_norms(
            of(embed_relu, params), inputs, skip_inactive=True, most_active=K
        )
    ),
    "squared_jacobian_spectral_norms": Metric(
        lambda params, inputs: metrics.squared_jacobian_spectral_norms(
            of(embed, params), inputs, KEY, num_iterations=4
        )
    ),
    "geometric_complexity": Metric(
        lambda params, inputs, weights: metrics.geometric_complexity(
            of(embed, params), inputs, weights=weights, chunk_size=8
        ),
        "params inputs weights",
    ),
    "estimate_squared_jacobian_norms": Metric(
        lambda params, inputs: metrics.estimate_squared_jacobian_norms(
            of(embed, params), inputs, KEY
        ),
        "params inputs",
    ),
    "estimate_geometric_complexity output_probes": estimate("output_probes", 2),
    "estimate_geometric_complexity input_probes": estimate("input_probes", 2),
    "estimate_geometric_complexity output_dims": estimate("output_dims", 2),
    "estimate_geometric_complexity input_dims": estimate("input_dims", 2),
    "estimate_geometric_complexity jacobian_entries": estimate("jacobian_entries", 2),
    # A basis of the whole space: the gradient is otherwise that of the value on average only.
    "estimate_geometric_complexity deflated": estimate("deflated", 3 * K),
    "geometric_complexity_with_outputs": Metric(
        lambda params, inputs: metrics.geometric_complexity_with_outputs(
            lambda x: (embed(params, x), x), inputs, KEY
        )[0],
        "params inputs",
        typical=False,
    ),
    "update_class_statistics": Metric(
        lambda embeddings, labels, weights: observed(statistics(embeddings, labels, weights)),
        "embeddings weights",
    ),
    "class_statistics_of": Metric(
        lambda embeddings, labels, weights: observed(
            metrics.class_statistics_of(embeddings, labels, C, weights=weights, scatter=True)
        ),
        "embeddings weights",
        typical=False,
    ),
    "neural_collapse_of": Metric(
        lambda embeddings, labels, weights: metrics.neural_collapse_of(
            embeddings, labels, C, weights=weights
        ),
        "embeddings weights",
        typical=False,
    ),
    "merge_class_statistics": Metric(
        lambda stats, other: observed(metrics.merge_class_statistics(stats, other)), "stats other"
    ),
    "cdnv_matrix": Metric(lambda stats: metrics.cdnv_matrix(stats), "stats"),
    "neural_collapse": Metric(lambda stats: metrics.neural_collapse(stats), "stats"),
    "population_cdnv_matrix": Metric(lambda stats: metrics.population_cdnv_matrix(stats), "stats"),
    "population_neural_collapse": Metric(
        lambda stats: metrics.population_neural_collapse(stats), "stats"
    ),
    "jackknife": Metric(
        lambda stats, other: metrics.jackknife(metrics.neural_collapse, [stats, other]),
        "stats other",
    ),
    "jackknife_groups": Metric(lambda labels: metrics.jackknife_groups(labels, 3)),
    "geometric_collapse": Metric(
        lambda stats, gc: metrics.geometric_collapse(gc, stats), "stats gc"
    ),
    "directional_cdnv": Metric(
        lambda embeddings, stats, labels, weights: metrics.directional_cdnv(
            embeddings, labels, stats, weights=weights
        ),
        "embeddings stats weights",
    ),
    "directional_error_bound": Metric(
        lambda stats, embeddings, labels: metrics.directional_error_bound(
            metrics.directional_cdnv(embeddings, labels, stats), stats, num_shots=400
        ),
        "stats embeddings",
    ),
    "relative_geometric_complexity": Metric(
        lambda stats, gc: metrics.relative_geometric_complexity(gc, stats), "stats gc"
    ),
    "squared_class_distance": Metric(lambda stats: metrics.squared_class_distance(stats), "stats"),
    "squared_embedding_norm": Metric(lambda stats: metrics.squared_embedding_norm(stats), "stats"),
    "nc1": Metric(lambda stats: metrics.nc1(stats), "stats"),
    "scatter_ratio": Metric(lambda stats: metrics.scatter_ratio(stats), "stats"),
    "embedding_rank": Metric(
        lambda embeddings, weights: metrics.embedding_rank(embeddings, weights=weights)
    ),
    "nc2": Metric(lambda stats: metrics.nc2(stats), "stats"),
    "nc3": Metric(lambda stats, head_kernel: metrics.nc3(stats, head_kernel), "stats head_kernel"),
    "gnc2": Metric(lambda stats: metrics.gnc2(stats), "stats"),
    "gnc3": Metric(
        lambda stats, head_kernel: metrics.gnc3(stats, head_kernel), "stats head_kernel"
    ),
    "nc4": Metric(
        lambda stats, embeddings, logits, weights: metrics.nc4(
            logits, embeddings, stats, weights=weights
        ),
        "weights",
    ),
    "nearest_class_mean": Metric(
        lambda stats, embeddings: metrics.nearest_class_mean(embeddings, stats)
    ),
    "class_geometric_complexity": Metric(
        lambda norms, labels, weights: metrics.class_geometric_complexity(
            norms, labels, C, weights=weights
        ),
        "norms weights",
    ),
    "geometric_complexity_interval hoeffding": Metric(
        lambda norms: metrics.geometric_complexity_interval(
            norms, value_range=3.0, delta=0.5, method="hoeffding"
        ),
        "norms",
    ),
    "geometric_complexity_interval empirical_bernstein": Metric(
        lambda norms: metrics.geometric_complexity_interval(norms, value_range=3.0, delta=0.9),
        "norms",
    ),
    "poincare_constant": Metric(
        lambda stats, class_gc: metrics.poincare_constant(class_gc, stats), "stats class_gc"
    ),
    "neural_collapse_bound": Metric(
        lambda stats, class_gc, constant: metrics.neural_collapse_bound(
            class_gc, stats, poincare_constant=constant
        ),
        "stats class_gc constant",
    ),
    "nearest_mean_error_bound": Metric(
        lambda nc: metrics.nearest_mean_error_bound(nc, C, num_shots=5), "nc"
    ),
    "squared_gradient_norm": of_loss(metrics.squared_gradient_norm),
    "sam_sharpness": of_loss(metrics.sam_sharpness, rho=0.5),
    "hessian_trace": of_loss(metrics.hessian_trace, key=KEY, num_probes=2),
    "hessian_top_eigenvalue": of_loss(metrics.hessian_top_eigenvalue, key=KEY, num_iterations=3),
}


def every_metric(test=None, *, of=lambda metric: True):
    """Parametrizes a test by the names of metrics."""
    if test is None:
        return partial(every_metric, of=of)
    return pytest.mark.parametrize("name", names(of))(test)


def names(of=lambda metric: True):
    return [name for name, metric in METRICS.items() if of(metric)]


def arguments():
    """Every argument as JAX arrays of 32 bits."""
    return jax.tree.map(jnp.asarray, DATA)


def call(name, arguments):
    """The metric of those of the arguments that it takes."""
    return METRICS[name].call(**{key: arguments[key] for key in METRICS[name].names})


def floats(tree):
    return jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jnp.floating) else None, tree)


def filled(tree, whole):
    """`tree` with what it leaves out taken from `whole`."""
    return jax.tree.map(
        lambda x, other: other if x is None else x, tree, whole, is_leaf=lambda x: x is None
    )


def projected(values, xp=jnp):
    """One number of all that a metric returns; NaN, where it is not defined, left out."""
    total = 0.0
    for leaf in jax.tree.leaves(values):
        mix = xp.cos(xp.arange(float(leaf.size))).reshape(leaf.shape)
        total = total + xp.sum(xp.where(xp.isfinite(leaf), leaf * mix, 0))
    return total


def value_and_gradients(name, arguments):
    """The metric, and the gradients of its projection by all smooth arguments."""

    def value(smooth):
        values = call(name, arguments | filled(smooth, {key: arguments[key] for key in smooth}))
        return projected(values), values

    smooth = floats({key: arguments[key] for key in METRICS[name].smooth.split()})
    (_, values), gradients = jax.value_and_grad(value, has_aux=True)(smooth)
    return values, gradients


@jit
def _measure_all(arguments):
    return {name: value_and_gradients(name, arguments) for name in METRICS}


def measure(**changed):
    """(values, gradients) of every metric by name, in NumPy, with some arguments changed.

    One program for all tests, which costs less than one a metric.
    """
    return jax.tree.map(np.asarray, _measure_all(arguments() | changed))


@functools.cache
def measured():
    """The same with no argument changed."""
    return measure()
