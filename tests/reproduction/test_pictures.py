"""Pictures and steps of figures whose right answer is plain."""

import numpy as np
import pytest
from PIL import Image

from gc_nc.measurement.checkpoint_measurements import some_steps
from gc_nc.reproduction.panels import Column, Scatter, draw_rows, draw_scatters
from gc_nc.reproduction.run_table import Row, Run


def make_run(value, seed, values):
    evaluations = [{"step": 10 * i, "metric": value} for i, value in enumerate(values)]
    metadata = {"data": {"num_train": 320}}
    config = {"batch_size": 32, "optimizer.l2": value, "seed": seed}
    setting = (("optimizer.l2", value),)
    return Run(f"{value}_{seed}", setting, seed, config, evaluations, metadata)


def curves(run):
    return [(run.epochs(record["step"]), record) for record in run.evaluations]


@pytest.mark.parametrize(
    ("steps", "most", "chosen"),
    [
        ([1, 2, 3], 5, [1, 2, 3]),
        (list(range(0, 101, 10)), 3, [0, 50, 100]),
        ([5, 10, 15, 20], 1, [20]),
        ([7], 1, [7]),
    ],
)
def test_chosen_steps_are_even_and_have_the_last(steps, most, chosen):
    assert some_steps(steps, most) == chosen


def test_some_steps_are_never_more_and_ascend():
    for count in range(1, 30):
        for most in range(1, 12):
            chosen = some_steps(list(range(count)), most)
            assert len(chosen) == min(count, most)
            assert chosen == sorted(set(chosen))
            assert chosen[-1] == count - 1


def test_rows_take_runs_of_unequal_length_nan_and_values_that_no_logarithm_has(tmp_path):
    long, short = [4.0, 2.0, 1.0, 0.5], [3.0, float("nan"), 1.5]
    row = Row(
        "optimizer.l2",
        {0.0: [make_run(0.0, 0, long), make_run(0.0, 1, short)], 0.1: [make_run(0.1, 0, [0.0])]},
    )
    columns = [Column("metric", "Metric"), Column("metric", "Metric", logarithmic=False)]
    draw_rows([row, row], columns, curves, tmp_path / "new" / "rows.png")
    with Image.open(tmp_path / "new" / "rows.png") as image:
        assert np.asarray(image).std() > 1


def test_rows_without_a_finite_number_are_empty_panels(tmp_path):
    row = Row("batch_size", {8: [make_run(8, 0, [float("inf")] * 3)]})
    draw_rows([row], [Column("metric", "Metric")], curves, tmp_path / "rows.png")


def test_scatters_fill_as_many_panels_as_there_are(tmp_path):
    groups = {"a": [{"x": 1.0, "y": 2.0}, {"x": 3.0, "y": 0.0}], "b": [{"x": 2.0, "y": 5.0}]}
    panels = [Scatter("x", "y", "X", "Y", diagonal=True)] * 4
    draw_scatters(groups, panels, tmp_path / "scatter.png", columns=3)
    with Image.open(tmp_path / "scatter.png") as image:
        assert image.size[0] > 1000
