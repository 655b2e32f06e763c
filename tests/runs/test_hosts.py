"""When a process is one of several, and what it says where it cannot be."""

import jax
import pytest

from gc_nc.errors import InputError
from gc_nc.runs import hosts

SRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        (SRUN, True),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1"}, False),
        # A shell with some of Slurm's variables, a batch script, and ssh into a node of the job.
        ({"SLURM_JOB_ID": "7"}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, False),
        ({name: value for name, value in SRUN.items() if name != "SLURM_PROCID"}, False),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "many"}, False),
        ({"TPU_WORKER_HOSTNAMES": "t1,t2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
    ],
)
def test_r6_what_schedulers_say(environment, several):
    assert hosts.several_processes(environment) is several


@pytest.fixture
def initialized(monkeypatch):
    """What `jax.distributed.initialize` was called with."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: calls.append(options))
    for name in (*SRUN, "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    return calls


def test_processes_join_where_they_are_told_to(initialized, monkeypatch):
    hosts.join_processes()
    assert initialized == []
    hosts.join_processes("yes")
    assert initialized.pop() == {}
    hosts.join_processes("auto", "node1:1234", 2, 1)
    assert initialized.pop() == {
        "coordinator_address": "node1:1234",
        "num_processes": 2,
        "process_id": 1,
    }
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    hosts.join_processes()
    assert initialized.pop() == {}
    hosts.join_processes("no")
    assert initialized == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("maybe",), "--distributed=maybe must be one of auto, yes, no"),
        (("auto", "node1:1234"), "--num_processes and --process_id missing"),
        (("auto", None, 2, 0), "--coordinator_address missing"),
        (("auto", "node1:1234", 2, 2), "--process_id=2 must be from 0 to 1"),
        (("auto", "node1:1234", 2, -1), "--process_id=-1 must be from 0 to 1"),
        (("auto", "node1", 2, 0), "--coordinator_address='node1' must be host:port"),
        (("no", "node1:1234", 2, 0), "exclude each other"),
    ],
)
def test_flags_that_do_not_fit(initialized, arguments, message):
    with pytest.raises(InputError, match=message):
        hosts.join_processes(*arguments)
    assert initialized == []


def test_processes_that_do_not_find_each_other(monkeypatch):
    def fail(**options):
        raise RuntimeError("DEADLINE_EXCEEDED: nobody answers\nand a page more")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(InputError, match=r"could not be joined \(DEADLINE_EXCEEDED: nobody answ"):
        hosts.join_processes("yes")
