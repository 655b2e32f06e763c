"""Axis letters of every shape in this package, and the arrays that its public functions take.

B  batch (examples)            C  classes
D  input dimensions, flattened W  ways of an episode (its classes)
K  embedding dimensions        S  shots of an episode (support examples a class)
H  image height, width: H W    Q  queries of an episode a class

The annotations are documentation at run time; the tests install jaxtyping's import hook, which
checks every one of them against the arrays that really arrive.

Whatever JAX is set to, the metrics see the same arrays: float32 and int32 even if 64 bits are
enabled, replicated on each device where a mesh has Explicit axes, and without a NaN that
jax_debug_nans would report as an error.
"""

import operator
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

#: Anything with a shape and a dtype: JAX arrays, traced or not, and NumPy arrays.
Array = jax.Array | np.ndarray

#: A pure function (B, *input) -> (B, K) in which examples do not mix, from any JAX library.
EmbedFn = Callable[[jax.Array], jax.Array]


# Warn if rounding a float64 array to float32 changes more than this share of its spread.
_ROUNDING_THAT_MATTERS = 1e-3
# The loss by rounding is measured on about this many rows of an array.
_ROWS_LOOKED_AT = 1024


def as_floating(array: Array | np.generic | float, name: str) -> jax.Array:
    """Casts real numbers to float32.

    Warns:
      RuntimeWarning: outside jit, float64 values so far from 0, relative to their spread, that
        float32 rounds much of the spread away.

    Raises:
      ValueError: complex numbers, or something that is not an array of numbers.
    """
    array = as_numbers(array, name)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise ValueError(f"{_subject(name)} {array.dtype}; real numbers are needed")
    # NaN is allowed in rows of weight 0.
    with jax.debug_nans(False):
        if isinstance(array, jax.Array):
            if array.dtype == np.float64 and is_known(array) and array.is_fully_addressable:
                _warn_if_rounded(np.asarray(array), name)
            return array if array.dtype == np.float32 else array.astype(jnp.float32)
        if array.dtype == np.float64:
            _warn_if_rounded(array, name)
        # Cast by NumPy, because JAX would first wrap 64-bit integers to 32 bits.
        with np.errstate(over="ignore"):
            return jnp.asarray(array.astype(np.float32))


def as_numbers(array: Any, name: str) -> Array:
    """Returns a JAX array as it is, but `replicated`, and anything else as a NumPy array.

    Raises:
      ValueError: something that is not an array of numbers, such as a dict or None, or an array
        with masked entries.
    """
    given = array
    if np.ma.is_masked(array):
        raise ValueError(
            f"{_subject(name)} masked in part, and NumPy would give what is under the mask; leave"
            " those rows out or fill them"
        )
    if not isinstance(array, jax.Array):
        try:
            # Variables of Flax NNX have this method, for example.
            wrapped = getattr(array, "__jax_array__", None)
            array = np.asarray(array) if wrapped is None else wrapped()
        # Tensors of other libraries raise errors of many types, whose text says why.
        except Exception as error:
            why = f" ({' '.join(str(error).split())})" if hasattr(given, "__array__") else ""
            raise ValueError(
                f"{_subject(name)} {described(given)}; an array of numbers is needed{why}"
            ) from error
    if not (jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool):
        raise ValueError(f"{_subject(name)} {described(given)}; an array of numbers is needed")
    return replicated(array) if isinstance(array, jax.Array) else array


def _subject(name: str) -> str:
    return f"{name} {'are' if name.endswith('s') else 'is'}"


def described(value: Any) -> str:
    """A value of a wrong type as an error shows it: the value if that is short, else its type."""
    kind = type(value).__name__
    if value is None or isinstance(value, (bool, int, float, str, np.generic)):
        return repr(value)
    if isinstance(value, (jax.Array, np.ndarray)):
        return f"{value.dtype} of shape {value.shape}"
    return f"{'an' if kind[0] in 'AEIOUaeiou' else 'a'} {kind}"


