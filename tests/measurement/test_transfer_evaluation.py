"""Transfer of tiny runs: what is written, that it is right, and bad input before any work."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import transfer
from gc_nc.errors import InputError
from gc_nc.measurement import transfer_evaluation, transfer_results
from gc_nc.measurement.transfer_evaluation import Protocol, Task, evaluate_checkpoint, sample_tasks
from gc_nc.models import embed_fn
from gc_nc.runs import loop
from gc_nc.runs.configuration import default_config
from gc_nc.runs.finished_run import open_run
from gc_nc.training import evaluation
from gc_nc.transfer import Episode
from tests.rounding import assert_same_numbers

NUM_CLASSES, PER_CLASS = 9, 10
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
    np.savez(path, images=images.astype(np.uint8), labels=labels, split=np.arange(90) >= 40)


def make_config(data_path):
    """Every split has 15 images or 30, so that few programs serve them, in batches of 8."""
    config = default_config()
    config.data.source, config.data.data_dir = "npz", str(data_path)
    config.data.classes.split, config.data.classes.counts = "random", (3, 3, 3)
    config.data.holdout = 0.5
    config.model.name = "mlp"
    config.model.width = 0.05
    config.model.batch_norm = True
    config.batch_size, config.num_steps = 4, 6
    config.evaluation.batch_size = 8
    config.evaluation.gc_examples, config.evaluation.gc_probes = 8, 2
    config.monitor.every_steps = 0
    config.checkpoint.every_steps, config.checkpoint.keep = 2, 3
    config.checkpoint.best_metric = ""
    return config


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of three runs, none of which a test may change: one after 6 steps, 4 and 2.

    They are one run, of which the last two are copies that lack its later checkpoints.
    """
    root = tmp_path_factory.mktemp("transfer")
    write_images(root / "data.npz")
    folder = root / "runs"
    loop.train(make_config(root / "data.npz"), folder / "after_6")
    for before, after in ((6, 4), (4, 2)):
        shutil.copytree(folder / f"after_{before}", folder / f"after_{after}")
        shutil.rmtree(folder / f"after_{after}" / "checkpoints" / str(before))
    return folder


def embeddings_of(run, images):
    embed = embed_fn(run.model, run.variables(4))
    inputs = (images / 255.0 - run.normalization.mean) / run.normalization.std
    return np.asarray(jax.jit(embed)(inputs.astype(np.float32)), np.float64)


def evaluate(run, step=4, sizes=((3, 2),), **protocol):
    protocol = Protocol(**({"num_episodes": 20, "num_queries": 4} | protocol))
    tasks = sample_tasks(run, protocol, sizes)
    return evaluate_checkpoint(run, step, protocol, tasks, **SOURCE), tasks


def test_equals_embeddings_and_statistics_by_hand(runs):
    run = open_run(runs / "after_6")
    (source, (result,)), ((_, _, episodes),) = evaluate(run)
    images, labels, names = run.held_classes["target"]
    assert result["num_images"] == len(labels) == 30
    assert not set(names) & set(run.dataset.class_names)
    z = embeddings_of(run, images)
    means = np.stack([z[labels == c].mean(0) for c in range(3)])
    variances = [((z[labels == c] - means[c]) ** 2).sum(1).mean() for c in range(3)]
    pairs = [
        (variances[i] + variances[j]) / 2 / ((means[i] - means[j]) ** 2).sum()
        for i in range(3)
        for j in range(3)
        if i != j
    ]
    assert_same_numbers(result["target_neural_collapse"], np.mean(pairs))
    # All three target classes are in each episode.
    assert_same_numbers(result["episode_neural_collapse"], np.mean(pairs))
    assert result["nearest_mean_error_bound"] == 1
    centres = z[episodes.support].mean(axis=2)
    distances = np.linalg.norm(z[episodes.query][:, :, :, None] - centres[:, None, None], axis=-1)
    right = distances.argmin(axis=-1) == np.arange(3)[:, None]
    assert right.size == 240
    # One query may be so near a border that its way is a matter of rounding.
    assert abs(result["accuracy"] - right.mean()) <= 1 / 240
    assert result["error"] == 1 - result["accuracy"]
    assert source["num_classes"] == 3
    assert source["geometric_complexity"] > 0


