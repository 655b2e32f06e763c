"""No two streams of a run's random numbers are equal, and none leads into another."""

import itertools

import jax
import numpy as np
import pytest

from gc_nc.random_streams import JAX_STREAMS, NUMPY_STREAMS, stream_generator, stream_key


def test_no_path_is_the_beginning_of_another():
    for one, other in itertools.permutations(JAX_STREAMS.values(), 2):
        assert other[: len(one)] != one
    # An epoch's number follows the seed at once, and is below every other path's.
    others = [path for name, path in NUMPY_STREAMS.items() if name != "order of an epoch"]
    assert NUMPY_STREAMS["order of an epoch"] == ()
    assert len(set(others)) == len(others)
    assert all(len(path) == 1 and path[0] >= 2**31 for path in others)


@pytest.mark.parametrize("seed", [0, 1])
def test_no_two_keys_are_equal(seed):
    # Of each stream itself, of steps folded into it, and of two splits folded into these.
    keys = [jax.random.key(seed)]
    for name in JAX_STREAMS:
        stream = stream_key(seed, name)
        steps = [jax.random.fold_in(stream, step) for step in range(8)]
        keys += [stream, *steps, *(jax.random.fold_in(k, i) for k in steps for i in range(2))]
    words = {tuple(np.asarray(jax.random.key_data(key)).tolist()) for key in keys}
    assert len(words) == len(keys)


def test_no_two_generators_are_equal():
    drawn = [
        stream_generator(0, "order of an epoch", epoch).integers(2**62) for epoch in range(300)
    ]
    for name in NUMPY_STREAMS:
        if name != "order of an epoch":
            drawn += [stream_generator(0, name, i).integers(2**62) for i in range(5)]
    assert len(set(drawn)) == len(drawn)
