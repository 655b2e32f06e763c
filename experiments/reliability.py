"""Kills a run at random moments until it is done, and compares it with an unbroken one.

    python -m experiments.reliability --kills=100 --workdir=DIR [--seed=0] [--steps=100]
        [--signal=KILL|TERM]

The run is short, uses the embedded digits and saves every few steps, so that a kill often comes
while it starts, saves or ends. Starts are killed in two ways, by turns: after a random part of the
time that an unbroken run takes, or after up to a quarter of that time counted from the first
checkpoint that the start writes. A run that reaches its end is compared and another one begins,
until --kills starts were killed. Parameters, optimizer state and every record of metrics.jsonl
except clock readings must be those of the unbroken run, bit for bit. Prints one line for each start
and finally a JSON object. Exit code 1 means that something differs.
"""

import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from absl import flags

from experiments import launcher
from gc_nc.errors import InputError
from gc_nc.runs.run_directory import read_records

_KILLS = flags.DEFINE_integer("kills", 100, "Number of starts to kill.", lower_bound=1)
_WORKDIR = flags.DEFINE_string("workdir", None, "New folder for the runs.", allow_override=True)
_SEED = flags.DEFINE_integer("seed", 0, "Seeds the moments of the kills.", allow_override=True)
_STEPS = flags.DEFINE_integer("steps", 100, "Number of steps of the run.", lower_bound=1)
_SIGNAL = flags.DEFINE_enum("signal", "KILL", ["KILL", "TERM"], "Signal to kill with.")

_OVERRIDES = {
    "model.width": 0.05,
    "optimizer.momentum": 0.9,
    "evaluation.every_steps": 25,
    "evaluation.gc_examples": 8,
    "monitor.every_steps": 3,
    "log_every_steps": 2,
    "checkpoint.every_steps": 8,
}
_CLOCK = ("time", "per_sec", "seconds")


def main(argv: list[str]) -> int:
    """Runs both runs and compares them."""
    del argv
    if not _WORKDIR.value:
        raise InputError("--workdir is missing; name a new folder")
    root = Path(_WORKDIR.value).expanduser()
    if root.exists() and any(root.iterdir()):
        raise InputError(f"--workdir={root} is not empty; name a new folder")
    root.mkdir(parents=True, exist_ok=True)
    unbroken = root / "unbroken"
    for workdir in (unbroken, root / "timed"):
        # The second one finds all programs in the cache, as the starts to be killed do.
        begin = time.perf_counter()
        _start(workdir).communicate()
        whole = time.perf_counter() - begin
    print(f"an unbroken run takes {whole:.1f} s", flush=True)
    rng, went_on, differing, runs, kills = random.Random(_SEED.value), [], [], 0, 0
    while kills < _KILLS.value:
        runs += 1
        workdir, finished = root / f"killed{runs}", False
        while not finished:
            if kills < _KILLS.value:
                # By turns: most of the time of so short a run is its start.
                step, finished = _kill_once(workdir, rng, whole, kills % 2)
                kills += not finished
            else:
                step, finished = _left_alone(workdir), True
            went_on.append(step)
        differing += [f"{workdir.name}: {what}" for what in compare(unbroken, workdir)]
    summary = {
        "kills": kills,
        "runs": runs,
        "seconds_unbroken": round(whole, 2),
        "went_on_from_a_checkpoint": sum(step is not None for step in went_on),
        "identical": not differing,
        "differing": differing,
    }
    print(json.dumps(summary))
    return int(bool(differing))


def _left_alone(workdir: Path) -> int | None:
    """The step that a start went on from."""
    process = _start(workdir)
    output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"a start failed: {output[-2000:]}")
    step = _step_gone_on_from(output)
    print(f"{workdir.name}: from step {step}, left alone", flush=True)
    return step


def _kill_once(
    workdir: Path, rng: random.Random, whole: float, while_training: int
) -> tuple[int | None, bool]:
    """The step that a start went on from, and whether it finished before it was killed."""
    process = _start(workdir)
    if while_training:
        before = _saved_steps(workdir)
        while process.poll() is None and _saved_steps(workdir) == before:
            time.sleep(0.01)
    try:
        output, _ = process.communicate(
            timeout=rng.uniform(0, whole / (4 if while_training else 1))
        )
    except subprocess.TimeoutExpired:
        process.send_signal(signal.Signals[f"SIG{_SIGNAL.value}"])
        output, _ = process.communicate()
    if process.returncode > 0 and process.returncode != 128 + signal.SIGTERM:
        raise RuntimeError(f"a start failed: {output[-2000:]}")
    step = _step_gone_on_from(output)
    print(f"{workdir.name}: from step {step}, exit code {process.returncode}", flush=True)
    return step, process.returncode == 0


def _step_gone_on_from(output: str) -> int | None:
    found = re.search(r"resuming from the checkpoint of step (\d+)", output)
    return int(found.group(1)) if found else None


def _saved_steps(workdir: Path) -> list[str]:
    checkpoints = workdir / "checkpoints"
    if not checkpoints.is_dir():
        return []
    return sorted(path.name for path in checkpoints.iterdir() if path.name.isdecimal())


def _start(workdir: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "experiments.train",
            "--config=experiments/configs/digits.py",
            f"--workdir={workdir}",
            f"--config.num_steps={_STEPS.value}",
            *(f"--config.{key}={value}" for key, value in _OVERRIDES.items()),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def compare(unbroken: Path, killed: Path) -> list[str]:
    """What differs between two runs, bit for bit; [] if nothing does."""
    differing = []
    records = [
        [
            {name: value for name, value in record.items() if not any(c in name for c in _CLOCK)}
            for record in read_records(workdir)
        ]
        for workdir in (unbroken, killed)
    ]
    if records[0] != records[1]:
        differing.append("metrics.jsonl")
    states = [_last_state(workdir) for workdir in (unbroken, killed)]
    if states[0].keys() != states[1].keys():
        differing.append("the names of the state's arrays")
    differing += [
        name
        for name in states[0].keys() & states[1].keys()
        if not np.array_equal(states[0][name], states[1][name])
    ]
    return differing


def _last_state(workdir: Path) -> dict[str, np.ndarray]:
    import jax
    import orbax.checkpoint as ocp

    step = max(int(path.name) for path in (workdir / "checkpoints").iterdir())
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore((workdir / "checkpoints" / str(step) / "default").absolute())
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    } | {"step of the last checkpoint": np.asarray(step)}


if __name__ == "__main__":
    launcher.run(main)
