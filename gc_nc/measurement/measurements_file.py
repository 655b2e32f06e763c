"""measurements.json of a run: the values measured at its checkpoints, by step and metric."""

import os
from pathlib import Path

from gc_nc.errors import InputError
from gc_nc.files import locked, read_json_object, to_json, write_atomically


def read_measurements(workdir: Path) -> dict[str, dict[str, float]]:
    """measurements.json, {step: {"split/metric": value}}; {} if nothing was measured yet.

    Raises:
      InputError: the file cannot be read, or its folder cannot be written to.
    """
    if not os.access(workdir, os.W_OK | os.X_OK):
        raise InputError(f"workdir {workdir} cannot be written to, and the results go there")
    path = workdir / "measurements.json"
    measurements = read_json_object(path) if path.exists() else {}
    for step, values in measurements.items():
        if not step.isdecimal() or not isinstance(values, dict):
            raise InputError(f"{path} contains {step!r}, which is not a step; move the file away")
    return measurements


def add_measurements(workdir: Path, step: int, values: dict[str, float]) -> Path:
    """Merges values of a step into measurements.json, keeps the others, and returns its path."""
    path = workdir / "measurements.json"
    # Several commands may measure the run at the same time.
    with locked(workdir / ".measurements.lock"):
        measurements = read_measurements(workdir)
        measurements[str(step)] = dict(sorted((measurements.get(str(step), {}) | values).items()))
        ordered = {name: measurements[name] for name in sorted(measurements, key=int)}
        write_atomically(path, to_json(ordered))
    return path
