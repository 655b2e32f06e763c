"""Runs: what they write, how they stop, go on and end."""

import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest

from gc_nc.errors import InputError
from gc_nc.runs import loop, run_directory
from gc_nc.runs.checkpoints import Checkpoints, StorageError
from gc_nc.runs.progress import Progress, results_table

WALL_CLOCK = ("time", "per_sec", "seconds")


def deterministic(records):
    return [
        {k: v for k, v in record.items() if not any(part in k for part in WALL_CLOCK)}
        for record in records
    ]


def state_leaves(config, workdir, step):
    """The arrays of a checkpoint, restored into a fresh state."""
    from gc_nc.models import build_model
    from gc_nc.training.step import init_state, make_optimizer

    model = build_model(config.model.name, 2, width=config.model.width)
    like = init_state(5, model, make_optimizer(config), (8, 8, 1))
    with Checkpoints(workdir / "checkpoints", keep=2) as checkpoints:
        assert checkpoints.latest_step() == step
        return jax.tree.leaves(checkpoints.restore(step, like))


def files_of(workdir):
    return {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}


_UNBROKEN = {}


@pytest.fixture
def unbroken(tiny_run):
    """Results, records and last state of the tiny run, trained once for all tests of a process."""
    if not _UNBROKEN:
        config, workdir = tiny_run
        workdir = workdir.with_name("unbroken")
        _UNBROKEN["results"] = loop.train(config, workdir)
        _UNBROKEN["records"] = deterministic(run_directory.read_records(workdir))
        _UNBROKEN["state"] = state_leaves(config, workdir, 8)
    return _UNBROKEN


def test_a_run_writes_everything_and_a_second_start_nothing(tiny_run, capsys):
    config, workdir = tiny_run
    results = loop.train(config, workdir)
    assert json.loads((workdir / "config.json").read_text())["num_steps"] == 8
    metadata = json.loads((workdir / "metadata.json").read_text())
    assert metadata["data"]["num_train"] == 10
    assert metadata["packages"]["jax"] == jax.__version__
    assert (workdir / "figures" / "run.png").read_bytes().startswith(b"\x89PNG")
    assert list(workdir.glob("events.out.tfevents.*"))
    records = run_directory.read_records(workdir)
    assert [r["step"] for r in records if "train/accuracy" in r] == [0, 4, 8]
    assert [r["step"] for r in records if "batch/loss" in r] == [2, 4, 6, 8]
    last = records[-1]
    for split in ("train", "test"):
        for name in (
            "accuracy",
            "loss",
            "neural_collapse",
            "geometric_collapse",
            "geometric_complexity",
            "geometric_complexity_sem",
            "squared_embedding_norm",
            "squared_class_distance",
            "relative_geometric_complexity",
        ):
            assert results["metrics"][f"{split}/{name}"] == last[f"{split}/{name}"]
    assert results["stopped_by"] == "num_steps"
    assert "finished at step 8" in results_table(results)
    before = files_of(workdir)
    assert loop.train(config, workdir) == results
    assert files_of(workdir) == before
    # No bar in a pipe.
    assert "\r" not in capsys.readouterr().err


def test_tensorboard_reads_the_events(tiny_run):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto import event_pb2
    from tensorboardX.record_writer import masked_crc32c  # noqa: F401 - the format's own writer

    config, workdir = tiny_run
    loop.train(config, workdir)
    tags = set()
    for path in workdir.glob("events.out.tfevents.*"):
        content, start = path.read_bytes(), 0
        while start < len(content):
            # TFRecord: length (8), its checksum (4), the event, its checksum (4).
            length = int.from_bytes(content[start : start + 8], "little")
            event = event_pb2.Event.FromString(content[start + 12 : start + 12 + length])
            tags |= {value.tag for value in event.summary.value}
            start += 16 + length
    assert {"train/geometric_complexity", "test/accuracy", "batch/loss"} <= tags


# Between evaluations, and at one.
@pytest.mark.parametrize(("stop_after", "number"), [(3, signal.SIGINT), (4, signal.SIGTERM)])
def test_r4_an_interrupted_run_ends_as_an_unbroken_one(
    tiny_run, unbroken, monkeypatch, capsys, stop_after, number
):
    config, workdir = tiny_run
    advance = Progress.advance
    steps = []

    def interrupt(self):
        advance(self)
        steps.append(1)
        if len(steps) == stop_after:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Progress, "advance", interrupt)
    with pytest.raises(loop.Interrupted, match=f"step {stop_after}; the same command") as stop:
        loop.train(config, workdir)
    assert stop.value.signal_number == number
    assert not (workdir / "results.json").exists()
    assert loop.train(config, workdir) == unbroken["results"]
    assert f"resuming from the checkpoint of step {stop_after}" in capsys.readouterr().out
    assert deterministic(run_directory.read_records(workdir)) == unbroken["records"]
    for a, b in zip(state_leaves(config, workdir, 8), unbroken["state"], strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_signal_during_an_evaluation_saves_too(tiny_run, unbroken, monkeypatch):
    config, workdir = tiny_run
    evaluation = Progress.evaluation

    def interrupt(self, step, values):
        evaluation(self, step, values)
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "evaluation", interrupt)
        with pytest.raises(loop.Interrupted, match="step 4;"):
            loop.train(config, workdir)
    with Checkpoints(workdir / "checkpoints", keep=2) as checkpoints:
        assert checkpoints.latest_step() == 4
    assert loop.train(config, workdir) == unbroken["results"]


