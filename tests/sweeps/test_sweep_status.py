"""What is said of members: errors out of their logs, the table, progress."""

import pytest

from gc_nc.sweeps import sweep_status
from gc_nc.sweeps.sweep_status import (
    Outcome,
    State,
    SweepProgress,
    error_in,
    last_start,
    outcome_table,
    start_line,
)

TRACEBACK = """step 1
Traceback (most recent call last):
  File "a.py", line 1, in f
    raise OSError
OSError: first

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "a.py", line 3, in g
    h()
    ^^^
ValueError: no such thing: x
--------------------
For simplicity, JAX has removed its internal frames from the traceback.
"""


@pytest.mark.parametrize(
    ("log", "error"),
    [
        ("", ""),
        ("step 1\nstep 2\n", ""),
        ("step 1\nerror: the loss became nan\n", "the loss became nan"),
        ("error: a\nerror: b\nleft over\n", "b"),
        (TRACEBACK, "ValueError: no such thing: x"),
        (TRACEBACK + "error: last\n", "last"),
        ("Traceback (most recent call last):\n  File cut sho", ""),
    ],
)
def test_the_last_error_of_a_log(log, error):
    assert error_in(log) == error


def test_the_last_start_of_a_log():
    assert last_start("nothing") == ""
    log = start_line("here") + "error: a\n" + start_line("there") + "step 1\n"
    assert last_start(log).endswith("there\nstep 1\n")
    assert error_in(last_start(log)) == ""


def test_the_table_has_a_row_a_member_and_counts():
    outcomes = {
        "seed=0": Outcome(State.DONE),
        "seed=10": Outcome(State.FAILED, "the loss became nan"),
        "seed=2": Outcome(State.PENDING),
        "seed=3": Outcome(State.DONE),
    }
    assert outcome_table(outcomes).splitlines() == [
        "seed=0   done",
        "seed=10  failed   the loss became nan",
        "seed=2   pending",
        "seed=3   done",
        "4 members: 2 done, 1 failed, 1 pending",
    ]


def test_progress_estimates_the_time_left_from_what_ran_now(monkeypatch, capsys):
    clock = iter([100.0, 130.0, 160.0, 175.0])
    monkeypatch.setattr(sweep_status.time, "monotonic", lambda: next(clock))
    progress = SweepProgress(5, 2)
    progress.finished("a", Outcome(State.DONE))
    progress.finished("b", Outcome(State.FAILED, "x"))
    progress.finished("c", Outcome(State.DONE))
    progress.close()
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        "2 of 5 were done before",
        "3/5 done: a, about 01:00 left",
        "4/5 failed: b (x), about 00:30 left",
        "5/5 done: c",
    ]
    # No bar in a pipe.
    assert captured.err == ""


def test_a_terminal_has_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sweep_status.sys.stderr, "isatty", lambda: True)
    progress = SweepProgress(2, 0)
    progress.finished("a", Outcome(State.DONE))
    progress.finished("b", Outcome(State.FAILED, "x"))
    progress.close()
    captured = capsys.readouterr()
    assert "2/2" in captured.err
    assert captured.out == "failed: b (x)\n"
