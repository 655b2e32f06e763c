"""Figures that the paper does not have: flatness against GC and NC, and GC by layer."""

from gc_nc.measurement.checkpoint_measurements import measure_flatness, measure_layers
from gc_nc.rank_statistics import ALPHA
from gc_nc.reproduction.bound_figures import grouped
from gc_nc.reproduction.claims import FAILS, HOLDS, UNDECIDED, Finding, counted_finding
from gc_nc.reproduction.figure_result import (
    CLAIMED,
    Context,
    FigureResult,
    correlate,
    require_runs,
    settings_table,
)
from gc_nc.reproduction.panels import Column, Scatter, draw_rows, draw_scatters
from gc_nc.reproduction.run_table import Run

_FLATNESS = (
    ("train/hessian_trace", "Hessian trace"),
    ("train/hessian_top_eigenvalue", "top Hessian eigenvalue"),
    ("train/sam_sharpness", "SAM sharpness"),
)
_GC, _NC = "train/geometric_complexity", "train/neural_collapse"
_FLATNESS_EXAMPLES = 32
_MOST_STEPS, _LAYER_EXAMPLES, _LAYER_PROBES = 4, 64, 2


def flatness_figure(context: Context) -> FigureResult:
    """Flatness of the loss against GC, and GC against NC, at the end of each run."""
    require_runs(context)
    num_examples = 8 if context.scale == "smoke" else _FLATNESS_EXAMPLES
    values = {}
    for run in context.sweep.runs:
        context.report(f"flatness of {run.workdir.name}")
        flat = measure_flatness(run.workdir, context.open_run, flatness_examples=num_examples)
        values[run.workdir] = {**flat, _GC: run.final[_GC], _NC: run.final[_NC]}
    panels = [
        Scatter(name, metric, title, metric_title)
        for metric, metric_title in ((_GC, "Train GC"), (_NC, "Train NC"))
        for name, title in _FLATNESS
    ]
    draw_scatters(grouped(context, values), panels, context.image)
    findings = [
        correlate(
            f"A flatter loss ({title}) goes with lower {name}",
            1,
            context.sweep.runs,
            lambda run, flatness=flatness: values[run.workdir][flatness],
            lambda run, metric=metric: values[run.workdir][metric],
            permute="settings",
        )
        for metric, name in ((_GC, "GC"), (_NC, "NC"))
        for flatness, title in _FLATNESS
    ]
    table = settings_table(
        context.sweep.rows,
        (*_FLATNESS, (_GC, "train GC"), (_NC, "train NC")),
        lambda run, metric: values[run.workdir][metric],
    )
    caption = (
        "Flatness of the mean cross-entropy in the parameters (stochastic Hessian trace, Lanczos"
        " estimate of its top eigenvalue, rise of the loss at distance 0.05 along the gradient)"
        " against GC and NC of the training images, at the end of each run."
    )
    notes = [
        f"Flatness on {num_examples} random training images; other numbers of images give other"
        " values. At training accuracy 1 the loss and its curvature are near 0, so they also say"
        " how long a run has been trained.",
    ]
    return FigureResult(caption, findings, *table, notes)


def layers_figure(context: Context) -> FigureResult:
    """GC from the input to each layer during training, for the first setting of the sweep."""
    require_runs(context)
    rows = context.sweep.rows[:1]
    measured = {}
    smoke = context.scale == "smoke"
    for run in (run for row in rows for runs in row.runs.values() for run in runs):
        context.report(f"layers of {run.workdir.name}")
        measured[run.workdir] = measure_layers(
            run.workdir,
            context.open_run,
            most_steps=_MOST_STEPS,
            num_examples=8 if smoke else _LAYER_EXAMPLES,
            num_probes=1 if smoke else _LAYER_PROBES,
        )
    layers = list(next(iter(next(iter(measured.values())).values())))

    def curves(run: Run):
        return [(run.epochs(step), values) for step, values in measured[run.workdir].items()]

    columns = [Column(layer, layer) for layer in layers]
    draw_rows(rows, columns, curves, context.image)

    def last(run: Run, layer: str) -> float:
        return list(measured[run.workdir].values())[-1][layer]

    findings = [
        _all_layers(
            row.key,
            [
                correlate(
                    layer,
                    CLAIMED[row.key][1],
                    [run for runs in row.runs.values() for run in runs],
                    lambda run, key=row.key: run.config[key],
                    lambda run, layer=layer: last(run, layer),
                    permute="runs",
                )
                for layer in layers
            ],
        )
        for row in rows
    ]
    table = settings_table(rows, [(layer, layer) for layer in layers], last)
    caption = (
        "GC of x to the output of each layer (its K is height x width x channels) against the"
        " epoch, from the first stage to the embedding. Lines and bands as in figure 1."
    )
    notes = [
        f"{8 if smoke else _LAYER_EXAMPLES} training images,"
        f" {1 if smoke else _LAYER_PROBES} products each, at up to {_MOST_STEPS} checkpoints.",
        "Layers differ in K, so compare a layer with itself.",
    ]
    return FigureResult(caption, findings, *table, notes)


def _all_layers(key: str, by_layer: list[Finding]) -> Finding:
    evidence = "; ".join(
        f"{f.claim} {f.verdict} (rho {f.numbers.get('rho', float('nan')):.2f})" for f in by_layer
    )
    finding = counted_finding(
        f"{CLAIMED[key][0]} lowers GC of every layer",
        sum(f.verdict == HOLDS for f in by_layer),
        len(by_layer),
        evidence,
    )
    # A layer with the opposite effect refutes it, at a p-value corrected for the number of layers.
    opposite = any(
        f.verdict == FAILS and f.numbers["p_value"] < ALPHA / len(by_layer) for f in by_layer
    )
    verdict = HOLDS if finding.verdict == HOLDS else FAILS if opposite else UNDECIDED
    return finding._replace(verdict=verdict, numbers={f.claim: f.numbers for f in by_layer})
