"""The figure of transfer: source GC, target NC and few-shot accuracy, for each setting."""

from gc_nc.measurement import transfer_evaluation, transfer_results
from gc_nc.measurement.checkpoint_measurements import chosen_steps
from gc_nc.measurement.transfer_evaluation import Protocol
from gc_nc.reproduction.claims import Finding
from gc_nc.reproduction.figure_result import (
    Context,
    FigureResult,
    correlate,
    require_runs,
    setting_claims,
    settings_table,
)
from gc_nc.reproduction.panels import Column, draw_rows
from gc_nc.reproduction.run_table import Run

_NUM_SHOTS, _MOST_WAYS = 5, 5
_GC, _NC, _ACCURACY = "source_gc", "target_nc", "accuracy"


def transfer_figure(context: Context) -> FigureResult:
    """Source GC, target NC and 5-shot accuracy on unseen classes, with a row for each setting."""
    require_runs(context)
    sweep = context.sweep
    measured = {run.workdir: _transfer(context, run) for run in sweep.runs}

    def curves(run: Run):
        return [(run.epochs(step), values) for step, values in measured[run.workdir].items()]

    def last(run: Run, metric: str) -> float:
        return list(measured[run.workdir].values())[-1][metric]

    ways = next(iter(next(iter(measured.values())).values()))["num_ways"]
    columns = (
        Column(_GC, "Source GC"),
        Column(_NC, "Target NC"),
        Column(_ACCURACY, f"{ways}-way {_NUM_SHOTS}-shot accuracy", logarithmic=False),
    )
    draw_rows(sweep.rows, columns, curves, context.image)
    findings: list[Finding] = [
        finding
        for row in sweep.rows
        for finding in setting_claims(
            row,
            (
                (_GC, "source GC", 1),
                (_NC, "target NC", 1),
                (_ACCURACY, "few-shot accuracy", -1),
            ),
            last,
        )
    ]
    for x, y, sign, claim in (
        (_GC, _NC, 1, "Lower source GC goes with lower target NC"),
        (_GC, _ACCURACY, -1, "Lower source GC goes with higher few-shot accuracy"),
        (_NC, _ACCURACY, -1, "Lower target NC goes with higher few-shot accuracy"),
        ("source_nc", _ACCURACY, -1, "Lower source NC goes with higher few-shot accuracy"),
    ):
        findings.append(
            correlate(
                f"{claim}, over all settings" if len(sweep.rows) > 1 else claim,
                sign,
                sweep.runs,
                lambda run, x=x: last(run, x),
                lambda run, y=y: last(run, y),
                permute="settings",
            )
        )
    table = settings_table(
        sweep.rows,
        (
            (_GC, "source GC"),
            ("source_nc", "source NC"),
            ("source_accuracy", "source accuracy"),
            (_NC, "target NC"),
            (_ACCURACY, f"{ways}-way {_NUM_SHOTS}-shot accuracy"),
            ("half_width", "its half-width"),
        ),
        last,
    )
    protocol = _protocol(context)
    held = sweep.runs[0].metadata["data"]["held_class_names"]["target"]
    caption = (
        "GC of the source training images, NC of the target classes, and accuracy of the nearest"
        f" class mean in {protocol.num_episodes:,} {ways}-way {_NUM_SHOTS}-shot episodes of the"
        " target classes, which were never trained on, against the epoch of source training, at"
        f" {max(len(steps) for steps in measured.values())} checkpoints of each run. Lines"
        " and bands as in figure 1."
    )
    shown = ", ".join(held[:10]) + (f" and {len(held) - 10} more" if len(held) > 10 else "")
    return FigureResult(caption, findings, *table, [f"Target classes: {shown}."])


def _protocol(context: Context) -> Protocol:
    # The number that rows have, so that their results are reused.
    return Protocol(num_episodes=20 if context.scale == "smoke" else 2000)


def _transfer(context: Context, run: Run) -> dict[int, dict[str, float]]:
    """{step: values} at some checkpoints, which are kept in transfer.json."""
    protocol, smoke = _protocol(context), context.scale == "smoke"
    ways = min(_MOST_WAYS, len(run.metadata["data"]["held_class_names"]["target"]))
    wanted = {**protocol.facts(), "num_ways": ways, "num_shots": _NUM_SHOTS}
    gc = {"gc_examples": 16 if smoke else 256, "gc_probes": 1 if smoke else 2}
    gc["gc_examples"] = min(gc["gc_examples"], run.metadata["data"]["num_train"])
    steps = chosen_steps(run.workdir, 5 if context.scale == "paper" else 2)
    values: dict[int, dict[str, float]] = {}
    opened = tasks = None
    for step in steps:
        stored = _stored(run, step, wanted, gc)
        if stored is None:
            context.report(f"transfer of {run.workdir.name} at step {step}")
            if opened is None:
                opened = context.open_run(run.workdir)
                tasks = transfer_evaluation.sample_tasks(opened, protocol, [(ways, _NUM_SHOTS)])
            source, results = transfer_evaluation.evaluate_checkpoint(
                opened,
                step,
                protocol,
                tasks,
                **gc,
            )
            transfer_results.add_results(run.workdir, step, source, results)
            stored = source, results[0]
        source, result = stored
        values[step] = {
            _GC: source["geometric_complexity"],
            "source_nc": source["neural_collapse"],
            "source_accuracy": source["accuracy"],
            _NC: result["target_neural_collapse"],
            _ACCURACY: result["accuracy"],
            "half_width": result["accuracy_half_width"],
            "num_ways": ways,
        }
    return values


def _stored(run: Run, step: int, wanted: dict, gc: dict[str, int]):
    """Source metrics and result, if they were measured as wanted, with GC at least as precise."""
    stored = transfer_results.read_results(run.workdir)
    source = stored["source"].get(str(step), {})
    if any(source.get(name, 0) < least for name, least in gc.items()):
        return None
    for result in stored["results"]:
        if all(result.get(key) == value for key, value in {**wanted, "step": step}.items()):
            return source, result
    return None
