"""A run from its configuration to its results, which goes on where it was stopped."""

import contextlib
import math
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from gc_nc.compilation import jit_for_device
from gc_nc.data.class_splits import TransferDataset, held_class_names
from gc_nc.data.datasets import ImageDataset
from gc_nc.data.device_batches import (
    Augmentation,
    ExampleOrder,
    Normalization,
    channel_normalization,
    identity_normalization,
)
from gc_nc.data.sources import free_device_memory
from gc_nc.errors import InputError
from gc_nc.models import build_model
from gc_nc.training import run_directory
from gc_nc.training.checkpoints import Checkpoints
from gc_nc.training.configuration import check_config
from gc_nc.training.evaluation import evaluate_split, gc_subset, monitor_complexity
from gc_nc.training.penalties import MAX_EXACT_DIM, GCPenalty, penalty_weight
from gc_nc.training.progress import Progress
from gc_nc.training.run_data import load_run_data
from gc_nc.training.run_figure import draw_run
from gc_nc.training.step import TrainState, init_state, make_optimizer, train_step


class DivergedError(RuntimeError):
    """The loss is no longer finite."""


class Interrupted(Exception):  # noqa: N818 - an event, not an error
    """A signal stopped the run; its state is saved."""

    def __init__(self, signal_number: int, step: int):
        """`signal_number` is the one that came, `step` the one that was saved."""
        super().__init__(f"stopped at step {step}; the same command goes on from there")
        self.signal_number = signal_number


