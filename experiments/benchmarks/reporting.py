"""How benchmarks print: a table, or with --json one object on each line."""

import json
import os
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, NamedTuple

import jax
from absl import flags

from gc_nc.compilation import jit_for_device
from gc_nc.errors import InputError

# Defined here because every benchmark has this flag and a flag can be defined only once.
_JSON = flags.DEFINE_boolean("json", False, "Print JSON objects, one per line, instead of a table.")


class Row(NamedTuple):
    """One comparison; it is met if the ratio of ours to the reference is at most the goal.

    `limit` is the time that our side would take if all its FLOPs ran at a matmul's measured rate.
    """

    name: str
    ours: float
    reference: float
    goal: float
    unit: str = "s"
    limit: float | None = None

    @property
    def ratio(self) -> float:
        """The ratio of ours to the reference; below 1, ours is better."""
        return self.ours / self.reference

    @property
    def met(self) -> bool:
        """Whether the goal is reached."""
        return self.ratio <= self.goal


def time_call(run: Callable[[], Any]) -> float:
    """Seconds until the result of run() is ready."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def matmul_flops_per_second(size: int = 2048, repetitions: int = 9) -> float:
    """The machine's rate in float32 on a square matmul, compiled as the library compiles."""
    matrix = jax.random.normal(jax.random.key(0), (size, size))
    multiply = jit_for_device(lambda a, b: a @ b)
    time_call(lambda: multiply(matrix, matrix))
    seconds = median(time_call(lambda: multiply(matrix, matrix)) for _ in range(repetitions))
    return 2 * size**3 / seconds


def import_torch():
    """Imports PyTorch, on as many threads as this process may use, flushing to 0 as JAX does.

    Raises:
      InputError: PyTorch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise InputError("the reference needs PyTorch; pip install -e .[bench]") from error
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    # Arithmetic with subnormal numbers is many times slower.
    torch.set_flush_denormal(True)
    return torch


def print_rows(rows: Sequence[Row]) -> None:
    """Prints the rows as a table or as JSON, according to the flag."""
    print(_json_lines(rows) if _JSON.value else _table(rows))


def _json_lines(rows: Sequence[Row]) -> str:
    return "\n".join(
        json.dumps({**row._asdict(), "ratio": row.ratio, "met": row.met}) for row in rows
    )


def _table(rows: Sequence[Row]) -> str:
    width = max(len(row.name) for row in rows)
    limited = any(row.limit is not None for row in rows)
    header = f"{'name':{width}}  {'ours':>9}  {'reference':>9}  {'ratio':>5}  {'goal':>5}  met"
    lines = [header + ("      limit" if limited else "")]
    for row in rows:
        line = (
            f"{row.name:{width}}  {row.ours:7.4g} {row.unit}  {row.reference:7.4g} {row.unit}"
            f"  {row.ratio:5.2f}  {row.goal:5.2f}  {'yes' if row.met else 'no':3}"
        )
        limit = "" if row.limit is None else f"  {row.limit:7.4g} {row.unit}"
        lines.append((line + limit).rstrip())
    return "\n".join(lines)
