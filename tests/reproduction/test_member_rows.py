"""Rows of members: which are trained and measured, what is written, and what is left alone."""

import json

import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import reproduce as command_line
from gc_nc.errors import InputError
from gc_nc.reproduction import member_rows, reproduce
from gc_nc.runs import loop
from gc_nc.runs.configuration import default_config
from gc_nc.runs.run_directory import RunInUseError, hold_run
from gc_nc.sweeps.members import make_members
from gc_nc.sweeps.sweep_directory import open_sweep, run_path

NAMES = ["seed=0", "seed=1", "seed=2"]


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Members, and what was done of them: a run and its measuring leave the files of a row."""
    base = default_config()
    base.data.data_dir = "/where/the/data/lie"
    members = make_members(base.lock(), [{"seed": seed} for seed in range(3)])
    workdir = tmp_path / "a_sweep"
    open_sweep(workdir, members)
    done = []

    def train(config, run_dir):
        done.append(f"train {config.seed}")
        run_dir.mkdir(exist_ok=True)
        (run_dir / "config.json").write_text(json.dumps(config.to_dict()))
        (run_dir / "metadata.json").write_text('{"git_revision": "abc"}')
        records = [{"step": 1, "batch/loss": 3.0}, {"step": 2, "train/accuracy": 0.5}]
        (run_dir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        (run_dir / "results.json").write_text('{"step": 2, "stopped_by": "train_loss"}')

    def measure(run_dir, plan, open_it):
        done.append(f"measure {run_dir.name}")
        (run_dir / "measurements.json").write_text('{"2": {"train/nc1": 0.5}}')

    monkeypatch.setattr(loop, "train", train)
    monkeypatch.setattr(member_rows, "measure_member", measure)
    return workdir, members, tmp_path / "rows", done


def write(sweep, **options):
    workdir, members, rows, _ = sweep
    return member_rows.write_rows(workdir, members, rows, "smoke", say=lambda line: None, **options)


def test_a_row_holds_what_was_measured_and_no_place(sweep):
    assert write(sweep, command="python -m it") == {}
    workdir, _, rows, done = sweep
    assert done == [f"{what}{i}" for i in range(3) for what in ("train ", "measure seed=")]
    text = (rows / "a_sweep" / "seed=1.json").read_text()
    row = json.loads(text)
    assert (row["sweep"], row["scale"], row["member"]) == ("a_sweep", "smoke", "seed=1")
    assert (row["setting"], row["seed"]) == ({}, 1)
    assert row["trained_by"] == "abc"
    assert row["command"] == "python -m it"
    assert row["results"]["stopped_by"] == "train_loss"
    assert row["evaluations"] == [{"step": 2, "train/accuracy": 0.5}]
    assert row["measurements"] == {"2": {"train/nc1": 0.5}}
    assert row["transfer"] == {"source": {}, "results": []}
    assert row["config"]["optimizer.learning_rate"] == 0.05
    assert "/where" not in text
    assert str(workdir) not in text


def test_the_next_call_does_what_is_missing(sweep):
    workdir, _, rows, done = sweep
    write(sweep)
    (rows / "a_sweep" / "seed=1.json").unlink()
    (rows / "a_sweep" / "seed=2.json").unlink()
    (run_path(workdir, "seed=2") / "results.json").unlink()
    done.clear()
    assert write(sweep) == {}
    assert done == ["measure seed=1", "train 2", "measure seed=2"]


def test_members_that_fail_or_are_in_use_are_named_and_left(sweep, monkeypatch):
    workdir, _, rows, done = sweep
    train = loop.train

    def failing(config, run_dir):
        if config.seed == 0:
            raise loop.DivergedError("the loss is nan")
        if config.seed == 1:
            raise RunInUseError("in use")
        train(config, run_dir)

    monkeypatch.setattr(loop, "train", failing)
    assert write(sweep) == {"seed=0": "the loss is nan", "seed=1": "in use"}
    assert [path.name for path in (rows / "a_sweep").iterdir()] == ["seed=2.json"]
    log = (workdir / "logs" / "seed=0.log").read_text()
    assert log.endswith("error: the loss is nan\n")
    # Nor is a run measured that another process measures.
    monkeypatch.setattr(loop, "train", train)
    train(sweep[1][1].config, run_path(workdir, "seed=1"))
    done.clear()
    with hold_run(run_path(workdir, "seed=1")):
        assert list(write(sweep)) == ["seed=1"]
    assert done == ["train 0", "measure seed=0"]


def test_a_row_of_another_config_is_refused_before_anything_is_done(sweep):
    _, _, rows, done = sweep
    write(sweep)
    path = rows / "a_sweep" / "seed=2.json"
    row = json.loads(path.read_text())
    row["config"]["batch_size"] = 7
    path.write_text(json.dumps(row))
    done.clear()
    with pytest.raises(InputError, match="batch_size is 7 there and 32 here"):
        write(sweep)
    assert done == []


@pytest.mark.parametrize("missing", [{}, {"seed=0": "in use"}])
def test_the_command_writes_rows_in_place_of_running_all_first(monkeypatch, tmp_path, missing):
    asked = []

    def write_rows(sweep_dir, members, rows_dir, scale, **options):
        asked.append((sweep_dir.name, len(members), rows_dir, scale, options["command"]))
        return missing

    record = {"number": "4", "scale": "smoke", "title": "", "missing": []}
    record["findings"] = [{"verdict": "holds", "claim": "", "evidence": ""}]
    monkeypatch.setattr(member_rows, "write_rows", write_rows)
    monkeypatch.setattr(reproduce, "make_figure", lambda *a, **options: record)
    monkeypatch.setattr(command_line, "write_report", lambda workdir: workdir / "report.html")
    flags.FLAGS.mark_as_parsed()
    values = {"figure": ["4"], "scale": "smoke", "workdir": str(tmp_path / "w")}
    with flagsaver.flagsaver(**values, rows=str(tmp_path / "rows")), pytest.raises(SystemExit) as e:
        command_line.main([])
    assert e.value.code == bool(missing)
    command = "python -m experiments.reproduce --figure=4 --scale=smoke --workdir=DIR --rows=ROWS"
    assert asked == [("resnet18_cifar_fs", 4, tmp_path / "rows", "smoke", command)]
