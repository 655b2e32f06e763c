"""Checks whether data are those that a run was started with."""

import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gc_nc.data.class_names import canonical_name
from gc_nc.data.class_splits import TransferDataset, held_class_names
from gc_nc.data.fingerprints import with_fingerprint
from gc_nc.devices import is_main_process
from gc_nc.errors import InputError


def identifying_facts(data: TransferDataset) -> dict[str, Any]:
    """Counts, shapes and names of the classes, as metadata.json has them."""
    dataset = data.source
    return {
        "num_train": len(dataset.train.labels),
        "num_test": len(dataset.test.labels),
        "image_shape": list(dataset.train.images.shape[1:]),
        "num_classes": dataset.num_classes,
        "class_names": list(dataset.class_names),
        "held_class_names": {part: list(names) for part, names in held_class_names(data).items()},
    }


def check_same_data(
    workdir: Path, stored: dict[str, Any], data: TransferDataset, remedy: str
) -> TransferDataset:
    """Checks data against the run's record of its own, and says so if that record is incomplete.

    Args:
      workdir: the run's directory.
      stored: the data section of its metadata.json.
      data: the data that it would use now.
      remedy: the end of the message.

    Returns:
      The data, with their fingerprint if the run recorded one.

    Raises:
      InputError: the data differ; the message says in what.
    """
    # Runs of earlier versions did not record all of these.
    facts = {
        name: value
        for name, value in identifying_facts(data).items()
        if stored.get(name) is not None
    }
    differing = [
        f"{name} is {_short(value)} now and was {_short(stored[name])}"
        for name, value in facts.items()
        if value != _composed(stored[name])
    ]
    noted = stored.get("fingerprint")
    # If the facts differ, labels and pixels differ too and add nothing to the message.
    if not differing and noted:
        data = with_fingerprint(data)
        differing = _differing_parts(noted, data.fingerprint or {})
    if differing:
        raise InputError(
            f"the data are not those that {workdir} was trained on: {'; '.join(differing)};"
            f" {remedy}"
        )
    if not noted and is_main_process():
        compared = "counts, shapes and names of its classes are" if facts else "nothing can be"
        tqdm.write(
            f"{workdir} recorded no fingerprint of its labels and pixels: of its data {compared}"
            " compared",
            file=sys.stderr,
        )
    return data


def _differing_parts(
    noted: dict[str, dict[str, str]], found: dict[str, dict[str, str]]
) -> list[str]:
    """For example "labels of the train images differ", "pixels of the test images differ"."""
    parts = {
        what: [
            part
            for part in noted | found
            if noted.get(part, {}).get(what) != found.get(part, {}).get(what)
        ]
        for what in ("labels", "pixels")
    }
    differing = []
    if parts["labels"]:
        differing.append(f"labels of the {' and '.join(parts['labels'])} images differ")
    if parts["pixels"]:
        differing.append(f"pixels of the {' and '.join(parts['pixels'])} images differ")
    return differing


def _composed(value: Any) -> Any:
    """The value with names in the form that is compared; runs recorded them as written."""
    if isinstance(value, str):
        return canonical_name(value)
    if isinstance(value, list):
        return [_composed(entry) for entry in value]
    if isinstance(value, dict):
        return {key: _composed(entry) for key, entry in value.items()}
    return value


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:120]}..."
