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


#: The file in a run's directory that the process using the run locks.
LOCK = ".lock"
#: Exit code of `experiments.train` if another process is using the run.
EXIT_IN_USE = 3


class RunInUseError(RuntimeError):
    """Another process is using this run."""


@contextlib.contextmanager
def hold_run(workdir: Path):
    """Keeps other processes away from this run as long as the context, or this process, lasts.

    Makes the directory if it is missing. The kernel keeps the lock, so a crash leaves nothing to
    clean up.

    Raises:
      InputError: the directory cannot be made.
      RunInUseError: another process is using the run.
    """
    if not is_main_process():
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            # A process that only checks whether the run is in use holds the lock for a moment.
            stack.enter_context(locked(workdir / LOCK, timeout=0.5))
        except filelock.Timeout:
            raise RunInUseError(
                f"workdir {workdir} is in use by another process; wait for it or stop it first"
            ) from None
        except OSError as error:
            raise InputError(f"workdir {workdir} cannot be written: {error}") from error
        yield


def check_run_directory(workdir: Path, config: ConfigDict) -> None:
    """Checks that a run of this configuration may start, resume or be shown there; writes nothing.

    Raises:
      InputError: the directory cannot be written to, contains something else, or contains a run of
        another configuration (the message has the keys that differ). The place of the data may
        differ if the run noted their fingerprint, which is compared when they are read.
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
            if _has_fingerprint(workdir):
                stored["data.data_dir"] = config.data.data_dir
            check_same_config(f"workdir {workdir}", stored, config)
        elif (
            workdir.is_dir()
            and any(not _is_ours(path) for path in workdir.iterdir())
            # Another process may have written it a moment ago.
            and not config_path.exists()
        ):
            raise InputError(
                f"workdir {workdir} is not empty and does not contain a run (no config.json);"
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


def _has_fingerprint(workdir: Path) -> bool:
    path = workdir / "metadata.json"
    return path.exists() and bool((read_json_object(path).get("data") or {}).get("fingerprint"))


def are_data_elsewhere(workdir: Path, config: ConfigDict) -> bool:
    """Whether the data of a run that has begun lay in another place than config.data names."""
    path = workdir / "config.json"
    return path.exists() and read_stored_config(path)["data.data_dir"] != config.data.data_dir


def _is_ours(path: Path) -> bool:
    """Whether this was left by a start that was cut off before config.json was complete."""
    return path.name.startswith((".config.json.", ".metadata.json.")) or path.name in (
        "metadata.json",
        LOCK,
    )


def has_begun(workdir: Path) -> bool:
    """Whether a run has recorded its data; metadata.json alone is from a start cut off early."""
    return all((workdir / name).exists() for name in ("config.json", "metadata.json"))


def read_stored_config(path: Path, *, hint: str = "") -> dict[str, Any]:
    """A run's config.json, flattened.

    Keys that were introduced later get their defaults, which keep the behaviour of that time.

    Args:
      path: the config.json.
      hint: as in `read_json_object`.

    Raises:
      InputError: as in `read_json_object`.
    """
    return flatten(_resolved(default_config())) | flatten(read_json_object(path, hint=hint))


def create_run_directory(workdir: Path, config: ConfigDict, data: dict[str, Any]) -> None:
    """Writes config.json and metadata.json, unless the run has them from its first start.

    Args:
      workdir: a directory checked by `check_run_directory`.
      config: the config of the run.
      data: what a reader of the numbers must know about the data, for metadata.json.

    Raises:
      InputError: the directory cannot be written to.
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
        # config.json is written first, so metadata.json without it may describe other data.
        keep = (workdir / "config.json").exists()
        for name, value in contents.items():
            if not keep or not (workdir / name).exists():
                write_atomically(workdir / name, to_json(value))
    except OSError as error:
        raise InputError(f"workdir {workdir} cannot be written: {error}") from error


def read_data_facts(path: Path) -> tuple[dict[str, Any], Normalization]:
    """What metadata.json says about the data that a run was trained on.

    Raises:
      InputError: the file cannot be read or says nothing about the data.
    """
    metadata = read_json_object(path)
    try:
        facts = metadata["data"]
        fields = facts["normalization"]
        normalization = Normalization(tuple(fields["mean"]), tuple(fields["std"]))
        kept = ("num_train", "num_test", "num_classes", "image_shape", "class_names")
        # Runs of earlier versions did not record these.
        later = {name: facts.get(name) for name in ("held_class_names", "fingerprint")}
        return {name: facts[name] for name in kept} | later, normalization
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} lacks the record of the data ({error!r})") from error


def _resolved(config: ConfigDict) -> dict[str, Any]:
    """The config as JSON returns it, with lists for tuples."""
    return json.loads(json.dumps(config.to_dict()))


def check_same_config(where: str, stored: dict[str, Any], config: ConfigDict) -> None:
    """Raises InputError, with the keys that differ, unless a flat stored config equals `config`."""
    config = flatten(_resolved(config))
    differing = [
        f"{key} is {stored.get(key, _MISSING)!r} there and {config.get(key, _MISSING)!r} here"
        for key in stored | config
        if stored.get(key, _MISSING) != config.get(key, _MISSING)
    ]
    if differing:
        raise InputError(
            f"{where} contains a run of another config: {'; '.join(differing)};"
            " choose another workdir or the config of that run"
        )


def git_revision() -> str | None:
    """The commit of the running code, with "-dirty" if it was changed; None outside git."""

    def git(*arguments):
        # Raises unless git tracks this very file: an installed copy may be inside another checkout.
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
    """The records of metrics.jsonl, up to the first one that a crash truncated or garbled."""
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
    """Writes TensorBoard events at once.

    tensorboardX's SummaryWriter writes them in a thread, which dies on a full disk, and closing the
    writer then waits forever.
    """

    def __init__(self, workdir: Path, *, purge_step: int):
        # Importing these takes as long as the rest of this module.
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
    """metrics.jsonl and TensorBoard events, one record per call; the main process writes them."""

    def __init__(self, workdir: Path, resume_step: int | None):
        """Keeps the records up to the step from which the run resumes (None: keeps none).

        Later records belong to steps that will be repeated.
        """
        path = workdir / "metrics.jsonl"
        #: All records of the run so far.
        self.records: list[dict[str, Any]] = [
            record
            for record in read_records(workdir)
            if resume_step is not None and record["step"] <= resume_step
        ]
        # All processes have read the file before it is rewritten.
        wait_for_all("metrics.jsonl was read")
        self._file = None
        if not is_main_process():
            return
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in self.records))
        self._file = path.open("a", encoding="utf-8")
        # TensorBoard hides events of an earlier start from this step on.
        self._events = _EventFile(workdir, purge_step=0 if resume_step is None else resume_step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends {"step": step, **values}; the record survives a crash of the process."""
        record = {"step": step, **values}
        self.records.append(record)
        if self._file is None:
            return
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        # TensorBoard cannot draw values that are not finite.
        self._events.write(step, {name: v for name, v in values.items() if math.isfinite(v)})

    def sync(self) -> None:
        """Waits until all records are on the disk, so that no checkpoint is newer than they are."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes both files."""
        if self._file is not None:
            # TensorBoard's first: closing the other one retries a write that a full disk refused.
            self._events.close()
            self._file.close()
