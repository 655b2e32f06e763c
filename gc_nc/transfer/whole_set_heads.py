"""Classifiers of many labelled embeddings, beside episodes: k nearest neighbours, linear probe.

Where episodes ask what a few images of a class are good for, these ask what all of them are.
Predictions are labels. Neither is fitted on queries.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, Shaped

from gc_nc.array_types import Array, as_floating, check_whole, is_known
from gc_nc.metrics.argument_checks import as_labels, check_rows
from gc_nc.metrics.weighted_means import power_of_two_near
from gc_nc.transfer.closed_form_heads import as_regularization
from gc_nc.transfer.logistic_head import fit_and_predict

# Queries whose distances to all examples are held at a time.
_BLOCK = 256


def k_nearest_predictions(
    train_embeddings: Shaped[Array, "M K"],
    train_labels: Shaped[Array, "M"],
    query_embeddings: Shaped[Array, "N K"],
    *,
    num_neighbors: int = 20,
) -> Int[Array, "N"]:
    """The commonest label among the k examples with least |z - z_m|; the lowest label at ties.

    Euclidean; for cosine distance apply `transform_features(..., l2=True)` to both first. Among
    examples at equal distance the first count. Source: Cover and Hart, Nearest neighbor pattern
    classification, IEEE Transactions on Information Theory, 1967; as a measure of embeddings,
    Wu, Xiong, Yu, Lin (arXiv 1805.01978).

    Args:
      train_embeddings: (M, K), all real numbers are cast to float32.
      train_labels: (M,) integers, known outside jit.
      query_embeddings: (N, K), none of the examples among them.
      num_neighbors: k, 1 to M.

    Returns:
      (N,) int32 labels; -1 for a query that is not finite, and for all queries if an example is
      not.

    Raises:
      ValueError: shapes that do not fit, labels that are not integers or traced, fewer than 2
        labels, or more neighbours than examples.
    """
    train, labels, query = _checked(train_embeddings, train_labels, query_embeddings)
    num_neighbors = check_whole(num_neighbors, 1, "num_neighbors")
    if num_neighbors > len(train):
        raise ValueError(f"num_neighbors={num_neighbors} of {len(train)} examples; take fewer")
    values, numbers = np.unique(labels, return_inverse=True)
    numbers = _commonest(
        train, jnp.asarray(numbers, jnp.int32), query, len(values), num_neighbors=num_neighbors
    )
    return jnp.where(numbers < 0, -1, jnp.asarray(values, jnp.int32)[numbers])


def linear_probe_predictions(
    train_embeddings: Shaped[Array, "M K"],
    train_labels: Shaped[Array, "M"],
    query_embeddings: Shaped[Array, "N K"],
    *,
    regularization: float | Array = 1.0,
) -> Int[Array, "N"]:
    """L2-regularised multinomial logistic regression on all examples; the lowest label at ties.

      (A, b) = argmin sum over examples of -log softmax(A^T z + b)[label] + lambda/2 |A|_F^2

    As `logistic_regression_predictions`, for any number of examples of each class: fitted by
    scikit-learn on the host, in float64. lambda is against a sum over all examples.

    Args:
      train_embeddings: (M, K), all real numbers are cast to float32.
      train_labels: (M,) integers, known outside jit.
      query_embeddings: (N, K).
      regularization: lambda above 0, in units of |z|^2.

    Returns:
      (N,) int32 labels; -1 for a query that is not finite, and for all queries if an example is not
      or the solver has not converged.

    Raises:
      ValueError: as `k_nearest_predictions`; lambda not above 0 or not finite; traced embeddings.
    """
    train, labels, query = _checked(train_embeddings, train_labels, query_embeddings)
    strength = as_regularization(regularization)
    if not is_known(train, query, strength):
        raise ValueError("a linear probe is fitted on the host and cannot be traced; call it as is")
    return jnp.asarray(fit_and_predict(train, query, strength, ways=labels))


@partial(jax.jit, static_argnums=3, static_argnames="num_neighbors")
def _commonest(train, numbers, query, num_classes, *, num_neighbors):
    # About the examples' mean and in units of their size: squares stay in range, and digits.
    origin = jnp.mean(train, axis=0, keepdims=True)
    size = power_of_two_near(jnp.max(jnp.abs(train - origin)))
    train, query = (train - origin) / size, (query - origin) / size
    finite = jnp.all(jnp.isfinite(train))
    squares = jnp.sum(train**2, axis=1)

    def label_of(z):
        # |z - z_m|^2 less |z|^2, which is the same for all.
        distances = squares - 2 * jnp.matmul(train, z, precision="highest")
        nearest = jax.lax.top_k(-distances, num_neighbors)[1]
        votes = jnp.zeros(num_classes, jnp.int32).at[numbers[nearest]].add(1)
        known = finite & jnp.all(jnp.isfinite(z))
        return jnp.where(known, jnp.argmax(votes).astype(jnp.int32), -1)

    return jax.lax.map(label_of, query, batch_size=_BLOCK)


def _checked(train_embeddings, train_labels, query_embeddings):
    train = as_floating(train_embeddings, "train_embeddings")
    query = as_floating(query_embeddings, "query_embeddings")
    if train.ndim != 2 or 0 in train.shape:
        raise ValueError(f"train_embeddings of shape {train.shape}; (M, K) above 0 is needed")
    check_rows(query, train.shape[1], "query_embeddings")
    labels = as_labels(train_labels, len(train))
    if not is_known(labels):
        raise ValueError("train_labels are traced; labels that are known outside jit are needed")
    labels = np.asarray(labels)
    if len(np.unique(labels)) < 2:
        raise ValueError("train_labels hold one label only; at least 2 are needed to tell apart")
    return train, labels, query