def test_records_after_the_last_checkpoint_are_taken_again(tiny_run, unbroken, monkeypatch):
    config, workdir = tiny_run

    # Dies at step 8, after its checkpoint of step 5 and an evaluation at 8.
    def die(*_, **__):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "draw_finished_run", die)
        patch.setattr(Checkpoints, "save", _only_below(8, Checkpoints.save))
        with pytest.raises(OSError, match="no space left"):
            loop.train(config, workdir)
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "cut sho')
    assert loop.train(config, workdir) == unbroken["results"]
    steps = [r["step"] for r in run_directory.read_records(workdir) if "train/accuracy" in r]
    assert steps == [0, 4, 8]


@pytest.mark.parametrize(
    "lost", [pytest.param("all", marks=pytest.mark.slow), "the last evaluation"]
)
def test_a_checkpoint_ahead_of_the_log_still_ends(tiny_run, unbroken, monkeypatch, lost):
    config, workdir = tiny_run

    def die(*_, **__):
        raise OSError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "draw_finished_run", die)
        with pytest.raises(OSError, match="power cut"):
            loop.train(config, workdir)
    log = workdir / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("" if lost == "all" else "".join(lines[:-1]))
    # The checkpoint of step 8 is there: its evaluation alone is done again.
    assert loop.train(config, workdir) == unbroken["results"]


def test_a_start_cut_off_before_anything_was_written_is_taken_up(tiny_run):
    config, workdir = tiny_run
    workdir.mkdir()
    (workdir / ".config.json.123").write_text("{")
    (workdir / "metadata.json").write_text("{}")
    loop.train(config, workdir)
    assert (workdir / "results.json").exists()


def test_a_run_without_its_checkpoints_says_that_it_starts_again(tiny_run, capsys):
    config, workdir = tiny_run
    results = loop.train(config, workdir)
    (workdir / "results.json").unlink()
    shutil.rmtree(workdir / "checkpoints")
    assert loop.train(config, workdir) == results
    assert "no checkpoint to resume from: starting again" in capsys.readouterr().out


def _only_below(limit, save):
    return lambda self, state: save(self, state) if int(state.step) < limit else None


def test_r1_the_last_step_is_saved_whatever_the_interval(tiny_run):
    config, workdir = tiny_run
    with config.unlocked():
        config.num_steps = 7
    loop.train(config, workdir)
    assert any(np.any(leaf) for leaf in state_leaves(config, workdir, 7))


def test_r1_a_failed_save_is_an_error(tiny_run, monkeypatch):
    import orbax.checkpoint as ocp

    config, workdir = tiny_run
    monkeypatch.setattr(ocp.CheckpointManager, "save", lambda *_, **__: False)
    with pytest.raises(StorageError, match="checkpoint of step 4 was not saved"):
        loop.train(config, workdir)
    assert not (workdir / "results.json").exists()


def test_r1_a_failed_background_write_is_an_error(tiny_run, monkeypatch):
    import orbax.checkpoint as ocp

    def fail(_):
        raise OSError("disk full")

    config, workdir = tiny_run
    monkeypatch.setattr(ocp.CheckpointManager, "wait_until_finished", fail)
    with pytest.raises(StorageError, match=r"disk full\).*the same command resumes"):
        loop.train(config, workdir)
    assert not (workdir / "results.json").exists()


@pytest.mark.slow
def test_terminal_phase_stops_the_run_also_a_resumed_one(tiny_run, monkeypatch):
    config, workdir = tiny_run
    config.num_steps = 400
    config.optimizer.learning_rate = 0.02
    config.checkpoint.every_steps = 0
    config.evaluation.every_steps = 10
    # 2 epochs of 10 examples are 10 steps of 2.
    config.stop_after_epochs_at_full_accuracy = 2.0
    results = loop.train(config, workdir)
    evaluations = [r for r in run_directory.read_records(workdir) if "train/accuracy" in r]
    assert results["stopped_by"] == "terminal_phase"
    assert results["step"] < 400
    assert [r["train/accuracy"] for r in evaluations[-2:]] == [1, 1]
    assert evaluations[-3]["train/accuracy"] < 1
    assert evaluations[-1]["step"] - evaluations[-2]["step"] == 10
    # Stopped between its evaluations at accuracy 1.0, it still counts from the first of them.
    step_before_end = results["step"] - 3
    advance, steps = Progress.advance, []

    def interrupt(self):
        advance(self)
        steps.append(1)
        if len(steps) == step_before_end:
            os.kill(os.getpid(), signal.SIGTERM)

    other = workdir.with_name("other")
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "advance", interrupt)
        with pytest.raises(loop.Interrupted, match=f"step {step_before_end};"):
            loop.train(config, other)
    assert loop.train(config, other) == results


