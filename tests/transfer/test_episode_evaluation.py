"""What holds for every head, accuracies of episodes, their interval and their neural collapse."""

import functools

import jax
import jaxtyping
import numpy as np
import pytest

from gc_nc import metrics
from gc_nc.transfer import (
    HEADS,
    Episode,
    episode_accuracies,
    episode_evaluation,
    episode_neural_collapse,
    mean_confidence_interval,
    nearest_mean_predictions,
)
from tests.rounding import assert_same_numbers

COMPILED = {name: jax.jit(head) for name, head in HEADS.items()}
collapse_of = jax.jit(episode_neural_collapse)

LABELS = np.random.default_rng(1).permutation(240) % 8


def random_embeddings(separation=0.0, dim=10):
    rng = np.random.default_rng(2)
    centres = separation * rng.normal(size=(8, dim))
    return (centres[LABELS] + rng.normal(size=(240, dim))).astype(np.float32)


@pytest.fixture(params=HEADS)
def head(request):
    return request.param


@pytest.fixture(scope="module")
def episodes():
    """515 of 5 ways, 1 shot and 15 queries: more than are evaluated in one block."""
    rng = np.random.default_rng(3)
    classes = rng.permuted(np.tile(np.arange(8), (515, 1)), axis=1)[:, :5]
    # The 30 images of each class, in an order of its own for each way.
    images = np.argsort(LABELS, kind="stable").reshape(8, 30)[classes]
    images = rng.permuted(images, axis=2)
    return Episode(classes, images[:, :, :1], images[:, :, 1:16])


def first(episodes, count):
    return jax.tree.map(lambda array: array[:count], episodes)


@pytest.fixture
def one_episode(episodes):
    z = random_embeddings(1.0)
    return z[episodes.support[0]], z[episodes.query[0].ravel()]


def test_f2_one_query_at_a_time_equals_75_at_once(head, one_episode):
    predict = COMPILED[head]
    support, query = one_episode
    together = predict(support, query)
    assert together.dtype == np.int32
    assert set(np.asarray(together)) == set(range(5))
    alone = [predict(support, query[i : i + 1])[0] for i in range(75)]
    np.testing.assert_array_equal(alone, together)


def test_permuting_queries_permutes_predictions(head, one_episode):
    predict = COMPILED[head]
    support, query = one_episode
    order = np.random.default_rng(0).permutation(75)
    np.testing.assert_array_equal(predict(support, query[order]), predict(support, query)[order])


def test_permuting_ways_permutes_predictions(head, one_episode):
    predict = COMPILED[head]
    support, query = one_episode
    order = np.array([3, 0, 4, 1, 2])
    np.testing.assert_array_equal(
        order[np.asarray(predict(support[order], query))], predict(support, query)
    )


def test_equal_ways_are_a_tie_of_which_the_lowest_is_taken(head, one_episode):
    support, query = one_episode
    support[3] = support[1]
    support[1] = support[2]
    support[2] = support[1]
    predicted = COMPILED[head](support, query)
    assert set(np.asarray(predicted)) == {0, 1, 3, 4}


def test_what_is_not_finite_has_no_prediction(head, one_episode):
    predict = COMPILED[head]
    support, query = one_episode
    expected = np.array(predict(support, query))
    for i, value in ((4, np.nan), (9, np.inf), (11, -np.inf)):
        query[i, 2] = value
        expected[i] = -1
    np.testing.assert_array_equal(predict(support, query), expected)
    for value in (np.nan, np.inf):
        bad = support.copy()
        bad[1, 0, 3] = value
        np.testing.assert_array_equal(predict(bad, query), -1)


def with_images_of_their_own(episodes):
    """(labels, episodes): what episodes share is more than their interval knows."""
    num_episodes = len(episodes.classes)
    offsets = LABELS.size * np.arange(num_episodes)[:, None, None]
    classes, *images = episodes
    return np.tile(LABELS, num_episodes), Episode(classes, *(i + offsets for i in images))


def test_accuracies_are_shares_of_right_predictions(head, episodes):
    """122 episodes: not a multiple of how many are computed at once."""
    labels, own = with_images_of_their_own(first(episodes, 122))
    z = np.tile(random_embeddings(0.5), (122, 1))
    accuracies = episode_accuracies(z, labels, own, head)
    assert accuracies.dtype == np.float64
    predict = COMPILED[head]
    for i in (0, 1, 60, 119, 120, 121):
        classes, support, query = (array[i] for array in own)
        predicted = classes[np.asarray(predict(z[support], z[query.ravel()]))]
        assert accuracies[i] == np.mean(predicted == labels[query.ravel()])
    assert len(set(accuracies)) > 3
    # Embeddings that say nothing of classes score chance.
    z = np.random.default_rng(3).normal(size=z.shape).astype(np.float32)
    mean, half_width = mean_confidence_interval(episode_accuracies(z, labels, own, head))
    assert half_width < 0.02
    assert abs(mean - 0.2) < half_width


def test_blocks_that_overlap_count_each_episode_once(episodes):
    z, done = random_embeddings(0.5), []
    accuracies = episode_accuracies(z, LABELS, episodes, report=done.append)
    assert done == [512, 515]
    predict = COMPILED["nearest_mean"]
    for i in (0, 2, 3, 511, 512, 513, 514):
        classes, support, query = (array[i] for array in episodes)
        predicted = classes[np.asarray(predict(z[support], z[query.ravel()]))]
        assert accuracies[i] == np.mean(predicted == LABELS[query.ravel()])


