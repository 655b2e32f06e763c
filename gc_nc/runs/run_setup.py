"""A run before its first step: its data, network, optimizer and programs."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from gc_nc.data.class_splits import TransferDataset
from gc_nc.data.datasets import ImageSplit
from gc_nc.data.device_batches import (
    Augmentation,
    ExampleOrder,
    Normalization,
    identity_normalization,
)
from gc_nc.data.fingerprints import with_fingerprint
from gc_nc.data.streamed_images import StreamedImages
from gc_nc.devices import Placement, free_device_memory
from gc_nc.errors import InputError
from gc_nc.files import read_json_object
from gc_nc.models import build_model
from gc_nc.runs.programs import Programs, ProgramSpec, compile_programs
from gc_nc.runs.run_data import LoadedData
from gc_nc.runs.run_directory import has_begun, read_data_facts
from gc_nc.runs.run_identity import check_same_data, identifying_facts
from gc_nc.training.evaluation import gc_subset
from gc_nc.training.penalties import make_penalty
from gc_nc.training.step import TrainState, hyperparameters, init_state, optimizer_spec


class RunSetup:
    """What a configuration, its data and its devices determine before the first step.

    Attributes:
      config: the checked configuration.
      placement: the placement of its arrays.
      dataset: its dataset, on the host.
      splits: {"train": ..., "test": ...}, the splits of the dataset.
      streamed: whether its images are read while they are used.
      normalization: the normalization of the pixels.
      order: the order of the training examples.
      measured_model: the network for evaluation; it computes in float32 even if training does not.
      penalised: whether the loss has a GC penalty.
      subsets: the examples of each split on which GC is measured.
      hyperparameters: the numbers that a step takes as arguments.
    """

    def __init__(self, config: ConfigDict, workdir: Path, data: LoadedData, placement: Placement):
        """Checks what can be checked before anything is written.

        Args:
          config: a config checked by `check_config`.
          workdir: the directory of the run, which may have started already.
          data: loads its data, unless they are loaded already.
          placement: the placement of its arrays.

        Raises:
          InputError: the data cannot be loaded or do not fit the configuration, the network does
            not fit in memory, or the run was started with other data.
        """
        self._data = data
        divided = data.load(config, workdir)
        self.config = config
        self.placement = placement
        self.dataset = dataset = divided.source
        self._divided = _as_begun(divided, workdir)
        images = dataset.train.images
        padding = config.data.crop_padding
        if 2 * padding > min(images.shape[1:3]):
            raise InputError(
                f"config.data.crop_padding={padding} is more than half of the"
                f" {images.shape[1]}x{images.shape[2]} images"
            )
        self.streamed = isinstance(images, StreamedImages)
        self.normalization = self._find_normalization(images, workdir)
        self.order = ExampleOrder(config.seed, len(images), config.batch_size)
        self._model = build_model(
            config.model.name,
            dataset.num_classes,
            width=config.model.width,
            batch_norm=config.model.batch_norm,
            dtype=jnp.dtype(config.model.dtype),
        )
        self.measured_model = self._model.clone(dtype=jnp.dtype(jnp.float32))
        self._penalty = make_penalty(config, self._model, images.shape[1:])
        self._optimizer = optimizer_spec(config)
        self.hyperparameters = hyperparameters(config)
        self._check_model_fits()
        self.splits = {"train": dataset.train, "test": dataset.test}
        self.subsets = {
            name: gc_subset(config.seed, len(split.labels), config.evaluation.gc_examples)
            for name, split in self.splits.items()
        }

    def _find_normalization(
        self, images: np.ndarray | StreamedImages, workdir: Path
    ) -> Normalization:
        if not self.config.data.standardize:
            return identity_normalization(images.shape[3])
        if self.streamed and has_begun(workdir):
            # A run that resumes need not read all images again.
            return read_data_facts(workdir / "metadata.json")[1]
        return self._data.normalization(images)

    @property
    def penalised(self) -> bool:
        """Whether any step has a GC penalty."""
        return self._penalty is not None

    def data_facts(self) -> dict[str, Any]:
        """What a reader of the numbers must know about the data, for metadata.json.

        Raises:
          InputError: an image that the fingerprint needs cannot be read.
        """
        self._divided = with_fingerprint(self._divided)
        census = self.dataset.census
        return {
            "name": self.dataset.name,
            **identifying_facts(self._divided),
            "fingerprint": self._divided.fingerprint,
            # Which images of a folder were read, and which were left out.
            "census": census.facts() if census else None,
            "streamed": self.streamed,
            # The units of geometric complexity: inputs are (pixel / 255 - mean) / std.
            "normalization": self.normalization._asdict(),
            "gc_examples": {split: len(subset) for split, subset in self.subsets.items()},
        }

    def placed_splits(self) -> dict[str, ImageSplit]:
        """The splits on the run's devices, sorted because their order numbers random keys."""
        return {
            name: self._data.place(name, split, self.placement)
            for name, split in sorted(self.splits.items())
        }

    def initial_state(self) -> TrainState:
        """The state before the first step, placed on the run's devices."""
        # Placed even on one device. An uncommitted state, which JAX may move, and the committed
        # next one would each compile a program.
        return self.placement.replicate(self._new_state())

    def _new_state(self) -> TrainState:
        image_shape = self.dataset.train.images.shape[1:]
        optimizer = self._optimizer.make(self.hyperparameters)
        return init_state(self.config.seed, self._model, optimizer, image_shape)

    def _check_model_fits(self) -> None:
        state = jax.eval_shape(self._new_state)
        state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        # A step keeps the gradients, and both the old and the new state, in memory.
        needed, free = 3 * state_bytes, free_device_memory()
        if needed > free:
            raise InputError(
                f"config.model.width={self.config.model.width} makes a training state that needs"
                f" {needed / 2**30:.3g} GiB and {free / 2**30:.3g} GiB are free; lower it"
            )

    def programs(self) -> Programs:
        """The programs of the run, shared by runs that differ only in hyperparameters or seed."""
        config = self.config
        return compile_programs(
            ProgramSpec(
                self._model,
                self._optimizer,
                self.normalization,
                Augmentation(config.data.crop_padding, config.data.flip),
                self._penalty,
                config.precision,
                self.placement,
                None if self.streamed else config.batch_size,
                config.monitor.probes,
            )
        )


def _as_begun(data: TransferDataset, workdir: Path) -> TransferDataset:
    """Checks that the data are those of the run in the directory, if one was started."""
    if not has_begun(workdir):
        return data
    stored = read_json_object(workdir / "metadata.json").get("data") or {}
    return check_same_data(workdir, stored, data, "restore its data, or choose another workdir")
