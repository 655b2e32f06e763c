"""What only a GPU can show: TF32, the transfer guard, loops on the device."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gc_nc import metrics
from gc_nc.models import build_model, embed_fn
from gc_nc.runs import loop
from gc_nc.runs.finished_run import open_run
from tests.rounding import assert_same_numbers

pytestmark = pytest.mark.gpu


def float64_norms(weights, x):
    """|J|_F^2 of relu(relu(x A) B): J = (B masked)^T (A masked)^T."""
    a, b = (np.asarray(w, np.float64) for w in weights)
    x = np.asarray(x, np.float64)
    hidden = x @ a
    out = np.maximum(hidden, 0) @ b
    jacobians = np.einsum("dh,nh,hk,nk->nkd", a, hidden > 0, b, out > 0)
    return np.sum(jacobians**2, axis=(1, 2))


def small_network():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((60, 80), (80, 40), (16, 60))
    a, b, x = (jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))

    def embed(weights, x):
        return jax.nn.relu(jax.nn.relu(x @ weights[0]) @ weights[1])

    return jax.tree_util.Partial(embed, (a, b)), (a, b), x


@pytest.mark.parametrize("jit", [False, True])
def test_jacobians_never_see_tf32(jit):
    embed, weights, x = small_network()
    expected = float64_norms(weights, x)
    with jax.default_matmul_precision("default"):
        norms = partial(metrics.squared_jacobian_norms, chunk_size=8)
        run = jax.jit(norms, static_argnums=()) if jit else norms
        assert_same_numbers(run(embed, x), expected)
        for method in metrics.ESTIMATION_METHODS:
            estimate = metrics.estimate_geometric_complexity(
                embed, jnp.tile(x, (64, 1)), jax.random.key(1), method=method, num_probes=8
            )
            assert abs(estimate.mean - expected.mean()) < 4 * estimate.sem


def test_class_statistics_never_see_tf32():
    rng = np.random.default_rng(0)
    labels = np.arange(2000) % 5
    z = (rng.normal(size=(5, 64))[labels] + 0.1 * rng.normal(size=(2000, 64)) + 30).astype("f4")
    stats = metrics.init_class_statistics(5, 64, scatter=True)
    for part in np.split(np.arange(2000), 4):
        stats = metrics.update_class_statistics(stats, z[part], labels[part])
    exact = z.astype(np.float64)
    means = np.stack([exact[labels == c].mean(0) for c in range(5)])
    variances = ((exact - means[labels]) ** 2).sum(1).reshape(-1, 5).mean(0)
    distances = ((means[:, None] - means[None]) ** 2).sum(-1)
    cdnv = (variances[:, None] + variances[None]) / 2 / np.where(distances > 0, distances, np.inf)
    nc = cdnv[~np.eye(5, dtype=bool)].mean()
    assert_same_numbers(metrics.neural_collapse(stats), nc)
    within = (exact - means[labels]).T @ (exact - means[labels]) / 2000
    centred = means - means.mean(0)
    between = centred.T @ centred / 5
    expected = np.trace(within @ np.linalg.pinv(between, rcond=1e-6)) / 5
    np.testing.assert_allclose(metrics.nc1(stats), expected, rtol=1e-3)


def test_steps_fetch_nothing(tiny_run, monkeypatch):
    """Implicit transfers to the host are refused in plain and in penalised steps."""
    config, workdir = tiny_run
    config.evaluation.every_steps = config.log_every_steps = config.checkpoint.every_steps = 0
    config.gc_penalty.weight = 0.01
    config.gc_penalty.every_steps = 2
    config.monitor.every_steps = 0
    take = loop._Run._step
    guarded = []

    def step(self, state, number):
        # The first step of each kind compiles.
        if number < 2:
            return take(self, state, number)
        guarded.append(number)
        with jax.transfer_guard_device_to_host("disallow"):
            return take(self, state, number)

    monkeypatch.setattr(loop._Run, "_step", step)
    loop.train(config, workdir)
    assert guarded == list(range(2, 8))


def test_training_precision_changes_the_step_and_not_the_measurement(tiny_run):
    config, workdir = tiny_run
    # TF32 is for convolutions and large products.
    config.model.name, config.model.width = "vgg11", 0.25
    losses = {}
    for precision in ("default", "highest"):
        config.precision = precision
        place = workdir.with_name(precision)
        losses[precision] = loop.train(config, place)["metrics"]["train/loss"]
    assert losses["default"] != losses["highest"]
    np.testing.assert_allclose(losses["default"], losses["highest"], rtol=0.2)
    # Measured here and on the CPU: the same parameters, the same numbers.
    run = open_run(workdir.with_name("default"))
    x = jnp.asarray(run.dataset.train.images[:4] / np.float32(255))
    variables = run.variables(8)
    on_gpu = metrics.squared_jacobian_norms(embed_fn(run.model, variables), x)
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        embed = embed_fn(run.model, jax.device_put(variables, cpu))
        on_cpu = metrics.squared_jacobian_norms(embed, jax.device_put(x, cpu))
    # Eight layers, of up to 9 * 128 terms, one after another.
    assert_same_numbers(on_gpu, on_cpu, num_terms=512)


def test_memory_follows_the_chunk_and_not_the_batch():
    model = build_model("vgg11", 4, width=0.25)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))

    def temporary_bytes(batch):
        x = jax.ShapeDtypeStruct((batch, 16, 16, 3), jnp.float32)
        norms = jax.jit(
            lambda v, x: metrics.squared_jacobian_norms(embed_fn(model, v), x, chunk_size=8)
        )
        return norms.lower(variables, x).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(128) < 1.5 * temporary_bytes(16)
