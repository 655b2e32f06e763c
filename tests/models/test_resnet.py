"""ResNet against an independent forward pass of the same parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gc_nc.models import ResNet, build_model
from tests.models.plain import convolution, random_variables
from tests.rounding import assert_same_numbers


def plain_forward(variables, x, num_blocks, bottleneck):
    """Embedding in float64, written from arXiv 1512.03385, figure 5 and section 4.2.

    Padding as torchvision has it, k // 2 on both sides; the bottleneck's stride on its 3x3.
    """

    def conv_norm(x, path, strides=1):
        params, stats = variables["params"], variables.get("batch_stats")
        for name in path:
            params, stats = params[name], stats and stats[name]
        x = convolution(x, params["conv"]["kernel"], strides)
        if stats is None:
            return x + params["conv"]["bias"]
        x = (x - stats["norm"]["mean"]) / np.sqrt(stats["norm"]["var"] + 1e-5)
        return x * params["norm"]["scale"] + params["norm"]["bias"]

    def relu(x):
        return np.maximum(x, 0)

    x = relu(conv_norm(x, ["stem"]))
    for stage, blocks in enumerate(num_blocks, start=1):
        for block in range(1, blocks + 1):
            strides = 2 if stage > 1 and block == 1 else 1
            name = f"stage{stage}_block{block}"
            if bottleneck:
                y = relu(conv_norm(x, [name, "conv1"]))
                y = relu(conv_norm(y, [name, "conv2"], strides))
                y = conv_norm(y, [name, "conv3"])
            else:
                y = relu(conv_norm(x, [name, "conv1"], strides))
                y = conv_norm(y, [name, "conv2"])
            if "shortcut" in variables["params"][name]:
                x = conv_norm(x, [name, "shortcut"], strides)
            x = relu(x + y)
    assert x.shape[1] == x.shape[2] == 4
    return x.mean(axis=(1, 2))


@pytest.mark.parametrize(
    ("bottleneck", "batch_norm", "shortcuts"),
    [
        (False, True, {"stage2_block1"}),
        (False, False, {"stage2_block1"}),
        # The first stage widens too, by the expansion of 4.
        (True, True, {"stage1_block1", "stage2_block1"}),
    ],
)
def test_resnet_equals_a_plain_forward_pass(bottleneck, batch_norm, shortcuts):
    # 8x8 maps, where padding on one side only ("SAME") differs at stride 2.
    model = ResNet((1, 2), bottleneck, num_classes=3, width=0.1, batch_norm=batch_norm)
    images = np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype(np.float32)
    variables = random_variables(model, images)
    assert {name for name, p in variables["params"].items() if "shortcut" in p} == shortcuts
    logits, embedding = jax.jit(model.apply)(variables, images)
    expected = plain_forward(variables, images, (1, 2), bottleneck)
    assert_same_numbers(embedding, expected)
    head = variables["params"]["head"]
    assert_same_numbers(logits, expected @ head["kernel"] + head["bias"])


@pytest.mark.parametrize(
    ("name", "asked", "normed"),
    [
        ("resnet18", None, True),
        ("resnet50", False, False),
        ("vgg11", None, False),
        ("vgg13", True, True),
        ("mlp", None, False),
    ],
)
def test_batch_norm_defaults_to_that_of_the_architecture(name, asked, normed):
    model = build_model(name, 2, width=0.05, batch_norm=asked)
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1), jnp.float32))
    )
    leaves = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(shapes["params"])}
    assert leaves == ({"kernel", "bias", "scale"} if normed else {"kernel", "bias"})
    assert ("batch_stats" in shapes) == normed
