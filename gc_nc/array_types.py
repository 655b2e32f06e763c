"""Axis letters of every shape in this package, and the arrays that its public functions take.

B  batch (examples)            C  classes
D  input dimensions, flattened W  ways of an episode (its classes)
K  embedding dimensions        S  shots of an episode (support examples a class)
H  image height, width: H W    Q  queries of an episode a class

The annotations are documentation at run time; the tests install jaxtyping's import hook, which
checks every one of them against the arrays that really arrive.

Whatever JAX is set to, the metrics see the same arrays: float32 and int32 with 64 bits enabled too,
whole on each device where a mesh has Explicit axes, and without a NaN that debugging would take for
an error.
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


# float64 arrays whose rounding to float32 is this large against their spread are warned of.
_ROUNDING_THAT_MATTERS = 1e-3
# Of an array's rows, so many tell how much rounding loses.
_ROWS_LOOKED_AT = 1024


def as_floating(array: Array | np.generic | float, name: str) -> jax.Array:
    """Casts real numbers to float32.

    Warns:
      RuntimeWarning: float64 values, outside jit, that lie so far from 0 against their spread that
        float32 rounds much of it away.

    Raises:
      ValueError: complex numbers, or no array of numbers.
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
        # In NumPy: JAX would wrap 64-bit integers to 32 bits first.
        with np.errstate(over="ignore"):
            return jnp.asarray(array.astype(np.float32))


def as_numbers(array: Any, name: str) -> Array:
    """A JAX array as it is, but see `replicated`; anything else as a NumPy array.

    Raises:
      ValueError: what is no array of numbers, such as a dict or None.
    """
    given = array
    if not isinstance(array, jax.Array):
        try:
            # Variables of Flax NNX, for one.
            wrapped = getattr(array, "__jax_array__", None)
            array = np.asarray(array) if wrapped is None else wrapped()
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{_subject(name)} {described(given)}; an array of numbers is needed"
            ) from error
    if not (jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool):
        raise ValueError(f"{_subject(name)} {described(given)}; an array of numbers is needed")
    return replicated(array) if isinstance(array, jax.Array) else array


def _subject(name: str) -> str:
    return f"{name} {'are' if name.endswith('s') else 'is'}"


def described(value: Any) -> str:
    """A value of a wrong type, for an error: its type, and the value itself where that is short."""
    kind = type(value).__name__
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    if isinstance(value, (jax.Array, np.ndarray)):
        return f"{value.dtype} of shape {value.shape}"
    return f"{'an' if kind[0] in 'AEIOUaeiou' else 'a'} {kind}"


def is_known(*values: Any) -> bool:
    """Whether no leaf is traced, so that values can be looked at."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values))


def replicated(array: jax.Array) -> jax.Array:
    """The same array, whole on each device where its mesh has Explicit axes.

    There JAX refuses what it cannot tell the sharding of, such as a choice of rows.
    """
    mesh = jax.typeof(array).sharding.mesh
    if jax.sharding.AxisType.Explicit not in mesh.axis_types:
        return array
    whole = jax.sharding.PartitionSpec(*[None] * array.ndim)
    return jax.sharding.reshard(array, jax.sharding.NamedSharding(mesh, whole))


def _warn_if_rounded(array: np.ndarray, name: str) -> None:
    if array.ndim < 2:
        return
    # (rows, features): stacks of rows, as support embeddings are, have two axes of them.
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
    if is_known(bad) and bool(jnp.any(bad)):
        value = np.asarray(values.ravel()[jnp.argmax(bad)])
        raise ValueError(f"{name}={value!s} {needed}")
    return with_nan(bad, values)


def with_nan(undefined: Array, values: Array) -> jax.Array:
    """The values, and a NaN that is meant, not a fault to be debugged, where they are undefined."""
    with jax.debug_nans(False):
        return jnp.where(undefined, jnp.asarray(jnp.nan, values.dtype), values)


def check_whole(value: Any, least: int, name: str) -> int:
    """Returns a whole number as an int: Python's, or an integer scalar of NumPy or JAX.

    Raises:
      ValueError: a number below `least`, one that is not whole, or what is traced.
    """
    if isinstance(value, jax.core.Tracer):
        raise ValueError(f"{name} is traced; a whole number that is known outside jit is needed")
    try:
        whole = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        whole = None
    if whole is None:
        shown = described(value) if isinstance(value, (np.ndarray, jax.Array)) else repr(value)
        raise ValueError(f"{name}={shown} must be a whole number, {least} or more")
    if whole < least:
        raise ValueError(f"{name}={value} must be at least {least}")
    return whole


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
