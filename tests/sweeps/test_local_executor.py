"""Many processes on one machine, with shell scripts in place of training."""

import fcntl
import os
import signal
import threading
import time

import pytest

from gc_nc.errors import InputError
from gc_nc.runs.configuration import default_config
from gc_nc.sweeps import grid, local_executor
from gc_nc.sweeps.local_executor import Slot, make_slots, run_locally
from gc_nc.sweeps.members import make_members
from gc_nc.sweeps.sweep_directory import config_path, log_path, open_sweep, run_path
from gc_nc.sweeps.sweep_status import Outcome, State

FINISH = "echo {} > $RUN/results.json"


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Runs scripts, by the seed of their members, as a sweep; gives outcomes by seed and signal."""
    monkeypatch.setattr(local_executor, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(local_executor, "_LOOK_SECONDS", 0.05)
    workdir = tmp_path / "sweep"

    def run(scripts, *, slots=1):
        members = make_members(default_config(), grid({"seed": range(len(scripts))}))
        open_sweep(workdir, members)

        def command(member):
            run, config = run_path(workdir, member.name), config_path(workdir, member.name)
            begin = f"RUN={run}; mkdir -p $RUN; cp {config} $RUN/config.json"
            return ["sh", "-c", f"{begin}; {scripts[member.config.seed]}"]

        slots = [Slot()] * slots if isinstance(slots, int) else slots
        outcomes, number = run_locally(members, workdir, command, slots)
        return [outcomes[member.name] for member in members], number

    run.workdir = workdir
    return run


def test_all_members_run_but_no_more_than_asked_at_once(sweep):
    events = sweep.workdir.with_name("events")
    script = f"echo 1 >> {events}; sleep 0.1; echo -1 >> {events}; {FINISH}"
    outcomes, number = sweep([script] * 6, slots=2)
    assert (outcomes, number) == ([Outcome(State.DONE)] * 6, None)
    running, most = 0, 0
    for change in events.read_text().split():
        running += int(change)
        most = max(most, running)
    assert (running, most) == (0, 2)


def test_a_failure_stops_no_other_and_only_what_is_missing_runs_again(sweep, capsys):
    started = sweep.workdir.with_name("started")
    fail = "echo error: the loss became nan >&2; echo more; exit 1"
    scripts = [f"echo {i} >> {started}; {fail if i in (0, 2) else FINISH}" for i in range(4)]
    scripts[2] = scripts[2].replace(fail, "exit 7")
    outcomes, _ = sweep(scripts, slots=2)
    assert outcomes == [
        Outcome(State.FAILED, "the loss became nan"),
        Outcome(State.DONE),
        Outcome(State.FAILED, "exit code 7 and no error in its log"),
        Outcome(State.DONE),
    ]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert any("failed: seed=0 (the loss became nan)" in line for line in lines)
    scripts[0] = scripts[1]
    started.write_text("")
    outcomes, _ = sweep(scripts)
    assert [outcome.state for outcome in outcomes] == [
        State.DONE,
        State.DONE,
        State.FAILED,
        State.DONE,
    ]
    assert started.read_text().split() == ["1", "2"]
    assert "2 of 4 were done before" in capsys.readouterr().out


def test_no_results_are_no_success_and_a_crash_is_named(sweep):
    outcomes, _ = sweep(["exit 0", "kill -SEGV $$", "kill -KILL $$", "exit 2"])
    assert outcomes == [
        Outcome(State.FAILED, "exit code 0 and no error in its log"),
        Outcome(State.FAILED, "killed by SIGSEGV"),
        Outcome(State.FAILED, "killed by SIGKILL"),
        Outcome(State.FAILED, "exit code 2 and no error in its log"),
    ]


def test_the_error_is_of_the_last_start(sweep):
    sweep(["echo error: first; exit 1"])
    outcomes, _ = sweep(["exit 1"])
    assert outcomes == [Outcome(State.FAILED, "exit code 1 and no error in its log")]
    log = log_path(sweep.workdir, "seed=0").read_text()
    assert log.count("=== started") == 2
    assert "error: first" in log


def test_a_command_that_cannot_be_started_is_a_failure(sweep, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no processes left")

    monkeypatch.setattr(local_executor.subprocess, "Popen", refuse)
    outcomes, _ = sweep([FINISH] * 2)
    assert outcomes == [Outcome(State.FAILED, "it could not be started: no processes left")] * 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_handed_on_and_nothing_more_starts(sweep, number):
    # Stops the sweep as soon as it waits for the signal itself.
    name = signal.Signals(number).name.removeprefix("SIG")
    caught = (
        f"trap 'echo error: stopped at step 3; exit {128 + number}' {name}; kill -{name} $PPID;"
        " while :; do sleep 0.02; done"
    )
    # Ignored already where the tests run in the background of a shell.
    before = signal.getsignal(signal.SIGINT)
    outcomes, stopped_by = sweep([FINISH, caught, FINISH])
    assert stopped_by == number
    assert outcomes == [
        Outcome(State.DONE),
        Outcome(State.STOPPED, "stopped at step 3"),
        Outcome(State.PENDING),
    ]
    assert signal.getsignal(signal.SIGINT) is before
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_before_members_handle_it(sweep):
    outcomes, stopped_by = sweep([f"kill -TERM $PPID; sleep 20; {FINISH}"])
    assert stopped_by == signal.SIGTERM
    assert outcomes == [Outcome(State.STOPPED, "by SIGTERM")]


@pytest.mark.parametrize("ends_well", [True, False])
def test_a_run_that_is_in_use_is_waited_for_and_taken_up_if_left(sweep, ends_well):
    started = sweep.workdir.with_name("started")
    run = run_path(sweep.workdir, "seed=0")

    def hold():
        with (run / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            ready.set()
            while not (started.exists() and "1" in started.read_text()):
                time.sleep(0.02)
            if ends_well:
                (run / "results.json").write_text("{}")

    sweep(["exit 1"])
    ready = threading.Event()
    holder = threading.Thread(target=hold, daemon=True)
    holder.start()
    ready.wait()
    outcomes, _ = sweep([f"echo {i} >> {started}; {FINISH}" for i in range(2)])
    assert [outcome.state for outcome in outcomes] == [State.DONE] * 2
    assert started.read_text().split() == (["1"] if ends_well else ["1", "0"])


def test_a_member_that_says_it_is_in_use_goes_to_the_end(sweep):
    started = sweep.workdir.with_name("started")
    run = run_path(sweep.workdir, "seed=0")
    scripts = [
        f"echo 0 >> {started}; exit 3",
        f"echo 1 >> {started}; echo {{}} > {run}/results.json; {FINISH}",
    ]
    outcomes, _ = sweep(scripts)
    assert outcomes == [Outcome(State.DONE, "by another process"), Outcome(State.DONE)]
    assert started.read_text().split() == ["0", "1"]


def test_slots_share_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 4, 5, 6}, raising=False)
    assert make_slots(1, 0) == [Slot()]
    assert make_slots(2, 0) == [Slot(frozenset({0, 1})), Slot(frozenset({4, 5}))]
    assert [len(slot.cores) for slot in make_slots(7, 0)] == [1] * 7
    assert {core for slot in make_slots(7, 0) for core in slot.cores} == {0, 1, 4, 5, 6}


def test_slots_have_gpus_of_their_own(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3, 5,7,8")
    assert make_slots(2, 2) == [Slot(gpus=("2", "3")), Slot(gpus=("5", "7"))]
    with pytest.raises(InputError, match=r"max_parallel=3 times --gpus=2 is more than the 5 GPUs"):
        make_slots(3, 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(InputError, match="more than the 0 GPUs"):
        make_slots(1, 1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="more than the 0 GPUs"):
        make_slots(1, 1)


def test_members_run_in_their_slots(sweep):
    core = min(os.sched_getaffinity(0))
    slots = [Slot(frozenset({core})), Slot(gpus=("3", "5"))]
    seen = "sleep 0.2; grep Cpus_allowed_list /proc/self/status; echo gpus $CUDA_VISIBLE_DEVICES"
    sweep([f"{seen}; {FINISH}"] * 2, slots=slots)
    first, second = (log_path(sweep.workdir, f"seed={i}").read_text() for i in range(2))
    assert f"Cpus_allowed_list:\t{core}\n" in first
    assert "gpus 3,5\n" in second
