"""Every figure from its runs to its verdict, at the smallest scale, and what may go wrong."""

import html
import itertools
import json
import shutil
from pathlib import Path

import pytest
from absl import flags
from absl.testing import flagsaver
from matplotlib.figure import Figure

from experiments import launcher
from experiments import reproduce as command_line
from gc_nc.errors import InputError
from gc_nc.reproduction import reproduce
from gc_nc.reproduction.catalogue import FIGURES, find_figure, listing
from gc_nc.reproduction.figure_result import Context
from gc_nc.reproduction.report import write_report
from gc_nc.reproduction.run_table import SETTING_NAMES, Run, Sweep, _row, collect
from gc_nc.reproduction.training_figures import setting_figure, terminal_phase_figure
from gc_nc.runs import loop
from gc_nc.sweeps.inline_executor import run_inline
from gc_nc.sweeps.members import make_members, read_sweep
from gc_nc.sweeps.sweep_directory import run_path

CONFIGS = Path("experiments/configs/figures")
SCALES = {(figure.sweep, s) for figure in FIGURES.values() for s in figure.cost}


def sweep_of(name, scale):
    file = f"{CONFIGS / name}.py:{scale}"
    base = launcher.config_of_file(file)
    return base.lock(), make_members(base, read_sweep(file))


def save_nothing(figure, path, **options):
    """Drawing takes up to two seconds."""
    Path(path).write_bytes(b"\x89PNG\r\n\x1a\n")


@pytest.fixture(autouse=True)
def _no_pictures(request, monkeypatch):
    if "slow" not in request.keywords:
        monkeypatch.setattr(Figure, "savefig", save_nothing)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """The runs of the sweeps that the quick tests need. None of them may change it."""
    return _smoke_runs(tmp_path_factory.mktemp("some"), ["vgg13_cifar10", "vgg13_cifar10_penalty"])


@pytest.fixture(scope="module")
def all_runs(tmp_path_factory):
    """The runs of every figure's sweep."""
    sweeps = sorted({figure.sweep for figure in FIGURES.values()})
    return _smoke_runs(tmp_path_factory.mktemp("all"), sweeps)


def _smoke_runs(folder, sweeps):
    """Runs of a config that several sweeps have are trained once."""
    trained = {}
    for name in sweeps:
        base, members = sweep_of(name, "smoke")
        reproduce.prepare(folder / name, members, base)
        for member in members:
            done = trained.setdefault(str(member.config), run_path(folder / name, member.name))
            if done.exists():
                shutil.copytree(done, run_path(folder / name, member.name))
            run_inline([member], folder / name)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("number", FIGURES)
def test_smoke(number, all_runs):
    figure = FIGURES[number]
    base, members = sweep_of(figure.sweep, "smoke")
    record = reproduce.make_figure(figure, "smoke", all_runs, members, base)
    stored = json.loads((all_runs / "figures" / f"figure_{number}.json").read_text())
    assert stored["number"] == number
    assert not stored["missing"]
    assert stored["num_runs"] == len(members)
    assert record["findings"]
    assert {f["verdict"] for f in stored["findings"]} <= {"holds", "fails", "cannot be told"}
    assert all(len(row) == len(stored["table"]["columns"]) for row in stored["table"]["rows"])
    image = (all_runs / "figures" / stored["image"]).read_bytes()
    assert image.startswith(b"\x89PNG")
    assert len(image) > 10_000
    page = write_report(all_runs).read_text()
    assert record["title"] in html.unescape(page)
    # The same again: what was measured is kept.
    again = reproduce.make_figure(figure, "smoke", all_runs, members, base)
    assert again["findings"] == record["findings"]


@pytest.mark.slow
def test_a_missing_run_is_named_and_the_rest_is_drawn(workdir, tmp_path):
    figure = FIGURES["1"]
    base, members = sweep_of(figure.sweep, "smoke")
    shutil.copytree(workdir / figure.sweep, tmp_path / figure.sweep)
    gone, broken = members[0].name, members[1].name
    shutil.rmtree(run_path(tmp_path / figure.sweep, gone))
    log = tmp_path / figure.sweep / "logs" / f"{gone}.log"
    log.write_text("=== started now\nerror: the loss is NaN\n")
    metrics = run_path(tmp_path / figure.sweep, broken) / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    last = json.loads(lines[-1]) | {"train/neural_collapse": float("inf")}
    metrics.write_text("\n".join([*lines[:-1], json.dumps(last)]) + "\n")
    record = reproduce.make_figure(figure, "smoke", tmp_path, members, base)
    assert record["num_runs"] == len(members) - 2
    assert record["missing"] == [
        f"{gone}: the loss is NaN",
        f"{broken}: train/neural_collapse of its last evaluation is not a finite number",
    ]


