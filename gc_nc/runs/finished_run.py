"""A run's directory opened for measuring: its network, data and checkpoints, all left unchanged.

"Finished" includes any run that left a checkpoint, even an interrupted one.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from gc_nc.data.class_splits import HELD_PARTS, ClassImages, TransferDataset
from gc_nc.data.datasets import ImageDataset
from gc_nc.data.device_batches import Normalization, normalize
from gc_nc.devices import check_no_mesh
from gc_nc.errors import InputError
from gc_nc.files import read_json_object
from gc_nc.models import build_model
from gc_nc.runs.checkpoints import check_shapes, open_read_only
from gc_nc.runs.configuration import check_config, default_config, flatten
from gc_nc.runs.run_data import load_run_data
from gc_nc.runs.run_directory import read_data_facts
from gc_nc.runs.run_identity import check_same_data
from gc_nc.training.evaluation import gc_subset, images_of
from gc_nc.training.step import init_state, make_optimizer


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """What a run left behind.

    Attributes:
      workdir: its directory.
      config: the config of the run; data.data_dir may have been changed.
      model: the network, which returns (logits, embedding).
      dataset: its data, on the host.
      normalization: the normalization of the pixels that the network was trained with.
      steps: the steps that have a checkpoint, ascending.
      held_classes: images of classes it was not trained on, by "val" and "target"; may be empty.
    """

    workdir: Path
    config: ConfigDict
    model: nn.Module
    dataset: ImageDataset
    normalization: Normalization
    steps: tuple[int, ...]
    held_classes: dict[str, ClassImages]

    def select_steps(self, step: str) -> tuple[int, ...]:
        """The steps that "latest", "all" or a number mean.

        Raises:
          InputError: `step` is another word, or a step without a checkpoint.
        """
        if step == "all":
            return self.steps
        if step == "latest":
            return self.steps[-1:]
        try:
            number = int(step)
        except ValueError:
            raise InputError(f"step={step!r} must be latest, all or a number") from None
        self._check_step(number)
        return (number,)

    def variables(self, step: int) -> dict[str, Any]:
        """Parameters and running statistics of a checkpoint.

        Raises:
          InputError: this step has no checkpoint, or it cannot be read.
        """
        self._check_step(step)
        shapes = self._state_shapes()
        placement = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        like = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement), shapes
        )
        try:
            with open_read_only(self.workdir / "checkpoints") as manager:
                self._check_shapes(step, manager, shapes)
                state = manager.restore(step, args=ocp.args.StandardRestore(like))
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise InputError(
                f"the checkpoint of step {step} in {self.workdir} cannot be read ({error})"
            ) from error
        return state.variables

    def gc_inputs(self, num_examples: int) -> jax.Array:
        """(B, H, W, c) random training images for GC, in model-input units; all if there are fewer.

        They are the same at every checkpoint, and include those that training itself evaluates.
        """
        train = self.dataset.train
        subset = gc_subset(self.config.seed, len(train.labels), num_examples)
        return normalize(images_of(train, subset), self.normalization)

    def check_checkpoint(self, step: int) -> None:
        """Raises InputError if the step has no checkpoint or its arrays have other shapes."""
        self._check_step(step)
        with open_read_only(self.workdir / "checkpoints") as manager:
            self._check_shapes(step, manager, self._state_shapes())

    def _state_shapes(self):
        image_shape = self.dataset.train.images.shape[1:]
        optimizer = make_optimizer(self.config)
        return jax.eval_shape(lambda: init_state(0, self.model, optimizer, image_shape))

    def _check_shapes(self, step: int, manager: ocp.CheckpointManager, state) -> None:
        try:
            stored = manager.item_metadata(step)
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise InputError(
                f"the checkpoint of step {step} in {self.workdir} cannot be read ({error})"
            ) from error
        check_shapes(step, self.workdir, stored, state.variables, "restore its config.json")

    def _check_step(self, step: int) -> None:
        if step not in self.steps:
            there = ", ".join(map(str, self.steps))
            raise InputError(f"{self.workdir} has no checkpoint of step {step}; it has {there}")


def open_run(
    workdir: Path,
    data_dir: str | None = None,
    *,
    datasets: dict[str, TransferDataset] | None = None,
) -> FinishedRun:
    """Opens the directory of a run that left a checkpoint; writes nothing.

    Args:
      workdir: the run's directory.
      data_dir: where its data are now; None if they were not moved.
      datasets: the data of runs opened before, for runs on the same data to share; this call adds
        its own.

    Raises:
      InputError: the folder does not exist or has no run or no checkpoint, files cannot be read, or
        the data are not those of the run.
    """
    check_no_mesh()
    if not workdir.is_dir():
        raise InputError(f"workdir {workdir} is not a folder; name the folder of a trained run")
    if not (workdir / "config.json").exists():
        raise InputError(f"workdir {workdir} does not contain a run (no config.json)")
    steps = _checkpoint_steps(workdir)
    if not steps:
        raise InputError(f"workdir {workdir} has no checkpoint yet; continue its training")
    config = read_config(workdir / "config.json")
    with config.unlocked():
        if data_dir is not None:
            config.data.data_dir = data_dir
    facts, normalization = read_data_facts(workdir / "metadata.json")
    key = json.dumps(config.data.to_dict(), sort_keys=True)
    data = datasets.get(key) if datasets is not None else None
    if data is None:
        data = load_run_data(config)
    data = check_same_data(workdir, facts, data, "name the right ones with --data_dir")
    if datasets is not None:
        datasets[key] = data
    dataset = data.source
    model = build_model(
        config.model.name,
        dataset.num_classes,
        width=config.model.width,
        batch_norm=config.model.batch_norm,
    )
    held = {part: getattr(data, part) for part in HELD_PARTS if getattr(data, part) is not None}
    return FinishedRun(workdir, config, model, dataset, normalization, steps, held)


def _checkpoint_steps(workdir: Path) -> tuple[int, ...]:
    directory = workdir / "checkpoints"
    if not directory.is_dir():
        return ()
    with open_read_only(directory) as manager:
        return tuple(sorted(int(step) for step in manager.all_steps()))


def read_config(path: Path) -> ConfigDict:
    """The config in a config.json.

    Keys that were introduced later get their defaults, which keep the behaviour of that time.

    Raises:
      InputError: it cannot be read, or has a key or value that this version does not allow.
    """
    stored, config = read_json_object(path), default_config()
    for key in sorted(flatten(stored).keys() - flatten(config).keys()):
        raise InputError(
            f"{path} has a key unknown here: {key}; use the version of gc_nc that made it"
        )
    try:
        config.update(stored)
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(f"{path} does not fit this version of gc_nc ({error})") from error
    check_config(config)
    return config
