"""What a run shows: a progress bar on a terminal or lines in a pipe, and a table at the end."""

import sys

from tqdm import tqdm

from gc_nc.devices import is_main_process

_ROWS = (
    ("accuracy", "accuracy", "{:.4f}"),
    ("loss", "loss", "{:.4g}"),
    ("geometric complexity", "geometric_complexity", "{:.4g}"),
    ("  its standard error", "geometric_complexity_sem", "{:.2g}"),
    ("geometric collapse", "geometric_collapse", "{:.4g}"),
    ("neural collapse", "neural_collapse", "{:.4g}"),
)


class Progress:
    """Counts steps and reports evaluations."""

    def __init__(self, step: int, num_steps: int):
        """Starts after `step` steps. Only the main process shows anything."""
        self._num_steps = num_steps
        self._shows = is_main_process()
        # tqdm shows steps/s and the time left; in a pipe its carriage returns would be clutter.
        self._bar = (
            tqdm(total=num_steps, initial=step, unit="step", dynamic_ncols=True)
            if self._shows and sys.stderr.isatty()
            else None
        )

    def advance(self) -> None:
        """Notes that one step was dispatched."""
        if self._bar is not None:
            self._bar.update()

    def say(self, line: str) -> None:
        """Prints a line, above the bar if there is one."""
        if not self._shows:
            return
        tqdm.write(line)
        sys.stdout.flush()

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """Prints an evaluation as one line."""
        width = len(str(self._num_steps))
        self.say(
            f"step {step:>{width}}/{self._num_steps}"
            f"  accuracy {values['train/accuracy']:.4f} train {values['test/accuracy']:.4f} test"
            f"  GC {values['train/geometric_complexity']:.4g}"
            f" +- {values['train/geometric_complexity_sem']:.2g}"
            f"  geometric collapse {values['train/geometric_collapse']:.4g}"
            f"  NC {values['train/neural_collapse']:.4g}"
        )

    def close(self) -> None:
        """Ends the bar, which stays on the screen."""
        if self._bar is not None:
            self._bar.close()


def results_table(results: dict) -> str:
    """The last evaluation of a finished run, one metric on each line."""
    reason = {
        "num_steps": "all steps done",
        "train_loss": "training loss was as low as asked",
        "terminal_phase": "training accuracy stayed at 1.0 as long as asked",
    }[results["stopped_by"]]
    lines = [
        f"finished at step {results['step']} ({reason})",
        f"{'':22}{'train':>12}{'test':>12}",
    ]
    for label, name, form in _ROWS:
        cells = (form.format(results["metrics"][f"{split}/{name}"]) for split in ("train", "test"))
        lines.append(f"{label:22}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)
