"""Two functions share a compiled program only if they compute the same: no stale answer."""

import dataclasses
import functools
import types
from collections import namedtuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gc_nc.metrics import geometric_complexity
from gc_nc.metrics.functions_by_value import comparable

Partial = jax.tree_util.Partial
Pair = namedtuple("Pair", "module other")
SCALE, LINEAR = 3.0, nnx.Linear(1, 1, use_bias=False, rngs=nnx.Rngs(0))


def set_linear(value):
    LINEAR.kernel[...] = jnp.full((1, 1), value)


@dataclasses.dataclass(frozen=True)
class Holder:
    module: object

    def __call__(self, x):
        return self.module(x)


class Scaled(nn.Module):
    scale: object

    def __call__(self, x):
        return x * (self.scale() if callable(self.scale) else self.scale)


def scaled_by_global(x):
    return SCALE * x


def twice_removed(x):
    return scaled_by_global(x)


def closure_over(held):
    return lambda x: held[0](x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: lambda x: LINEAR(x),
        lambda: closure_over((LINEAR,)),
        lambda: closure_over(Pair(LINEAR, 1)),
        lambda: closure_over([LINEAR]),
        lambda: (lambda held: lambda x: next(iter(held))(x))(frozenset([LINEAR])),
        lambda: Holder(LINEAR),
        lambda: LINEAR.__call__,
        lambda: functools.partial(lambda m, x: m(x), LINEAR),
        lambda: types.MethodType(lambda self, x: self(x), LINEAR),
    ],
)
def test_a_module_updated_in_place_is_measured_anew(make):
    found = []
    for value in (3.0, 1.0):
        set_linear(value)
        found.append(float(geometric_complexity(Partial(make()), jnp.ones((2, 1)))))
    np.testing.assert_allclose(found, [9, 1], rtol=1e-6)


@pytest.mark.parametrize("function", [scaled_by_global, twice_removed])
def test_a_changed_global_is_seen(function, monkeypatch):
    found = []
    for value in (3.0, 1.0):
        monkeypatch.setitem(function.__globals__, "SCALE", value)
        found.append(float(geometric_complexity(Partial(function), jnp.ones((2, 1)))))
    np.testing.assert_allclose(found, [9, 1], rtol=1e-6)


def test_what_has_no_value_is_not_shared():
    numbers = [3.0]
    for function in (
        numbers.__getitem__,
        {"a": 1}.get,
        Scaled(lambda: numbers[0]),
        jax.jit(lambda x: numbers[0] * x),
    ):
        assert comparable(Partial(function)) is None
    assert comparable(lambda x: x) is None


@pytest.mark.parametrize(("one", "other"), [(1, 1.0), (1, True), (0.0, -0.0), ((1,), (1.0,))])
def test_values_that_are_equal_and_yet_differ(one, other):
    for make in (lambda v: lambda x: (v, x), Scaled, Holder):
        assert comparable(Partial(make(one))).func != comparable(Partial(make(other))).func
        assert comparable(Partial(make(one))).func == comparable(Partial(make(one))).func


def test_what_is_equal_shares_a_program():
    def network(activation, w, x):
        return activation(x @ w)

    def wrapped(activation):
        return lambda w, x: network(activation, w, x)

    def recursive(x, depth=2):
        return recursive(x, depth - 1) if depth else x

    for make in (
        lambda: Partial(wrapped(jax.nn.relu), jnp.ones((2, 2))),
        lambda: Partial(closure_over((functools.partial(network, jnp.tanh),))),
        lambda: Partial(nn.Dense(3).apply, {"params": {}}),
        lambda: Partial(Scaled(jnp.float32)),
        lambda: Partial(recursive),
    ):
        first, second = comparable(make()), comparable(make())
        assert first is not None
        assert first.func == second.func
        assert hash(first.func) == hash(second.func)
