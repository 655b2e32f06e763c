"""Runs the members of a sweep on this machine, each in a process of its own."""

import collections
import dataclasses
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from gc_nc.errors import InputError
from gc_nc.runs.run_directory import EXIT_IN_USE
from gc_nc.runs.signals import STOP_SIGNALS, noting_signals
from gc_nc.sweeps.members import Member
from gc_nc.sweeps.sweep_directory import in_use, is_done, log_path
from gc_nc.sweeps.sweep_status import (
    Outcome,
    State,
    SweepProgress,
    error_in,
    last_start,
    start_line,
)

_POLL_SECONDS = 0.1
# The time between checks of runs that other processes use, and between attempts to start such a run
# if its lock does not show that it is in use.
_LOOK_SECONDS = 1.0
_RETRY_SECONDS = 20.0


@dataclasses.dataclass(frozen=True)
class Slot:
    """A place for one member at a time.

    Attributes:
      cores: the cores that its process may use; None for all.
      gpus: the GPUs that it sees; None for all.
    """

    cores: frozenset[int] | None = None
    gpus: tuple[str, ...] | None = None


def make_slots(max_parallel: int, gpus: int) -> list[Slot]:
    """Divides the machine among members that run at once.

    Each member gets separate GPUs, or without GPUs separate cores. Otherwise XLA would run every
    member on all cores, which is slower than running one member after the other.

    Args:
      max_parallel: number of members at once, at least 1.
      gpus: number of GPUs for each member.

    Raises:
      InputError: the machine has fewer GPUs.
    """
    if gpus:
        there = _visible_gpus()
        if len(there) < max_parallel * gpus:
            raise InputError(
                f"--max_parallel={max_parallel} times --gpus={gpus} is more than the {len(there)}"
                " GPUs of this machine (CUDA_VISIBLE_DEVICES, nvidia-smi); lower one of them"
            )
        return [Slot(gpus=there[i * gpus : (i + 1) * gpus]) for i in range(max_parallel)]
    if max_parallel == 1 or not hasattr(os, "sched_getaffinity"):
        return [Slot()] * max_parallel
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // max_parallel)
    shares = [cores[i : i + share] for i in range(0, len(cores) - share + 1, share)]
    return [Slot(cores=frozenset(shares[i % len(shares)])) for i in range(max_parallel)]


def _visible_gpus() -> tuple[str, ...]:
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return tuple(filter(None, (name.strip() for name in named.split(","))))
    if shutil.which("nvidia-smi") is None:
        return ()
    # Not by JAX, which would start on the GPUs and keep their memory.
    done = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("GPU ")]
    return tuple(map(str, range(len(lines))))


def run_locally(
    members: Sequence[Member],
    workdir: Path,
    command: Callable[[Member], list[str]],
    slots: Sequence[Slot],
) -> tuple[dict[str, Outcome], int | None]:
    """Runs the members that are not done, one at a time in each slot.

    A member that fails does not stop the others. If another process is running a member, this waits
    for it. A signal (Ctrl-C, SIGTERM) is forwarded to the members, which save their state, and no
    more members are started.

    Args:
      members: members of a sweep that `open_sweep` has written.
      workdir: the sweep's directory.
      command: returns the command line of a member, which exits with 0 if the run is finished, with
        `EXIT_IN_USE` if another process is using it, and after a signal with 128 + its number.
      slots: slots from `make_slots`.

    Returns:
      The outcome of each member by name, and the number of the signal that stopped the sweep.
    """
    sweep = _LocalSweep(members, workdir, command, slots)
    try:
        return sweep.until_done()
    finally:
        sweep.close()


