"""A run from its configuration to its results; it resumes where it was stopped."""

import contextlib
import errno
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, SupportsFloat

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from gc_nc.data.streaming import stream_batches
from gc_nc.devices import Placement, check_no_mesh, is_main_process, largest_of_all, wait_for_all
from gc_nc.errors import InputError
from gc_nc.files import to_json, write_atomically
from gc_nc.runs import run_directory
from gc_nc.runs.checkpoints import Checkpoints, Restored, StorageError
from gc_nc.runs.configuration import check_config
from gc_nc.runs.decisions import Decisions
from gc_nc.runs.progress import Progress
from gc_nc.runs.run_data import LoadedData
from gc_nc.runs.run_figure import draw_finished_run
from gc_nc.runs.run_setup import RunSetup
from gc_nc.runs.signals import Interrupted, noting_signals
from gc_nc.training.evaluation import evaluate_split, gc_subset
from gc_nc.training.penalties import penalty_weight
from gc_nc.training.step import TrainState


class DivergedError(RuntimeError):
    """The loss is no longer finite."""


def train(
    config: ConfigDict,
    workdir: Path,
    find_devices: Callable[[], Sequence[jax.Device]] = lambda: jax.local_devices()[:1],
    *,
    data: LoadedData | None = None,
    draw: bool = True,
) -> dict[str, Any]:
    """Runs a configuration in its directory, from the start or from where it was stopped.

    A finished run is left as it is. If processes were joined by `jax.distributed`, all of them call
    this, with the devices of all processes.

    Args:
      config: the configuration of the run.
      workdir: the run's directory, the same for all processes.
      find_devices: returns the devices that divide each batch; called after everything that can be
        checked without devices. By default the first device of this process. A run may resume on a
        different number of devices.
      data: the data that other runs of this process have loaded, to which this run adds its own.
      draw: whether to draw the run's picture; `draw_finished_run` can draw it later.

    Returns:
      The content of results.json: step, stopped_by and the metrics of the last evaluation.

    Raises:
      InputError: bad configuration, data, devices or directory, before anything is written.
      RunInUseError: another process is using this run.
      Interrupted: one of `STOP_SIGNALS` stopped it; the state is saved.
      DivergedError: the loss became infinite or NaN.
      StorageError: something could not be written, for example to a full disk, or read.
    """
    check_config(config)
    check_no_mesh()
    run_directory.check_run_directory(workdir, config)
    results = run_directory.read_results(workdir)
    # In another place there may be other data, which must be read to be known.
    if results is not None and not run_directory.are_data_elsewhere(workdir, config):
        return results
    placement = Placement(find_devices())
    placement.check_batch_size(config.batch_size)
    setup = RunSetup(config, workdir, data or LoadedData(), placement)
    with run_directory.hold_run(workdir):
        # Another process may have started or finished the run in the meantime.
        run_directory.check_run_directory(workdir, config)
        if (results := run_directory.read_results(workdir)) is not None:
            return results
        try:
            if is_main_process():
                run_directory.create_run_directory(workdir, config, setup.data_facts())
            wait_for_all("the run's directory exists")
            with contextlib.ExitStack() as stack:
                results = _Run(setup, workdir, stack).until_done()
            if is_main_process():
                if draw:
                    draw_finished_run(workdir)
                # Written last, because this file marks the run as finished.
                text = to_json(results)
                write_atomically(workdir / "results.json", text)
            wait_for_all("the run is finished")
        except OSError as error:
            if error.errno not in _STORAGE_ERRORS:
                raise
            raise StorageError(
                f"workdir {workdir} could not be written to ({error}); free some space: the same"
                " command resumes from the last checkpoint"
            ) from error
    return results


_STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE)

# Every this many steps, the processes of a run ask each other whether one was told to stop. Each
# time they have to wait for one another.
_AGREE_EVERY = 10


