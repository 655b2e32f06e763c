"""The public API under JAX's settings that a user may have: the same numbers, in float32."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gc_nc import metrics, transfer
from tests.metrics.metric_table import METRICS, arguments
from tests.rounding import NUM_TERMS, assert_same_numbers

SETTINGS = {
    "x64": lambda: jax.enable_x64(True),
    "debug_nans": lambda: jax.debug_nans(True),
    "strict_promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "explicit_mesh": contextlib.nullcontext,
    "disable_jit": jax.disable_jit,
}
#: Arguments of one row an example, the only ones that somebody would shard.
SHARDED = {"inputs", "embeddings", "norms", "logits", "labels", "weights"}
LABELS = np.arange(24) % 3


def episodes_of(labels=LABELS):
    return transfer.sample_episodes(
        jax.random.key(0), labels, 3, num_ways=2, num_shots=2, num_queries=2
    )


def episode_data():
    rng = np.random.default_rng(0)
    support = rng.normal(size=(2, 3, 5)) + np.array([0.0, 2.0])[:, None, None]
    return {
        "support_embeddings": support,
        "query_embeddings": rng.normal(size=(8, 5)),
        "embeddings": rng.normal(size=(24, 5)) + LABELS[:, None],
        "inputs": rng.normal(size=(96, 4)),
        "cdnv": np.where(np.eye(3) > 0, np.nan, rng.uniform(size=(3, 3))),
    }


def tuned(support_embeddings, query_embeddings):
    weight = {"w": np.eye(5, dtype=np.float32)}
    return transfer.fine_tune_predictions(
        jax.tree_util.Partial(lambda params, x: jnp.tanh(x @ params["w"])),
        weight,
        support_embeddings,
        query_embeddings,
        num_steps=1,
        learning_rate=0.1,
        momentum=0.5,
    )


TRANSFER = {
    "nearest_mean_predictions": transfer.nearest_mean_predictions,
    "cosine_predictions": transfer.cosine_predictions,
    "ridge_predictions": transfer.ridge_predictions,
    "logistic_regression_predictions": transfer.logistic_regression_predictions,
    "k_nearest_predictions": lambda embeddings: transfer.k_nearest_predictions(
        embeddings, LABELS, embeddings, num_neighbors=3
    ),
    "linear_probe_predictions": lambda embeddings: transfer.linear_probe_predictions(
        embeddings, LABELS, embeddings
    ),
    "fine_tune_predictions": tuned,
    "transform_features": lambda embeddings: transfer.transform_features(
        embeddings, center=np.ones(5), l2=True
    ),
    "episode_accuracies": lambda embeddings: transfer.episode_accuracies(
        embeddings, LABELS, episodes_of(), "ridge"
    ),
    "episode_neural_collapse": lambda cdnv: transfer.episode_neural_collapse(
        cdnv, episodes_of().classes
    ),
    "sample_episodes": episodes_of,
    "mean_confidence_interval": lambda: transfer.mean_confidence_interval([0.25, 0.5]),
}
#: What is neither a metric that can be traced nor of transfer.
OTHERS = {
    "geometric_complexity_to_error": lambda inputs: metrics.geometric_complexity_to_error(
        jax.tree_util.Partial(lambda x: jnp.tanh(x @ jnp.ones((4, 6), jnp.float32))),
        inputs,
        jax.random.key(0),
        labels=np.arange(96) % 3,
        relative_error=0.3,
        num_pilot=64,
    ),
}
TRANSFER_ARGUMENTS = {
    "geometric_complexity_to_error": ("inputs",),
    "transform_features": ("embeddings",),
    "k_nearest_predictions": ("embeddings",),
    "linear_probe_predictions": ("embeddings",),
    "episode_accuracies": ("embeddings",),
    "episode_neural_collapse": ("cdnv",),
    "sample_episodes": (),
    "mean_confidence_interval": (),
}
#: Those that are tried each time; the others are slow: each setting compiles all programs anew.
TYPICAL = {
    "x64": ("nc1",),
    "debug_nans": ("cdnv_matrix",),
    "strict_promotion": ("geometric_complexity",),
    "explicit_mesh": ("geometric_complexity",),
    "disable_jit": ("neural_collapse",),
}


def call_of(name):
    return METRICS[name].call if name in METRICS else (TRANSFER | OTHERS)[name]


def arguments_of(name):
    return {key: arguments()[key] for key in METRICS[name].names}


def given_to(name):
    """In JAX's widest floating point: 64 bits where they are enabled."""
    if name in METRICS:
        return arguments_of(name)
    names = TRANSFER_ARGUMENTS.get(name, ("support_embeddings", "query_embeddings"))
    with jax.debug_nans(False):
        return {key: jnp.asarray(value) for key, value in episode_data().items() if key in names}


@functools.cache
def by_default(name):
    return call_of(name)(**given_to(name))


