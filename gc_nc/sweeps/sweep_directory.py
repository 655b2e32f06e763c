"""The files of a sweep: sweep.json, and a run directory, a config and a log for each member."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import filelock

from gc_nc.errors import InputError
from gc_nc.files import locked, read_json_object, to_json, write_atomically
from gc_nc.runs.run_directory import (
    LOCK,
    check_run_directory,
    check_same_config,
    read_stored_config,
)
from gc_nc.sweeps.members import Member


def run_path(workdir: Path, name: str) -> Path:
    """The directory of a member's run."""
    return workdir / name


def log_path(workdir: Path, name: str) -> Path:
    """The log of a member, with the output of all its starts."""
    return workdir / "logs" / f"{name}.log"


def config_path(workdir: Path, name: str) -> Path:
    """A member's resolved config."""
    return workdir / "configs" / f"{name}.json"


def is_done(workdir: Path, name: str) -> bool:
    """Whether a member's run is finished."""
    return (run_path(workdir, name) / "results.json").exists()


def in_use(workdir: Path, name: str) -> bool:
    """Whether a process is using a member's run, according to the run's lock."""
    lock = run_path(workdir, name) / LOCK
    if not lock.exists():
        return False
    try:
        # Two sweeps that check at the same time hold the lock for a moment.
        with locked(lock, timeout=0.2):
            return False
    except filelock.Timeout:
        return True
    except OSError:
        return False


def open_sweep(workdir: Path, members: Sequence[Member]) -> None:
    """Writes the list of members and their configs, after checking that all can run there.

    Members of an earlier sweep in the same directory are kept.

    Raises:
      InputError: the directory contains something else or runs of another config, or cannot be
        written to; nothing was written.
    """
    listing = workdir / "sweep.json"
    try:
        if (workdir / "config.json").exists():
            raise InputError(f"workdir {workdir} has a single run; choose another for the sweep")
        if not listing.exists() and workdir.is_dir():
            foreign = [path for path in workdir.iterdir() if not path.name.startswith(".sweep.")]
            if foreign:
                raise InputError(
                    f"workdir {workdir} is not empty and has no sweep in it (no sweep.json);"
                    " choose a new or empty folder"
                )
        for member in members:
            check_run_directory(run_path(workdir, member.name), member.config)
        workdir.mkdir(parents=True, exist_ok=True)
        with sweep_lock(workdir):
            for member in members:
                # Also compare with members of an unfinished sweep that have not started yet.
                path = config_path(workdir, member.name)
                if path.exists():
                    stored = read_stored_config(path, hint="; choose another workdir")
                    check_same_config(f"sweep {workdir}", stored, member.config)
            known = read_json_object(listing) if listing.exists() else {}
            all_of_them = known | {member.name: member.overrides for member in members}
            # Written first, because this file marks the directory as a sweep's.
            write_atomically(listing, to_json(all_of_them))
            for name in ("logs", "configs"):
                (workdir / name).mkdir(exist_ok=True)
            for member in members:
                text = to_json(member.config.to_dict())
                write_atomically(config_path(workdir, member.name), text)
    except OSError as error:
        raise InputError(f"workdir {workdir} cannot be used ({error}); choose another") from error


def sweep_lock(workdir: Path) -> contextlib.AbstractContextManager[None]:
    """Makes other sweeps in the same directory wait."""
    return locked(workdir / ".sweep.lock")
