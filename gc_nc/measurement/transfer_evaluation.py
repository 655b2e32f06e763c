"""Transfer of a trained run to unseen classes: source metrics, target NC, few-shot accuracy."""

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gc_nc import metrics
from gc_nc.compilation import jit_for_device
from gc_nc.data.class_splits import ClassImages
from gc_nc.data.datasets import ImageSplit
from gc_nc.data.device_batches import normalize
from gc_nc.errors import InputError
from gc_nc.measurement.array_cache import cached_arrays, checksum
from gc_nc.models import embed_fn
from gc_nc.random_streams import stream_key
from gc_nc.runs.finished_run import FinishedRun
from gc_nc.training import evaluation
from gc_nc.transfer.episode_evaluation import (
    HEADS,
    episode_accuracies,
    episode_neural_collapse,
    mean_confidence_interval,
)
from gc_nc.transfer.episode_sampling import Episode, sample_episodes
from gc_nc.transfer.feature_options import transform_features
from gc_nc.transfer.fine_tuning import fine_tune_predictions

#: Besides the heads on fixed embeddings: the whole network is trained on each support.
FINE_TUNING = "fine_tuning"
HEAD_NAMES = (*HEADS, FINE_TUNING)

#: Transformations of embeddings: name -> (centred by the source mean, L2-normalised).
FEATURE_OPTIONS = {
    "none": (False, False),
    "l2": (False, True),
    "centred": (True, False),
    "centred_l2": (True, True),
}

#: Held-out classes by name; the published splits call the target classes "test".
SPLITS = {"test": "target", "val": "val"}


class Protocol(NamedTuple):
    """How few-shot accuracy is measured.

    Attributes:
      split: "test" for the target classes, "val" for the classes on which choices are made.
      num_episodes: E.
      num_queries: Q of each way.
      seed: seed of the episodes, which are the same for every run and checkpoint.
      head: one of HEAD_NAMES.
      features: one of FEATURE_OPTIONS.
      regularization: lambda of ridge and logistic regression.
      fine_tuning_steps: T of fine-tuning.
      fine_tuning_learning_rate: learning rate of fine-tuning.
    """

    split: str = "test"
    num_episodes: int = 2000
    num_queries: int = 15
    seed: int = 0
    head: str = "nearest_mean"
    features: str = "none"
    regularization: float = 1.0
    fine_tuning_steps: int = 50
    fine_tuning_learning_rate: float = 0.01

    def facts(self) -> dict[str, Any]:
        """The settings that identify a result, without those that its head does not use."""
        facts = self._asdict()
        if self.head not in ("ridge", "logistic_regression"):
            del facts["regularization"]
        if self.head != FINE_TUNING:
            del facts["fine_tuning_steps"], facts["fine_tuning_learning_rate"]
        return facts


class Task(NamedTuple):
    """Numbers of ways and shots, and episodes of that size."""

    num_ways: int
    num_shots: int
    episodes: Episode


def sample_tasks(
    run: FinishedRun, protocol: Protocol, sizes: Sequence[tuple[int, int]]
) -> list[Task]:
    """Draws the episodes of every (ways, shots), before anything is embedded.

    Raises:
      InputError: the run held out no such classes, episodes of this size are impossible, or an
        option is unknown.
    """
    images = held_images(run, protocol.split)
    for name, value, allowed in (
        ("head", protocol.head, HEAD_NAMES),
        ("features", protocol.features, FEATURE_OPTIONS),
    ):
        if value not in allowed:
            raise InputError(f"{name}={value!r} is not one of {', '.join(allowed)}")
    if protocol.head == FINE_TUNING and protocol.features != "none":
        raise InputError("head=fine_tuning works on images; leave features at none")
    if not 0 <= protocol.fine_tuning_learning_rate < math.inf:
        raise InputError(
            f"fine_tuning_learning_rate={protocol.fine_tuning_learning_rate} must be 0 or more and"
            " finite"
        )
    if not 0 < protocol.regularization < math.inf:
        raise InputError(f"regularization={protocol.regularization} must be above 0 and finite")
    key = jax.random.key(protocol.seed, impl="threefry2x32")
    tasks = []
    for num_ways, num_shots in sizes:
        try:
            episodes = sample_episodes(
                key,
                images.labels,
                protocol.num_episodes,
                num_ways=num_ways,
                num_shots=num_shots,
                num_queries=protocol.num_queries,
            )
        except ValueError as error:
            raise InputError(f"{run.workdir}, {protocol.split} classes: {error}") from error
        tasks.append(Task(num_ways, num_shots, jax.device_get(episodes)))
    return tasks


