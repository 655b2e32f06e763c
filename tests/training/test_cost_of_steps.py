"""What a run must not do between its steps: compile, fetch, copy; and what a penalty of 0 is."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from gc_nc import metrics
from gc_nc.data.datasets import ImageSplit
from gc_nc.data.device_batches import Augmentation, identity_normalization, normalize
from gc_nc.models import MLP, VGG, build_model, embed_fn
from gc_nc.runs import loop, run_directory, run_setup
from gc_nc.runs.checkpoints import Checkpoints
from gc_nc.runs.configuration import default_config
from gc_nc.runs.finished_run import open_run
from gc_nc.runs.progress import Progress
from gc_nc.training import evaluation
from gc_nc.training.penalties import GCPenalty
from gc_nc.training.step import init_state, make_optimizer, train_step
from tests.rounding import assert_same_numbers

PENALTY = {"weight": 0.01, "every_steps": 2, "num_probes": 2, "batch_fraction": 0.5}


def with_penalty(config, **values):
    with config.unlocked():
        for name, value in values.items():
            config.gc_penalty[name] = value
    return config


def quiet(config):
    """One evaluation at the start and one at the end, no logs, no monitor."""
    config.evaluation.every_steps = config.log_every_steps = config.monitor.every_steps = 0
    config.checkpoint.every_steps = 0
    return config


def count_between_steps(monkeypatch, counter):
    """A list that gets counter() at the end of each step."""
    counts = []
    advance = Progress.advance

    def counting(self):
        counts.append(counter())
        advance(self)

    monkeypatch.setattr(Progress, "advance", counting)
    return counts


def final_state(workdir):
    run = open_run(workdir)
    return jax.tree.leaves(run.variables(run.steps[-1]))


def records_of(workdir):
    records = run_directory.read_records(workdir)
    return [{k: v for k, v in record.items() if "per_sec" not in k} for record in records]


def test_nothing_compiles_after_the_first_step(tiny_run, monkeypatch, compilations):
    config, workdir = tiny_run
    counts = count_between_steps(monkeypatch, lambda: len(compilations))
    quiet(config).log_every_steps = 2
    config.monitor.every_steps = 3
    loop.train(config, workdir)
    assert counts[0] > 0
    assert set(counts) == {counts[0]}


def test_runs_that_differ_in_hyperparameters_and_seed_share_their_programs(tiny_run, compilations):
    config, workdir = tiny_run
    config.optimizer.learning_rate = 0.01
    loop.train(quiet(config), workdir)
    before = len(compilations)
    with config.unlocked():
        config.seed = 1
        config.optimizer.learning_rate, config.optimizer.l2 = 0.02, 1e-4
    loop.train(config, workdir.with_name("other"))
    assert len(compilations) == before
    # A coefficient of 0 is no term, which is another program.
    config.optimizer.l2 = 0.0
    loop.train(config, workdir.with_name("another"))
    assert len(compilations) > before


def test_two_programs_serve_all_penalised_and_plain_steps(tiny_run, monkeypatch, compilations):
    config, workdir = tiny_run
    with_penalty(config, **PENALTY, boundaries=(0.0, 1.0), factors=(1.0, 2.0))
    counts = count_between_steps(monkeypatch, lambda: len(compilations))
    loop.train(quiet(config), workdir)
    assert counts[1] == counts[0] + 1
    assert set(counts[1:]) == {counts[1]}


class NotingFetches:
    """A number on the device that notes when its value is asked for, in whichever way."""

    def __init__(self, array, fetches):
        self._array, self._fetches = array, fetches

    def __float__(self):
        self._fetches.append(self._array.shape)
        return float(self._array)

    def __array__(self, *arguments, **options):
        return np.asarray(float(self), *arguments, **options)


def test_no_step_waits_for_the_device(tiny_run, monkeypatch):
    fetches = []
    take, watch = loop._Run._train_step, loop._Run._watch

    def noting(metrics):
        return {name: NotingFetches(value, fetches) for name, value in metrics.items()}

    def step(run):
        state, metrics = take(run)
        return state, noting(metrics)

    monkeypatch.setattr(loop._Run, "_train_step", step)
    monkeypatch.setattr(loop._Run, "_watch", lambda run: noting(watch(run)))
    config, workdir = tiny_run
    with_penalty(config, **PENALTY)
    counts = count_between_steps(monkeypatch, lambda: len(fetches))
    quiet(config).log_every_steps = 4
    config.monitor.every_steps = 4
    loop.train(config, workdir)
    assert len(fetches) > counts[-1] > 0
    # What step 4 measured is fetched once step 5 is under way.
    assert counts[0] == counts[4] == 0 < counts[5] == counts[7]


def test_the_state_is_donated(tiny_run, monkeypatch):
    config, workdir = tiny_run
    with_penalty(config, **PENALTY)
    deleted = []
    take = loop._Run._train_step

    def step(run):
        state = run._state
        after = take(run)
        deleted.extend(leaf.is_deleted() for leaf in jax.tree.leaves(state))
        return after

    monkeypatch.setattr(loop._Run, "_train_step", step)
    loop.train(quiet(config), workdir)
    assert len(deleted) > 0
    assert all(deleted)


def test_a_weight_of_0_is_bit_identical_to_no_penalty(tiny_run, monkeypatch):
    config, workdir = tiny_run
    loop.train(config, workdir)
    monkeypatch.setattr(GCPenalty, "forward", lambda *_: pytest.fail("a penalty was computed"))
    other = workdir.with_name("other")
    with_penalty(config, **(PENALTY | {"weight": 0.0, "of": "logits"}))
    loop.train(config, other)
    for a, b in zip(final_state(workdir), final_state(other), strict=True):
        np.testing.assert_array_equal(a, b)
    assert records_of(workdir) == records_of(other)


def test_a_penalised_run_logs_its_terms_and_goes_on_as_an_unbroken_one(tiny_run, monkeypatch):
    config, workdir = tiny_run
    with_penalty(config, **(PENALTY | {"every_steps": 1}))
    config.monitor.every_steps = 2
    loop.train(config, workdir)
    batches = [r for r in run_directory.read_records(workdir) if "batch/loss" in r]
    assert len(batches) == 4
    for record in batches:
        gc = record["batch/geometric_complexity"]
        assert_same_numbers(record["batch/gc_penalty"], 0.01 * gc)
        terms = ("batch/loss", "batch/gc_penalty", "batch/l2_penalty")
        total = sum(record[name] for name in terms)
        assert_same_numbers(record["batch/total_loss"], total)
        # Not beside the evaluations of steps 4 and 8, which measure more.
        assert ("monitor/geometric_complexity" in record) == (record["step"] in (2, 6))

    class PowerCut(BaseException):
        pass

    broken = workdir.with_name("broken")
    take = loop._Run._train_step

    def fails_in_step_7(run):
        if run._step == 7:
            raise PowerCut
        return take(run)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "_train_step", fails_in_step_7)
        with pytest.raises(PowerCut):
            loop.train(config, broken)
    loop.train(config, broken)
    for a, b in zip(final_state(workdir), final_state(broken), strict=True):
        np.testing.assert_array_equal(a, b)
    assert records_of(workdir) == records_of(broken)


@pytest.mark.slow
def test_the_monitor_measures_gc_of_its_images(tiny_run):
    config, workdir = tiny_run
    config.monitor.every_steps = config.checkpoint.every_steps = 7
    config.monitor.examples = 4
    config.monitor.probes = 300
    loop.train(config, workdir)
    (record,) = [r for r in records_of(workdir) if "monitor/geometric_complexity" in r]
    assert record["step"] == 7
    run = open_run(workdir)
    split = run.dataset.train
    # A random part of the evaluation's 6.
    subset = evaluation.gc_subset(config.seed, 10, 4)
    assert set(subset) < set(evaluation.gc_subset(config.seed, 10, 6))
    inputs = normalize(jnp.asarray(split.images[subset]), run.normalization)
    norms = metrics.squared_jacobian_norms(embed_fn(run.model, run.variables(7)), inputs)
    # 300 products leave about 1 / sqrt(300) of each norm open.
    np.testing.assert_allclose(
        record["monitor/geometric_complexity"], jnp.mean(norms), rtol=4 * 300**-0.5
    )


def test_probes_differ_between_steps_and_splits(tiny_run, monkeypatch):
    config, workdir = tiny_run
    keys = []
    measure = loop.evaluate_split

    def noting(model, variables, split, normalization, subset, key, **options):
        keys.append(tuple(jax.random.key_data(key).tolist()))
        return measure(model, variables, split, normalization, subset, key, **options)

    monkeypatch.setattr(loop, "evaluate_split", noting)
    loop.train(config, workdir)
    assert len(keys) == len(set(keys)) == 6


@pytest.mark.slow
def test_bfloat16_trains_in_it_and_keeps_and_measures_float32(tiny_run, monkeypatch):
    config, workdir = tiny_run
    dtypes = []

    def noting(*arguments, dtype, **options):
        dtypes.append(dtype)
        return build_model(*arguments, dtype=dtype, **options)

    monkeypatch.setattr(run_setup, "build_model", noting)
    config.model.dtype = "bfloat16"
    config.model.batch_norm = True
    config.optimizer.learning_rate = 1e-3
    results = loop.train(config, workdir)
    run = open_run(workdir)
    with Checkpoints(workdir / "checkpoints", keep=2) as checkpoints:
        state = checkpoints._manager.restore(8, args=ocp.args.StandardRestore())
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {np.dtype("f4"), np.dtype("i4")}
    split = run.dataset.train
    measured = evaluation.evaluate_split(
        build_model("mlp", 2, width=config.model.width, batch_norm=True),
        run.variables(8),
        jax.device_put(split),
        run.normalization,
        evaluation.gc_subset(config.seed, 10, 6),
        jax.random.key(0),
        num_classes=2,
        batch_size=4,
        gc_probes=4,
    )
    for name in ("loss", "neural_collapse", "accuracy"):
        assert_same_numbers(measured[name], results["metrics"][f"train/{name}"])
    assert dtypes == [jnp.bfloat16]


@pytest.mark.slow
def test_gc_in_bfloat16_is_that_in_float32_as_well_as_8_bits_allow():
    x = jax.random.normal(jax.random.key(0), (16, 8, 8, 3))
    models = [MLP((32, 16), 4, dtype=t) for t in (jnp.float32, jnp.bfloat16)]
    variables = jax.jit(models[0].init)(jax.random.key(1), x)
    exact, rounded = (
        metrics.estimate_geometric_complexity(
            embed_fn(model, variables), x, jax.random.key(2), num_probes=4
        ).mean
        for model in models
    )
    assert exact != rounded
    np.testing.assert_allclose(rounded, exact, rtol=0.02)


def precisions_of(function, *arguments):
    text = str(jax.make_jaxpr(function)(*arguments))
    return {part.split("\n")[0].split()[0] for part in text.split("precision=")[1:]}


def test_training_precision_is_the_config_s_and_measuring_is_always_the_highest():
    config, model = default_config(), VGG(((4,),), 2)
    state = init_state(0, model, make_optimizer(config), (8, 8, 1))
    variables = state.variables
    split = ImageSplit(jnp.zeros((10, 8, 8, 1), jnp.uint8), jnp.arange(10))
    options = {"model": model, "normalization": identity_normalization(1)}
    for measure in (
        lambda: evaluation.forward_batch(variables, split, 0, batch_size=4, **options),
        lambda: evaluation.monitor_complexity(
            variables, split.images[:4], jax.random.key(0), num_probes=1, **options
        ),
    ):
        assert precisions_of(measure) <= {"HIGHEST", "Precision.HIGHEST", "(Precision.HIGHEST,"}
        assert "HIGHEST" in str(precisions_of(measure))
    for precision, expected in (("default", "None"), ("highest", "HIGHEST")):
        step = partial(
            train_step,
            optimizer=make_optimizer(config),
            augmentation=Augmentation(),
            precision=precision,
            **options,
        )
        batch = ImageSplit(split.images[:2], split.labels[:2])
        found = precisions_of(step, state, batch, jax.random.key(0))
        assert all(expected in value for value in found), found
        assert found