class _LocalSweep:
    def __init__(self, members, workdir, command, slots):
        self._workdir = workdir
        self._command = command
        self._slots = slots
        done = {member.name for member in members if is_done(workdir, member.name)}
        self._outcomes = {
            member.name: Outcome(State.DONE if member.name in done else State.PENDING)
            for member in members
        }
        self._waiting = collections.deque(m for m in members if m.name not in done)
        # Members that another process is running, and when each member was last started here.
        self._elsewhere: list[Member] = []
        self._tried: dict[str, float] = {}
        # Running members by the index of their slot.
        self._running: dict[int, tuple[Member, subprocess.Popen]] = {}
        self._signalled = False
        self._progress = SweepProgress(len(members), len(done))

    def until_done(self) -> tuple[dict[str, Outcome], int | None]:
        with noting_signals(self._progress.say) as received:
            forwarded = 0
            looked = time.monotonic()
            while True:
                for number in received[forwarded:]:
                    self._signalled = True
                    self._signal_members(number)
                forwarded = len(received)
                self._collect()
                if not received:
                    self._start()
                    if self._elsewhere and time.monotonic() - looked > _LOOK_SECONDS:
                        self._look_elsewhere()
                        looked = time.monotonic()
                idle = not (self._waiting or self._elsewhere)
                if not self._running and (idle or received):
                    return self._outcomes, received[0] if received else None
                time.sleep(_POLL_SECONDS)

    def close(self) -> None:
        """Makes members save if an error here left them running.

        Members that received a signal are saving already; a second one would stop them at once.
        """
        if not self._signalled:
            self._signal_members(signal.SIGTERM)
        self._progress.close()

    def _signal_members(self, number: int) -> None:
        for _, process in self._running.values():
            process.send_signal(number)

    def _start(self) -> None:
        for i, slot in enumerate(self._slots):
            while i not in self._running and self._waiting:
                member = self._waiting.popleft()
                if is_done(self._workdir, member.name):
                    self._finish(member, Outcome(State.DONE, "by another process"))
                elif in_use(self._workdir, member.name):
                    self._put_off(member)
                else:
                    self._start_member(member, i, slot)

    def _start_member(self, member: Member, i: int, slot: Slot) -> None:
        environment = dict(os.environ)
        if slot.gpus is not None:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(slot.gpus)
        self._tried[member.name] = time.monotonic()
        try:
            with log_path(self._workdir, member.name).open("a", encoding="utf-8") as log:
                log.write(start_line(f"by the sweep of process {os.getpid()}"))
                log.flush()
                process = subprocess.Popen(
                    self._command(member),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    # Otherwise the terminal also sends Ctrl-C to the members, and a second signal
                    # stops them at once.
                    start_new_session=True,
                )
        except OSError as error:
            self._finish(member, Outcome(State.FAILED, f"it could not be started: {error}"))
            return
        if slot.cores is not None:
            # This is long before JAX counts the cores and starts its threads.
            os.sched_setaffinity(process.pid, slot.cores)
        self._running[i] = (member, process)
        self._outcomes[member.name] = Outcome(State.RUNNING)

    def _collect(self) -> None:
        for i, (member, process) in list(self._running.items()):
            code = process.poll()
            if code is None:
                continue
            del self._running[i]
            if code == EXIT_IN_USE and not is_done(self._workdir, member.name):
                self._put_off(member)
            else:
                self._finish(member, self._outcome(member, code))

    def _outcome(self, member: Member, code: int) -> Outcome:
        if is_done(self._workdir, member.name):
            return Outcome(State.DONE)
        log = last_start(log_path(self._workdir, member.name).read_text("utf-8", "replace"))
        detail = error_in(log)
        number = code - 128 if code > 128 else -code
        if number in STOP_SIGNALS:
            return Outcome(State.STOPPED, detail or f"by {_signal_name(number)}")
        if code < 0:
            return Outcome(State.FAILED, f"killed by {_signal_name(number)}")
        return Outcome(State.FAILED, detail or f"exit code {code} and no error in its log")

    def _finish(self, member: Member, outcome: Outcome) -> None:
        self._outcomes[member.name] = outcome
        self._progress.finished(member.name, outcome)

    def _put_off(self, member: Member) -> None:
        self._elsewhere.append(member)
        self._outcomes[member.name] = Outcome(State.ELSEWHERE)

    def _look_elsewhere(self) -> None:
        """Queues the members that other processes no longer run."""
        still = []
        for member in self._elsewhere:
            tried = self._tried.get(member.name, -_RETRY_SECONDS)
            left = not in_use(self._workdir, member.name)
            if is_done(self._workdir, member.name) or (
                # If a member reports that it is in use but its lock is free, wait before trying it
                # again.
                left and time.monotonic() - tried > _RETRY_SECONDS
            ):
                self._waiting.append(member)
            else:
                still.append(member)
        self._elsewhere = still


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
