"""Accuracy and neural collapse of each episode, from embeddings computed once."""

import math
import warnings
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Shaped

from gc_nc.array_types import Array, as_floating, as_numbers, described, is_known, with_nan
from gc_nc.metrics.argument_checks import as_labels, check_choice, check_function
from gc_nc.transfer.closed_form_heads import (
    cosine_predictions,
    nearest_mean_predictions,
    ridge_predictions,
)
from gc_nc.transfer.episode_sampling import Episode
from gc_nc.transfer.logistic_head import logistic_regression_predictions

#: (support (W, S, K), query (N, K)) -> (N,) way indices; -1 for no prediction.
Head = Callable[[jax.Array, jax.Array], jax.Array]

#: The heads by name; functools.partial sets the options of one.
HEADS: dict[str, Head] = {
    "nearest_mean": nearest_mean_predictions,
    "cosine": cosine_predictions,
    "ridge": ridge_predictions,
    "logistic_regression": logistic_regression_predictions,
}

# Memory for the episodes computed at once, for embeddings gathered, centred and multiplied.
_BLOCK_BYTES, _COPIES = 2**28, 4
_MAX_BLOCK_EPISODES = 512
# Few at a time, so that the gathered embeddings stay in a processor's cache.
_EPISODES_AT_ONCE = 8


def episode_accuracies(
    embeddings: Shaped[Array, "N K"],
    labels: Shaped[Array, "N"],
    episodes: Episode,
    head: str | Head = "nearest_mean",
    *,
    report: Callable[[int], None] | None = None,
) -> Float[np.ndarray, "E"]:
    """The share of each episode's W Q queries that the head labels correctly.

    Episodes are computed in blocks, which take at most 256 MB beside the embeddings (more only if a
    single episode does).

    Args:
      embeddings: (N, K) of all images, computed once, with feature options already applied.
      labels: (N,) integers, the ones that the episodes were drawn from.
      episodes: E episodes from `sample_episodes`.
      head: a name in `HEADS`, or a function like them, for example
        `functools.partial(ridge_predictions, regularization=10.0)`. Each such object is compiled
        only once.
      report: called after each block with the number of episodes done.

    Returns:
      (E,) float64. `mean_confidence_interval` gives their mean and its error.

    Warns:
      RuntimeWarning: queries without a prediction, which count as errors, because embeddings are
        not finite or the head did not converge.

    Raises:
      ValueError: an unknown head; shapes that do not fit; indices outside 0..N-1, or images that do
        not have the label of their way.
    """
    if isinstance(head, str):
        check_choice(head, HEADS, "head")
        head = HEADS[head]
    if report is not None:
        check_function(report, "report", "of the number of episodes done")
    check_function(head, "head", "(support (W, S, K), query (N, K)) -> (N,), or the name of one,")
    embeddings = as_floating(embeddings, "embeddings")
    episodes = _checked(embeddings, labels, episodes)
    num_episodes, num_ways, num_queries = episodes.query.shape
    at_once = _episodes_at_once(embeddings, episodes.support, episodes.query)
    block = min(_MAX_BLOCK_EPISODES, num_episodes)
    right, undecided = np.zeros(num_episodes, int), 0
    for start in range(0, num_episodes, block):
        # The last block overlaps the one before it, so that all blocks have the same shape.
        first = min(start, num_episodes - block)
        part = slice(first, first + block)
        predicted = _predict_compiled(
            embeddings, episodes.support[part], episodes.query[part], head=head, at_once=at_once
        )
        predicted = np.asarray(predicted).reshape(block, num_ways, num_queries)
        right[part] = np.sum(predicted == np.arange(num_ways)[None, :, None], axis=(1, 2))
        undecided += int(np.sum(predicted[start - first :] < 0))
        if report is not None:
            report(start + block if first == start else num_episodes)
    if undecided:
        warnings.warn(
            f"no prediction for {undecided} of {num_episodes * num_ways * num_queries} queries,"
            " which count as errors: embeddings are not finite, or the head did not converge",
            RuntimeWarning,
            stacklevel=2,
        )
    return right / (num_ways * num_queries)


def episode_neural_collapse(
    cdnv: Float[Array, "C C"], episodes_classes: Int[Array, "E W"]
) -> Float[Array, "E"]:
    """NC of each episode's classes: 1 / (W (W - 1)) sum over ordered pairs i != j of V[c_i, c_j].

    Args:
      cdnv: (C, C) V, from `metrics.cdnv_matrix` over all images of the classes; its diagonal is
        ignored.
      episodes_classes: (E, W) in 0..C-1, different within an episode: `Episode.classes` if the
        labels are those of the class statistics.

    Returns:
      (E,); inf or NaN if V of a pair of the episode's classes is.

    Raises:
      ValueError: shapes that do not fit, fewer than 2 ways, values that are not integers; outside
        jit, a class outside 0..C-1 or twice in an episode (under jit the result is NaN).
    """
    cdnv = as_floating(cdnv, "cdnv")
    if cdnv.ndim != 2 or cdnv.shape[0] != cdnv.shape[1]:
        raise ValueError(f"cdnv of shape {cdnv.shape}; (C, C) is needed")
    episodes_classes = as_numbers(episodes_classes, "episodes_classes")
    shape, dtype = episodes_classes.shape, episodes_classes.dtype
    if len(shape) != 2 or shape[1] < 2 or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(
            f"episodes_classes are {dtype} of shape {shape}; (E, W) integers with 2 or more ways"
            " are needed"
        )
    num_classes, num_ways = len(cdnv), shape[1]
    outside = (episodes_classes < 0) | (episodes_classes >= num_classes)
    classes = jnp.where(outside, 0, episodes_classes).astype(jnp.int32)
    ordered = jnp.sort(classes, axis=1)
    twice = jnp.any(ordered[:, 1:] == ordered[:, :-1], axis=1)
    bad = jnp.any(outside, axis=1) | twice
    if is_known(bad) and bool(jnp.any(bad)):
        wrong = np.asarray(episodes_classes)[int(jnp.argmax(bad))]
        raise ValueError(
            f"an episode of classes {', '.join(map(str, wrong))}; different ones in"
            f" 0..{num_classes - 1} are needed"
        )
    # The diagonal is NaN and must not be used.
    cdnv = jnp.where(jnp.eye(num_classes, dtype=bool), 0, cdnv)
    pairs = cdnv[classes[:, :, None], classes[:, None, :]]
    pairs = jnp.where(jnp.eye(num_ways, dtype=bool)[None], 0, pairs)
    return with_nan(bad, jnp.sum(pairs, axis=(1, 2)) / (num_ways * (num_ways - 1)))


