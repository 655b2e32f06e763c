"""The files of a sweep: sweep.json, and a run directory, a config and a log for each member."""

import contextlib
import fcntl
from collections.abc import Iterator, Sequence
from pathlib import Path

from gc_nc.errors import InputError
from gc_nc.sweeps.members import Member
from gc_nc.training.run_directory import (
    LOCK,
    check_run_directory,
    check_same_config,
    read_json_object,
    read_stored_config,
    to_json,
    write_atomically,
)


def run_path(workdir: Path, name: str) -> Path:
    """The directory of a member's run."""
    return workdir / name


def log_path(workdir: Path, name: str) -> Path:
    """What a member printed, over all its starts."""
    return workdir / "logs" / f"{name}.log"


def config_path(workdir: Path, name: str) -> Path:
    """A member's resolved config."""
    return workdir / "configs" / f"{name}.json"


def is_done(workdir: Path, name: str) -> bool:
    """Whether a member's run is finished."""
    return (run_path(workdir, name) / "results.json").exists()


def in_use(workdir: Path, name: str) -> bool:
    """Whether a process is at a member's run, by the run's lock."""
    try:
        with (run_path(workdir, name) / LOCK).open() as file:
            # Shared: two sweeps that look at once are not in each other's way.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        # There is no such run yet, or the file system has no locks.
        return False
    return False


def open_sweep(workdir: Path, members: Sequence[Member]) -> None:
    """Writes what the members are, after checking that all of them may run there.

    Members of an earlier sweep in the same directory stay.

    Raises:
      InputError: it holds something else, runs of another config, or cannot be written to; nothing
        was written.
    """
    listing = workdir / "sweep.json"
    try:
        if (workdir / "config.json").exists():
            raise InputError(f"workdir {workdir} holds a single run; choose another for the sweep")
        if not listing.exists() and workdir.is_dir():
            foreign = [path for path in workdir.iterdir() if not path.name.startswith(".sweep.")]
            if foreign:
                raise InputError(
                    f"workdir {workdir} is not empty and holds no sweep (no sweep.json);"
                    " choose a new or empty folder"
                )
        for member in members:
            check_run_directory(run_path(workdir, member.name), member.config)
        workdir.mkdir(parents=True, exist_ok=True)
        with locked(workdir):
            for member in members:
                # Of a sweep that is under way with members that have not begun.
                path = config_path(workdir, member.name)
                if path.exists():
                    stored = read_stored_config(path, hint="; choose another workdir")
                    check_same_config(f"sweep {workdir}", stored, member.config)
            known = read_json_object(listing) if listing.exists() else {}
            all_of_them = known | {member.name: member.overrides for member in members}
            # First: it tells the directory of a sweep from one of something else.
            write_atomically(listing, to_json(all_of_them))
            for name in ("logs", "configs"):
                (workdir / name).mkdir(exist_ok=True)
            for member in members:
                text = to_json(member.config.to_dict())
                write_atomically(config_path(workdir, member.name), text)
    except OSError as error:
        raise InputError(f"workdir {workdir} cannot be used ({error}); choose another") from error


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Keeps other sweeps in the same directory waiting."""
    with (workdir / ".sweep.lock").open("w") as file:
        # Some network file systems have no locks; two sweeps there had better not start at once.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
