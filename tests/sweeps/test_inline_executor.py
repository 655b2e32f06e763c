"""Members of a sweep one after another in one process: each as it would be alone."""

import os
import signal

import numpy as np
import pytest

from gc_nc.runs import loop, run_data, run_directory
from gc_nc.runs.progress import Progress
from gc_nc.sweeps import grid
from gc_nc.sweeps.inline_executor import count_programs, run_inline
from gc_nc.sweeps.members import make_members
from gc_nc.sweeps.sweep_directory import is_done, log_path, open_sweep, run_path
from gc_nc.sweeps.sweep_status import State


@pytest.fixture
def sweep(tiny_run):
    """(members, workdir) of three learning rates of the tiny run, the second of which diverges."""
    config, workdir = tiny_run
    config.num_steps, config.evaluation.every_steps = 4, 2
    config.checkpoint.every_steps = 0
    members = make_members(config, grid({"optimizer.learning_rate": [0.01, 1e30, 0.02]}))
    workdir = workdir.with_name("sweep")
    open_sweep(workdir, members)
    return members, workdir


def without_clock(workdir):
    return [
        {name: value for name, value in record.items() if "per_sec" not in name}
        for record in run_directory.read_records(workdir)
    ]


def test_each_member_is_what_it_is_alone_and_a_failure_stops_no_other(
    sweep, tmp_path, compilations, capsys
):
    members, workdir = sweep
    outcomes, number = run_inline(members, workdir)
    assert number is None
    states = [outcomes[member.name].state for member in members]
    assert states == [State.DONE, State.FAILED, State.DONE]
    failed = members[1].name
    assert "the loss" in outcomes[failed].detail or "the state" in outcomes[failed].detail
    assert "error: " in log_path(workdir, failed).read_text()
    assert "step 4/4" in log_path(workdir, members[2].name).read_text()
    assert f"failed: {failed}" in capsys.readouterr().out
    before = len(compilations)
    for member in (members[0], members[2]):
        alone = tmp_path / member.name
        loop.train(member.config, alone)
        run = run_path(workdir, member.name)
        assert without_clock(run) == without_clock(alone)
        for name in ("results.json", "config.json"):
            assert (run / name).read_bytes() == (alone / name).read_bytes()
        assert (run / "figures" / "run.png").exists()
    # Alone they needed nothing that the sweep had not compiled.
    assert len(compilations) == before
    # The same again does what is missing, and that alone.
    times = {
        path: path.stat().st_mtime_ns for path in run_path(workdir, members[0].name).rglob("*")
    }
    outcomes, _ = run_inline(members, workdir)
    assert outcomes[failed].state is State.FAILED
    assert times == {path: path.stat().st_mtime_ns for path in times}


def test_data_are_loaded_once_and_programs_compiled_once(sweep, compilations, monkeypatch):
    members, workdir = sweep
    loads, counts = [], []
    load = run_data.load_run_data
    monkeypatch.setattr(run_data, "load_run_data", lambda *a: loads.append(1) or load(*a))
    close = Progress.close
    monkeypatch.setattr(
        Progress, "close", lambda self: counts.append(len(compilations)) or close(self)
    )
    run_inline([members[0], members[2]], workdir)
    assert len(loads) == 1
    assert counts[0] == counts[1]


def test_a_signal_saves_the_member_and_the_same_call_resumes(sweep, monkeypatch):
    members, workdir = sweep
    advance, steps = Progress.advance, []

    def interrupt(self):
        advance(self)
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "advance", interrupt)
        outcomes, number = run_inline(members, workdir)
    assert number == signal.SIGTERM
    states = [outcomes[member.name].state for member in members]
    assert states == [State.STOPPED, State.PENDING, State.PENDING]
    assert not is_done(workdir, members[0].name)
    outcomes, number = run_inline(members, workdir)
    assert number is None
    assert outcomes[members[0].name].state is State.DONE
    assert (
        "resuming from the checkpoint of step 3" in log_path(workdir, members[0].name).read_text()
    )


def test_a_fault_of_the_program_has_its_traceback_in_the_log(sweep, monkeypatch):
    members, workdir = sweep

    def fail(config, *arguments, **options):
        raise AttributeError("a fault")

    monkeypatch.setattr(loop, "train", fail)
    outcomes, _ = run_inline(members[:1], workdir)
    assert outcomes[members[0].name] == (State.FAILED, "AttributeError: a fault")
    assert "Traceback" in log_path(workdir, members[0].name).read_text()


@pytest.mark.parametrize(
    ("varied", "expected"),
    [
        ({"seed": [0, 1], "optimizer.learning_rate": [0.1, 0.2]}, 1),
        ({"optimizer.l2": [0.0, 1e-4, 1e-3]}, 2),
        ({"gc_penalty.weight": [0.0, 1e-4, 1e-3]}, 2),
        ({"batch_size": [2, 4], "model.width": [0.05, 0.1]}, 4),
        ({"evaluation.gc_examples": [4, 6], "num_steps": [3, 4]}, 1),
    ],
)
def test_how_many_programs_a_sweep_compiles(tiny_run, varied, expected):
    config, _ = tiny_run
    config.optimizer.l2 = 0.0
    assert count_programs(make_members(config, grid(varied))) == expected
    assert np.prod([len(values) for values in varied.values()]) >= expected
