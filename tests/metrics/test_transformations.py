"""Every public metric under jit, vmap, grad, shardings, shard_map and padding.

Each transformation compiles all metrics as one program, once, and a test looks at one metric in it:
a program for each of them would cost several times as much.
"""

import functools
import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding, PartitionSpec

from gc_nc import metrics
from tests.metrics import metric_table
from tests.metrics.metric_table import (
    DATA,
    KEY,
    METRICS,
    OF_EXAMPLES,
    arguments,
    call,
    embed,
    every_metric,
    filled,
    floats,
    jit,
    loss,
    measure,
    measured,
    names,
    of,
    projected,
    statistics,
)
from tests.rounding import assert_same_numbers

MESH = jax.sharding.Mesh(jax.devices(), ("data",))
ALONG, EVERYWHERE = PartitionSpec("data"), PartitionSpec()
NUM_VARIANTS = 8
MAPPED = names(lambda metric: metric.mapped)


def test_every_public_function_is_here():
    functions = {name for name in metrics.__all__ if inspect.isfunction(getattr(metrics, name))}
    # The first is part of what every example of the second starts from; the last cannot be traced.
    others = {"init_class_statistics", "geometric_complexity_to_error"}
    assert functions - others == {name.split()[0] for name in METRICS}


@every_metric(of=lambda metric: metric.typical)
def test_jit_equals_eager(name):
    values, _ = measured()[name]
    assert_same_numbers(call(name, arguments()), values)


@functools.cache
def stacks():
    """By name, variants of each argument that is some metric's first, stacked in one array.

    A stack of models for a loss or a network, of epochs or layers for statistics.
    """

    def stacked(x):
        return np.stack([x * (1 + i / NUM_VARIANTS) for i in range(NUM_VARIANTS)]).astype(x.dtype)

    return {
        key: jax.tree.map(lambda x: stacked(np.asarray(x)), arguments()[key])
        for key in {metric.names[0] for metric in METRICS.values()}
    }


@functools.cache
def looped(key):
    """Every metric of each variant of this argument in turn, stacked."""
    runs = [
        measure(**{key: jax.tree.map(lambda x, i=i: x[i], stacks()[key])})
        for i in range(NUM_VARIANTS)
    ]
    return {
        name: jax.tree.map(lambda *x: np.stack(x), *(run[name][0] for run in runs))
        for name in MAPPED
    }


def of_first_argument(name, others):
    """The metric as a function of its first argument."""
    first = METRICS[name].names[0]
    return first, lambda x: call(name, others | {first: x})


@functools.cache
def mapped_by_vmap():
    # Constants: concrete, but what is computed from them is not.
    others = arguments()

    @jit
    def mapped(stacks):
        found = {}
        for name in MAPPED:
            first, metric = of_first_argument(name, others)
            found[name] = jax.vmap(metric)(stacks[first])
        return found

    return mapped(stacks())


@functools.cache
def mapped_by_shard_map():
    """One model, or the statistics of one, a device."""

    def of_device(stacks, others):
        found = {}
        for name in MAPPED:
            first, metric = of_first_argument(name, others)
            found[name] = metric(jax.tree.map(lambda x: x[0], stacks[first]))
        return jax.tree.map(lambda x: x[None], found)

    mapped = jax.shard_map(of_device, mesh=MESH, in_specs=(ALONG, EVERYWHERE), out_specs=ALONG)
    return jit(mapped)(stacks(), arguments())


@pytest.mark.parametrize("name", MAPPED)
def test_vmap_equals_a_loop(name):
    assert_same_numbers(mapped_by_vmap()[name], looped(METRICS[name].names[0])[name])


@pytest.mark.parametrize("name", MAPPED)
def test_shard_map_equals_a_loop(name):
    assert_same_numbers(mapped_by_shard_map()[name], looped(METRICS[name].names[0])[name])


