"""Flatness of a loss surface: gradient norm, Hessian trace, top eigenvalue, SAM sharpness.

`loss_fn` maps a parameter pytree to a scalar L(theta); g = dL/dtheta, H = d2L/dtheta2, all in
float32 whatever the parameters are held in. Leaves are taken together as one vector, so the Hessian
has as many rows as there are parameters. Its products H v are a linearised gradient; H is never
formed. Run on one batch these are about that batch's loss: say which, and switch dropout off.

Each call compiles `loss_fn` anew, because a function's identity says nothing of the values it
closes over; inside the caller's own jit it is part of that program.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Float
from matfree import decomp, stochtrace

from gc_nc.array_types import Array
from gc_nc.metrics.jacobian_estimators import Estimate

LossFn = Callable[[Any], jax.Array]


def squared_gradient_norm(loss_fn: LossFn, params: Any) -> Float[Array, ""]:
    """|g|^2, summed over all parameters. In (loss units / parameter units)^2.

    Raises:
      ValueError: a loss that is not a real scalar, or parameters that are not floating point.
    """
    return _compute(lambda loss, theta: jnp.sum(jax.grad(loss)(theta) ** 2), loss_fn, params)


def hessian_trace(loss_fn: LossFn, params: Any, key: Array, *, num_probes: int = 32) -> Estimate:
    """tr H by Hutchinson's estimator: the mean of v^T H v over random signs v.

    Unbiased, with variance 2 sum_{i != j} H_ij^2 / num_probes (Hutchinson 1990), so exact where H
    is diagonal. Costs `num_probes` Hessian products and memory for one at a time.

    Args:
      loss_fn: parameters to scalar loss.
      params: pytree of floating-point arrays.
      key: of the probes.
      num_probes: at least 1.

    Returns:
      Estimate(mean, sem); sem = std(ddof=1) / sqrt(num_probes) is over probes, not over examples,
      and NaN for one probe.

    Raises:
      ValueError: `num_probes` below 1, and as `squared_gradient_norm`.
    """
    if num_probes < 1:
        raise ValueError(f"num_probes={num_probes} must be at least 1")

    def compute(loss, theta, key):
        _, hessian_product = jax.linearize(jax.grad(loss), theta)
        probe = stochtrace.estimator_monte_carlo(
            stochtrace.monte_carlo_trace(), stochtrace.sampler_signs(theta, num=1)
        )
        # One after the other: all at once would hold the activations of every probe.
        values = jax.lax.map(
            lambda probe_key: probe(hessian_product, probe_key), jax.random.split(key, num_probes)
        )
        sem = jnp.nan if num_probes == 1 else jnp.std(values, ddof=1) / jnp.sqrt(num_probes)
        return Estimate(jnp.mean(values), jnp.asarray(sem, values.dtype))

    return _compute(compute, loss_fn, params, key)


def hessian_top_eigenvalue(
    loss_fn: LossFn, params: Any, key: Array, *, num_iterations: int = 30
) -> Float[Array, ""]:
    """The largest algebraic eigenvalue of H, by Lanczos with full reorthogonalisation.

    Largest on the number line, not in magnitude: -1 for eigenvalues -5, -1. A Ritz value, so at
    most the true one (up to rounding), which it reaches as `num_iterations` grows; it is exact
    after as many iterations as H has different eigenvalues. From a random start (arXiv 1901.10159
    does the same for whole spectra). Holds `num_iterations` vectors of the size of the parameters.

    Args:
      loss_fn: parameters to scalar loss.
      params: pytree of floating-point arrays.
      key: of the start vector.
      num_iterations: Hessian products, at least 1; no more than the number of parameters are used.

    Returns:
      Scalar, in loss units / (parameter units)^2; 0 where H is 0, NaN where H is not finite.

    Raises:
      ValueError: `num_iterations` below 1, and as `squared_gradient_norm`.
    """
    if num_iterations < 1:
        raise ValueError(f"num_iterations={num_iterations} must be at least 1")

    def compute(loss, theta, key):
        _, hessian_product = jax.linearize(jax.grad(loss), theta)
        start = jax.random.normal(key, theta.shape, theta.dtype)
        # Lanczos squares the products, so they are brought near 1 first.
        size = jnp.max(jnp.abs(hessian_product(start)))
        scale = jnp.where(size == 0, 1, size)
        # hessenberg, which tridiag_sym calls, because it keeps the residual lengths apart.
        lanczos = decomp.hessenberg(min(num_iterations, theta.size), reortho="full")
        projected = lanczos(lambda v: hessian_product(v) / scale, start).J_small
        return scale * _top_ritz_value(projected)

    return _compute(compute, loss_fn, params, key)


def sam_sharpness(loss_fn: LossFn, params: Any, *, rho: float = 0.05) -> Float[Array, ""]:
    """L(theta + rho g / |g|) - L(theta), and 0 where g = 0 (Foret et al., arXiv 2010.01412).

    The first-order ascent step inside the ball of radius rho over all parameters together, not
    the maximum over the ball. A difference of two losses: its rounding is about 1e-7 L.

    Args:
      loss_fn: parameters to scalar loss.
      params: pytree of floating-point arrays.
      rho: radius in parameter units, 0 or more.

    Returns:
      Scalar, in loss units; negative where the step overshoots.

    Raises:
      ValueError: `rho` negative or not finite, and as `squared_gradient_norm`.
    """
    if not isinstance(rho, jax.core.Tracer) and not 0 <= rho < float("inf"):
        raise ValueError(f"rho={rho} must be 0 or more and finite")

    def compute(loss, theta, rho):
        value, gradient = jax.value_and_grad(loss)(theta)
        # Normalised by the largest entry first: squares of tiny gradients would be 0.
        largest = jax.lax.stop_gradient(jnp.max(jnp.abs(gradient)))
        moves = largest != 0
        direction = jnp.where(moves, gradient / jnp.where(moves, largest, 1), 1)
        step = jnp.where(moves, rho * direction / jnp.sqrt(jnp.sum(direction**2)), 0)
        return loss(theta + step) - value

    return _compute(compute, loss_fn, params, jnp.asarray(rho, jnp.float32))


def _compute(measure: Callable, loss_fn: LossFn, params: Any, *arguments: Array) -> Any:
    """measure(loss, theta, *arguments), compiled, with the loss a function of one flat vector."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"params{jax.tree_util.keystr(path)} is {dtype}; floating point is needed, so close"
                " over what is not trained"
            )
    params = jax.tree.map(
        lambda leaf: jnp.asarray(leaf, jnp.promote_types(jnp.result_type(leaf), jnp.float32)),
        params,
    )
    if sum(leaf.size for leaf in jax.tree.leaves(params)) == 0:
        raise ValueError("params hold no number; at least 1 parameter is needed")
    theta, unravel = ravel_pytree(params)
    output = jax.eval_shape(loss_fn, params)
    shape, dtype = getattr(output, "shape", None), getattr(output, "dtype", None)
    if shape != () or not jnp.issubdtype(dtype, jnp.floating):
        described = "a " + type(output).__name__ if dtype is None else f"{dtype}{list(shape)}"
        raise ValueError(f"loss_fn returns {described}; one real scalar of shape () is needed")

    def loss(theta):
        return jnp.asarray(loss_fn(unravel(theta)), theta.dtype)

    with jax.default_matmul_precision("highest"):
        return jax.jit(lambda theta, *rest: measure(loss, theta, *rest))(theta, *arguments)


def _top_ritz_value(projected: Float[Array, "J J"]) -> Float[Array, ""]:
    """Largest eigenvalue of the leading block of Q^T H Q that Lanczos built before it broke down.

    Where the residual is only rounding, the vectors so far span an invariant subspace: its
    eigenvalues are those of H, and what follows was built from noise (or 0 / 0).
    """
    eps = jnp.finfo(projected.dtype).eps
    diagonal, residuals = jnp.diagonal(projected), jnp.diagonal(projected, -1)
    sizes = jax.lax.cummax(jnp.max(jnp.abs(jnp.nan_to_num(projected)), axis=0))
    goes_on = residuals > 10 * eps * sizes[:-1]
    reached = jnp.concatenate([jnp.ones(1, bool), jnp.cumprod(goes_on).astype(bool)])
    # A Rayleigh quotient of H is never above the block's top eigenvalue, so it fills the rest.
    diagonal = jnp.where(reached, diagonal, diagonal[0])
    residuals = jnp.where(reached[1:], residuals, 0)
    block = jnp.diag(diagonal) + jnp.diag(residuals, 1) + jnp.diag(residuals, -1)
    return jnp.linalg.eigvalsh(block)[-1]
