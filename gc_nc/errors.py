"""The error a user caused and a user can mend, and the name that was probably meant."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input: one line that names the value, what is allowed and how to fix it.

    Launchers print it without a traceback and exit with code 2. Anything else that is raised is a
    fault of the program and keeps its traceback.
    """


def suggestion(name: str, known: Iterable[str], form: str = "{!r}") -> str:
    """The end of a message, "; did you mean NAME?", or "" where no known name is similar.

    Args:
      name: that is not known.
      known: names.
      form: how the suggested name is shown.
    """
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f"; did you mean {form.format(near[0])}?" if near else ""
