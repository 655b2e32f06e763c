"""What all commands share: flags, and a one-line error instead of a traceback for a mistake."""

import contextlib
import itertools
import os
import re
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict

from experiments import stored_config
from gc_nc.compilation import default_cache_dir, use_persistent_cache
from gc_nc.errors import InputError, suggestion
from gc_nc.runs.configuration import default_config, flatten, shown
from gc_nc.runs.settings import SETTINGS, TYPE_NAMES
from gc_nc.sweeps.members import Member
from gc_nc.sweeps.sweep_directory import config_path, run_path

#: Bad input: nothing was done, nothing overwritten.
EXIT_BAD_INPUT = 2
#: Ctrl-C, as shells have it.
EXIT_INTERRUPTED = 128 + signal.SIGINT

_CACHE_DIR = flags.DEFINE_string(
    "compilation_cache_dir",
    None,
    "Folder where compiled programs are kept for the next start; empty keeps none. Default:"
    " JAX_COMPILATION_CACHE_DIR, or gc_nc/xla in the user's cache folder.",
)

_EXAMPLE_CONFIG = "--config=experiments/configs/digits.py"


def run(main: Callable[[list[str]], int | None]) -> None:
    """Parses the flags, calls main and exits; InputError is one line on stderr and exit code 2."""

    def guarded_main(argv):
        try:
            use_compilation_cache(_CACHE_DIR.value)
            return main(argv)
        except InputError as error:
            fail(str(error), EXIT_BAD_INPUT)
        except KeyboardInterrupt:
            fail("interrupted", EXIT_INTERRUPTED)
        except (RuntimeError, AssertionError):
            # Where there is no device, JAX says so at its first use, and for CUDA nothing at all.
            if fault := device_fault():
                fail(fault, EXIT_BAD_INPUT)
            raise

    module = sys.modules["__main__"]
    # absl prints it for --help, with the program's name in the place of what looks like a format.
    module.__doc__ = (module.__doc__ or "").replace("%", "%%") or None
    app.run(guarded_main, flags_parser=parse_flags)


def device_fault() -> str | None:
    """Why JAX has no device to compute on, in one line; None where it has one."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        asked = asked_platforms()
        reason = f" ({error})" if str(error) else ""
        if not asked:
            return f"JAX finds no device to compute on{reason}"
        return (
            f"JAX_PLATFORMS={asked}: JAX finds no such device here{reason}; unset it to take what"
            " there is, or install JAX with the plugin of the device"
        )
    return None


def asked_platforms() -> str | None:
    """What JAX_PLATFORMS, or JAX's option of that name, asks for."""
    return jax.config.jax_platforms


def use_compilation_cache(directory: str | None) -> None:
    """Keeps compiled programs in a directory; "" in none, None in JAX's own or the default one.

    Raises:
      InputError: the directory was named and cannot be written to.
    """
    if directory is None and os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        # JAX reads it, and knows other places than folders.
        return
    if directory is None:
        # Nobody named the default: no home, or one that cannot be written to, is no reason to stop.
        with contextlib.suppress(InputError, RuntimeError):
            use_persistent_cache(default_cache_dir())
    elif directory:
        use_persistent_cache(Path(os.path.expanduser(directory)))
    else:
        jax.config.update("jax_compilation_cache_dir", None)


def read_config(flag: flags.FlagHolder) -> ConfigDict:
    """The config of a --config flag.

    Raises:
      InputError: the flag is missing, or its file cannot be read or makes no ConfigDict.
    """
    if flag.value is None and not flag.present:
        raise InputError(f"--{flag.name} is missing; try {_EXAMPLE_CONFIG}")
    try:
        # For a file that cannot be read the flag holds an object that raises when it is used.
        flag.value.lock  # noqa: B018
    except OSError as error:
        raise InputError(f"--{flag.name}: {error}") from error
    except AttributeError:
        pass
    if not isinstance(flag.value, ConfigDict):
        raise InputError(
            f"--{flag.name}: get_config() returned {type(flag.value).__name__}; return the"
            " ConfigDict of default_config() with what you change"
        )
    return flag.value


def config_of_file(config_file: str) -> ConfigDict:
    """What get_config of FILE:ARGUMENT returns, unlocked, with the types of optional keys."""
    path, _, argument = config_file.partition(":")
    config = default_config()
    config.update_from_flattened_dict(flatten(runpy.run_path(path)["get_config"](argument)))
    return config


