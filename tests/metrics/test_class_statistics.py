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
from tests.metrics import padded_statistics
from tests.metrics.metric_table import C, K, jit
from tests.metrics.padded_statistics import merge, update
from tests.rounding import assert_same_numbers, rounding

statistics = partial(padded_statistics.statistics, scatter=False)


def example(n=50, seed=0, shift=100.0):
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


def check(stats, z, labels, weights):
    counts, means, variances, scatter = oracle(z, labels, weights)
    assert_same_numbers(stats.counts, counts)
    # Relative to the spread and not to the norm: that is what centring is for.
    spread = rounding() * np.sqrt(variances.max())
    np.testing.assert_allclose(stats.means, means, rtol=1e-6, atol=spread)
    assert_same_numbers(stats.variances, variances)
    if stats.scatter is not None:
        assert_same_numbers(stats.scatter, scatter)


@pytest.mark.parametrize("batch", [50, 1, 10])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_any_batching_equals_a_float64_oracle(batch, weighted, shift):
    z, labels, weights = example(shift=shift)
    weights = weights if weighted else np.ones(len(z))
    stats = init_class_statistics(C, K, scatter=True)
    for start in range(0, len(z), batch):
        rows = slice(start, start + batch)
        # Without weights in one case only: that is a program more.
        given = {} if batch == len(z) and not weighted else {"weights": weights[rows]}
        stats = update(stats, z[rows], labels[rows], **given)
    check(stats, z, labels, weights)


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
        merged = merge(merged, parts[i])
    check(merge(merged, empty), z, labels, weights)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_padding_counts_nowhere_whatever_it_holds(wrap):
    z, labels, _ = example(46)
    pad = np.full((4, K), np.nan, np.float32)
    padded_labels = np.append(labels, [-1, 0, C, 99])
    weights = np.append(np.ones(len(z)), np.zeros(4))
    padded = wrap(update_class_statistics)(
        init_class_statistics(C, K, scatter=True),
        np.concatenate([z, pad]),
        padded_labels,
        weights=weights,
    )
    check(padded, z, labels, np.ones(len(z)))
    assert padded.num_out_of_range == 0


def test_a_batch_of_padding_alone_leaves_the_origin_to_the_next():
    empty = statistics(np.full((3, K), np.nan), np.zeros(3, int), weights=np.zeros(3))
    z, labels, _ = example(shift=1e4)
    check(statistics(z, labels, so_far=empty), z, labels, np.ones(len(z)))


def test_s2_variance_of_a_small_spread_around_a_large_mean():
    z = np.repeat([[4095.0], [4097.0]], 50, axis=0)
    stats = statistics(z, np.zeros(100, int), batch=30)
    np.testing.assert_allclose(stats.variances[0], 1.0, rtol=1e-6)


def test_s3_variance_of_equal_values_is_not_negative():
    stats = statistics(np.full((3, 1), 3000.3), np.zeros(3, int), batch=1)
    assert stats.variances[0] == 0


def test_s6_classes_without_an_example_are_counted_out():
    stats = statistics([[0.0], [2.0], [10.0], [12.0]], [0, 0, 2, 2])
    assert stats.num_present == 2
    np.testing.assert_array_equal(stats.present, [True, False, True, False, False])
    np.testing.assert_array_equal(stats.means[:, 0], [1, np.nan, 11, np.nan, np.nan])
    np.testing.assert_array_equal(stats.variances, [1, np.nan, 1, np.nan, np.nan])


def test_s7_labels_out_of_range():
    z, labels = np.ones((4, 1), np.float32), np.array([0, 2, 5, -1])
    stats = init_class_statistics(3, 1)
    with pytest.raises(ValueError, match=r"label 5 is outside 0..2"):
        update_class_statistics(stats, z, labels)
    under_jit = jit(update_class_statistics)(stats, z, labels)
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
    z = (1000 + np.random.default_rng(0).normal(size=(30_000, K)) * 1e-2).astype(np.float32)
    # An origin far from the rest.
    stats = statistics(np.zeros((1, K)), [0])
    stats = statistics(z, np.ones(30_000, int), so_far=stats)
    np.testing.assert_allclose(stats.variances[1], z.astype(float).var(0).sum(), rtol=1e-3)


@pytest.mark.parametrize("apart", [False, True])
def test_spread_does_not_cancel_about_a_far_centre(apart):
    # The first row is the centre of the others, in their batch or as the mean before it.
    z = (1000 + np.random.default_rng(0).normal(size=(2001, 2))).astype(np.float32)
    z[0] = 0
    labels = np.zeros(len(z), int)
    so_far = statistics(z[:1], labels[:1]) if apart else None
    rows = slice(1 if apart else 0, None)
    stats = statistics(z[rows], labels[rows], rows=2048, so_far=so_far)
    np.testing.assert_allclose(stats.variances[0], z.astype(float).var(0).sum(), rtol=1e-5)


@pytest.mark.parametrize("times", [0.8, 3.0, 100.0])
def test_spread_about_a_centre_a_few_deviations_away(times):
    # The first row is the centre of its batch: |c - mu|^2 is so many times the variance, and the
    # difference of the two sums of squares at 100 times is off by 1e-4.
    z = np.random.default_rng(1).normal(size=(2048, 4)).astype(np.float32)
    z[0] = times**0.5
    stats = statistics(z, np.zeros(2048, int))
    np.testing.assert_allclose(stats.variances[0], z.astype(float).var(0).sum(), rtol=1e-5)


