"""Every public metric casts up first and computes in float32, whatever it is given."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gc_nc import metrics
from tests.metrics import metric_table
from tests.metrics.metric_table import (
    DATA,
    KEY,
    METRICS,
    SHAPE,
    arguments_of,
    assert_close,
    embed,
    every_metric,
    jit,
    of,
    program,
)


def assert_float32(values):
    for leaf in jax.tree.leaves(values):
        assert leaf.dtype == jnp.float32 or jnp.issubdtype(leaf.dtype, jnp.integer)


def embed_in_bfloat16(params, x):
    half = partial(jnp.asarray, dtype=jnp.bfloat16)
    return embed(jax.tree.map(half, params), half(x))


def loss_in_bfloat16(params):
    return jnp.mean(embed_in_bfloat16(params, DATA["inputs"]) ** 3)


def given_as(dtype, key, value):
    """An argument in this dtype, where that is one of its dtypes."""
    whole = np.dtype(dtype).kind in "biu"
    if key in ("stats", "other", "labels") or (whole and (value.ndim == 0 or key == "params")):
        return jnp.asarray(value)
    if dtype is bool:
        return value > 1 if key == "weights" else jnp.asarray(value)
    value = np.abs(np.round(value)) if whole else value
    # Half precision is JAX's; what is wider than JAX's 32 bits is NumPy's.
    return (jnp if dtype in (jnp.bfloat16, jnp.float16) else np).asarray(value, dtype)


@every_metric(of=lambda metric: metric.typical)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, np.uint8, np.int64, np.float64, bool])
def test_other_dtypes_are_cast_up_first(name, dtype):
    names = METRICS[name].names
    # What a network computes in is its own affair: the next test.
    own = {"params"} & {*names} if "inputs" in names else set()
    given = {
        key: jax.tree.map(partial(given_as, np.float32 if key in own else dtype, key), DATA[key])
        for key in names
    }
    cast = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32 if x.dtype == dtype else None), given)
    value = METRICS[name].call(**given)
    assert_float32(value)
    assert_close(value, METRICS[name].call(**cast), rtol=0)


@every_metric(of=lambda metric: "params" in metric.names and metric.typical)
def test_networks_in_bfloat16_are_measured_in_float32(name, monkeypatch):
    expected, _ = program(name)(arguments_of(name))
    monkeypatch.setattr(metric_table, "embed", embed_in_bfloat16)
    monkeypatch.setattr(metric_table, "loss", loss_in_bfloat16)
    value = jit(METRICS[name].call)(**arguments_of(name))
    assert_float32(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(value))
    size, expected_size = (np.linalg.norm(jax.tree.leaves(v)[0]) for v in (value, expected))
    # rtol: 8 bits; a second derivative or a difference of losses loses more of them.
    rtol = 0.02 if "inputs" in METRICS[name].names else 0.2
    np.testing.assert_allclose(size, expected_size, rtol=rtol)
    assert size != expected_size


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, np.uint8, np.float64])
def test_a_planned_estimate_takes_any_dtype(dtype):
    """It plans on the host, so it is not one of METRICS."""
    params = jax.tree.map(jnp.asarray, DATA["params"])
    inputs = given_as(dtype, "inputs", np.random.default_rng(1).normal(size=(64, *SHAPE)))

    def measure(inputs):
        return metrics.geometric_complexity_to_error(
            of(embed, params), inputs, KEY, relative_error=0.5
        )

    value, cast = measure(inputs), jnp.asarray(inputs, jnp.float32)
    assert_float32(value[:2])
    assert_close(value, measure(cast), rtol=1e-6)
