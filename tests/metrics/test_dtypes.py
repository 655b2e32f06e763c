"""Every public metric casts up first and computes in float32, whatever it is given."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.metrics import metric_table
from tests.metrics.metric_table import (
    DATA,
    METRICS,
    arguments,
    call,
    embed,
    jit,
    names,
)
from tests.rounding import assert_same_numbers


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


def arguments_in(dtype, name):
    """The metric's arguments in this dtype, and the same numbers in 32 bits."""
    used = METRICS[name].names
    # What a network computes in is its own affair: the next test.
    own = {"params"} & {*used} if "inputs" in used else set()
    given = {
        key: jax.tree.map(partial(given_as, np.float32 if key in own else dtype, key), DATA[key])
        for key in used
    }
    cast = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32 if x.dtype == dtype else None), given)
    return given, cast


def takes(dtype, name):
    """Whether an argument can be of this dtype: statistics are float32 whatever they are of."""
    used = {*METRICS[name].names} - {"stats", "other", "labels"}
    if "inputs" in used:
        used -= {"params"}
    if dtype is bool:
        return "weights" in used
    if np.dtype(dtype).kind in "biu":
        return any(np.ndim(DATA[key]) for key in used - {"params"})
    return bool(used)


DTYPES = (jnp.bfloat16, jnp.float16, np.uint8, np.int64, np.float64, bool)
#: Half precision; the others are slow.
TYPICAL_DTYPES = (jnp.bfloat16,)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=() if dtype in TYPICAL_DTYPES else pytest.mark.slow)
        for name in names(lambda metric: metric.typical)
        for dtype in DTYPES
        if takes(dtype, name)
    ],
)
def test_other_dtypes_are_cast_up_first(name, dtype):
    given, cast = arguments_in(dtype, name)
    value = call(name, given)
    assert_float32(value)
    assert_same_numbers(value, call(name, cast))


OF_NETWORKS = names(lambda metric: "params" in metric.names and metric.typical)


@functools.cache
def of_networks_in_bfloat16():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metric_table, "embed", embed_in_bfloat16)
        patch.setattr(metric_table, "loss", loss_in_bfloat16)
        return jit(lambda given: {name: call(name, given) for name in OF_NETWORKS})(arguments())


@pytest.mark.parametrize("name", OF_NETWORKS)
def test_networks_in_bfloat16_are_measured_in_float32(name):
    value, expected = of_networks_in_bfloat16()[name], call(name, arguments())
    assert_float32(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(value))
    size, expected_size = (np.linalg.norm(jax.tree.leaves(v)[0]) for v in (value, expected))
    # rtol: 8 bits; a second derivative or a difference of losses loses more of them.
    rtol = 0.02 if "inputs" in METRICS[name].names else 0.2
    np.testing.assert_allclose(size, expected_size, rtol=rtol)
    assert size != expected_size