def test_scatter_is_computed_in_full_precision():
    stats = init_class_statistics(C, K, scatter=True)
    z, labels, _ = example()
    jaxpr = str(jax.make_jaxpr(update_class_statistics)(stats, z, labels))
    assert "HIGHEST" in jaxpr
    assert "precision=None" not in jaxpr


def test_close_means_at_a_large_norm_stay_apart():
    rng = np.random.default_rng(0)
    center = rng.normal(size=K)
    center *= 1e3 / np.linalg.norm(center)
    step = rng.normal(size=K)
    step *= 1e-3 / np.linalg.norm(step)
    # float32 inputs carry their own rounding: the truth is the distance of what they hold.
    z = np.repeat(np.stack([center, center + step]), 50, axis=0).astype(np.float32)
    labels = np.repeat([0, 1], 50)
    stats = statistics(z, labels, batch=7)
    truth = np.sum((z[0].astype(np.float64) - z[-1].astype(np.float64)) ** 2)
    squared = float(jnp.sum((stats.mean_offsets[0] - stats.mean_offsets[1]) ** 2))
    np.testing.assert_allclose(squared, truth, rtol=1e-2)


@pytest.mark.parametrize("batch", [None, 50])
def test_means_are_exact_past_one_float(batch):
    # float32 resolves 6e-5 at 1000. The first batch is far away.
    z = 1000 + np.random.default_rng(0).normal(size=(400, K)).astype(np.float32) * 1e-2
    first = statistics(np.zeros((1, K)), [0])
    stats = statistics(z, np.ones(400, int), batch=batch, so_far=first)
    parts = stats.origin, stats.mean_offsets[1], stats.mean_offset_residuals[1]
    means = sum(np.asarray(part, np.float64) for part in parts)
    np.testing.assert_allclose(means, z.astype(np.float64).mean(0), rtol=0, atol=1e-8)


def test_counts_and_spread_go_on_past_2_to_the_24():
    one = statistics(np.zeros((1, 1)), [0])
    one = one._replace(squared_deviations=one.counts)
    # The next float32 after 2^25 is 2^25 + 4.
    many = one._replace(counts=one.counts * 2.0**25, squared_deviations=one.counts * 2.0**25)
    for _ in range(8):
        many = merge(many, one)
    assert many.counts[0] == 2**25 + 8
    assert many.squared_deviations[0] == 2**25 + 8


def blocks_example(n=5000):
    """Rows for three blocks on the CPU, with padding; the oracle sees those of positive weight."""
    z, labels, weights = example(n)
    weights[::10] = 0
    padded = np.where(weights[:, None] > 0, z, np.nan).astype(np.float32)
    return padded, labels, weights, (z[weights > 0], labels[weights > 0], weights[weights > 0])


def test_a_batch_of_several_blocks_equals_the_oracle():
    z, labels, weights, counted = blocks_example()
    empty = init_class_statistics(C, K, scatter=True)
    check(update(empty, z, labels, weights=weights), *counted)


MESH = jax.sharding.Mesh(jax.devices(), ("data",))
ALONG = jax.sharding.PartitionSpec("data")


@pytest.mark.parametrize("several_blocks", [False, True])
def test_sharded_batches_equal_the_oracle(several_blocks):
    z, labels, weights, counted = blocks_example(5000 if several_blocks else 48)
    arrays = jax.device_put((z, labels, weights), jax.sharding.NamedSharding(MESH, ALONG))
    empty = init_class_statistics(C, K)
    check(jit(update_class_statistics)(empty, *arrays[:2], weights=arrays[2]), *counted)


def test_shards_of_several_blocks_merge_under_shard_map():
    z, labels, weights, counted = blocks_example(n=10_000)
    mesh = jax.sharding.Mesh(jax.devices()[:2], ("data",))

    def of_shard(z, labels, weights):
        stats = update_class_statistics(init_class_statistics(C, K), z, labels, weights=weights)
        return jax.tree.map(lambda x: x[None], stats)

    mapped = jax.shard_map(of_shard, mesh=mesh, in_specs=ALONG, out_specs=ALONG)
    parts = jax.tree.map(np.asarray, jit(mapped)(z, labels, weights))
    first, second = (jax.tree.map(lambda x, i=i: x[i], parts) for i in range(2))
    check(merge(first, second), *counted)


def test_gradient_and_vmap_through_several_blocks():
    z, labels, _ = example(n=5000)

    def spread(z):
        stats = update_class_statistics(init_class_statistics(C, K), z, labels)
        return jnp.sum(stats.squared_deviations)

    gradients = jit(jax.vmap(jax.grad(spread)))(np.stack([z, 2 * z]))
    _, means, _, _ = oracle(z, labels, np.ones(len(z)))
    np.testing.assert_allclose(gradients[0], 2 * (z - means[labels]), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(gradients[1], 2 * gradients[0], rtol=1e-3, atol=1e-3)


def test_memory_follows_the_block_not_the_batch():
    num_classes, dim, batch = 1000, 2048, 20_000
    block = 4 * num_classes
    compiled = update.lower(
        jax.eval_shape(lambda: init_class_statistics(num_classes, dim, scatter=True)),
        jax.ShapeDtypeStruct((batch, dim), jnp.float32),
        jax.ShapeDtypeStruct((batch,), jnp.int32),
    ).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary <= 3 * 4 * (block * dim + num_classes * dim + dim**2)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int8])
def test_low_precision_embeddings_are_cast_up_first(dtype):
    z = jnp.asarray(np.random.default_rng(0).integers(-9, 9, (50, K)), dtype)
    labels = np.arange(50) % C
    check(
        update_class_statistics(init_class_statistics(C, K), z, labels),
        np.asarray(z, np.float32),
        labels,
        np.ones(50),
    )


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
