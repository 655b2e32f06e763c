"""Orbax checkpoints of the training state."""

import contextlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint.checkpoint_managers import PreservationPolicy

from gc_nc.devices import is_main_process, wait_for_all
from gc_nc.errors import InputError
from gc_nc.training.step import TrainState

#: Below a run's directory: checkpoints that could not be read, moved out of the way.
UNREADABLE = "unreadable_checkpoints"


class StorageError(RuntimeError):
    """Something could not be written; everything written before it is complete."""


class Restored(NamedTuple):
    """A state and where it comes from.

    Attributes:
      state: the state of the newest readable checkpoint; None if there are no checkpoints.
      step: its step.
      unreadable: a line for each newer checkpoint, which was moved to `UNREADABLE`.

    If there are checkpoints and none can be read, nothing is moved.
    """

    state: TrainState | None
    step: int | None
    unreadable: tuple[str, ...]


class _NewestAndBest(PreservationPolicy):
    """Keeps the N newest checkpoints and the best one; Orbax's own policy can drop the newest."""

    def __init__(self, num_newest: int):
        self._num_newest = num_newest
        self.best_step: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        del context
        first = len(checkpoints) - self._num_newest
        return [i >= first or c.step == self.best_step for i, c in enumerate(checkpoints)]


class Checkpoints:
    """Saves and restores states below one directory; a context manager that waits for its writes.

    States are saved in the background. Leaving the context waits for the last save and raises its
    error, since a process that exits right after an asynchronous save loses it. A checkpoint is
    renamed to its step once it is complete. All processes of a run call the same methods.
    """

    def __init__(self, directory: Path, *, keep: int):
        """Opens the directory, or creates it; the `keep` newest checkpoints are kept."""
        self._directory = directory.absolute()
        self._policy = _NewestAndBest(keep)
        self._manager = _open_manager(
            self._directory, preservation_policy=self._policy, create=True
        )

    def __enter__(self) -> "Checkpoints":
        """Returns itself."""
        return self

    def __exit__(self, kind, error, traceback) -> None:
        """Waits for the last save.

        Raises:
          StorageError: the save failed.
        """
        failures = []
        # Closing waits too, and fails again.
        for end in (self._manager.wait_until_finished, self._manager.close):
            try:
                end()
            except Exception as failure:
                failures.append(failure)
        if failures:
            raise self._storage_error(failures[0]) from failures[0]

    def steps(self) -> tuple[int, ...]:
        """The steps of all checkpoints, ascending; the last save may not be finished yet."""
        return tuple(sorted(int(step) for step in self._manager.all_steps()))

    def latest_step(self) -> int | None:
        """The step of the newest checkpoint, or None."""
        return self._manager.latest_step()

    def keep_best(self, step: int | None) -> None:
        """Keeps the checkpoint of this step until another one is named."""
        self._policy.best_step = step

    def save(self, state: TrainState) -> None:
        """Saves the state under its step, unless that step is saved already.

        Raises:
          StorageError: the save was not accepted, or the one before it failed.
        """
        step = int(state.step)
        if step == self._manager.latest_step():
            return
        try:
            # Orbax returns False and saves nothing if the step is below the latest one.
            accepted = self._manager.save(step, args=ocp.args.StandardSave(state))
        except Exception as failure:
            raise self._storage_error(failure) from failure
        if not accepted:
            raise StorageError(
                f"the checkpoint of step {step} was not saved: {self._directory} already has"
                f" step {self._manager.latest_step()}"
            )

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state saved at a step, in the structure and placement of `like`."""
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        return self._manager.restore(step, args=ocp.args.StandardRestore(target))

    def restore_newest(self, like: TrainState) -> Restored:
        """The newest state that can be read, in the structure and placement of `like`.

        A crash of the whole machine may leave an incomplete checkpoint. It is moved out of the way,
        because the run will save that step again.

        Raises:
          InputError: a checkpoint is of another network or optimizer.
          StorageError: no checkpoint can be read, or the file system cannot read one at present.
        """
        unreadable: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                with _quiet_library():
                    self._check_structure(step, like)
                    state = self.restore(step, like)
                if int(state.step) != step:
                    raise ValueError(f"it contains step {int(state.step)}")
            except (InputError, jax.errors.JaxRuntimeError):
                # A runtime error, such as a device out of memory, is not the checkpoint's fault.
                raise
            except Exception as error:
                if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
                    raise StorageError(
                        f"the checkpoint of step {step} in {self._directory} cannot be read now"
                        f" ({_first_line(error)}); try again"
                    ) from error
                unreadable[step] = _first_line(error)
                continue
            lines = tuple(
                f"the checkpoint of step {other} cannot be read ({why}); moved to"
                f" {self._set_aside(other)}"
                for other, why in unreadable.items()
            )
            return Restored(state, step, lines)
        if unreadable:
            faults = "; ".join(f"step {step}: {why}" for step, why in unreadable.items())
            raise StorageError(
                f"no checkpoint in {self._directory} can be read ({faults}); move that folder away"
                " to start again from step 0"
            )
        return Restored(None, None, ())

    def _check_structure(self, step: int, like: TrainState) -> None:
        stored = self._manager.item_metadata(step)
        if not jax.tree.leaves(stored):
            raise ValueError("it is empty")
        fix = "use the version of gc_nc that made it, or another workdir"
        check_shapes(step, self._directory, stored, like, fix, exactly=True)

    def _set_aside(self, step: int) -> Path:
        shelf = self._directory.parent / UNREADABLE
        taken = len(list(shelf.glob(f"{step}*"))) if shelf.is_dir() else 0
        place = shelf / (f"{step}.{taken}" if taken else f"{step}")
        if is_main_process():
            shelf.mkdir(exist_ok=True)
            os.replace(self._directory / str(step), place)
        wait_for_all(f"unreadable checkpoint {step}")
        self._manager.reload()
        return place

    def _storage_error(self, failure: Exception) -> StorageError:
        # An unfinished save has another name.
        steps = [int(path.name) for path in self._directory.iterdir() if path.name.isdecimal()]
        good = f"from step {max(steps)}" if steps else "from the start"
        return StorageError(
            f"a checkpoint could not be written to {self._directory} ({_first_line(failure)}); free"
            f" some space: the same command resumes {good}"
        )


def open_read_only(directory: Path) -> ocp.CheckpointManager:
    """Opens the checkpoints below a directory without changing it; a context manager."""
    # Orbax warns about read-only access every time, although it was asked for.
    with _quiet_library(logging.ERROR):
        return _open_manager(directory.absolute(), read_only=True, create=False)


def _open_manager(directory: Path, **options) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
        directory,
        # Named, so that the shapes in a checkpoint can be read without restoring it.
        item_handlers=ocp.StandardCheckpointHandler(),
        options=ocp.CheckpointManagerOptions(**options),
    )


def check_shapes(
    step: int, directory: Path, stored: Any, like: Any, fix: str, *, exactly: bool = False
) -> None:
    """Checks that a checkpoint has the arrays that are needed, before it is restored.

    Orbax's own message is pages long, and its failed restore leaves unfinished work behind.

    Args:
      step: the step of the checkpoint.
      directory: the directory that contains it.
      stored: Orbax's metadata of the checkpoint.
      like: a tree of arrays or shapes.
      fix: what the user can do.
      exactly: whether it is also an error if the checkpoint has arrays that `like` lacks.

    Raises:
      InputError: an array is missing or has another shape.
    """
    there = {leaf.name: tuple(leaf.shape) for leaf in jax.tree.leaves(stored)}
    needed = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(like)
    }
    names = sorted(there.keys() | needed.keys()) if exactly else needed
    differing = [name for name in names if there.get(name) != needed.get(name)]
    if not differing:
        return
    name = differing[0]
    more = f" and {len(differing) - 1} more differ" if len(differing) > 1 else ""
    raise InputError(
        f"the checkpoint of step {step} in {directory} is of another network or optimizer: {name}"
        f" has shape {there.get(name, 'none')} there and {needed.get(name, 'none')} by the"
        f" config{more}; {fix}"
    )


@contextlib.contextmanager
def _quiet_library(level: int = logging.FATAL):
    """Silences Orbax and TensorStore, which print pages about what our errors say in a line."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(level)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _first_line(error: Exception) -> str:
    # TensorStore names the cause at the end of a line with many paths.
    if system := re.search(r"([A-Z][\w -]+) \[os_error_code=", str(error)):
        return system.group(1)
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= 200 else f"{lines[0][:200]}..."
