"""What a crash, a full disk or a second start leave, and what the next start makes of it."""

import fcntl
import gc
import os
import resource
import shutil
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gc_nc.errors import InputError
from gc_nc.runs import loop, run_data, run_directory
from gc_nc.runs.checkpoints import UNREADABLE, Checkpoints, StorageError
from gc_nc.training.step import TrainState

# Orbax leaves coroutines behind where it fails.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def _collected_here():
    """Not during another test."""
    yield
    gc.collect()


def make_state(step, size=1000):
    values = jax.random.normal(jax.random.key(step), (size,))
    return TrainState(jnp.int32(step), {"head": {"kernel": values}}, {}, ())


def save(workdir, *steps, keep=5):
    with Checkpoints(workdir / "checkpoints", keep=keep) as checkpoints:
        for step in steps:
            checkpoints.save(make_state(step))


def restore(workdir, like=None):
    with Checkpoints(workdir / "checkpoints", keep=5) as checkpoints:
        return checkpoints.restore_newest(make_state(0) if like is None else like)


def assert_is_state(restored, step):
    assert restored.step == step
    np.testing.assert_array_equal(
        restored.state.params["head"]["kernel"], make_state(step).params["head"]["kernel"]
    )


def empty(path):
    path.write_bytes(b"")


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def remove(path):
    path.unlink()


@pytest.mark.parametrize(
    "damage", [cut, *(pytest.param(d, marks=pytest.mark.slow) for d in (empty, remove))]
)
def test_a_damaged_checkpoint_gives_the_one_before_never_wrong_numbers(tmp_path, damage):
    save(tmp_path / "whole", 3, 5)
    files = [
        path.relative_to(tmp_path / "whole")
        for path in (tmp_path / "whole" / "checkpoints" / "5").rglob("*")
        if path.is_file()
    ]
    fell_back = 0
    for i, file in enumerate(files):
        workdir = tmp_path / f"damaged{i}"
        shutil.copytree(tmp_path / "whole", workdir)
        damage(workdir / file)
        restored = restore(workdir)
        if restored.unreadable:
            fell_back += 1
            assert_is_state(restored, 3)
            (line,) = restored.unreadable
            assert line.startswith("the checkpoint of step 5 cannot be read (")
            assert (workdir / UNREADABLE / "5").is_dir()
            # Its step can be saved again, and be damaged again.
            save(workdir, 5)
            assert_is_state(restore(workdir), 5)
            shutil.rmtree(workdir / "checkpoints" / "5" / "default")
            assert_is_state(restore(workdir), 3)
            assert (workdir / UNREADABLE / "5.1").is_dir()
        else:
            # Not needed to read it.
            assert_is_state(restored, 5)
    assert fell_back >= 2


def test_r2_an_empty_newest_checkpoint(tmp_path):
    save(tmp_path, 3000)
    (tmp_path / "checkpoints" / "5000").mkdir()
    restored = restore(tmp_path)
    assert_is_state(restored, 3000)
    assert "the checkpoint of step 5000 cannot be read" in restored.unreadable[0]


def test_no_checkpoint_that_can_be_read(tmp_path):
    assert restore(tmp_path).state is None
    (tmp_path / "checkpoints" / "5000").mkdir(parents=True)
    with pytest.raises(StorageError, match=r"no checkpoint in .* can be read \(step 5000: "):
        restore(tmp_path)
    assert (tmp_path / "checkpoints" / "5000").is_dir()


def test_a_file_system_that_fails_for_now_costs_no_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 3, 5)

    def fail(*_):
        raise PermissionError("not now")

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "restore", fail)
        with pytest.raises(StorageError, match=r"step 5 in .* cannot be read now \(not now\)"):
            restore(tmp_path)
    assert_is_state(restore(tmp_path), 5)


def test_a_checkpoint_of_another_network_is_no_damage(tmp_path):
    save(tmp_path, 3)
    with pytest.raises(
        InputError, match=r"params.head.kernel has shape \(1000,\) there and \(7,\)"
    ):
        restore(tmp_path, make_state(0, size=7))
    other = make_state(0).replace(opt_state={"trace": jnp.zeros(3)})
    with pytest.raises(InputError, match=r"opt_state.trace has shape none there and \(3,\)"):
        restore(tmp_path, other)
    assert not (tmp_path / UNREADABLE).exists()


def test_the_newest_and_the_best_are_kept(tmp_path):
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        for step in range(1, 7):
            if step in (2, 3):
                checkpoints.keep_best(step)
            checkpoints.save(make_state(step))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["3", "5", "6"]


