"""Geometric complexity as a term of the training loss, from one forward pass.

The gradient of GC with respect to the parameters is a second derivative of the network. It is
computed in reverse mode through the Jacobian products below.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Shaped

from gc_nc.array_types import Array, as_floating, as_numbers, check_whole, described
from gc_nc.metrics.argument_checks import as_key, check_function
from gc_nc.metrics.jacobian_estimators import signs
from gc_nc.metrics.jacobian_products import varying_like
from gc_nc.metrics.traced_functions import outside_transformations

#: The allowed values of `method`.
PENALTY_METHODS = ("output_probes", "input_probes", "exact")
#: The largest number of dimensions for "exact", since each one costs a product and stores
# activations.
MAX_EXACT_DIM = 64


def geometric_complexity_with_outputs(
    network: Callable[[Array], tuple[Array, Any]],
    inputs: Shaped[Array, "B ..."],
    key: jax.Array,
    *,
    method: str = "output_probes",
    num_probes: int = 1,
) -> tuple[Float[Array, ""], Any]:
    """An unbiased estimate of 1/B sum_b |J(x_b)|_F^2 and the other outputs of the same pass.

    J is the Jacobian of the network's first output in its input. With random signs v and u, drawn
    separately for each example:

    * `output_probes`: mean of |J^T v|^2, one VJP each (arXiv 1908.02729 has the idea for logits).
      It shares the forward pass: a step with one probe has twice the FLOPs of a plain step.
    * `input_probes`: mean of |J u|^2, one JVP each.
    * `exact`: all rows of J, K VJPs; for logits of few classes. `key` and `num_probes` are ignored.

    Add it to a loss, as in `loss + weight * gc`, and differentiate by whatever the network closes
    over: its gradient is an unbiased estimate of the gradient of GC. In a training loop take a new
    key each step, such as `jax.random.fold_in(key, step)`; logits for the loss are among the other
    outputs, from the same forward pass. With BatchNorm or dropout in training mode examples mix or
    the network is random: give the network in evaluation mode, and run it a second time for the
    loss.

    Unlike the metrics, it computes in the network's own precision, as the rest of the loss does,
    and does not compile anything: call it inside your own jit.

    Args:
      network: pure function (B, *input) -> ((B, K), other outputs) in which examples do not mix.
      inputs: (B, *input) inputs; integers and float64 are cast to float32.
      key: a JAX random key, for the signs.
      method: one of PENALTY_METHODS.
      num_probes: number of products for each example.

    Returns:
      The estimate, float32, in (output units / input units)^2, and the other outputs.

    Raises:
      ValueError: there are no examples, the method is unknown, `num_probes` is below 1, K is above
        64 with `exact`, or the network does not return such a pair.
    """
    if method not in PENALTY_METHODS:
        raise ValueError(f"method={method!r} is not one of: {', '.join(PENALTY_METHODS)}")
    num_probes, key = check_whole(num_probes, 1, "num_probes"), as_key(key)
    check_function(network, "network", "(B, *input) -> ((B, K), other outputs)")
    inputs = as_numbers(inputs, "inputs")
    keeps = jnp.issubdtype(inputs.dtype, jnp.floating) and inputs.dtype.itemsize < 8
    inputs = jnp.asarray(inputs) if keeps else as_floating(inputs, "inputs")
    if inputs.ndim == 0 or inputs.shape[0] == 0:
        raise ValueError(f"inputs of shape {inputs.shape} have no examples; at least 1 is needed")
    network = partial(_checked, network)
    # The derivative by inputs that all devices of a shard_map share would be summed over them.
    inputs = _varying_like(inputs, jax.eval_shape(lambda x: network(x)[0], inputs))

    if method == "input_probes":
        # Drawn flat, since XLA's CPU compiler takes seconds for random numbers of a rank-4 shape.
        drawn = signs(key, (num_probes, inputs.size)).astype(inputs.dtype)
        drawn = _varying_like(drawn, inputs)
        products, others = [], None
        for tangent in drawn.reshape(num_probes, *inputs.shape):
            _, product, others = jax.jvp(network, (inputs,), (tangent,), has_aux=True)
            products.append(product)
        return _mean_square(products, inputs.shape[0]), others

    outputs, vjp_fn, others = jax.vjp(network, inputs, has_aux=True)
    if method == "output_probes":
        drawn = signs(key, (num_probes, *outputs.shape)).astype(outputs.dtype)
        drawn = _varying_like(drawn, outputs)
        # Unrolled: there are few probes, and a loop would slow convolutions on the CPU.
        products = [vjp_fn(cotangent)[0] for cotangent in drawn]
        return _mean_square(products, inputs.shape[0]), others

    dim = outputs.shape[1]
    if dim > MAX_EXACT_DIM:
        raise ValueError(
            f"method='exact' takes a product for each dimension, and there are {dim}; at most"
            f" {MAX_EXACT_DIM} are allowed, so use output_probes"
        )
    rows = jnp.broadcast_to(jnp.eye(dim, dtype=outputs.dtype)[:, None], (dim, *outputs.shape))
    (products,) = jax.vmap(vjp_fn)(_varying_like(rows, outputs))
    return dim * _mean_square(list(products), inputs.shape[0]), others


def _varying_like(array, like) -> jax.Array:
    """`array`, as one that differs between the devices of a shard_map if `like` does.

    Nothing is mapped outside of a program, where an Explicit mesh would refuse the sum.
    """
    return array if outside_transformations() else varying_like(array, like)


def _checked(network, inputs):
    returned = network(inputs)
    if not isinstance(returned, tuple) or len(returned) != 2:
        what = f"a tuple of {len(returned)}" if isinstance(returned, tuple) else described(returned)
        raise ValueError(
            f"network returned {what}; a pair is needed: the output to penalise, (B, K), and other"
            " outputs, as in lambda x: (embed(x), None)"
        )
    outputs = returned[0]
    shape, dtype = jnp.shape(outputs), jnp.result_type(outputs)
    if len(shape) != 2 or shape[0] != len(inputs):
        raise ValueError(
            f"network's first output has shape {shape} for {len(inputs)} examples; ({len(inputs)},"
            " K) is needed"
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"network's first output is {dtype}; floating point is needed")
    return returned


def _mean_square(products, num_examples):
    """Returns squared norms, summed over entries and averaged over examples and products."""
    total = sum(jnp.sum(product.astype(jnp.float32) ** 2) for product in products)
    return total / (num_examples * len(products))
