"""VGG as an `embed_fn` of the metrics, and what its train flag does."""

import jax
import numpy as np
import pytest

from gc_nc.metrics import geometric_complexity
from gc_nc.models import VGG, embed_fn
from tests.models.plain import random_variables
from tests.rounding import assert_same_numbers

IMAGES = np.random.default_rng(1).normal(size=(2, 8, 8, 1)).astype(np.float32)
MODEL = VGG(((4,), (6, 6)), num_classes=3)
VARIABLES = random_variables(MODEL, IMAGES)


@pytest.mark.slow
def test_embedding_is_the_mean_of_a_map_that_is_left():
    """Two poolings leave 2x2 of 8x8: the mean over it, as of the ReLU outputs themselves.

    And jit equals eager.
    """
    eager, state = MODEL.apply(
        VARIABLES, IMAGES, capture_intermediates=True, mutable=["intermediates"]
    )
    last = np.asarray(state["intermediates"]["stage2_conv2"]["__call__"][0])
    pooled = np.maximum(last, 0).reshape(2, 2, 2, 2, 2, 6).max(axis=(2, 4))
    assert_same_numbers(eager[1], pooled.mean(axis=(1, 2)))
    assert_same_numbers(jax.jit(MODEL.apply)(VARIABLES, IMAGES), eager)


def test_j2_nothing_is_random_in_training():
    """No dropout: training needs no key, and without BatchNorm it is the same program."""
    programs = [
        str(jax.make_jaxpr(lambda v, x: MODEL.apply(v, x, train=train))(VARIABLES, IMAGES))  # noqa: B023
        for train in (True, False)
    ]
    assert programs[0] == programs[1]


def test_metrics_compile_once_for_equal_models(compilations):
    first = embed_fn(MODEL, VARIABLES)
    other = jax.tree.map(lambda leaf: leaf * 1.5, VARIABLES)
    second = embed_fn(VGG(((4,), (6, 6)), num_classes=3), other)
    gc_first = geometric_complexity(first, IMAGES)
    before = len(compilations)
    gc_second = geometric_complexity(second, IMAGES)
    assert len(compilations) == before
    assert gc_first != gc_second
    # Against the definition.
    jacobian = jax.jit(jax.jacrev(second))(IMAGES)
    own = np.stack([jacobian[b, :, b] for b in range(2)]).astype(np.float64)
    assert_same_numbers(gc_second, np.sum(own**2) / 2)
