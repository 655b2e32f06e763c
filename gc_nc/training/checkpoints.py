"""Orbax checkpoints of the training state."""

from pathlib import Path

import jax
import orbax.checkpoint as ocp

from gc_nc.training.step import TrainState


class Checkpoints:
    """Saves and restores states below one directory; a context manager that waits for its writes.

    Saving goes on in the background. Leaving the context waits for it and raises what went wrong,
    since a process that exits right after an asynchronous save loses it.
    """

    def __init__(self, directory: Path, *, keep: int):
        """Opens the directory, which is made if it is missing."""
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
        )

    def __enter__(self) -> "Checkpoints":
        """Returns itself."""
        return self

    def __exit__(self, *exception) -> None:
        """Waits for the last save."""
        try:
            self._manager.wait_until_finished()
        finally:
            self._manager.close()

    def latest_step(self) -> int | None:
        """The newest step that can be restored."""
        return self._manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Saves the state under its step, unless it is there.

        Raises:
          RuntimeError: the checkpoint was not accepted.
        """
        step = int(state.step)
        if step == self._manager.latest_step():
            return
        # Orbax answers a step below the latest with False and no checkpoint.
        if not self._manager.save(step, args=ocp.args.StandardSave(state)):
            raise RuntimeError(f"checkpoint of step {step} was not saved")

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state saved at a step, in the structure and placement of `like`."""
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        return self._manager.restore(step, args=ocp.args.StandardRestore(target))
