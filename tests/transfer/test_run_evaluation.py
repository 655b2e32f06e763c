"""Transfer of tiny runs: what is written, that it is right, and bad input before any work."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import transfer
from gc_nc.data.device_batches import normalize
from gc_nc.errors import InputError
from gc_nc.models import embed_fn
from gc_nc.training import loop
from gc_nc.training.configuration import default_config
from gc_nc.training.finished_run import open_run
from gc_nc.transfer import nearest_mean_predictions, run_evaluation, transfer_results
from gc_nc.transfer.run_evaluation import Protocol, evaluate_checkpoint, sample_tasks

NUM_CLASSES, PER_CLASS = 8, 9
SOURCE = {"gc_examples": 8, "gc_probes": 2}


@pytest.fixture(autouse=True)
def _parsed_flags():
    flags.FLAGS.mark_as_parsed()


def write_images(path):
    """Each class a pattern of its own under noise, so that a random network tells some apart."""
    rng = np.random.default_rng(0)
    labels = np.arange(NUM_CLASSES * PER_CLASS) % NUM_CLASSES
    patterns = rng.integers(0, 256, (NUM_CLASSES, 8, 8, 1))
    images = np.clip(patterns[labels] + rng.normal(scale=60, size=(len(labels), 8, 8, 1)), 0, 255)
    np.savez(path, images=images.astype(np.uint8), labels=labels, split=np.arange(72) >= 40)


def make_config(data_path, seed=0):
    config = default_config()
    config.seed = seed
    config.data.source, config.data.data_dir = "npz", str(data_path)
    config.data.classes.split, config.data.classes.counts = "random", (3, 2, 3)
    config.model.width = 0.02
    config.model.batch_norm = True
    config.batch_size, config.num_steps = 4, 4
    config.evaluation.gc_examples = 4
    config.monitor.every_steps = 0
    config.checkpoint.every_steps = 2
    return config


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of three runs that differ in their seed, none of which a test may change."""
    root = tmp_path_factory.mktemp("transfer")
    write_images(root / "data.npz")
    for seed in range(3):
        loop.train(make_config(root / "data.npz", seed), root / "runs" / f"seed_{seed}")
    return root / "runs"


def evaluate(run, step=4, sizes=((3, 2),), **protocol):
    protocol = Protocol(**({"num_episodes": 20, "num_queries": 4} | protocol))
    tasks = sample_tasks(run, protocol, sizes)
    return evaluate_checkpoint(run, step, protocol, tasks, **SOURCE), tasks


def test_equals_embeddings_and_statistics_by_hand(runs):
    run = open_run(runs / "seed_0")
    (source, (result,)), ((_, _, episodes),) = evaluate(run)
    images, labels, names = run.held_classes["target"]
    assert result["num_images"] == len(labels) == 27
    assert not set(names) & set(run.dataset.class_names)
    embed = embed_fn(run.model, run.variables(4))
    z = np.asarray(embed(normalize(images, run.normalization)), np.float64)
    means = np.stack([z[labels == c].mean(0) for c in range(3)])
    variances = [((z[labels == c] - means[c]) ** 2).sum(1).mean() for c in range(3)]
    pairs = [
        (variances[i] + variances[j]) / 2 / ((means[i] - means[j]) ** 2).sum()
        for i in range(3)
        for j in range(3)
        if i != j
    ]
    np.testing.assert_allclose(result["target_neural_collapse"], np.mean(pairs), rtol=1e-3)
    # All three target classes are in each episode.
    np.testing.assert_allclose(result["episode_neural_collapse"], np.mean(pairs), rtol=1e-3)
    bound = min(1, 16 * 2 * (1 + 2 / 2) * np.mean(pairs))
    np.testing.assert_allclose(result["nearest_mean_error_bound"], bound, rtol=1e-3)
    accuracies = [
        np.mean(
            np.asarray(nearest_mean_predictions(z[s], z[q.ravel()]))
            == np.repeat(np.arange(3), q.shape[1])
        )
        for s, q in zip(episodes.support, episodes.query, strict=True)
    ]
    np.testing.assert_allclose(result["accuracy"], np.mean(accuracies), atol=0.01)
    np.testing.assert_allclose(result["error"], 1 - result["accuracy"])
    assert source["num_classes"] == 3
    assert source["geometric_complexity"] > 0


def test_cached_embeddings_serve_until_the_parameters_change(runs, monkeypatch):
    run = open_run(runs / "seed_0")
    first = evaluate(run)[0]
    computed = []
    embed = run_evaluation._embed
    monkeypatch.setattr(run_evaluation, "_embed", lambda *a: (computed.append(1), embed(*a))[1])
    assert evaluate(run)[0] == first
    assert not computed
    cache = runs / "seed_0" / "transfer_cache" / "test_4.npz"
    cache.write_bytes(cache.read_bytes()[:200])
    assert evaluate(run)[0] == first
    assert len(computed) == 1
    # The cache of other parameters, as after a run that was trained anew.
    cache.write_bytes((runs / "seed_0" / "transfer_cache" / "test_4.npz").read_bytes())
    evaluate(run, step=2)
    cache.write_bytes(cache.with_name("test_2.npz").read_bytes())
    assert evaluate(run)[0] == first


@pytest.mark.parametrize(
    "options",
    [
        {"head": "cosine"},
        {"head": "ridge", "features": "centred_l2"},
        {"head": "logistic_regression", "features": "l2"},
        {"features": "centred"},
        {"head": "fine_tuning", "fine_tuning_steps": 1, "num_episodes": 2},
    ],
)
def test_heads_and_features_are_named_in_the_result(runs, options):
    run = open_run(runs / "seed_0")
    (_, (result,)), _ = evaluate(run, **options)
    for name, value in options.items():
        assert result[name] == value
    assert 1 / 3 < result["accuracy"] <= 1
    bounded = result["head"] == "nearest_mean"
    assert (result["nearest_mean_error_bound"] is not None) == bounded
    assert ("regularization" in result) == (result["head"] in ("ridge", "logistic_regression"))


