"""`python -m experiments.benchmarks.estimators` on a tiny run."""

import json

import pytest
from absl import flags
from absl.testing import flagsaver

from experiments.benchmarks import estimators
from gc_nc.runs import loop


@pytest.mark.slow
def test_one_json_object_a_row_and_a_picture(tiny_run, tmp_path, capsys, monkeypatch):
    config, workdir = tiny_run
    loop.train(config, workdir)
    capsys.readouterr()
    # Every number of products is a program to compile.
    monkeypatch.setattr(estimators, "_PRODUCTS", (3,))
    monkeypatch.setattr(estimators, "_REPETITIONS", 1)
    flags.FLAGS.mark_as_parsed()
    figure = tmp_path / "figures" / "errors.png"
    with flagsaver.flagsaver(
        benchmark_run=str(workdir), num_images=2048, figure=str(figure), json=True
    ):
        estimators.main([])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 2
    for row in rows:
        assert row["ratio"] == row["ours"] / row["reference"] > 0
        assert row["met"] == (row["ratio"] <= row["goal"])
    assert figure.read_bytes().startswith(b"\x89PNG")
