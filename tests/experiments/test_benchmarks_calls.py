"""`python -m experiments.benchmarks.calls` on small networks; nothing here looks at the clock."""

import json

import pytest
from absl import flags
from absl.testing import flagsaver

from experiments.benchmarks import calls
from gc_nc.errors import InputError


@pytest.fixture(autouse=True)
def _parsed_flags():
    flags.FLAGS.mark_as_parsed()


@pytest.mark.slow
def test_json_has_one_object_a_line(capsys, monkeypatch):
    monkeypatch.setattr(calls, "_REPETITIONS", 1)
    with flagsaver.flagsaver(json=True, only="linear map"):
        calls.main([])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["name"].partition(", ")[2] for row in rows] == [*calls._FORMS]
    for row in rows:
        assert 0 < row["limit"] < row["ours"]
        assert row["met"] == (row["ours"] <= 0.05)


def test_a_row_that_is_not_there_is_named():
    with flagsaver.flagsaver(only="LSTM"), pytest.raises(InputError, match="--only='LSTM' is in"):
        calls.main([])
