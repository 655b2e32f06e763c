"""Every stream of random numbers of a run, by name.

A stream is a path of whole numbers below a seed. No path is a prefix of another, so folding a step,
a split or a trial into one stream never gives a key of another stream. JAX's keys and NumPy's
generators have separate registries, since their numbers are unrelated.
"""

from types import MappingProxyType

import jax
import numpy as np

#: Paths below `jax.random.key(seed)`, followed by `jax.random.fold_in`. Parameters are initialised
#: from the root itself, into which Flax folds hashes of the layers' names.
JAX_STREAMS = MappingProxyType(
    {
        "augmentation": (1, 0),
        "evaluation probes": (1, 1),
        "penalty probes": (2, 0),
        "monitor probes": (2, 1),
        "source GC of transfer": (3,),
        "GC by layer": (4,),
        "trials of sampled GC": (5,),
        "full measurement": (6,),
    }
)

# Larger than any epoch's number: a run has fewer than 2^31 epochs.
_BASE = 2**31

#: Paths below a seed for NumPy's SeedSequence, which takes the whole path at once: (seed, *path,
#: *indices). The order of an epoch comes from (seed, epoch).
NUMPY_STREAMS = MappingProxyType(
    {
        "order of an epoch": (),
        "examples for GC": (_BASE,),
        "random class split": (_BASE + 1,),
        "held-out images of a class": (_BASE + 2,),
        "images of a split": (_BASE + 3,),
    }
)


def stream_key(seed: int | jax.Array, name: str) -> jax.Array:
    """The JAX key of a stream of JAX_STREAMS; the seed may be traced."""
    key = jax.random.key(seed)
    for number in JAX_STREAMS[name]:
        key = jax.random.fold_in(key, number)
    return key


def stream_generator(seed: int, name: str, *indices: int) -> np.random.Generator:
    """NumPy's generator of a stream of NUMPY_STREAMS, or of one of its numbered parts."""
    return np.random.default_rng([seed, *NUMPY_STREAMS[name], *indices])
