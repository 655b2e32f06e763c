"""The network of fully connected layers against NumPy in float64, and its closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gc_nc.metrics import squared_jacobian_norms
from gc_nc.models import MLP, build_model, embed_fn, layer_names
from tests.rounding import assert_same_numbers

IMAGES = np.random.default_rng(0).normal(size=(5, 3, 2, 1)).astype(np.float32)


def shapes_of(model, images=IMAGES):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.asarray(images)))


def random_variables(model):
    """Every parameter and statistic drawn, so that nothing is left at 0 or 1."""
    rng = np.random.default_rng(1)

    def draw(leaf):
        low = -0.5 if leaf.ndim > 1 else 0.1
        return rng.uniform(low, low + 1, leaf.shape).astype(np.float32)

    return jax.tree.map(draw, shapes_of(model))


def plain_forward(variables, images):
    """(logits, outputs of the layers) in float64; the last output is the embedding."""
    variables = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
    params, statistics = variables["params"], variables.get("batch_stats")
    x, outputs = images.reshape(len(images), -1).astype(np.float64), []
    for i in (1, 2):
        x = x @ params[f"stage{i}_dense"]["kernel"]
        if statistics is None:
            x = x + params[f"stage{i}_dense"]["bias"]
        else:
            norm, running = params[f"stage{i}_norm"], statistics[f"stage{i}_norm"]
            x = (x - running["mean"]) / np.sqrt(running["var"] + 1e-5)
            x = x * norm["scale"] + norm["bias"]
        x = np.maximum(x, 0)
        outputs.append(x)
    return x @ params["head"]["kernel"] + params["head"]["bias"], outputs


@pytest.mark.parametrize("batch_norm", [False, True])
def test_equals_a_plain_forward_pass(batch_norm):
    model = MLP((7, 4), num_classes=3, batch_norm=batch_norm)
    variables = random_variables(model)
    logits, (first, embedding) = plain_forward(variables, IMAGES)
    # Units on both sides of 0.
    assert 0 < np.mean(first > 0) < 1
    assert 0 < np.mean(embedding > 0) < 1
    assert layer_names(model) == ("stage1", "stage2", "embedding")

    @jax.jit
    def outputs(variables, images):
        layers = [embed_fn(model, variables, layer)(images) for layer in layer_names(model)]
        return model.apply(variables, images), layers

    assert_same_numbers(
        outputs(variables, IMAGES), ((logits, embedding), [first, embedding, embedding])
    )


def test_geometric_complexity_is_the_squared_weights_of_active_units():
    """z = relu(W^T x + b): row k of the Jacobian is w_k where unit k is active, and 0 elsewhere."""
    model = MLP((7,), num_classes=3)
    params = random_variables(model)["params"]
    kernel, bias = (np.asarray(params["stage1_dense"][name]) for name in ("kernel", "bias"))
    active = IMAGES.reshape(5, 6) @ kernel + bias > 0
    assert len(set(active.sum(axis=1))) > 1
    norms = squared_jacobian_norms(embed_fn(model, {"params": params}), IMAGES)
    assert_same_numbers(norms, active @ np.sum(kernel.astype(np.float64) ** 2, axis=0))


def test_parameter_counts_by_hand():
    """A layer of 784 x 128 weights and 128 biases, and a head of 128 x 10 and 10."""
    images = np.zeros((1, 28, 28, 1), np.float32)
    plain, normed = (
        shapes_of(build_model("mlp", 10, width=0.25, batch_norm=batch_norm), images)
        for batch_norm in (None, True)
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(plain)) == 784 * 128 + 128 + 128 * 10 + 10
    assert set(plain) == {"params"}
    # Scale and bias after the layer in place of its own bias, and two running statistics.
    assert set(normed["params"]["stage1_dense"]) == {"kernel"}
    assert {leaf.shape for leaf in jax.tree.leaves(normed["params"]["stage1_norm"])} == {(128,)}
    assert {leaf.shape for leaf in jax.tree.leaves(normed["batch_stats"])} == {(128,)}


def test_training_normalises_by_the_batch_and_follows_it():
    model = MLP((7, 4), num_classes=3, batch_norm=True)
    variables = random_variables(model)
    _, updates = jax.jit(lambda v: model.apply(v, IMAGES, train=True, mutable=["batch_stats"]))(
        variables
    )
    before, after = (v["batch_stats"]["stage1_norm"] for v in (variables, updates))
    kernel = variables["params"]["stage1_dense"]["kernel"].astype(np.float64)
    layer = IMAGES.reshape(5, 6) @ kernel
    expected = {
        "mean": 0.9 * before["mean"] + 0.1 * layer.mean(axis=0),
        "var": 0.9 * before["var"] + 0.1 * layer.var(axis=0),
    }
    assert_same_numbers(dict(after), expected)
