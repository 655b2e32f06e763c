"""Runs the members of a sweep as one array of jobs on a Slurm cluster, by submitit."""

import contextlib
import dataclasses
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from gc_nc.errors import InputError
from gc_nc.files import read_json_object, to_json, write_atomically
from gc_nc.runs import loop
from gc_nc.runs.checkpoints import StorageError
from gc_nc.runs.finished_run import read_config
from gc_nc.runs.run_directory import RunInUseError
from gc_nc.runs.signals import Interrupted, noting_signals
from gc_nc.sweeps.members import Member
from gc_nc.sweeps.sweep_directory import (
    config_path,
    in_use,
    is_done,
    log_path,
    run_path,
    sweep_lock,
)
from gc_nc.sweeps.sweep_status import (
    Outcome,
    State,
    SweepProgress,
    error_in,
    last_start,
    start_line,
)

# How long before its end a job is told, to save: so much, or a quarter of a short job's time.
_SIGNAL_SECONDS = 120
# A job that runs out of time goes on in another, from its checkpoint; without end would be a job
# that saves nothing in its time.
_MAX_TIMEOUTS = 100
# Between questions to Slurm, which many users ask: a twentieth of the time that they wait.
_POLL_SECONDS = (1.0, 30.0)
# A job that is requeued may be in no list for a moment, and files may come late over a network.
_GONE_AFTER = 3
_UNREACHABLE_SECONDS = 600


@dataclasses.dataclass(frozen=True)
class SlurmOptions:
    """What each job asks for; None leaves it to the cluster.

    Attributes:
      partition: to submit to.
      minutes: of time; a run that needs more goes on in another job.
      gpus: of each run.
      cpus: of each run.
      account: to charge.
      sbatch: other options of sbatch, without their dashes; True for one without a value.
    """

    partition: str | None = None
    minutes: int = 60
    gpus: int = 0
    cpus: int | None = None
    account: str | None = None
    sbatch: Mapping[str, str | bool] = dataclasses.field(default_factory=dict)


