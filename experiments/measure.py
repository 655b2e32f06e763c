"""Measures every metric at the checkpoints of a finished or interrupted run.

    python -m experiments.measure --workdir=DIR [--step=latest|all|N] [--splits=train,test]
        [--gc_examples=1024] [--gc_probes=4] [--flatness_examples=128] [--data_dir=...]

Prints a table for each step, merges the numbers into DIR/measurements.json and draws all pairs of
classes in DIR/figures/cdnv_SPLIT_STEP.png. The same command gives the same numbers again.

Exit codes: 0, measured; 2, bad input, and nothing was written; 130, stopped by Ctrl-C, and the
steps measured so far are written.
"""

from pathlib import Path

import numpy as np
from absl import flags
from tqdm import tqdm

from experiments import launcher
from gc_nc import metrics
from gc_nc.errors import InputError
from gc_nc.measurement import full_measurement
from gc_nc.measurement.cdnv_figure import draw_cdnv
from gc_nc.measurement.measurements_file import add_measurements, read_measurements
from gc_nc.runs import finished_run

# Other commands have flags of the same name, and tests import several commands.
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.", allow_override=True)
_STEP = flags.DEFINE_string("step", "latest", "Which checkpoint: latest, all, or a step.")
_SPLITS = flags.DEFINE_list(
    "splits", list(full_measurement.SPLITS), "Splits to measure: train, test or both."
)
_GC_EXAMPLES = flags.DEFINE_integer(
    "gc_examples", 1024, "Random examples of each split for geometric complexity.", lower_bound=2
)
_GC_PROBES = flags.DEFINE_integer(
    "gc_probes", 4, "Random Jacobian products for each of these examples.", lower_bound=1
)
_FLATNESS_EXAMPLES = flags.DEFINE_integer(
    "flatness_examples",
    128,
    "Random examples for the gradient and the Hessian; 0 leaves both out.",
    lower_bound=0,
)
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Where the data are now, if they have moved.", allow_override=True
)


def main(argv: list[str]) -> None:
    """Measures, prints and writes."""
    del argv
    if not _WORKDIR.value:
        raise InputError("--workdir is missing; name the folder of a trained run")
    splits = [name for name in full_measurement.SPLITS if name in _SPLITS.value]
    if not splits or sorted(splits) != sorted(_SPLITS.value):
        raise InputError(f"--splits={','.join(_SPLITS.value)} must be train, test or train,test")
    workdir = Path(_WORKDIR.value).expanduser()
    run = finished_run.open_run(workdir, _DATA_DIR.value)
    steps = run.select_steps(_STEP.value)
    # Before any work: whether the results can be written.
    read_measurements(workdir)
    total = full_measurement.num_reports(run, steps, splits, _FLATNESS_EXAMPLES.value)
    # None: no bar in a pipe, where its carriage returns would only litter.
    with tqdm(total=total, unit="part", dynamic_ncols=True, disable=None) as bar:

        def report(part):
            bar.set_description(part, refresh=False)
            bar.update()

        options = {
            "gc_examples": _GC_EXAMPLES.value,
            "gc_probes": _GC_PROBES.value,
            "flatness_examples": _FLATNESS_EXAMPLES.value,
        }
        for step, measured in full_measurement.measure_run(
            run, steps, splits, **options, report=report
        ):
            values = {
                f"{split}/{name}": value
                for split, measurement in measured.items()
                for name, value in measurement.values.items()
            }
            written = [add_measurements(workdir, step, values)]
            for split, measurement in measured.items():
                written.append(workdir / "figures" / f"cdnv_{split}_{step}.png")
                title = f"{run.config.model.name} on {run.dataset.name}, {split}, step {step}"
                matrix = np.asarray(metrics.cdnv_matrix(measurement.statistics))
                draw_cdnv(matrix, run.dataset.class_names, written[-1], title)
            bar.write(full_measurement.measurement_table(step, measured))
            bar.write(f"written: {', '.join(map(str, written))}\n")


if __name__ == "__main__":
    launcher.run(main)
