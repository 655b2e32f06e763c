"""Every metric of a network over a whole split; padding has no effect on any of them."""

import contextlib
import math
from collections.abc import Callable, Iterator
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
from gc_nc.data.streamed_images import StreamedImages
from gc_nc.data.streaming import PaddedBatch, stream_in_order
from gc_nc.devices import Placement
from gc_nc.models import embed_fn
from gc_nc.random_streams import stream_generator
from gc_nc.training.step import cross_entropy

# Number of examples differentiated at a time.
_EXAMPLES_A_DEVICE = 32


class EvaluationSums(NamedTuple):
    """The sums that one pass over a split collects."""

    statistics: metrics.ClassStatistics
    loss: jax.Array
    num_correct: jax.Array


def gc_subset(seed: int, num_examples: int, subset_size: int) -> np.ndarray:
    """The examples on which GC is measured: a sorted random subset, determined by the seed."""
    rng = stream_generator(seed, "examples for GC")
    return np.sort(rng.permutation(num_examples)[:subset_size]).astype(np.int32)


def on_device(split: ImageSplit, placement: Placement | None = None) -> ImageSplit:
    """The split on the device or devices; streamed images stay where they are."""
    if isinstance(split.images, StreamedImages):
        return split
    return jax.device_put(split) if placement is None else placement.replicate(split)


def device_batches(
    split: ImageSplit, batch_size: int, placement: Placement | None = None
) -> Iterator[tuple[ImageSplit | PaddedBatch, int]]:
    """Yields the split and start for calls of `forward_batch` that cover all examples once."""
    if not isinstance(split.images, StreamedImages):
        yield from ((split, start) for start in range(0, split.labels.shape[0], batch_size))
        return
    rows = None if placement is None else placement.process_rows(batch_size)
    with contextlib.closing(stream_in_order(split, batch_size, rows=rows)) as batches:
        for batch in batches:
            placed = jax.device_put(batch) if placement is None else placement.divide_batch(batch)
            yield placed, 0


def images_of(
    split: ImageSplit, subset: np.ndarray, placement: Placement | None = None
) -> jax.Array:
    """Some images of a split, on the device."""
    images = split.images[subset]
    if placement is None or not isinstance(images, np.ndarray):
        return jnp.asarray(images)
    return placement.replicate(images)


def forward_batch(variables, split, start, *, model, normalization, batch_size, placement=None):
    """Logits, embeddings, labels and weights of the examples from `start` on, to be jitted.

    Shapes are static: past the end, the last example is repeated with weight 0. A PaddedBatch is
    used as it is.
    """
    if isinstance(split, PaddedBatch):
        images, labels, weights = split
    else:
        num_examples = split.labels.shape[0]
        # With 64 bits enabled a number of Python's is one of them.
        rows = jnp.asarray(start, jnp.int32) + jnp.arange(batch_size, dtype=jnp.int32)
        weights = (rows < num_examples).astype(jnp.float32)
        rows = jnp.minimum(rows, num_examples - 1)
        images, labels = split.images[rows], split.labels[rows]
    # Metrics never use TF32, whatever precision the network trains in.
    with jax.default_matmul_precision("highest"):
        inputs = normalize(images, normalization)
        if placement is not None:
            inputs = placement.constrain_batch(inputs)
        logits, embeddings = model.apply(variables, inputs, train=False)
    return logits, embeddings, labels, weights


@partial(
    jit_for_device,
    static_argnames=("model", "normalization", "batch_size", "placement"),
    donate_argnames="sums",
)
def _add_batch(sums, variables, split, start, **static):
    logits, embeddings, labels, weights = forward_batch(variables, split, start, **static)
    correct = (jnp.argmax(logits, axis=1).astype(labels.dtype) == labels) & (weights > 0)
    added = EvaluationSums(
        metrics.update_class_statistics(sums.statistics, embeddings, labels, weights=weights),
        sums.loss + jnp.sum(weights * cross_entropy(logits, labels)),
        sums.num_correct + jnp.sum(correct, dtype=jnp.int32),
    )
    placement = static["placement"]
    return added if placement is None else placement.constrain_replicated(added)