def mean_confidence_interval(accuracies: Sequence[float] | Array) -> tuple[float, float]:
    """The mean of n episodes' accuracies and half the width of its 95% interval.

    half width = 1.96 s / sqrt(n), s^2 = 1 / (n - 1) sum (a - mean)^2. The interval is for the mean
    over all possible episodes of these images, with one embedding.

    Returns:
      (mean, half_width) in float64. With one episode the error is unknown, so half_width is NaN.

    Raises:
      ValueError: there are no accuracies, or their shape is not (n,).
    """
    values = np.asarray(as_numbers(accuracies, "accuracies"), np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"accuracies of shape {values.shape}; (n,) with n of 1 or more is needed")
    mean = float(np.mean(values))
    if values.size == 1:
        return mean, math.nan
    # An infinite value, such as an NC, has no deviation: NaN, without NumPy's warning.
    with np.errstate(invalid="ignore"):
        return mean, float(1.96 * np.std(values, ddof=1) / math.sqrt(values.size))


def _episodes_at_once(embeddings, support, query):
    images = math.prod(support.shape[1:]) + math.prod(query.shape[1:])
    episode_bytes = _COPIES * images * embeddings.shape[1] * embeddings.dtype.itemsize
    return min(_EPISODES_AT_ONCE, max(1, _BLOCK_BYTES // episode_bytes))


def _predict(embeddings, support, query, *, head, at_once):
    def predict(episode):
        support, query = episode
        ways = head(_rows(embeddings, support), _rows(embeddings, query.ravel()))
        return _checked_ways(ways, query.size)

    return jax.lax.map(predict, (support, query), batch_size=at_once)


# Without jit_for_device, because YNNPACK costs more than it saves on these small products.
_predict_compiled = jax.jit(_predict, static_argnames=("head", "at_once"))


def _checked_ways(ways, num_queries):
    """Checks that the caller's head returned one way for each query."""
    shape, dtype = getattr(ways, "shape", None), getattr(ways, "dtype", None)
    if shape == (num_queries,) and jnp.issubdtype(dtype, jnp.integer):
        return jnp.asarray(ways).astype(jnp.int32)
    came = described(ways) if shape is None else f"{dtype} of shape {shape}"
    logits = shape is not None and len(shape) == 2 and shape[0] == num_queries
    raise ValueError(
        f"head returned {came} for {num_queries} queries; ({num_queries},) integers, one way index"
        f" for each query, are needed{', so return logits.argmax(axis=1)' if logits else ''}"
    )


def _rows(embeddings, indices):
    # Already checked in NumPy; on a CPU, bounds checks take as long as the gather itself.
    return embeddings.at[indices].get(mode="promise_in_bounds")


def _checked(embeddings, labels, episodes):
    """Returns the episodes as NumPy arrays, and refuses any that do not fit the images."""
    labels = np.asarray(as_numbers(labels, "labels"))
    if embeddings.ndim != 2 or labels.shape != embeddings.shape[:1]:
        raise ValueError(
            f"embeddings of shape {embeddings.shape} and labels of shape {labels.shape};"
            " (N, K) and (N,) are needed"
        )
    labels = np.asarray(as_labels(labels, len(embeddings)))
    if not isinstance(episodes, tuple) or len(episodes) != 3:
        raise ValueError(f"episodes are {described(episodes)}; take them from sample_episodes")
    classes, support, query = (np.asarray(as_numbers(part, "episodes")) for part in episodes)
    shapes = classes.shape, support.shape, query.shape
    if [len(shape) for shape in shapes] != [2, 3, 3] or not (
        shapes[0] == shapes[1][:2] == shapes[2][:2] and 0 not in shapes[1] + shapes[2]
    ):
        raise ValueError(
            f"episodes of shapes {shapes[0]}, {shapes[1]}, {shapes[2]}; (E, W), (E, W, S) and"
            " (E, W, Q) are needed, from sample_episodes"
        )
    for name, indices in (("support", support), ("query", query)):
        if indices.min() < 0 or indices.max() >= len(labels):
            raise ValueError(
                f"{name} indices are in {indices.min()}..{indices.max()}, but there are"
                f" {len(labels)} images; sample the episodes from these labels"
            )
        if not np.array_equal(labels[indices], np.broadcast_to(classes[..., None], indices.shape)):
            raise ValueError(
                f"{name} images do not have the label of their way; sample the episodes from"
                " these labels"
            )
    return Episode(classes, support, query)
