"""One run on several devices and in several processes: the same as on one."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gc_nc.devices import Placement
from gc_nc.errors import InputError
from gc_nc.runs import loop, run_directory
from gc_nc.runs.progress import Progress
from gc_nc.runs.run_data import LoadedData
from gc_nc.runs.run_setup import RunSetup
from tests.rounding import assert_same_numbers

ROOT = Path(__file__).parents[2]


def devices(count):
    return lambda: jax.devices()[:count]


@pytest.fixture
def long_run(folder_run):
    """20 steps of batch 8, with BatchNorm, augmentation and a penalty of half of the batch."""
    config, workdir = folder_run
    config.batch_size = 8
    config.num_steps = 20
    # Rounding differs between numbers of devices, and large steps make much of it.
    config.optimizer.learning_rate, config.optimizer.momentum = 0.01, 0.0
    config.model.width = 0.2
    config.model.batch_norm = True
    config.data.crop_padding = 1
    config.gc_penalty.batch_fraction = 0.5
    config.gc_penalty.every_steps = 1
    config.monitor.every_steps = 0
    config.evaluation.every_steps = 20
    # Neither divides the 19 and 5 examples of the splits, nor is divided by the devices.
    config.evaluation.batch_size = 3
    return config, workdir


@contextlib.contextmanager
def signal_after(steps):
    """SIGTERM comes after so many steps."""
    advance, left = Progress.advance, iter(range(steps - 1, -1, -1))

    def advance_or_stop(self):
        advance(self)
        if next(left) == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "advance", advance_or_stop)
        yield


_ALONE = {}


def alone(config, workdir):
    """The run's directory on one device, trained once for all tests of this file."""
    if not _ALONE:
        _ALONE["workdir"] = workdir.with_name("alone")
        loop.train(config, _ALONE["workdir"])
    return _ALONE["workdir"]


def last_state(config, workdir, count=1):
    placement = Placement(jax.devices()[:count])
    like = RunSetup(config, workdir, LoadedData(), placement).initial_state()
    with loop.Checkpoints(workdir / "checkpoints", keep=2) as checkpoints:
        return checkpoints.restore(20, like)


def assert_same_run(config, workdir, expected):
    """Parameters and running statistics after 20 steps, and records."""
    assert_same_numbers(*(last_state(config, x).variables for x in (workdir, expected)))
    assert_same_numbers(*(without_clock(x) for x in (workdir, expected)))


def without_clock(workdir):
    return [
        {name: value for name, value in record.items() if "per_sec" not in name}
        for record in run_directory.read_records(workdir)
    ]


@pytest.mark.slow
def test_r3_several_devices_train_the_same_network_also_a_run_that_goes_on_on_others(long_run):
    config, workdir = long_run
    # 4 devices are tested below.
    for count, step in ((8, 5), (1, 10)):
        with signal_after(5), pytest.raises(loop.Interrupted, match=f"step {step};"):
            loop.train(config, workdir, devices(count))
    loop.train(config, workdir, devices(2))
    assert_same_run(config, workdir, alone(config, workdir))
    # And what one device saved, in the placement of four.
    state = last_state(config, alone(config, workdir), count=4)
    assert all(len(leaf.sharding.device_set) == 4 for leaf in jax.tree.leaves(state))


def test_r5_batch_norm_sees_the_whole_batch():
    placement = Placement(jax.devices()[:2])
    norm = nn.BatchNorm(use_running_average=False, momentum=0.0)
    rows = placement.divide_batch(np.repeat(np.float32([[0.0], [2.0]]), 4, axis=0))
    variables = norm.init(jax.random.key(0), jnp.zeros((8, 1)))

    @partial(jax.jit, **placement.jit_options)
    def statistics(rows):
        return norm.apply(variables, rows, mutable=["batch_stats"])[1]["batch_stats"]

    found = statistics(rows)
    assert float(found["mean"][0]) == 1
    assert float(found["var"][0]) == 1


def test_every_device_works_on_its_own_part():
    """Otherwise all of the above would hold of devices that all do everything."""
    placement, shapes = Placement(jax.devices()[:4]), []

    @jax.jit
    def look(batch):
        batch = placement.constrain_batch(batch)
        jax.debug.inspect_array_sharding(
            batch, callback=lambda sharding: shapes.append(sharding.shard_shape(batch.shape))
        )
        return batch

    look(placement.replicate(np.zeros((8, 3))))
    assert shapes == [(2, 3)]


def test_a_batch_that_the_devices_cannot_divide_names_sizes_that_work(tiny_run):
    config, workdir = tiny_run
    config.batch_size = 10
    with pytest.raises(
        InputError, match="batch_size=10 cannot be divided among 4 devices; set it to 8 or 12"
    ):
        loop.train(config, workdir, devices(4))
    config.batch_size = 2
    with pytest.raises(InputError, match="among 4 devices; set it to 4, or"):
        loop.train(config, workdir, devices(4))
    assert not workdir.exists()


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


TWO_PROCESSES = """
import itertools, json, os, signal, sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
from gc_nc.runs import hosts, loop
from gc_nc.runs.configuration import default_config
path, workdir, address, number, signal_after = sys.argv[1:]
hosts.join_processes("auto", address, 2, int(number))
assert jax.process_count() == 2 and jax.device_count() == 4
config = default_config()
config.update(json.load(open(path)))
from pathlib import Path
advance, steps = loop.Progress.advance, itertools.count(1)
def advance_or_stop(self):
    advance(self)
    # One process alone is told to stop.
    if number == "1" and next(steps) == int(signal_after):
        os.kill(os.getpid(), signal.SIGTERM)
loop.Progress.advance = advance_or_stop
try:
    print(json.dumps(loop.train(config, Path(workdir), jax.devices)))
except loop.Interrupted as stop:
    print(f"signal {stop.signal_number}: {stop}")
"""


def run_two_processes(config, workdir, signal_after=0):
    path = workdir.with_name(f"{workdir.name}.json")
    path.write_text(json.dumps(config.to_dict()))
    address = f"localhost:{free_port()}"
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                TWO_PROCESSES,
                *(str(path), str(workdir), address, str(number), str(signal_after)),
            ],
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=180) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    return [output for output, _ in outputs]


@pytest.mark.slow
def test_two_processes_train_the_same_network(long_run):
    """From streamed images, of which each process reads its part; the one alone has them all.

    They stop on the way, as one of them is told to, and go on.
    """
    config, workdir = long_run
    other = config.copy_and_resolve_references()
    with other.unlocked():
        other.data.streaming = True
    for output in run_two_processes(other, workdir, signal_after=3):
        assert output.endswith(
            "signal 15: stopped at step 10; the same command resumes from there\n"
        )
    outputs = run_two_processes(other, workdir)
    results = [json.loads(output.splitlines()[-1]) for output in outputs]
    assert results[0] == results[1] == run_directory.read_results(workdir)
    assert_same_run(config, workdir, alone(config, workdir))
    # One process speaks and writes, in two starts.
    assert "step 20/20" in outputs[0]
    assert "step 20/20" not in outputs[1]
    assert len(list(workdir.glob("events.out.tfevents.*"))) == 2
