"""The finished runs of a sweep with their settings and seeds, in one row for each setting."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from gc_nc.files import read_json_object
from gc_nc.runs.configuration import flatten
from gc_nc.runs.run_directory import read_records
from gc_nc.sweeps.members import Member
from gc_nc.sweeps.sweep_directory import is_done, log_path, run_path
from gc_nc.sweeps.sweep_status import error_in, last_start

#: Names of the settings, in the order of the paper's rows.
SETTING_NAMES = {
    "optimizer.learning_rate": "Learning rate",
    "batch_size": "Batch size",
    "optimizer.l2": "L2",
    "gc_penalty.weight": "GC penalty",
}


def setting_name(key: str) -> str:
    """The name of a setting, or its key if it has no name here."""
    return SETTING_NAMES.get(key, key)


class Run(NamedTuple):
    """A finished run.

    Attributes:
      workdir: its directory.
      setting: (key, value) of all that differs from the base config, except the seed.
      seed: its seed.
      config: its whole config, by dotted key.
      evaluations: the records of metrics.jsonl that contain an evaluation, by step.
      metadata: its metadata.json.
    """

    workdir: Path
    setting: tuple[tuple[str, Any], ...]
    seed: int
    config: dict[str, Any]
    evaluations: list[dict[str, Any]]
    metadata: dict[str, Any]

    @property
    def final(self) -> dict[str, Any]:
        """The metrics of the last evaluation."""
        return self.evaluations[-1]

    def epochs(self, step: int) -> float:
        """How often each training example was used up to a step."""
        return step * self.config["batch_size"] / self.metadata["data"]["num_train"]


class Row(NamedTuple):
    """Runs that differ only in one setting and their seed, and are otherwise as the base config.

    Attributes:
      key: the key of the setting.
      runs: {value: runs by seed}, with ascending values.
    """

    key: str
    runs: dict[Any, list[Run]]


class Sweep(NamedTuple):
    """The finished part of a sweep, and what is missing.

    Attributes:
      base: its whole config, by dotted key.
      runs: the runs that are finished and whose metrics are finite.
      rows: these runs in rows, one for each setting that is varied.
      missing: {name: reason} for the other members.
    """

    base: dict[str, Any]
    runs: list[Run]
    rows: list[Row]
    missing: dict[str, str]

    @property
    def base_runs(self) -> list[Run]:
        """The runs of the config itself, which differ only in their seed."""
        return [run for run in self.runs if not run.setting]


def only(rows: Sequence[Row], runs: Sequence[Run]) -> list[Row]:
    """The rows reduced to these runs, without rows and values that have none of them."""
    kept = {run.workdir for run in runs}
    fewer = [
        row._replace(
            runs={
                value: chosen
                for value, all_runs in row.runs.items()
                if (chosen := [run for run in all_runs if run.workdir in kept])
            }
        )
        for row in rows
    ]
    return [row for row in fewer if row.runs]


def collect(workdir: Path, members: Sequence[Member], base: ConfigDict) -> Sweep:
    """Reads the finished runs of a sweep.

    Args:
      workdir: the sweep's directory.
      members: its members.
      base: the config that they vary.
    """
    flat_base = flatten(base)
    runs, missing = [], {}
    for member in members:
        if not is_done(workdir, member.name):
            missing[member.name] = _why_not_done(workdir, member.name)
            continue
        run = _read_run(run_path(workdir, member.name), member, flat_base)
        bad = [name for name, value in run.final.items() if _is_bad(value)]
        if bad:
            missing[member.name] = f"{', '.join(bad)} of its last evaluation is not a finite number"
        else:
            runs.append(run)
    varied = {key for member in members for key in member.overrides} - {"seed"}
    # In the paper's order, followed by other settings.
    known = [key for key in SETTING_NAMES if key in varied]
    keys = [*known, *sorted(varied - set(known))]
    rows = [row for key in keys if (row := _row(key, runs)).runs]
    return Sweep(flat_base, runs, rows, missing)


def _why_not_done(workdir: Path, name: str) -> str:
    log = log_path(workdir, name)
    if not log.exists():
        return "not started"
    error = error_in(last_start(log.read_text("utf-8", "replace")))
    return error or "not finished"


def _read_run(workdir: Path, member: Member, base: Mapping[str, Any]) -> Run:
    evaluations = [record for record in read_records(workdir) if "train/accuracy" in record]
    config = flatten(member.config)
    differing = [key for key in base if key != "seed" and config[key] != base[key]]
    return Run(
        workdir,
        tuple((key, config[key]) for key in differing),
        member.config.seed,
        config,
        evaluations,
        read_json_object(workdir / "metadata.json"),
    )


def _is_bad(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _row(key: str, runs: Sequence[Run]) -> Row:
    own = [run for run in runs if {name for name, _ in run.setting} <= {key}]
    values = sorted({run.config[key] for run in own})
    return Row(
        key,
        {
            value: sorted((run for run in own if run.config[key] == value), key=lambda r: r.seed)
            for value in values
        },
    )