def test_a_diverging_loss_stops_the_run(tiny_run):
    config, workdir = tiny_run
    config.optimizer.learning_rate = 1e20
    with pytest.raises(loop.DivergedError, match=r"step \d+ \(last good checkpoint: none\)"):
        loop.train(config, workdir)


def test_seeds_change_the_run(tiny_run):
    config, workdir = tiny_run
    first = loop.train(config, workdir)
    config.seed = 1
    assert loop.train(config, workdir.with_name("other"))["metrics"] != first["metrics"]


def test_a_run_from_before_a_key_existed_is_taken_up_and_measured(tiny_run, capsys):
    from gc_nc.runs.finished_run import open_run

    config, workdir = tiny_run
    results = loop.train(config, workdir)
    path = workdir / "config.json"
    stored = json.loads(path.read_text())
    del stored["gc_penalty"], stored["precision"], stored["model"]["dtype"]
    path.write_text(json.dumps(stored))
    assert loop.train(config, workdir) == results
    assert open_run(workdir).config.to_dict() == config.to_dict()
    config.gc_penalty.weight = 0.5
    with pytest.raises(InputError, match=r"weight is 0\.0 there and 0\.5 here"):
        loop.train(config, workdir)


def test_an_exact_penalty_of_a_wide_embedding_is_refused_at_the_start(tiny_run):
    config, workdir = tiny_run
    config.model.width = 0.25
    config.gc_penalty.weight, config.gc_penalty.method = 1.0, "exact"
    with pytest.raises(InputError, match="of the 128 dimensions of the embedding, at most 64"):
        loop.train(config, workdir)
    assert not workdir.exists()


def test_another_config_is_refused_with_the_keys_that_differ(tiny_run):
    config, workdir = tiny_run
    loop.train(config, workdir)
    before = files_of(workdir)
    config.optimizer.learning_rate = 0.7
    config.seed = 3
    with pytest.raises(InputError) as error:
        loop.train(config, workdir)
    assert "optimizer.learning_rate is 0.05 there and 0.7 here" in str(error.value)
    assert "seed is 0 there and 3 here" in str(error.value)
    assert "momentum" not in str(error.value)
    assert files_of(workdir) == before


def a_file(workdir):
    workdir.write_text("")


def below_a_file(workdir):
    return workdir.parent / "tiny.npz" / "run"


def a_pattern(workdir):
    return workdir.with_name("run[1]")


def a_folder_of_something_else(workdir):
    workdir.mkdir()
    (workdir / "thesis.tex").write_text("")


def a_broken_config(workdir):
    workdir.mkdir()
    (workdir / "config.json").write_text("{")


def a_list_for_a_config(workdir):
    workdir.mkdir()
    (workdir / "config.json").write_text("[]")


def a_long_name(workdir):
    return workdir.with_name("x" * 300)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (a_file, "is not a folder that can be written to"),
        (below_a_file, "is not a folder that can be written to"),
        (a_pattern, r"has \[ \] in its path"),
        (a_folder_of_something_else, "does not contain a run"),
        (a_broken_config, "cannot be read"),
        (a_list_for_a_config, "is not a JSON object"),
        (a_long_name, "cannot be used"),
    ],
)
def test_a_workdir_that_cannot_serve(tiny_run, prepare, message):
    config, workdir = tiny_run
    workdir = prepare(workdir) or workdir
    with pytest.raises(InputError, match=message):
        loop.train(config, workdir)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("batch_size", 11, "batch_size=11 is more than the 10 training examples"),
        ("data.crop_padding", 5, "crop_padding=5 is more than half"),
        ("data.data_dir", "missing.npz", "does not exist"),
        ("model.width", 100.0, "width=100.0 makes a training state that needs .* GiB"),
    ],
)
def test_bad_input_leaves_nothing_behind(tiny_run, key, value, message):
    config, workdir = tiny_run
    # Wide enough to be too wide.
    config.model.name = "vgg11"
    config.update_from_flattened_dict({key: value})
    with pytest.raises(InputError, match=message):
        loop.train(config, workdir)
    assert not workdir.exists()