def test_the_bound_is_of_each_episode_by_its_ways_and_shots(runs, monkeypatch):
    run = open_run(runs / "after_6")
    cdnv = np.array([[np.nan, 1, 2], [1, np.nan, 4], [2, 4, np.nan]], np.float32) * 1e-3
    monkeypatch.setattr(transfer_evaluation, "_target_collapse", lambda *a: (np.float32(0.5), cdnv))
    monkeypatch.setattr(transfer_evaluation, "episode_accuracies", lambda *a: np.ones(20))
    classes = np.tile([[0, 1], [2, 0], [1, 2], [1, 0]], (5, 1))
    images_of = np.argsort(run.held_classes["target"].labels, kind="stable").reshape(3, 10)
    tasks = [
        Task(2, shots, Episode(classes, images_of[classes, :shots], images_of[classes, 6:]))
        for shots in (1, 4)
    ]
    _, results = evaluate_checkpoint(run, 4, Protocol(), tasks, **SOURCE)
    for result, task in zip(results, tasks, strict=True):
        pairs = cdnv[classes[:, 0], classes[:, 1]].astype(float)
        bounds = np.minimum(1, 16 * 1 * (1 + 2 / task.num_shots) * pairs)
        assert_same_numbers(result["nearest_mean_error_bound"], bounds.mean())
        assert_same_numbers(result["episode_neural_collapse"], pairs.mean())


def test_cached_embeddings_serve_until_the_parameters_change(runs, monkeypatch):
    run = open_run(runs / "after_6")
    first = evaluate(run)[0]
    computed = []
    batches = evaluation.device_batches
    monkeypatch.setattr(
        evaluation, "device_batches", lambda *a: (computed.append(1), batches(*a))[1]
    )
    assert evaluate(run)[0] == first
    assert not computed
    cache = runs / "after_6" / "transfer_cache" / "test_4.npz"
    cache.write_bytes(cache.read_bytes()[:200])
    assert evaluate(run)[0] == first
    assert len(computed) == 1
    # The cache of other parameters, as after a run that was trained anew.
    evaluate(run, step=2)
    cache.write_bytes(cache.with_name("test_2.npz").read_bytes())
    assert evaluate(run)[0] == first


@pytest.mark.parametrize(
    "options",
    [
        {"head": "ridge", "features": "centred_l2", "regularization": 2.5},
        pytest.param({"head": "logistic_regression", "features": "l2"}, marks=pytest.mark.slow),
        pytest.param({"head": "fine_tuning", "fine_tuning_steps": 1}, marks=pytest.mark.slow),
    ],
)
def test_heads_and_features_are_named_in_the_result(runs, options):
    run = open_run(runs / "after_6")
    (_, (result,)), _ = evaluate(run, **options)
    for name, value in options.items():
        assert result[name] == value
    assert 1 / 3 < result["accuracy"] <= 1
    assert result["nearest_mean_error_bound"] is None
    assert ("regularization" in result) == (result["head"] != "fine_tuning")


def test_a_head_with_options_is_compiled_once_for_all_checkpoints(runs, compilations):
    run = open_run(runs / "after_6")
    evaluate(run, head="ridge", regularization=2.5)
    evaluate(run, step=2)
    before = len(compilations)
    evaluate(run, step=2, head="ridge", regularization=2.5)
    assert len(compilations) == before


def test_centring_takes_the_source_mean_and_leaves_nearest_means_alone(runs):
    run = open_run(runs / "after_6")
    plain, centred = (evaluate(run, features=f)[0][1][0] for f in ("none", "centred"))
    # One query of 240 may be so near a border that its way is a matter of rounding.
    assert abs(centred["accuracy"] - plain["accuracy"]) <= 1 / 240
    stored = np.load(runs / "after_6" / "transfer_cache" / "source_4.npz")
    assert_same_numbers(stored["mean"], embeddings_of(run, run.dataset.train.images).mean(axis=0))


def command(**options):
    defaults = {"num_episodes": 20, "num_queries": 4, "num_ways": ["3"], "num_shots": ["2"]}
    with flagsaver.flagsaver(gc_examples=8, gc_probes=2, **(defaults | options)):
        transfer.main([])