def cases():
    for setting in SETTINGS:
        for name in [*METRICS, *TRANSFER, *OTHERS]:
            names = METRICS[name].names if name in METRICS else SHARDED
            if setting == "explicit_mesh" and SHARDED.isdisjoint(names):
                continue
            marks = () if name in TYPICAL[setting] else pytest.mark.slow
            yield pytest.param(setting, name, marks=marks, id=f"{setting}-{name}")


def sharded(arguments):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    along = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    rows = {*SHARDED, "query_embeddings"}
    return {key: jax.device_put(x, along) if key in rows else x for key, x in arguments.items()}


@pytest.mark.parametrize(("setting", "name"), [*cases()])
def test_every_setting_gives_the_same(setting, name):
    expected = by_default(name)
    with SETTINGS[setting]():
        arguments = given_to(name)
        if setting == "explicit_mesh":
            arguments = sharded(arguments)
        value = call_of(name)(**arguments)
    for leaf in jax.tree.leaves(value):
        if isinstance(leaf, jax.Array):
            assert leaf.dtype in (np.float32, np.int32)
    assert_same_numbers(value, expected, 2 * NUM_TERMS)


@pytest.mark.parametrize("name", METRICS)
def test_every_program_can_be_traced(name):
    """Inside the caller's own jit, where other code runs; a mixed dtype shows without compiling."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        arguments = {key: jax.tree.map(as_float32, x) for key, x in arguments_of(name).items()}
        shapes = jax.eval_shape(METRICS[name].call, **arguments)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(shapes)}
    assert dtypes <= {np.dtype(np.float32), np.dtype(np.int32)}


def as_float32(x):
    """What a network would not mix with the metrics' own float32; labels keep their 64 bits."""
    return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x


def test_the_transfer_functions_are_all_here():
    others = {"sample_episode", "HEADS", "Episode"}
    assert {*transfer.__all__} - others == {*TRANSFER}


@pytest.mark.parametrize(
    "method", ["output_probes", pytest.param("input_dims", marks=pytest.mark.slow)]
)
def test_an_explicit_mesh_in_jit_and_as_the_context(method):
    def measure(x):
        return metrics.estimate_geometric_complexity(
            jax.tree_util.Partial(jnp.sin), x, jax.random.key(0), method=method
        ).mean

    x = jnp.linspace(0, 1, 48).reshape(16, 3)
    arguments = sharded({"inputs": x})
    expected = measure(x)
    assert_same_numbers(jax.jit(measure)(arguments["inputs"]), expected)
    with jax.set_mesh(arguments["inputs"].sharding.mesh):
        assert_same_numbers(measure(arguments["inputs"]), expected)


def test_e1_labels_and_classes_of_64_bits():
    with jax.enable_x64(True):
        stats = metrics.init_class_statistics(3, 2)
        z = jnp.array([[0.0, 0], [5, 0], [0, 5]])
        stats = metrics.update_class_statistics(stats, z, jnp.arange(3))
        nearest = metrics.nearest_class_mean(z, stats)
        assert nearest.dtype == jnp.int32
        np.testing.assert_array_equal(nearest, [0, 1, 2])
        assert metrics.nc4(jnp.arange(3), z, stats) == 0


@pytest.mark.parametrize("setting", ["debug_nans", "strict_promotion", "x64"])
def test_e3_and_e5_two_classes(setting):
    with SETTINGS[setting]():
        z = np.array([[0.0, 0], [2, 0], [10, 0], [12, 0]])
        stats = metrics.init_class_statistics(2, 2)
        stats = metrics.update_class_statistics(stats, z, np.array([0, 0, 1, 1]))
        assert_same_numbers(metrics.neural_collapse(stats), 0.01)


def test_no_nan_is_made_without_jit():
    stats = metrics.init_class_statistics(3, 2)
    stats = metrics.update_class_statistics(stats, np.eye(3)[:, :2], np.arange(3))
    expected = metrics.cdnv_matrix(stats)
    with jax.disable_jit(), jax.debug_nans(True):
        assert_same_numbers(metrics.cdnv_matrix(stats), expected)


@pytest.mark.slow
def test_no_nan_is_made_of_rows_that_do_not_count_or_classes_without_examples():
    with jax.debug_nans(True):
        z = np.array([[0.0], [1], [4], [5], [np.nan]])
        weights = np.array([1.0, 1, 1, 1, 0])
        stats = metrics.init_class_statistics(4, 1, scatter=True)
        labels = np.array([0, 0, 2, 2, 1])
        stats = metrics.update_class_statistics(stats, z, labels, weights=weights)
        values = [metrics.neural_collapse(stats), metrics.nc1(stats), *metrics.nc2(stats)]
        assert np.isfinite(values).all()
        np.testing.assert_array_equal(np.isnan(stats.variances), [False, True, False, True])
        gc = metrics.geometric_complexity(jnp.sin, z, weights=weights)
        assert_same_numbers(gc, np.mean(np.cos(z[:4]) ** 2))
        estimate = metrics.estimate_geometric_complexity(jnp.sin, z[:1], jax.random.key(0))
        assert np.isnan(estimate.sem)
        class_gc = metrics.class_geometric_complexity(np.ones(2), np.zeros(2, int), 2)
        np.testing.assert_array_equal(class_gc, [1, np.nan])


