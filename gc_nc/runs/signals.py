"""Signals that ask a run to save its state and stop."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

#: Ctrl-C, the signal that `kill` and job schedulers send, and those that schedulers can be told to
#: send before a time limit or a preemption (sbatch --signal, submitit).
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Interrupted(Exception):  # noqa: N818 - an event, not an error
    """A signal stopped the run; its state is saved."""

    def __init__(self, signal_number: int, step: int):
        """`signal_number` is the signal received and `step` the step that was saved."""
        super().__init__(f"stopped at step {step}; the same command resumes from there")
        self.signal_number = signal_number


@contextlib.contextmanager
def noting_signals(say: Callable[[str], None]) -> Iterator[list[int]]:
    """Yields a list to which the first signal is appended; a second signal acts as usual.

    Only the main thread can handle signals; in other threads the list stays empty.

    Args:
      say: prints a line.
    """
    received: list[int] = []
    previous: dict[int, Any] = {}

    def note(signal_number, frame):
        del frame
        received.append(signal_number)
        say("saving and stopping after this step or evaluation; signal again to stop at once")
        restore()

    def restore():
        for number, handler in previous.items():
            signal.signal(number, handler)

    try:
        for number in STOP_SIGNALS:
            with contextlib.suppress(ValueError):
                previous[number] = signal.signal(number, note)
        yield received
    finally:
        restore()
