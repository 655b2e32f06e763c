"""Every metric of a trained network over a whole split, including those not logged in training."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gc_nc import metrics
from gc_nc.compilation import jit_for_device
from gc_nc.data.datasets import ImageSplit
from gc_nc.data.device_batches import normalize
from gc_nc.models import embed_fn
from gc_nc.random_streams import stream_key
from gc_nc.runs.finished_run import FinishedRun
from gc_nc.training.evaluation import (
    EvaluationSums,
    device_batches,
    embedding_scale,
    evaluation_sums,
    forward_batch,
    gc_subset,
    images_of,
    on_device,
)
from gc_nc.training.step import cross_entropy

SPLITS = ("train", "test")

_TRACE_PROBES, _LANCZOS_ITERATIONS = 16, 16


class SplitMeasurement(NamedTuple):
    """What was measured on a split.

    Attributes:
      values: the value of every metric, by name; see `measure_run`.
      statistics: the class statistics, with scatter.
      class_gc: (C,) geometric complexity of each class; NaN if no example of it was drawn.
      note: what a reader must know about the values, or "".
    """

    values: dict[str, float]
    statistics: metrics.ClassStatistics
    class_gc: jax.Array
    note: str


class MeasurementPlan(NamedTuple):
    """How many examples and probes are used for the metrics that need derivatives.

    Attributes:
      gc_examples: size of the random subset for GC, at least 2; all examples if there are fewer.
      gc_probes: number of Jacobian products for each example of the subset.
      flatness_examples: number of examples for flatness, all in memory at once; all examples if
        there are fewer, and no flatness if 0. Each of 33 products with the Hessian costs several
        training steps on this many examples.
    """

    gc_examples: int
    gc_probes: int
    flatness_examples: int

    def check(self) -> None:
        """Raises ValueError if a number is too small."""
        least = MeasurementPlan(2, 1, 0)
        for name, value, smallest in zip(self._fields, self, least, strict=True):
            if value < smallest:
                raise ValueError(f"{name}={value} must be at least {smallest}")


def measure_run(
    run: FinishedRun,
    steps: Sequence[int],
    splits: Sequence[str],
    *,
    gc_examples: int,
    gc_probes: int,
    flatness_examples: int,
    report: Callable[[str], None] = lambda part: None,
) -> Iterator[tuple[int, dict[str, SplitMeasurement]]]:
    """Measures checkpoints one after the other; repeating it gives the same numbers.

    Measured over all examples of a split: accuracy, loss (mean cross-entropy), neural_collapse,
    nc1, nc2_equinorm, nc2_equiangle, nc2_maximal_angle, nc2_etf_error, nc3, nc4 (to the class means
    of the same split), squared_embedding_norm, squared_class_distance, nearest_mean_error_bound (of
    neural_collapse, with exact means) and num_classes_present; if training images are measured,
    also nearest_mean_error, the share of examples whose nearest training class mean is wrong.

    Measured on a random subset: geometric_complexity and its _sem (output probes),
    geometric_collapse and relative_geometric_complexity with that GC, and poincare_constant, the
    smallest one with which the NC bound holds on this split (so a lower estimate). If a class has
    no example in the subset, its GC is unknown, poincare_constant is NaN, and `note` names it.
    neural_collapse_bound_per_class and neural_collapse_bound_paper use the other split's Poincare
    constant if both are measured, because with its own the bound would hold by construction;
    bound_poincare_constant is the one used.

    Measured on `flatness_examples` of the same random order, for the mean cross-entropy without L2
    term and with running statistics: squared_gradient_norm, sam_sharpness, hessian_trace and its
    _sem (over probes only), hessian_top_eigenvalue (a lower estimate). All depend on the examples
    drawn, so compare them only between runs with the same seed and `flatness_examples`.

    Values are inf or NaN where the metrics define them so, for example if class means are equal.

    Args:
      run: a run opened by `open_run`.
      steps: steps that have a checkpoint.
      splits: a selection of SPLITS.
      gc_examples: as in `MeasurementPlan`.
      gc_probes: as in `MeasurementPlan`.
      flatness_examples: as in `MeasurementPlan`.
      report: called `num_reports` times with what was just done, for a progress bar.

    Yields:
      (step, measurements by split).

    Raises:
      ValueError: a number of `MeasurementPlan` is too small, or there are fewer than two classes.
    """
    plan = MeasurementPlan(gc_examples, gc_probes, flatness_examples)
    plan.check()
    placed = {name: on_device(getattr(run.dataset, name)) for name in splits}
    key = stream_key(run.config.seed, "full measurement")
    for step in steps:
        network = _Network(run, run.variables(step))
        statistics, measured = {}, {}
        for name, split in placed.items():
            where = partial(_report_at, report, f"step {step} {name}")
            statistics[name] = network.sums(split, lambda w=where: w("class statistics"))
        for name, split in placed.items():
            split_key = jax.random.fold_in(jax.random.fold_in(key, step), SPLITS.index(name))
            where = partial(_report_at, report, f"step {step} {name}")
            measured[name] = _measure_split(
                network, split, statistics[name], statistics.get("train"), plan, split_key, where
            )
        for name, measurement in measured.items():
            others = [other for other in measured if other != name] or [name]
            constant = measured[others[0]].values["poincare_constant"]
            measurement.values.update(_bounds(measurement, constant))
        yield step, measured


def _report_at(report, where: str, part: str) -> None:
    report(f"{where}: {part}")


def num_reports(
    run: FinishedRun, steps: Sequence[int], splits: Sequence[str], flatness_examples: int
) -> int:
    """The number of times that `measure_run` calls `report`."""
    parts = 0
    for name in splits:
        num_examples = len(getattr(run.dataset, name).labels)
        batch_size = min(run.config.evaluation.batch_size, num_examples)
        parts += 2 * -(-num_examples // batch_size) + 1 + len(_FLATNESS) * (flatness_examples > 0)
    return len(steps) * parts


class _Network(NamedTuple):
    """The network of a run at one of its checkpoints."""

    run: FinishedRun
    variables: dict

    def _static(self, split: ImageSplit) -> dict[str, Any]:
        size = min(self.run.config.evaluation.batch_size, split.labels.shape[0])
        return {"normalization": self.run.normalization, "batch_size": size}

    def sums(self, split: ImageSplit, report: Callable[[], None]) -> EvaluationSums:
        """Class statistics with scatter, loss and accuracy of a split."""
        return evaluation_sums(
            self.run.model,
            self.variables,
            split,
            num_classes=self.run.dataset.num_classes,
            scatter=True,
            report=report,
            **self._static(split),
        )

    def disagreements(self, split: ImageSplit, own, train, report) -> tuple[float, float]:
        """Two shares of examples: those whose nearest mean of `own` disagrees with the network, and
        those whose nearest mean of `train` (or None) disagrees with their label.
        """
        static = {"model": self.run.model, **self._static(split)}
        counts = []
        for batch, start in device_batches(split, static["batch_size"]):
            counts.append(_disagreements(own, train, self.variables, batch, start, **static))
            report("NC4")
        # Fetched once, so that the device does not wait for the host between batches.
        shares = np.sum(jax.device_get(counts), axis=0) / split.labels.shape[0]
        return float(shares[0]), float(shares[1])

    def inputs(self, split: ImageSplit, subset: np.ndarray) -> jax.Array:
        """Some examples of a split in model-input units."""
        return normalize(images_of(split, subset), self.run.normalization)


def _measure_split(
    network: _Network,
    split: ImageSplit,
    sums: EvaluationSums,
    train_sums: EvaluationSums | None,
    plan: MeasurementPlan,
    key: jax.Array,
    report: Callable[[str], None],
) -> SplitMeasurement:
    seed, variables = network.run.config.seed, network.variables
    num_examples, statistics = split.labels.shape[0], sums.statistics
    num_present = int(statistics.num_present)
    gc_key, *flatness_keys = jax.random.split(key, 1 + len(_FLATNESS))
    train = None if train_sums is None else train_sums.statistics
    nc4, nearest_mean_error = network.disagreements(split, statistics, train, report)

    subset = gc_subset(seed, num_examples, plan.gc_examples)
    norms = metrics.estimate_squared_jacobian_norms(
        embed_fn(network.run.model, variables),
        network.inputs(split, subset),
        gc_key,
        num_probes=plan.gc_probes,
    )
    gc = jnp.mean(norms)
    class_gc = metrics.class_geometric_complexity(
        norms, split.labels[subset], network.run.dataset.num_classes
    )
    report("geometric complexity")

    flatness = {}
    if plan.flatness_examples:
        # A prefix of the same random order, so the smaller subset is part of the larger one.
        flat_subset = gc_subset(seed, num_examples, plan.flatness_examples)
        loss_fn = _mean_loss(
            network.run.model,
            variables,
            network.inputs(split, flat_subset),
            jnp.asarray(split.labels[flat_subset]),
        )
        for (name, measure), flatness_key in zip(_FLATNESS.items(), flatness_keys, strict=True):
            flatness |= jax.device_get(measure(loss_fn, variables["params"], flatness_key))
            report(name)
        flatness["flatness_examples"] = len(flat_subset)

    head_kernel = variables["params"]["head"]["kernel"]
    collapse = jax.device_get(_collapse(statistics, gc, head_kernel))
    values = {
        # Divided in Python, so that accuracy is exactly 1.0 if every example is right.
        "accuracy": int(sums.num_correct) / num_examples,
        "loss": sums.loss / num_examples,
        "geometric_complexity": gc,
        "geometric_complexity_sem": jnp.std(norms, ddof=1) / math.sqrt(len(subset)),
        **collapse,
        **jax.device_get(embedding_scale(statistics, gc)),
        "nc4": nc4,
        "nearest_mean_error_bound": metrics.nearest_mean_error_bound(
            collapse["neural_collapse"], num_present
        ),
        "num_classes_present": num_present,
        "poincare_constant": metrics.poincare_constant(class_gc, statistics),
        **flatness,
        "gc_examples": len(subset),
        "gc_probes": plan.gc_probes,
        **({} if train is None else {"nearest_mean_error": nearest_mean_error}),
    }
    return SplitMeasurement(
        {name: float(value) for name, value in values.items()},
        statistics,
        class_gc,
        _note(statistics, class_gc, network.run.dataset.class_names),
    )


def measurement_table(step: int, measured: dict[str, SplitMeasurement]) -> str:
    """A table with one metric on each line and one column for each split."""
    lines = [f"{f'step {step}':34}" + "".join(f"{split:>12}" for split in measured)]
    for name in next(iter(measured.values())).values:
        cells = (f"{measurement.values[name]:.4g}" for measurement in measured.values())
        lines.append(f"{name:34}" + "".join(f"{cell:>12}" for cell in cells))
    notes = [f"{split}: {m.note}" for split, m in measured.items() if m.note]
    return "\n".join(lines + notes)


@partial(jit_for_device, static_argnames=("model", "normalization", "batch_size"))
def _disagreements(own, train, variables, split, start, **static):
    """(2,), the counts of `_Network.disagreements`; NaN if an embedding is not finite."""
    logits, embeddings, labels, weights = forward_batch(variables, split, start, **static)

    def count(predictions, statistics):
        share = metrics.nc4(predictions, embeddings, statistics, weights=weights)
        return jnp.round(share * jnp.sum(weights))

    unknown = jnp.full((), jnp.nan, jnp.float32)
    return jnp.stack([count(logits, own), unknown if train is None else count(labels, train)])


@jax.jit
def _collapse(statistics, gc, head_kernel):
    # Compiled: outside jit, degenerate means would raise warnings on top of their inf.
    nc2 = metrics.nc2(statistics)
    return {
        "neural_collapse": metrics.neural_collapse(statistics),
        "geometric_collapse": metrics.geometric_collapse(gc, statistics),
        "nc1": metrics.nc1(statistics),
        **{f"nc2_{name}": value for name, value in nc2._asdict().items()},
        "nc3": metrics.nc3(statistics, head_kernel),
    }


def _bounds(measurement: SplitMeasurement, constant: float) -> dict[str, float]:
    bound = metrics.neural_collapse_bound(
        measurement.class_gc, measurement.statistics, poincare_constant=constant
    )
    return {
        "neural_collapse_bound_per_class": float(bound.per_class),
        "neural_collapse_bound_paper": float(bound.paper),
        "bound_poincare_constant": constant,
    }


def _mean_loss(model, variables, inputs, labels):
    """Of the parameters: the mean cross-entropy with running statistics."""

    def loss(params):
        logits, _ = model.apply({**variables, "params": params}, inputs, train=False)
        return jnp.mean(cross_entropy(logits, labels))

    return loss


def _gradient(loss_fn, params, key):
    del key
    return {
        "squared_gradient_norm": metrics.squared_gradient_norm(loss_fn, params),
        "sam_sharpness": metrics.sam_sharpness(loss_fn, params),
    }


def _trace(loss_fn, params, key):
    trace = metrics.hessian_trace(loss_fn, params, key, num_probes=_TRACE_PROBES)
    return {"hessian_trace": trace.mean, "hessian_trace_sem": trace.sem}


def _top_eigenvalue(loss_fn, params, key):
    top = metrics.hessian_top_eigenvalue(loss_fn, params, key, num_iterations=_LANCZOS_ITERATIONS)
    return {"hessian_top_eigenvalue": top}


_FLATNESS = {
    "gradient norm and sharpness": _gradient,
    "Hessian trace": _trace,
    "Hessian top eigenvalue": _top_eigenvalue,
}


def _note(statistics, class_gc, class_names) -> str:
    missing = np.flatnonzero(np.asarray(statistics.present) & np.isnan(class_gc))
    if not missing.size:
        return ""
    named = ", ".join(class_names[i] for i in missing[:5])
    more = f" and {missing.size - 5} more" if missing.size > 5 else ""
    return (
        f"geometric complexity of class {named}{more} is unknown (no example drawn, or not finite),"
        " so the Poincare constant and the bounds are NaN; a larger gc_examples may help"
    )