def test_device_loops_run_under_shard_map(monkeypatch):
    """Blocks are looped over on accelerators, unrolled on the CPU."""
    monkeypatch.setattr("gc_nc.metrics.jacobian_products._MAX_UNROLLED_BLOCKS", 0)

    def of_shard(params, inputs):
        return metrics.squared_jacobian_norms(of(embed, params), inputs, chunk_size=1)

    mapped = jax.shard_map(of_shard, mesh=MESH, in_specs=(EVERYWHERE, ALONG), out_specs=ALONG)
    norms = jit(mapped)(arguments()["params"], arguments()["inputs"])
    assert_same_numbers(norms, measured()["squared_jacobian_norms"][0])


TYPICAL_OF_EXAMPLES = names(lambda metric: metric.typical and set(metric.names) & set(OF_EXAMPLES))


@functools.cache
def of_sharded_examples():
    placed = {
        key: jax.device_put(value, NamedSharding(MESH, ALONG if key in OF_EXAMPLES else EVERYWHERE))
        for key, value in arguments().items()
    }
    return jit(lambda placed: {name: call(name, placed) for name in TYPICAL_OF_EXAMPLES})(placed)


@pytest.mark.parametrize("name", TYPICAL_OF_EXAMPLES)
def test_sharded_examples_change_nothing(name):
    assert_same_numbers(of_sharded_examples()[name], measured()[name][0])


@functools.cache
def stepped(key):
    """A small step of this argument, and every metric's projection at t = -2..2 steps."""
    argument = arguments()[key]
    at, unravel = ravel_pytree(floats(argument))
    step = small_step(at, seed=list(DATA).index(key))
    projections = {name: {} for name in METRICS}
    for t in (-2, -1, 1, 2):
        found = measure(**{key: filled(unravel(at + t * step), argument)})
        for name, (values, _) in found.items():
            projections[name][t] = projected(jax.tree.map(np.float64, values), np)
    return step, projections


@every_metric(of=lambda metric: metric.smooth)
def test_gradients_equal_central_differences(name):
    _, gradients = measured()[name]
    assert set(gradients) == set(METRICS[name].smooth.split())
    for key, gradient in gradients.items():
        step, projections = stepped(key)
        check_slope(ravel_pytree(gradient)[0], step, projections[name])


def small_step(at, seed):
    """A random direction, 2% of an entry long on average."""
    direction = np.random.default_rng(seed).normal(size=at.shape).astype(np.float32)
    return direction * np.float32(
        0.02 * np.linalg.norm(at) / at.size**0.5 / np.linalg.norm(direction)
    )


def check_slope(gradient, step, values):
    """Against the central difference of fourth order of `values` at -2, -1, 1 and 2 steps."""
    near, far = (values[t] - values[-t] for t in (1, 2))
    # Some directions are nearly flat, and float32 knows the value to 1e-7 only.
    atol = 1e-3 * np.linalg.norm(gradient) * np.linalg.norm(step)
    np.testing.assert_allclose(gradient @ step, (8 * near - far) / 12, rtol=1e-3, atol=atol)


@functools.cache
def of_padded_rows():
    """Every metric where rows of weight 0 hold NaN, and where they hold examples."""
    given = arguments()
    weights = given["weights"].at[-3:].set(0)
    padding = {
        key: given[key].at[-3:].set(99 if key == "labels" else np.nan)
        for key in set(OF_EXAMPLES) - {"weights"}
    }
    return measure(weights=weights, **padding), measure(weights=weights)


@every_metric(of=lambda metric: "weights" in metric.names)
def test_rows_of_weight_0_change_nothing(name):
    (value, gradients), (expected, others) = (found[name] for found in of_padded_rows())
    assert_same_numbers(value, expected)
    for key, gradient in gradients.items():
        other = others[key]
        if key in OF_EXAMPLES:
            # A weight's own derivative is about the row that it would let in.
            np.testing.assert_array_equal(gradient[-3:] * (key != "weights"), 0)
            gradient, other = gradient[:-3], other[:-3]
        assert_same_numbers(gradient, other)


