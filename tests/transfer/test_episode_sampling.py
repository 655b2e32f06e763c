"""Episodes: without replacement, uniform, the same everywhere, impossible ones refused."""

import collections

import jax
import jaxtyping
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gc_nc.transfer import episode_sampling, sample_episode, sample_episodes

KEY = jax.random.key(0)
SIZES = {"num_ways": 3, "num_shots": 2, "num_queries": 4}
# Of any value, in any order, and not equally many.
LABELS = np.repeat([-7, 0, 3, 1000], [6, 9, 20, 7])[11 * np.arange(42) % 42]


@pytest.fixture(scope="module")
def many():
    """4,800 episodes, in NumPy."""
    return jax.device_get(sample_episodes(KEY, LABELS, 4800, **SIZES))


def assert_same(a, b):
    for left, right in zip(a, b, strict=True):
        np.testing.assert_array_equal(left, right)


def test_f3_every_image_exactly_once_and_never_replacement():
    labels = np.arange(30) % 5
    sizes = {"num_ways": 5, "num_shots": 1, "num_queries": 5}
    for seed in range(20):
        episode = sample_episode(jax.random.key(seed), labels, **sizes)
        used = np.concatenate([np.ravel(episode.support), np.ravel(episode.query)])
        assert sorted(used) == list(range(30))
    short = np.delete(labels, 7)
    with pytest.raises(ValueError, match=r"class 2 has 5 images.*needs 6") as error:
        sample_episode(KEY, short, **sizes)
    assert "\n" not in str(error.value)


def test_f4_images_carry_the_label_of_their_way(many):
    classes, support, query = many
    assert support.shape == (4800, 3, 2)
    assert query.shape == (4800, 3, 4)
    for indices in (support, query):
        np.testing.assert_array_equal(
            LABELS[indices], np.broadcast_to(classes[..., None], indices.shape)
        )
    used = np.concatenate([support, query], axis=2).reshape(4800, -1)
    for row, ways in zip(used.tolist(), classes.tolist(), strict=True):
        assert len(set(row)) == 18
        assert len(set(ways)) == 3


def test_an_episode_depends_on_its_own_number_alone(many):
    for i in (0, 2, 4799):
        single = sample_episode(jax.random.fold_in(KEY, i), LABELS, **SIZES)
        assert_same(single, [array[i] for array in many])
    assert np.any(many.query[0] != many.query[1])


def test_the_same_under_jit_and_on_any_devices(many):
    mesh = Mesh(np.array(jax.devices()), ("devices",))
    sharding = NamedSharding(mesh, PartitionSpec("devices"))
    keys = jax.device_put(jax.vmap(jax.random.fold_in, (None, 0))(KEY, np.arange(8)), sharding)
    sample = jax.jit(
        jax.vmap(lambda key: sample_episode(key, LABELS, **SIZES)), out_shardings=sharding
    )
    spread = sample(keys)
    assert len(spread.query.sharding.device_set) == 8
    assert_same(spread, [array[:8] for array in many])
    elsewhere = jax.device_put(jax.random.fold_in(KEY, 7), jax.devices()[5])
    assert_same(sample_episode(elsewhere, LABELS, **SIZES), [array[7] for array in many])


def test_known_episode():
    """The numbers themselves: results name a seed, which must mean the same in years to come."""
    classes, support, query = sample_episode(KEY, LABELS, **SIZES)
    np.testing.assert_array_equal(classes, [1000, -7, 0])
    np.testing.assert_array_equal(support, [[7, 19], [0, 8], [24, 1]])
    np.testing.assert_array_equal(query, [[11, 38, 15, 34], [27, 23, 4, 31], [5, 35, 16, 20]])


def chi_square(counts, expected):
    return np.sum((counts - expected) ** 2 / expected)