def train(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs a configuration in its directory, from the start or from where it was stopped.

    A finished run is left as it is.

    Returns:
      results.json: step, stopped_by and the metrics of the last evaluation.

    Raises:
      InputError: bad configuration, data or directory, before anything is written.
      Interrupted: by Ctrl-C or SIGTERM; the state is saved.
      DivergedError: the loss became infinite or NaN.
    """
    check_config(config)
    run_directory.check_run_directory(workdir, config)
    if (results := run_directory.read_results(workdir)) is not None:
        return results
    run = _Run(config, workdir, load_run_data(config))
    run_directory.create_run_directory(workdir, config, run.data_facts())
    results = run.until_done()
    # Last: it is what marks the run as finished.
    run_directory.write_atomically(workdir / "results.json", run_directory.to_json(results))
    return results


class _Run:
    """What one run holds fixed: data on the device, compiled steps, its place in a directory."""

    def __init__(self, config: ConfigDict, workdir: Path, divided: TransferDataset):
        self._config = config
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
        self._normalization: Normalization = (
            channel_normalization(images)
            if data.standardize
            else identity_normalization(images.shape[3])
        )
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
        self._penalty = _make_penalty(config, self._model, dataset)
        self._optimizer = make_optimizer(config)
        self._check_model_fits()
        self._host_splits = {"train": dataset.train, "test": dataset.test}
        self._subsets = {
            name: gc_subset(config.seed, len(split.labels), config.evaluation.gc_examples)
            for name, split in self._host_splits.items()
        }

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
        state = self._initial_state()
        self._splits = jax.device_put(self._host_splits)
        run_key = jax.random.key(config.seed)
        self._augment_key, self._probe_key = jax.random.split(jax.random.fold_in(run_key, 1))
        self._penalty_key, self._monitor_key = jax.random.split(jax.random.fold_in(run_key, 2))
        # Never both in one program: XLA's CPU backend runs convolutions inside a conditional many
        # times slower, so the host chooses by the step number.
        self._plain_step, self._penalised_step = (
            jit_for_device(
                partial(
                    train_step,
                    model=self._model,
                    optimizer=self._optimizer,
                    normalization=self._normalization,
                    augmentation=Augmentation(config.data.crop_padding, config.data.flip),
                    batch_size=config.batch_size,
                    l2=config.optimizer.l2,
                    penalty=penalty,
                    precision=config.precision,
                ),
                donate_argnames="state",
            )
            for penalty in (None, self._penalty)
        )
        self._monitor = jit_for_device(
            partial(
                monitor_complexity,
                model=self._measured_model,
                normalization=self._normalization,
                num_probes=config.monitor.probes,
            )
        )
        split = self._host_splits["train"]
        # By the same seed a part of the evaluation's examples, and as random.
        num_watched = min(config.monitor.examples, config.evaluation.gc_examples)
        watched = gc_subset(config.seed, len(split.labels), num_watched)
        self._watched_images = jax.device_put(split.images[watched])
        with contextlib.ExitStack() as stack:
            self._checkpoints = stack.enter_context(
                Checkpoints(self._workdir / "checkpoints", keep=config.checkpoint.keep)
            )
            resume_step = self._checkpoints.latest_step()
            if resume_step is not None:
                state = self._checkpoints.restore(resume_step, state)
            self._progress = Progress(resume_step or 0, config.num_steps)
            stack.callback(self._progress.close)
            if resume_step is not None:
                self._progress.say(f"going on from the checkpoint of step {resume_step}")
            elif run_directory.read_records(self._workdir):
                self._progress.say("no checkpoint was written: starting again from step 0")
            self._log = run_directory.MetricLog(self._workdir, resume_step)
            stack.callback(self._log.close)
            self._received = stack.enter_context(_noting_signals(self._progress))
            self._stopped_by: str | None = None
            self._full_accuracy_since: int | None = None
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
            self._take_steps(state, step)
        return self._finish()

    def _take_steps(self, state: TrainState, step: int) -> None:
        config = self._config
        # The record of a step whose metrics are still on the device: fetching them right away would
        # keep the device waiting for the host.
        pending = None
        started, counted_from = time.perf_counter(), step
        while not self._stopped_by:
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
            save = _due(config.checkpoint.every_steps, step) or bool(self._received)
            if not (evaluate or save):
                continue
            if pending is not None:
                self._log_record(*pending)
                pending = None
            self._check_finite(step, batch["total_loss"])
            if evaluate:
                self._evaluate(state, step)
            # Asked once: a signal may also come during the evaluation, or while saving.
            interrupted = bool(self._received)
            if save or interrupted or self._stopped_by:
                self._log.sync()
                self._checkpoints.save(state)
            if interrupted and not self._stopped_by:
                raise Interrupted(self._received[0], step)
            # Steps per second are of training alone.
            started, counted_from = time.perf_counter(), step

    def _step(self, state: TrainState, step: int) -> tuple[TrainState, dict[str, jax.Array]]:
        order, offset = self._order.locate(step)
        arguments = state, self._splits["train"], order, offset, self._augment_key
        weight = penalty_weight(self._config, step)
        if weight:
            return self._penalised_step(*arguments, self._penalty_key, np.float32(weight))
        return self._plain_step(*arguments)

    def _watch(self, state: TrainState, step: int) -> dict[str, jax.Array]:
        key = jax.random.fold_in(self._monitor_key, step)
        return self._monitor(state.variables, self._watched_images, key)

    def _evaluation_is_due(self, step: int) -> bool:
        return step in (0, self._config.num_steps) or _due(
            self._config.evaluation.every_steps, step
        )

    def _note_evaluation(self, record: dict[str, Any]) -> None:
        """Decides from an evaluation whether the run is done."""
        step, limit = record["step"], self._config.stop_after_epochs_at_full_accuracy
        if record["train/accuracy"] < 1:
            self._full_accuracy_since = None
        elif self._full_accuracy_since is None:
            self._full_accuracy_since = step
        if step == self._config.num_steps:
            self._stopped_by = "num_steps"
        elif limit is not None and self._full_accuracy_since is not None:
            examples = (step - self._full_accuracy_since) * self._config.batch_size
            if examples >= limit * len(self._dataset.train.labels):
                self._stopped_by = "terminal_phase"

    def _evaluate(self, state: TrainState, step: int) -> None:
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
            )
            values |= {f"{split}/{name}": value for name, value in measured.items()}
        self._log.write(step, values)
        self._note_evaluation({"step": step, **values})
        self._progress.evaluation(step, values)

    def _log_record(self, step: int, record: dict[str, jax.Array | float]) -> None:
        fetched = {name: float(value) for name, value in jax.device_get(record).items()}
        self._check_finite(step, fetched.get("batch/total_loss", 0.0))
        self._log.write(step, fetched)

    def _check_finite(self, step: int, total_loss: jax.Array | float) -> None:
        if not math.isfinite(total_loss):
            saved = self._checkpoints.latest_step()
            raise DivergedError(
                f"the loss became {float(total_loss)} at step {step} (last checkpoint:"
                f" {'none' if saved is None else f'step {saved}'}); lower"
                " config.optimizer.learning_rate"
                + (" or config.gc_penalty.weight" if self._penalty else "")
            )

    def _finish(self) -> dict[str, Any]:
        config = self._config
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
        return {"step": last.pop("step"), "stopped_by": self._stopped_by, "metrics": last}


def _make_penalty(config: ConfigDict, model: nn.Module, dataset: ImageDataset) -> GCPenalty | None:
    """The penalty of a configuration, or None; checked against the network's sizes."""
    chosen = config.gc_penalty
    if not chosen.weight:
        return None
    images = jnp.zeros((1, *dataset.train.images.shape[1:]))
    sizes = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), images)[0])
    dim = sizes[0 if chosen.of == "logits" else 1].shape[1]
    if chosen.method == "exact" and dim > MAX_EXACT_DIM:
        raise InputError(
            f"config.gc_penalty.method='exact' takes a Jacobian product for each of the {dim}"
            f" dimensions of the {chosen.of} and allows {MAX_EXACT_DIM}; use output_probes"
        )
    return GCPenalty(chosen.of, chosen.method, chosen.num_probes, chosen.batch_fraction)


def _evaluations(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record for record in records if "train/accuracy" in record]


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


@contextlib.contextmanager
def _noting_signals(progress: Progress):
    """Yields a list that the first SIGINT or SIGTERM is put on; a second one acts as it always did.

    Only the main thread may handle signals; elsewhere the list stays empty.
    """
    received: list[int] = []
    previous: dict[int, Any] = {}

    def note(signal_number, frame):
        del frame
        received.append(signal_number)
        progress.say(
            "stopping after this step or evaluation, and saving; once more to stop at once"
        )
        for number, handler in previous.items():
            signal.signal(number, handler)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):
                previous[number] = signal.signal(number, note)
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
