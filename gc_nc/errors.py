"""The error a user caused and a user can mend."""


class InputError(ValueError):
    """Bad input: one line that names the value, what is allowed and how to fix it.

    Launchers print it without a traceback and exit with code 2. Anything else that is raised is a
    fault of the program and keeps its traceback.
    """
