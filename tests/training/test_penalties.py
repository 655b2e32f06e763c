"""The GC penalty of a run against the plain step."""

from functools import partial

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest

from gc_nc import metrics
from gc_nc.data.datasets import ImageSplit
from gc_nc.data.device_batches import Augmentation, Normalization, normalize
from gc_nc.metrics import PENALTY_METHODS, geometric_complexity_with_outputs
from gc_nc.models import MLP, VGG, embed_fn, layers
from gc_nc.runs.configuration import default_config
from gc_nc.training.penalties import GCPenalty, penalty_weight
from gc_nc.training.step import init_state, train_step, train_step_at
from tests.rounding import assert_same_numbers

KEY = jax.random.key(0)
NORMALIZATION = Normalization((0.5,), (0.25,))
PLAIN, WITH_NORM = (MLP((12, 10), 3, batch_norm=norm) for norm in (False, True))
CONVOLUTIONAL = VGG(((4,), (5,)), 3)
SPLIT = ImageSplit(
    np.random.default_rng(0).integers(0, 256, (8, 4, 4, 1), dtype=np.uint8),
    np.arange(8, dtype=np.int32) % 3,
)


@pytest.fixture(autouse=True)
def _full_precision():
    """Closed forms are held to more digits than TF32 has."""
    with jax.default_matmul_precision("highest"):
        yield


def penalised_step(model=PLAIN, penalty=None, **options):
    defaults = {
        "model": model,
        "optimizer": optax.sgd(1.0),
        "normalization": NORMALIZATION,
        "augmentation": Augmentation(),
        "penalty": penalty,
    }
    return partial(train_step_at, batch_size=8, step=partial(train_step, **(defaults | options)))


def take_step(model=PLAIN, penalty=None, weight=None, key=KEY):
    state = init_state(0, model, optax.sgd(1.0), (4, 4, 1))
    step = jax.jit(penalised_step(model, penalty))
    arguments = () if penalty is None else (key, jnp.float32(weight))
    return (state, *step(state, SPLIT, jnp.arange(8), 0, KEY, *arguments))


def gradient(before, after):
    """Of a step of plain SGD with learning rate 1."""
    return jax.tree.map(lambda p, q: p - q, before.params, after.params)


@pytest.mark.parametrize(
    ("model", "of"), [(PLAIN, "embedding"), (WITH_NORM, "embedding"), (WITH_NORM, "logits")]
)
def test_exact_penalty_is_the_measured_gc(model, of):
    state, _, measured = take_step(model, GCPenalty(of, "exact"), weight=0.5)
    place = 0 if of == "logits" else 1
    images = normalize(jnp.asarray(SPLIT.images), NORMALIZATION)
    gc = metrics.geometric_complexity(
        lambda x: model.apply(state.variables, x, train=False)[place], images
    )
    assert_same_numbers(measured["geometric_complexity"], gc)
    assert_same_numbers(measured["gc_penalty"], 0.5 * gc)
    assert_same_numbers(measured["total_loss"], measured["loss"] + measured["gc_penalty"])


@pytest.mark.parametrize(
    "model",
    [pytest.param(PLAIN, marks=pytest.mark.slow), WITH_NORM],
    ids=["plain", "batch_norm"],
)
def test_the_loss_and_its_gradient_are_those_of_the_plain_step(model):
    state, after, plain = take_step(model)
    for fraction in (1.0, 0.3):
        penalty = GCPenalty(batch_fraction=fraction)
        _, penalised, measured = take_step(model, penalty, weight=0.25)
        for name in ("loss", "accuracy"):
            assert_same_numbers(measured[name], plain[name])
        assert_same_numbers(penalised.batch_stats, after.batch_stats)
        # What is left of the gradient is the penalty's, by a way of its own.
        images = normalize(jnp.asarray(SPLIT.images), NORMALIZATION)
        part = images[: int(np.ceil(8 * fraction))]

        def term(params, part=part, penalty=penalty):
            embed = embed_fn(model, {"params": params, "batch_stats": state.batch_stats})

            def network(x):
                return embed(x), None

            key = jax.random.fold_in(KEY, 0)
            return 0.25 * geometric_complexity_with_outputs(network, part, key)[0]

        expected = jax.tree.map(
            jnp.add, gradient(state, after), jax.jit(jax.grad(term))(state.params)
        )
        # Differences of parameters that are near 1 hold the gradient to 1e-7 of those.
        jax.tree.map(
            partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5),
            gradient(state, penalised),
            expected,
        )


def test_quarters_and_keys_give_different_estimates_of_one_mean():
    estimate = jax.jit(penalised_step(PLAIN, GCPenalty(batch_fraction=0.5)))
    state = init_state(0, PLAIN, optax.sgd(1.0), (4, 4, 1))
    found = set()
    for i in range(3):
        _, measured = estimate(state, SPLIT, jnp.arange(8), 0, KEY, jax.random.key(i), 1.0)
        found.add(float(measured["geometric_complexity"]))
        later = state.replace(step=state.step + 1)
        _, measured = estimate(later, SPLIT, jnp.arange(8), 0, KEY, jax.random.key(i), 1.0)
        found.add(float(measured["geometric_complexity"]))
    assert len(found) == 6


