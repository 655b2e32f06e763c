"""Sweeps as a user meets them: real runs, mistakes, two commands at once."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gc_nc.sweeps.members import make_members
from tests.sweeps.config_file import CONFIG

ROOT = Path(__file__).parents[2]


@pytest.fixture
def sweep_of(tmp_path, tiny_run):
    """Flags for a sweep of tiny runs; get_sweep's return value is given as text."""
    config, _ = tiny_run

    def command(sweep, *arguments):
        path = tmp_path / "sweep_config.py"
        path.write_text(CONFIG.format(data=config.data.data_dir, num_steps=4, sweep=sweep))
        return [f"--config={path}", f"--workdir={tmp_path / 'sweep'}", *arguments]

    command.workdir = tmp_path / "sweep"
    return command


def start(arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.sweep", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )


def test_sweeps_of_configs_are_valid():
    sizes = {}
    for path in sorted(ROOT.glob("experiments/configs/[!_]*.py")):
        module = importlib.import_module(f"experiments.configs.{path.stem}")
        if hasattr(module, "get_sweep"):
            sizes[path.stem] = len(make_members(module.get_config(), module.get_sweep()))
    assert sizes == {"digits": 12}


@pytest.mark.slow
def test_two_sweeps_at_once_share_the_members_and_a_failure_stops_none(sweep_of):
    command = sweep_of('[{"data.data_dir": "missing.npz"}] + grid({"seed": (1, 2)})')
    sweeps = start(command), start(command)
    for process in sweeps:
        stdout, stderr = process.communicate(timeout=300)
        assert (process.returncode, stderr) == (1, "")
        table = [row.split(maxsplit=2) for row in stdout.splitlines()[-4:]]
        assert table[0][:2] == ["data.data_dir=missing.npz", "failed"]
        assert "missing.npz does not exist" in table[0][2]
        assert table[1][:2] == ["seed=1", "done"]
        assert table[2][:2] == ["seed=2", "done"]
        assert table[3] == ["3", "members:", "2 done, 1 failed"]
    for seed in (1, 2):
        name = f"seed={seed}"
        config = json.loads((sweep_of.workdir / name / "config.json").read_text())
        assert config["seed"] == seed
        # One process trained it, once.
        log = (sweep_of.workdir / "logs" / f"{name}.log").read_text()
        assert log.count("step 4/4") == 1
    assert len(json.loads((sweep_of.workdir / "sweep.json").read_text())) == 3


@pytest.mark.parametrize(
    ("sweep", "arguments", "message"),
    [
        ('[{"seed": 1}, {"optimizer.lr": 1}]', [], "did you mean optimizer.l2?"),
        ('[{"seed": 1}]', ["--config.seed=2"], "the sweep varies seed"),
        ('[{"seed": 1}]', ["--max_parallel=0"], "--max_parallel=0"),
        ('[{"seed": 1}]', ["--partition=a"], "--partition is for --executor=slurm"),
        ("None", [], "must return overrides in a list, not None"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_starts(run_command, sweep_of, sweep, arguments, message):
    done = run_command("experiments.sweep", *sweep_of(sweep, *arguments))
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not sweep_of.workdir.exists()


@pytest.mark.slow
def test_ctrl_c_has_the_members_save(sweep_of):
    command = sweep_of(
        'grid({"seed": (0, 1, 2)})', "--max_parallel=2", "--config.num_steps=1000000"
    )
    process = start(command)
    logs = [sweep_of.workdir / f"seed={i}" / "metrics.jsonl" for i in range(2)]
    deadline = time.monotonic() + 120
    while not all(log.exists() and "batch/loss" in log.read_text() for log in logs):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    # As a terminal does, to the whole group.
    os.killpg(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert (process.returncode, stderr) == (130, "")
    table = stdout.splitlines()[-4:]
    for i in range(2):
        assert table[i].startswith(f"seed={i}  stopped  stopped at step ")
        step = int(table[i].split("step ")[1].split(";")[0])
        assert (sweep_of.workdir / f"seed={i}" / "checkpoints" / str(step)).is_dir()
    assert table[2:] == ["seed=2  pending", "3 members: 2 stopped, 1 pending"]
    assert not (sweep_of.workdir / "seed=2").exists()
