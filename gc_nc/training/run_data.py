"""The data of a run from its configuration."""

from ml_collections import ConfigDict

from gc_nc.data.class_splits import ClassSplit, TransferDataset, divide_by_class, needed_classes
from gc_nc.data.sources import load_dataset


def load_run_data(config: ConfigDict) -> TransferDataset:
    """Loads config.data and divides it by class; `source` is what the network is trained on.

    Args:
      config: checked.

    Raises:
      InputError: as `load_dataset` and `divide_by_class`.
    """
    data, classes = config.data, config.data.classes
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
        memory_limit_gib=data.memory_limit_gib,
        streaming=data.streaming,
        image_size=data.image_size,
        classes=needed_classes(split),
        images_per_class=classes.images_per_class,
        holdout=data.holdout,
        holdout_seed=classes.seed,
    )
    return divide_by_class(dataset, split)
