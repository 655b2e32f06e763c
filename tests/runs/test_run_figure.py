"""The picture of a run, also of runs that went wrong."""

import numpy as np
import pytest
from matplotlib.image import imread

from gc_nc.runs.run_figure import draw_run


def evaluations(values, count=3):
    names = (
        "accuracy",
        "geometric_complexity",
        "geometric_complexity_sem",
        "geometric_collapse",
        "neural_collapse",
    )
    return [
        {"step": 10 * i}
        | {
            f"{split}/{name}": values[i % len(values)]
            for split in ("train", "test")
            for name in names
        }
        for i in range(count)
    ]


# Warnings are errors here: an axis that cannot be logarithmic would warn.
@pytest.mark.parametrize(
    ("values", "count"),
    [([0.0], 3), ([np.inf, np.nan, 1.0], 3), ([1e-30, 1e30], 3), ([5.0], 1)],
)
def test_draws_whatever_was_measured(tmp_path, values, count):
    path = tmp_path / "figures" / "run.png"
    draw_run(evaluations(values, count), path, title="title", subtitle="subtitle")
    assert imread(path).shape == (832, 1170, 4)


def test_shows_the_values(tmp_path):
    pictures = []
    for values in ([1.0, 2.0, 4.0], [4.0, 2.0, 1.0]):
        draw_run(evaluations(values), tmp_path / "run.png", title="t", subtitle="s")
        pictures.append(imread(tmp_path / "run.png"))
    assert not np.array_equal(*pictures)
