"""`python -m experiments.benchmarks.episodes` on few episodes; nothing here looks at the clock."""

import json

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments.benchmarks import episodes


@pytest.mark.slow
def test_two_rows_with_their_goals(capsys, monkeypatch):
    monkeypatch.setattr(episodes, "_REPETITIONS", 1)
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(json=True, benchmark_episodes=20):
        episodes.main([])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["goal"] for row in rows] == [1.0, 0.05]
    assert rows[0]["reference"] == pytest.approx(5 * 20 / 10_000)
    assert rows[1]["ours"] == pytest.approx(rows[0]["ours"] / 20)
    for row in rows:
        assert row["ratio"] == row["ours"] / row["reference"]
        assert row["met"] == (row["ratio"] <= row["goal"])


def test_other_predictions_are_not_timed():
    expected = np.full(300, 0.75)
    episodes._check(expected, expected)
    with pytest.raises(AssertionError):
        episodes._check(np.full(300, 0.74), expected)
