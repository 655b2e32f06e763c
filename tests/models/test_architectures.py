"""VGG and ResNet against the published architectures and an independent forward pass."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gc_nc.errors import InputError
from gc_nc.metrics import geometric_complexity
from gc_nc.models import MODEL_NAMES, VGG, ResNet, build_model, embed_fn, layers


def init(model, images, seed=0):
    return jax.jit(model.init)(jax.random.key(seed), images)


def apply(model, variables, images):
    return jax.jit(model.apply)(variables, images)


def images_of(shape, seed=1):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        # torchvision counts 132,863,336 and 133,047,848, of which 123,642,856 are the three fully
        # connected layers of the ImageNet form; the CIFAR form has one of 512 x 10 + 10.
        ("vgg11", 132_863_336 - 123_642_856 + 5_130),
        ("vgg13", 133_047_848 - 123_642_856 + 5_130),
        # torchvision: 11,689,512 and 25,557,032 with a 7x7 stem (9,408 weights) and 1,000 classes;
        # the CIFAR form has a 3x3 stem (1,728) and 10 classes.
        ("resnet18", 11_689_512 - 9_408 + 1_728 - 513_000 + 5_130),
        ("resnet50", 25_557_032 - 9_408 + 1_728 - 2_049_000 + 20_490),
    ],
)
def test_parameter_counts_are_the_published_ones(name, published):
    model = build_model(name, 10)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3))))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == published


@pytest.mark.parametrize("name", MODEL_NAMES)
@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (32, 32, 3), (84, 84, 3)])
def test_every_input_size_gives_logits_and_an_embedding(name, shape):
    model = build_model(name, 7, width=0.25)
    images = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    (logits, embedding), variables = jax.eval_shape(
        lambda x: model.init_with_output(jax.random.key(0), x), images
    )
    embedding_dim = 512 if name == "resnet50" else 128
    assert logits.shape == (2, 7)
    assert embedding.shape == (2, embedding_dim)
    assert variables["params"]["head"]["kernel"].shape == (embedding_dim, 7)


@pytest.mark.parametrize("name", ["vgg11"])
def test_head_sees_the_embedding(name):
    model = build_model(name, 5, width=0.05)
    images = images_of((3, 8, 8, 1))
    variables = init(model, images)
    logits, embedding = apply(model, variables, images)
    head = variables["params"]["head"]
    np.testing.assert_allclose(
        logits, embedding @ head["kernel"] + head["bias"][None], rtol=1e-5, atol=1e-6
    )


def test_vgg_equals_a_plain_forward_pass():
    model = build_model("vgg13", 4, width=0.1)
    images = images_of((2, 28, 28, 1))
    variables = init(model, images)
    params = variables["params"]
    x = images
    for stage in range(1, 6):
        for conv in (1, 2):
            p = params[f"stage{stage}_conv{conv}"]["conv"]
            x = jax.lax.conv_general_dilated(
                x, p["kernel"], (1, 1), [(1, 1), (1, 1)], dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jnp.where(x + p["bias"][None, None, None] > 0, x + p["bias"][None, None, None], 0)
        odd = x.shape[1] % 2
        x = jnp.pad(x, [(0, 0), (0, odd), (0, odd), (0, 0)], constant_values=-jnp.inf)
        b, h, w, c = x.shape
        x = x.reshape(b, h // 2, 2, w // 2, 2, c).max(axis=(2, 4))
    assert x.shape[1:3] == (1, 1)
    _, embedding = apply(model, variables, images)
    np.testing.assert_allclose(embedding, x[:, 0, 0], rtol=1e-4, atol=1e-6)
    assert float(jnp.abs(embedding).max()) > 0.01


def test_he_initialisation_keeps_the_signal():
    model = build_model("vgg13", 10, width=0.25)
    images = images_of((4, 32, 32, 3))
    _, embedding = jax.jit(model.apply)(init(model, images), images)
    assert 0.05 < float(jnp.std(embedding)) < 20


def test_running_statistics_do_not_mix_examples():
    model = ResNet((1, 1), bottleneck=False, num_classes=3, width=0.05)
    images = images_of((4, 8, 8, 3))
    variables = init(model, images)
    _, updates = jax.jit(partial(model.apply, train=True, mutable=["batch_stats"]))(
        variables, images
    )
    before, after = jax.tree.leaves(variables["batch_stats"]), jax.tree.leaves(updates)
    assert any(not np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    variables = {**variables, **updates}
    embed = jax.jit(lambda x: model.apply(variables, x)[1])
    changed = embed(images.at[1].set(100.0))
    np.testing.assert_array_equal(embed(images)[0], changed[0])
    assert not np.array_equal(embed(images)[1], changed[1])


def test_batch_norm_replaces_the_bias():
    assert (
        "bias" in init(VGG(((8,),), 2), images_of((1, 8, 8, 1)))["params"]["stage1_conv1"]["conv"]
    )
    normed = init(VGG(((8,),), 2, batch_norm=True), images_of((1, 8, 8, 1)))
    assert set(normed["params"]["stage1_conv1"]["conv"]) == {"kernel"}
    assert "batch_stats" in normed


def test_bfloat16_computes_low_and_stores_high():
    model = build_model("vgg11", 3, width=0.05, dtype=jnp.bfloat16)
    images = images_of((2, 8, 8, 1))
    variables = init(model, images)
    logits, embedding = apply(model, variables, images)
    assert embedding.dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(variables["params"])} == {jnp.dtype("float32")}


def test_j5_relu_and_max_pool_at_ties():
    assert jax.grad(layers.relu)(0.0) == 0
    for shape in ((1, 2, 2, 1), (1, 1, 1, 1), (1, 3, 3, 1)):
        jacobian = jax.jacrev(layers.max_pool)(jnp.ones(shape))
        # One winner a window.
        assert jnp.sum(jacobian**2) == layers.max_pool(jnp.ones(shape)).size


def test_max_pool_covers_odd_borders():
    x = jnp.arange(9.0).reshape(1, 3, 3, 1) - 20
    np.testing.assert_array_equal(layers.max_pool(x)[0, :, :, 0], [[-16, -15], [-13, -12]])


@pytest.mark.parametrize(
    "wrap", [lambda f: f, jax.jit, lambda f: lambda w: jax.vmap(f)(w[None])[0]]
)
def test_j6_second_derivative_through_relu_and_max_pool(wrap):
    def gc(w):
        def embed(x):
            return layers.max_pool(layers.relu(w * x)).reshape(x.shape[0], -1)

        return geometric_complexity(embed, jnp.full((1, 2, 2, 1), 0.5))

    assert wrap(gc)(jnp.float32(3)) == 9
    assert wrap(jax.grad(gc))(jnp.float32(3)) == 6


def test_embed_fn_compiles_once_for_all_variables_of_a_model():
    images = images_of((2, 8, 8, 1))
    traces = []

    @jax.jit
    def embed(fn, x):
        traces.append(1)
        return fn(x)

    outputs = []
    for seed in (0, 1):
        model = build_model("vgg11", 3, width=0.05)
        outputs.append(embed(embed_fn(model, init(model, images, seed)), images))
    assert len(traces) == 1
    assert not np.array_equal(*outputs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "vgg12"}, "did you mean 'vgg1"),
        ({"name": "vgg11", "width": 0.0}, "width=0.0"),
        ({"name": "vgg11", "width": float("nan")}, "width=nan"),
        ({"name": "vgg11", "num_classes": 0}, "num_classes=0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        build_model(**{"num_classes": 2, **arguments})
