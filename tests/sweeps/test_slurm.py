"""Sweeps on a real Slurm of one node: parallelism, a failure, a preemption."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.sweeps.config_file import CONFIG
from tests.sweeps.one_node_slurm import one_node_slurm, why_not

pytestmark = [
    pytest.mark.slow,
    pytest.mark.slurm,
    pytest.mark.skipif(bool(why_not()), reason=f"no Slurm: {why_not()}"),
]

ROOT = Path(__file__).parents[2]

LONG, SHORT = 1000, 50
# Two that are long enough to be preempted, at some hundred steps a second; then one that diverges.
SWEEP = f"""[
    *grid({{"num_steps": [{LONG}], "seed": (0, 1)}}),
    {{"optimizer.learning_rate": 1e30}},
    {{"seed": 2}},
]"""
FAILING = "optimizer.learning_rate=1e+30"
LENGTHS = {f"num_steps={LONG},seed={seed}": LONG for seed in (0, 1)} | {
    FAILING: SHORT,
    "seed=2": SHORT,
}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A running Slurm that commands find."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    with one_node_slurm(folder):
        yield


def running_jobs():
    done = subprocess.run(
        ["squeue", "--array", "--noheader", "--partition=main", "--states=running", "--format=%i"],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


def test_a_sweep_of_four_two_at_a_time_with_a_failure_and_a_preemption(slurm, tiny_run, tmp_path):
    data = tiny_run[0].data.data_dir
    (tmp_path / "config.py").write_text(CONFIG.format(data=data, num_steps=SHORT, sweep=SWEEP))
    workdir = tmp_path / "sweep"
    sweep = subprocess.Popen(
        [
            *(sys.executable, "-m", "experiments.sweep", f"--config={tmp_path / 'config.py'}"),
            *(f"--workdir={workdir}", "--executor=slurm", "--partition=main", "--time=30"),
            *("--max_parallel=2", "--cpus=1"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    most, preempted, deadline = 0, None, time.monotonic() + 240
    while sweep.poll() is None:
        assert time.monotonic() < deadline
        running = running_jobs()
        most = max(most, len(running))
        if preempted is None:
            started = [name for name in LENGTHS if "batch/loss" in read(workdir / name)]
            if len(running) == 2 and started:
                # Takes three of the four cores for a second: one of the two running has to go.
                preempted = running
                subprocess.run(
                    ["sbatch", "--partition=urgent", "--cpus-per-task=3", "--wrap=sleep 1"],
                    check=True,
                    capture_output=True,
                    cwd=tmp_path,
                )
        time.sleep(0.2)
    stdout, stderr = sweep.communicate()
    assert (sweep.returncode, stderr) == (1, ""), stdout
    assert most == 2
    table = stdout.splitlines()[-5:]
    assert {row.split()[0]: row.split()[1] for row in table[:4]} == {
        name: "failed" if name == FAILING else "done" for name in LENGTHS
    }
    assert "the loss is" in table[2]
    assert table[4] == "4 members: 3 done, 1 failed"
    logs = [(workdir / "logs" / f"{name}.log").read_text() for name in LENGTHS]
    (requeued,) = (log for log in logs if "resuming from the checkpoint of step" in log)
    assert requeued.count("=== started") == 2
    step = int(re.search(r"resuming from the checkpoint of step (\d+)", requeued).group(1))
    assert 0 < step < LONG
    for name in LENGTHS.keys() - {FAILING}:
        results = json.loads((workdir / name / "results.json").read_text())
        assert results["step"] == LENGTHS[name]


def read(run):
    metrics = run / "metrics.jsonl"
    return metrics.read_text() if metrics.exists() else ""
