"""A run from its configuration to its results, which goes on where it was stopped."""

import contextlib
import errno
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from gc_nc.compilation import jit_for_device
from gc_nc.data.class_splits import TransferDataset, held_class_names
from gc_nc.data.device_batches import (
    Augmentation,
    ExampleOrder,
    Normalization,
    channel_normalization,
    identity_normalization,
)
from gc_nc.data.sources import free_device_memory
from gc_nc.data.streamed_images import StreamedImages
from gc_nc.data.streaming import stream_batches
from gc_nc.errors import InputError
from gc_nc.models import build_model
from gc_nc.training import run_directory
from gc_nc.training.checkpoints import Checkpoints, StorageError
from gc_nc.training.configuration import check_config
from gc_nc.training.decisions import Decisions
from gc_nc.training.evaluation import evaluate_split, gc_subset, monitor_complexity, on_device
from gc_nc.training.penalties import make_penalty, penalty_weight
from gc_nc.training.placement import Placement, is_main_process, largest_of_all, wait_for_all
from gc_nc.training.progress import Progress
from gc_nc.training.run_data import load_run_data
from gc_nc.training.run_figure import draw_run
from gc_nc.training.signals import Interrupted, noting_signals
from gc_nc.training.step import (
    TrainState,
    init_state,
    make_optimizer,
    train_step,
    train_step_on_batch,
)


class DivergedError(RuntimeError):
    """The loss is no longer finite."""


def train(
    config: ConfigDict,
    workdir: Path,
    find_devices: Callable[[], Sequence[jax.Device]] = lambda: jax.local_devices()[:1],
) -> dict[str, Any]:
    """Runs a configuration in its directory, from the start or from where it was stopped.

    A finished run is left as it is. Where processes were joined by `jax.distributed` all of them
    call this, with the devices of all.

    Args:
      config: of the run.
      workdir: its directory; all processes see the same.
      find_devices: gives the devices that divide each batch, once what can be checked without
        them is; default the first one of this process. A run may go on on another number of
        devices than it began on.

    Returns:
      results.json: step, stopped_by and the metrics of the last evaluation.

    Raises:
      InputError: bad configuration, data, devices or directory, before anything is written.
      RunInUseError: another process is at this run.
      Interrupted: by one of `STOP_SIGNALS`; the state is saved.
      DivergedError: the loss became infinite or NaN.
      StorageError: something could not be written, as on a full disk.
    """
    check_config(config)
    run_directory.check_run_directory(workdir, config)
    if (results := run_directory.read_results(workdir)) is not None:
        return results
    placement = Placement(find_devices())
    placement.check_batch_size(config.batch_size)
    run = _Run(config, workdir, load_run_data(config), placement)
    with run_directory.hold_run(workdir):
        # Another process may have begun or ended the run meanwhile.
        run_directory.check_run_directory(workdir, config)
        if (results := run_directory.read_results(workdir)) is not None:
            return results
        try:
            if is_main_process():
                run_directory.create_run_directory(workdir, config, run.data_facts())
            wait_for_all("the run's directory is there")
            results = run.until_done()
            if is_main_process():
                # Last: it is what marks the run as finished.
                text = run_directory.to_json(results)
                run_directory.write_atomically(workdir / "results.json", text)
            wait_for_all("the run is finished")
        except OSError as error:
            if error.errno not in _STORAGE_ERRORS:
                raise
            raise StorageError(
                f"workdir {workdir} could not be written to ({error}); free some space: the same"
                " command goes on from the last checkpoint"
            ) from error
    return results


_STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE)

# How often the processes of a run ask each other whether one was told to stop, in steps: each time
# they wait for one another.
_AGREE_EVERY = 10


