"""Whether this process is one of several that share a run, and how they find each other."""

import os
from collections.abc import Mapping

import jax

from gc_nc.errors import InputError

DISTRIBUTED = ("auto", "yes", "no")


def join_processes(
    distributed: str = "auto",
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Joins the processes of a run by `jax.distributed`, before anything else uses JAX.

    Args:
      distributed: "auto" joins if the address and numbers are given, or if a scheduler started
        several processes; "yes" lets JAX find out how to join (Slurm, TPU virtual machines,
        Kubernetes, MPI); "no" keeps this process alone.
      coordinator_address: host:port of process 0.
      num_processes: number of processes of the run.
      process_id: index of this process, from 0.

    Raises:
      InputError: only some of the last three are given, they do not fit, or joining fails.
    """
    given = {
        "--coordinator_address": coordinator_address,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    missing = [flag for flag, value in given.items() if value is None]
    if distributed not in DISTRIBUTED:
        raise InputError(f"--distributed={distributed} must be one of {', '.join(DISTRIBUTED)}")
    if len(missing) == 3:
        if distributed == "no" or (distributed == "auto" and not several_processes(os.environ)):
            return
        return _initialize()
    if missing:
        raise InputError(
            f"{' and '.join(missing)} missing; several processes need all of {', '.join(given)}"
        )
    if distributed == "no":
        raise InputError("--distributed=no and --coordinator_address exclude each other")
    if not 0 <= process_id < num_processes:
        raise InputError(
            f"--process_id={process_id} must be from 0 to {num_processes - 1}"
            f" (--num_processes={num_processes})"
        )
    if not coordinator_address.rpartition(":")[2].isdecimal():
        raise InputError(
            f"--coordinator_address={coordinator_address!r} must be host:port, as in node1:1234"
        )
    _initialize(
        coordinator_address=coordinator_address,
        num_processes=num_processes,
        process_id=process_id,
    )


def several_processes(environment: Mapping[str, str]) -> bool:
    """Whether a scheduler started this process as one of several.

    Slurm's variables say so in a step that srun started. A shell inside a job, or a script that
    received some of these variables by ssh, is a single process.
    """
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "")
    if tasks.isdecimal() and int(tasks) > 1 and all(environment.get(name) for name in slurm):
        return True
    # Google's Kubernetes engine sets this for a TPU slice of several hosts.
    return "," in environment.get("TPU_WORKER_HOSTNAMES", "")


def _initialize(**options) -> None:
    try:
        jax.distributed.initialize(**options)
    except (RuntimeError, ValueError) as error:
        line = (str(error).strip().splitlines() or [repr(error)])[0]
        raise InputError(
            f"the processes of this run could not be joined ({line}); see --distributed and"
            " --coordinator_address"
        ) from error
