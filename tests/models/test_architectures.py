"""The networks against the published architectures and an independent forward pass."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gc_nc.errors import InputError
from gc_nc.metrics import geometric_complexity
from gc_nc.models import MODEL_NAMES, VGG, ResNet, build_model, embed_fn, layers
from tests.models.plain import convolution, random_variables
from tests.rounding import assert_same_numbers


def images_of(shape):
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def shapes_of(model, images, **options):
    """Of (logits, embedding), and of the variables, without compiling anything."""
    return jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), images, **options))


@pytest.fixture(scope="module")
def vgg13():
    """(images, parameters at their start, logits, embedding)."""
    model = build_model("vgg13", 4, width=0.1)
    images = images_of((2, 28, 28, 1))
    variables = jax.jit(model.init)(jax.random.key(0), images)
    logits, embedding = jax.jit(model.apply)(variables, images)
    return images, jax.device_get(variables["params"]), logits, embedding


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
    _, variables = shapes_of(build_model(name, 10), np.zeros((1, 32, 32, 3), np.float32))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == published


@pytest.mark.parametrize("name", MODEL_NAMES)
@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (32, 32, 3), (84, 84, 3)])
def test_every_input_size_gives_logits_and_an_embedding(name, shape):
    model = build_model(name, 7, width=0.25)
    (logits, embedding), variables = shapes_of(model, np.zeros((2, *shape), np.float32))
    embedding_dim = 512 if name == "resnet50" else 128
    assert logits.shape == (2, 7)
    assert embedding.shape == (2, embedding_dim)
    assert variables["params"]["head"]["kernel"].shape == (embedding_dim, 7)


def test_vgg_equals_a_plain_forward_pass(vgg13):
    x, params, logits, embedding = vgg13
    for stage in range(1, 6):
        for conv in (1, 2):
            p = params[f"stage{stage}_conv{conv}"]["conv"]
            x = np.maximum(convolution(x, p["kernel"]) + p["bias"], 0)
        odd = x.shape[1] % 2
        x = np.pad(x, [(0, 0), (0, odd), (0, odd), (0, 0)], constant_values=-np.inf)
        b, h, w, c = x.shape
        x = x.reshape(b, h // 2, 2, w // 2, 2, c).max(axis=(2, 4))
    assert x.shape[1:3] == (1, 1)
    assert_same_numbers(embedding, x[:, 0, 0])
    head = params["head"]
    assert_same_numbers(logits, x[:, 0, 0] @ head["kernel"] + head["bias"])


def test_he_initialisation_keeps_the_signal(vgg13):
    assert 0.05 < np.std(vgg13[3]) < 20


def test_running_statistics_do_not_mix_examples():
    model = ResNet((1, 1), bottleneck=False, num_classes=3, width=0.05)
    images = images_of((4, 8, 8, 3))
    variables = random_variables(model, images)
    _, updates = jax.jit(partial(model.apply, train=True, mutable=["batch_stats"]))(
        variables, images
    )
    before, after = jax.tree.leaves(variables["batch_stats"]), jax.tree.leaves(updates)
    assert any(not np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    variables = {**variables, **updates}
    embed = jax.jit(lambda x: model.apply(variables, x)[1])
    changed = images.copy()
    changed[1] = 100
    before, after = embed(images), embed(changed)
    np.testing.assert_array_equal(before[0], after[0])
    assert not np.array_equal(before[1], after[1])


def test_batch_norm_replaces_the_bias():
    images = images_of((1, 8, 8, 1))
    _, plain = shapes_of(VGG(((8,),), 2), images)
    _, normed = shapes_of(VGG(((8,),), 2, batch_norm=True), images)
    assert set(plain["params"]["stage1_conv1"]["conv"]) == {"kernel", "bias"}
    assert set(normed["params"]["stage1_conv1"]["conv"]) == {"kernel"}
    assert "batch_stats" in normed


@pytest.mark.parametrize("name", ["vgg11", "resnet18", "mlp"])
def test_bfloat16_computes_low_and_stores_high(name):
    model = build_model(name, 3, width=0.05, dtype=jnp.bfloat16)
    (logits, embedding), variables = shapes_of(model, images_of((2, 8, 8, 1)))
    assert embedding.dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


def test_j5_relu_and_max_pool_at_ties():
    shapes = ((1, 2, 2, 1), (1, 1, 1, 1), (1, 3, 3, 1))

    @jax.jit
    def slope_and_squares(tied):
        squares = [jnp.sum(jax.jacrev(layers.max_pool)(x) ** 2) for x in tied]
        return jax.grad(layers.relu)(0.0), squares

    slope, squares = slope_and_squares([np.ones(shape, np.float32) for shape in shapes])
    assert slope == 0
    # One winner a window.
    np.testing.assert_array_equal(squares, [1, 1, 4])


def test_max_pool_covers_odd_borders():
    x = jnp.arange(9.0).reshape(1, 3, 3, 1) - 20
    np.testing.assert_array_equal(layers.max_pool(x)[0, :, :, 0], [[-16, -15], [-13, -12]])


def test_j6_second_derivative_through_relu_and_max_pool():
    """GC of max_pool(relu(w x)) at w = 3 is w^2."""

    def gc(w):
        def embed(x):
            return layers.max_pool(layers.relu(w * x)).reshape(x.shape[0], -1)

        return geometric_complexity(embed, jnp.full((1, 2, 2, 1), 0.5))

    with_gradient = jax.value_and_grad(gc)
    w = np.float32(3)
    assert with_gradient(w) == (9, 6)
    compiled, mapped = jax.jit(lambda w: (with_gradient(w), jax.vmap(with_gradient)(w[None])))(w)
    assert compiled == mapped == (9, 6)


def test_embed_fn_compiles_once_for_all_variables_of_a_model():
    images = images_of((2, 8, 8, 1))
    traces = []

    @jax.jit
    def embed(fn, x):
        traces.append(1)
        return fn(x)

    outputs = []
    for scale in (1, 2):
        model = build_model("mlp", 3, width=0.05)
        variables = jax.tree.map(lambda v: scale * v, random_variables(model, images))  # noqa: B023
        outputs.append(embed(embed_fn(model, variables), images))
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
