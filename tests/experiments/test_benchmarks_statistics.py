"""`python -m experiments.benchmarks.statistics` on few rows; nothing here looks at the clock."""

import json
import sys

import pytest
from absl import flags
from absl.testing import flagsaver

from experiments.benchmarks import reporting, statistics
from gc_nc.errors import InputError


@pytest.fixture(autouse=True)
def _parsed_flags():
    flags.FLAGS.mark_as_parsed()


def test_json_has_one_object_a_line(capsys, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setattr(statistics, "_REPETITIONS", 1)
    with flagsaver.flagsaver(json=True, num_examples=1000):
        statistics.main([])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["goal"] for row in rows] == [0.7, 0.7, 0.7, 1.1]
    for row in rows:
        assert row["ratio"] == row["ours"] / row["reference"]
        assert row["met"] == (row["ratio"] <= row["goal"])


def test_without_torch_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with (
        flagsaver.flagsaver(num_examples=1000),
        pytest.raises(InputError, match=r"pip install -e \.\[bench\]"),
    ):
        statistics.main([])


def test_the_table_says_which_goals_are_met(capsys):
    rows = [reporting.Row("fast", 0.1, 0.2, 0.7), reporting.Row("slower", 0.2, 0.2, 0.7)]
    with flagsaver.flagsaver(json=False):
        reporting.print_rows(rows)
    _, fast, slower = capsys.readouterr().out.splitlines()
    assert fast.split() == ["fast", "0.1", "s", "0.2", "s", "0.50", "0.70", "yes"]
    assert slower.split()[-1] == "no"
