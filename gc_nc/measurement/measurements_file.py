"""measurements.json of a run: what was measured at its checkpoints, by step and metric."""

import os
from pathlib import Path

from gc_nc.errors import InputError
from gc_nc.files import locked, read_json_object, to_json, write_atomically


def read_measurements(workdir: Path) -> dict[str, dict[str, float]]:
    """measurements.json, {step: {"split/metric": value}}; {} where nothing was measured yet.

    Raises:
      InputError: it cannot be read, or nothing can be written beside it.
    """
    if not os.access(workdir, os.W_OK | os.X_OK):
        raise InputError(f"workdir {workdir} cannot be written to, and the results go there")
    path = workdir / "measurements.json"
    measurements = read_json_object(path) if path.exists() else {}
    for step, values in measurements.items():
        if not step.isdecimal() or not isinstance(values, dict):
            raise InputError(f"{path} holds {step!r}, which is not a step; move the file away")
    return measurements


def add_measurements(workdir: Path, step: int, values: dict[str, float]) -> Path:
    """Merges values of a step into measurements.json, whose other values stay; returns its path."""
    path = workdir / "measurements.json"
    # Several commands may measure the run at once.
    with locked(workdir / ".measurements.lock"):
        measurements = read_measurements(workdir)
        measurements[str(step)] = dict(sorted((measurements.get(str(step), {}) | values).items()))
        ordered = {name: measurements[name] for name in sorted(measurements, key=int)}
        write_atomically(path, to_json(ordered))
    return path
