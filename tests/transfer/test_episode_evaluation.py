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
    sample_episodes,
)

COMPILED = {name: jax.jit(head) for name, head in HEADS.items()}
collapse_of = jax.jit(episode_neural_collapse)

KEY = jax.random.key(0)
SIZES = {"num_ways": 5, "num_shots": 1, "num_queries": 15}
LABELS = np.random.default_rng(1).permutation(240) % 8


def random_embeddings(separation=0.0, dim=10):
    rng = np.random.default_rng(2)
    centres = separation * rng.normal(size=(8, dim))
    return (centres[LABELS] + rng.normal(size=(240, dim))).astype(np.float32)


@pytest.fixture(params=HEADS)
def head(request):
    return request.param


def one_episode(separation=1.0):
    z = random_embeddings(separation)
    episode = jax.tree.map(
        lambda array: np.asarray(array[0]), sample_episodes(KEY, LABELS, 1, **SIZES)
    )
    return z[episode.support], z[episode.query.ravel()]


def test_f2_one_query_at_a_time_equals_75_at_once(head):
    predict = COMPILED[head]
    support, query = one_episode()
    together = predict(support, query)
    assert together.dtype == np.int32
    assert set(np.asarray(together)) == set(range(5))
    alone = [predict(support, query[i : i + 1])[0] for i in range(75)]
    np.testing.assert_array_equal(alone, together)


def test_permuting_queries_permutes_predictions(head):
    predict = COMPILED[head]
    support, query = one_episode()
    order = np.random.default_rng(0).permutation(75)
    np.testing.assert_array_equal(predict(support, query[order]), predict(support, query)[order])


def test_permuting_ways_permutes_predictions(head):
    predict = COMPILED[head]
    support, query = one_episode()
    order = np.array([3, 0, 4, 1, 2])
    np.testing.assert_array_equal(
        order[np.asarray(predict(support[order], query))], predict(support, query)
    )


def test_equal_ways_are_a_tie_of_which_the_lowest_is_taken(head):
    support, query = one_episode()
    support[3] = support[1]
    support[1] = support[2]
    support[2] = support[1]
    predicted = COMPILED[head](support, query)
    assert set(np.asarray(predicted)) == {0, 1, 3, 4}


def test_what_is_not_finite_has_no_prediction(head):
    predict = COMPILED[head]
    support, query = one_episode()
    expected = np.array(predict(support, query))
    for i, value in ((4, np.nan), (9, np.inf), (11, -np.inf)):
        query[i, 2] = value
        expected[i] = -1
    np.testing.assert_array_equal(predict(support, query), expected)
    for value in (np.nan, np.inf):
        bad = support.copy()
        bad[1, 0, 3] = value
        np.testing.assert_array_equal(predict(bad, query), -1)


# Each episode has images of its own: what episodes share is more than their interval knows.
_NUM_EPISODES = 122
_MANY_LABELS = np.tile(LABELS, _NUM_EPISODES)


@pytest.fixture
def episodes_of_their_own(monkeypatch):
    """In blocks that do not divide their number, and with few at once."""
    monkeypatch.setattr(episode_evaluation, "_MAX_BLOCK_EPISODES", 4)
    monkeypatch.setattr(episode_evaluation, "_EPISODES_AT_ONCE", 3)
    classes, *images = map(np.asarray, sample_episodes(KEY, LABELS, _NUM_EPISODES, **SIZES))
    offsets = LABELS.size * np.arange(_NUM_EPISODES)[:, None, None]
    return Episode(classes, *(indices + offsets for indices in images))


def test_random_embeddings_score_chance(head, episodes_of_their_own):
    z = np.random.default_rng(3).normal(size=(_MANY_LABELS.size, 10)).astype(np.float32)
    accuracies = episode_accuracies(z, _MANY_LABELS, episodes_of_their_own, head)
    mean, half_width = mean_confidence_interval(accuracies)
    assert half_width < 0.02
    assert abs(mean - 0.2) < half_width


def test_accuracies_are_shares_of_right_predictions(head, episodes_of_their_own):
    z = np.tile(random_embeddings(0.5), (_NUM_EPISODES, 1))
    done = []
    accuracies = episode_accuracies(
        z, _MANY_LABELS, episodes_of_their_own, head, report=done.append
    )
    assert done == [*range(4, 121, 4), 122]
    assert accuracies.dtype == np.float64
    predict = COMPILED[head]
    for i in (0, 1, 60, 119, 120, 121):
        classes, support, query = (array[i] for array in episodes_of_their_own)
        predicted = classes[np.asarray(predict(z[support], z[query.ravel()]))]
        assert accuracies[i] == np.mean(predicted == _MANY_LABELS[query.ravel()])
    assert len(set(accuracies)) > 3


def test_a_head_with_options_and_memory_for_one_episode(monkeypatch):
    z, episodes = random_embeddings(0.5), sample_episodes(KEY, LABELS, 10, **SIZES)
    ridge = functools.partial(HEADS["ridge"], regularization=1e-3)
    accuracies = episode_accuracies(z, LABELS, episodes, ridge)
    assert np.any(accuracies != episode_accuracies(z, LABELS, episodes, "ridge"))
    monkeypatch.setattr(episode_evaluation, "_BLOCK_BYTES", 1)
    np.testing.assert_array_equal(episode_accuracies(z, LABELS, episodes, ridge), accuracies)


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


def test_queries_without_a_prediction_are_errors_and_told_of():
    z = random_embeddings(50.0)
    episodes = sample_episodes(KEY, LABELS, 20, **SIZES)
    z[episodes.query[0, 2, 3]] = np.nan
    uses = np.sum(np.asarray(episodes.query) == episodes.query[0, 2, 3], axis=(1, 2))
    with pytest.warns(RuntimeWarning, match=r"no prediction for \d+ of 1500 queries"):
        accuracies = episode_accuracies(z, LABELS, episodes)
    in_support = np.any(np.asarray(episodes.support) == episodes.query[0, 2, 3], axis=(1, 2))
    np.testing.assert_allclose(accuracies, np.where(in_support, 0, 1 - uses / 75))


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
def test_what_does_not_fit_is_refused_in_one_line(change, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    episodes = sample_episodes(KEY, LABELS, 3, **SIZES)
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
    collapse_of_all = jax.jit(metrics.neural_collapse)

    @jax.jit
    def statistics(kept):
        stats = metrics.init_class_statistics(8, 10)
        return metrics.update_class_statistics(stats, z, LABELS, weights=kept)

    collapse = collapse_of(jax.jit(metrics.cdnv_matrix)(statistics(LABELS * 0.0 + 1)), classes)
    expected = [collapse_of_all(statistics(1.0 * np.isin(LABELS, row))) for row in classes]
    np.testing.assert_allclose(collapse, expected, rtol=1e-5)
    assert expected[0] != expected[1]


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


def test_interval_of_one_and_of_no_accuracy(monkeypatch):
    mean, half_width = mean_confidence_interval([0.25])
    assert mean == 0.25
    assert np.isnan(half_width)
    for nothing in ([], np.ones((2, 2))):
        with pytest.raises(ValueError, match="accuracies of shape"):
            mean_confidence_interval(nothing)