@pytest.mark.slow
def test_gradients_make_no_nan():
    def collapse(z):
        stats = metrics.init_class_statistics(3, 2, scatter=True)
        stats = metrics.update_class_statistics(stats, z, np.array([0, 0, 2, 2]))
        nc2 = metrics.nc2(stats)
        return metrics.neural_collapse(stats) + metrics.nc1(stats) + sum(nc2)

    z = jnp.array([[0.0, 1], [2, 0], [10, 3], [12, 1]])
    expected = jax.grad(collapse)(z)
    with jax.debug_nans(True):
        assert_same_numbers(jax.grad(collapse)(z), expected)


@pytest.mark.slow
def test_e9_one_weight_near_the_largest_float():
    weight = np.array([[1.0, 2], [3, 4]])
    x, weights = np.ones((3, 2)), np.array([1e38, 0, 0])
    embed = jax.tree_util.Partial(lambda w, x: x @ w, weight.astype(np.float32))
    for w in (weights, weights[::-1].copy(), np.full(3, 1e38)):
        assert_same_numbers(metrics.geometric_complexity(embed, x, weights=w), 30.0)
        estimate = metrics.estimate_geometric_complexity(
            embed, x, jax.random.key(0), method="output_dims", num_probes=2, weights=w
        )
        assert_same_numbers(estimate.mean, 30.0)
        labels = np.zeros(3, int)
        gc = metrics.class_geometric_complexity(np.full(3, 30.0), labels, 1, weights=w)
        assert_same_numbers(gc, np.array([30.0]))
        stats = metrics.init_class_statistics(2, 1)
        stats = metrics.update_class_statistics(stats, np.array([[0.0], [1]]), np.arange(2))
        assert metrics.nc4(np.array([1, 1, 1]), np.zeros((3, 1)), stats, weights=w) == 1


@pytest.mark.slow
def test_e9_float64_that_rounding_would_spoil_is_warned_of():
    rng = np.random.default_rng(0)
    z = np.repeat([1e8, 1e8 + 10], 50)[:, None] + rng.normal(size=(100, 1))
    labels = np.repeat([0, 1], 50)
    stats = metrics.init_class_statistics(2, 1)
    with pytest.warns(RuntimeWarning, match="embeddings are float64 .* subtract their mean"):
        metrics.update_class_statistics(stats, z, labels)
    with pytest.warns(RuntimeWarning, match="inputs are float64"):
        metrics.squared_jacobian_norms(jnp.sin, z)
    with pytest.warns(RuntimeWarning, match="support_embeddings are float64"):
        transfer.nearest_mean_predictions(z.reshape(2, 50, 1), z - 1e8)
    with jax.enable_x64(True), pytest.warns(RuntimeWarning, match="embeddings are float64"):
        metrics.update_class_statistics(stats, jnp.asarray(z), labels)
    # Warnings are errors here: nothing is said of what float32 holds.
    stats = metrics.update_class_statistics(stats, z - 1e8, labels)
    for harmless in (np.full((9, 1), 0.1), 255 * rng.uniform(size=(9, 1)), np.array([[np.nan]])):
        metrics.update_class_statistics(stats, harmless, np.zeros(len(harmless), int))


@jax.custom_vjp
def without_forward_mode(x):
    return jnp.sin(x)


without_forward_mode.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))


def wide(x):
    return jnp.concatenate([without_forward_mode(x), 2 * x[:, :1]], axis=1)


def test_e4_a_function_without_forward_mode_is_taken_by_rows():
    x = np.array([[0.1, 0.2], [0.3, 0.4]])
    expected = np.sum(np.cos(x) ** 2, axis=1) + 4
    for embed in (wide, jax.tree_util.Partial(jax.jit(wide)), jax.checkpoint(wide)):
        np.testing.assert_allclose(metrics.squared_jacobian_norms(embed, x), expected, rtol=1e-5)
    norms = jax.jit(lambda x: metrics.squared_jacobian_norms(wide, x))(x)
    np.testing.assert_allclose(norms, expected, rtol=1e-5)
    relu = metrics.squared_jacobian_norms(
        lambda x: jax.nn.relu(wide(x)), x, skip_inactive=True, most_active=3
    )
    np.testing.assert_allclose(relu, expected, rtol=1e-5)


@pytest.mark.parametrize("method", ["input_probes", "input_dims", "deflated"])
def test_e4_estimates_that_need_forward_mode_say_so(method):
    with pytest.raises(ValueError, match=f"method='{method}' needs .*custom_vjp") as error:
        metrics.estimate_squared_jacobian_norms(
            wide,
            np.ones((2, 2)),
            jax.random.key(0),
            method=method,
            num_probes=3 if method == "deflated" else 1,
        )
    assert "\n" not in str(error.value)