class _Run:
    """A run in progress: its programs, its files and the decisions so far."""

    def __init__(self, setup: RunSetup, workdir: Path, stack: contextlib.ExitStack):
        """Opens the files of the run, which `stack` closes, and finds the step to resume from."""
        config, placement = setup.config, setup.placement
        self._setup = setup
        self._config = config
        self._placement = placement
        self._workdir = workdir
        self._splits = setup.placed_splits()
        self._programs = setup.programs()
        keys = self._programs.keys(np.uint32(config.seed))
        self._augment_key, self._probe_key, self._penalty_key, self._monitor_key = keys
        split = setup.splits["train"]
        # With the same seed, these are a random part of the evaluation's examples.
        num_watched = min(config.monitor.examples, config.evaluation.gc_examples)
        watched = gc_subset(config.seed, len(split.labels), num_watched)
        self._watched_images = placement.replicate(split.images[watched])

        self._checkpoints = stack.enter_context(
            Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep)
        )
        initial = setup.initial_state()
        restored = self._checkpoints.restore_newest(initial)
        self._state = initial if restored.state is None else restored.state
        self._step = restored.step or 0
        self._progress = Progress(self._step, config.num_steps)
        stack.callback(self._progress.close)
        self._say_where_it_starts(restored)
        self._log = run_directory.MetricLog(workdir, restored.step)
        stack.callback(self._log.close)
        self._received = stack.enter_context(noting_signals(self._progress.say))
        self._batches = stack.enter_context(self._stream_from(self._step))
        # The order of the current epoch, on the host and on the devices.
        self._order: tuple[Any, Any] = (None, None)
        self._decisions = Decisions(config, len(setup.dataset.train.labels))
        for record in _evaluations(self._log.records):
            self._note_evaluation(record)

    def _say_where_it_starts(self, restored: Restored) -> None:
        if self._setup.streamed:
            self._progress.say("images are read while they are used (config.data.streaming)")
        for line in restored.unreadable:
            self._progress.say(line)
        if restored.step is not None:
            self._progress.say(f"resuming from the checkpoint of step {restored.step}")
        elif run_directory.read_records(self._workdir):
            self._progress.say("no checkpoint to resume from: starting again from step 0")

    def until_done(self) -> dict[str, Any]:
        """Trains to the end and returns the results."""
        evaluations = _evaluations(self._log.records)
        evaluated = bool(evaluations) and evaluations[-1]["step"] == self._step
        if self._evaluation_is_due(self._step) and not evaluated:
            self._evaluate()
        # Compiles these before the steps whose speed is logged.
        _all_finite(_trained(self._state))
        if 0 < self._config.monitor.every_steps < self._config.num_steps:
            self._watch()
        self._take_steps()
        return self._finish()

    def _stream_from(self, step: int) -> contextlib.AbstractContextManager:
        """A context with the batches from a step on, or with None if the data are on the device."""
        if not self._setup.streamed:
            return contextlib.nullcontext()
        size, steps = self._config.batch_size, self._config.num_steps
        rows = self._placement.process_rows(size)
        split = self._setup.splits["train"]
        return contextlib.closing(stream_batches(split, self._setup.order, step, steps, rows=rows))

    def _take_steps(self) -> None:
        config = self._config
        # The record of a step whose metrics are still on the device. Fetching them at once would
        # make the device wait for the host.
        pending = None
        started, counted_from = time.perf_counter(), self._step
        while not self._decisions.stopped_by:
            with self._saving_if_unreadable(pending):
                self._state, batch = self._train_step()
            self._step += 1
            step = self._step
            self._progress.advance()
            if pending is not None:
                self._log_record(*pending)
                pending = None
            record = {}
            # An evaluation measures the same quantities on more examples.
            if _due(config.monitor.every_steps, step) and not self._evaluation_is_due(step):
                record |= self._watch()
            if _due(config.log_every_steps, step):
                elapsed = time.perf_counter() - started
                record |= {f"batch/{name}": value for name, value in batch.items()}
                record["steps_per_sec"] = (step - counted_from) / elapsed
            if record:
                pending = (step, record)
            evaluate = self._evaluation_is_due(step)
            save = _due(config.checkpoint.every_steps, step)
            signalled = self._signal()
            if not (evaluate or save or signalled):
                continue
            if pending is not None:
                self._log_record(*pending)
                pending = None
            self._check_finite(step, batch["total_loss"])
            # The state after the step may not be finite although the loss before it was.
            self._check_state()
            if evaluate:
                with self._saving_if_unreadable():
                    save |= self._evaluate()
                # Checked again, because a signal may have arrived during the evaluation.
                signalled = signalled or self._signal(ask_now=True)
            if save or signalled or self._decisions.stopped_by:
                self._log.sync()
                self._checkpoints.save(self._state)
            if signalled and not self._decisions.stopped_by:
                raise Interrupted(signalled, step)
            # Steps per second count training only.
            started, counted_from = time.perf_counter(), step

    def _train_step(self) -> tuple[TrainState, dict[str, jax.Array]]:
        if self._batches is not None:
            where = (self._placement.divide_batch(next(self._batches)),)
        else:
            order, offset = self._setup.order.locate(self._step)
            if order is not self._order[0]:
                self._order = order, self._placement.replicate(order)
            where = self._splits["train"], self._order[1], offset
        arguments = self._state, self._setup.hyperparameters, *where, self._augment_key
        weight = penalty_weight(self._config, self._step)
        if weight:
            return self._programs.penalised_step(*arguments, self._penalty_key, np.float32(weight))
        return self._programs.plain_step(*arguments)

    @contextlib.contextmanager
    def _saving_if_unreadable(self, pending: tuple | None = None):
        """Saves the state if a streamed image cannot be read."""
        try:
            yield
        except InputError as error:
            if jax.process_count() > 1:
                # The other processes do not know of it, and saving needs all of them.
                raise StorageError(str(error)) from error
            if pending is not None:
                self._log_record(*pending)
            self._check_state()
            self._log.sync()
            self._checkpoints.save(self._state)
            raise StorageError(
                f"{error}; the same command resumes from step {self._step}"
            ) from error

    def _signal(self, *, ask_now: bool = False) -> int:
        """The signal that a process of the run received, or 0; all learn of it at the same step."""
        if jax.process_count() > 1 and not (ask_now or self._step % _AGREE_EVERY == 0):
            return 0
        return largest_of_all(self._received[0] if self._received else 0)

    def _watch(self) -> dict[str, jax.Array]:
        key = jax.random.fold_in(self._monitor_key, self._step)
        return self._programs.monitor(self._state.variables, self._watched_images, key)

    def _evaluation_is_due(self, step: int) -> bool:
        return step in (0, self._config.num_steps) or _due(
            self._config.evaluation.every_steps, step
        )

    def _evaluate(self) -> bool:
        """Evaluates, and returns whether this was the best evaluation so far."""
        config, step = self._config.evaluation, self._step
        values = {}
        for i, (split, arrays) in enumerate(self._splits.items()):
            key = jax.random.fold_in(jax.random.fold_in(self._probe_key, step), i)
            measured = evaluate_split(
                self._setup.measured_model,
                self._state.variables,
                arrays,
                self._setup.normalization,
                self._setup.subsets[split],
                key,
                num_classes=self._setup.dataset.num_classes,
                batch_size=config.batch_size,
                gc_probes=config.gc_probes,
                placement=self._placement,
            )
            values |= {f"{split}/{name}": value for name, value in measured.items()}
        self._log.write(step, values)
        self._progress.evaluation(step, values)
        return self._note_evaluation({"step": step, **values})

    def _note_evaluation(self, record: dict[str, Any]) -> bool:
        best = self._decisions.note(record)
        if best:
            self._checkpoints.keep_best(record["step"])
        return best

    def _log_record(self, step: int, record: dict[str, SupportsFloat]) -> None:
        fetched = {name: float(value) for name, value in jax.device_get(record).items()}
        self._check_finite(step, fetched.get("batch/total_loss", 0.0))
        self._log.write(step, fetched)

    def _check_finite(self, step: int, total_loss: SupportsFloat) -> None:
        if self._config.on_divergence == "stop" and not math.isfinite(total_loss):
            self._stop_diverged(f"the loss is {float(total_loss)} at step {step}")

    def _check_state(self) -> None:
        if self._config.on_divergence == "stop" and not _all_finite(_trained(self._state)):
            self._stop_diverged(f"the state became infinite or NaN in step {self._step}")

    def _stop_diverged(self, what: str) -> None:
        saved = self._checkpoints.latest_step()
        causes = "config.optimizer.learning_rate"
        if self._setup.penalised:
            causes += " or config.gc_penalty.weight"
        raise DivergedError(
            f"{what} (last good checkpoint: {'none' if saved is None else f'step {saved}'}); in a"
            f" new workdir, lower {causes} or set config.on_divergence to 'continue'"
        )

    def _finish(self) -> dict[str, Any]:
        last = dict(_evaluations(self._log.records)[-1])
        return {"step": last.pop("step"), "stopped_by": self._decisions.stopped_by, "metrics": last}


def _evaluations(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record for record in records if "train/accuracy" in record]


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _trained(state: TrainState) -> tuple:
    return state.params, state.batch_stats, state.opt_state


@jax.jit
def _all_finite(tree) -> jax.Array:
    leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(leaves))