def test_every_ordered_choice_of_classes_and_images_is_equally_likely(many):
    ways = collections.Counter(map(tuple, many.classes.tolist()))
    assert len(ways) == 24
    # 99.9% of chi-square with 23 degrees of freedom.
    assert chi_square(np.array(list(ways.values())), 200) < 49.7
    # The class of 6 images, all of which are drawn where it is; their first three in order.
    images = np.concatenate([many.support, many.query], axis=2)[many.classes == -7]
    triples = collections.Counter(map(tuple, images[:, :3].tolist()))
    assert len(triples) == 6 * 5 * 4
    # With 119.
    assert chi_square(np.array(list(triples.values())), len(images) / 120) < 172
    # The class of 20, of which few are drawn: any of them first, and any of them last.
    images = np.concatenate([many.support, many.query], axis=2)[many.classes == 3]
    for draw in (0, 5):
        counts = np.array(list(collections.Counter(images[:, draw].tolist()).values()))
        # With 19.
        assert counts.size == 20
        assert chi_square(counts, len(images) / 20) < 43.8


def test_random_bits_are_scaled_down_exactly():
    """The high half of a product of 64 bits."""
    rng = np.random.default_rng(0)
    bits, counts = rng.integers(1, 2**32, 500), rng.integers(1, 2**31, 500)
    bits[:2], counts[:3] = [0, 2**32 - 1], [2**31 - 1, 2**31 - 1, 1]
    scaled = episode_sampling._scaled_down(bits.astype(np.uint32), counts.astype(np.uint32))
    expected = [int(b) * int(c) >> 32 for b, c in zip(bits, counts, strict=True)]
    np.testing.assert_array_equal(scaled, expected)


def test_a_large_class_is_drawn_evenly_to_its_end():
    labels = np.repeat([0, 1], 100_003)
    episode = sample_episode(KEY, labels, num_ways=2, num_shots=1, num_queries=3000)
    images = np.asarray(episode.query) - 100_003 * np.asarray(episode.classes)[:, None]
    assert images.min() >= 0
    assert images.max() < 100_003
    for drawn in images:
        assert len(set(drawn.tolist())) == 3000
        counts = np.histogram(drawn, bins=20, range=(0, 100_003))[0]
        # 99.9% with 19 degrees of freedom.
        assert chi_square(counts, 150) < 43.8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_ways": 5}, "num_ways=5 but labels have 4 classes"),
        ({"num_ways": 1}, "num_ways=1 must be at least 2"),
        ({"num_shots": 0}, "num_shots=0 must be at least 1"),
        ({"num_queries": 0}, "num_queries=0 must be at least 1"),
        # The class with fewest images, drawn or not.
        ({"num_shots": 3}, "class -7 has 6 images, but num_shots=3 .* needs 7"),
        ({"labels": LABELS / 2}, "labels are float64"),
        ({"labels": LABELS + 2**40}, "must be in -2147483648..2147483647"),
        ({"key": jax.random.key(0, impl="rbg")}, "key is of rbg"),
    ],
)
def test_impossible_episodes_are_refused_in_one_line(change, message):
    arguments = {"key": KEY, "labels": LABELS, **SIZES, **change}
    with pytest.raises(ValueError, match=message) as error:
        sample_episode(**arguments)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=message):
        sample_episodes(num_episodes=2, **arguments)


def test_labels_of_another_shape_are_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=r"labels are int64 of shape \(42, 1\)"):
        sample_episode(KEY, LABELS[:, None], **SIZES)


def test_traced_labels_and_no_episodes_are_refused():
    with pytest.raises(ValueError, match="labels are traced"):
        jax.jit(lambda labels: sample_episode(KEY, labels, **SIZES))(LABELS)
    with pytest.raises(ValueError, match="num_episodes=0 must be at least 1"):
        sample_episodes(KEY, LABELS, 0, **SIZES)


def test_a_raw_key_is_the_typed_one():
    assert_same(
        sample_episode(jax.random.PRNGKey(3), LABELS, **SIZES),
        sample_episode(jax.random.key(3), LABELS, **SIZES),
    )
