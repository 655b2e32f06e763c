"""VGG in its CIFAR form (Simonyan and Zisserman, arXiv 1409.1556)."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float

from gc_nc.array_types import Array
from gc_nc.models import layers

#: Output channels of the 3x3 convolutions of each stage (columns A and B of the paper's table 1).
VGG_STAGES = {
    11: ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    13: ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512)),
}


class VGG(nn.Module):
    """Stages of 3x3 convolutions and ReLU, each followed by max pooling, then a linear head.

    In this CIFAR form the embedding is the mean over the map that is left after the last pooling
    (1x1 for images of at most 32x32), with 512 * width features. One linear layer replaces the
    three of the ImageNet form, and there is no dropout.
    """

    stages: tuple[tuple[int, ...], ...]
    num_classes: int
    width: float = 1.0
    batch_norm: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "B H W c"], *, train: bool = False
    ) -> tuple[Float[Array, "B C"], Float[Array, "B K"]]:
        """Returns (logits, embedding); the embedding is what the head sees."""
        x = images
        for i, stage in enumerate(self.stages, start=1):
            for j, channels in enumerate(stage, start=1):
                x = layers.ConvNorm(
                    layers.scaled_width(channels, self.width),
                    batch_norm=self.batch_norm,
                    dtype=self.dtype,
                    name=f"stage{i}_conv{j}",
                )(x, train=train)
                x = layers.relu(x)
            x = layers.max_pool(x)
            self.sow("intermediates", f"stage{i}_output", x)
        embedding = layers.spatial_mean(x)
        logits = layers.head(self.num_classes, dtype=self.dtype)(embedding)
        return logits.astype(jnp.float32), embedding