@pytest.fixture
def synthetic(tmp_path):
    """A sweep in which all that the paper claims is true, or the opposite."""

    def make(way):
        runs = []
        base = {"optimizer.learning_rate": 0.1, "batch_size": 32, "optimizer.l2": 0.0, "seed": 0}
        values = {
            "optimizer.learning_rate": (0.1, 0.2, 0.4, 0.8),
            "batch_size": (4, 8, 16, 32),
            "optimizer.l2": (0.0, 1e-3, 1e-2, 1e-1),
        }
        for key, choices in values.items():
            for rank, value in enumerate(choices):
                better = rank if key != "batch_size" else 3 - rank
                if value == base[key] and key != "optimizer.learning_rate":
                    continue
                for seed in range(3):
                    low = 100.0 - way * (10 * better + 0.3 * seed + 0.1 * len(key))
                    last = {"step": 2, "train/accuracy": 1.0, "test/accuracy": 1 - low / 1000}
                    for split in ("train", "test"):
                        last |= {
                            f"{split}/geometric_complexity": low,
                            f"{split}/geometric_collapse": low / 10,
                            f"{split}/neural_collapse": low / 100,
                        }
                    first = last | {"step": 1, "train/neural_collapse": 2.0}
                    first["test/neural_collapse"] = 2.0 if way > 0 else 0.0
                    first["train/neural_collapse"] = first["test/neural_collapse"]
                    setting = ((key, value),) if value != base[key] else ()
                    config = base | {key: value, "seed": seed}
                    metadata = {"data": {"num_train": 32}}
                    name = tmp_path / f"{key}={value},{seed}"
                    runs.append(Run(name, setting, seed, config, [first, last], metadata))
        rows = [row for key in values if (row := _row(key, runs)).runs]
        return Context(Sweep(base, runs, rows, {}), tmp_path / "x.png", "small", None)

    return make


@pytest.mark.parametrize("figure", [setting_figure, terminal_phase_figure])
@pytest.mark.parametrize(("way", "verdict"), [(1, "holds"), (-1, "fails")])
def test_the_sign_of_every_claim(figure, way, verdict, synthetic):
    findings = figure(synthetic(way)).findings
    # Two metrics that move together do so whichever way a setting moves them.
    of_settings = [f for f in findings if " goes with lower " not in f.claim]
    together = [f for f in findings if f not in of_settings]
    if figure is terminal_phase_figure:
        # Test accuracy falls with GC in both.
        together = [f for f in of_settings if "goes with higher" in f.claim]
        of_settings = [f for f in of_settings if f not in together]
    assert len(of_settings) >= 5
    assert {f.verdict for f in of_settings} == {verdict}
    assert {f.verdict for f in together} == {"holds"}


@pytest.mark.slow
def test_the_bound_of_proposition_5_1_and_its_factor(workdir):
    figure = FIGURES["3"]
    base, members = sweep_of(figure.sweep, "smoke")
    record = reproduce.make_figure(figure, "smoke", workdir, members, base)
    columns = record["table"]["columns"]
    nc, bound = columns.index("test NC"), columns.index("bound from NC")
    alone = [row for row in record["table"]["rows"] if row[1] == 1]
    assert alone
    for row in alone:
        # 5 classes of 16 training images each.
        assert row[bound] == pytest.approx(16 * 4 * (1 + 2 / 16) * row[nc])


@pytest.mark.slow
def test_measurements_of_other_options_are_not_taken(workdir, tmp_path):
    figure = FIGURES["E2"]
    base, members = sweep_of(figure.sweep, "smoke")
    shutil.copytree(workdir / figure.sweep, tmp_path / figure.sweep)
    first = reproduce.make_figure(figure, "smoke", tmp_path, members, base)
    changes = (
        ("train/gc_examples", 3.0),
        ("train/gc_probes", 9.0),
        # As of a command that measured the test images alone.
        ("test/bound_poincare_constant", 1e9),
    )
    paths = sorted((tmp_path / figure.sweep).glob("*/measurements.json"))
    assert len(paths) >= len(changes)
    for path, (name, change) in zip(paths, itertools.cycle(changes), strict=False):
        stored = json.loads(path.read_text())
        for values in stored.values():
            values[name] = change
            values["test/neural_collapse_bound_paper"] = 1e9
        path.write_text(json.dumps(stored))
    again = reproduce.make_figure(figure, "smoke", tmp_path, members, base)
    assert again["findings"] == first["findings"]


@pytest.mark.slow
def test_another_scale_does_not_replace_a_figure(workdir, tmp_path, command):
    figure = FIGURES["1"]
    base, members = sweep_of(figure.sweep, "smoke")
    shutil.copytree(workdir / figure.sweep, tmp_path / figure.sweep)
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "figure_1.json").write_text('{"scale": "small"}')
    with pytest.raises(InputError, match="is of scale small; choose another workdir"):
        reproduce.make_figure(figure, "smoke", tmp_path, members, base)
    # Before anything is run.
    with pytest.raises(InputError, match="is of scale small; choose another workdir"):
        command(figure=["A6", "1"], scale="smoke", workdir=str(tmp_path))
    assert not (tmp_path / "vgg13_cifar10_penalty").exists()


