"""Every public metric under jit, vmap, grad, shardings, shard_map and padding."""

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
    arguments_of,
    assert_close,
    embed,
    every_metric,
    filled,
    floats,
    jit,
    loss,
    of,
    program,
    projected,
    statistics,
)

MESH = jax.sharding.Mesh(jax.devices(), ("data",))
ALONG = PartitionSpec("data")


def test_every_public_function_is_here():
    functions = {name for name in metrics.__all__ if inspect.isfunction(getattr(metrics, name))}
    # The first is part of what every example of the second starts from; the last cannot be traced.
    others = {"init_class_statistics", "geometric_complexity_to_error"}
    assert functions - others == {name.split()[0] for name in METRICS}


@every_metric(of=lambda metric: metric.typical)
def test_jit_equals_eager(name):
    arguments = arguments_of(name)
    assert_close(program(name)(arguments)[0], METRICS[name].call(**arguments))


def stacked(name, num):
    """`num` variants of the first argument in one array, the other arguments, and a loop's answer.

    A stack of models for a loss or a network, of epochs or layers for statistics.
    """
    arguments = arguments_of(name)
    first = METRICS[name].names[0]

    def variants(x):
        return jnp.stack([x * (1 + i / num) for i in range(num)]).astype(x.dtype)

    stack = {first: jax.tree.map(variants, arguments[first])}
    answers = [
        program(name)(arguments | jax.tree.map(lambda x, i=i: x[i], stack))[0] for i in range(num)
    ]
    del arguments[first]
    return stack, arguments, jax.tree.map(lambda *x: np.stack(x), *answers)


@every_metric
def test_vmap_equals_a_loop(name):
    stack, others, answers = stacked(name, 3)
    # The other arguments are constants: concrete, but what is computed from them is not.
    mapped = jax.vmap(lambda x: METRICS[name].call(**x, **others))
    assert_close(jit(mapped)(stack), answers)


@every_metric
def test_shard_map_equals_a_loop(name):
    """One model, or the statistics of one, a device."""
    stack, others, answers = stacked(name, 8)

    def of_device(stack, others):
        answer = METRICS[name].call(**jax.tree.map(lambda x: x[0], stack), **others)
        return jax.tree.map(lambda x: x[None], answer)

    mapped = jax.shard_map(of_device, mesh=MESH, in_specs=(ALONG, PartitionSpec()), out_specs=ALONG)
    assert_close(jit(mapped)(stack, others), answers)


def test_device_loops_run_under_shard_map(monkeypatch):
    """Blocks are looped over on accelerators, unrolled on the CPU."""
    monkeypatch.setattr("gc_nc.metrics.jacobian_products._MAX_UNROLLED_BLOCKS", 0)
    arguments = arguments_of("jacobian_norms")

    def of_shard(params, inputs):
        return metrics.jacobian_norms(of(embed, params), inputs, chunk_size=1)

    specs = (PartitionSpec(), ALONG)
    mapped = jax.shard_map(of_shard, mesh=MESH, in_specs=specs, out_specs=ALONG)
    assert_close(jit(mapped)(*arguments.values()), program("jacobian_norms")(arguments)[0])


@every_metric(of=lambda metric: metric.typical and set(metric.names) & set(OF_EXAMPLES))
def test_sharded_examples_change_nothing(name):
    arguments = arguments_of(name)
    placed = {
        key: jax.device_put(
            value, NamedSharding(MESH, ALONG if key in OF_EXAMPLES else PartitionSpec())
        )
        for key, value in arguments.items()
    }
    assert_close(jit(METRICS[name].call)(**placed), program(name)(arguments)[0])


@every_metric(of=lambda metric: metric.smooth)
def test_gradients_equal_central_differences(name):
    arguments = arguments_of(name)
    _, gradients = program(name)(arguments)

    for seed, (key, gradient) in enumerate(gradients.items()):
        at, unravel = ravel_pytree(floats(arguments[key]))
        step = small_step(at, seed)

        def value(t, key=key, at=at, unravel=unravel, step=step):
            changed = filled(unravel(at + t * step), arguments[key])
            values, _ = program(name)(arguments | {key: changed})
            return projected(jax.tree.map(np.float64, values), np)

        gradient = ravel_pytree(gradient)[0]
        # Some directions are nearly flat, and float32 knows the value to 1e-7 only.
        atol = 1e-3 * np.linalg.norm(gradient) * np.linalg.norm(step)
        np.testing.assert_allclose(gradient @ step, central_difference(value), rtol=1e-3, atol=atol)


