"""Few-shot episodes on the CPU against a loop over episodes with scikit-learn's NearestCentroid.

    python -m experiments.benchmarks.episodes [--json] [--benchmark_episodes=10000]

The episodes are 5-way, 5-shot, 15-query and use the nearest mean; the embeddings are in memory,
12,000 of 512 dimensions in 20 classes of 600. The first row compares the time to sample and predict
all episodes with a goal of 5 seconds for 10,000. The second compares the time for one episode,
including sampling, with fitting and predicting one that is already drawn. The reference runs on the
first episodes and on one thread, where it is fastest. Runs alternate in one process; seconds are
medians, and on a busy machine only the second row's ratio is meaningful. It takes a minute.
"""

from statistics import median

import jax
import numpy as np
import threadpoolctl
from absl import flags
from sklearn.neighbors import NearestCentroid

from experiments import launcher
from experiments.benchmarks import reporting
from gc_nc import transfer

_NUM_EPISODES = flags.DEFINE_integer("benchmark_episodes", 10_000, "Episodes.", lower_bound=1)

_NUM_CLASSES, _CLASS_SIZE, _DIM, _REPETITIONS = 20, 600, 512, 7
_SIZES = {"num_ways": 5, "num_shots": 5, "num_queries": 15}
_REFERENCE_EPISODES = 300
_GOAL_SECONDS_PER_EPISODE = 5 / 10_000


def main(argv: list[str]) -> None:
    """Checks that both predict the same, then times them."""
    del argv
    rng = np.random.default_rng(0)
    labels = rng.permutation(_NUM_CLASSES * _CLASS_SIZE) % _NUM_CLASSES
    z = rng.standard_normal((len(labels), _DIM), dtype=np.float32)
    # With these distances one query in four is wrong.
    z += 0.2 * rng.standard_normal((_NUM_CLASSES, _DIM), dtype=np.float32)[labels]
    key = jax.random.key(0)

    def ours():
        episodes = transfer.sample_episodes(key, labels, _NUM_EPISODES.value, **_SIZES)
        return transfer.episode_accuracies(z, labels, episodes)

    num_reference = min(_REFERENCE_EPISODES, _NUM_EPISODES.value)
    episodes = transfer.sample_episodes(key, labels, num_reference, **_SIZES)
    support, query = np.asarray(episodes.support), np.asarray(episodes.query)

    def reference():
        return np.array([_accuracy(z, *episode) for episode in zip(support, query, strict=True)])

    with threadpoolctl.threadpool_limits(1):
        # The first call also compiles.
        _check(ours()[:num_reference], reference())
        pairs = [
            (reporting.time_call(ours), reporting.time_call(reference)) for _ in range(_REPETITIONS)
        ]
    seconds, reference_seconds = map(median, zip(*pairs, strict=True))
    num_episodes = _NUM_EPISODES.value
    reporting.print_rows(
        [
            reporting.Row(
                f"{num_episodes} episodes", seconds, _GOAL_SECONDS_PER_EPISODE * num_episodes, 1.0
            ),
            reporting.Row(
                "one episode", seconds / num_episodes, reference_seconds / num_reference, 0.05
            ),
        ]
    )


def _accuracy(z, support, query):
    num_ways, num_shots = support.shape
    classifier = NearestCentroid().fit(z[support.ravel()], np.repeat(range(num_ways), num_shots))
    predicted = classifier.predict(z[query.ravel()])
    return np.mean(predicted == np.repeat(range(num_ways), query.shape[1]))


def _check(accuracies, expected):
    """Allows one query in a thousand to differ, because rounding decides between close means."""
    np.testing.assert_allclose(np.mean(np.abs(accuracies - expected)), 0, atol=1e-3)


if __name__ == "__main__":
    launcher.run(main)
