"""Checks of arguments of public functions; an error says in one line what came and what is needed.

Numbers and arrays of numbers are checked in `gc_nc.array_types`.
"""

import operator
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from gc_nc.array_types import Array, as_numbers, as_weights, described, is_known, replicated

ARRAYS = (jax.Array, np.ndarray)


def as_key(key: Any) -> jax.Array:
    """Returns a typed random key; a key of the old style, an array of uint32, is wrapped.

    Raises:
      ValueError: `key` is neither.
    """
    if isinstance(key, ARRAYS):
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.dtype == np.uint32:
            words = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape
            if key.shape == words:
                return jax.random.wrap_key_data(replicated(jnp.asarray(key)))
        elif jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim == 0:
            return key
    raise ValueError(f"key is {described(key)}; one random key is needed, as in jax.random.key(0)")


def as_number(value: Any, name: str, allowed: Callable[[float], bool], needed: str) -> float:
    """Returns a number that is known outside jit as a Python float.

    Raises:
      ValueError: `value` is traced, is not a number, or is not allowed.
    """
    if not is_known(value):
        raise ValueError(f"{name} is traced; a number that is known outside jit is needed")
    one_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(value, (np.generic, *ARRAYS)):
        real = any(jnp.issubdtype(value.dtype, kind) for kind in (jnp.floating, jnp.integer))
        one_number = real and value.ndim == 0
    if not one_number:
        raise ValueError(f"{name}={described(value)} {needed}")
    if not allowed(float(value)):
        raise ValueError(f"{name}={value} {needed}")
    return float(value)


def check_choice(value: Any, allowed: Collection[str], name: str, or_else: str = "") -> None:
    """Raises ValueError if a value is not one of the allowed words; `or_else` ends the message."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}={described(value)} is not one of {', '.join(allowed)}{or_else}")


def check_flag(value: Any, name: str) -> None:
    """Raises ValueError if a value is neither True nor False, such as the string "False"."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name}={described(value)}; True or False is needed")


def check_function(function: Any, name: str, needed: str) -> None:
    """Raises ValueError if `function` cannot be called."""
    if not callable(function):
        raise ValueError(f"{name} is {described(function)}; a function {needed} is needed")


def check_leaves(params: Any) -> None:
    """Raises ValueError if parameters are not a pytree of arrays, such as a whole module."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        kind = getattr(leaf, "dtype", np.dtype(type(leaf)))
        if not any(
            jnp.issubdtype(kind, known) for known in (jnp.number, bool, jax.dtypes.extended)
        ):
            raise ValueError(
                f"params{jax.tree_util.keystr(path)} is {described(leaf)}; a pytree of arrays of"
                " numbers is needed"
            )


def check_rows(embeddings: Array, dim: int, name: str = "embeddings") -> None:
    """Raises ValueError if the shape is not (B, dim)."""
    if embeddings.ndim != 2 or embeddings.shape[1] != dim:
        raise ValueError(f"{name} of shape {embeddings.shape}; (B, {dim}) is needed")


def as_labels(labels: Any, num_rows: int, num_classes: int | None = None) -> Array:
    """Returns labels (B,) as a JAX or NumPy array of integers, with the width that they have.

    Raises:
      ValueError: the shape is not (B,), or the labels are not integers.
    """
    labels = as_numbers(labels, "labels")
    needed = "integers" if num_classes is None else f"integers in 0..{num_classes - 1}"
    if labels.shape != (num_rows,):
        hint = ""
        if labels.ndim == 2 and len(labels) == num_rows:
            one_hot = labels.shape[1] > 1
            hint = f", so take {'labels.argmax(axis=1)' if one_hot else 'labels[:, 0]'}"
        raise ValueError(
            f"labels of shape {labels.shape} for {num_rows} examples; ({num_rows},) {needed} are"
            f" needed{hint}"
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels are {labels.dtype}; {needed} are needed")
    return labels


def counted_rows(
    labels: Shaped[Array, "B"],
    weights: Shaped[Array, "B"] | None,
    num_classes: int,
    num_rows: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns labels, weights that are 0 for rows to be ignored, and which labels are out of range.

    Raises:
      ValueError: in the cases in which `update_class_statistics` raises it.
    """
    labels = as_labels(labels, num_rows, num_classes)
    if weights is None:
        weights = jnp.ones(labels.shape, jnp.float32)
    else:
        weights = as_weights(weights, num_rows)
    # 64-bit labels are compared before they are cast, since 2**32 + 1 is not 1; 8-bit labels are
    # compared after, since C may not fit into 8 bits.
    if labels.dtype.itemsize < 4:
        labels = labels.astype(np.int32)
    in_range = (labels >= 0) & (labels < num_classes)
    out_of_range = ~in_range & (weights != 0)
    if is_known(out_of_range) and bool(jnp.any(out_of_range)):
        raise ValueError(
            f"label {operator.index(labels[int(jnp.argmax(out_of_range))])} is outside"
            f" 0..{num_classes - 1} (num_classes={num_classes})"
        )
    counted = in_range & (weights != 0)
    labels = jnp.where(counted, jnp.asarray(labels), 0).astype(jnp.int32)
    return labels, jnp.where(counted, weights, 0), out_of_range
