"""`python -m experiments.measure` on a tiny run."""

import json

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from sklearn.neighbors import NearestCentroid

from experiments import measure
from gc_nc.data.device_batches import normalize
from gc_nc.errors import InputError
from gc_nc.runs import loop
from gc_nc.runs.finished_run import open_run
from gc_nc.runs.run_directory import read_records


@pytest.fixture(autouse=True)
def _parsed_flags():
    flags.FLAGS.mark_as_parsed()


def measured_values(workdir, **options):
    with flagsaver.flagsaver(workdir=str(workdir), gc_examples=10, **options):
        measure.main([])
    return json.loads((workdir / "measurements.json").read_text())


def assert_nearest_mean_errors(workdir, values):
    """Against scikit-learn's classifier, fitted to the training images of the run."""
    run = open_run(workdir)
    variables = run.variables(8)

    def embed(split):
        inputs = normalize(split.images, run.normalization)
        return np.asarray(run.model.apply(variables, inputs, train=False)[1])

    train, test = run.dataset.train, run.dataset.test
    classifier = NearestCentroid().fit(embed(train), train.labels)
    for name, split in (("train", train), ("test", test)):
        error = 1 - classifier.score(embed(split), split.labels)
        assert values[f"{name}/nearest_mean_error"] == pytest.approx(error)


@pytest.mark.slow
def test_every_metric_of_a_finished_run(tiny_run, capsys):
    config, workdir = tiny_run
    loop.train(config, workdir)
    checkpoints = {path: path.stat().st_mtime_ns for path in (workdir / "checkpoints").rglob("*")}
    first = measured_values(workdir, flatness_examples=0)
    assert list(first) == ["8"]
    values = first["8"]
    logged = read_records(workdir)[-1]
    for name in ("accuracy", "loss", "neural_collapse"):
        for split in ("train", "test"):
            np.testing.assert_allclose(
                values[f"{split}/{name}"], logged[f"{split}/{name}"], rtol=1e-4, err_msg=name
            )
    assert values["train/bound_poincare_constant"] == values["test/poincare_constant"]
    assert values["test/bound_poincare_constant"] == values["train/poincare_constant"]
    for split in ("train", "test"):
        assert values[f"{split}/num_classes_present"] == 2
        assert 0 <= values[f"{split}/nc4"] <= 1
        per_class = values[f"{split}/neural_collapse_bound_per_class"]
        assert 2 * per_class <= values[f"{split}/neural_collapse_bound_paper"] * (1 + 1e-5)
        picture = workdir / "figures" / f"cdnv_{split}_8.png"
        assert picture.read_bytes().startswith(b"\x89PNG")
    assert_nearest_mean_errors(workdir, values)
    assert "nearest_mean_error_bound" in capsys.readouterr().out
    assert measured_values(workdir, flatness_examples=0) == first
    assert checkpoints == {
        path: path.stat().st_mtime_ns for path in (workdir / "checkpoints").rglob("*")
    }
    for options, message in (
        ({"step": "7"}, "7"),
        ({"step": "newest"}, "must be latest, all or a number"),
        ({"splits": ["val"]}, "--splits=val must be train, test"),
        ({"splits": []}, "--splits= must be train, test"),
        ({"data_dir": str(workdir / "nowhere")}, "nowhere"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            measured_values(workdir, **options)
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_flatness_of_a_finished_run(tiny_run):
    config, workdir = tiny_run
    loop.train(config, workdir)
    values = measured_values(workdir)["8"]
    for split in ("train", "test"):
        assert values[f"{split}/squared_gradient_norm"] > 0
        assert np.isfinite(values[f"{split}/hessian_trace"])
        assert values[f"{split}/hessian_trace_sem"] > 0
        assert np.isfinite(values[f"{split}/hessian_top_eigenvalue"])
        assert values[f"{split}/flatness_examples"] == 10


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(InputError, match=r"config\.json"):
        measured_values(tmp_path)