def test_centring_takes_the_source_mean_and_leaves_nearest_means_alone(runs):
    run = open_run(runs / "seed_0")
    plain, centred = (evaluate(run, features=f)[0][1][0] for f in ("none", "centred"))
    np.testing.assert_allclose(centred["accuracy"], plain["accuracy"], atol=0.01)
    stored = np.load(runs / "seed_0" / "transfer_cache" / "source_4.npz")
    inputs = normalize(run.dataset.train.images, run.normalization)
    z = np.asarray(embed_fn(run.model, run.variables(4))(inputs))
    np.testing.assert_allclose(stored["mean"], z.mean(0), rtol=1e-4, atol=1e-5)


def command(**options):
    defaults = {"num_episodes": 20, "num_queries": 4, "num_ways": ["3"], "num_shots": ["1"]}
    with flagsaver.flagsaver(gc_examples=8, gc_probes=2, **(defaults | options)):
        transfer.main([])


def test_results_are_merged_and_drawn(runs, capsys):
    workdir = runs / "seed_1"
    command(workdir=str(workdir), step="all", num_shots=["1", "2"])
    first = transfer_results.read_results(workdir)
    assert list(first["source"]) == ["2", "4"]
    assert [(r["step"], r["num_shots"]) for r in first["results"]] == [
        (2, 1),
        (2, 2),
        (4, 1),
        (4, 2),
    ]
    assert (workdir / "figures" / "transfer_test.png").read_bytes().startswith(b"\x89PNG")
    assert "3-way 2-shot" in capsys.readouterr().out
    command(workdir=str(workdir), num_shots=["1"])
    again = transfer_results.read_results(workdir)
    assert sorted(map(str, again["results"])) == sorted(map(str, first["results"]))
    command(workdir=str(workdir), split="val", num_ways=["2"])
    command(workdir=str(workdir), head="cosine")
    last = transfer_results.read_results(workdir)["results"]
    assert len(last) == 6
    assert {(r["split"], r["head"]) for r in last} == {
        ("test", "nearest_mean"),
        ("val", "nearest_mean"),
        ("test", "cosine"),
    }


def test_runs_are_ranked_by_source_gc(runs, capsys):
    command(runs=str(runs))
    selection = json.loads((runs / "selection.json").read_text())
    gc = [run["source_geometric_complexity"] for run in selection["runs"]]
    assert gc == sorted(gc)
    assert {run["run"] for run in selection["runs"]} == {"seed_0", "seed_1", "seed_2"}
    assert set(selection["spearman_of_source_gc"]) == {"target NC", "accuracy, 3-way 1-shot"}
    assert (runs / "selection.png").read_bytes().startswith(b"\x89PNG")
    assert "Spearman" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_ways": ["4"]}, "num_ways=4 but labels hold 3 classes"),
        ({"num_shots": ["6"]}, "num_shots=6 .*num_queries=4 needs 10 of each class"),
        ({"num_ways": ["1"]}, "--num_ways=1 must be numbers of at least 2"),
        ({"num_ways": ["x"]}, "--num_ways=x must be numbers"),
        ({"num_shots": []}, "--num_shots= must be numbers"),
        ({"split": "train"}, "split='train' must be test or val|split='train' must be val or test"),
        ({"head": "svm"}, "head='svm' is not one of nearest_mean"),
        ({"features": "pca"}, "features='pca' is not one of none"),
        ({"head": "ridge", "regularization": 0.0}, "regularization=0.0 must be above 0"),
        ({"head": "fine_tuning", "features": "l2"}, "leave features at none"),
        ({"step": "3"}, "no checkpoint of step 3"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_embedded(runs, monkeypatch, options, message):
    monkeypatch.setattr(run_evaluation, "_embed", lambda *a: pytest.fail("embedding began"))
    with pytest.raises(InputError, match=message) as error:
        command(workdir=str(runs / "seed_2"), **options)
    assert "\n" not in str(error.value)


def test_bad_folders_are_one_line(runs, tmp_path):
    for options, message in (
        ({}, "give --workdir"),
        ({"workdir": str(runs / "seed_0"), "runs": str(runs)}, "give --workdir"),
        ({"runs": str(tmp_path)}, "holds 0 runs"),
        ({"runs": str(tmp_path / "x")}, "is no folder"),
        ({"runs": str(runs), "step": "all"}, "one step each"),
    ):
        with pytest.raises(InputError, match=message):
            command(**options)


def test_a_run_on_all_classes_has_none_to_transfer_to(runs):
    run = open_run(runs / "seed_2")
    run = dataclasses.replace(run, held_classes={})
    with pytest.raises(InputError, match=r"kept no test classes .*classes.split='random'"):
        sample_tasks(run, Protocol(), [(5, 1)])


def test_a_checkpoint_of_another_shape_is_one_line(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(run_evaluation, "_embed", lambda *a: pytest.fail("embedding began"))
    workdir = tmp_path / "run"
    shutil.copytree(runs / "seed_2", workdir)
    stored = json.loads((workdir / "config.json").read_text())
    stored["model"]["width"] = 0.04
    (workdir / "config.json").write_text(json.dumps(stored))
    with pytest.raises(InputError, match=r"of another network: .* has shape \(\d") as error:
        command(workdir=str(workdir))
    assert "\n" not in str(error.value)
