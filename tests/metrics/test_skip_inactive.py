"""Exact norms from active units alone: same value, fewer products, refused where it is wrong."""

from functools import partial

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from gc_nc.metrics import geometric_complexity, squared_jacobian_norms
from gc_nc.metrics import jacobian_products as products
from tests.metrics.metric_table import jit
from tests.rounding import assert_same_numbers


def relu_weights(inputs=30, outputs=24):
    return np.random.default_rng(0).normal(size=(outputs, inputs)).astype(np.float32)


def relu_network(weight, x):
    return jax.nn.relu(x @ jnp.asarray(weight).T)


def inputs_of(batch):
    return np.random.default_rng(1).normal(size=(batch, 30)).astype(np.float32)


def test_same_value():
    embed, x = jax.tree_util.Partial(relu_network, relu_weights()), inputs_of(11)
    expected = squared_jacobian_norms(embed, x)
    active = int(np.max(np.sum(np.asarray(embed(x)) > 0, axis=1)))
    assert active < 24
    measured = squared_jacobian_norms(embed, x, skip_inactive=True)
    assert_same_numbers(measured, expected)
    traced = jit(
        lambda x: squared_jacobian_norms(
            embed, x, chunk_size=3, skip_inactive=True, most_active=active
        )
    )(x)
    assert_same_numbers(traced, expected)
    gc = geometric_complexity(embed, x, skip_inactive=True)
    assert_same_numbers(gc, np.mean(expected))


def test_cost_is_the_largest_active_count(monkeypatch):
    monkeypatch.setattr(products, "PRODUCTS_PER_BLOCK", 11)  # a row a block
    embed, x = jax.tree_util.Partial(relu_network, relu_weights()), inputs_of(11)
    rows = []

    def counting(embed_fn):
        compiled = original(embed_fn)

        def run(inputs, auxiliary, row, *, block):
            rows.append(type(block).__name__)
            return compiled(inputs, auxiliary, row, block=block)

        return run

    original = products.compile_block
    monkeypatch.setattr(products, "compile_block", counting)
    squared_jacobian_norms(embed, x, skip_inactive=True)
    active = int(np.max(np.sum(np.asarray(embed(x)) > 0, axis=1)))
    assert rows.count("RowBlock") == active < 24


def test_nothing_active():
    embed = jax.tree_util.Partial(relu_network, -np.abs(relu_weights()))
    norms = squared_jacobian_norms(embed, np.abs(inputs_of(11)), skip_inactive=True)
    np.testing.assert_array_equal(norms, np.zeros(11))


def test_an_embedding_without_relu_is_refused():
    x = inputs_of(4)

    def squared_distance_to_first(x):  # 0 at the first example's own value, but not flat below
        return x[:, :3] - jnp.asarray(inputs_of(4)[:1, :3])

    with pytest.raises(ValueError, match="example 0 has units at 0 whose Jacobian rows are not 0"):
        squared_jacobian_norms(squared_distance_to_first, x, skip_inactive=True)
    traced = jit(
        lambda x: squared_jacobian_norms(
            squared_distance_to_first, x, skip_inactive=True, most_active=3
        )
    )(x)
    np.testing.assert_array_equal(np.isnan(traced), [True, False, False, False])


def test_too_small_a_limit_is_no_answer():
    embed, x = jax.tree_util.Partial(relu_network, relu_weights()), inputs_of(11)
    counts = np.sum(np.asarray(embed(x)) > 0, axis=1)
    limit = int(np.sort(counts)[5])
    with pytest.raises(ValueError, match=f"an example has {counts.max()} active units"):
        squared_jacobian_norms(embed, x, skip_inactive=True, most_active=limit)
    traced = jit(lambda x: squared_jacobian_norms(embed, x, skip_inactive=True, most_active=limit))(
        x
    )
    np.testing.assert_array_equal(np.isnan(traced), counts > limit)


@pytest.mark.parametrize(
    ("most_active", "wrap"),
    [pytest.param(None, lambda f: f, marks=pytest.mark.slow), (24, jax.jit)],
)
def test_differentiation_is_refused(most_active, wrap):
    def gc(weight):
        embed = partial(relu_network, weight)
        return geometric_complexity(
            embed, inputs_of(3), skip_inactive=True, most_active=most_active
        )

    with pytest.raises(ValueError, match="skip_inactive"):
        wrap(jax.grad(gc))(relu_weights())


def test_bad_input_is_named(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    embed, x = partial(relu_network, relu_weights()), inputs_of(3)
    for wrong in (0, 1, 64, None, np.int32(3), "yes"):
        with pytest.raises(ValueError, match=r"skip_inactive=.* must be True or False; .*most_act"):
            squared_jacobian_norms(embed, x, skip_inactive=wrong)
    with pytest.raises(ValueError, match="most_active=0 must be at least 1"):
        squared_jacobian_norms(embed, x, skip_inactive=True, most_active=0)
    with pytest.raises(ValueError, match="most_active=3 needs skip_inactive=True"):
        geometric_complexity(embed, x, most_active=3)
    assert geometric_complexity(embed, x, skip_inactive=np.bool_(True)) > 0
    with pytest.raises(ValueError, match="needs concrete arrays"):
        jax.jit(lambda x: squared_jacobian_norms(embed, x, skip_inactive=True))(x)