def held_images(run: FinishedRun, split: str) -> ClassImages:
    """The images of the classes that the run held out.

    Raises:
      InputError: the run held out no such classes.
    """
    if split not in SPLITS:
        raise InputError(f"split={split!r} must be {' or '.join(SPLITS)}")
    if SPLITS[split] in run.held_classes:
        return run.held_classes[SPLITS[split]]
    kind = run.config.data.classes.split
    raise InputError(
        f"{run.workdir} has no {split} classes (config.data.classes.split={kind!r}); train on a"
        " part of the classes, as with --config.data.classes.split=random"
        " --config.data.classes.counts='(6, 4)'"
    )


def evaluate_checkpoint(
    run: FinishedRun,
    step: int,
    protocol: Protocol,
    tasks: Sequence[Task],
    *,
    gc_examples: int,
    gc_probes: int,
    report: Callable[[str], None] = lambda part: None,
    save: Callable[[dict[str, float], dict[str, Any]], None] = lambda source, result: None,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The source metrics of a checkpoint, and one result for each task.

    BatchNorm uses running statistics throughout, and nothing is fitted on queries. Embeddings and
    source metrics are cached in the run's transfer_cache/ as long as parameters and images are the
    same.

    Args:
      run: a run opened by `open_run`.
      step: a step that has a checkpoint.
      protocol: how accuracy is measured.
      tasks: tasks from `sample_tasks` with that protocol.
      gc_examples: number of random source training images on which GC is estimated.
      gc_probes: number of Jacobian products for each of these.
      report: called with what was just done.
      save: called with the source metrics and each result as soon as it is known.

    Returns:
      source: accuracy (held-out images of the source classes), geometric_complexity and its _sem,
        neural_collapse and geometric_collapse (training images).
      results: each has its identity (step, protocol, ways, shots), accuracy and its 95% half-width,
        error = 1 - accuracy, target_neural_collapse over all images of the held-out classes,
        episode_neural_collapse (NC among an episode's classes over all their images, averaged over
        episodes) with half-width, and nearest_mean_error_bound, the mean over episodes of
        min(1, 16 (k - 1) (1 + 2 / n) NC) of Proposition 5.1 of arXiv 2405.15706, or None for other
        heads, to which it does not apply. NC and bound are for the features that the head sees.
    """
    variables = run.variables(step)
    images = held_images(run, protocol.split)
    cache = run.workdir / "transfer_cache"
    parameters = checksum(jax.tree.leaves(variables), repr(run.normalization))

    data = checksum([*run.dataset.train, *run.dataset.test])
    source_key = (parameters, data, gc_examples, gc_probes)
    stored = cached_arrays(
        cache / f"source_{step}.npz",
        source_key,
        lambda: _source_arrays(run, variables, step, gc_examples, gc_probes),
    )
    mean = stored.pop("mean")
    source = {name: float(value) for name, value in stored.items()}
    report("source")

    embeddings = cached_arrays(
        cache / f"{protocol.split}_{step}.npz",
        (parameters, checksum(images[:2])),
        lambda: {"embeddings": embed_images(run, variables, images)},
    )["embeddings"]
    centred, l2 = FEATURE_OPTIONS[protocol.features]
    features = transform_features(embeddings, center=mean if centred else None, l2=l2)
    report("embeddings")

    # Compiled: outside jit, degenerate means would raise warnings on top of their inf.
    # The diagonal of CDNV is undefined, so JAX should not report its NaN as an error.
    with jax.debug_nans(False):
        collapse = _target_collapse(features, images.labels, len(images.class_names))
    nc, cdnv = jax.device_get(collapse)
    results = []
    for task in tasks:
        accuracies = _accuracies(run, variables, features, images, protocol, task, report)
        episode_nc = np.asarray(episode_neural_collapse(cdnv, task.episodes.classes), np.float64)
        accuracy, half_width = mean_confidence_interval(accuracies)
        mean_nc, nc_half_width = mean_confidence_interval(episode_nc)
        bound = None
        if protocol.head == "nearest_mean":
            bounds = jax.vmap(
                partial(
                    metrics.nearest_mean_error_bound,
                    num_classes=task.num_ways,
                    num_shots=task.num_shots,
                )
            )(episode_nc)
            bound = float(np.mean(np.asarray(bounds, np.float64)))
        results.append(
            {
                "step": step,
                **protocol.facts(),
                "num_ways": task.num_ways,
                "num_shots": task.num_shots,
                "accuracy": accuracy,
                "accuracy_half_width": half_width,
                "error": 1 - accuracy,
                "nearest_mean_error_bound": bound,
                "episode_neural_collapse": mean_nc,
                "episode_neural_collapse_half_width": nc_half_width,
                "target_neural_collapse": float(nc),
                "num_classes": len(images.class_names),
                "num_images": len(images.labels),
            }
        )
        save(source, results[-1])
        report(f"{task.num_ways}-way {task.num_shots}-shot")
    return source, results


def num_reports(num_steps: int, num_tasks: int) -> int:
    """The number of calls of `report` over `num_steps` checkpoints, without fine-tuning's."""
    return num_steps * (2 + num_tasks)


def _source_arrays(run, variables, step, gc_examples, gc_probes) -> dict[str, np.ndarray]:
    batch_size = run.config.evaluation.batch_size
    train, test = (evaluation.on_device(split) for split in (run.dataset.train, run.dataset.test))

    def sums(split):
        return evaluation.evaluation_sums(
            run.model,
            variables,
            split,
            run.normalization,
            num_classes=run.dataset.num_classes,
            batch_size=min(batch_size, len(split.labels)),
        )

    statistics = sums(train).statistics
    inputs = run.gc_inputs(gc_examples)
    key = stream_key(run.config.seed, "source GC of transfer")
    gc = metrics.estimate_geometric_complexity(
        embed_fn(run.model, variables),
        inputs,
        jax.random.fold_in(key, step),
        num_probes=gc_probes,
    )
    nc, collapse, mean = _source_collapse(statistics, gc.mean)
    values = {
        "accuracy": int(sums(test).num_correct) / len(test.labels),
        "geometric_complexity": gc.mean,
        "geometric_complexity_sem": gc.sem,
        "neural_collapse": nc,
        "geometric_collapse": collapse,
        "gc_examples": len(inputs),
        "gc_probes": gc_probes,
        "num_classes": run.dataset.num_classes,
        "mean": mean,
    }
    return {name: np.asarray(value) for name, value in values.items()}


@jax.jit
def _source_collapse(statistics, gc):
    counts = statistics.counts[:, None]
    means = jnp.where(statistics.present[:, None], statistics.means, 0)
    return (
        metrics.neural_collapse(statistics),
        metrics.geometric_collapse(gc, statistics),
        jnp.sum(counts * means, axis=0) / jnp.sum(counts),
    )


@partial(jax.jit, static_argnums=2)
def _target_collapse(features, labels, num_classes):
    statistics = metrics.init_class_statistics(num_classes, features.shape[1])
    statistics = metrics.update_class_statistics(statistics, features, labels)
    return metrics.neural_collapse(statistics), metrics.cdnv_matrix(statistics)


@partial(jit_for_device, static_argnames=("model", "normalization", "batch_size"))
def _embed_batch(variables, split, start, **static):
    return evaluation.forward_batch(variables, split, start, **static)[1]


def embed_images(run: FinishedRun, variables, images: ClassImages) -> np.ndarray:
    """(N, K) embeddings, with running BatchNorm statistics."""
    split = evaluation.on_device(ImageSplit(images.images, images.labels))
    batch_size = min(run.config.evaluation.batch_size, len(images.labels))
    static = {
        "model": run.model,
        "normalization": run.normalization,
        "batch_size": batch_size,
    }
    batches = [
        _embed_batch(variables, batch, start, **static)
        for batch, start in evaluation.device_batches(split, batch_size)
    ]
    return np.concatenate(jax.device_get(batches))[: len(images.labels)]


def _accuracies(run, variables, features, images, protocol, task, report) -> np.ndarray:
    if protocol.head == FINE_TUNING:
        return _fine_tuned_accuracies(run, variables, images, protocol, task, report)
    head = _head(protocol.head, protocol.facts().get("regularization"))
    return episode_accuracies(features, images.labels, task.episodes, head)


@functools.cache
def _head(name: str, regularization: float | None):
    """Returns the same object for the same settings, because JAX compiles for each new object."""
    if regularization is None:
        return HEADS[name]
    return partial(HEADS[name], regularization=regularization)


def _fine_tuned_accuracies(run, variables, images, protocol, task, report) -> np.ndarray:
    params = variables["params"]
    statistics = {name: value for name, value in variables.items() if name != "params"}

    def embed(params, images):
        return run.model.apply({**statistics, "params": params}, images, train=False)[1]

    ways = np.repeat(np.arange(task.num_ways), protocol.num_queries)
    accuracies, undecided = [], 0
    for support, query in zip(task.episodes.support, task.episodes.query, strict=True):
        shape = (*support.shape, *images.images.shape[1:])
        inputs = [
            normalize(images.images[rows.ravel()], run.normalization) for rows in (support, query)
        ]
        predicted = np.asarray(
            fine_tune_predictions(
                embed,
                params,
                inputs[0].reshape(shape),
                inputs[1],
                num_steps=protocol.fine_tuning_steps,
                learning_rate=protocol.fine_tuning_learning_rate,
            )
        )
        accuracies.append(np.mean(predicted == ways))
        undecided += int(np.sum(predicted < 0))
        report("fine-tuning")
    if undecided:
        warnings.warn(
            f"no prediction for {undecided} queries, which count as errors: fine-tuning diverged;"
            " lower its learning rate",
            RuntimeWarning,
            stacklevel=2,
        )
    return np.array(accuracies)