@pytest.mark.slow
def test_a_run_keeps_its_best_checkpoint_also_when_it_goes_on(tiny_run, monkeypatch):
    config, workdir = tiny_run
    config.num_steps, config.checkpoint.keep, config.checkpoint.every_steps = 12, 1, 1
    config.evaluation.every_steps = 2
    config.checkpoint.best_metric = "test/loss"
    # Of steps 0, 2, ..., 12, each on two splits: least at step 4.
    losses = (abs(step - 4) for step in range(0, 14, 2) for _ in range(2))
    measure = loop.evaluate_split
    monkeypatch.setattr(
        loop, "evaluate_split", lambda *a, **k: measure(*a, **k) | {"loss": float(next(losses))}
    )
    stop_at_7(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        loop.train(config, workdir)
    loop.train(config, workdir)
    kept = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert kept == [4, 12]


def stop_at_7(monkeypatch):
    advance, steps = loop.Progress.advance, []

    def stop(self):
        advance(self)
        steps.append(1)
        if len(steps) == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop.Progress, "advance", stop)


@pytest.fixture
def no_cache():
    """JAX warns where it cannot keep a compiled program."""
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)


@pytest.mark.slow
def test_a_full_disk_stops_the_run_with_one_line_and_costs_no_more(tiny_run, no_cache, capsys):
    config, workdir = tiny_run
    config.model.width = 0.2
    unbroken = loop.train(config, workdir.with_name("unbroken"))
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Files of more than so many bytes fail as on a full disk, in every library; metrics.jsonl is
    # shorter and checkpoints are longer.
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(
            StorageError, match=r"\(File too large\); free some space: the same"
        ) as error:
            loop.train(config, workdir)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert "\n" not in str(error.value)
    assert not (workdir / "results.json").exists()
    assert loop.train(config, workdir) == unbroken
    assert "starting again from step 0" in capsys.readouterr().out


def test_two_starts_at_once(tiny_run):
    config, workdir = tiny_run
    with run_directory.hold_run(workdir):
        with pytest.raises(run_directory.RunInUseError, match="is in use by another process"):
            loop.train(config, workdir)
        assert [path.name for path in workdir.iterdir()] == [".lock"]
    assert loop.train(config, workdir)["step"] == 8


def test_a_look_at_the_lock_keeps_nobody_from_the_run(tmp_path):
    (tmp_path / run_directory.LOCK).touch()
    with (tmp_path / run_directory.LOCK).open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        release = threading.Timer(0.1, fcntl.flock, (file, fcntl.LOCK_UN))
        release.start()
        with run_directory.hold_run(tmp_path):
            pass
        release.join()


def test_a_run_that_another_process_ended_meanwhile(tiny_run, monkeypatch):
    config, workdir = tiny_run
    load = run_data.load_run_data

    def load_while_another_runs(config, workdir):
        with monkeypatch.context() as patch:
            patch.setattr(run_data, "load_run_data", load)
            results.append(loop.train(config, workdir))
        return load(config, workdir)

    results = []
    monkeypatch.setattr(run_data, "load_run_data", load_while_another_runs)
    assert loop.train(config, workdir) == results[0]


def diverging(config):
    """Takes huge steps from the 7th on."""
    config.schedule.name, config.schedule.boundaries = "step", (0.75,)
    config.schedule.factor = 1e25
    config.checkpoint.best_metric = ""
    return config


def test_a_loss_that_is_nan_stops_with_the_last_good_checkpoint(tiny_run):
    config, workdir = tiny_run
    diverging(config)
    with pytest.raises(
        loop.DivergedError, match=r"in step 7|at step 8.*\(last good checkpoint: step 5\)"
    ):
        loop.train(config, workdir)
    with Checkpoints(workdir / "checkpoints", keep=2) as checkpoints:
        assert checkpoints.latest_step() == 5


def test_broken_parameters_are_not_saved_although_the_loss_before_was_finite(tiny_run):
    config, workdir = tiny_run
    config.optimizer.l2 = 1e10
    config.optimizer.learning_rate, config.checkpoint.every_steps = 2e38, 1
    with pytest.raises(
        loop.DivergedError,
        match=r"state became infinite or NaN in step 1 \(last good checkpoint: none\)",
    ):
        loop.train(config, workdir)
    assert not list((workdir / "checkpoints").iterdir())


def test_a_run_that_is_told_to_goes_on_after_nan(tiny_run):
    from gc_nc.runs.progress import results_table

    config, workdir = tiny_run
    diverging(config)
    config.on_divergence = "continue"
    results = loop.train(config, workdir)
    assert results["step"] == 8
    assert np.isnan(results["metrics"]["train/loss"])
    assert "nan" in results_table(results)
    assert loop.train(config, workdir).keys() == results.keys()


def test_no_pickle_anywhere(tiny_run, monkeypatch):
    import pickle

    def refuse(*_, **__):
        raise AssertionError("pickled")

    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    config, workdir = tiny_run
    loop.train(config, workdir)
    (workdir / "results.json").unlink()
    loop.train(config, workdir)
    for path in Path(workdir, "checkpoints").rglob("*"):
        assert path.suffix not in (".pkl", ".pickle")
    assert os.path.exists(workdir / "config.json")