def test_results_are_merged_and_drawn(runs, capsys):
    workdir = runs / "after_4"
    command(workdir=str(workdir), step="all", num_shots=["1", "2"])
    first = transfer_results.read_results(workdir)
    assert list(first["source"]) == ["2", "4"]
    assert [(r["step"], r["num_shots"]) for r in first["results"]] == [
        (2, 1),
        (2, 2),
        (4, 1),
        (4, 2),
    ]
    assert (
        (workdir / "figures" / "transfer_test_nearest_mean.png").read_bytes().startswith(b"\x89PNG")
    )
    assert "3-way 2-shot" in capsys.readouterr().out
    command(workdir=str(workdir))
    again = transfer_results.read_results(workdir)
    assert sorted(map(str, again["results"])) == sorted(map(str, first["results"]))


def test_a_result_is_replaced_by_one_of_the_same_setting_alone(tmp_path):
    source = {"geometric_complexity": 1.0, "gc_examples": 10, "gc_probes": 4}
    ridge = Protocol(head="ridge").facts() | {"step": 4, "num_ways": 5, "num_shots": 1}
    others = [
        ridge | {key: other}
        for key, other in (
            ("step", 2),
            ("split", "val"),
            ("num_episodes", 3),
            ("num_queries", 2),
            ("seed", 1),
            ("head", "cosine"),
            ("features", "l2"),
            ("regularization", 2.0),
            ("num_ways", 2),
            ("num_shots", 5),
        )
    ]
    tuned = Protocol(head="fine_tuning").facts() | {"step": 4, "num_ways": 5, "num_shots": 1}
    others += [tuned, tuned | {"fine_tuning_steps": 1}, tuned | {"fine_tuning_learning_rate": 1.0}]
    assert {key for other in others for key in other} == set(transfer_results.IDENTITY)
    for result in (*others, ridge | {"accuracy": 0.1}, ridge | {"accuracy": 0.2}):
        transfer_results.add_results(tmp_path, result["step"], source, [result])
    stored = transfer_results.read_results(tmp_path)["results"]
    assert stored == [*others, ridge | {"accuracy": 0.2}]


def test_runs_are_ranked_by_source_gc(runs, capsys):
    command(runs=str(runs))
    selection = json.loads((runs / "selection_test_nearest_mean.json").read_text())
    gc = [run["source_geometric_complexity"] for run in selection["runs"]]
    assert gc == sorted(gc)
    assert {run["run"] for run in selection["runs"]} == {"after_6", "after_4", "after_2"}
    assert set(selection["spearman_of_source_gc"]) == {"target NC", "accuracy, 3-way 2-shot"}
    assert (runs / "selection_test_nearest_mean.png").read_bytes().startswith(b"\x89PNG")
    assert "Spearman" in capsys.readouterr().out


def test_runs_without_a_number_are_named_and_left_out(runs, tmp_path):
    config = open_run(runs / "after_6").config
    result = {"num_ways": 3, "num_shots": 1, "accuracy": 0.5, "accuracy_half_width": 0.1}

    def record(name, nc):
        workdir = tmp_path / name
        workdir.mkdir(exist_ok=True)
        shutil.copy(runs / "after_6" / "config.json", workdir)
        source = {
            "geometric_complexity": 1 + nc,
            "geometric_complexity_sem": 0.1,
            "neural_collapse": 0.1,
            "accuracy": 0.9,
        }
        results = [{**result, "target_neural_collapse": nc}]
        return transfer_results.RunRecord(workdir, config, {4: source}, results)

    records = [record(name, nc) for name, nc in (("a", 1.0), ("dead", np.nan), ("b", 2.0))]
    with pytest.raises(InputError, match="NaN in dead; 2 runs are left"):
        transfer_results.rank_runs(records, tmp_path, Protocol())
    text = transfer_results.rank_runs([*records, record("c", 3.0)], tmp_path, Protocol())
    assert "left out, GC or target NC is NaN: dead" in text
    assert "1.00" in text