def train_command(workdir: Path) -> Callable[[Member], list[str]]:
    """The command line that trains a member of a sweep in a process of its own."""
    common = ["--distributed=no"]
    if _CACHE_DIR.value is not None:
        common.append(f"--compilation_cache_dir={_CACHE_DIR.value}")

    def command(member: Member) -> list[str]:
        # Not the config file itself: it may change while the sweep runs.
        config = f"{os.path.relpath(stored_config.__file__)}:{config_path(workdir, member.name)}"
        run = run_path(workdir, member.name)
        return [
            *(sys.executable, "-m", "experiments.train"),
            *(f"--config={config}", f"--workdir={run}", *common),
        ]

    return command


def fail(message: str, exit_code: int) -> None:
    """Prints one line and exits."""
    # What cannot be shown, such as a terminal's control sequences, is escaped.
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(message.split()))
    print(f"error: {line}", file=sys.stderr)
    sys.exit(exit_code)


def _quiet_libraries() -> None:
    # They report every file they touch at INFO.
    logging.set_verbosity(logging.WARNING)
    # Orbax prints what it raises too, as pages from several threads.
    logging.get_absl_handler().addFilter(_is_not_of_orbax)
    # And leaves coroutines whose end Python reports.
    sys.unraisablehook = _report_unraisable


def _is_not_of_orbax(record) -> bool:
    return "orbax" not in record.pathname


def _report_unraisable(unraisable) -> None:
    if "Event loop is closed" not in str(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


def parse_flags(argv: list[str], flag_values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """Sets the flags from `argv`; a mistake is one line on stderr and exit code 2."""
    _quiet_libraries()
    overrides = _overrides(argv)
    try:
        _check_keys(overrides)
        remaining = flag_values(argv)
    except InputError as error:
        fail(str(error), EXIT_BAD_INPUT)
    except Exception as error:
        # A config file is code and may raise anything; absl and ml_collections raise half a dozen
        # types for a wrong override of it.
        fail(_flag_message(argv, overrides, error), EXIT_BAD_INPUT)
    if len(remaining) > 1:
        fail(f"unexpected argument {remaining[1]!r}; flags are --name=value", EXIT_BAD_INPUT)
    return remaining


def _overrides(argv: list[str]) -> list[tuple[str, str | None]]:
    """Key and value of each override of the config; None where no value is given."""
    found = []
    for argument, following in itertools.pairwise([*argv[1:], "--"]):
        if match := re.fullmatch(r"--?(no)?config\.([^=]*)(?:=(.*))?", argument, re.DOTALL):
            negated, key, value = match.groups()
            if value is None and not negated and not re.match(r"--?([a-zA-Z]|$)", following):
                value = following
            found.append((key, value))
    return found


def _check_keys(overrides: list[tuple[str, str | None]]) -> None:
    """Refuses keys that are not there, with the nearest one, groups of keys and missing values."""
    for key, value in overrides:
        if group := [f"config.{known}" for known in SETTINGS if known.startswith(f"{key}.")]:
            raise InputError(f"config.{key} is a group of keys; set {', '.join(group)} one by one")
        if key not in SETTINGS:
            hint = suggestion(key, SETTINGS, "config.{}") or f"; keys are {', '.join(SETTINGS)}"
            raise InputError(f"config.{key} is not a key of this config{hint}")
        kind = SETTINGS[key].type
        if value is None and kind is not bool:
            raise InputError(
                f"config.{key} has no value; give {TYPE_NAMES[kind]} as --config.{key}=VALUE"
            )


def _flag_message(
    argv: list[str], overrides: list[tuple[str, str | None]], error: Exception
) -> str:
    """The error in one line."""
    text = str(error.args[0] if error.args else error).strip() or repr(error)
    last_line = text.splitlines()[-1]
    if isinstance(error, SyntaxError) or text.startswith("Error whilst parsing"):
        # A report of an error in the config file, whose last line is the error itself.
        files = [argument for argument in argv if argument.lstrip("-").startswith("config=")]
        return f"{' '.join(files)}: {last_line}"
    for key, value in overrides:
        # Of a tuple there is a list of the values given.
        if text.startswith((f"flag --config.{key}={value}:", f"flag --config.{key}={[value]}:")):
            return f"config.{key}={shown(value)} must be {TYPE_NAMES[SETTINGS[key].type]}"
    if overrides and isinstance(error, (MemoryError, RecursionError)):
        # Python's parser gives up on brackets and signs that are nested thousands deep.
        key, value = max(overrides, key=lambda override: len(override[1] or ""))
        return f"config.{key}={shown(value)} is nested too deeply"
    return text