class MemberJob:
    """Trains a member inside its job; submitit pickles it.

    A job that Slurm preempts, or whose time is up, saves its state and is put in the queue again.
    """

    def __init__(self, workdir: Path, name: str, prepare: Callable[[], None]):
        """`prepare` is called first, where the job runs."""
        self._workdir = workdir
        self._name = name
        self._prepare = prepare

    def __call__(self) -> None:
        """Trains, or goes on training."""
        log = log_path(self._workdir, self._name)
        with _output_into(log):
            print(start_line(f"in job {_job_id()} on {os.uname().nodename}"), end="", flush=True)
            self._prepare()
            try:
                loop.train(
                    read_config(config_path(self._workdir, self._name)),
                    run_path(self._workdir, self._name),
                    jax.local_devices,
                )
            except Interrupted as stop:
                if _asks_to_requeue(stop.signal_number):
                    # The state is saved: submitit calls `checkpoint`, requeues the job and exits.
                    signal.raise_signal(_requeue_signal())
                _fail(str(stop), 128 + stop.signal_number)
            except (InputError, RunInUseError, StorageError, loop.DivergedError) as error:
                _fail(str(error), 1)

    def checkpoint(self):
        """What submitit runs when the job starts again: the same, which goes on."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def _fail(message: str, code: int) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(code)


def _job_id() -> str:
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    if array:
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]


def _requeue_signal() -> signal.Signals:
    """The one that submitit handles."""
    return signal.Signals["SIG" + os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2")]


def _asks_to_requeue(number: int) -> bool:
    """Whether a signal is not the end: a time limit's, or of a preemption.

    Where Slurm is not told to send the former before a preemption (preempt_send_user_signal), it
    sends SIGTERM as scancel does; and a job that then ends in its time of grace has failed for it.
    """
    if number != signal.SIGTERM:
        return number in (signal.SIGUSR1, signal.SIGUSR2)
    command = ["scontrol", "show", "job", os.environ["SLURM_JOB_ID"]]
    done = subprocess.run(command, capture_output=True, text=True)
    fields = dict(field.split("=", 1) for field in done.stdout.split() if "=" in field)
    # Of a job that scancel ends, or that Slurm already requeues, the state is another.
    running = fields.get("JobState") == "RUNNING"
    return running and fields.get("PreemptTime", "None") != "None"


@contextlib.contextmanager
def _output_into(path: Path) -> Iterator[None]:
    """Has all output of this process appended to a file, from here to its end."""
    with path.open("a", encoding="utf-8") as file:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
        yield


def run_on_slurm(
    members: Sequence[Member],
    workdir: Path,
    options: SlurmOptions,
    *,
    max_parallel: int,
    prepare: Callable[[], None],
) -> tuple[dict[str, Outcome], int | None]:
    """Submits the members that are neither done nor in a job, and waits for all.

    A member that fails does not stop the others. A signal (Ctrl-C, SIGTERM) ends the waiting: the
    jobs go on.

    Args:
      members: of a sweep that `open_sweep` has written.
      workdir: of the sweep, on a file system that the nodes share.
      options: of the jobs.
      max_parallel: jobs at once.
      prepare: called first in each job; it must be importable there.

    Returns:
      How each member fares by its name, and the number of the signal that ended the waiting.

    Raises:
      InputError: no Slurm or no submitit here, or Slurm refuses the jobs.
    """
    workdir = workdir.absolute()
    executor = _executor(workdir, options, max_parallel)
    jobs = _submit(members, workdir, executor, prepare)
    return _wait(members, workdir, jobs)


def _executor(workdir: Path, options: SlurmOptions, max_parallel: int) -> Any:
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise InputError(
            f"--executor=slurm needs {error.name}; install it: pip install 'gc_nc[sweeps]'"
        ) from error
    if "%" in str(workdir):
        raise InputError(f"workdir {workdir} has a % in its path, which Slurm takes for a pattern")
    try:
        executor = submitit.AutoExecutor(
            workdir / "slurm", cluster="slurm", slurm_max_num_timeout=_MAX_TIMEOUTS
        )
    except RuntimeError as error:
        raise InputError(
            "--executor=slurm: there is no Slurm here (srun is not on PATH); run it on a login node"
        ) from error
    executor.update_parameters(
        name=workdir.name,
        timeout_min=options.minutes,
        cpus_per_task=options.cpus,
        gpus_per_node=options.gpus or None,
        slurm_partition=options.partition,
        slurm_account=options.account,
        slurm_array_parallelism=max_parallel,
        slurm_signal_delay_s=min(_SIGNAL_SECONDS, 15 * options.minutes),
        # Slurm's own requeueing, after a failure of the node, is off on some clusters.
        slurm_additional_parameters={"requeue": True, **options.sbatch},
    )
    return executor


def _submit(
    members: Sequence[Member], workdir: Path, executor: Any, prepare: Callable[[], None]
) -> dict[str, str]:
    """Job ids by member, of those that were submitted now or before."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    listing = workdir / "slurm" / "jobs.json"
    listing.parent.mkdir(exist_ok=True)
    # Another sweep in the same directory does not submit them too.
    with sweep_lock(workdir):
        jobs = read_json_object(listing) if listing.exists() else {}
        alive = _job_states()
        if alive is None:
            raise InputError("--executor=slurm: squeue does not answer; is Slurm running?")
        missing = [
            member
            for member in members
            if not is_done(workdir, member.name) and jobs.get(member.name) not in alive
        ]
        if missing:
            calls = [MemberJob(workdir, member.name, prepare) for member in missing]
            try:
                # submitit prints what sbatch says besides raising it.
                with contextlib.redirect_stderr(io.StringIO()):
                    submitted = executor.submit_array(calls)
            except (FailedJobError, FailedSubmissionError) as error:
                raise InputError(f"sbatch refused the jobs: {error}") from error
            jobs |= {m.name: job.job_id for m, job in zip(missing, submitted, strict=True)}
            write_atomically(listing, to_json(jobs))
    return {member.name: jobs[member.name] for member in members if member.name in jobs}