def small_step(at, seed):
    """A random direction, 2% of an entry long on average."""
    direction = np.random.default_rng(seed).normal(size=at.shape).astype(np.float32)
    return direction * np.float32(
        0.02 * np.linalg.norm(at) / at.size**0.5 / np.linalg.norm(direction)
    )


def central_difference(function):
    """Derivative at 0, to fourth order."""
    near, far = (function(t) - function(-t) for t in (1, 2))
    return (8 * near - far) / 12


@every_metric(of=lambda metric: "weights" in metric.names)
def test_rows_of_weight_0_change_nothing(name):
    arguments = arguments_of(name)
    arguments["weights"] = arguments["weights"].at[-3:].set(0)
    padded = dict(arguments)
    for key in set(OF_EXAMPLES) & set(arguments) - {"weights"}:
        padded[key] = arguments[key].at[-3:].set(99 if key == "labels" else np.nan)
    (value, gradients), (expected, others) = program(name)(padded), program(name)(arguments)
    assert_close(value, expected)
    for key, gradient in gradients.items():
        if key in OF_EXAMPLES:
            # A weight's own derivative is about the row that it would let in.
            np.testing.assert_array_equal(gradient[-3:] * (key != "weights"), 0)
            gradients[key], others[key] = gradient[:-3], others[key][:-3]
    assert_close(gradients, others, atol=1e-7)


def test_geometric_complexity_of_shards_by_psum():
    arguments = arguments_of("geometric_complexity")

    def of_shard(params, inputs, weights):
        gc = metrics.geometric_complexity(of(embed, params), inputs, weights=weights)
        total = jnp.sum(weights)
        return jax.lax.psum(gc * total, "data") / jax.lax.psum(total, "data")

    specs = (PartitionSpec(), ALONG, ALONG)
    mapped = jax.shard_map(of_shard, mesh=MESH, in_specs=specs, out_specs=PartitionSpec())
    values, gradients = program("geometric_complexity")(arguments)
    assert_close(jit(mapped)(*arguments.values()), values)
    # A penalty in data-parallel training.
    assert_close(jit(jax.grad(mapped))(*arguments.values()), gradients["params"], atol=1e-6)


def test_statistics_of_shards_merge_by_all_gather():
    arguments = arguments_of("update_class_statistics")

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

    mapped = jax.shard_map(of_shard, mesh=MESH, in_specs=ALONG, out_specs=PartitionSpec())
    expected = jit(lambda *rows: collapse(statistics(*rows)))(*arguments.values())
    assert_close(jit(mapped)(*arguments.values()), expected)


@every_metric(of=lambda metric: metric.names == ("params",))
def test_flatness_of_a_loss_over_shards(name, monkeypatch):
    arguments, whole = arguments_of(name), metric_table.loss
    expected = program(name)(arguments)[0]

    def of_shard(params, inputs):
        def mean_loss(params):
            return jax.lax.pmean(whole(params, inputs), "data")

        monkeypatch.setattr(metric_table, "loss", mean_loss)
        return METRICS[name].call(params)

    specs = (PartitionSpec(), ALONG)
    mapped = jax.shard_map(of_shard, mesh=MESH, in_specs=specs, out_specs=PartitionSpec())
    value = jit(mapped)(arguments["params"], jnp.asarray(DATA["inputs"]))
    # atol: differences of losses and of Hessian entries.
    assert_close(value, expected, atol=1e-6)


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


@pytest.mark.parametrize("name", PENALTIES)
def test_gradient_of_the_squared_gradient_equals_central_differences(name):
    """A penalty on the slope of a penalty; its gradient is twice a Hessian-vector product."""
    theta, unravel = ravel_pytree(jax.tree.map(jnp.asarray, DATA["params"]))
    inputs, labels = jnp.asarray(DATA["inputs"]), jnp.asarray(DATA["labels"])

    @jit
    def gradients(theta):
        gradient = jax.grad(lambda theta: PENALTIES[name](unravel(theta), inputs, labels))
        square = jax.grad(lambda theta: jnp.sum(gradient(theta) ** 2))
        return gradient(theta), square(theta)

    step = small_step(theta, 0)

    def value(t):
        return np.sum(np.float64(gradients(theta + t * step)[0]) ** 2)

    _, slope = gradients(theta)
    atol = 1e-3 * np.linalg.norm(slope) * np.linalg.norm(step)
    np.testing.assert_allclose(slope @ step, central_difference(value), rtol=1e-3, atol=atol)