def test_without_a_finished_run_there_is_no_figure(tmp_path):
    base, members = sweep_of("vgg13_cifar10", "smoke")
    reproduce.prepare(tmp_path / "vgg13_cifar10", members, base)
    for figure in FIGURES.values():
        if figure.sweep == "vgg13_cifar10":
            with pytest.raises(InputError, match=r"no run is finished .*not started"):
                reproduce.make_figure(figure, "smoke", tmp_path, members, base)


@pytest.mark.slow
def test_rows_differ_in_their_setting_and_seed_alone(workdir):
    base, members = sweep_of("vgg13_cifar10", "smoke")
    sweep = collect(workdir / "vgg13_cifar10", members, base)
    assert [row.key for row in sweep.rows] == list(SETTING_NAMES)[:3]
    assert len(sweep.base_runs) == 2
    for row in sweep.rows:
        for value, runs in row.runs.items():
            assert {run.seed for run in runs} <= {0, 1}
            for run in runs:
                differing = {
                    k for k in sweep.base if run.config[k] != sweep.base[k] and k != "seed"
                }
                assert differing <= {row.key}
                assert run.config[row.key] == value
                assert run.final["step"] == 12
                assert run.epochs(12) == 12 * run.config["batch_size"] / 80


@pytest.mark.parametrize(("sweep", "scale"), sorted(SCALES))
def test_the_sweep_of_every_figure_and_scale_is_valid(sweep, scale):
    base, members = sweep_of(sweep, scale)
    keys = {key for member in members for key in member.overrides} - {"seed"}
    assert keys <= set(SETTING_NAMES)
    for key in keys:
        # The config itself is one of the row.
        values = {_value(member.config, key) for member in members}
        assert _value(base, key) in values
        assert len(values) >= 2
    if scale == "paper":
        assert base.model.width == 1
        assert len(members) in (1, 30, 50)


def _value(config, key):
    for part in key.split("."):
        config = config[part]
    return config


def test_the_list_has_every_figure_with_its_claim_and_cost():
    text = listing()
    for figure in FIGURES.values():
        assert figure.title in text
        assert figure.claim in text
        assert {"paper", "smoke"} <= set(figure.cost)


def test_unknown_figures_and_scales_name_those_there_are():
    with pytest.raises(InputError, match=r"--figure=7 is not one of 1, 2, .*--list"):
        find_figure("7", "smoke")
    with pytest.raises(InputError, match=r"--scale=small: figure A1 has paper, smoke"):
        find_figure("a1", "small")


@pytest.fixture
def command():
    """Calls the command's main in this process."""
    # absl parses flags at start-up only.
    flags.FLAGS.mark_as_parsed()

    def call(**values):
        with flagsaver.flagsaver(**values):
            command_line.main([])

    return call


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "--figure is missing; --list shows which there are"),
        ({"figure": ["1"]}, "--workdir is missing"),
        ({"figure": ["1", "9"], "workdir": "x", "scale": "smoke"}, "--figure=9 is not one of"),
        ({"figure": ["1"], "workdir": "x", "scale": "small"}, "--data_dir is missing: vgg13"),
        ({"figure": ["A2"], "workdir": "x", "scale": "demo"}, "--scale=demo: figure A2 has paper"),
    ],
)
def test_bad_input_is_one_line(values, message, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        command(**values)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_data_that_cannot_be_read_stops_it_before_anything_is_written(command, tmp_path):
    values = {"figure": ["1"], "scale": "small", "data_dir": str(tmp_path)}
    with pytest.raises(InputError, match="no prepared cifar10"):
        command(**values, workdir=str(tmp_path / "figures"))
    assert not list(tmp_path.iterdir())


def test_the_list_needs_nothing_else(command, capsys):
    command(list=True)
    assert capsys.readouterr().out.strip() == listing()


@pytest.mark.slow
def test_the_command_draws_what_is_finished_and_writes_the_page(workdir, command, tmp_path, capsys):
    shutil.copytree(workdir / "vgg13_cifar10_penalty", tmp_path / "vgg13_cifar10_penalty")
    with pytest.raises(SystemExit) as stop:
        command(figure=["A6"], scale="smoke", workdir=str(tmp_path))
    assert stop.value.code == 0
    assert "A larger GC penalty lowers GC: " in capsys.readouterr().out
    assert FIGURES["A6"].title in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_a_run_that_fails_ends_with_1_and_its_reason(
    workdir, command, tmp_path, capsys, monkeypatch
):
    shutil.copytree(workdir / "vgg13_cifar10_penalty", tmp_path / "vgg13_cifar10_penalty")
    [run] = (tmp_path / "vgg13_cifar10_penalty").glob("gc_penalty.weight=0.0,seed=1")
    (run / "results.json").unlink()

    def diverge(config, workdir, *arguments, **options):
        raise loop.DivergedError("the loss is nan at step 3")

    monkeypatch.setattr(loop, "train", diverge)
    with pytest.raises(SystemExit) as stop:
        command(figure=["A6"], scale="smoke", workdir=str(tmp_path))
    assert stop.value.code == 1
    missing = "missing: gc_penalty.weight=0.0,seed=1: the loss is nan at step 3"
    assert missing in capsys.readouterr().out
