"""The files of a run: config.json, metadata.json, metrics.jsonl, results.json, TensorBoard."""

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import filelock
import jax
from ml_collections import ConfigDict

from gc_nc.data.device_batches import Normalization
from gc_nc.devices import is_main_process, wait_for_all
from gc_nc.errors import InputError
from gc_nc.files import locked, read_json_object, to_json, write_atomically
from gc_nc.runs.configuration import default_config, flatten

_PACKAGES = ("gc_nc", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_MISSING = "(no such key)"


#: Of a run's directory: locked by the process that is at the run.
LOCK = ".lock"
#: Exit code of `experiments.train` where another process is at the run.
EXIT_IN_USE = 3


class RunInUseError(RuntimeError):
    """Another process is at this run."""


@contextlib.contextmanager
def hold_run(workdir: Path):
    """Keeps other processes from this run as long as the context, or this process, lasts.

    Makes the directory if it is missing. The lock is the kernel's: nothing is left to be cleared
    after a crash.

    Raises:
      InputError: the directory cannot be made.
      RunInUseError: another process holds it.
    """
    if not is_main_process():
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            # Who only looks whether the run is in use holds the lock for a moment.
            stack.enter_context(locked(workdir / LOCK, timeout=0.5))
        except filelock.Timeout:
            raise RunInUseError(
                f"workdir {workdir} is in use: another process is at this run; wait for it or stop"
                " it first"
            ) from None
        except OSError as error:
            raise InputError(f"workdir {workdir} cannot be written: {error}") from error
        yield


def check_run_directory(workdir: Path, config: ConfigDict) -> None:
    """Checks that a run of this configuration may begin, go on or be shown there. Writes nothing.

    Raises:
      InputError: it cannot be written, holds something else, or holds a run of another
        configuration (with the keys that differ).
    """
    if special := set("*?[]") & set(str(workdir.absolute())):
        raise InputError(
            f"workdir {workdir} has {' '.join(sorted(special))} in its path, which the checkpoint"
            " library takes for a pattern; choose another name"
        )
    config_path = workdir / "config.json"
    try:
        if config_path.exists():
            stored = read_stored_config(config_path, hint="; choose another workdir")
            check_same_config(f"workdir {workdir}", stored, config)
        elif (
            workdir.is_dir()
            and any(not _is_ours(path) for path in workdir.iterdir())
            # Another process may have written it just now.
            and not config_path.exists()
        ):
            raise InputError(
                f"workdir {workdir} is not empty and holds no run (no config.json);"
                " choose a new or empty folder"
            )
        if read_results(workdir) is not None:
            return
        existing = next(path for path in (workdir, *workdir.absolute().parents) if path.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise InputError(
                f"workdir {workdir}: {existing} is not a folder that can be written to"
            )
    except OSError as error:
        raise InputError(f"workdir {workdir} cannot be used ({error}); choose another") from error


def _is_ours(path: Path) -> bool:
    """Whether a start that was cut off before config.json was complete left this behind."""
    return path.name.startswith((".config.json.", ".metadata.json.")) or path.name in (
        "metadata.json",
        LOCK,
    )


def has_begun(workdir: Path) -> bool:
    """Whether a run has noted what its data were; metadata.json alone is of a start cut off."""
    return all((workdir / name).exists() for name in ("config.json", "metadata.json"))


def read_stored_config(path: Path, *, hint: str = "") -> dict[str, Any]:
    """A run's config.json, flat; keys that came after it have their defaults.

    Those do what was done before.

    Args:
      path: of config.json.
      hint: as in `read_json_object`.

    Raises:
      InputError: as there.
    """
    return flatten(_resolved(default_config())) | flatten(read_json_object(path, hint=hint))


def create_run_directory(workdir: Path, config: ConfigDict, data: dict[str, Any]) -> None:
    """Writes config.json and metadata.json, unless the run has them: they are of its start.

    Args:
      workdir: checked by `check_run_directory`.
      config: of the run.
      data: what a reader of the numbers must know of the data, for metadata.json.

    Raises:
      InputError: the directory cannot be written.
    """
    device = jax.devices()[0]
    metadata = {
        "git_revision": git_revision(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "devices": {"kind": device.device_kind, "count": jax.device_count()},
        "data": data,
    }
    contents = {"config.json": _resolved(config), "metadata.json": metadata}
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        # Alone, metadata.json may be of other data. config.json is written first.
        keep = (workdir / "config.json").exists()
        for name, value in contents.items():
            if not keep or not (workdir / name).exists():
                write_atomically(workdir / name, to_json(value))
    except OSError as error:
        raise InputError(f"workdir {workdir} cannot be written: {error}") from error


def read_data_facts(path: Path) -> tuple[dict[str, Any], Normalization]:
    """What metadata.json says of the data that a run was trained on.

    Raises:
      InputError: it cannot be read, or lacks it.
    """
    metadata = read_json_object(path)
    try:
        facts = metadata["data"]
        fields = facts["normalization"]
        normalization = Normalization(tuple(fields["mean"]), tuple(fields["std"]))
        kept = ("num_train", "num_test", "num_classes", "image_shape", "class_names")
        # Earlier runs did not note these.
        later = {name: facts.get(name) for name in ("held_class_names", "fingerprint")}
        return {name: facts[name] for name in kept} | later, normalization
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} lacks what was noted of the data ({error!r})") from error


def _resolved(config: ConfigDict) -> dict[str, Any]:
    """As JSON gives it back: with lists for tuples."""
    return json.loads(json.dumps(config.to_dict()))


def check_same_config(where: str, stored: dict[str, Any], config: ConfigDict) -> None:
    """Raises InputError, with the keys that differ, unless a flat stored config is that of here."""
    config = flatten(_resolved(config))
    differing = [
        f"{key} is {stored.get(key, _MISSING)!r} there and {config.get(key, _MISSING)!r} here"
        for key in stored | config
        if stored.get(key, _MISSING) != config.get(key, _MISSING)
    ]
    if differing:
        raise InputError(
            f"{where} holds a run of another config: {'; '.join(differing)};"
            " choose another workdir or the config of that run"
        )


def git_revision() -> str | None:
    """The commit of the code that runs, with "-dirty" where it was changed; None outside git."""

    def git(*arguments):
        # In a checkout that tracks this very file: an installed copy may lie in another project's.
        return subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def read_results(workdir: Path) -> dict[str, Any] | None:
    """The results of a finished run, or None."""
    path = workdir / "results.json"
    return read_json_object(path, hint="; choose another workdir") if path.exists() else None


def read_records(workdir: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl, up to the first that a crash cut short or garbled."""
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return []
    records = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            record = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            record = None
        if not isinstance(record, dict):
            break
        records.append(record)
    return records


class _EventFile:
    """TensorBoard events, written at once.

    tensorboardX's SummaryWriter writes them in a thread, which dies on a full disk, and closing it
    then waits for ever.
    """

    def __init__(self, workdir: Path, *, purge_step: int):
        # Their import takes as long as the rest of this module.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2
        from tensorboardX.summary import scalar

        self._event, self._scalar = event_pb2.Event, scalar
        self._writer = EventsWriter(str(workdir / "events"))
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add(step=purge_step, session_log=start)

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._add(step=step, summary=self._scalar(name, value))
        self._writer.flush()

    def _add(self, **content) -> None:
        self._writer.write_event(self._event(wall_time=time.time(), **content))

    def close(self) -> None:
        self._writer.close()


class MetricLog:
    """metrics.jsonl and TensorBoard events, one record a call; the main process writes them."""

    def __init__(self, workdir: Path, resume_step: int | None):
        """Keeps the records up to the step from which the run goes on (None: from nothing).

        Later ones belong to steps that will be taken again.
        """
        path = workdir / "metrics.jsonl"
        #: All records of the run so far.
        self.records: list[dict[str, Any]] = [
            record
            for record in read_records(workdir)
            if resume_step is not None and record["step"] <= resume_step
        ]
        # All have read it before it is written.
        wait_for_all("metrics.jsonl was read")
        self._file = None
        if not is_main_process():
            return
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in self.records))
        self._file = path.open("a", encoding="utf-8")
        # TensorBoard hides the events of an earlier start from this step on.
        self._events = _EventFile(workdir, purge_step=0 if resume_step is None else resume_step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends {"step": step, **values}; it survives the process."""
        record = {"step": step, **values}
        self.records.append(record)
        if self._file is None:
            return
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        # TensorBoard cannot draw the others.
        self._events.write(step, {name: v for name, v in values.items() if math.isfinite(v)})

    def sync(self) -> None:
        """Waits until all records are on the disk, so that no checkpoint is ahead of them."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes both."""
        if self._file is not None:
            # TensorBoard's is first: closing the other writes what a full disk refused before.
            self._events.close()
            self._file.close()
