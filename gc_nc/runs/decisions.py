"""What evaluations decide: when a run is done, and which checkpoint is the best."""

import math
from typing import Any

from ml_collections import ConfigDict


class Decisions:
    """Depends only on the evaluations, so that a resumed run decides like an uninterrupted one.

    Attributes:
      stopped_by: "num_steps", "train_loss" or "terminal_phase" once the run is done, else None.
    """

    def __init__(self, config: ConfigDict, num_examples: int):
        """`num_examples` is the size of the training split."""
        self._config = config
        self._num_examples = num_examples
        self._full_accuracy_since: int | None = None
        self._best: float | None = None
        self.stopped_by: str | None = None

    def note(self, record: dict[str, Any]) -> bool:
        """Takes the next evaluation, in the order of steps.

        Returns:
          True if this is the best evaluation so far, step 0 excluded.
        """
        step, limit = record["step"], self._config.stop_after_epochs_at_full_accuracy
        if record["train/accuracy"] < 1:
            self._full_accuracy_since = None
        elif self._full_accuracy_since is None:
            self._full_accuracy_since = step
        enough = self._config.stop_at_train_loss
        # Tested first, so that reaching this loss at the very last step is reported as such.
        if enough is not None and step and record["train/loss"] <= enough:
            self.stopped_by = "train_loss"
        elif step == self._config.num_steps:
            self.stopped_by = "num_steps"
        elif limit is not None and self._full_accuracy_since is not None:
            examples = (step - self._full_accuracy_since) * self._config.batch_size
            if examples >= limit * self._num_examples:
                self.stopped_by = "terminal_phase"
        metric = self._config.checkpoint.best_metric
        if not metric or not step:
            return False
        value = record[metric] if metric.endswith("accuracy") else -record[metric]
        if not math.isfinite(value) or (self._best is not None and value <= self._best):
            return False
        self._best = value
        return True
