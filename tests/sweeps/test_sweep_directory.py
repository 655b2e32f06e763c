"""The directory of a sweep: what it takes, what it keeps, what it refuses."""

import json

import pytest

from gc_nc.errors import InputError
from gc_nc.runs.configuration import default_config
from gc_nc.runs.finished_run import read_config
from gc_nc.sweeps import grid
from gc_nc.sweeps.members import make_members
from gc_nc.sweeps.sweep_directory import config_path, open_sweep


def members(base=None, **values):
    return make_members(base or default_config(), grid(values))


def test_a_later_sweep_adds_its_members(tmp_path):
    workdir = tmp_path / "new" / "sweep"
    open_sweep(workdir, members(seed=(0, 1)))
    open_sweep(workdir, members(seed=(1, 2)))
    listing = json.loads((workdir / "sweep.json").read_text())
    assert listing == {f"seed={i}": {"seed": i} for i in range(3)}


def test_another_base_is_refused_also_before_any_member_began(tmp_path):
    open_sweep(tmp_path, members(seed=(0,)))
    before = config_path(tmp_path, "seed=0").read_text()
    base = default_config()
    base.num_steps = 7
    with pytest.raises(InputError, match="num_steps is 2000 there and 7 here"):
        open_sweep(tmp_path, members(base, seed=(0, 1)))
    assert config_path(tmp_path, "seed=0").read_text() == before
    assert "seed=1" not in json.loads((tmp_path / "sweep.json").read_text())


def test_configs_come_back_as_they_were(tmp_path):
    values = {"schedule.boundaries": [(0.5,), ()], "data.name": [None, "a b,*"]}
    for member in (all_of_them := make_members(default_config(), grid(values))):
        open_sweep(tmp_path, all_of_them)
        assert read_config(config_path(tmp_path, member.name)) == member.config


def test_runs_of_another_config_are_refused_and_nothing_is_written(tmp_path):
    open_sweep(tmp_path, members(seed=(0,)))
    run = tmp_path / "seed=1"
    run.mkdir()
    config = default_config()
    config.num_steps = 7
    (run / "config.json").write_text(json.dumps(config.to_dict()))
    # A finished one too.
    (run / "results.json").write_text("{}")
    with pytest.raises(InputError, match="seed=1 contains a run of another config: num_steps is 7"):
        open_sweep(tmp_path, members(seed=(1, 2)))
    assert list(json.loads((tmp_path / "sweep.json").read_text())) == ["seed=0"]


def a_run(workdir):
    (workdir / "config.json").write_text("{}")


def a_thesis(workdir):
    (workdir / "thesis.tex").write_text("")


def a_broken_sweep(workdir):
    (workdir / "sweep.json").write_text("{")


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (a_run, "has a single run"),
        (a_thesis, "is not empty and has no sweep in it"),
        (a_broken_sweep, "sweep.json cannot be read"),
    ],
)
def test_folders_of_something_else(tmp_path, prepare, message):
    prepare(tmp_path)
    with pytest.raises(InputError, match=message):
        open_sweep(tmp_path, members(seed=(0,)))


@pytest.mark.parametrize("name", ["a[1]", "file", "file/below", "x" * 300])
def test_places_that_cannot_hold_a_sweep(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="workdir"):
        open_sweep(tmp_path / name, members(seed=(0,)))
