"""Flatness: quadratics with a known Hessian, a network against jax.hessian, edge cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from gc_nc.metrics import (
    flatness,
    hessian_top_eigenvalue,
    hessian_trace,
    sam_sharpness,
    squared_gradient_norm,
)
from tests.metrics.metric_table import jit
from tests.rounding import assert_same_numbers, rounding

KEY = jax.random.key(0)


def symmetric(eigenvalues, seed=0):
    n = len(eigenvalues)
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]
    return (q * np.asarray(eigenvalues)) @ q.T


def quadratic_loss(a, b, params):
    x = jnp.concatenate([params["layer"]["w"].ravel(), params["b"]])
    return 0.5 * x @ a @ x + b @ x


def quadratic(a, b):
    """1/2 x^T A x + b.x of x split over a nested dict: gradient A x + b, Hessian A."""
    a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    # Its leaves are traced, so that all quadratics share their programs.
    return jax.tree_util.Partial(quadratic_loss, a, b)


def split(x):
    x = np.asarray(x, np.float32)
    return {"layer": {"w": x[:6].reshape(2, 3)}, "b": x[6:]}


INDEFINITE = symmetric(np.array([-7.0, -3, -1, 0, 0.5, 1, 1, 2, 3, 4]))
B = np.random.default_rng(1).normal(size=10)
X = np.random.default_rng(2).normal(size=10)


def test_quadratic():
    loss_fn, params = quadratic(INDEFINITE, B), split(X)
    g = INDEFINITE @ X + B
    np.testing.assert_allclose(squared_gradient_norm(loss_fn, params), g @ g, rtol=1e-5)
    # The largest on the number line, 4, and not -7.
    np.testing.assert_allclose(hessian_top_eigenvalue(loss_fn, params, KEY), 4, rtol=1e-5)
    # Squares of 1e-25 and 1e25 are out of range.
    for scale in (1e-25, 1e25):
        scaled = quadratic(scale * INDEFINITE, scale * B)
        top = hessian_top_eigenvalue(scaled, params, KEY)
        np.testing.assert_allclose(top, 4 * scale, rtol=1e-5)
    rho = 0.1
    # rtol: a difference of two losses of order 10.
    expected = rho * np.linalg.norm(g) + rho**2 / 2 * g @ INDEFINITE @ g / (g @ g)
    np.testing.assert_allclose(sam_sharpness(loss_fn, params, rho=rho), expected, rtol=1e-4)
    # The same loss twice, which XLA may add up in two orders.
    no_step = sam_sharpness(loss_fn, params, rho=0.0)
    np.testing.assert_allclose(no_step, 0, atol=rounding() * abs(loss_fn(params)))


def test_top_eigenvalue_of_a_negative_definite_hessian_is_negative():
    loss_fn = quadratic(symmetric(-np.arange(1.0, 11)), B)
    np.testing.assert_allclose(hessian_top_eigenvalue(loss_fn, split(X), KEY), -1, rtol=1e-5)


def test_hessian_trace_has_hutchinsons_mean_and_variance():
    num_probes = 4000

    @jit
    def traces(a):
        return [
            hessian_trace(jax.tree_util.Partial(quadratic_loss, a, B), split(X), KEY, num_probes=n)
            for n in (num_probes, 3, 1)
        ]

    estimate = traces(INDEFINITE)[0]
    off_diagonal = (INDEFINITE**2).sum() - (np.diag(INDEFINITE) ** 2).sum()
    # rtol: the standard deviation of 4000 draws is known to about 1 in 90.
    np.testing.assert_allclose(estimate.sem, np.sqrt(2 * off_diagonal / num_probes), rtol=0.05)
    assert abs(estimate.mean - np.trace(INDEFINITE)) < 4 * estimate.sem
    # Exact for a diagonal Hessian, and the uncertainty of one probe is unknown.
    _, exact, one = traces(np.diag(np.arange(10.0)))
    assert_same_numbers(exact.mean, 45)
    np.testing.assert_allclose(exact.sem, 0, atol=1e-4)
    assert_same_numbers(one.mean, 45)
    assert np.isnan(one.sem)


def test_sem_of_two_probes_is_half_their_distance():
    # v^T H v is 2 or -2 for H = [[0, 1], [1, 0]]. std(ddof=1) / sqrt(2) of a, b is |a - b| / 2, so
    # mean and sem are 2, 0 for equal probes and 0, 2 for unequal ones.
    def loss_fn(p):
        return p[0] * p[1]

    measure = jax.jit(lambda key: hessian_trace(loss_fn, jnp.ones(2), key, num_probes=2))
    found = {tuple(np.round(measure(key), 5)) for key in jax.random.split(KEY, 20)}
    assert found == {(2.0, 0.0), (-2.0, 0.0), (0.0, 2.0)}


def network_loss(params):
    x = jnp.asarray(np.random.default_rng(3).normal(size=(16, 4)), jnp.float32)
    hidden = jnp.tanh(x @ params["w1"] + params["b1"][None])
    logits = hidden @ params["w2"]
    labels = jnp.arange(16) % 3
    return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(16), labels])


# A plain function is compiled anew by each call.
NETWORK_LOSS = jax.tree_util.Partial(network_loss)


def network_params():
    rng = np.random.default_rng(4)
    return {
        "b1": rng.normal(size=5).astype(np.float32),
        "w1": rng.normal(size=(4, 5)).astype(np.float32),
        "w2": rng.normal(size=(5, 3)).astype(np.float32),
    }


def test_small_network_against_the_whole_hessian():
    params = network_params()
    theta, unravel = ravel_pytree(params)

    @jit
    def derivatives(theta):
        def loss(theta):
            return network_loss(unravel(theta))

        gradient = jax.grad(loss)(theta)
        step = 0.05 * gradient / jnp.linalg.norm(gradient)
        return gradient, jax.hessian(loss)(theta), loss(theta + step) - loss(theta)

    gradient, hessian, expected = (np.asarray(x, np.float64) for x in derivatives(theta))
    norm = squared_gradient_norm(NETWORK_LOSS, params)
    assert_same_numbers(norm, gradient @ gradient)
    # More iterations than parameters: all of them are used.
    top = hessian_top_eigenvalue(NETWORK_LOSS, params, KEY, num_iterations=100)
    assert_same_numbers(top, np.linalg.eigvalsh(hessian)[-1])
    # Few iterations come close from below.
    few = hessian_top_eigenvalue(NETWORK_LOSS, params, KEY, num_iterations=8)
    assert 0.9 * top < few <= top * (1 + rounding())
    trace = hessian_trace(NETWORK_LOSS, params, KEY, num_probes=100)
    assert abs(trace.mean - np.trace(hessian)) < 4 * trace.sem
    # atol: the rounding of a difference of two losses near 1, of which float32 holds steps of 1e-7.
    np.testing.assert_allclose(sam_sharpness(NETWORK_LOSS, params), expected, atol=2e-6)
    assert expected > 1e-3


def bowl(curvature, p):
    return 0.5 * curvature * jnp.sum(p**2)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 100])
@pytest.mark.parametrize("curvature", [1.0, -0.7, 0.3e-25, 3e25])
def test_lanczos_that_breaks_down_at_once(size, curvature):
    # Every vector spans an invariant subspace of c I; squares of 1e-25 and 1e25 are out of range.
    loss_fn = jax.tree_util.Partial(bowl, jnp.float32(curvature))
    top = hessian_top_eigenvalue(loss_fn, jnp.ones(size), KEY)
    np.testing.assert_allclose(top, curvature, rtol=1e-5)


def half_quadratic(a, p):
    return 0.5 * p @ a @ p


@jit
def top_in_a_program(a, p):
    loss_fn = jax.tree_util.Partial(half_quadratic, a)
    return hessian_top_eigenvalue(loss_fn, p, KEY, num_iterations=50)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_lanczos_that_breaks_down_after_a_few_steps(seed):
    a = jnp.asarray(symmetric(np.repeat([-1.0, 0, 2], 20), seed), jnp.float32)
    loss_fn = jax.tree_util.Partial(half_quadratic, a)
    top = hessian_top_eigenvalue(loss_fn, jnp.zeros(60), jax.random.key(seed), num_iterations=50)
    np.testing.assert_allclose(top, 2, rtol=1e-5)
    np.testing.assert_allclose(top_in_a_program(a, jnp.zeros(60)), 2, rtol=1e-5)


def all_measures(loss_fn, params):
    return (
        squared_gradient_norm(loss_fn, params),
        hessian_trace(loss_fn, params, KEY, num_probes=2),
        hessian_top_eigenvalue(loss_fn, params, KEY, num_iterations=8),
        sam_sharpness(loss_fn, params),
    )


@pytest.mark.slow
def test_a_constant_loss_is_flat():
    params = {"a": jnp.ones(4)}
    # One that does not read its parameters, and one that does.
    losses = [lambda p: jnp.float32(3.0), lambda p: jnp.sum(p["a"]) * 0]
    assert not np.any(jax.tree.leaves(all_measures(losses[0], params)))
    traced = jit(lambda params: [all_measures(loss_fn, params) for loss_fn in losses])(params)
    assert not np.any(jax.tree.leaves(traced))


def test_a_linear_loss_has_no_curvature_but_is_sharp():
    def loss_fn(p):
        return 2 * jnp.sum(p)

    assert hessian_top_eigenvalue(loss_fn, jnp.zeros(4), KEY) == 0
    np.testing.assert_allclose(sam_sharpness(loss_fn, jnp.zeros(4), rho=0.5), 2, rtol=1e-5)
    # Squares of the gradient are out of range; the step is not.
    tiny = sam_sharpness(lambda p: 1e-25 * jnp.sum(p), jnp.zeros(4), rho=0.5)
    np.testing.assert_allclose(tiny, 1e-25, rtol=1e-5)


def test_a_loss_that_is_not_finite_gives_nan():
    def loss_fn(p):
        return jnp.sum(jnp.log(p))

    params = -jnp.ones(3)
    assert np.isnan(hessian_top_eigenvalue(lambda p: jnp.nan * jnp.sum(p**2), params, KEY))
    assert np.isnan(sam_sharpness(loss_fn, params))


@pytest.mark.slow
def test_mixed_precision_parameters_are_cast_up():
    params = network_params()
    mixed = params | {"w2": jnp.asarray(params["w2"], jnp.bfloat16)}
    wide = params | {"w2": mixed["w2"].astype(jnp.float32)}
    values = all_measures(NETWORK_LOSS, mixed)
    assert all(value.dtype == jnp.float32 for value in jax.tree.leaves(values))
    assert_same_numbers(values, all_measures(NETWORK_LOSS, wide))


def test_a_stale_loss_is_not_kept():
    state = {"scale": 1.0}

    def loss_fn(p):
        return state["scale"] * jnp.sum(p**2)

    params = jnp.ones(2)
    assert squared_gradient_norm(loss_fn, params) == 8
    state["scale"] = 2.0
    assert squared_gradient_norm(loss_fn, params) == 32


def test_gradients_are_finite():
    def measure(params):
        return (
            squared_gradient_norm(network_loss, params)
            + sam_sharpness(network_loss, params)
            + sam_sharpness(lambda p: jnp.sum(p["b1"]) * 0, params)
        )

    gradient = jit(jax.grad(measure))(network_params())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_wrong_arguments_are_named():
    params = {"w": jnp.ones(3), "steps": jnp.ones((), jnp.int32)}

    def loss_fn(p):
        return jnp.sum(p["w"] ** 2)

    with pytest.raises(ValueError, match=r"params\['steps'\] is int32; floating point is needed"):
        squared_gradient_norm(loss_fn, params)
    params = {"w": jnp.ones(3)}
    for wrong, message in (
        (lambda p: p["w"], r"returns float32\[3\]"),
        (lambda p: (loss_fn(p), 0), "returns a tuple"),
        (lambda p: jnp.ones((), jnp.int32), r"returns int32\[\]"),
    ):
        for measure in (
            lambda f: squared_gradient_norm(f, params),
            lambda f: hessian_trace(f, params, KEY),
            lambda f: hessian_top_eigenvalue(f, params, KEY),
            lambda f: sam_sharpness(f, params),
        ):
            with pytest.raises(ValueError, match=message):
                measure(wrong)
    with pytest.raises(ValueError, match="params have no numbers"):
        squared_gradient_norm(lambda p: jnp.zeros(()), {})
    with pytest.raises(ValueError, match="num_probes=0 must be at least 1"):
        hessian_trace(loss_fn, params, KEY, num_probes=0)
    with pytest.raises(ValueError, match="num_iterations=0 must be at least 1"):
        hessian_top_eigenvalue(loss_fn, params, KEY, num_iterations=0)
    for rho in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"rho={rho} must be 0 or more"):
            sam_sharpness(loss_fn, params, rho=rho)


@pytest.mark.parametrize("shared", ["parameters", "loss"])
def test_top_eigenvalue_where_devices_share_the_parameters_or_the_loss(shared):
    """Parameters that all have, under each one's part of a sum; or their own, under one mean."""
    mesh = jax.sharding.Mesh(jax.devices()[:4], ("data",))
    along, everywhere = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    curvatures, own = jnp.asarray([1.0, 2, 3, 4]), shared == "loss"

    def of_device(params, curvature):
        def loss(params):
            value = bowl(curvature[0], params)
            return jax.lax.pmean(value, "data") if own else value

        return hessian_top_eigenvalue(loss, params, KEY, num_iterations=2)[None]

    spec = along if own else everywhere
    mapped = jax.shard_map(of_device, mesh=mesh, in_specs=(spec, along), out_specs=spec)
    found = jit(mapped)(jnp.ones(12), curvatures)
    np.testing.assert_allclose(found, curvatures / 4 if own else [10], rtol=1e-5)


def test_as_many_hessian_products_as_iterations():
    products = []

    def product(vector):
        products.append(vector)
        return jnp.arange(1.0, 9) * vector

    def loop(first, last, body, value):
        for i in range(first, last):
            value = body(i, value)
        return value

    for num_iterations in (1, 5, 20):
        products.clear()
        flatness._top_eigenvalue(product, jnp.ones(8), num_iterations, loop)
        assert len(products) == min(num_iterations, 8)
