"""What sweeps make of Slurm's answers, without a Slurm."""

import fcntl
import os
import signal
import sys

import pytest

from gc_nc.errors import InputError
from gc_nc.runs.configuration import default_config
from gc_nc.sweeps import grid, slurm_executor
from gc_nc.sweeps.members import make_members
from gc_nc.sweeps.slurm_executor import SlurmOptions, run_on_slurm
from gc_nc.sweeps.sweep_directory import log_path, open_sweep, run_path
from gc_nc.sweeps.sweep_status import Outcome, State, start_line

pytest.importorskip("submitit")


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Two members whose jobs are 7_0 and 7_1, and a function that waits for them.

    It is given squeue's answers, one a question; they may be functions that do something first.
    """
    members = make_members(default_config(), grid({"seed": (0, 1)}))
    open_sweep(tmp_path, members)
    (tmp_path / "slurm").mkdir()

    def wait(*answers):
        left = iter(answers)

        def states():
            answer = next(left)
            return answer() if callable(answer) else answer

        monkeypatch.setattr(slurm_executor, "_job_states", states)
        monkeypatch.setattr(slurm_executor, "_POLL_SECONDS", (0.0, 0.0))
        outcomes, number = slurm_executor._wait(
            members, tmp_path, {"seed=0": "7_0", "seed=1": "7_1"}
        )
        return [outcomes[member.name] for member in members], number

    wait.workdir = tmp_path
    return wait


def finish(workdir, seed):
    run = run_path(workdir, f"seed={seed}")
    run.mkdir(exist_ok=True)
    (run / "results.json").write_text("{}")


def log_of(workdir, seed, text):
    log_path(workdir, f"seed={seed}").write_text(text)


def test_jobs_end_by_their_results_or_by_being_gone_for_good(sweep, capsys):
    both = {"7_0": "RUNNING", "7_1": "PENDING"}
    log_of(sweep.workdir, 1, start_line("in job 7_1 on node") + "error: the loss became nan\n")

    def first_is_done():
        finish(sweep.workdir, 0)
        return {"7_1": "RUNNING"}

    # A job that is requeued is in no list for a moment, and Slurm may not answer.
    answers = [both, {"7_0": "RUNNING"}, None, both, {}, {}, both, first_is_done, {}, {}, {}]
    assert sweep(*answers) == (
        [Outcome(State.DONE), Outcome(State.FAILED, "the loss became nan")],
        None,
    )
    assert "waiting for jobs 7\n" in capsys.readouterr().out


def test_a_run_that_another_process_is_at_is_running_elsewhere(sweep):
    finish(sweep.workdir, 1)
    run = run_path(sweep.workdir, "seed=0")
    run.mkdir()
    with (run / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        outcomes, _ = sweep({}, {}, {})
    assert [outcome.state for outcome in outcomes] == [State.ELSEWHERE, State.DONE]


def test_a_signal_ends_the_waiting_and_says_what_goes_on(sweep, capsys):
    def interrupted():
        os.kill(os.getpid(), signal.SIGINT)
        return {"7_0": "RUNNING", "7_1": "PENDING"}

    before = signal.getsignal(signal.SIGINT)
    outcomes, number = sweep(interrupted)
    assert number == signal.SIGINT
    assert outcomes == [
        Outcome(State.RUNNING, "job 7_0 is running"),
        Outcome(State.PENDING, "job 7_1 is pending"),
    ]
    assert "the jobs continue; the same command waits for them" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is before


def test_a_slurm_that_never_answers_again_is_an_error(sweep, monkeypatch):
    monkeypatch.setattr(slurm_executor, "_UNREACHABLE_SECONDS", -1)
    with pytest.raises(RuntimeError, match="squeue has not answered"):
        sweep(None)


@pytest.mark.parametrize(
    ("log", "stderr", "why"),
    [
        ("in job 7_0 on a\nerror: a\n", "", "a"),
        # The log is of an earlier job.
        (
            "in job 6_0 on a\nerror: a\n",
            "srun: error: node: task 0: Killed\n",
            "srun: error: node: task 0: Killed",
        ),
        (
            "in job 7_0 on a\nstep 1\n",
            "slurmstepd: error: *** STEP 2.0 CANCELLED DUE TO JOB REQUEUE ***\n"
            "slurmstepd: error: *** STEP 2.0 CANCELLED DUE TO TIME LIMIT ***\n"
            "srun: error: node: task 0: Killed\n",
            "slurmstepd: error: *** STEP 2.0 CANCELLED DUE TO TIME LIMIT ***",
        ),
        ("in job 7_0 on a\nstep 1\n", "", "job 7_0 ended without results and without an error"),
        ("", "", "job 7_0 ended without results and without an error"),
    ],
)
def test_why_a_job_left_no_results(sweep, log, stderr, why):
    finish(sweep.workdir, 1)
    if log:
        where, _, rest = log.partition("\n")
        log_of(sweep.workdir, 0, start_line(where) + rest)
    if stderr:
        (sweep.workdir / "slurm" / "7_0_0_log.err").write_text(stderr)
    assert sweep({}, {}, {})[0][0] == Outcome(State.FAILED, why)


@pytest.mark.parametrize(
    ("number", "shown", "expected"),
    [
        (signal.SIGUSR2, "", True),
        (signal.SIGUSR1, "", True),
        (signal.SIGINT, "", False),
        (signal.SIGTERM, "JobState=RUNNING PreemptTime=2026-01-01T00:00:00", True),
        (signal.SIGTERM, "JobState=RUNNING PreemptTime=None", False),
        (signal.SIGTERM, "JobState=CANCELLED PreemptTime=2026-01-01T00:00:00", False),
        (signal.SIGTERM, "", False),
    ],
)
def test_which_signals_put_a_job_in_the_queue_again(tmp_path, monkeypatch, number, shown, expected):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho '{shown}'\n")
    scontrol.chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert slurm_executor._asks_to_requeue(number) is expected


@pytest.mark.parametrize(
    ("prepare", "name", "message"),
    [
        (
            lambda patch: patch.setitem(sys.modules, "submitit", None),
            "sweep",
            r"needs submitit; install it: .*gc_nc\[sweeps\]",
        ),
        (lambda patch: patch.setenv("PATH", ""), "sweep", "there is no Slurm here"),
        (lambda patch: None, "50%", "has a % in its path"),
    ],
)
def test_no_slurm_is_one_line(tmp_path, monkeypatch, prepare, name, message):
    prepare(monkeypatch)
    with pytest.raises(InputError, match=message):
        run_on_slurm([], tmp_path / name, SlurmOptions(), max_parallel=1, prepare=print)
