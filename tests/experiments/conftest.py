"""Commands as a user meets them."""

import json
import subprocess
import sys
from pathlib import Path

# Defines flags of its own, which flagsaver would take away again where a test imports it first.
import grain  # noqa: F401
import pytest

ROOT = Path(__file__).parents[2]

# Each line on stdin is a module and its arguments: `python -m MODULE ARGUMENTS`, in a process of
# its own that has made the slow imports already.
_SERVER = """
import json, os, runpy, sys, warnings
import gc_nc.runs.loop, ml_collections.config_flags, tensorflow_datasets
# JAX warns of any fork; no backend has started here.
warnings.filterwarnings("ignore", "os.fork")
for line in sys.stdin:
    module, arguments, folder = json.loads(line)
    pid = os.fork()
    if pid == 0:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(f"{folder}/{name}", os.O_CREAT | os.O_WRONLY), number)
        sys.argv[1:] = arguments
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(code, flush=True)
"""


@pytest.fixture(scope="session")
def run_command(tmp_path_factory):
    """Runs `python -m MODULE ARGUMENTS` from the checkout, for commands that start no backend."""
    server = subprocess.Popen(
        [sys.executable, "-c", _SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )

    def run_forked(module, *arguments):
        folder = tmp_path_factory.mktemp("output")
        server.stdin.write(json.dumps([module, arguments, str(folder)]) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        texts = [(folder / name).read_text() for name in ("stdout", "stderr")]
        return subprocess.CompletedProcess(arguments, code, *texts)

    yield run_forked
    server.communicate()
