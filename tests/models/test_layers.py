"""Convolution and normalisation against hand values."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from gc_nc.metrics import geometric_complexity
from gc_nc.models import layers
from tests.models.plain import convolution
from tests.rounding import assert_same_numbers

# One 1x1 convolution with the weight 1, so that only the BatchNorm after it is left.
NORM = layers.ConvNorm(features=1, kernel_size=1, batch_norm=True)


def norm_variables(mean, var):
    return {
        "params": {
            "conv": {"kernel": np.ones((1, 1, 1, 1), np.float32)},
            "norm": {"scale": np.ones(1, np.float32), "bias": np.zeros(1, np.float32)},
        },
        "batch_stats": {"norm": {"mean": np.float32([mean]), "var": np.float32([var])}},
    }


def test_j1_batch_norm_with_running_statistics():
    variables = norm_variables(mean=0.0, var=4.0)

    def embed(x):
        return NORM.apply(variables, x[:, None, None], train=False)[:, 0, 0]

    x = np.array([[-1.0], [1.0]], np.float32)
    assert_same_numbers(geometric_complexity(embed, x), 1 / (4 + 1e-5))
    compiled = jax.jit(embed)
    before, after = compiled(x), compiled(x * [[1], [1000]])
    assert after[0] == before[0]
    assert after[1] != before[1]


def test_batch_norm_in_training_uses_and_follows_the_batch():
    x = np.float32([1, 1, 5, 5]).reshape(4, 1, 1, 1)  # mean 3, variance 4
    train = jax.jit(lambda v, x: NORM.apply(v, x, train=True, mutable=["batch_stats"]))
    y, updates = train(norm_variables(10.0, 1.0), x)
    assert_same_numbers(y[:, 0, 0, 0], np.array([-1, -1, 1, 1]) * 2 / np.sqrt(4 + 1e-5))
    stats = updates["batch_stats"]["norm"]
    expected = {"mean": np.array([0.9 * 10 + 0.1 * 3]), "var": np.array([0.9 * 1 + 0.1 * 4])}
    assert_same_numbers(dict(stats), expected)


def test_convolution_pads_both_sides():
    """A kernel of ones sums each window; stride 2 starts half a kernel outside the image."""
    conv = layers.ConvNorm(features=1, strides=2)
    variables = {
        "params": {
            "conv": {"kernel": np.ones((3, 3, 1, 1), np.float32), "bias": np.float32([0.5])}
        },
    }
    y = conv.apply(variables, np.ones((1, 4, 4, 1), np.float32), train=False)
    np.testing.assert_array_equal(y[0, :, :, 0], np.array([[4, 6], [6, 9]]) + 0.5)


@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize(
    ("size", "kernel_size"), [((2, 2), 3), ((1, 1), 3), ((2, 1), 3), ((4, 3), 5), ((5, 5), 7)]
)
def test_small_maps_and_their_derivatives_equal_the_convolution(size, kernel_size, strides):
    rng = np.random.default_rng(0)
    x, dx = rng.normal(size=(2, 3, *size, 4)).astype(np.float32)
    kernel, dkernel = rng.normal(size=(2, kernel_size, kernel_size, 4, 5)).astype(np.float32)
    pad = (kernel_size - 1) // 2
    geometry = ((strides, strides), ((pad, pad), (pad, pad)))
    names = jax.lax.conv_dimension_numbers(x.shape, kernel.shape, ("NHWC", "HWIO", "NHWC"))
    options = {"dimension_numbers": names, "precision": None}
    ours, reference = (
        lambda x, kernel, f=f: f(x, kernel, *geometry, **options)
        for f in (layers.convolve, jax.lax.conv_general_dilated)
    )
    program = str(jax.make_jaxpr(ours)(x, kernel))
    # On an accelerator the convolution is the fast way, whatever the map.
    assert ("conv_general_dilated" in program) == (jax.default_backend() != "cpu")

    def values_and_derivatives(f):
        def loss(x, kernel):
            return jnp.sum(jnp.tanh(f(x, kernel) / 5))

        # Of GC's kind: a derivative by the kernel of squared derivatives by the input.
        def squares(kernel):
            return jnp.sum(jax.grad(loss)(x, kernel) ** 2)

        return (
            jax.jvp(f, (x, kernel), (dx, dkernel)),
            jax.grad(loss, (0, 1))(x, kernel),
            jax.grad(squares)(kernel),
        )

    found, expected = (jax.jit(partial(values_and_derivatives, f))() for f in (ours, reference))
    assert_same_numbers(found, expected)
    assert_same_numbers(found[0][0], convolution(x, kernel, strides))


def test_a_window_that_fits_is_a_convolution():
    for size in ((3, 3), (2, 3), (8, 2)):
        program = jax.make_jaxpr(
            lambda x: layers.ConvNorm(4).init(jax.random.key(0), x, train=False)
        )(np.ones((1, *size, 2), np.float32))
        assert "conv_general_dilated" in str(program)


def test_max_pool_halves_rounding_up():
    shapes = [(28, 28)]
    while shapes[-1] != (1, 1):
        x = jax.ShapeDtypeStruct((1, *shapes[-1], 1), jnp.float32)
        shapes.append(jax.eval_shape(layers.max_pool, x).shape[1:3])
    assert [h for h, _ in shapes] == [28, 14, 7, 4, 2, 1]
    one = np.full((1, 1, 1, 1), -3, np.float32)
    np.testing.assert_array_equal(layers.max_pool(one), one)


def reduce_window(x):
    return nn.max_pool(x, (2, 2), strides=(2, 2), padding="SAME")


@jax.jit
def pooled_and_derivatives(x, tangent, cotangent):
    """Of max_pool and of reduce_window: the values and the vector-Jacobian product; J t of ours."""
    (ours, pull_back), (theirs, pull_theirs) = (
        jax.vjp(f, x) for f in (layers.max_pool, reduce_window)
    )
    product = jax.jvp(layers.max_pool, (x,), (tangent,))[1]
    return (ours, *pull_back(cotangent)), (theirs, *pull_theirs(cotangent)), product


@pytest.mark.parametrize(
    "shape", [(7, 5), *(pytest.param(s, marks=pytest.mark.slow) for s in ((8, 8), (1, 1)))]
)
def test_max_pool_and_its_derivatives_equal_reduce_windows(shape):
    # Few values, so that windows tie; the first of a tie is the winner in both.
    rng = np.random.default_rng(0)
    x = rng.integers(-2, 2, (3, *shape, 4)).astype(np.float32)
    # Whole numbers, whose sums are exact in any order.
    tangent = rng.integers(-9, 9, x.shape).astype(np.float32)
    pooled = (3, (shape[0] + 1) // 2, (shape[1] + 1) // 2, 4)
    cotangent = rng.integers(-9, 9, pooled).astype(np.float32)
    ours, theirs, product = pooled_and_derivatives(x, tangent, cotangent)
    np.testing.assert_array_equal(layers.max_pool(x), ours[0])
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.sum(product * cotangent) == np.sum(theirs[1] * tangent)
    x[0, 0, 0, 0] = x[0, -1, -1, 1] = np.nan
    (found, _), _, _ = pooled_and_derivatives(x, tangent, cotangent)
    assert np.isnan(found[0, 0, 0, 0])
    assert np.isnan(found[0, -1, -1, 1])


def test_he_initialisation_has_its_variance():
    kernel = layers.he_normal(jax.random.key(0), (3, 3, 64, 64))
    np.testing.assert_allclose(np.std(kernel), np.sqrt(2 / (9 * 64)), rtol=0.02)
    assert abs(np.mean(kernel)) < 0.001
    # Filters differ.
    assert not np.array_equal(kernel[..., 0], kernel[..., 1])


def test_scaled_width_is_at_least_one():
    assert [layers.scaled_width(64, w) for w in (1.0, 0.25, 0.1, 0.001)] == [64, 16, 6, 1]
