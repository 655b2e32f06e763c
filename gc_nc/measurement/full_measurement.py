"""Every metric of a trained network over all of a split, beyond what training itself follows."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gc_nc import metrics
from gc_nc.compilation import jit_for_device
from gc_nc.data.datasets import ImageSplit
from gc_nc.data.device_batches import Normalization, normalize
from gc_nc.models import embed_fn
from gc_nc.random_streams import stream_key
from gc_nc.runs.finished_run import FinishedRun
from gc_nc.training.evaluation import (
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
      values: of every metric, by its name; see `measure_split`.
      statistics: of the classes, with scatter.
      class_gc: (C,) geometric complexity of each class; NaN where no example was drawn.
      note: what a reader must know of the values; "" if nothing.
    """

    values: dict[str, float]
    statistics: metrics.ClassStatistics
    class_gc: jax.Array
    note: str


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
    """Measures checkpoints one after the other; the same numbers every time.

    The Poincare constant of a bound is that of the other split if both are measured: on its own
    split the bound would hold by construction. `bound_poincare_constant` says which was used.

    Args:
      run: opened by `open_run`.
      steps: that have a checkpoint.
      splits: of SPLITS.
      gc_examples: as in `measure_split`.
      gc_probes: as there.
      flatness_examples: as there.
      report: as there; called `num_reports` times in all.

    Yields:
      (step, measurements by split), with neural_collapse_bound_per_class,
      neural_collapse_bound_paper and bound_poincare_constant among their values, and, if training
      images are measured, nearest_mean_error: the share of examples whose nearest training class
      mean is another class's.
    """
    seed = run.config.seed
    placed = {name: on_device(getattr(run.dataset, name)) for name in splits}
    key = stream_key(seed, "full measurement")
    for step in steps:
        variables = run.variables(step)
        measured = {
            name: measure_split(
                run.model,
                variables,
                split,
                run.normalization,
                num_classes=run.dataset.num_classes,
                batch_size=run.config.evaluation.batch_size,
                gc_examples=gc_examples,
                gc_probes=gc_probes,
                flatness_examples=flatness_examples,
                key=jax.random.fold_in(jax.random.fold_in(key, step), SPLITS.index(name)),
                class_names=run.dataset.class_names,
                subset_seed=seed,
                report=lambda part, where=f"step {step} {name}": report(f"{where}: {part}"),
            )
            for name, split in placed.items()
        }
        for name, measurement in measured.items():
            others = [other for other in measured if other != name] or [name]
            constant = measured[others[0]].values["poincare_constant"]
            measurement.values.update(_bounds(measurement, constant))
            if "train" in measured:
                measurement.values["nearest_mean_error"] = _nearest_mean_error(
                    measured["train"].statistics, variables, placed[name], run
                )
        yield step, measured


