"""Flatness of a loss surface: gradient norm, Hessian trace, top eigenvalue, SAM sharpness.

`loss_fn` maps a parameter pytree to a scalar L(theta); g = dL/dtheta, H = d2L/dtheta2, all in
float32 whatever the dtype of the parameters. All leaves together form one vector, so the Hessian
has as many rows as there are parameters. Its products H v come from the linearised gradient; H is
never formed. If `loss_fn` uses one batch, the values are about the loss of that batch: say which
batch it is, and switch dropout off.

Each call traces `loss_fn` again, which takes milliseconds. Losses that compute the same share a
compiled program, whatever they close over; inside the caller's jit the loss is part of the caller's
program.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Float
from matfree import stochtrace

from gc_nc.array_types import (
    Array,
    as_scalar,
    check_whole,
    nan_where,
    replicated,
)
from gc_nc.metrics.argument_checks import as_key, check_function, check_leaves
from gc_nc.metrics.jacobian_estimators import Estimate, signs
from gc_nc.metrics.jacobian_products import varying_like
from gc_nc.metrics.shared_programs import SharedFunction
from gc_nc.metrics.traced_functions import staged
from gc_nc.metrics.weighted_means import weighted_mean

LossFn = Callable[[Any], jax.Array]


def squared_gradient_norm(loss_fn: LossFn, params: Any) -> Float[Array, ""]:
    """|g|^2, summed over all parameters. In (loss units / parameter units)^2.

    Gradients below 1e-19 have squares that float32 flushes to 0.

    Raises:
      ValueError: the loss is not a real scalar, or a parameter is not floating point.
    """
    return _compile(loss_fn, params)(params, measure=_squared_gradient_norm)


def _squared_gradient_norm(loss, theta):
    return jnp.sum(jax.grad(loss)(theta) ** 2)


def hessian_trace(loss_fn: LossFn, params: Any, key: Array, *, num_probes: int = 32) -> Estimate:
    """tr H by Hutchinson's estimator: the mean of v^T H v over random signs v.

    It is unbiased, with variance 2 sum_{i != j} H_ij^2 / num_probes (Hutchinson 1990), so it is
    exact if H is diagonal. It costs `num_probes` Hessian products, and memory for one at a time. On
    the CPU, the products of a convolutional network are several times slower under jit than
    outside.

    Args:
      loss_fn: function from parameters to a scalar loss.
      params: pytree of floating-point arrays.
      key: random key of the probes.
      num_probes: number of probes, at least 1.

    Returns:
      Estimate(mean, sem); sem = std(ddof=1) / sqrt(num_probes) is over probes, not over examples,
      and NaN for one probe.

    Raises:
      ValueError: `num_probes` is below 1; also in the cases of `squared_gradient_norm`.
    """
    num_probes, key = check_whole(num_probes, 1, "num_probes"), as_key(key)
    compiled = _compile(loss_fn, params)
    keys = jax.random.split(key, num_probes)
    # One probe at a time: all at once would keep the activations of every probe in memory. The loop
    # runs on the host if possible, since XLA's CPU loops make convolutions several times slower.
    if staged():
        values = jax.lax.map(lambda key: compiled(params, key, measure=_probed_trace), keys)
    else:
        values = jnp.stack([compiled(params, key, measure=_probed_trace) for key in keys])
    return Estimate(*weighted_mean(values, None))


def _probed_trace(loss, theta, key):
    hessian_product = _hessian_product(loss, theta)

    def draw(key):
        return signs(key, (1, theta.size))

    return stochtrace.estimator_monte_carlo(stochtrace.monte_carlo_trace(), draw)(
        hessian_product, key
    )


def hessian_top_eigenvalue(
    loss_fn: LossFn, params: Any, key: Array, *, num_iterations: int = 30
) -> Float[Array, ""]:
    """The largest algebraic eigenvalue of H, by Lanczos with full reorthogonalisation.

    It is the largest on the number line, not in magnitude: -1 for eigenvalues -5, -1. It is a Ritz
    value, so it is at most the true eigenvalue (up to rounding) and approaches it as
    `num_iterations` grows; it is exact after as many iterations as H has different eigenvalues. The
    start is random (arXiv 1901.10159 does the same for whole spectra). Memory is `num_iterations`
    vectors of the size of the parameters, twice as many outside jit. The gradient takes the square
    of that number of vectors, and it is NaN if Lanczos ends early. On the CPU, the products of a
    convolutional network are slower under jit, as in `hessian_trace`.

    Args:
      loss_fn: function from parameters to a scalar loss.
      params: pytree of floating-point arrays.
      key: random key of the start vector.
      num_iterations: number of Hessian products, at least 1; no more than the number of parameters
        are used.

    Returns:
      Scalar, in loss units / (parameter units)^2; 0 where H is 0, NaN where H is not finite.

    Raises:
      ValueError: `num_iterations` is below 1; also in the cases of `squared_gradient_norm`.
    """
    num_iterations, key = check_whole(num_iterations, 1, "num_iterations"), as_key(key)
    compiled = _compile(loss_fn, params)
    # Matfree's Lanczos is not used, since its loop is compiled, which is slow: see hessian_trace.
    if staged():
        return compiled(params, key, measure=partial(_top_in_a_program, num_iterations))
    start = compiled(params, key, measure=_start_vector)

    def product(vector):
        return compiled(params, vector, measure=_multiplied)

    def host_loop(lower, upper, body, value):
        for i in range(lower, upper):
            value = body(i, value)
        return value

    return _top_eigenvalue(product, start, num_iterations, host_loop)


def _start_vector(loss, theta, key):
    del loss
    return varying_like(jax.random.normal(key, theta.shape, theta.dtype), theta)


def _multiplied(loss, theta, vector):
    return _hessian_product(loss, theta)(vector)


def _top_in_a_program(num_iterations, loss, theta, key):
    start = _start_vector(loss, theta, key)
    product = _hessian_product(loss, theta)
    return _top_eigenvalue(product, start, num_iterations, jax.lax.fori_loop)


def _top_eigenvalue(product, start, num_iterations, fori_loop):
    num_iterations = min(num_iterations, start.size)
    first = product(start)
    # Lanczos squares the products, so they are scaled to be near 1.
    size = jnp.max(jnp.abs(first))
    scale = jnp.where(size == 0, 1, size)

    def iterate(i, lanczos):
        return _add_vector(i, product(lanczos[0][i]) / scale, lanczos)

    lanczos = _first_vector(start, num_iterations=num_iterations)
    # The first vector is the start vector, normalised to length 1.
    lanczos = _add_vector(0, first / scale / jnp.linalg.norm(start), lanczos)
    _, projected = fori_loop(1, num_iterations, iterate, lanczos)
    return scale * _top_ritz_value(projected)


def _hessian_product(loss, theta):
    _, product = jax.linearize(jax.grad(loss), theta)
    return lambda v: product(varying_like(v, theta))


@partial(jax.jit, static_argnames="num_iterations")
def _first_vector(start, *, num_iterations):
    """Returns vectors (J, P), of which the first is set, and the projected matrix (J, J) of 0."""
    vectors = varying_like(jnp.zeros((num_iterations, start.size), start.dtype), start)
    projected = varying_like(jnp.zeros((num_iterations, num_iterations), start.dtype), start)
    return vectors.at[0].set(start / jnp.linalg.norm(start)), projected


@jax.jit
@jax.default_matmul_precision("highest")
def _add_vector(i, product, lanczos):
    """Adds column i of the projected matrix and vector i + 1, from the product with vector i."""
    vectors, projected = lanczos
    column = vectors @ product
    product = product - column @ vectors
    # Done twice, because one pass leaves rounding errors along the earlier vectors.
    product = product - (vectors @ product) @ vectors
    length = jnp.linalg.norm(product)
    # After the last vector both are dropped, as there is no place for them. A length of 0 marks the
    # end of the part that is used.
    projected = projected.at[:, i].set(column.at[i + 1].set(length, mode="drop"))
    following = product / jnp.where(length == 0, 1, length)
    return vectors.at[i + 1].set(following, mode="drop"), projected


def sam_sharpness(loss_fn: LossFn, params: Any, *, rho: float = 0.05) -> Float[Array, ""]:
    """L(theta + rho g / |g|) - L(theta), and 0 where g = 0 (Foret et al., arXiv 2010.01412).

    This takes the first-order ascent step in the ball of radius rho over all parameters together;
    it is not the maximum over the ball. It is a difference of two losses, so its rounding error is
    about 1e-7 L.

    Args:
      loss_fn: function from parameters to a scalar loss.
      params: pytree of floating-point arrays.
      rho: radius of the ball in parameter units, 0 or more.

    Returns:
      Scalar, in loss units; negative if the step overshoots.

    Raises:
      ValueError: `rho` is negative or not finite (outside jit; under jit NaN); also in the
        cases of `squared_gradient_norm`.
    """
    rho = as_scalar(rho, "rho")
    rho = nan_where(~(rho < jnp.inf), rho, "rho", "must be 0 or more and finite")
    return _compile(loss_fn, params)(params, rho, measure=_sharpness)


def _sharpness(loss, theta, rho):
    value, gradient = jax.value_and_grad(loss)(theta)
    # Divided by the largest entry first, because squares of tiny gradients would be 0.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(gradient)))
    moves = largest != 0
    direction = jnp.where(moves, gradient / jnp.where(moves, largest, 1), 1)
    step = jnp.where(moves, rho * direction / jnp.sqrt(jnp.sum(direction**2)), 0)
    return loss(theta + step) - value


def _compile(loss_fn: LossFn, params: Any) -> Callable:
    """Checks both; returns (params, *arguments, measure) -> measure(loss, theta, *arguments).

    The measure is a static argument; the loss that it gets is a function of one float32 vector.
    """
    check_function(loss_fn, "loss_fn", "from parameters to a scalar")
    check_leaves(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"params{jax.tree_util.keystr(path)} is {dtype}; floating point is needed, so close"
                " over what is not trained"
            )
    if sum(jnp.size(leaf) for leaf in jax.tree.leaves(params)) == 0:
        raise ValueError("params have no numbers; at least 1 parameter is needed")
    # A new function each time: eval_shape would remember the shape of an old state.
    output = jax.eval_shape(lambda params: loss_fn(_cast_up(params)), params)
    shape, dtype = getattr(output, "shape", None), getattr(output, "dtype", None)
    if shape != () or not jnp.issubdtype(dtype, jnp.floating):
        described = "a " + type(output).__name__ if dtype is None else f"{dtype}{list(shape)}"
        raise ValueError(f"loss_fn returns {described}; one real scalar of shape () is needed")
    return SharedFunction(partial(_evaluate, loss_fn))


def _cast_up(params):
    return jax.tree.map(lambda leaf: replicated(jnp.asarray(leaf, jnp.float32)), params)


def _evaluate(loss_fn, params, *arguments, measure):
    theta, unravel = ravel_pytree(_cast_up(params))

    def loss(theta):
        return jnp.asarray(loss_fn(unravel(theta)), theta.dtype)

    with jax.default_matmul_precision("highest"):
        return measure(loss, theta, *arguments)


@jax.jit
def _top_ritz_value(projected: Float[Array, "J J"]) -> Float[Array, ""]:
    """Returns the largest eigenvalue of the block of Q^T H Q that was built before a breakdown.

    If a residual is only rounding error, the vectors so far span an invariant subspace, whose
    eigenvalues are eigenvalues of H; everything after that was built from noise (or 0 / 0).
    """
    eps = jnp.finfo(projected.dtype).eps
    diagonal, residuals = jnp.diagonal(projected), jnp.diagonal(projected, -1)
    sizes = jax.lax.cummax(jnp.max(jnp.abs(jnp.nan_to_num(projected)), axis=0))
    goes_on = residuals > 10 * eps * sizes[:-1]
    reached = jnp.concatenate([jnp.ones(1, bool), jnp.cumprod(goes_on).astype(bool)])
    # The rest is filled with a Rayleigh quotient, which never exceeds the top eigenvalue.
    diagonal = jnp.where(reached, diagonal, diagonal[0])
    residuals = jnp.where(reached[1:], residuals, 0)
    block = jnp.diag(diagonal) + jnp.diag(residuals, 1) + jnp.diag(residuals, -1)
    return jnp.linalg.eigvalsh(block)[-1]
