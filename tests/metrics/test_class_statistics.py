"""Class statistics against a float64 oracle: batched = merged = padded, and centred."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gc_nc.metrics import (
    init_class_statistics,
    merge_class_statistics,
    update_class_statistics,
)

C, K = 5, 7


# One program instead of the many small ones of eager execution.
update_jitted = jax.jit(update_class_statistics)


def statistics(z, labels, num_classes=C, weights=None, batch=None, scatter=False):
    z, labels = np.asarray(z, np.float32), np.asarray(labels)
    stats = init_class_statistics(num_classes, z.shape[1], scatter=scatter)
    for start in range(0, len(z), batch or len(z)):
        rows = slice(start, start + (batch or len(z)))
        w = None if weights is None else weights[rows]
        stats = update_jitted(stats, z[rows], labels[rows], weights=w)
    return stats


def example(n=53, seed=0, shift=100.0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, C, n)
    z = rng.normal(size=(n, K)) + 3 * rng.normal(size=(C, K))[labels] + shift
    return z.astype(np.float32), labels, rng.uniform(0.1, 2, n)


def oracle(z, labels, weights):
    """counts, means, variances, scatter in float64."""
    z = z.astype(np.float64)
    counts, means, variances, scatter = [], [], [], np.zeros((z.shape[1],) * 2)
    for c in range(C):
        rows, w = z[labels == c], weights[labels == c]
        mean = np.average(rows, axis=0, weights=w)
        deviations = rows - mean
        counts.append(w.sum())
        means.append(mean)
        variances.append(np.average((deviations**2).sum(1), weights=w))
        scatter += (w[:, None] * deviations).T @ deviations
    return np.array(counts), np.array(means), np.array(variances), scatter


def check(stats, z, labels, weights, rtol=1e-5):
    counts, means, variances, scatter = oracle(z, labels, weights)
    np.testing.assert_allclose(stats.counts, counts, rtol=rtol)
    # Relative to the spread too: a mean may come close to 0.
    np.testing.assert_allclose(stats.means, means, rtol=rtol, atol=rtol)
    np.testing.assert_allclose(stats.variances, variances, rtol=rtol)
    if stats.scatter is not None:
        np.testing.assert_allclose(stats.scatter, scatter, rtol=rtol, atol=rtol * scatter.max())


@pytest.mark.parametrize("batch", [None, 1, 10, 53])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_any_batching_equals_a_float64_oracle(batch, weighted, shift):
    z, labels, weights = example(shift=shift)
    stats = statistics(z, labels, weights=weights if weighted else None, batch=batch, scatter=True)
    check(stats, z, labels, weights if weighted else np.ones(len(z)))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_any_merge_order_equals_the_oracle(order):
    z, labels, weights = example()
    # Sorted, so that parts lack classes; each part has an origin of its own.
    ranks = np.argsort(labels, kind="stable")
    z, labels, weights = z[ranks], labels[ranks], weights[ranks]
    parts = [
        statistics(z[rows], labels[rows], weights=weights[rows], scatter=True)
        for rows in (slice(0, 11), slice(11, 40), slice(40, None))
    ]
    empty = init_class_statistics(C, K, scatter=True)
    merged = empty
    for i in order:
        merged = merge_class_statistics(merged, parts[i])
    check(merge_class_statistics(merged, empty), z, labels, weights)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_padding_counts_nowhere_whatever_it_holds(wrap):
    z, labels, _ = example()
    pad = np.full((4, K), np.nan, np.float32)
    padded_labels = np.append(labels, [-1, 0, C, 99])
    weights = np.append(np.ones(len(z)), np.zeros(4))
    padded = wrap(update_class_statistics)(
        init_class_statistics(C, K), np.concatenate([z, pad]), padded_labels, weights=weights
    )
    np.testing.assert_allclose(padded.variances, statistics(z, labels).variances, rtol=1e-6)
    check(padded, z, labels, np.ones(len(z)))
    assert padded.num_out_of_range == 0


def test_a_batch_of_padding_alone_leaves_the_origin_to_the_next():
    empty = update_class_statistics(
        init_class_statistics(C, K), np.full((3, K), np.nan), np.zeros(3, int), weights=np.zeros(3)
    )
    z, labels, _ = example(shift=1e4)
    stats = update_class_statistics(empty, z, labels)
    check(stats, z, labels, np.ones(len(z)))


def test_s2_variance_of_a_small_spread_around_a_large_mean():
    z = np.repeat([[4095.0], [4097.0]], 50, axis=0)
    stats = statistics(z, np.zeros(100, int), num_classes=1, batch=30)
    np.testing.assert_allclose(stats.variances, [1.0], rtol=1e-6)


def test_s3_variance_of_equal_values_is_not_negative():
    stats = statistics(np.full((3, 1), 3000.3), np.zeros(3, int), num_classes=1, batch=1)
    assert stats.variances[0] == 0


def test_s6_classes_without_an_example_are_counted_out():
    stats = statistics([[0.0], [2.0], [10.0], [12.0]], [0, 0, 2, 2], num_classes=3)
    assert stats.num_present == 2
    np.testing.assert_array_equal(stats.present, [True, False, True])
    np.testing.assert_array_equal(stats.means[:, 0], [1, np.nan, 11])
    np.testing.assert_array_equal(stats.variances, [1, np.nan, 1])


def test_s7_labels_out_of_range():
    z, labels = np.ones((4, 1), np.float32), np.array([0, 2, 5, -1])
    stats = init_class_statistics(3, 1)
    with pytest.raises(ValueError, match=r"label 5 is outside 0..2"):
        update_class_statistics(stats, z, labels)
    under_jit = jax.jit(update_class_statistics)(stats, z, labels)
    assert under_jit.num_out_of_range == 2
    np.testing.assert_array_equal(under_jit.counts, [1, 0, 1])
    assert merge_class_statistics(under_jit, under_jit).num_out_of_range == 4


@pytest.mark.parametrize("label", [np.uint64(2**63), np.int64(2**32 + 1)])
def test_s7_64_bit_labels_do_not_wrap(label):
    stats = init_class_statistics(3, 1)
    with pytest.raises(ValueError, match=f"label {label} is outside"):
        update_class_statistics(stats, np.ones((2, 1)), np.full(2, label))


def test_the_second_centring_restores_what_the_first_rounds_off():
    # A sum of 30,000 float32 values is off by more than 1e-5 of their spread.
    z = (1000 + np.random.default_rng(0).normal(size=(30_000, 2)) * 1e-2).astype(np.float32)
    z[0] = 0  # an origin far from the rest
    labels = np.r_[0, np.ones(29_999, int)]
    stats = update_jitted(init_class_statistics(2, 2), z[:1], labels[:1])
    stats = update_jitted(stats, z[1:], labels[1:])
    np.testing.assert_allclose(stats.variances[1], z[1:].astype(float).var(0).sum(), rtol=1e-3)


@pytest.mark.parametrize("apart", [False, True])
def test_spread_does_not_cancel_about_a_far_centre(apart):
    # The first row is the centre of the others, in their batch or as the mean before it.
    z = (1000 + np.random.default_rng(0).normal(size=(2001, 2))).astype(np.float32)
    z[0] = 0
    stats = init_class_statistics(1, 2)
    for rows in (slice(0, 1), slice(1, None)) if apart else (slice(None),):
        stats = update_jitted(stats, z[rows], np.zeros(len(z[rows]), int))
    np.testing.assert_allclose(stats.variances[0], z.astype(float).var(0).sum(), rtol=1e-5)


@pytest.mark.parametrize("times", [0.8, 1.5, 3.0])
def test_spread_about_a_centre_a_few_deviations_away(times):
    # The first row is the centre of its batch: |c - mu|^2 is so many times the variance.
    z = np.random.default_rng(0).normal(size=(2048, 4)).astype(np.float32)
    z[0] = times**0.5
    stats = update_jitted(init_class_statistics(1, 4), z, np.zeros(2048, int))
    np.testing.assert_allclose(stats.variances[0], z.astype(float).var(0).sum(), rtol=5e-6)


def test_scatter_is_computed_in_full_precision():
    stats = init_class_statistics(C, K, scatter=True)
    z, labels, _ = example()
    jaxpr = str(jax.make_jaxpr(update_class_statistics)(stats, z, labels))
    assert "HIGHEST" in jaxpr
    assert "precision=None" not in jaxpr


def test_close_means_at_a_large_norm_stay_apart():
    rng = np.random.default_rng(0)
    center = rng.normal(size=64)
    center *= 1e3 / np.linalg.norm(center)
    step = rng.normal(size=64)
    step *= 1e-3 / np.linalg.norm(step)
    # float32 inputs carry their own rounding: the truth is the distance of what they hold.
    z = np.repeat(np.stack([center, center + step]), 50, axis=0).astype(np.float32)
    labels = np.repeat([0, 1], 50)
    stats = statistics(z, labels, num_classes=2, batch=7)
    truth = np.sum((z[0].astype(np.float64) - z[-1].astype(np.float64)) ** 2)
    squared = float(jnp.sum((stats.mean_offsets[0] - stats.mean_offsets[1]) ** 2))
    np.testing.assert_allclose(squared, truth, rtol=1e-2)


@pytest.mark.parametrize("batch", [None, 50])
def test_means_are_exact_past_one_float(batch):
    # float32 resolves 6e-5 at 1000. The first batch is far away.
    z = 1000 + np.random.default_rng(0).normal(size=(400, 3)).astype(np.float32) * 1e-2
    z = np.concatenate([np.zeros((1, 3)), z]).astype(np.float32)
    labels = np.r_[0, np.ones(400, int)]
    stats = update_jitted(init_class_statistics(2, 3), z[:1], labels[:1])
    for start in range(1, 401, batch or 400):
        rows = slice(start, start + (batch or 400))
        stats = update_jitted(stats, z[rows], labels[rows])
    parts = stats.origin, stats.mean_offsets[1], stats.mean_offset_residuals[1]
    means = sum(np.asarray(part, np.float64) for part in parts)
    np.testing.assert_allclose(means, z[1:].astype(np.float64).mean(0), rtol=0, atol=1e-8)


def test_counts_and_spread_go_on_past_2_to_the_24():
    one = update_jitted(init_class_statistics(1, 1), np.zeros((1, 1)), np.zeros(1, int))
    one = one._replace(squared_deviations=jnp.ones(1))
    # The next float32 after 2^25 is 2^25 + 4.
    many = one._replace(counts=jnp.full(1, 2.0**25), squared_deviations=jnp.full(1, 2.0**25))
    for _ in range(8):
        many = jax.jit(merge_class_statistics)(many, one)
    assert many.counts == 2**25 + 8
    assert many.squared_deviations == 2**25 + 8


def blocks_example(n=5000):
    """Rows for three blocks on the CPU, with padding; the oracle sees those of positive weight."""
    z, labels, weights = example(n)
    weights[::10] = 0
    padded = np.where(weights[:, None] > 0, z, np.nan).astype(np.float32)
    return padded, labels, weights, (z[weights > 0], labels[weights > 0], weights[weights > 0])


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_a_batch_of_several_blocks_equals_the_oracle(wrap):
    z, labels, weights, counted = blocks_example()
    empty = init_class_statistics(C, K, scatter=True)
    check(wrap(update_class_statistics)(empty, z, labels, weights=weights), *counted)


@pytest.mark.parametrize("num_devices", [2, 8])
def test_several_blocks_sharded(num_devices):
    z, labels, weights, counted = blocks_example()
    mesh = jax.sharding.Mesh(jax.devices()[:num_devices], ("data",))
    along = jax.sharding.PartitionSpec("data")
    arrays = jax.device_put((z, labels, weights), jax.sharding.NamedSharding(mesh, along))
    check(update_jitted(init_class_statistics(C, K), *arrays[:2], weights=arrays[2]), *counted)


def test_shards_of_several_blocks_merge_under_shard_map():
    z, labels, weights, counted = blocks_example(n=10_000)
    mesh = jax.sharding.Mesh(jax.devices()[:2], ("data",))
    along = jax.sharding.PartitionSpec("data")

    def of_shard(z, labels, weights):
        stats = update_class_statistics(init_class_statistics(C, K), z, labels, weights=weights)
        return jax.tree.map(lambda x: x[None], stats)

    parts = jax.jit(jax.shard_map(of_shard, mesh=mesh, in_specs=along, out_specs=along))(
        z, labels, weights
    )
    first, second = (jax.tree.map(lambda x, i=i: x[i], parts) for i in range(2))
    check(merge_class_statistics(first, second), *counted)


def test_gradient_and_vmap_through_several_blocks():
    z, labels, _ = example(n=5000)

    def spread(z):
        stats = update_class_statistics(init_class_statistics(C, K), z, labels)
        return jnp.sum(stats.squared_deviations)

    gradients = jax.jit(jax.vmap(jax.grad(spread)))(jnp.stack([z, 2 * z]))
    _, means, _, _ = oracle(z, labels, np.ones(len(z)))
    np.testing.assert_allclose(gradients[0], 2 * (z - means[labels]), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(gradients[1], 2 * gradients[0], rtol=1e-3, atol=1e-3)


def test_memory_follows_the_block_not_the_batch():
    num_classes, dim, batch = 1000, 2048, 20_000
    block = 4 * num_classes
    compiled = update_jitted.lower(
        jax.eval_shape(lambda: init_class_statistics(num_classes, dim, scatter=True)),
        jax.ShapeDtypeStruct((batch, dim), jnp.float32),
        jax.ShapeDtypeStruct((batch,), jnp.int32),
    ).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary <= 3 * 4 * (block * dim + num_classes * dim + dim**2)


@pytest.mark.parametrize("num_devices", [2, 8])
def test_sharded_batches_merge_to_the_same(num_devices):
    z, labels, _ = example(n=48)
    mesh = jax.sharding.Mesh(jax.devices()[:num_devices], ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    arrays = jax.device_put((z, labels), sharding)
    stats = jax.jit(update_class_statistics)(init_class_statistics(C, K), *arrays)
    check(stats, z, labels, np.ones(48))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int8])
def test_low_precision_embeddings_are_cast_up_first(dtype):
    z = jnp.asarray(np.random.default_rng(0).integers(-9, 9, (30, K)), dtype)
    labels = np.arange(30) % C
    check(
        update_class_statistics(init_class_statistics(C, K), z, labels),
        np.asarray(z, np.float32),
        labels,
        np.ones(30),
    )


def test_gradient_of_the_spread_is_the_deviation():
    z, labels, _ = example()
    gradient = jax.grad(
        lambda z: jnp.sum(
            jax.jit(update_class_statistics)(
                init_class_statistics(C, K), z, labels
            ).squared_deviations
        )
    )(z)
    _, means, _, _ = oracle(z, labels, np.ones(len(z)))
    np.testing.assert_allclose(gradient, 2 * (z - means[labels]), rtol=1e-3, atol=1e-3)


def test_vmap_over_embeddings():
    z, labels, _ = example()
    stacked = jax.jit(jax.vmap(partial(statistics_of, labels=labels)))(jnp.stack([z, 2 * z]))
    np.testing.assert_allclose(stacked[1], 4 * stacked[0], rtol=1e-5)


def statistics_of(z, labels):
    return update_class_statistics(init_class_statistics(C, K), z, labels).variances


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: init_class_statistics(0, 3), "num_classes=0"),
        (lambda: init_class_statistics(3, 0), "embedding_dim=0"),
        (
            lambda: update_class_statistics(
                init_class_statistics(2, 3), np.ones((4, 2)), np.zeros(4, int)
            ),
            r"\(B, 3\)",
        ),
        (
            lambda: update_class_statistics(
                init_class_statistics(2, 1), np.ones((4, 1)), np.ones(4)
            ),
            "labels are float",
        ),
        (
            lambda: merge_class_statistics(
                init_class_statistics(2, 1), init_class_statistics(3, 1)
            ),
            "cannot merge",
        ),
        (
            lambda: update_class_statistics(
                init_class_statistics(2, 1),
                np.ones((2, 1)),
                np.zeros(2, int),
                weights=np.array([1.0, -2.0]),
            ),
            "weight=-2",
        ),
        (
            lambda: merge_class_statistics(
                init_class_statistics(2, 1), init_class_statistics(2, 1, scatter=True)
            ),
            "with scatter and without",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
