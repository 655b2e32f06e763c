"""The lock file that README's commands install from."""

import configparser
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def normalized(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_line_is_an_exact_version_and_every_requirement_is_there():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    locked = set()
    for line in lines:
        if not line.startswith("#"):
            # No paths, no addresses: nothing that only one machine can install.
            assert re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.+-]+", line), line
            locked.add(normalized(line.partition("==")[0]))
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    required = config["options"]["install_requires"] + config["options.extras_require"]["test"]
    for line in required.splitlines():
        if line and not line.startswith("#"):
            assert normalized(re.match(r"[A-Za-z0-9_.-]+", line).group()) in locked, line