def test_half_a_batch_has_the_whole_batch_s_expected_penalty():
    penalty = GCPenalty(method="exact", batch_fraction=0.5)
    step = jax.jit(penalised_step(PLAIN, penalty))
    state = init_state(0, PLAIN, optax.sgd(1.0), (4, 4, 1))
    halves = [
        step(state, SPLIT, jnp.roll(jnp.arange(8), shift), 0, KEY, KEY, 1.0)[1] for shift in (0, 4)
    ]
    _, _, whole = take_step(PLAIN, GCPenalty(method="exact"), weight=1.0)
    mean = np.mean([half["gc_penalty"] for half in halves])
    assert_same_numbers(mean, whole["gc_penalty"])
    assert halves[0]["gc_penalty"] != halves[1]["gc_penalty"]


def test_no_penalty_compiles_to_no_term():
    state = init_state(0, CONVOLUTIONAL, optax.sgd(1.0), (4, 4, 1))
    arguments = (state, SPLIT, jnp.arange(8), 0, KEY)

    def by_hand(params):
        def loss(params):
            images = normalize(jnp.asarray(SPLIT.images), NORMALIZATION)
            logits, _ = CONVOLUTIONAL.apply({"params": params}, images, train=True)
            labels = jnp.asarray(SPLIT.labels)
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

        return jax.tree.map(lambda p, g: p - g, params, jax.grad(loss)(params))

    plain = jax.jit(penalised_step(CONVOLUTIONAL))
    flops = plain.lower(*arguments).compile().cost_analysis()["flops"]
    least = jax.jit(by_hand).lower(state.params).compile().cost_analysis()["flops"]
    # Room for gathering the batch and for accuracy.
    assert flops < 1.1 * least
    penalised = jax.jit(penalised_step(CONVOLUTIONAL, GCPenalty()))
    assert penalised.lower(*arguments, KEY, 1.0).compile().cost_analysis()["flops"] > 1.5 * flops


def convolution_places(jaxpr, inside=False):
    """For each convolution, whether it is inside a loop or a conditional."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "conv_general_dilated":
            yield inside
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from convolution_places(inner, inside or name in ("scan", "while", "cond"))


def test_no_convolution_inside_a_loop_or_conditional():
    state = init_state(0, CONVOLUTIONAL, optax.sgd(1.0), (4, 4, 1))
    for penalty in (None, *(GCPenalty("logits", method, 2, 0.5) for method in PENALTY_METHODS)):
        arguments = () if penalty is None else (KEY, 1.0)
        step = penalised_step(CONVOLUTIONAL, penalty)
        program = jax.make_jaxpr(step)(state, SPLIT, jnp.arange(8), 0, KEY, *arguments)
        places = set(convolution_places(program.jaxpr))
        assert places == {False}, penalty
    looped = jax.make_jaxpr(
        lambda x: jax.lax.map(lambda y: layers.ConvNorm(2).init(KEY, y, train=False), x)
    )(jnp.ones((1, 1, 4, 4, 1)))
    assert True in convolution_places(looped.jaxpr)


def test_weight_of_each_step():
    config = default_config()
    config.num_steps = 100
    assert [penalty_weight(config, step) for step in (0, 1, 99)] == [0, 0, 0]
    config.gc_penalty.weight = 0.5
    assert [penalty_weight(config, step) for step in (0, 1, 99)] == [0.5] * 3
    config.gc_penalty.every_steps = 4
    weights = [penalty_weight(config, step) for step in range(100)]
    # Logs are of the last of so many steps.
    assert weights[:8] == [0, 0, 0, 2.0, 0, 0, 0, 2.0]
    np.testing.assert_allclose(np.mean(weights), 0.5)
    config.gc_penalty.every_steps = 1
    config.gc_penalty.boundaries = (0.2, 0.6)
    config.gc_penalty.factors = (0.0, 2.0)
    for step, expected in {0: 0, 20: 0, 21: 0.025, 40: 0.5, 60: 1.0, 99: 1.0}.items():
        np.testing.assert_allclose(penalty_weight(config, step), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"of": "logit"}, "of='logit' is not one of: embedding, logits"),
        ({"method": "rows"}, "method='rows' is not one of: output_probes"),
        ({"num_probes": 1.5}, "num_probes=1.5 must be a whole number"),
        ({"batch_fraction": 2.5}, r"batch_fraction=2.5 must be in \(0, 1\]"),
        ({"batch_fraction": 0}, r"batch_fraction=0 must be in \(0, 1\]"),
    ],
)
def test_a_penalty_that_cannot_be(fields, message, monkeypatch):
    # Without the tests' type checks, which would come first.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        GCPenalty(**fields)