def num_reports(
    run: FinishedRun, steps: Sequence[int], splits: Sequence[str], flatness_examples: int
) -> int:
    """How often `measure_run` will call `report`."""
    parts = 0
    for name in splits:
        num_examples = len(getattr(run.dataset, name).labels)
        batch_size = min(run.config.evaluation.batch_size, num_examples)
        parts += 2 * -(-num_examples // batch_size) + 1 + len(_FLATNESS) * (flatness_examples > 0)
    return len(steps) * parts


def measure_split(
    model: nn.Module,
    variables: dict,
    split: ImageSplit,
    normalization: Normalization,
    *,
    num_classes: int,
    batch_size: int,
    gc_examples: int,
    gc_probes: int,
    flatness_examples: int,
    key: jax.Array,
    class_names: Sequence[str],
    subset_seed: int = 0,
    report: Callable[[str], None] = lambda part: None,
) -> SplitMeasurement:
    """The metrics of `gc_nc.metrics` on a split.

    Over all examples: accuracy, loss (mean cross-entropy), neural_collapse, nc1, nc2_equinorm,
    nc2_equiangle, nc2_maximal_angle, nc2_etf_error, nc3, nc4 (to the class means of this same
    split), squared_embedding_norm, squared_class_distance, nearest_mean_error_bound (of
    neural_collapse, exact means) and num_classes_present.

    On a random subset: geometric_complexity and its _sem (output probes), geometric_collapse and
    relative_geometric_complexity with that GC, and poincare_constant, a lower estimate that holds
    the NC bound on this split by construction. Where a class has no example in the subset its GC is
    unknown and poincare_constant is NaN; `note` names it.

    On `flatness_examples` of the same random order, for the mean cross-entropy without L2 term and
    with running statistics: squared_gradient_norm, sam_sharpness, hessian_trace and its _sem (over
    probes alone), hessian_top_eigenvalue (a lower estimate). All change with the examples drawn:
    compare them at the same `flatness_examples` and `subset_seed` only.

    Values are inf or NaN where the metrics say so: equal class means, say.

    Args:
      model: gives (logits, embedding).
      variables: parameters, with the head's at params/head, and running statistics.
      split: by `on_device`.
      normalization: of the pixels.
      num_classes: C.
      batch_size: examples at a time; the last batch is padded, and the padding has weight 0.
      gc_examples: size of the subset, at least 2; all examples if there are fewer.
      gc_probes: Jacobian products an example of the subset.
      flatness_examples: all at once in memory; all examples if there are fewer, none if 0. Each of
        33 products with the Hessian costs several times a training step on as many.
      key: of probes and start vectors.
      class_names: C names.
      subset_seed: of the subsets; the same at all checkpoints of a run, to compare them.
      report: called with what was just done, for a progress bar.

    Raises:
      ValueError: `gc_examples` below 2, `gc_probes` below 1, `flatness_examples` below 0 or fewer
        than two classes.
    """
    if flatness_examples < 0:
        raise ValueError(f"flatness_examples={flatness_examples} must be 0 or more")
    if gc_examples < 2:
        raise ValueError(f"gc_examples={gc_examples} must be at least 2")
    num_examples = split.labels.shape[0]
    batch_size = min(batch_size, num_examples)
    per_batch = {"model": model, "normalization": normalization, "batch_size": batch_size}
    gc_key, *flatness_keys = jax.random.split(key, 1 + len(_FLATNESS))

    head_kernel = variables["params"]["head"]["kernel"]
    sums = evaluation_sums(
        model,
        variables,
        split,
        normalization,
        num_classes=num_classes,
        batch_size=batch_size,
        scatter=True,
        report=lambda: report("class statistics"),
    )
    statistics = sums.statistics
    num_present = int(statistics.num_present)
    num_differing = 0.0
    for batch, start in device_batches(split, batch_size):
        num_differing += float(_nc4_batch(statistics, variables, batch, start, **per_batch))
        report("NC4")

    subset = gc_subset(subset_seed, num_examples, gc_examples)
    norms = metrics.estimate_squared_jacobian_norms(
        embed_fn(model, variables),
        normalize(images_of(split, subset), normalization),
        gc_key,
        num_probes=gc_probes,
    )
    gc = jnp.mean(norms)
    class_gc = metrics.class_geometric_complexity(norms, split.labels[subset], num_classes)
    report("geometric complexity")

    flatness = {}
    if flatness_examples:
        # A prefix of the same random order, so one lies within the other.
        flat_subset = gc_subset(subset_seed, num_examples, flatness_examples)
        loss_fn = jax.tree_util.Partial(
            _MeanLoss(model),
            {name: value for name, value in variables.items() if name != "params"},
            normalize(images_of(split, flat_subset), normalization),
            jnp.asarray(split.labels[flat_subset]),
        )
        for (name, measure), flatness_key in zip(_FLATNESS.items(), flatness_keys, strict=True):
            flatness |= jax.device_get(measure(loss_fn, variables["params"], flatness_key))
            report(name)
        flatness["flatness_examples"] = len(flat_subset)

    collapse = jax.device_get(_collapse(statistics, gc, head_kernel))
    values = {
        # In Python, so that accuracy is 1.0 exactly when every example is right.
        "accuracy": int(sums.num_correct) / num_examples,
        "loss": sums.loss / num_examples,
        "geometric_complexity": gc,
        "geometric_complexity_sem": jnp.std(norms, ddof=1) / np.sqrt(len(subset)),
        **collapse,
        **jax.device_get(embedding_scale(statistics, gc)),
        "nc4": num_differing / num_examples,
        "nearest_mean_error_bound": metrics.nearest_mean_error_bound(
            collapse["neural_collapse"], num_present
        ),
        "num_classes_present": num_present,
        "poincare_constant": metrics.poincare_constant(class_gc, statistics),
        **flatness,
        "gc_examples": len(subset),
        "gc_probes": gc_probes,
    }
    return SplitMeasurement(
        {name: float(value) for name, value in values.items()},
        statistics,
        class_gc,
        _note(statistics, class_gc, class_names),
    )


def measurement_table(step: int, measured: dict[str, SplitMeasurement]) -> str:
    """A metric a line, a split a column."""
    lines = [f"{f'step {step}':34}" + "".join(f"{split:>12}" for split in measured)]
    for name in next(iter(measured.values())).values:
        cells = (f"{measurement.values[name]:.4g}" for measurement in measured.values())
        lines.append(f"{name:34}" + "".join(f"{cell:>12}" for cell in cells))
    notes = [f"{split}: {m.note}" for split, m in measured.items() if m.note]
    return "\n".join(lines + notes)


@partial(jit_for_device, static_argnames=("model", "normalization", "batch_size", "against_labels"))
def _nc4_batch(statistics, variables, split, start, *, against_labels=False, **static):
    """How many examples of the batch the nearest mean labels otherwise than the network, or than
    they are; NaN if an embedding is not finite.
    """
    logits, embeddings, labels, weights = forward_batch(variables, split, start, **static)
    predictions = labels if against_labels else logits
    share = metrics.nc4(predictions, embeddings, statistics, weights=weights)
    return jnp.round(share * jnp.sum(weights))


def _nearest_mean_error(statistics, variables, split: ImageSplit, run: FinishedRun) -> float:
    num_examples = split.labels.shape[0]
    batch_size = min(run.config.evaluation.batch_size, num_examples)
    static = {
        "model": run.model,
        "normalization": run.normalization,
        "batch_size": batch_size,
        "against_labels": True,
    }
    num_wrong = sum(
        float(_nc4_batch(statistics, variables, batch, start, **static))
        for batch, start in device_batches(split, batch_size)
    )
    return num_wrong / num_examples


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


@dataclasses.dataclass(frozen=True)
class _MeanLoss:
    """Mean cross-entropy with running statistics; equal for equal models, so compiled once."""

    model: nn.Module

    def __call__(self, statistics, inputs, labels, params):
        variables = {**statistics, "params": params}
        logits, _ = self.model.apply(variables, inputs, train=False)
        return jnp.mean(cross_entropy(logits, labels))


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
