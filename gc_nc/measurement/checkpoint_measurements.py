"""What figures need besides a run's evaluations, measured once and kept in measurements.json."""

from collections.abc import Callable, Sequence
from pathlib import Path

from gc_nc.errors import InputError
from gc_nc.measurement.full_measurement import measure_run
from gc_nc.measurement.layer_complexity import geometric_complexity_by_layer
from gc_nc.measurement.measurements_file import add_measurements, read_measurements
from gc_nc.random_streams import stream_key
from gc_nc.runs.finished_run import FinishedRun


def some_steps(steps: Sequence[int], most: int) -> list[int]:
    """At most `most` of ascending steps: the last one and those nearest to even spacing."""
    first, last = steps[0], steps[-1]
    even = [last - i * (last - first) / max(1, most - 1) for i in range(most)]
    return sorted({min(steps, key=lambda step, at=at: abs(step - at)) for at in even})


Opener = Callable[[Path], FinishedRun]


def measure_checkpoints(
    workdir: Path,
    open_it: Opener,
    *,
    most_steps: int,
    gc_examples: int,
    gc_probes: int,
    num_train: int,
) -> dict[int, dict[str, float]]:
    """Measures all metrics of `measure_run` except flatness, on both splits.

    Args:
      workdir: the directory of a finished run.
      open_it: opens the run; called only if something is missing.
      most_steps: the largest number of checkpoints, evenly chosen and including the last.
      gc_examples: number of examples of each split on which GC is estimated.
      gc_probes: number of Jacobian products for each of these.
      num_train: number of training images.

    Returns:
      {step: {"train/..." and "test/...": value}}.
    """
    stored, steps = read_measurements(workdir), chosen_steps(workdir, most_steps)
    as_asked = {"train/gc_examples": min(gc_examples, num_train), "train/gc_probes": gc_probes}

    def is_there(values: dict[str, float]) -> bool:
        # Another command may have measured on other examples, or only one split, whose bound then
        # uses its own Poincare constant.
        constant = values.get("test/bound_poincare_constant")
        return (
            all(values.get(name) == value for name, value in as_asked.items())
            and "test/nearest_mean_error" in values
            and constant == values.get("train/poincare_constant")
        )

    missing = [step for step in steps if not is_there(stored.get(str(step), {}))]
    if missing:
        measured = measure_run(
            open_it(workdir),
            missing,
            ("train", "test"),
            gc_examples=gc_examples,
            gc_probes=gc_probes,
            flatness_examples=0,
        )
        for step, splits in measured:
            values = {
                f"{split}/{name}": value
                for split, measurement in splits.items()
                for name, value in measurement.values.items()
            }
            add_measurements(workdir, step, values)
        stored = read_measurements(workdir)
    return {step: stored[str(step)] for step in steps}


def measure_flatness(workdir: Path, open_it: Opener, *, flatness_examples: int) -> dict[str, float]:
    """Flatness of the loss on some training images at the last checkpoint; see `measure_run`."""
    [step] = chosen_steps(workdir, 1)
    stored = read_measurements(workdir).get(str(step), {})
    if stored.get("train/flatness_examples") != flatness_examples:
        [(_, splits)] = measure_run(
            open_it(workdir),
            [step],
            ("train",),
            gc_examples=2,
            gc_probes=1,
            flatness_examples=flatness_examples,
        )
        values = splits["train"].values
        flatness = {
            f"train/{name}": values[name]
            for name in values
            if name.startswith(("hessian", "squared_gradient", "sam", "flatness"))
        }
        add_measurements(workdir, step, flatness)
        stored = read_measurements(workdir)[str(step)]
    return stored


def measure_layers(
    workdir: Path, open_it: Opener, *, most_steps: int, num_examples: int, num_probes: int
) -> dict[int, dict[str, float]]:
    """GC of every layer on some training images, at some checkpoints.

    Returns:
      {step: {layer: GC}}, layers from the input on.
    """
    stored, steps = read_measurements(workdir), chosen_steps(workdir, most_steps)
    measured = {}
    for step in steps:
        known = stored.get(str(step), {})
        options = {"layers/examples": float(num_examples), "layers/probes": float(num_probes)}
        if any(known.get(name) != value for name, value in options.items()):
            values = _layers_at(open_it(workdir), step, num_examples, num_probes) | options
            add_measurements(workdir, step, values)
            known = values
        layers = {name: value for name, value in known.items() if name.startswith(_LAYER)}
        # Their number comes first in the name, because the file sorts its keys.
        measured[step] = {name.split("_", 2)[2]: layers[name] for name in sorted(layers)}
    return measured


_LAYER = "layers/gc_"


def _layers_at(run: FinishedRun, step: int, num_examples: int, num_probes: int) -> dict[str, float]:
    key = stream_key(run.config.seed, "GC by layer")
    by_layer = geometric_complexity_by_layer(
        run.model, run.variables(step), run.gc_inputs(num_examples), key, num_probes=num_probes
    )
    return {
        f"{_LAYER}{i:02d}_{layer}": float(estimate.mean)
        for i, (layer, estimate) in enumerate(by_layer.items())
    }


def chosen_steps(workdir: Path, most: int) -> list[int]:
    """At most `most` steps of a run that have a checkpoint, including the last.

    Raises:
      InputError: there are no checkpoints.
    """
    found = (workdir / "checkpoints").glob("*")
    steps = sorted(int(path.name) for path in found if path.name.isdecimal())
    if not steps:
        raise InputError(
            f"{workdir} has no checkpoint to measure; remove its results.json and run the same"
            " command again to train it"
        )
    return some_steps(steps, most)
