"""The cost of starting a sweep's members: all in one process compared with one process each.

    python -m experiments.benchmarks.sweeps [--json] [--benchmark_config=FILE.py:ARGUMENT]

The first row is the sweep of figure 1 at the scale demo (nine runs on scikit-learn's digits), with
--executor=inline and with --executor=local and a process for each core. They take turns; seconds
are medians of three, after one of each that fills the cache of compiled programs. The second row
compares the time from the end of a member to the first evaluation of the next one, in one process,
with half a second. The third compares the time from the start of experiments.train to the end of
its first evaluation with 5 seconds. It takes ten minutes.
"""

import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from absl import flags

from experiments import launcher
from experiments.benchmarks import reporting
from gc_nc.runs import loop
from gc_nc.sweeps.inline_executor import run_inline
from gc_nc.sweeps.members import make_members, read_sweep
from gc_nc.sweeps.sweep_directory import open_sweep
from gc_nc.sweeps.sweep_status import SweepProgress

_CONFIG = flags.DEFINE_string(
    "benchmark_config", "experiments/configs/figures/vgg13_cifar10.py:demo", "The sweep."
)
_REPETITIONS = 3
_GOAL_INLINE, _GOAL_GAP_SECONDS, _GOAL_START_SECONDS = 0.6, 0.5, 5.0


def main(argv: list[str]) -> None:
    """Times the sweeps, the gap between members and the start of a run."""
    del argv
    cores = len(os.sched_getaffinity(0))
    parallel = ("--executor=local", f"--max_parallel={cores}")
    for options in (("--executor=inline",), parallel):
        _sweep_seconds(*options)
    pairs = [
        (_sweep_seconds("--executor=inline"), _sweep_seconds(*parallel))
        for _ in range(_REPETITIONS)
    ]
    inline, local = map(median, zip(*pairs, strict=True))
    gap, start = median(_gaps()), median(_start_seconds() for _ in range(_REPETITIONS))
    reporting.print_rows(
        [
            reporting.Row(f"sweep inline against {cores} processes", inline, local, _GOAL_INLINE),
            reporting.Row("from a member to the next evaluation", gap, _GOAL_GAP_SECONDS, 1.0),
            reporting.Row("experiments.train to its first step", start, _GOAL_START_SECONDS, 1.0),
        ]
    )


def _sweep_seconds(*options: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        _run("experiments.sweep", f"--config={_CONFIG.value}", f"--workdir={folder}/s", *options)
        return time.perf_counter() - started


def _run(module: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", module, *arguments], check=True, capture_output=True)


def _gaps() -> list[float]:
    """Seconds from the end of each member of an inline sweep to the next one's first evaluation."""
    base, events = launcher.config_of_file(_CONFIG.value).lock(), []
    members = make_members(base, read_sweep(_CONFIG.value))
    evaluate, finished = loop.evaluate_split, SweepProgress.finished

    def noting_evaluation(*arguments, **options):
        events.append(("evaluation", time.perf_counter()))
        return evaluate(*arguments, **options)

    def noting_end(self, *arguments):
        events.append(("end", time.perf_counter()))
        finished(self, *arguments)

    with tempfile.TemporaryDirectory() as folder:
        open_sweep(Path(folder) / "s", members)
        loop.evaluate_split, SweepProgress.finished = noting_evaluation, noting_end
        try:
            run_inline(members, Path(folder) / "s")
        finally:
            loop.evaluate_split, SweepProgress.finished = evaluate, finished
    return [
        then - now
        for (kind, now), (next_kind, then) in itertools.pairwise(events)
        if (kind, next_kind) == ("end", "evaluation")
    ]


def _start_seconds() -> float:
    """Seconds from the start of a process to the end of the evaluation before its first step."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["experiments.train", "--config=experiments/configs/digits.py"]
        started = time.perf_counter()
        with subprocess.Popen(
            [sys.executable, "-m", *command, f"--workdir={folder}/run"],
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            next(line for line in process.stdout if line.startswith("step"))
            seconds = time.perf_counter() - started
            process.kill()
    return seconds


if __name__ == "__main__":
    launcher.run(main)
