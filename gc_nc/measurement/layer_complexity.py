"""Geometric complexity from the input to every layer of a network."""

import flax.linen as nn
import jax
from jaxtyping import Float, Shaped

from gc_nc import metrics
from gc_nc.array_types import Array
from gc_nc.models import embed_fn, layer_names


def geometric_complexity_by_layer(
    model: nn.Module,
    variables: dict,
    images: Shaped[Array, "B H W c"],
    key: jax.Array,
    *,
    method: str = "output_probes",
    num_probes: int = 1,
    weights: Float[Array, "B"] | None = None,
) -> dict[str, metrics.Estimate]:
    """GC of x -> layer(x) for every layer of `gc_nc.models.layer_names(model)`, in their order.

    A layer's output is flattened, so its K is height x width x channels. All layers use the same
    examples, but each has its own probes.

    Args:
      model: a network from `gc_nc.models.build_model`.
      variables: its parameters and running statistics.
      images: images in model-input units.
      key: a JAX random key.
      method: a method of `metrics.estimate_geometric_complexity`.
      num_probes: number of Jacobian products for each example and layer.
      weights: (B,), the weights of the examples.

    Returns:
      {layer: Estimate(mean, sem)}.

    Raises:
      ValueError: as `metrics.estimate_geometric_complexity`.
    """
    return {
        layer: metrics.estimate_geometric_complexity(
            embed_fn(model, variables, layer),
            images,
            jax.random.fold_in(key, i),
            method=method,
            num_probes=num_probes,
            weights=weights,
        )
        for i, layer in enumerate(layer_names(model))
    }