def _job_states() -> dict[str, str] | None:
    """States of the user's jobs that are waiting or running, by id; None if Slurm fails to say."""
    command = ["squeue", "--me", "--array", "--noheader", "--format=%i %T"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return None
    return dict(line.split() for line in done.stdout.splitlines())


def _wait(
    members: Sequence[Member], workdir: Path, jobs: Mapping[str, str]
) -> tuple[dict[str, Outcome], int | None]:
    done = {member.name for member in members if is_done(workdir, member.name)}
    outcomes = {m.name: Outcome(State.DONE if m.name in done else State.PENDING) for m in members}
    left = [member.name for member in members if member.name not in done]
    gone = dict.fromkeys(left, 0)
    progress = SweepProgress(len(members), len(done))
    if left:
        progress.say(f"waiting for jobs {_array_ids(jobs, left)}")
    started = answered = time.monotonic()
    with contextlib.closing(progress), noting_signals(lambda line: None) as received:
        while left and not received:
            states = _job_states()
            now = time.monotonic()
            if states is not None:
                answered = now
            elif now - answered > _UNREACHABLE_SECONDS:
                raise RuntimeError(f"squeue has not answered for {_UNREACHABLE_SECONDS} s")
            for name in list(left):
                if is_done(workdir, name):
                    outcomes[name] = Outcome(State.DONE)
                elif states is None:
                    continue
                elif jobs[name] in states:
                    gone[name] = 0
                    word = states[jobs[name]]
                    state = State.PENDING if word == "PENDING" else State.RUNNING
                    outcomes[name] = Outcome(state, f"job {jobs[name]} is {word.lower()}")
                    continue
                else:
                    gone[name] += 1
                    if gone[name] < _GONE_AFTER:
                        continue
                    state = State.ELSEWHERE if in_use(workdir, name) else State.FAILED
                    outcomes[name] = Outcome(state, _why(workdir, name, jobs[name]))
                left.remove(name)
                progress.finished(name, outcomes[name])
            if left:
                least, most = _POLL_SECONDS
                _sleep(min(most, max(least, (now - started) / 20)), received)
    if received:
        print(
            "the jobs go on; the same command waits for them, and this ends them: scancel"
            f" {_array_ids(jobs, left)}"
        )
    return outcomes, received[0] if received else None


def _array_ids(jobs: Mapping[str, str], names: Sequence[str]) -> str:
    return " ".join(sorted({jobs[name].partition("_")[0] for name in names}))


def _sleep(seconds: float, received: Sequence[int]) -> None:
    """Sleeps, or until a signal comes."""
    end = time.monotonic() + seconds
    while not received and (left := end - time.monotonic()) > 0:
        time.sleep(min(left, 0.2))


def _why(workdir: Path, name: str, job: str) -> str:
    """Why a job left no results."""
    log = log_path(workdir, name)
    last = last_start(log.read_text("utf-8", "replace")) if log.exists() else ""
    # An earlier job's start says nothing of this one.
    if f" in job {job} on " in last.partition("\n")[0] and (error := error_in(last)):
        return error
    # What ended before or beside training: imports, a limit of memory or of time, scancel. Slurm's
    # own word says more than what came of it.
    stderr = workdir / "slurm" / f"{job}_0_log.err"
    lines = stderr.read_text("utf-8", "replace").splitlines() if stderr.exists() else []
    errors = [line for line in lines if "error" in line.lower() and "JOB REQUEUE" not in line]
    slurm_errors = [line for line in errors if line.startswith("slurmstepd")]
    for found in (slurm_errors, errors):
        if found:
            return found[-1]
    return f"job {job} ended without results and without an error"
