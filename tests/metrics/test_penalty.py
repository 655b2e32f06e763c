"""The GC penalty against closed forms and finite differences, for networks of any library."""

from functools import partial

import equinox as eqx
import flax.linen as nn
import jax
import jax.flatten_util
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx

from gc_nc.metrics import PENALTY_METHODS, geometric_complexity_with_outputs
from gc_nc.metrics.penalty import MAX_EXACT_DIM
from gc_nc.models import layers
from tests.rounding import assert_same_numbers

KEY = jax.random.key(0)


#: The default quickly, the others among the slow tests.
METHODS = [
    pytest.param(method, marks=() if method == "output_probes" else pytest.mark.slow)
    for method in PENALTY_METHODS
]


@pytest.fixture(autouse=True)
def _full_precision():
    """Closed forms are held to more digits than TF32 has."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.mark.parametrize(
    ("method", "num_probes"),
    [
        ("output_probes", 1),
        pytest.param("input_probes", 1, marks=pytest.mark.slow),
        ("exact", 1),
        pytest.param("output_probes", 3, marks=pytest.mark.slow),
    ],
)
def test_a_linear_map(method, num_probes):
    """GC = |W|_F^2; by one product the estimate's mean, over many keys, is that."""
    w = jax.random.normal(KEY, (3, 5))

    def estimate(w, key):
        return geometric_complexity_with_outputs(
            lambda x: (x @ w.T, "other"), x, key, method=method, num_probes=num_probes
        )

    x = jnp.ones((2, 5))
    _, other = estimate(w, KEY)
    assert other == "other"
    keys = jax.random.split(KEY, 1 if method == "exact" else 4000)
    mean, slope = jax.vmap(jax.value_and_grad(lambda w, key: estimate(w, key)[0]), (None, 0))(
        w, keys
    )
    for sample, expected in ((mean, jnp.sum(w**2)), (slope, 2 * w)):
        sem = jnp.std(sample, axis=0) / np.sqrt(len(keys))
        assert np.all(np.abs(jnp.mean(sample, axis=0) - expected) < 4.5 * sem + 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["output_probes", "input_probes"])
def test_every_example_has_probes_of_its_own(method):
    w = jax.random.normal(KEY, (20, 30))
    x = jnp.ones((2, 30))
    values = [
        geometric_complexity_with_outputs(lambda x: (x @ w.T, None), rows, KEY, method=method)[0]
        for rows in (x, x[:1])
    ]
    assert values[0] != values[1]


@pytest.mark.parametrize("method", METHODS)
def test_gradient_equals_finite_differences_on_a_smooth_network(method):
    model = nn.Sequential([nn.Dense(6), nn.tanh, nn.Dense(4), nn.tanh])
    x = jax.random.normal(KEY, (3, 5))
    params = model.init(KEY, x)
    flat, unravel = jax.flatten_util.ravel_pytree(params)

    @jax.jit
    def penalty(flat):
        network = partial(model.apply, unravel(flat))
        return geometric_complexity_with_outputs(
            lambda x: (network(x), None), x, KEY, method=method
        )[0]

    direction = jax.random.normal(jax.random.key(1), flat.shape)
    slope = jnp.vdot(jax.grad(penalty)(flat), direction)
    h = 1e-2
    difference = (penalty(flat + h * direction) - penalty(flat - h * direction)) / (2 * h)
    np.testing.assert_allclose(slope, difference, rtol=2e-2)
    # Third derivatives leave h^2: a quarter of the step leaves a sixteenth of the error.
    h /= 4
    closer = (penalty(flat + h * direction) - penalty(flat - h * direction)) / (2 * h)
    np.testing.assert_allclose(slope, closer, rtol=2e-3)


