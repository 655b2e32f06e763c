"""The states of a sweep's members, their progress as a bar or lines, and a table at the end."""

import datetime
import enum
import sys
import time
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from tqdm import tqdm

_START = "=== started "


class State(enum.Enum):
    """The state of a member; the value is the word that is printed."""

    DONE = "done"
    FAILED = "failed"
    STOPPED = "stopped"
    RUNNING = "running"
    ELSEWHERE = "running elsewhere"
    PENDING = "pending"


class Outcome(NamedTuple):
    """A member's state, and a line that says why."""

    state: State
    detail: str = ""


def outcome_table(outcomes: Mapping[str, Outcome]) -> str:
    """A table with one row for each member, and the number of members in each state."""
    name_width = max(map(len, outcomes))
    state_width = max(len(outcome.state.value) for outcome in outcomes.values())
    rows = [
        f"{name:{name_width}}  {state.value:{state_width}}  {detail}".rstrip()
        for name, (state, detail) in outcomes.items()
    ]
    counts = Counter(outcome.state for outcome in outcomes.values())
    total = ", ".join(f"{counts[state]} {state.value}" for state in State if counts[state])
    return "\n".join([*rows, f"{len(outcomes)} members: {total}"])


def start_line(where: str) -> str:
    """The line that begins each start of a member in its log."""
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    return f"{_START}{now} {where}\n"


def last_start(log: str) -> str:
    """The part of a log that the last start wrote, including its first line."""
    at = log.rfind(_START)
    return log[at:] if at >= 0 else ""


def error_in(text: str) -> str:
    """The last error in a command's output: an `error: ` line or an exception; "" if none."""
    lines = text.splitlines()
    for i in reversed(range(len(lines))):
        if lines[i].startswith("error: "):
            return lines[i].removeprefix("error: ")
        if lines[i].startswith("Traceback (most recent call last)"):
            # Indented lines are frames; notes may follow the exception.
            rest = [line for line in lines[i + 1 :] if line and not line[0].isspace()]
            return rest[0] if rest else ""
    return ""


class SweepProgress:
    """Counts finished members with a bar on a terminal, or with a line for each in a pipe."""

    def __init__(self, total: int, done: int):
        """`total` members, of which `done` were done before."""
        self._total, self._before = total, done
        self._finished = done
        self._started = time.monotonic()
        # smoothing=0: the mean over all, because members that run in parallel end in bursts.
        self._bar = (
            tqdm(total=total, initial=done, unit="run", smoothing=0, dynamic_ncols=True)
            if sys.stderr.isatty()
            else None
        )
        if done:
            self.say(f"{done} of {total} were done before")

    def say(self, line: str) -> None:
        """Prints a line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.clear()
        print(line, flush=True)
        if self._bar is not None:
            self._bar.refresh()

    def finished(self, name: str, outcome: Outcome) -> None:
        """Reports that a member ended."""
        self._finished += 1
        line = f"{outcome.state.value}: {name}"
        if outcome.detail:
            line += f" ({outcome.detail})"
        if self._bar is not None:
            self._bar.update()
            if outcome.state is not State.DONE:
                self.say(line)
            return
        left = self._total - self._finished
        pace = (time.monotonic() - self._started) / (self._finished - self._before)
        time_left = f", about {tqdm.format_interval(left * pace)} left" if left else ""
        self.say(f"{self._finished}/{self._total} {line}{time_left}")

    def close(self) -> None:
        """Ends the bar, which stays on the screen."""
        if self._bar is not None:
            self._bar.close()