def test_each_result_is_saved_before_the_next_begins(runs, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    shutil.copytree(runs / "after_2", workdir)
    (workdir / "transfer.json").unlink(missing_ok=True)
    measure = transfer_evaluation.episode_accuracies

    def interrupted(features, labels, episodes, head):
        if episodes.support.shape[-1] == 2:
            raise KeyboardInterrupt
        return measure(features, labels, episodes, head)

    monkeypatch.setattr(transfer_evaluation, "episode_accuracies", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command(workdir=str(workdir), num_shots=["1", "2"])
    assert [r["num_shots"] for r in transfer_results.read_results(workdir)["results"]] == [1]


def test_source_metrics_of_more_examples_stay(tmp_path):
    for examples, gc in ((1000, 1.0), (10, 2.0), (1000, 3.0)):
        source = {"geometric_complexity": gc, "gc_examples": examples, "gc_probes": 4}
        transfer_results.add_results(tmp_path, 4, source, [])
    assert transfer_results.read_results(tmp_path)["source"]["4"]["geometric_complexity"] == 3
    transfer_results.add_results(tmp_path, 4, source | {"gc_examples": 10}, [])
    assert transfer_results.read_results(tmp_path)["source"]["4"]["gc_examples"] == 1000


def test_other_classes_than_those_of_the_run_are_refused(runs, tmp_path):
    """Data of the same counts whose classes have other names: a trained class could be a target."""
    workdir = tmp_path / "run"
    shutil.copytree(runs / "after_2", workdir)
    metadata = json.loads((workdir / "metadata.json").read_text())
    assert set(metadata["data"]["held_class_names"]) == {"val", "target"}
    for key in ("class_names", "held_class_names"):
        changed = json.loads(json.dumps(metadata))
        names = changed["data"][key]
        (names if key == "class_names" else names["target"])[0] = "other"
        (workdir / "metadata.json").write_text(json.dumps(changed))
        with pytest.raises(InputError, match=f"are not those.*{key} is"):
            open_run(workdir)


def test_runs_on_other_classes_are_not_ranked_together(runs, tmp_path):
    first = open_run(runs / "after_6")
    images = first.held_classes["target"]
    for other, message in (
        ({"normalization": first.normalization._replace(std=(1.0,))}, "normalization"),
        ({"held_classes": {"target": images._replace(class_names=("a", "b", "c"))}}, "classes"),
        ({"held_classes": {"target": images._replace(labels=images.labels[::-1])}}, "images of"),
    ):
        with pytest.raises(InputError, match=f"differ in the .*{message}"):
            transfer_results.check_comparable([first, dataclasses.replace(first, **other)], "test")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_ways": ["4"]}, "num_ways=4 but labels have 3 classes"),
        ({"num_shots": ["7"]}, "num_shots=7 .*num_queries=4 needs 11 of each class"),
        ({"num_ways": ["1"]}, "--num_ways=1 must be numbers of at least 2"),
        ({"num_ways": ["x"]}, "--num_ways=x must be numbers"),
        ({"num_shots": []}, "--num_shots= must be numbers"),
        ({"split": "train"}, "split='train' must be test or val"),
        ({"head": "svm"}, "head='svm' is not one of nearest_mean"),
        ({"features": "pca"}, "features='pca' is not one of none"),
        ({"head": "ridge", "regularization": 0.0}, "regularization=0.0 must be above 0"),
        ({"head": "fine_tuning", "features": "l2"}, "leave features at none"),
        ({"step": "3"}, "no checkpoint of step 3"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_embedded(runs, monkeypatch, options, message):
    monkeypatch.setattr(evaluation, "device_batches", lambda *a: pytest.fail("embedding began"))
    with pytest.raises(InputError, match=message) as error:
        command(workdir=str(runs / "after_2"), **options)
    assert "\n" not in str(error.value)


def test_bad_folders_are_one_line(runs, tmp_path):
    for options, message in (
        ({}, "give --workdir"),
        ({"workdir": str(runs / "after_6"), "runs": str(runs)}, "give --workdir"),
        ({"runs": str(tmp_path)}, "contains 0 runs"),
        ({"runs": str(tmp_path / "x")}, "is not a folder"),
        ({"runs": str(runs), "step": "all"}, "one step each"),
    ):
        with pytest.raises(InputError, match=message):
            command(**options)


def test_a_run_on_all_classes_has_none_to_transfer_to(runs):
    run = open_run(runs / "after_2")
    run = dataclasses.replace(run, held_classes={})
    with pytest.raises(InputError, match=r"has no test classes .*classes.split='random'"):
        sample_tasks(run, Protocol(), [(5, 1)])


def test_a_checkpoint_of_another_shape_is_one_line(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "device_batches", lambda *a: pytest.fail("embedding began"))
    workdir = tmp_path / "run"
    shutil.copytree(runs / "after_2", workdir)
    stored = json.loads((workdir / "config.json").read_text())
    stored["model"]["width"] = 0.1
    (workdir / "config.json").write_text(json.dumps(stored))
    with pytest.raises(
        InputError, match=r"of another network or optimizer: .* has shape \(\d"
    ) as error:
        command(workdir=str(workdir))
    assert "\n" not in str(error.value)
