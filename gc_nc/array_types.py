"""Axis letters of every shape in this package, and the arrays that its public functions take.

B  batch (examples)            C  classes
D  input dimensions, flattened W  ways of an episode (its classes)
K  embedding dimensions        S  shots of an episode (support examples a class)
H  image height, width: H W    Q  queries of an episode a class

The annotations are documentation at run time; the tests install jaxtyping's import hook, which
checks every one of them against the arrays that really arrive.
"""

import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

#: Anything with a shape and a dtype: JAX arrays, traced or not, and NumPy arrays.
Array = jax.Array | np.ndarray

#: A pure function (B, *input) -> (B, K) in which examples do not mix, from any JAX library.
EmbedFn = Callable[[jax.Array], jax.Array]


def as_floating(array: Array | np.generic | float, name: str) -> jax.Array:
    """Casts integers and half precision to float32 and leaves wider floats as they are.

    Raises:
      ValueError: complex numbers.
    """
    if not isinstance(array, jax.Array):
        array = np.asarray(array)
        if not np.issubdtype(array.dtype, np.inexact) and array.dtype.kind in "biu":
            # In NumPy: JAX would wrap 64-bit integers to 32 bits first.
            array = array.astype(np.float32)
    array = jnp.asarray(array)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise ValueError(f"{name} are {array.dtype}; real numbers are needed")
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def as_scalar(value: Array | np.generic | float, name: str) -> jax.Array:
    """A number that is 0 or more; NaN stays NaN.

    Raises:
      ValueError: an array, or a negative number (NaN when traced).
    """
    value = as_floating(value, name)
    if value.ndim != 0:
        raise ValueError(f"{name} has shape {value.shape}; one number is needed")
    return nan_where(value < 0, value, name, "must be 0 or more")


def nan_where(bad: Array, values: Array, name: str, needed: str) -> jax.Array:
    """Raises if any of `bad` is set; where that is not known yet, its values become NaN."""
    if not isinstance(bad, jax.core.Tracer) and bool(jnp.any(bad)):
        value = np.asarray(values.ravel()[jnp.argmax(bad)])
        raise ValueError(f"{name}={value!s} {needed}")
    return jnp.where(bad, jnp.nan, values)


def check_whole(value: int, least: int, name: str) -> None:
    """Raises ValueError for a number below `least` or one that is not whole."""
    try:
        whole = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={value!r} must be a whole number") from None
    if whole < least:
        raise ValueError(f"{name}={value} must be at least {least}")


def as_weights(weights: Array, length: int) -> jax.Array:
    """Checks weights of examples, as far as concrete ones can be checked.

    Raises:
      ValueError: another shape than (length,), or a weight that is negative, infinite or NaN. When
        traced such weights become NaN.
    """
    weights = as_floating(weights, "weights")
    if weights.shape != (length,):
        raise ValueError(f"weights of shape {weights.shape} for {length} examples")
    bad = ~((weights >= 0) & (weights < jnp.inf))
    return nan_where(bad, weights, "weight", "must be 0 or more and finite")
