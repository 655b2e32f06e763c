"""The loss, its L2 term, the optimizer and one step against NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gc_nc.data.datasets import ImageSplit
from gc_nc.data.device_batches import Augmentation, Normalization
from gc_nc.models import MLP
from gc_nc.runs.configuration import default_config
from gc_nc.training.step import (
    init_state,
    l2_penalty,
    make_optimizer,
    optimizer_spec,
    train_step,
    train_step_at,
)
from tests.rounding import assert_same_numbers

MODEL = MLP((3,), 2, batch_norm=True)
SPLIT = ImageSplit(
    np.random.default_rng(0).integers(0, 256, (6, 4, 4, 1), dtype=np.uint8),
    np.array([0, 1, 0, 1, 1, 0], np.int32),
)
ORDER = jnp.array([5, 2, 0, 1, 4, 3])


def step_fn(batch_size=2, **options):
    defaults = {
        "model": MODEL,
        "optimizer": optax.sgd(0.1),
        "normalization": Normalization((0.5,), (0.25,)),
        "augmentation": Augmentation(),
        "l2": None,
    }
    return partial(
        train_step_at, batch_size=batch_size, step=partial(train_step, **(defaults | options))
    )


def state_of(optimizer=None, seed=0):
    return init_state(seed, MODEL, optimizer or optax.sgd(0.1), (4, 4, 1))


def test_one_step_is_sgd_on_the_batch_at_the_offset():
    state = state_of()
    images = (SPLIT.images[[0, 1]] / 255.0 - 0.5) / 0.25
    labels = SPLIT.labels[[0, 1]]

    def loss(params):
        (logits, _), _ = MODEL.apply(
            {"params": params, "batch_stats": state.batch_stats},
            images.astype(np.float32),
            train=True,
            mutable=["batch_stats"],
        )
        squares = sum(jnp.sum(p**2) for p in jax.tree.leaves(params))
        nll = -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(2), labels])
        return nll + 0.5 * 0.3 * squares, (nll, squares)

    gradients, (nll, squares) = jax.jit(jax.grad(loss, has_aux=True))(state.params)
    new, metrics = jax.jit(step_fn(l2=0.3))(state, SPLIT, ORDER, 2, jax.random.key(0))
    expected = jax.tree.map(lambda p, g: np.asarray(p) - 0.1 * g, state.params, gradients)
    assert_same_numbers(new.params, expected)
    assert new.step == 1
    assert_same_numbers(metrics["loss"], nll)
    assert_same_numbers(metrics["l2_penalty"], 0.15 * squares)
    assert_same_numbers(metrics["total_loss"], nll + 0.15 * squares)
    assert not np.array_equal(*(s.batch_stats["stage1_norm"]["mean"] for s in (state, new)))


def test_l2_weight_0_is_no_term_at_all():
    state, key = state_of(), jax.random.key(0)
    programs = [
        jax.jit(step_fn(**options)).lower(state, SPLIT, ORDER, 0, key).as_text()
        for options in ({"l2": None}, {})
    ]
    assert programs[0] == programs[1]
    with_penalty = jax.jit(step_fn(l2=1e-3)).lower(state, SPLIT, ORDER, 0, key).as_text()
    assert len(with_penalty) > len(programs[0])


def test_l2_penalty_has_the_parameters_as_gradient():
    params = {"a": jnp.array([1.0, -2.0]), "b": {"c": jnp.array([[3.0]])}}
    assert l2_penalty(params) == 7
    assert jax.tree.all(
        jax.tree.map(lambda p, g: bool((p == g).all()), params, jax.grad(l2_penalty)(params))
    )


def test_augmentation_changes_the_batch_with_the_step_and_the_key():
    step = jax.jit(step_fn(augmentation=Augmentation(2, True), batch_size=6))
    state, key = state_of(), jax.random.key(0)
    losses = [
        float(step(s, SPLIT, ORDER, 0, k)[1]["loss"])
        for s, k in (
            (state, key),
            (state, key),
            (state.replace(step=state.step + 1), key),
            (state, jax.random.key(1)),
        )
    ]
    assert losses[0] == losses[1]
    assert len(set(losses)) == 3


def test_init_is_a_function_of_the_seed():
    a, b, c = (jax.tree.leaves(state_of(seed=seed).params) for seed in (0, 0, 1))
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert not all(np.array_equal(x, y) for x, y in zip(a, c, strict=True))


@pytest.mark.parametrize(
    ("name", "warmup", "expected"),
    [
        ("constant", 0, {0: 1.0, 50: 1.0, 99: 1.0}),
        ("constant", 10, {0: 0.0, 5: 0.5, 10: 1.0, 99: 1.0}),
        ("step", 0, {49: 1.0, 51: 0.1, 74: 0.1, 76: 0.01}),
        ("step", 10, {9: 0.9, 49: 1.0, 51: 0.1, 76: 0.01}),
        ("cosine", 0, {0: 1.0, 50: 0.5, 100: 0.0}),
        ("cosine", 20, {10: 0.5, 60: 0.5, 100: 0.0}),
    ],
)
def test_schedules(name, warmup, expected):
    config = default_config()
    config.num_steps = 100
    config.optimizer.learning_rate = 1.0
    config.schedule.name = name
    config.schedule.warmup_steps = warmup
    schedule = optimizer_spec(config).learning_rate(1.0)
    for step, rate in expected.items():
        np.testing.assert_allclose(schedule(step), rate, atol=1e-6)


def test_momentum():
    config = default_config()
    config.optimizer.learning_rate = 1.0
    config.optimizer.momentum = 0.5
    optimizer = make_optimizer(config)
    params = jnp.zeros(())
    opt_state = optimizer.init(params)
    for expected in (-1.0, -1.5):
        update, opt_state = optimizer.update(jnp.ones(()), opt_state, params)
        assert update == expected


def decaying(decay, momentum=0.0):
    config = default_config()
    config.num_steps = 4
    config.optimizer.learning_rate = 0.5
    config.optimizer.momentum = momentum
    config.optimizer.decoupled_decay = decay
    config.schedule.name = "step"
    config.schedule.boundaries = (0.5,)
    return make_optimizer(config)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_decoupled_decay_is_outside_of_gradient_and_momentum(momentum):
    optimizer = decaying(0.3, momentum)
    params = {"w": jnp.array([1.0, -2.0]), "b": jnp.array(3.0)}
    state = optimizer.init(params)
    gradients = np.random.default_rng(0).normal(size=(4, 3))
    w, m = np.array([1.0, -2.0, 3.0]), np.zeros(3)
    for rate, g in zip((0.5, 0.5, 0.05, 0.05), gradients, strict=True):
        m = momentum * m + g
        w = w - rate * m - rate * 0.3 * w
        given = {"w": jnp.asarray(g[:2], jnp.float32), "b": jnp.float32(g[2])}
        updates, state = optimizer.update(given, state, params)
        params = optax.apply_updates(params, updates)
        assert_same_numbers(np.array([*params["w"], params["b"]]), w)


def test_without_momentum_decoupled_decay_is_l2():
    states = []
    for l2, decay in ((0.3, 0.0), (0.0, 0.3)):
        optimizer = decaying(decay)
        step = jax.jit(step_fn(l2=l2, optimizer=optimizer))
        state = state_of(optimizer)
        for i in range(3):
            state, _ = step(state, SPLIT, ORDER, 2 * i, jax.random.key(0))
        states.append(state.params)
    assert_same_numbers(*states)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_decay_0_is_plain_sgd_whose_checkpoints_it_reads(momentum):
    params = {"w": jnp.array([1.0, -2.0])}
    schedule = optax.piecewise_constant_schedule(np.float32(0.5), {2: 0.1})
    programs = [
        jax.jit(optimizer.update).lower(params, optimizer.init(params), params).as_text()
        for optimizer in (decaying(0.0, momentum), optax.sgd(schedule, momentum or None))
    ]
    assert programs[0] == programs[1]
    plain, here = (
        jax.tree.structure(optimizer.init(params))
        for optimizer in (optax.sgd(schedule, momentum or None), decaying(0.0, momentum))
    )
    assert plain == here