def is_known(*values: Any) -> bool:
    """Whether no leaf is traced, so that the values can be inspected."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values))


def replicated(array: jax.Array) -> jax.Array:
    """Returns the array, replicated on each device if its mesh has Explicit axes.

    With Explicit axes JAX refuses operations whose sharding it cannot infer, such as row indexing.
    """
    mesh = jax.typeof(array).sharding.mesh
    if jax.sharding.AxisType.Explicit not in mesh.axis_types:
        return array
    whole = jax.sharding.PartitionSpec(*[None] * array.ndim)
    return jax.sharding.reshard(array, jax.sharding.NamedSharding(mesh, whole))


def _warn_if_rounded(array: np.ndarray, name: str) -> None:
    if array.ndim < 2 or array.size == 0:
        return
    # Make it (rows, features): support embeddings have two axes of rows.
    rows = array.reshape(len(array), -1) if array.ndim != 3 else array.reshape(-1, array.shape[2])
    rows = rows[:: max(1, len(rows) // _ROWS_LOOKED_AT)]
    with np.errstate(all="ignore"):
        lost = rows.astype(np.float32) - rows
        known = np.isfinite(lost).all(axis=1)
        if not known.any():
            return
        lost, rows = lost[known], rows[known]
        share = np.sqrt(np.sum(np.var(lost, axis=0)) / np.sum(np.var(rows, axis=0)))
    if share > _ROUNDING_THAT_MATTERS:
        warnings.warn(
            f"{name} are float64 and computed with in float32, whose rounding is {share:.1g} of"
            " their spread; subtract their mean first",
            RuntimeWarning,
            stacklevel=4,
        )


def as_scalar(value: Array | np.generic | float, name: str) -> jax.Array:
    """Returns a number that is 0 or more; NaN stays NaN.

    Raises:
      ValueError: an array, or a negative number (NaN when traced).
    """
    value = as_floating(value, name)
    if value.ndim != 0:
        raise ValueError(f"{name} has shape {value.shape}; one number is needed")
    return nan_where(value < 0, value, name, "must be 0 or more")


def nan_where(bad: Array, values: Array, name: str, needed: str) -> jax.Array:
    """Raises if any of `bad` is set; when traced, the bad values become NaN instead."""
    if is_known(bad) and bool(jnp.any(bad)):
        value = np.asarray(values.ravel()[jnp.argmax(bad)])
        raise ValueError(f"{name}={value!s} {needed}")
    return with_nan(bad, values)


def with_nan(undefined: Array, values: Array) -> jax.Array:
    """Returns the values with NaN where they are undefined, a NaN that jax_debug_nans ignores."""
    with jax.debug_nans(False):
        return jnp.where(undefined, jnp.asarray(jnp.nan, values.dtype), values)


def check_whole(value: Any, least: int, name: str) -> int:
    """Returns a whole number as an int: Python's, or an integer scalar of NumPy or JAX.

    Raises:
      ValueError: a number below `least`, one that is not whole, or a traced value.
    """
    if isinstance(value, jax.core.Tracer):
        raise ValueError(f"{name} is traced; a whole number that is known outside jit is needed")
    try:
        whole = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        whole = None
    if whole is None:
        raise ValueError(f"{name}={described(value)} must be a whole number, {least} or more")
    if whole < least:
        raise ValueError(f"{name}={value} must be at least {least}")
    return whole


def as_weights(weights: Array, length: int) -> jax.Array:
    """Checks the weights of examples.

    Raises:
      ValueError: a shape other than (length,), or a weight that is negative, infinite or NaN. When
        traced, such weights become NaN instead.
    """
    weights = as_floating(weights, "weights")
    if weights.shape != (length,):
        raise ValueError(f"weights of shape {weights.shape} for {length} examples")
    bad = ~((weights >= 0) & (weights < jnp.inf))
    return nan_where(bad, weights, "weight", "must be 0 or more and finite")
