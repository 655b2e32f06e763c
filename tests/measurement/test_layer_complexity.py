"""GC of every layer, against exact norms of the network cut off there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gc_nc.errors import InputError
from gc_nc.measurement.layer_complexity import geometric_complexity_by_layer
from gc_nc.metrics import geometric_complexity
from gc_nc.models import VGG, build_model, embed_fn, layer_names
from tests.rounding import assert_same_numbers


@pytest.mark.slow
def test_every_layer_in_one_call():
    model = VGG(((3,), (6,)), 3)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 4, 1)), jnp.float32)
    variables = jax.jit(model.init)(jax.random.key(0), images)
    # All 16 input dimensions: exact.
    found = geometric_complexity_by_layer(
        model, variables, images, jax.random.key(1), method="input_dims", num_probes=16
    )
    layers = ["stage1", "stage2", "embedding"]
    assert list(found) == layers == list(layer_names(model))
    first = embed_fn(model, variables, "stage1")
    assert first(images).shape == (3, 2 * 2 * 3)
    exact = geometric_complexity(first, images)
    assert_same_numbers(found["stage1"].mean, exact, num_terms=3 * 2 * 2 * 16)
    # The mean of a 1x1 map is that map.
    assert_same_numbers(found["stage2"].mean, found["embedding"].mean)
    assert abs(found["stage2"].mean - found["stage1"].mean) > 1e-2 * exact


def test_layers_of_a_resnet():
    model = build_model("resnet18", 3, width=0.05)
    images = jnp.zeros((2, 8, 8, 1))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    assert "intermediates" not in variables
    sizes = [
        jax.eval_shape(lambda v, layer=layer: embed_fn(model, v, layer)(images), variables).shape
        for layer in layer_names(model)
    ]
    assert sizes == [(2, 192), (2, 192), (2, 96), (2, 52), (2, 26), (2, 26)]


def test_an_unknown_layer_is_named():
    model = build_model("vgg11", 3, width=0.05)
    with pytest.raises(InputError, match="layer 'stage9' is not one of stage1, stage2"):
        embed_fn(model, {}, "stage9")
