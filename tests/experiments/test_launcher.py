"""What all commands share: --help as it is written, one line where there is no device."""

import re
import sys
import types

import jax
import pytest
from absl import app, flags

from experiments import launcher, transfer


@pytest.fixture
def command(monkeypatch):
    """Runs `main` by the launcher, without absl's own parsing of pytest's flags."""

    def run(main, doc=None):
        flags.FLAGS.mark_as_parsed()
        monkeypatch.setitem(sys.modules, "__main__", types.ModuleType("__main__", doc))
        monkeypatch.setattr(app, "run", lambda main, flags_parser: main(["command"]))
        monkeypatch.setattr(launcher, "use_compilation_cache", lambda directory: None)
        launcher.run(main)

    return run


@pytest.mark.parametrize("doc", [transfer.__doc__, "50% of %s and 100%, %d%%", "100%"])
def test_e7_help_is_plain_text(doc, command, capsys):
    assert "%" in doc
    command(lambda argv: app.usage(writeto_stdout=True), doc)
    assert doc.strip() in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (AssertionError(), "here; unset"),
        (RuntimeError("Unable to initialize backend\n'tpu'"), r"\(Unable to initialize backend 't"),
    ],
)
def test_e6_no_such_device_is_one_line(error, reason, command, capsys, monkeypatch):
    def devices():
        raise error

    def main(argv):
        jax.devices()

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setattr(launcher, "asked_platforms", lambda: "cuda")
    with pytest.raises(SystemExit) as stop:
        command(main)
    assert stop.value.code == launcher.EXIT_BAD_INPUT
    line = capsys.readouterr().err
    assert line.startswith("error: JAX_PLATFORMS=cuda: JAX finds no such device")
    assert line.count("\n") == 1
    assert re.search(reason, line)


def test_a_fault_of_the_program_keeps_its_traceback(command):
    def main(argv):
        raise RuntimeError("a fault")

    with pytest.raises(RuntimeError, match="a fault"):
        command(main)
