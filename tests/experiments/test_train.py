"""The launcher as a user meets it: overrides, mistakes, exit codes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import launcher

ROOT = Path(__file__).parents[2]


def command(*arguments):
    return [sys.executable, "-m", "experiments.train", *arguments]


def run(*arguments, env=None):
    return subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **(env or {})},
    )


def tiny_arguments(tiny_run, *overrides):
    """The tiny run as overrides of the digits config."""
    config, workdir = tiny_run
    return [
        "--config=experiments/configs/digits.py",
        f"--workdir={workdir}",
        "--config.data.source=npz",
        f"--config.data.data_dir={config.data.data_dir}",
        "--config.model.name=mlp",
        "--config.model.width=0.02",
        "--config.batch_size=2",
        "--config.num_steps=8",
        *overrides,
    ]


DIGITS = "--config=experiments/configs/digits.py"


# More overrides are in test_overrides.py, in process.
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config is missing"),
        ([DIGITS], "--workdir is missing"),
        ([DIGITS, "--workdir=x", "extra"], "unexpected argument 'extra'"),
        (["--config=missing.py", "--workdir=x"], "missing.py"),
        (
            [DIGITS, "--workdir=x", "--config.learning_rate=1"],
            "config.learning_rate is not a key of this config; did you mean"
            " config.optimizer.learning_rate?",
        ),
        ([DIGITS, "--workdir=x", "--config.num_steps=-1"], "config.num_steps=-1 must be at least"),
        ([DIGITS, "--wrokdir=x"], "wrokdir"),
        (["--config=setup.cfg", "--workdir=x"], "setup.cfg"),
        ([DIGITS, "--workdir=setup.cfg"], "is not a folder"),
        (
            [DIGITS, "--workdir=x", "--compilation_cache_dir=setup.cfg"],
            "compilation cache setup.cfg cannot be made",
        ),
        (
            [DIGITS, "--workdir=x", "--config.data.source=tfds"],
            "needs a set: set --config.data.name",
        ),
        (
            [
                *(DIGITS, "--workdir=x", "--config.data.source=tfds", "--config.data.name=cifar10"),
                "--config.data.data_dir=docs",
            ],
            "no prepared cifar10:3.0.2 in docs (it contains no version); prepare it with: python -m"
            " experiments.prepare --dataset=cifar10 --data_dir=docs",
        ),
    ],
)
def test_r7_r8_a_mistake_is_one_line_and_exit_code_2(run_command, arguments, message):
    # The first as a user gives it, imports and all.
    done = run_command("experiments.train", *arguments) if arguments else run()
    assert done.returncode == launcher.EXIT_BAD_INPUT
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert not (ROOT / "x").exists()


@pytest.mark.slow
def test_r7_overrides_reach_the_run_and_r6_half_a_slurm_shell_starts(tiny_run, run_command):
    _, workdir = tiny_run
    arguments = tiny_arguments(
        tiny_run,
        "--config.optimizer.learning_rate=1",
        "--config.stop_after_epochs_at_full_accuracy=0.5",
        "--config.schedule.name=step",
        "--config.schedule.boundaries=(0.2,0.4)",
        "--config.model.batch_norm=true",
    )
    done = run(*arguments, env={"SLURM_JOB_ID": "7"})
    assert done.returncode == 0, done.stderr
    assert "finished at step" in done.stdout
    assert "geometric complexity" in done.stdout
    # Nothing but the run itself speaks.
    assert done.stderr == ""
    config = json.loads((workdir / "config.json").read_text())
    assert config["optimizer"]["learning_rate"] == 1.0
    assert config["stop_after_epochs_at_full_accuracy"] == 0.5
    assert config["schedule"]["boundaries"] == [0.2, 0.4]
    assert config["model"]["batch_norm"] is True
    again = run_command("experiments.train", *arguments)
    assert again.returncode == 0
    assert again.stdout.splitlines() == done.stdout.splitlines()[-len(again.stdout.splitlines()) :]


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(tiny_run):
    _, workdir = tiny_run
    arguments = tiny_arguments(
        tiny_run, "--config.num_steps=1000000", "--config.checkpoint.every_steps=0"
    )
    process = subprocess.Popen(
        command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    metrics = workdir / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and "batch/loss" in metrics.read_text()):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130
    assert stderr.startswith("error: stopped at step")
    assert "the same command resumes from there" in stderr
    step = int(stderr.split("step ")[1].split(";")[0])
    assert (workdir / "checkpoints" / str(step)).is_dir()


@pytest.mark.parametrize(
    "name",
    [path.stem for path in sorted(ROOT.glob("experiments/configs/[!_]*.py"))],
)
def test_configs_are_valid(name):
    import importlib

    from gc_nc.runs.configuration import check_config, default_config, flatten

    config = importlib.import_module(f"experiments.configs.{name}").get_config()
    check_config(config)
    assert flatten(config).keys() == flatten(default_config()).keys()
