"""Fine-tuning: its start is the nearest mean, it lowers the loss, and leaves the network alone."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from gc_nc.transfer import fine_tune_predictions
from tests.rounding import assert_same_numbers

KEYWORDS = {"num_steps": 10, "learning_rate": 0.1}


def embed(scale, params, inputs):
    """`scale` stands for running statistics."""
    flat = inputs.reshape(len(inputs), -1)
    return scale * jnp.tanh(flat @ params["kernel"] + params["bias"][None])


def scaled(scale):
    """Programs for one are those for all others."""
    return jax.tree_util.Partial(embed, jnp.float32(scale))


EMBED = scaled(1)


def example(seed=0, num_ways=3, num_shots=4):
    """Images of 2 x 3 whose classes overlap."""
    rng = np.random.default_rng(seed)
    params = {
        "kernel": rng.normal(size=(6, 8)).astype(np.float32) / 2,
        "bias": rng.normal(size=8).astype(np.float32),
    }
    centres = rng.normal(size=(num_ways, 1, 2, 3))
    support = centres + rng.normal(size=(num_ways, num_shots, 2, 3))
    query = (centres + rng.normal(size=(num_ways, 20, 2, 3))).reshape(-1, 2, 3)
    return params, support.astype(np.float32), query.astype(np.float32)


def losses_of(*arguments, **keywords):
    losses = []
    predicted = fine_tune_predictions(
        *arguments, **keywords, report=lambda step, loss: losses.append((step, loss))
    )
    assert [step for step, _ in losses] == list(range(1, len(losses) + 1))
    return predicted, [loss for _, loss in losses]


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e4])
def test_no_step_is_the_nearest_mean(scale):
    params, support, query = example()
    predicted, losses = losses_of(
        scaled(scale), params, support, query, num_steps=0, learning_rate=0.1
    )
    assert losses == []
    z, z_query = (
        scale * np.tanh(x.reshape(*shape, 6).astype(float) @ params["kernel"] + params["bias"])
        for x, shape in ((support, (3, 4)), (query, (60,)))
    )
    distances = np.linalg.norm(z_query[:, None] - z.mean(axis=1)[None], axis=2)
    assert set(distances.argmin(axis=1)) == {0, 1, 2}
    np.testing.assert_array_equal(predicted, distances.argmin(axis=1))


def test_a_step_by_hand():
    """One dimension, u = -1 and 1: logits are (-2u - 1, 2u - 1) and p = sigmoid(-4) is wrong."""
    params = {"shift": np.float32(0.0)}
    shifted = jax.tree_util.Partial(lambda params, inputs: inputs + params["shift"])
    support = np.array([[[4.0]], [[6.0]]], np.float32)
    p = 1 / (1 + np.exp(4))
    _, losses = losses_of(shifted, params, support, support[:, 0], num_steps=2, learning_rate=0.5)
    # Residuals -p, p at u = -1 and p, -p at 1: b and the shift stay, A = (-2, 2) -/+ lr p.
    margin = 2 * (2 + 0.5 * p)
    assert_same_numbers(np.array(losses), np.log1p(np.exp([-4, -margin])))


def test_support_loss_falls_and_the_network_stays_as_it_is():
    params, support, query = example()
    kept = jax.tree.map(np.copy, params)
    before = fine_tune_predictions(EMBED, params, support, query, num_steps=0, learning_rate=0.1)
    after, losses = losses_of(EMBED, params, support, query, num_steps=60, learning_rate=0.5)
    assert losses[-1] < 0.3 * losses[0]
    assert np.any(after != before)
    jax.tree.map(np.testing.assert_array_equal, params, kept)
    device = jax.tree.map(jnp.asarray, params)
    fine_tune_predictions(EMBED, device, support, query, **KEYWORDS)
    jax.tree.map(np.testing.assert_array_equal, device, kept)


def test_the_network_is_trained_and_not_the_head_alone():
    """Embeddings of one number, which mixes up the ways: a head alone cannot tell them apart."""
    product = jax.tree_util.Partial(lambda params, x: jnp.tanh(x @ params["kernel"]))
    params = {"kernel": np.float32([[1.0], [0.3]])}
    support = np.float32([[[1, 1], [-1, 1]], [[1, -1], [-1, -1]]])
    query = support.reshape(4, 2)
    start = fine_tune_predictions(product, params, support, query, num_steps=0, learning_rate=1.0)
    np.testing.assert_array_equal(start, [0, 1, 0, 1])
    end, losses = losses_of(product, params, support, query, num_steps=40, learning_rate=1.0)
    np.testing.assert_array_equal(end, [0, 0, 1, 1])
    assert losses[-1] < losses[0] / 4


def test_training_does_not_depend_on_the_size_of_embeddings():
    _, losses = losses_of(EMBED, *example(), **KEYWORDS)
    for scale in (1e-4, 1e4):
        _, same = losses_of(scaled(scale), *example(), **KEYWORDS)
        assert_same_numbers(np.array(same), np.array(losses))


def test_momentum_goes_further():
    arguments = EMBED, *example()
    _, plain = losses_of(*arguments, **KEYWORDS)
    _, heavy = losses_of(*arguments, **KEYWORDS, momentum=0.9)
    assert plain[:2] == heavy[:2]
    assert heavy[-1] < plain[-1]


def test_queries_are_only_predicted():
    params, support, query = example()
    together = fine_tune_predictions(EMBED, params, support, query, **KEYWORDS)
    order = np.random.default_rng(0).permutation(len(query))
    permuted = fine_tune_predictions(EMBED, params, support, query[order], **KEYWORDS)
    np.testing.assert_array_equal(permuted, together[order])
    alone = [
        fine_tune_predictions(EMBED, params, support, query[i : i + 1], **KEYWORDS)[0]
        for i in range(5)
    ]
    np.testing.assert_array_equal(alone, together[:5])


def test_compiles_once_over_episodes(compilations):
    def run(seed, scale):
        arguments = jax.tree.map(jnp.asarray, example(seed))
        _, losses = losses_of(scaled(scale), *arguments, num_steps=3, learning_rate=0.1 * scale)
        return losses

    first = run(0, 1.0)
    before = len(compilations)
    # Another episode, other parameters, running statistics and learning rate.
    assert run(1, 0.5) != first
    assert len(compilations) == before


def test_a_plain_function_may_close_over_what_changes():
    state = {"scale": 1.0}
    arguments = example()

    def changing(params, inputs):
        return embed(1.0, params, inputs) + state["scale"] * inputs[:, 0, :1]

    _, first = losses_of(changing, *arguments, **KEYWORDS)
    state["scale"] = -3.0
    _, second = losses_of(changing, *arguments, **KEYWORDS)
    assert first != second


def test_divergence_and_inputs_that_are_not_finite_have_no_prediction():
    params, support, query = example()
    query[3, 0, 0] = np.nan
    predicted = fine_tune_predictions(EMBED, params, support, query, **KEYWORDS)
    np.testing.assert_array_equal(np.flatnonzero(predicted == -1), [3])
    linear = jax.tree_util.Partial(lambda p, x: x.reshape(len(x), -1) @ p["kernel"])
    diverged = fine_tune_predictions(
        linear, params, support, query, num_steps=10, learning_rate=1e20
    )
    np.testing.assert_array_equal(diverged, -1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": -1}, "num_steps=-1 must be at least 0"),
        ({"learning_rate": -0.1}, "learning_rate=-0.1 must be 0 or more"),
        ({"momentum": 1.0}, r"momentum=1.0 must be in \[0, 1\)"),
        ({"support_inputs": np.ones((1, 4, 2, 3), np.float32)}, "with 2 or more ways"),
        ({"query_inputs": np.ones((5, 3, 2), np.float32)}, r"query_inputs of shape \(5, 3, 2\)"),
        ({"embed_fn": lambda params, inputs: inputs}, r"embed_fn returns \(12, 2, 3\) for 12"),
        ({"embed_fn": lambda params, inputs: inputs[:1, 0]}, r"embed_fn returns \(1, 3\) for 12"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(change, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    params, support, query = example()
    arguments = {
        "embed_fn": EMBED,
        "params": params,
        "support_inputs": support,
        "query_inputs": query,
        **KEYWORDS,
        **change,
    }
    with pytest.raises(ValueError, match=message) as error:
        fine_tune_predictions(**arguments)
    assert "\n" not in str(error.value)
