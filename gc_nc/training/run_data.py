"""The data of a run from its configuration."""

from pathlib import Path

import jax
from ml_collections import ConfigDict

from gc_nc.data.class_splits import ClassSplit, TransferDataset, divide_by_class, needed_classes
from gc_nc.data.sources import load_dataset, memory_limit
from gc_nc.training.placement import largest_of_all
from gc_nc.training.run_directory import read_json_object


def load_run_data(config: ConfigDict, workdir: Path | None = None) -> TransferDataset:
    """Loads config.data and divides it by class; `source` is what the network is trained on.

    Args:
      config: checked.
      workdir: of a run that may have begun; one that streamed its images goes on so.

    Raises:
      InputError: as `load_dataset` and `divide_by_class`.
    """
    data, classes = config.data, config.data.classes
    streaming, limit = data.streaming, data.memory_limit_gib
    if streaming is None and workdir is not None and (workdir / "metadata.json").exists():
        facts = read_json_object(workdir / "metadata.json").get("data", {})
        streaming = True if facts.get("streamed") else None
    if limit is None and jax.process_count() > 1:
        # All or none of the processes stream: they run one program.
        limit = -largest_of_all(-int(memory_limit() // 2**20)) / 2**10
    split = ClassSplit(
        classes.split,
        tuple(classes.source),
        tuple(classes.val),
        tuple(classes.target),
        tuple(classes.counts),
        classes.seed,
        classes.images_per_class,
        data.holdout,
    )
    dataset = load_dataset(
        data.source,
        data.name,
        data.data_dir,
        num_classes=data.num_classes,
        memory_limit_gib=limit,
        streaming=streaming,
        image_size=data.image_size,
        classes=needed_classes(split),
        images_per_class=classes.images_per_class,
        holdout=data.holdout,
        holdout_seed=classes.seed,
    )
    return divide_by_class(dataset, split)
