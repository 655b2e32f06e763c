"""The summary of runs with different penalties."""

import json

import pytest

from experiments import penalty_results
from gc_nc.errors import InputError
from gc_nc.training import loop


def test_collects_finished_runs_and_draws_them(tiny_run, tmp_path):
    config, _ = tiny_run
    config.num_steps = 2
    runs = tmp_path / "runs"
    for weight, seed in ((0.0, 0), (0.1, 0), (0.1, 1)):
        config.gc_penalty.weight, config.seed = weight, seed
        loop.train(config, runs / f"{weight}_{seed}")
    (runs / "late").mkdir()
    (runs / "late" / "config.json").write_text((runs / "0.0_0" / "config.json").read_text())
    # A run from before a key existed is one with its default.
    old = runs / "0.0_0" / "config.json"
    stored = json.loads(old.read_text())
    del stored["gc_penalty"]
    old.write_text(json.dumps(stored))
    found, unfinished = penalty_results.collect(runs)
    assert [(run["weight"], run["seed"]) for run in found] == [(0.0, 0), (0.1, 0), (0.1, 1)]
    assert unfinished == ["late"]
    expected = json.loads((runs / "0.1_1" / "results.json").read_text())["metrics"]
    assert found[2]["metrics"] == expected
    penalty_results.draw(found, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")

    other = runs / "0.1_1" / "config.json"
    stored = json.loads(other.read_text())
    stored["optimizer"]["learning_rate"] = 0.123
    other.write_text(json.dumps(stored))
    with pytest.raises(InputError, match=r"differ in optimizer\.learning_rate; only"):
        penalty_results.collect(runs)
    with pytest.raises(InputError, match="holds no finished run"):
        penalty_results.collect(tmp_path)
