"""The lock file that README's commands install from."""

import importlib.metadata
import re
from pathlib import Path

from packaging.requirements import Requirement

LOCK = Path(__file__).parents[1] / "requirements.lock"


def normalized(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements_of(name, extras=("",)):
    for line in importlib.metadata.requires(name) or ():
        requirement = Requirement(line)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras):
            yield requirement


def test_exact_versions_of_everything_that_is_needed():
    locked = set()
    for line in LOCK.read_text().splitlines():
        if not line.startswith("#"):
            # No paths, no addresses: nothing that only one machine can install.
            assert re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.+-]+", line), line
            locked.add(normalized(line.partition("==")[0]))
    waiting = list(requirements_of("gc_nc", ("", "train", "data", "sweeps", "test")))
    needed = set()
    while waiting:
        requirement = waiting.pop()
        name = normalized(requirement.name)
        if (name, *sorted(requirement.extras)) not in needed:
            needed.add((name, *sorted(requirement.extras)))
            waiting.extend(requirements_of(requirement.name, ("", *requirement.extras)))
    assert {name for name, *_ in needed} <= locked
