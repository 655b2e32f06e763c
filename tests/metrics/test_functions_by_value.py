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
from gc_nc.metrics.jacobian_products import _evaluate_compiled

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


def with_attribute(module):
    def function(x):
        return function.module(x)

    function.module = module
    return function


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
        lambda: jax.vmap(LINEAR),
        lambda: functools.wraps(jnp.tanh)(lambda x: LINEAR(x)),
        lambda: with_attribute(LINEAR),
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


def test_a_module_itself_updated_in_place_is_measured_anew():
    model = nnx.Linear(1, 1, use_bias=False, rngs=nnx.Rngs(0))
    for fn in (model, Partial(model), Partial(lambda x: model(x))):
        for scale in (3.0, 1.0):
            model.kernel[...] = jnp.full((1, 1), scale)
            assert geometric_complexity(fn, jnp.ones((2, 1))) == scale**2


def test_a_partial_of_a_closure_or_a_default_that_changed_is_measured_anew():
    scale = 1.0
    scales = [1.0]

    def closure(x):
        return scale * x

    def default(x, held=scales):
        return held[0] * x

    fns = [
        closure,
        default,
        functools.partial(lambda held, x: held[0] * x, scales),
        Partial(lambda x: closure(x)),
    ]
    for value in (1.0, 3.0):
        scale = scales[0] = value
        for fn in fns:
            fn = fn if isinstance(fn, Partial) else Partial(fn)
            assert geometric_complexity(fn, jnp.ones((2, 1))) == value**2


def test_a_function_that_holds_itself():
    def embed(x, depth=1):
        return embed(3 * x, depth - 1) if depth else x

    assert geometric_complexity(Partial(embed), jnp.ones((2, 1))) == 9


def test_a_partial_that_closes_over_values_compiles_once():
    model = nn.Dense(2)
    variables = model.init(jax.random.key(0), jnp.ones((1, 3)))

    def embed(variables, x):
        return model.apply(variables, x)

    first = geometric_complexity(Partial(embed, variables), jnp.ones((2, 3)))
    before = _evaluate_compiled._cache_size()
    doubled = jax.tree.map(lambda v: 2 * v, variables)
    second = geometric_complexity(Partial(embed, doubled), jnp.ones((2, 3)))
    assert _evaluate_compiled._cache_size() == before
    np.testing.assert_allclose(second, 4 * first, rtol=1e-6)


def test_a_partial_compiles_once():
    weight = jnp.array([[1.0, 2.0], [3.0, 4.0]])

    def gc_of(scale):
        fn = Partial(lambda w, x: x @ w, scale * weight)
        return geometric_complexity(fn, jnp.ones((2, 2)))

    np.testing.assert_allclose(gc_of(1), 30)
    before = _evaluate_compiled._cache_size()
    np.testing.assert_allclose([gc_of(2), gc_of(3)], [120, 270])
    assert _evaluate_compiled._cache_size() == before
