"""Starts that are killed at random moments end as a run that was left alone."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import reliability

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_2_kills(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "experiments.reliability",
            "--kills=2",
            f"--workdir={tmp_path / 'runs'}",
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["kills"] == 2
    assert summary["identical"] is True
    # The second kill comes after a checkpoint, so the next start goes on from one. Else this would
    # say of fresh starts alone that they are alike.
    assert summary["went_on_from_a_checkpoint"] >= 1, done.stdout


@pytest.mark.slow
def test_the_comparison_can_fail(tiny_run):
    from gc_nc.runs import loop

    config, workdir = tiny_run
    same, other = workdir.with_name("same"), workdir.with_name("other")
    loop.train(config, workdir)
    shutil.copytree(workdir, same)
    assert reliability.compare(workdir, same) == []
    log = same / "metrics.jsonl"
    log.write_text(log.read_text() + '{"step": 8, "train/accuracy": 0.5}\n')
    assert reliability.compare(workdir, same) == ["metrics.jsonl"]
    config.optimizer.l2 = float(np.nextafter(np.float32(1e-3), np.float32(1)))
    loop.train(config, other)
    assert any("kernel" in name for name in reliability.compare(workdir, other))
