"""Flatness of a loss surface: gradient norm, Hessian trace, top eigenvalue, SAM sharpness.

`loss_fn` maps a parameter pytree to a scalar L(theta); g = dL/dtheta, H = d2L/dtheta2, all in
float32 whatever the parameters are held in. Leaves are taken together as one vector, so the Hessian
has as many rows as there are parameters. Its products H v are a linearised gradient; H is never
formed. Run on one batch these are about that batch's loss: say which, and switch dropout off.

Each call traces `loss_fn` anew, which takes milliseconds, and runs the program of all losses that
compute the same, whatever they close over; inside the caller's own jit it is part of that program.
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
from gc_nc.metrics.jacobian_products import varying_like, weighted_mean
from gc_nc.metrics.shared_programs import SharedFunction
from gc_nc.metrics.traced_functions import staged

LossFn = Callable[[Any], jax.Array]


def squared_gradient_norm(loss_fn: LossFn, params: Any) -> Float[Array, ""]:
    """|g|^2, summed over all parameters. In (loss units / parameter units)^2.

    Gradients below 1e-19 have squares that float32 flushes to 0.

    Raises:
      ValueError: a loss that is not a real scalar, or parameters that are not floating point.
    """
    return _compile(loss_fn, params)(params, measure=_squared_gradient_norm)


def _squared_gradient_norm(loss, theta):
    return jnp.sum(jax.grad(loss)(theta) ** 2)


def hessian_trace(loss_fn: LossFn, params: Any, key: Array, *, num_probes: int = 32) -> Estimate:
    """tr H by Hutchinson's estimator: the mean of v^T H v over random signs v.

    Unbiased, with variance 2 sum_{i != j} H_ij^2 / num_probes (Hutchinson 1990), so exact where H
    is diagonal. Costs `num_probes` Hessian products and memory for one at a time; under jit on the
    CPU the products of a convolutional network are several times slower than outside.

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
    num_probes, key = check_whole(num_probes, 1, "num_probes"), as_key(key)
    compiled = _compile(loss_fn, params)
    keys = jax.random.split(key, num_probes)
    # One after the other: all at once would hold the activations of every probe. On the host where
    # it can be, since XLA's CPU loops run convolutions several times slower than outside.
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

    Largest on the number line, not in magnitude: -1 for eigenvalues -5, -1. A Ritz value, so at
    most the true one (up to rounding), which it reaches as `num_iterations` grows; it is exact
    after as many iterations as H has different eigenvalues. From a random start (arXiv 1901.10159
    does the same for whole spectra). Holds `num_iterations` vectors of the size of the parameters,
    outside jit twice as many; its gradient holds their square, and is NaN where Lanczos ends early.
    Under jit on the CPU a convolutional network's products are slower, as in `hessian_trace`.

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
    num_iterations, key = check_whole(num_iterations, 1, "num_iterations"), as_key(key)
    compiled = _compile(loss_fn, params)
    # Ours and not matfree's, whose loop is compiled whole: see hessian_trace.
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
    # Lanczos squares the products, so they are brought near 1.
    size = jnp.max(jnp.abs(first))
    scale = jnp.where(size == 0, 1, size)

    def iterate(i, lanczos):
        return _add_vector(i, product(lanczos[0][i]) / scale, lanczos)

    lanczos = _first_vector(start, num_iterations=num_iterations)
    # The first vector is the start, brought to length 1.
    lanczos = _add_vector(0, first / scale / jnp.linalg.norm(start), lanczos)
    _, projected = fori_loop(1, num_iterations, iterate, lanczos)
    return scale * _top_ritz_value(projected)


def _hessian_product(loss, theta):
    _, product = jax.linearize(jax.grad(loss), theta)
    return lambda v: product(varying_like(v, theta))


@partial(jax.jit, static_argnames="num_iterations")
def _first_vector(start, *, num_iterations):
    """(vectors (J, P), the first one of length 1; projected (J, J), 0)."""
    vectors = varying_like(jnp.zeros((num_iterations, start.size), start.dtype), start)
    projected = varying_like(jnp.zeros((num_iterations, num_iterations), start.dtype), start)
    return vectors.at[0].set(start / jnp.linalg.norm(start)), projected


@jax.jit
@jax.default_matmul_precision("highest")
def _add_vector(i, product, lanczos):
    """Column i of the projected matrix and vector i + 1, from the product with vector i."""
    vectors, projected = lanczos
    column = vectors @ product
    product = product - column @ vectors
    # Twice: one pass leaves rounding along the earlier vectors.
    product = product - (vectors @ product) @ vectors
    length = jnp.linalg.norm(product)
    # After the last vector there is no place for either. A length of 0 ends what counts.
    projected = projected.at[:, i].set(column.at[i + 1].set(length, mode="drop"))
    following = product / jnp.where(length == 0, 1, length)
    return vectors.at[i + 1].set(following, mode="drop"), projected


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
      ValueError: `rho` negative or not finite (outside jit; under jit NaN), and as
        `squared_gradient_norm`.
    """
    rho = as_scalar(rho, "rho")
    rho = nan_where(~(rho < jnp.inf), rho, "rho", "must be 0 or more and finite")
    return _compile(loss_fn, params)(params, rho, measure=_sharpness)


def _sharpness(loss, theta, rho):
    value, gradient = jax.value_and_grad(loss)(theta)
    # Normalised by the largest entry first: squares of tiny gradients would be 0.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(gradient)))
    moves = largest != 0
    direction = jnp.where(moves, gradient / jnp.where(moves, largest, 1), 1)
    step = jnp.where(moves, rho * direction / jnp.sqrt(jnp.sum(direction**2)), 0)
    return loss(theta + step) - value


def _compile(loss_fn: LossFn, params: Any) -> Callable:
    """Checks both; returns (params, *arguments, measure) -> measure(loss, theta, *arguments).

    The measure is static; the loss it gets is a function of one flat vector in float32.
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
        raise ValueError("params hold no number; at least 1 parameter is needed")
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
