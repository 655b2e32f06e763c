"""scikit-learn's multinomial logistic regression on the support, as a head called from JAX.

Its solver is the field's usual reference, and takes less than a minute for 2,000 episodes.
"""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, Shaped

from gc_nc.array_types import Array
from gc_nc.errors import require_extra
from gc_nc.transfer.closed_form_heads import as_regularization, checked_shapes

_MAX_ITERATIONS, _TOLERANCE = 1000, 1e-4


def logistic_regression_predictions(
    support_embeddings: Shaped[Array, "W S K"],
    query_embeddings: Shaped[Array, "N K"],
    *,
    regularization: float | Array = 1.0,
) -> Int[Array, "N"]:
    """argmax over ways of L2-regularised multinomial logistic regression; the lowest way at ties.

      (A, b) = argmin sum over support n of -log softmax(A^T z_n + b)[way of n] + lambda/2 |A|_F^2

    The intercept b is not penalised. scikit-learn's `LogisticRegression(C=1/lambda, solver="lbfgs",
    tol=1e-4, max_iter=1000)` fits it on the host, in float64, to embeddings minus the support's
    mean. With two ways it is the binary form, which penalises A_1 - A_0 instead of A. Source: Tian,
    Wang, Krishnan, Tenenbaum, Isola (arXiv 2003.11539), section 3.

    Args:
      support_embeddings: (W, S, K).
      query_embeddings: (N, K).
      regularization: lambda above 0, in units of |z|^2.

    Returns:
      (N,) int32 in 0..W-1; -1 for a query that is not finite, and for all queries if the support is
      not or the solver has not converged.

    Raises:
      ValueError: as `nearest_mean_predictions`; lambda not above 0 or not finite (under jit -1).
    """
    strength = as_regularization(regularization)
    support, query = checked_shapes(support_embeddings, query_embeddings)
    num_ways, num_shots, dim = support.shape
    ways = np.repeat(np.arange(num_ways, dtype=np.int32), num_shots)
    predicted = jax.ShapeDtypeStruct(query.shape[:1], jnp.int32)
    return jax.pure_callback(
        partial(fit_and_predict, ways=ways),
        predicted,
        support.reshape(-1, dim),
        query,
        strength,
        vmap_method="sequential",
    )


def fit_and_predict(examples, query, strength, *, ways) -> np.ndarray:
    """(N,) int32: scikit-learn's predictions for the query from examples (M, K) of ways (M,)."""
    # Imported here: scikit-learn takes longer to import than the rest of this package.
    require_extra("train", "sklearn")
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    examples, query = (np.asarray(array, np.float64) for array in (examples, query))
    strength = float(strength)
    known = np.all(np.isfinite(query), axis=1)
    if not (np.isfinite(examples).all() and np.isfinite(strength)):
        return np.full(len(query), -1, np.int32)
    origin = examples.mean(axis=0)
    head = LogisticRegression(
        C=1 / strength, solver="lbfgs", tol=_TOLERANCE, max_iter=_MAX_ITERATIONS
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        try:
            head.fit(examples - origin, ways)
        except ConvergenceWarning:
            return np.full(len(query), -1, np.int32)
    predicted = head.predict(np.where(known[:, None], query - origin, 0))
    return np.where(known, predicted, -1).astype(np.int32)
