"""Files that are written whole or not at all, JSON objects, and locks between processes."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import logging
from filelock import FileLock

from gc_nc.errors import InputError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary file beside `path`, which replaces `path` once the block has ended.

    The content is on the disk before it gets its name, so after a crash `path` is either the old
    file or the complete new one. If the block raises, `path` stays as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, "utf-8")


def to_json(value: Any) -> str:
    """Indented JSON with a final newline."""
    return json.dumps(value, indent=2) + "\n"


def read_json_object(path: Path, *, hint: str = "") -> dict[str, Any]:
    """Reads a JSON object from a file.

    Args:
      path: the file.
      hint: the end of an error's message, which says what to do.

    Raises:
      InputError: the file cannot be read, or its content is not a JSON object.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}){hint}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a JSON object{hint}")
    return value


@contextlib.contextmanager
def locked(path: Path, *, timeout: float = -1) -> Iterator[None]:
    """Holds a lock file for as long as the block, or this process, lasts.

    The operating system keeps the lock, so a crash leaves nothing to clean up. filelock is used
    because it also works on Windows. On a file system without locks, such as some network file
    systems, the block runs unprotected after a warning.

    Args:
      path: the lock file, which is created and stays.
      timeout: seconds to wait for another process; -1 waits without limit.

    Raises:
      filelock.Timeout: another process still holds it.
      PermissionError: the lock file cannot be written.
    """
    lock = FileLock(path, poll_interval=0.02, fallback_to_soft=False)
    try:
        lock.acquire(timeout=timeout)
    except TimeoutError:
        raise
    except (OSError, NotImplementedError) as error:
        if isinstance(error, PermissionError | FileNotFoundError | NotADirectoryError):
            raise
        logging.warning("%s cannot be locked (%s): run only one command there", path, error)
        yield
        return
    try:
        yield
    finally:
        lock.release()