def test_geometric_complexity_of_shards_by_psum():
    def of_shard(params, inputs, weights):
        gc = metrics.geometric_complexity(of(embed, params), inputs, weights=weights)
        total = jnp.sum(weights)
        return jax.lax.psum(gc * total, "data") / jax.lax.psum(total, "data")

    specs = (EVERYWHERE, ALONG, ALONG)
    mapped = jax.shard_map(of_shard, mesh=MESH, in_specs=specs, out_specs=EVERYWHERE)
    given = [arguments()[key] for key in ("params", "inputs", "weights")]
    # The gradient is that of a penalty in data-parallel training.
    value, gradient = jit(jax.value_and_grad(mapped))(*given)
    expected, gradients = measured()["geometric_complexity"]
    assert_same_numbers(value, expected)
    assert_same_numbers(gradient, gradients["params"])


def test_statistics_of_shards_merge_by_all_gather():
    def collapse(stats):
        return metrics.neural_collapse(stats), metrics.nc1(stats), *metrics.nc2(stats)

    def of_shard(embeddings, labels, weights):
        shards = jax.lax.all_gather(statistics(embeddings, labels, weights), "data")
        first, rest = (jax.tree.map(lambda x, s=s: x[s], shards) for s in (0, slice(1, None)))
        merged, _ = jax.lax.scan(
            lambda stats, shard: (metrics.merge_class_statistics(stats, shard), None), first, rest
        )
        # All devices have the same, which shard_map cannot know.
        return jax.lax.pmean(collapse(merged), "data")

    mapped = jax.shard_map(of_shard, mesh=MESH, in_specs=ALONG, out_specs=EVERYWHERE)
    rows = [arguments()[key] for key in ("embeddings", "labels", "weights")]
    expected = jit(lambda *rows: collapse(statistics(*rows)))(*rows)
    assert_same_numbers(jit(mapped)(*rows), expected)


def test_flatness_of_a_loss_over_shards(monkeypatch):
    expected, whole = measured(), metric_table.loss
    of_losses = names(lambda metric: metric.names == ("params",))

    def of_shard(params, inputs):
        def mean_loss(params):
            return jax.lax.pmean(whole(params, inputs), "data")

        monkeypatch.setattr(metric_table, "loss", mean_loss)
        return {name: call(name, {"params": params}) for name in of_losses}

    mapped = jax.shard_map(of_shard, mesh=MESH, in_specs=(EVERYWHERE, ALONG), out_specs=EVERYWHERE)
    found = jit(mapped)(arguments()["params"], arguments()["inputs"])
    assert len(found) == 4
    for name, values in found.items():
        assert_same_numbers(values, expected[name][0])


def collapse(metric, params, inputs, labels):
    return metric(statistics(embed(params, inputs), labels))


PENALTIES = {
    "geometric_complexity": lambda params, inputs, labels: metrics.geometric_complexity(
        of(embed, params), inputs
    ),
    "output_probes": lambda params, inputs, labels: (
        metrics.estimate_geometric_complexity(of(embed, params), inputs, KEY).mean
    ),
    "neural_collapse": partial(collapse, metrics.neural_collapse),
    "nc1": partial(collapse, metrics.nc1),
    "squared_gradient_norm": lambda params, *_: metrics.squared_gradient_norm(loss, params),
    "sam_sharpness": lambda params, *_: metrics.sam_sharpness(loss, params, rho=0.5),
}


@functools.cache
def second_order():
    """A small step of the parameters; by penalty, its |gradient|^2 along it, and the slope of that.

    A penalty on the slope of a penalty: the gradient is twice a Hessian-vector product.
    """
    theta, unravel = ravel_pytree(arguments()["params"])
    inputs, labels = arguments()["inputs"], arguments()["labels"]

    def squared_slope(name, theta):
        gradient = jax.grad(lambda theta: PENALTIES[name](unravel(theta), inputs, labels))(theta)
        return jnp.sum(gradient**2)

    @jit
    def all_slopes(theta):
        return {name: jax.value_and_grad(partial(squared_slope, name))(theta) for name in PENALTIES}

    step = small_step(theta, seed=0)
    return step, {t: all_slopes(theta + t * step) for t in range(-2, 3)}


@pytest.mark.parametrize("name", PENALTIES)
def test_gradient_of_the_squared_gradient_equals_central_differences(name):
    step, found = second_order()
    check_slope(found[0][name][1], step, {t: np.float64(found[t][name][0]) for t in found})
