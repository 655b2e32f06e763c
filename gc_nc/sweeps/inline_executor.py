"""Runs the members of a sweep one after another in this process, which shares their costs.

Data are loaded and placed once, programs are compiled once, and pictures are drawn at the end.
"""

import collections
import contextlib
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from gc_nc.errors import InputError
from gc_nc.runs import loop
from gc_nc.runs.checkpoints import StorageError
from gc_nc.runs.configuration import flatten
from gc_nc.runs.run_data import LoadedData
from gc_nc.runs.run_directory import RunInUseError
from gc_nc.runs.run_figure import draw_finished_run, figure_path
from gc_nc.runs.signals import Interrupted, noting_signals
from gc_nc.sweeps.members import Member
from gc_nc.sweeps.sweep_directory import in_use, is_done, log_path, run_path
from gc_nc.sweeps.sweep_status import Outcome, State, SweepProgress, start_line

# The time between checks of runs that other processes use.
_LOOK_SECONDS = 1.0

#: Errors that their message explains; the log has the traceback of any other error.
_EXPLAINED = (InputError, RunInUseError, StorageError, loop.DivergedError)


def run_inline(
    members: Sequence[Member],
    workdir: Path,
    find_devices: Callable[[], Sequence[jax.Device]] = lambda: jax.local_devices()[:1],
) -> tuple[dict[str, Outcome], int | None]:
    """Runs the members that are not done, one after another in this process.

    Each member gives the same results as a separate `loop.train`. A member that fails does not stop
    the others. If another process is running a member, this waits for it. After a signal the member
    saves its state, and no more members are started.

    Args:
      members: members of a sweep that `open_sweep` has written.
      workdir: the sweep's directory.
      find_devices: returns the devices of every run; by default the first one of this process.

    Returns:
      The outcome of each member by name, and the number of the signal that stopped the sweep.
    """
    done = {member.name for member in members if is_done(workdir, member.name)}
    outcomes = {
        member.name: Outcome(State.DONE if member.name in done else State.PENDING)
        for member in members
    }
    waiting = collections.deque(member for member in members if member.name not in done)
    progress, data = SweepProgress(len(members), len(done)), LoadedData()
    elsewhere: list[Member] = []
    with contextlib.closing(progress), noting_signals(progress.say) as received:
        while (waiting or elsewhere) and not received:
            if not waiting:
                time.sleep(_LOOK_SECONDS)
                waiting.extend(elsewhere)
                elsewhere.clear()
                continue
            member = waiting.popleft()
            if in_use(workdir, member.name):
                outcomes[member.name] = Outcome(State.ELSEWHERE)
                elsewhere.append(member)
                continue
            outcome, number = train_member(member, workdir, find_devices, data)
            outcomes[member.name] = outcome
            progress.finished(member.name, outcome)
            if number is not None:
                return outcomes, number
        number = received[0] if received else None
    if number is None:
        for member in members:
            run = run_path(workdir, member.name)
            if is_done(workdir, member.name) and not figure_path(run).exists():
                draw_finished_run(run)
    return outcomes, number


def train_member(
    member: Member,
    workdir: Path,
    find_devices: Callable[[], Sequence[jax.Device]],
    data: LoadedData,
) -> tuple[Outcome, int | None]:
    """Trains one member with its output in its log; its picture is not drawn.

    Args:
      member: a member of the sweep.
      workdir: the sweep's directory.
      find_devices: returns the devices of the run.
      data: the data that members share.

    Returns:
      The outcome, and the number of the signal that stopped the member.
    """
    with log_path(workdir, member.name).open("a", encoding="utf-8") as log:
        log.write(start_line("in the process of its sweep"))
        log.flush()
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            try:
                run = run_path(workdir, member.name)
                loop.train(member.config, run, find_devices, data=data, draw=False)
            except Interrupted as stop:
                return Outcome(State.STOPPED, str(stop)), stop.signal_number
            except _EXPLAINED as error:
                print(f"error: {error}")
                return Outcome(State.FAILED, " ".join(str(error).split())), None
            except Exception as error:
                # An error of one run must not stop the others.
                traceback.print_exc()
                line = traceback.format_exception_only(error)[-1].strip()
                return Outcome(State.FAILED, line), None
    return Outcome(State.DONE), None


# Settings that a step takes as arguments, or on which no training program depends.
_SHARED = (
    *("seed", "optimizer.learning_rate", "num_steps", "log_every_steps", "on_divergence"),
    *("stop_at_train_loss", "stop_after_epochs_at_full_accuracy"),
)
_SHARED_GROUPS = ("evaluation.", "checkpoint.", "monitor.", "schedule.")
_TERMS = ("optimizer.l2", "optimizer.decoupled_decay", "gc_penalty.weight")


def count_programs(members: Sequence[Member]) -> int:
    """The largest number of training programs that the members compile together."""
    found = set()
    for member in members:
        flat = flatten(member.config)
        if flat["schedule.name"] == "constant" and not flat["schedule.warmup_steps"]:
            shared = {key for key in flat if key.startswith(_SHARED_GROUPS) or key in _SHARED}
        else:
            shared = {"seed", "optimizer.learning_rate"}
        kept = {
            key: bool(value) if key in _TERMS else repr(value)
            for key, value in flat.items()
            if key not in shared
        }
        found.add(tuple(sorted(kept.items())))
    return len(found)
