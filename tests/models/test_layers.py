"""Convolution and normalisation against hand values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from gc_nc.metrics import geometric_complexity
from gc_nc.models import layers

# One 1x1 convolution with the weight 1, so that only the BatchNorm after it is left.
NORM = layers.ConvNorm(features=1, kernel_size=1, batch_norm=True)


def norm_variables(mean, var):
    return {
        "params": {
            "conv": {"kernel": jnp.ones((1, 1, 1, 1))},
            "norm": {"scale": jnp.ones(1), "bias": jnp.zeros(1)},
        },
        "batch_stats": {"norm": {"mean": jnp.full(1, mean), "var": jnp.full(1, var)}},
    }


def test_j1_batch_norm_with_running_statistics():
    variables = norm_variables(mean=0.0, var=4.0)

    def embed(x):
        return NORM.apply(variables, x[:, None, None], train=False)[:, 0, 0]

    x = jnp.array([[-1.0], [1.0]])
    # 1 / (4 + epsilon).
    np.testing.assert_allclose(geometric_complexity(embed, x), 0.25, rtol=1e-5)
    changed = embed(x.at[1].set(1000.0))
    assert changed[0] == embed(x)[0]
    assert changed[1] != embed(x)[1]


def test_batch_norm_in_training_uses_and_follows_the_batch():
    x = jnp.array([1.0, 1.0, 5.0, 5.0]).reshape(4, 1, 1, 1)  # mean 3, variance 4
    y, updates = NORM.apply(norm_variables(10.0, 1.0), x, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(y[:, 0, 0, 0], np.array([-1, -1, 1, 1]) * 2 / np.sqrt(4 + 1e-5))
    stats = updates["batch_stats"]["norm"]
    np.testing.assert_allclose(stats["mean"], [0.9 * 10 + 0.1 * 3], rtol=1e-6)
    np.testing.assert_allclose(stats["var"], [0.9 * 1 + 0.1 * 4], rtol=1e-6)


def test_convolution_pads_both_sides():
    """A kernel of ones sums each window; stride 2 starts half a kernel outside the image."""
    conv = layers.ConvNorm(features=1, strides=2)
    variables = {
        "params": {"conv": {"kernel": jnp.ones((3, 3, 1, 1)), "bias": jnp.full(1, 0.5)}},
    }
    y = conv.apply(variables, jnp.ones((1, 4, 4, 1)), train=False)
    np.testing.assert_array_equal(y[0, :, :, 0], np.array([[4, 6], [6, 9]]) + 0.5)


@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize(
    ("size", "kernel_size"), [((2, 2), 3), ((1, 1), 3), ((2, 1), 3), ((4, 3), 5), ((5, 5), 7)]
)
def test_small_maps_and_their_derivatives_equal_the_convolution(size, kernel_size, strides):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, *size, 4)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(kernel_size, kernel_size, 4, 5)), jnp.float32)
    pad = (kernel_size - 1) // 2
    geometry = ((strides, strides), ((pad, pad), (pad, pad)))
    names = jax.lax.conv_dimension_numbers(x.shape, kernel.shape, ("NHWC", "HWIO", "NHWC"))
    options = {"dimension_numbers": names, "precision": None}

    def ours(x, kernel):
        return layers.convolve(x, kernel, *geometry, **options)

    def reference(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, *geometry, **options)

    program = str(jax.make_jaxpr(ours)(x, kernel))
    # On an accelerator the convolution is the fast way, whatever the map.
    assert ("conv_general_dilated" in program) == (jax.default_backend() != "cpu")

    # Sums of up to 100 products in another order, and of their squares.
    def compare(f):
        np.testing.assert_allclose(f(ours), f(reference), rtol=1e-4, atol=1e-4)

    compare(lambda f: f(x, kernel))
    tangents = [jnp.asarray(rng.normal(size=a.shape), jnp.float32) for a in (x, kernel)]
    compare(lambda f: jax.jvp(f, (x, kernel), tuple(tangents))[1])

    def loss(f, x, kernel):
        return jnp.sum(jnp.tanh(f(x, kernel) / 5))

    for argument in (0, 1):
        compare(lambda f, i=argument: jax.grad(loss, i + 1)(f, x, kernel))

    # Of GC's kind: a derivative by the kernel of squared derivatives by the input.
    def squares(f, kernel):
        return jnp.sum(jax.grad(loss, 1)(f, x, kernel) ** 2)

    compare(lambda f: jax.grad(squares, 1)(f, kernel))


def test_a_window_that_fits_is_a_convolution():
    for size in ((3, 3), (2, 3), (8, 2)):
        program = jax.make_jaxpr(
            lambda x: layers.ConvNorm(4).init(jax.random.key(0), x, train=False)
        )(jnp.ones((1, *size, 2)))
        assert "conv_general_dilated" in str(program)


def test_max_pool_halves_rounding_up():
    shapes = [(28, 28)]
    while shapes[-1] != (1, 1):
        x = jax.ShapeDtypeStruct((1, *shapes[-1], 1), jnp.float32)
        shapes.append(jax.eval_shape(layers.max_pool, x).shape[1:3])
    assert [h for h, _ in shapes] == [28, 14, 7, 4, 2, 1]
    one = jnp.full((1, 1, 1, 1), -3.0)
    np.testing.assert_array_equal(layers.max_pool(one), one)


@pytest.mark.parametrize("shape", [(8, 8), (7, 5), (1, 1)])
def test_max_pool_and_its_derivatives_equal_reduce_windows(shape):
    # Few values, so that windows tie; the first of a tie is the winner in both.
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(-2, 2, (3, *shape, 4)), jnp.float32)
    tangent = jnp.asarray(rng.normal(size=x.shape), jnp.float32)

    def reference(x):
        return nn.max_pool(x, (2, 2), strides=(2, 2), padding="SAME")

    for pool in (layers.max_pool, jax.jit(layers.max_pool)):
        np.testing.assert_array_equal(pool(x), reference(x))
        cotangent = jnp.asarray(rng.normal(size=pool(x).shape), jnp.float32)
        ours, theirs = (jax.vjp(f, x)[1](cotangent)[0] for f in (pool, reference))
        np.testing.assert_array_equal(ours, theirs)
        product = jax.jvp(pool, (x,), (tangent,))[1]
        np.testing.assert_allclose(
            jnp.sum(product * cotangent), jnp.sum(theirs * tangent), rtol=1e-5
        )
    assert np.isnan(layers.max_pool(x.at[0, 0, 0, 0].set(jnp.nan))[0, 0, 0, 0])
    assert np.isnan(layers.max_pool(x.at[0, -1, -1, 1].set(jnp.nan))[0, -1, -1, 1])


def test_he_initialisation_has_its_variance():
    kernel = layers.he_normal(jax.random.key(0), (3, 3, 64, 64))
    np.testing.assert_allclose(jnp.std(kernel), np.sqrt(2 / (9 * 64)), rtol=0.02)
    assert abs(float(jnp.mean(kernel))) < 0.001
    # Filters differ.
    assert not np.array_equal(kernel[..., 0], kernel[..., 1])


def test_scaled_width_is_at_least_one():
    assert [layers.scaled_width(64, w) for w in (1.0, 0.25, 0.1, 0.001)] == [64, 16, 6, 1]
