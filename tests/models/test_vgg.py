"""VGG as an `embed_fn` of the metrics, and what its train flag does."""

import jax
import numpy as np
import pytest

from gc_nc.metrics import geometric_complexity
from gc_nc.metrics.jacobian_products import _evaluate_compiled
from gc_nc.models import VGG, embed_fn

IMAGES = jax.random.normal(jax.random.key(1), (2, 8, 8, 1))


def small_vgg():
    return VGG(((4,), (6, 6)), num_classes=3)


def init(seed=0):
    return jax.jit(small_vgg().init)(jax.random.key(seed), IMAGES)


def test_jit_equals_eager():
    variables = init()
    eager = small_vgg().apply(variables, IMAGES)
    jitted = jax.jit(small_vgg().apply)(variables, IMAGES)
    for a, b in zip(eager, jitted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_j2_nothing_is_random_in_training():
    """No dropout: training needs no key, and without BatchNorm it is the same function."""
    variables = init()
    for a, b in zip(
        small_vgg().apply(variables, IMAGES, train=True),
        small_vgg().apply(variables, IMAGES, train=False),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_embedding_is_the_mean_of_a_map_that_is_left():
    """Two poolings leave 2x2 of 8x8: the mean over it, as of the ReLU outputs themselves."""
    variables = init()
    (_, embedding), state = small_vgg().apply(
        variables, IMAGES, capture_intermediates=True, mutable=["intermediates"]
    )
    last = np.asarray(state["intermediates"]["stage2_conv2"]["__call__"][0])
    pooled = np.maximum(last, 0).reshape(2, 2, 2, 2, 2, 6).max(axis=(2, 4))
    np.testing.assert_allclose(embedding, pooled.mean(axis=(1, 2)), rtol=1e-5)


def test_metrics_compile_once_for_equal_models():
    first = embed_fn(small_vgg(), init(0))
    second = embed_fn(small_vgg(), init(1))
    assert first.func == second.func
    assert hash(first.func) == hash(second.func)
    assert first.func != embed_fn(VGG(((4,),), num_classes=3), init(0)).func
    gc_first = geometric_complexity(first, IMAGES)
    before = _evaluate_compiled._cache_size()
    gc_second = geometric_complexity(second, IMAGES)
    assert _evaluate_compiled._cache_size() == before
    assert gc_first != gc_second
    # Against the definition.
    jacobian = jax.jacrev(second)(IMAGES)
    own = np.stack([jacobian[b, :, b] for b in range(2)])
    assert gc_second == pytest.approx(np.sum(own**2) / 2, rel=1e-5)
