"""A Slurm of one node for tests: its four daemons in one folder, without accounting."""

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")

_CONFIG = """
ClusterName=ci
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge/sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SchedulerParameters=sched_min_interval=0,sched_interval=2,bf_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters={options}
NodeName=localhost NodeAddr=127.0.0.1 CPUs=4 RealMemory=1000
PartitionName=main Nodes=localhost Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=localhost PriorityTier=2 PreemptMode=OFF
"""


def why_not() -> str:
    """Why there can be no Slurm here; "" if there can."""
    missing = [name for name in DAEMONS if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed"
    if importlib.util.find_spec("submitit") is None:
        return "submitit is not installed"
    return "" if os.getuid() == 0 else "its daemons change users, which takes root"


@contextlib.contextmanager
def one_node_slurm(folder: Path, options: str = "preempt_send_user_signal") -> Iterator[None]:
    """Runs a Slurm whose commands are those that see SLURM_CONF.

    It has 4 cores, whatever the machine has, and a partition "urgent" that preempts "main" with a
    minute of grace.

    Args:
      folder: absolute; of all its files.
      options: SlurmctldParameters.
    """
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir(mode=0o700)
    (folder / "slurm.conf").write_text(_CONFIG.format(folder=folder, options=options))
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    munge = folder / "munge"
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    commands = {
        # By force: it wants its socket to be open to all users.
        "munged": [
            "--force",
            f"--key-file={key}",
            f"--socket={munge / 'sock'}",
            f"--pid-file={folder / 'munged.pid'}",
            f"--log-file={munge / 'log'}",
            f"--seed-file={munge / 'seed'}",
        ],
        "slurmctld": [],
        "slurmd": ["-N", "localhost"],
    }
    try:
        for name, arguments in commands.items():
            subprocess.run([name, *arguments], check=True, env=environment, capture_output=True)
        _wait_until_idle(environment)
        yield
    finally:
        subprocess.run(["scancel", "--me"], env=environment, capture_output=True)
        for name in reversed(DAEMONS):
            _stop(folder / f"{name}.pid")


def _wait_until_idle(environment: dict[str, str]) -> None:
    command = ["sinfo", "--noheader", "--partition=main", "--format=%T"]
    for _ in range(100):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.stdout.strip() == "idle":
            return
        time.sleep(0.1)
    raise TimeoutError(f"Slurm is not idle after 10 s: {done.stdout}{done.stderr}")


def _stop(pid_file: Path) -> None:
    if not pid_file.exists():
        return
    pid = int(pid_file.read_text())
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
        for _ in range(100):
            os.kill(pid, 0)
            time.sleep(0.1)
        os.kill(pid, signal.SIGKILL)