def evaluation_sums(
    model: nn.Module,
    variables: dict,
    split: ImageSplit,
    normalization: Normalization,
    *,
    num_classes: int,
    batch_size: int,
    scatter: bool = False,
    report: Callable[[], None] | None = None,
    placement: Placement | None = None,
) -> EvaluationSums:
    """One pass over a split.

    Args:
      model: a network that returns (logits, embedding).
      variables: parameters, with the head's at params/head, and running statistics.
      split: a split from `on_device`.
      normalization: the normalization of the pixels.
      num_classes: C.
      batch_size: number of examples at a time.
      scatter: whether the statistics include the scatter matrix.
      report: called after each batch was dispatched.
      placement: devices that divide the batches; None for the one that the split is on.
    """
    embedding_dim = variables["params"]["head"]["kernel"].shape[0]
    sums = EvaluationSums(
        metrics.init_class_statistics(num_classes, embedding_dim, scatter=scatter),
        jnp.zeros((), jnp.float32),
        jnp.zeros((), jnp.int32),
    )
    if placement is not None:
        # Batches are padded, so their size can be rounded up to one that the devices can divide.
        batch_size = math.ceil(batch_size / placement.num_devices) * placement.num_devices
        sums = placement.replicate(sums)
    static = {
        "model": model,
        "normalization": normalization,
        "batch_size": batch_size,
        "placement": placement,
    }
    for batch, start in device_batches(split, batch_size, placement):
        sums = _add_batch(sums, variables, batch, start, **static)
        if report:
            report()
    return sums


def monitor_complexity(variables, images, key, *, model, normalization, num_probes, placement=None):
    """GC of a few images and its standard error, to be jitted and fetched later.

    It is one program with all images in one chunk, because it must be cheap compared with the steps
    between its calls.
    """
    embed = embed_fn(model, variables)
    gc = metrics.estimate_geometric_complexity(
        embed if placement is None else placement.divide_embedding(embed),
        normalize(images, normalization),
        key,
        num_probes=num_probes,
        chunk_size=len(images),
    )
    return {
        "monitor/geometric_complexity": gc.mean,
        "monitor/geometric_complexity_sem": gc.sem,
    }


@jax.jit
def _collapse(statistics, gc):
    return metrics.neural_collapse(statistics), metrics.geometric_collapse(gc, statistics)


# A separate program, so that the metrics measured beside it round as before.
@jax.jit
def embedding_scale(statistics, gc):
    """The size of the embeddings, and GC relative to it, by their keys in metrics.jsonl."""
    return {
        "squared_embedding_norm": metrics.squared_embedding_norm(statistics),
        "squared_class_distance": metrics.squared_class_distance(statistics),
        "relative_geometric_complexity": metrics.relative_geometric_complexity(gc, statistics),
    }


def evaluate_split(
    model: nn.Module,
    variables: dict,
    split: ImageSplit,
    normalization: Normalization,
    subset: np.ndarray,
    key: jax.Array,
    *,
    num_classes: int,
    batch_size: int,
    gc_probes: int,
    placement: Placement | None = None,
) -> dict[str, float]:
    """Accuracy, loss, NC, collapse and scale over the whole split, and GC on a subset of it.

    Args:
      model: a network that returns (logits, embedding).
      variables: parameters and running statistics.
      split: a split from `on_device`.
      normalization: the normalization of the pixels.
      subset: indices of the examples on which GC is estimated.
      key: the JAX key of the probes.
      num_classes: C.
      batch_size: examples at a time; the last batch is padded, and the padding has weight 0.
      gc_probes: number of Jacobian products for each example of the subset.
      placement: devices that divide the work; None for the one that the split is on.

    Returns:
      accuracy, loss, neural_collapse, geometric_collapse, geometric_complexity,
      geometric_complexity_sem, squared_embedding_norm, squared_class_distance and
      relative_geometric_complexity as Python floats.
    """
    num_examples = split.labels.shape[0]
    batch_size = min(batch_size, num_examples)
    embed = embed_fn(model, variables)
    chunk_size = None
    if placement is not None:
        embed = placement.divide_embedding(embed)
        chunk_size = _EXAMPLES_A_DEVICE * placement.num_devices
    inputs = normalize(images_of(split, subset, placement), normalization)
    sums = evaluation_sums(
        model,
        variables,
        split,
        normalization,
        num_classes=num_classes,
        batch_size=batch_size,
        placement=placement,
    )
    gc = metrics.estimate_geometric_complexity(
        embed, inputs, key, num_probes=gc_probes, chunk_size=chunk_size
    )
    neural_collapse, geometric_collapse = _collapse(sums.statistics, gc.mean)
    fetched = jax.device_get(
        {
            "loss": sums.loss / num_examples,
            "neural_collapse": neural_collapse,
            "geometric_collapse": geometric_collapse,
            "geometric_complexity": gc.mean,
            "geometric_complexity_sem": gc.sem,
            **embedding_scale(sums.statistics, gc.mean),
        }
    )
    # Divided in Python, so that accuracy is exactly 1.0 if every example is right.
    accuracy = int(sums.num_correct) / num_examples
    return {"accuracy": accuracy, **{name: float(value) for name, value in fetched.items()}}
