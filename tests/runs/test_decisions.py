"""When a run is done: a function of its evaluations, so that a resumed run ends where it would."""

import pytest

from gc_nc.runs.configuration import default_config
from gc_nc.runs.decisions import Decisions
from gc_nc.runs.progress import results_table

LOSSES = {0: 0.3, 10: 2.0, 20: 1.1, 30: 1.0, 40: 0.2}


def decisions(stop_at_train_loss, num_steps=40):
    config = default_config()
    config.num_steps = num_steps
    config.stop_at_train_loss = stop_at_train_loss
    return Decisions(config, 100)


def record(step):
    return {
        "step": step,
        "train/accuracy": 0.5,
        "test/accuracy": 0.5,
        "train/loss": LOSSES[step],
    }


@pytest.mark.parametrize(
    ("stop_at", "end", "stopped_by"),
    [
        (1.0, 30, "train_loss"),
        (1.1, 20, "train_loss"),
        # Before the first step no loss is low enough, and at the last one it is reached.
        (0.3, 40, "train_loss"),
        (0.1, 40, "num_steps"),
        (None, 40, "num_steps"),
    ],
)
def test_a_run_ends_at_the_first_evaluation_with_a_loss_as_low_as_asked(stop_at, end, stopped_by):
    unbroken = decisions(stop_at)
    for step in LOSSES:
        assert unbroken.stopped_by is None
        unbroken.note(record(step))
        if step == end:
            break
    assert unbroken.stopped_by == stopped_by
    # A run that goes on takes the evaluations of metrics.jsonl anew.
    resumed = decisions(stop_at)
    for step in LOSSES:
        if step <= end:
            resumed.note(record(step))
    assert resumed.stopped_by == stopped_by


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_ends_nothing(loss):
    unended = decisions(1.0)
    unended.note(record(10) | {"train/loss": loss})
    assert unended.stopped_by is None


@pytest.mark.parametrize("stopped_by", ["num_steps", "train_loss", "terminal_phase"])
def test_the_table_of_a_finished_run_says_why_it_ended(stopped_by):
    names = ("accuracy", "loss", "neural_collapse")
    names += ("geometric_complexity", "geometric_complexity_sem", "geometric_collapse")
    metrics = {f"{split}/{name}": 0.5 for split in ("train", "test") for name in names}
    table = results_table({"step": 7, "stopped_by": stopped_by, "metrics": metrics})
    assert table.startswith("finished at step 7 (")