@pytest.mark.parametrize("method", METHODS)
def test_j6_second_derivative_through_max_pool_and_relu(method):
    """maxpool(relu(w x)) on a constant window: GC = w^2 by one winner, dGC/dw = 2 w; 0 where dead.

    Input probes see the winner alone too, since u^2 = 1.
    """

    def penalty(w, x):
        def network(x):
            return layers.max_pool(layers.relu(w * x))[:, 0, 0], None

        return geometric_complexity_with_outputs(network, x, KEY, method=method)[0]

    compiled = jax.jit(jax.value_and_grad(penalty))
    mapped = jax.jit(jax.vmap(jax.value_and_grad(penalty), (0, None)))
    for value, alive in ((0.5, 1.0), (0.0, 0.0)):
        x = jnp.full((1, 2, 2, 1), value)
        assert_same_numbers(compiled(3.0, x), (9.0 * alive, 6.0 * alive))
        expected = (np.array([9, 1]) * alive, np.array([6, 2]) * alive)
        assert_same_numbers(mapped(jnp.array([3.0, 1.0]), x), expected)
    if method == "output_probes":
        x = jnp.full((1, 2, 2, 1), 0.5)
        assert_same_numbers(jax.value_and_grad(penalty)(3.0, x), (9.0, 6.0))


class OfNNX(nnx.Module):
    def __init__(self):
        self.hidden = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
        self.head = nnx.Linear(4, 2, rngs=nnx.Rngs(1))

    def __call__(self, x):
        embedding = jnp.tanh(self.hidden(x))
        return embedding, self.head(embedding)


class OfLinen(nn.Module):
    @nn.compact
    def __call__(self, x):
        embedding = jnp.tanh(nn.Dense(4, name="hidden")(x))
        return embedding, nn.Dense(2, name="head")(embedding)


class OfEquinox(eqx.Module):
    hidden: eqx.nn.Linear
    head: eqx.nn.Linear

    def __call__(self, x):
        embedding = jnp.tanh(self.hidden(x))
        return embedding, self.head(embedding)


@pytest.mark.slow
def test_linen_nnx_and_equinox_get_the_same_gradient():
    """Each in its own way of differentiating: a plain loss, its gradient by the hidden kernel."""
    x = jax.random.normal(KEY, (5, 3))
    module = OfNNX()
    hidden, head = (
        {"kernel": m.kernel[...], "bias": m.bias[...]} for m in (module.hidden, module.head)
    )

    def loss(network):
        gc, logits = geometric_complexity_with_outputs(network, x, KEY, num_probes=2)
        return jnp.sum(logits**2) + 0.1 * gc

    of_nnx = nnx.jit(nnx.grad(lambda module: loss(module)))(module).hidden.kernel[...]
    params = {"params": {"hidden": hidden, "head": head}}
    of_linen = jax.jit(jax.grad(lambda params: loss(partial(OfLinen().apply, params))))(params)

    def linear(weights):
        blank = eqx.nn.Linear(*weights["kernel"].shape, key=KEY)
        leaves = (weights["kernel"].T, weights["bias"])
        return eqx.tree_at(lambda layer: (layer.weight, layer.bias), blank, leaves)

    model = OfEquinox(linear(hidden), linear(head))
    of_equinox = eqx.filter_jit(eqx.filter_grad(lambda model: loss(jax.vmap(model))))(model)
    assert_same_numbers(of_linen["params"]["hidden"]["kernel"], of_nnx, num_terms=64)
    assert_same_numbers(of_equinox.hidden.weight.T, of_nnx, num_terms=64)
    assert np.all(of_nnx != 0)


def test_bad_arguments(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)

    def network(x):
        return jnp.tile(x, (1, MAX_EXACT_DIM)), None

    x = jnp.ones((2, 2))
    for options, message in (
        ({"method": "exakt"}, "method='exakt' is not one of: output_probes"),
        ({"num_probes": 0}, "num_probes=0 must be at least 1"),
        ({"method": "exact"}, f"there are 128; at most {MAX_EXACT_DIM}"),
    ):
        with pytest.raises(ValueError, match=message):
            geometric_complexity_with_outputs(network, x, KEY, **options)
    for returned, message in (
        (lambda x: x, "network returned float32 of shape .*; a pair is needed"),
        (lambda x: (x, x, x), "network returned a tuple of 3; a pair is needed"),
        (lambda x: (x[:, 0], None), r"network's first output has shape \(2,\) for 2 examples"),
        (lambda x: (x > 0, None), "network's first output is bool; floating point is needed"),
        (3, "network is 3; a function"),
    ):
        for method in PENALTY_METHODS:
            with pytest.raises(ValueError, match=message) as error:
                geometric_complexity_with_outputs(returned, x, KEY, method=method)
            assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"inputs of shape \(0, 2\) have no examples"):
        geometric_complexity_with_outputs(network, x[:0], KEY)
