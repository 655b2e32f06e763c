"""Axis letters of every shape in this package, and the arrays that its public functions take.

B  batch (examples)            C  classes
D  input dimensions, flattened W  ways of an episode (its classes)
K  embedding dimensions        S  shots of an episode (support examples a class)
H  image height, width: H W    Q  queries of an episode a class

The annotations are documentation at run time; the tests install jaxtyping's import hook, which
checks every one of them against the arrays that really arrive.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

#: Anything with a shape and a dtype: JAX arrays, traced or not, and NumPy arrays.
Array = jax.Array | np.ndarray

#: A pure function (B, *input) -> (B, K) in which examples do not mix, from any JAX library.
EmbedFn = Callable[[jax.Array], jax.Array]


def as_floating(array: Array, name: str) -> jax.Array:
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


def as_weights(weights: Array, length: int) -> jax.Array:
    """Checks weights of examples, as far as concrete ones can be checked.

    Raises:
      ValueError: another shape than (length,), or a weight that is negative or NaN.
    """
    weights = as_floating(weights, "weights")
    if weights.shape != (length,):
        raise ValueError(f"weights of shape {weights.shape} for {length} examples")
    if not isinstance(weights, jax.core.Tracer) and not bool(jnp.all(weights >= 0)):
        bad = float(weights[jnp.argmin(jnp.where(jnp.isnan(weights), -jnp.inf, weights))])
        raise ValueError(f"weights must be 0 or more; one is {bad}")
    return weights
