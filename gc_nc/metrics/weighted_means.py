"""Means over weighted examples with their standard error, within the range of float32."""

import jax
import jax.numpy as jnp

from gc_nc.array_types import Array, as_floating, as_weights, is_known, with_nan


def mask_inputs(inputs: Array, weights: Array | None) -> tuple[jax.Array, jax.Array | None]:
    """Replaces rows of weight 0 by one of positive weight, so that they have no effect."""
    inputs = as_floating(inputs, "inputs")
    if weights is None or inputs.ndim == 0 or inputs.shape[0] == 0:
        return inputs, None
    weights = as_weights(weights, inputs.shape[0])
    if is_known(weights) and not bool(jnp.any(weights > 0)):
        raise ValueError("all weights are 0, so no example counts; give one a weight above 0")
    counts = (weights > 0).reshape(-1, *[1] * (inputs.ndim - 1))
    stand_in = inputs[jnp.argmax(weights)][None]
    return jnp.where(counts, inputs, stand_in), weights


def weighted_mean(values: Array, weights: Array | None) -> tuple[jax.Array, jax.Array]:
    """Returns the mean and its standard error; for equal weights that is std(ddof=1) / sqrt(B).

    With shares s = w / sum w, sem^2 = sum s^2 (x - mean)^2 / u, where
    u = 1 - (2 sum s^3 - (sum s^2)^2) / sum s^2 makes it unbiased if the spread is the same for all
    weights; otherwise it is right in the limit of many examples.
    """
    if weights is None:
        weights = jnp.ones_like(values)
    # Scaled, because sums and squares of very large values would overflow. It is a power of two
    # whose reciprocal is not flushed to 0, since XLA may multiply by the reciprocal.
    weights = weights / power_of_two_near(jnp.max(weights))
    size = power_of_two_near(jnp.max(jnp.where(weights > 0, jnp.abs(values), 0)))
    values = values / size
    total = jnp.sum(weights)
    shares = weights / total
    # The division comes last, so that the mean of equal values is exactly their value.
    mean = jnp.sum(weights * values) / total
    inverse_count = jnp.sum(shares**2)
    # This is u, written in a way that loses no digits by cancellation.
    left = (1 - shares) ** 2 + (inverse_count - shares**2)
    left = jnp.sum(shares**2 * left) / inverse_count
    # With one example the spread is unknown, not 0.
    known = (jnp.sum(weights > 0, dtype=jnp.int32) > 1) & (left > 0)
    variance = jnp.sum(shares**2 * (values - mean) ** 2) / jnp.where(known, left, 1)
    varies = variance > 0
    # The gradient of a square root at 0 would be NaN; it is taken to be 0. NaN stays NaN.
    sem = jnp.where(varies, jnp.sqrt(jnp.where(varies, variance, 1)), 0 * variance)
    return size * mean, with_nan(~known, size * sem)


def power_of_two_near(size: jax.Array) -> jax.Array:
    """Returns the largest power of two up to `size`, or 1 for 0, inf and NaN; dividing is exact.

    It is at most 2^125: XLA may multiply by the reciprocal instead, and must not flush that to 0.
    """
    size = jax.lax.stop_gradient(size)
    usable = (size > 0) & jnp.isfinite(size)
    exponent = jnp.frexp(jnp.where(usable, size, 1))[1] - 1
    return jnp.ldexp(jnp.ones_like(size), jnp.minimum(exponent, 125))
