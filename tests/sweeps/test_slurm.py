"""Sweeps on a real Slurm of one node: parallelism, a failure, a preemption."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.sweeps.one_node_slurm import one_node_slurm, why_not

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(why_not()), reason=f"no Slurm: {why_not()}"),
]

ROOT = Path(__file__).parents[2]

# The third diverges at its first step; the others are long enough to be preempted, at some hundred
# steps a second.
CONFIG = """
from gc_nc.sweeps import grid
from gc_nc.training.configuration import default_config

def get_config():
    config = default_config()
    config.model.width = 0.02
    config.batch_size = 2
    config.num_steps = {num_steps}
    config.evaluation.every_steps = 0
    config.evaluation.gc_examples = 8
    config.monitor.every_steps = 0
    config.log_every_steps = 20
    config.checkpoint.every_steps = 0
    return config

def get_sweep():
    return grid({{"optimizer.learning_rate": (0.01, 0.02, 1e30, 0.03)}})
"""

NAMES = [f"optimizer.learning_rate={rate}" for rate in (0.01, 0.02, 1e30, 0.03)]


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


def test_a_sweep_of_four_two_at_a_time_with_a_failure_and_a_preemption(slurm, tmp_path):
    (tmp_path / "config.py").write_text(CONFIG.format(num_steps=1500))
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
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    most, preempted, deadline = 0, None, time.monotonic() + 240
    while sweep.poll() is None:
        assert time.monotonic() < deadline
        running = running_jobs()
        most = max(most, len(running))
        if preempted is None:
            started = [name for name in NAMES if "batch/loss" in read(workdir / name)]
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
    assert [row.split()[:2] for row in table[:4]] == [
        [name, "failed" if "1e+30" in name else "done"] for name in NAMES
    ]
    assert "the loss became" in table[2]
    assert table[4] == "4 members: 3 done, 1 failed"
    logs = [(workdir / "logs" / f"{name}.log").read_text() for name in NAMES]
    requeued = [log for log in logs if "going on from the checkpoint of step" in log]
    assert len(requeued) == 1
    assert requeued[0].count("=== started") == 2
    step = int(re.search(r"going on from the checkpoint of step (\d+)", requeued[0]).group(1))
    assert 0 < step < 1500
    for name in set(NAMES) - {NAMES[2]}:
        assert json.loads((workdir / name / "results.json").read_text())["step"] == 1500


def read(run):
    metrics = run / "metrics.jsonl"
    return metrics.read_text() if metrics.exists() else ""
