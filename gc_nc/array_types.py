"""Axis letters of every shape in this package, and the array types of its public functions.

B  batch (examples)            C  classes
D  input dimensions, flattened W  ways of an episode (its classes)
K  embedding dimensions        S  shots of an episode (support examples a class)
H  image height, width: H W    Q  queries of an episode a class

The annotations are documentation at run time; the tests install jaxtyping's import hook, which
checks every one of them against the arrays that really arrive.
"""

from collections.abc import Callable

import jax
import numpy as np

#: Anything with a shape and a dtype: JAX arrays, traced or not, and NumPy arrays.
Array = jax.Array | np.ndarray

#: A pure function (B, *input) -> (B, K) in which examples do not mix, from any JAX library.
EmbedFn = Callable[[jax.Array], jax.Array]
