"""A network of fully connected layers."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float

from gc_nc.array_types import Array
from gc_nc.models import layers

#: Output features of the ReLU layers.
MLP_STAGES = (512,)


class MLP(nn.Module):
    """Flattened pixels, then fully connected ReLU layers, one per stage, then a linear head.

    The output of the last ReLU layer is the embedding. With BatchNorm, a layer is normalised
    before its ReLU.
    """

    stages: tuple[int, ...]
    num_classes: int
    width: float = 1.0
    batch_norm: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "B H W c"], *, train: bool = False
    ) -> tuple[Float[Array, "B C"], Float[Array, "B K"]]:
        """Returns (logits, embedding); the embedding is what the head sees."""
        x = images.reshape(images.shape[0], -1)
        for i, features in enumerate(self.stages, start=1):
            x = nn.Dense(
                layers.scaled_width(features, self.width),
                use_bias=not self.batch_norm,
                kernel_init=layers.he_normal,
                dtype=self.dtype,
                name=f"stage{i}_dense",
            )(x)
            if self.batch_norm:
                norm = layers.batch_norm(train=train, dtype=self.dtype, name=f"stage{i}_norm")
                x = norm(x)
            x = layers.relu(x)
            self.sow("intermediates", f"stage{i}_output", x)
        logits = layers.head(self.num_classes, dtype=self.dtype)(x)
        return logits.astype(jnp.float32), x