def test_a_head_with_options_and_memory_for_one_episode(monkeypatch, episodes):
    labels, own = with_images_of_their_own(first(episodes, 122))
    z = np.tile(random_embeddings(0.5), (122, 1))
    ridge = functools.partial(HEADS["ridge"], regularization=1e-3)
    accuracies = episode_accuracies(z, labels, own, ridge)
    assert np.any(accuracies != episode_accuracies(z, labels, own, "ridge"))
    monkeypatch.setattr(episode_evaluation, "_BLOCK_BYTES", 1)
    np.testing.assert_array_equal(episode_accuracies(z, labels, own, ridge), accuracies)


def test_memory_is_bounded():
    """5-way episodes of 80 images of 25,088 dimensions are 8 MB each, and in 4 copies 32."""
    arguments = (
        jax.ShapeDtypeStruct((100, 25_088), np.float32),
        jax.ShapeDtypeStruct((512, 5, 1), np.int32),
        jax.ShapeDtypeStruct((512, 5, 15), np.int32),
    )
    at_once = episode_evaluation._episodes_at_once(*arguments)
    assert at_once == 8
    compiled = episode_evaluation._predict_compiled.lower(
        *arguments, head=nearest_mean_predictions, at_once=at_once
    ).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**28
    wide = jax.ShapeDtypeStruct((100, 10**6), np.float32)
    assert episode_evaluation._episodes_at_once(wide, *arguments[1:]) == 1


def test_queries_without_a_prediction_are_errors_and_told_of(episodes):
    z = random_embeddings(50.0)
    z[episodes.query[0, 2, 3]] = np.nan
    unknown = np.isnan(z[episodes.query, 0]).sum(axis=(1, 2))
    unknown = np.where(np.isnan(z[episodes.support, 0]).any(axis=(1, 2)), 75, unknown)
    # 512 in a block, then the last 512 of them: a query of both is told of once.
    assert unknown[3:512].sum() > 0
    message = f"no prediction for {unknown.sum()} of {515 * 75} queries"
    with pytest.warns(RuntimeWarning, match=message):
        accuracies = episode_accuracies(z, LABELS, episodes)
    np.testing.assert_array_equal(accuracies, (75 - unknown) / 75)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": "nearest"}, "head='nearest' is not one of nearest_mean, cosine, ridge, logistic"),
        ({"labels": (LABELS + 1) % 8}, "support images do not have the label of their way"),
        ({"labels": LABELS[:100]}, r"embeddings of shape \(240, 10\) and labels of shape \(100,\)"),
        ({"few": True}, "support indices are in .*, but there are 60 images"),
        ({"single": True}, r"episodes of shapes \(5,\), \(5, 1\), \(5, 15\)"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(change, message, monkeypatch, episodes):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    episodes = first(episodes, 3)
    z, labels = random_embeddings(), change.get("labels", LABELS)
    if "few" in change:
        z, labels = z[:60], labels[:60]
    if "single" in change:
        episodes = jax.tree.map(lambda array: array[0], episodes)
    with pytest.raises(ValueError, match=message) as error:
        episode_accuracies(z, labels, episodes, change.get("head", "cosine"))
    assert "\n" not in str(error.value)


def test_neural_collapse_of_an_episode_is_that_of_its_classes_alone():
    z = random_embeddings(1.0)
    classes = np.array([[0, 1, 2, 3], [7, 2, 5, 0]])

    @jax.jit
    def collapse_and_cdnv(kept):
        stats = metrics.init_class_statistics(8, 10)
        stats = metrics.update_class_statistics(stats, z, LABELS, weights=kept)
        return metrics.neural_collapse(stats), metrics.cdnv_matrix(stats)

    collapse = collapse_of(collapse_and_cdnv(np.ones(240, np.float32))[1], classes)
    expected = [collapse_and_cdnv(np.isin(LABELS, row).astype(np.float32))[0] for row in classes]
    assert_same_numbers(collapse, expected)
    assert abs(expected[0] - expected[1]) > 0.01 * expected[0]


def test_neural_collapse_of_a_pair_by_hand():
    cdnv = np.array([[np.nan, 2.0, 5.0], [2.0, np.nan, np.inf], [5.0, np.inf, np.nan]])
    collapse = collapse_of(cdnv, np.array([[0, 1], [2, 0], [1, 2]]))
    np.testing.assert_array_equal(collapse, [2, 5, np.inf])


@pytest.mark.parametrize("classes", [[[0, 1], [1, 3]], [[0, 1], [-1, 2]], [[0, 1], [2, 2]]])
def test_neural_collapse_refuses_classes_that_are_not_there(classes):
    classes = np.array(classes)
    with pytest.raises(ValueError, match=r"an episode of classes .*; different ones in 0\.\.2"):
        episode_neural_collapse(np.ones((3, 3)), classes)
    under_jit = collapse_of(np.ones((3, 3)), classes)
    np.testing.assert_array_equal(under_jit, [1, np.nan])


def test_neural_collapse_refuses_other_shapes(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    for cdnv, classes in (
        (np.ones((3, 2)), [[0, 1]]),
        (np.ones((3, 3)), [[0], [1]]),
        (np.ones((3, 3)), [[0.0, 1.0]]),
        (np.ones((3, 3)), [0, 1]),
    ):
        with pytest.raises(ValueError, match="of shape"):
            episode_neural_collapse(cdnv, np.array(classes))


def test_f1_interval_from_the_deviation_of_a_sample():
    mean, half_width = mean_confidence_interval([0.3, 0.4, 0.5, 0.6, 0.7])
    assert mean == pytest.approx(0.5)
    assert half_width == pytest.approx(0.1386, abs=5e-5)


def test_interval_of_one_and_of_no_accuracy():
    mean, half_width = mean_confidence_interval([0.25])
    assert mean == 0.25
    assert np.isnan(half_width)
    for nothing in ([], np.ones((2, 2))):
        with pytest.raises(ValueError, match="accuracies of shape"):
            mean_confidence_interval(nothing)
