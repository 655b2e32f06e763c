"""Whether this process is one of several that make one run, and how they find each other."""

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
      distributed: "auto": where the address and numbers are given, or a scheduler started several
        processes; "yes": JAX finds out how (Slurm, TPU virtual machines, Kubernetes, MPI); "no": a
        process of its own.
      coordinator_address: host:port of process 0.
      num_processes: of the run.
      process_id: of this one, from 0.

    Raises:
      InputError: some of the three and not all, numbers that do not fit, or no connection.
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
            f"{' and '.join(missing)} missing: several processes need all of {', '.join(given)}"
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

    Slurm says so of a step that srun started. A shell inside a job, or a script that ssh handed
    some of Slurm's variables, is a process of its own.
    """
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "")
    if tasks.isdecimal() and int(tasks) > 1 and all(environment.get(name) for name in slurm):
        return True
    # A TPU slice of several hosts, as Google's Kubernetes engine announces it.
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