class _Run:
    """What one run holds fixed: data on the device, compiled steps, its place in a directory."""

    def __init__(
        self, config: ConfigDict, workdir: Path, divided: TransferDataset, placement: Placement
    ):
        self._config = config
        self._placement = placement
        self._workdir = workdir
        self._dataset = dataset = divided.source
        self._held_names = held_class_names(divided)
        images = dataset.train.images
        data = config.data
        if 2 * data.crop_padding > min(images.shape[1:3]):
            raise InputError(
                f"config.data.crop_padding={data.crop_padding} is more than half of the"
                f" {images.shape[1]}x{images.shape[2]} images"
            )
        self._streamed = isinstance(images, StreamedImages)
        self._normalization = self._find_normalization(images)
        self._order = ExampleOrder(config.seed, len(images), config.batch_size)
        self._model = build_model(
            config.model.name,
            dataset.num_classes,
            width=config.model.width,
            batch_norm=config.model.batch_norm,
            dtype=jnp.dtype(config.model.dtype),
        )
        # Whatever the network trains in, it is measured in float32.
        self._measured_model = self._model.clone(dtype=jnp.dtype(jnp.float32))
        self._penalty = make_penalty(config, self._model, images.shape[1:])
        self._optimizer = make_optimizer(config)
        self._check_model_fits()
        self._host_splits = {"train": dataset.train, "test": dataset.test}
        self._subsets = {
            name: gc_subset(config.seed, len(split.labels), config.evaluation.gc_examples)
            for name, split in self._host_splits.items()
        }

    def _find_normalization(self, images: np.ndarray | StreamedImages) -> Normalization:
        if not self._config.data.standardize:
            return identity_normalization(images.shape[3])
        if self._streamed and (self._workdir / "metadata.json").exists():
            # Spares a run that goes on the reading of all images.
            return run_directory.read_data_facts(self._workdir / "metadata.json")[1]
        return channel_normalization(images)

    def data_facts(self) -> dict[str, Any]:
        dataset = self._dataset
        return {
            "name": dataset.name,
            "num_train": len(dataset.train.labels),
            "num_test": len(dataset.test.labels),
            "image_shape": dataset.train.images.shape[1:],
            "num_classes": dataset.num_classes,
            "class_names": dataset.class_names,
            "held_class_names": self._held_names,
            # The units of geometric complexity: inputs are (pixel / 255 - mean) / std.
            "normalization": self._normalization._asdict(),
            "gc_examples": {split: len(subset) for split, subset in self._subsets.items()},
        }

    def _initial_state(self) -> TrainState:
        image_shape = self._dataset.train.images.shape[1:]
        return init_state(self._config.seed, self._model, self._optimizer, image_shape)

    def _check_model_fits(self) -> None:
        state = jax.eval_shape(self._initial_state)
        state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        # A step holds the gradients, and the next state before it drops the last.
        needed, free = 3 * state_bytes, free_device_memory()
        if needed > free:
            raise InputError(
                f"config.model.width={self._config.model.width} makes a training state that needs"
                f" {needed / 2**30:.3g} GiB and {free / 2**30:.3g} GiB are free; lower it"
            )

    def until_done(self) -> dict[str, Any]:
        config = self._config
        placement = self._placement
        state = self._initial_state()
        if placement.num_devices > 1:
            state = placement.replicate(state)
        self._splits = {
            name: on_device(split, placement) for name, split in self._host_splits.items()
        }
        keys = jax.jit(partial(_run_keys, config.seed), **placement.jit_options)()
        self._augment_key, self._probe_key, self._penalty_key, self._monitor_key = keys
        # Never both in one program: XLA's CPU backend runs convolutions inside a conditional many
        # times slower, so the host chooses by the step number.
        self._plain_step, self._penalised_step = (
            jit_for_device(
                partial(
                    self._step_function(),
                    model=self._model,
                    optimizer=self._optimizer,
                    normalization=self._normalization,
                    augmentation=Augmentation(config.data.crop_padding, config.data.flip),
                    l2=config.optimizer.l2,
                    penalty=penalty,
                    precision=config.precision,
                    placement=placement,
                ),
                donate_argnames="state",
                **placement.jit_options,
            )
            for penalty in (None, self._penalty)
        )
        self._monitor = jit_for_device(
            partial(
                monitor_complexity,
                model=self._measured_model,
                normalization=self._normalization,
                num_probes=config.monitor.probes,
                placement=placement,
            ),
            **placement.jit_options,
        )
        split = self._host_splits["train"]
        # By the same seed a part of the evaluation's examples, and as random.
        num_watched = min(config.monitor.examples, config.evaluation.gc_examples)
        watched = gc_subset(config.seed, len(split.labels), num_watched)
        self._watched_images = placement.replicate(split.images[watched])
        with contextlib.ExitStack() as stack:
            self._checkpoints = stack.enter_context(
                Checkpoints(self._workdir / "checkpoints", keep=config.checkpoint.keep)
            )
            restored = self._checkpoints.restore_newest(state)
            state = state if restored.state is None else restored.state
            resume_step = restored.step
            self._progress = Progress(resume_step or 0, config.num_steps)
            stack.callback(self._progress.close)
            for line in restored.unreadable:
                self._progress.say(line)
            if resume_step is not None:
                self._progress.say(f"going on from the checkpoint of step {resume_step}")
            elif restored.unreadable or run_directory.read_records(self._workdir):
                self._progress.say("no checkpoint to go on from: starting again from step 0")
            self._log = run_directory.MetricLog(self._workdir, resume_step)
            stack.callback(self._log.close)
            self._received = stack.enter_context(noting_signals(self._progress.say))
            self._decisions = Decisions(config, len(self._dataset.train.labels))
            self._located = None
            step = resume_step or 0
            evaluations = _evaluations(self._log.records)
            for record in evaluations:
                self._note_evaluation(record)
            evaluated = bool(evaluations) and evaluations[-1]["step"] == step
            if self._evaluation_is_due(step) and not evaluated:
                self._evaluate(state, step)
            if 0 < config.monitor.every_steps < config.num_steps:
                # Compiles it before the steps whose speed is logged.
                self._watch(state, step)
            self._batches = stack.enter_context(self._stream_from(step))
            self._take_steps(state, step)
        return self._finish()

    def _step_function(self) -> Callable:
        if self._streamed:
            return train_step_on_batch
        return partial(train_step, batch_size=self._config.batch_size)

    def _stream_from(self, step: int) -> contextlib.AbstractContextManager:
        """A context of the batches from a step on; of None for a set that is on the device."""
        if not self._streamed:
            return contextlib.nullcontext()
        size, steps = self._config.batch_size, self._config.num_steps
        rows = self._placement.process_rows(size)
        split = self._host_splits["train"]
        return contextlib.closing(stream_batches(split, self._order, step, steps, rows=rows))

    def _take_steps(self, state: TrainState, step: int) -> None:
        config = self._config
        # The record of a step whose metrics are still on the device: fetching them right away would
        # keep the device waiting for the host.
        pending = None
        started, counted_from = time.perf_counter(), step
        while not self._decisions.stopped_by:
            state, batch = self._step(state, step)
            step += 1
            self._progress.advance()
            if pending is not None:
                self._log_record(*pending)
                pending = None
            record = {}
            # An evaluation measures the same on more examples.
            if _due(config.monitor.every_steps, step) and not self._evaluation_is_due(step):
                record |= self._watch(state, step)
            if _due(config.log_every_steps, step):
                elapsed = time.perf_counter() - started
                record |= {f"batch/{name}": value for name, value in batch.items()}
                record["steps_per_sec"] = (step - counted_from) / elapsed
            if record:
                pending = (step, record)
            evaluate = self._evaluation_is_due(step)
            save = _due(config.checkpoint.every_steps, step)
            signalled = self._signal(step)
            if not (evaluate or save or signalled):
                continue
            if pending is not None:
                self._log_record(*pending)
                pending = None
            self._check_finite(step, batch["total_loss"])
            # The state after the step may be broken although the loss before it was finite.
            self._check_state(step, state)
            if evaluate:
                save |= self._evaluate(state, step)
                # Asked again: a signal may have come during the evaluation.
                signalled = signalled or self._signal(step, ask_now=True)
            if save or signalled or self._decisions.stopped_by:
                self._log.sync()
                self._checkpoints.save(state)
            if signalled and not self._decisions.stopped_by:
                raise Interrupted(signalled, step)
            # Steps per second are of training alone.
            started, counted_from = time.perf_counter(), step

    def _step(self, state: TrainState, step: int) -> tuple[TrainState, dict[str, jax.Array]]:
        if self._batches is not None:
            batch = self._placement.divide_batch(next(self._batches))
            arguments = state, batch, self._augment_key
        else:
            order, offset = self._order.locate(step)
            if order is not self._located:
                self._located, self._placed_order = order, self._placement.replicate(order)
            arguments = state, self._splits["train"], self._placed_order, offset, self._augment_key
        weight = penalty_weight(self._config, step)
        if weight:
            return self._penalised_step(*arguments, self._penalty_key, np.float32(weight))
        return self._plain_step(*arguments)

    def _signal(self, step: int, *, ask_now: bool = False) -> int:
        """The signal that one of the run's processes got, or 0; all hear of it at the same step."""
        if jax.process_count() > 1 and not (ask_now or step % _AGREE_EVERY == 0):
            return 0
        return largest_of_all(self._received[0] if self._received else 0)

    def _watch(self, state: TrainState, step: int) -> dict[str, jax.Array]:
        key = jax.random.fold_in(self._monitor_key, step)
        return self._monitor(state.variables, self._watched_images, key)

    def _evaluation_is_due(self, step: int) -> bool:
        return step in (0, self._config.num_steps) or _due(
            self._config.evaluation.every_steps, step
        )

    def _evaluate(self, state: TrainState, step: int) -> bool:
        """Evaluates; whether that was the best so far."""
        config = self._config.evaluation
        values = {}
        for i, (split, arrays) in enumerate(self._splits.items()):
            key = jax.random.fold_in(jax.random.fold_in(self._probe_key, step), i)
            measured = evaluate_split(
                self._measured_model,
                state.variables,
                arrays,
                self._normalization,
                self._subsets[split],
                key,
                num_classes=self._dataset.num_classes,
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

    def _log_record(self, step: int, record: dict[str, jax.Array | float]) -> None:
        fetched = {name: float(value) for name, value in jax.device_get(record).items()}
        self._check_finite(step, fetched.get("batch/total_loss", 0.0))
        self._log.write(step, fetched)

    def _check_finite(self, step: int, total_loss: jax.Array | float) -> None:
        if self._config.on_divergence == "stop" and not math.isfinite(total_loss):
            self._stop_diverged(f"the loss became {float(total_loss)} at step {step}")

    def _check_state(self, step: int, state: TrainState) -> None:
        if self._config.on_divergence == "stop" and not _all_finite(
            (state.params, state.opt_state)
        ):
            self._stop_diverged(f"the parameters became infinite or NaN in step {step}")

    def _stop_diverged(self, what: str) -> None:
        saved = self._checkpoints.latest_step()
        causes = "config.optimizer.learning_rate"
        if self._penalty:
            causes += " or config.gc_penalty.weight"
        raise DivergedError(
            f"{what} (last good checkpoint: {'none' if saved is None else f'step {saved}'}); lower"
            f" {causes}, or set config.on_divergence to 'continue'"
        )

    def _finish(self) -> dict[str, Any]:
        config = self._config
        if is_main_process():
            draw_run(
                _evaluations(self._log.records),
                self._workdir / "figures" / "run.png",
                title=f"{config.model.name} (width {config.model.width:g}) on {self._dataset.name}",
                subtitle=(
                    f"GC of the embedding on {len(self._subsets['train'])} fixed training and"
                    f" {len(self._subsets['test'])} test images, in model-input units"
                ),
            )
        last = dict(_evaluations(self._log.records)[-1])
        return {"step": last.pop("step"), "stopped_by": self._decisions.stopped_by, "metrics": last}


def _evaluations(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record for record in records if "train/accuracy" in record]


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _run_keys(seed: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Of augmentation, evaluation's probes, the penalty's probes and the monitor's."""
    run_key = jax.random.key(seed)
    augment, probe = jax.random.split(jax.random.fold_in(run_key, 1))
    penalty, monitor = jax.random.split(jax.random.fold_in(run_key, 2))
    return augment, probe, penalty, monitor


@jax.jit
def _all_finite(tree) -> jax.Array:
    leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(leaves))
