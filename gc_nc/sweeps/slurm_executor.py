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

# A job is told to save this long before its end, or a quarter of its time if that is shorter.
_SIGNAL_SECONDS = 120
# A job that runs out of time resumes from its checkpoint in another job. The limit ends jobs that
# never save within their time.
_MAX_TIMEOUTS = 100
# Slurm has many users, so it is asked after a twentieth of the time waited, within these limits.
_POLL_SECONDS = (1.0, 30.0)
# A requeued job may be missing from squeue for a moment, and network file systems may lag behind.
_GONE_AFTER = 3
_UNREACHABLE_SECONDS = 600


@dataclasses.dataclass(frozen=True)
class SlurmOptions:
    """The resources that each job requests; None leaves the choice to the cluster.

    Attributes:
      partition: the partition to submit to.
      minutes: the time limit of a job; a run that needs more resumes in another job.
      gpus: number of GPUs for each run.
      cpus: number of CPUs for each run.
      account: the account to charge.
      sbatch: other options of sbatch, without their dashes; True for an option without a value.
    """

    partition: str | None = None
    minutes: int = 60
    gpus: int = 0
    cpus: int | None = None
    account: str | None = None
    sbatch: Mapping[str, str | bool] = dataclasses.field(default_factory=dict)


class MemberJob:
    """Trains a member inside its job; submitit pickles it.

    A job that Slurm preempts, or whose time is up, saves its state and is queued again.
    """

    def __init__(self, workdir: Path, name: str, prepare: Callable[[], None]):
        """`prepare` is called first, on the node where the job runs."""
        self._workdir = workdir
        self._name = name
        self._prepare = prepare

    def __call__(self) -> None:
        """Trains the member, or resumes its training."""
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
        """Tells submitit to run the same object when the job starts again; training resumes."""
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
    """The signal that submitit handles."""
    return signal.Signals["SIG" + os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2")]


def _asks_to_requeue(number: int) -> bool:
    """Whether a signal announces a time limit or a preemption, after which the job must resume.

    Unless Slurm is configured to send the time limit's signal before a preemption
    (preempt_send_user_signal), it sends SIGTERM, as scancel does. It counts a job that then ends
    within its grace time as failed.
    """
    if number != signal.SIGTERM:
        return number in (signal.SIGUSR1, signal.SIGUSR2)
    command = ["scontrol", "show", "job", os.environ["SLURM_JOB_ID"]]
    done = subprocess.run(command, capture_output=True, text=True)
    fields = dict(field.split("=", 1) for field in done.stdout.split() if "=" in field)
    # A job that scancel ends, or that Slurm is requeueing already, has another state.
    running = fields.get("JobState") == "RUNNING"
    return running and fields.get("PreemptTime", "None") != "None"


@contextlib.contextmanager
def _output_into(path: Path) -> Iterator[None]:
    """Appends all output of this process to a file, from here until the process ends."""
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
    """Submits the members that are neither done nor in a job, and waits for all members.

    A member that fails does not stop the others. A signal (Ctrl-C, SIGTERM) ends the waiting, but
    the jobs continue.

    Args:
      members: members of a sweep that `open_sweep` has written.
      workdir: the sweep's directory, on a file system that the nodes share.
      options: options of the jobs.
      max_parallel: number of jobs at once.
      prepare: called first in each job, where it must be importable.

    Returns:
      The outcome of each member by name, and the number of the signal that ended the waiting.

    Raises:
      InputError: Slurm or submitit is not installed here, or Slurm refuses the jobs.
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
        # Some clusters turn off Slurm's own requeueing after a failure of a node.
        slurm_additional_parameters={"requeue": True, **options.sbatch},
    )
    return executor


def _submit(
    members: Sequence[Member], workdir: Path, executor: Any, prepare: Callable[[], None]
) -> dict[str, str]:
    """Submits what is missing, and returns the job ids of all members that have been submitted."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    listing = workdir / "slurm" / "jobs.json"
    listing.parent.mkdir(exist_ok=True)
    # Locked, so that another sweep in the same directory does not submit them too.
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
                # submitit not only raises what sbatch says but also prints it.
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
            "the jobs continue; the same command waits for them, and this ends them: scancel"
            f" {_array_ids(jobs, left)}"
        )
    return outcomes, received[0] if received else None


def _array_ids(jobs: Mapping[str, str], names: Sequence[str]) -> str:
    return " ".join(sorted({jobs[name].partition("_")[0] for name in names}))


def _sleep(seconds: float, received: Sequence[int]) -> None:
    """Sleeps, but returns early if a signal arrives."""
    end = time.monotonic() + seconds
    while not received and (left := end - time.monotonic()) > 0:
        time.sleep(min(left, 0.2))


def _why(workdir: Path, name: str, job: str) -> str:
    """Why a job left no results."""
    log = log_path(workdir, name)
    last = last_start(log.read_text("utf-8", "replace")) if log.exists() else ""
    # The log may end with an earlier job's start, which says nothing about this job.
    if f" in job {job} on " in last.partition("\n")[0] and (error := error_in(last)):
        return error
    # Errors outside training: imports, a limit of memory or time, scancel. Slurm's own message says
    # more than the errors that follow from it.
    stderr = workdir / "slurm" / f"{job}_0_log.err"
    lines = stderr.read_text("utf-8", "replace").splitlines() if stderr.exists() else []
    errors = [line for line in lines if "error" in line.lower() and "JOB REQUEUE" not in line]
    slurm_errors = [line for line in errors if line.startswith("slurmstepd")]
    for found in (slurm_errors, errors):
        if found:
            return found[-1]
    return f"job {job} ended without results and without an error"
