"""Runs the numerical tests as other processors would, and says what failed and what came close.

    python -m tests.on_other_processors [--isa=AVX,AVX2,AVX512] [--threads=1,2,3] [--json=FILE]
        [PATH ...]

Each combination of an instruction set that this processor has and a number of XLA's threads is a
run of pytest over the paths, by default the directories of numerical tests, without the tests
marked slow. A row says how many tests passed and failed, and the largest share of its tolerance
that a comparison of arrays used (tests/margins.py). Exit code 1 if a test failed or a comparison
used more than a third.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
NUMERICAL = tuple(
    f"tests/{part}"
    for part in ("metrics", "models", "training", "transfer", "runs", "measurement", "reproduction")
)
#: What the processor's flags must name for XLA to use an instruction set.
ISA_FLAGS = {"AVX": "avx", "AVX2": "avx2", "AVX512": "avx512f"}
LARGEST_SHARE = 1 / 3


def available(isas: list[str]) -> list[str]:
    """Those that this processor has; all where its flags cannot be read."""
    try:
        flags = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text("utf-8")))
    except OSError:
        return isas
    return [isa for isa in isas if ISA_FLAGS[isa] in flags]


def run_tests(isa: str, threads: int, paths: list[str]) -> dict:
    """A row of the result."""
    with tempfile.TemporaryDirectory() as folder:
        margins = Path(folder) / "margins.jsonl"
        environment = os.environ | {
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_max_isa={isa}".strip(),
            # Read by XLA's CPU client as the number of its threads.
            "NPROC": str(threads),
            "GC_NC_MARGINS": str(margins),
        }
        options = ["-q", "-n", "2", "--dist=loadfile", "-p", "tests.margins", "-m", "not slow"]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *paths],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        lines = margins.read_text("utf-8").splitlines() if margins.exists() else []
    summary = done.stdout.strip().splitlines()[-1:] or [done.stderr.strip()[-200:]]
    counts = {
        word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|error)", summary[0])
    }
    comparisons = sorted(map(json.loads, lines), key=lambda c: c["used"], reverse=True)
    return {
        "isa": isa,
        "threads": threads,
        "exit_code": done.returncode,
        "passed": counts.get("passed", 0),
        "failed": counts.get("failed", 0) + counts.get("error", 0),
        "failures": re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE),
        "comparisons": len(comparisons),
        "largest": comparisons[0] if comparisons else None,
        "above_a_third": sorted(
            {f"{c['test']} ({c['place']})" for c in comparisons if c["used"] > LARGEST_SHARE}
        ),
    }


def main(arguments: list[str] | None = None) -> int:
    """Runs all combinations and prints a row each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--isa", default=",".join(ISA_FLAGS), help="instruction sets")
    parser.add_argument("--threads", default="1,2,3", help="numbers of XLA's threads")
    parser.add_argument("--json", type=Path, help="a file for the rows")
    parser.add_argument("paths", nargs="*", help="tests to run")
    options = parser.parse_args(arguments)
    asked = options.isa.split(",")
    if unknown := set(asked) - set(ISA_FLAGS):
        parser.error(f"--isa={','.join(sorted(unknown))} must be among {', '.join(ISA_FLAGS)}")
    if not all(number.isdecimal() and int(number) for number in options.threads.split(",")):
        parser.error(f"--threads={options.threads} must be whole numbers of at least 1")
    isas = available(asked)
    for isa in sorted(set(asked) - set(isas)):
        print(f"{isa}: this {platform.machine()} processor does not have it")
    rows = []
    for isa in isas:
        for threads in map(int, options.threads.split(",")):
            row = run_tests(isa, threads, options.paths or list(NUMERICAL))
            rows.append(row)
            share = row["largest"]["used"] if row["largest"] else 0.0
            print(
                f"{isa}, {threads} threads: {row['passed']} passed, {row['failed']} failed,"
                f" {row['comparisons']} comparisons of arrays, largest share of a tolerance"
                f" {share:.2f}",
                flush=True,
            )
            for name in row["failures"]:
                print(f"  failed: {name}")
            for name in row["above_a_third"]:
                print(f"  above a third: {name}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    return int(any(row["exit_code"] or row["above_a_third"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
