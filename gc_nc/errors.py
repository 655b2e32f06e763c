"""Errors that a user can fix: bad input, a misspelt name, a package that is not installed."""

import difflib
import importlib.util
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input; the message is one line with the value, what is allowed and how to fix it.

    Launchers print it without a traceback and exit with code 2. Any other exception is a bug of the
    program and keeps its traceback.
    """


def suggestion(name: str, known: Iterable[str], form: str = "{!r}") -> str:
    """The end of a message, "; did you mean NAME?", or "" if no known name is similar.

    Args:
      name: the unknown name.
      known: the known names.
      form: how the suggested name is shown.
    """
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f"; did you mean {form.format(near[0])}?" if near else ""


def require_extra(extra: str, *modules: str) -> None:
    """Checks that the packages of an extra of setup.cfg are installed, without importing them.

    Raises:
      ModuleNotFoundError: a package is missing; the message says how to install it.
    """
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise ModuleNotFoundError(
            f"{' and '.join(missing)} not installed; install with: pip install 'gc_nc[{extra}]'",
            name=missing[0],
        )
