"""What all launchers share: flags, and one line instead of a traceback for a user's mistake."""

import contextlib
import difflib
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict

from gc_nc.compilation import default_cache_dir, use_persistent_cache
from gc_nc.errors import InputError

#: Bad input: nothing was done, nothing overwritten.
EXIT_BAD_INPUT = 2
#: Ctrl-C, as shells have it.
EXIT_INTERRUPTED = 128 + signal.SIGINT

_CACHE_DIR = flags.DEFINE_string(
    "compilation_cache_dir",
    None,
    "Where compiled programs are kept for the next start; empty keeps none. Default:"
    " JAX_COMPILATION_CACHE_DIR, or gc_nc/xla in the user's cache folder.",
)

_EXAMPLE_CONFIG = "--config=experiments/configs/digits.py"


def run(main: Callable[[list[str]], int | None]) -> None:
    """Parses the flags, calls main and exits; InputError is one line on stderr and exit code 2."""

    def guarded_main(argv):
        try:
            if len(argv) > 1:
                raise InputError(f"unexpected argument {argv[1]!r}; flags are --name=value")
            use_compilation_cache(_CACHE_DIR.value)
            return main(argv)
        except InputError as error:
            fail(str(error), EXIT_BAD_INPUT)
        except KeyboardInterrupt:
            fail("interrupted", EXIT_INTERRUPTED)

    app.run(guarded_main, flags_parser=_parse_flags)


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
      InputError: the flag is missing, or its file cannot be read.
    """
    if flag.value is None:
        raise InputError(f"--{flag.name} is missing; try {_EXAMPLE_CONFIG}")
    try:
        # For a file that cannot be read the flag holds an object that raises when it is used.
        flag.value.items()
    except OSError as error:
        raise InputError(f"--{flag.name}: {error}") from error
    return flag.value


def fail(message: str, exit_code: int) -> None:
    """Prints one line and exits."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(exit_code)


def _parse_flags(argv: list[str]) -> list[str]:
    # Libraries report every file they touch at INFO.
    logging.set_verbosity(logging.WARNING)
    try:
        return flags.FLAGS(argv)
    except Exception as error:
        # A config file is code and may raise anything; absl and ml_collections raise half a dozen
        # types for a wrong override of it.
        fail(_flag_message(argv, error), EXIT_BAD_INPUT)
        raise


def _flag_message(argv: list[str], error: Exception) -> str:
    """The error in one line, with the nearest key if an override names one that is not there."""
    overrides = [re.match(r"--?(?:no)?config\.([^=]+)", argument) for argument in argv]
    keys = _config_keys()
    for match in filter(None, overrides):
        key = match.group(1)
        if keys and key not in keys:
            near = difflib.get_close_matches(key, keys, n=1, cutoff=0.4)
            hint = f"; did you mean config.{near[0]}?" if near else f"; keys are {', '.join(keys)}"
            return f"config.{key} is not a key of this config{hint}"
    lines = str(error.args[0] if error.args else error).strip().splitlines() or [repr(error)]
    if isinstance(error, SyntaxError) or lines[0].startswith("Error whilst parsing"):
        # A report of an error in the config file, whose last line is the error itself.
        files = [argument for argument in argv if argument.lstrip("-").startswith("config=")]
        return f"{' '.join(files)}: {lines[-1]}"
    return " ".join(lines)


def _config_keys() -> list[str]:
    from gc_nc.training.configuration import default_config, flatten

    return list(flatten(default_config()))
