"""ResNet in its CIFAR form (He et al., arXiv 1512.03385)."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float

from gc_nc.array_types import Array
from gc_nc.models import layers

#: Number of blocks of each stage, and whether they are bottlenecks (table 1 of the paper).
RESNET_STAGES = {18: ((2, 2, 2, 2), False), 50: ((3, 4, 6, 3), True)}

_BOTTLENECK_EXPANSION = 4


class ResidualBlock(nn.Module):
    """relu(F(x) + shortcut(x)); F is two 3x3 convolutions, or a 1x1, 3x3, 1x1 bottleneck.

    The stride sits on the first 3x3 convolution; the shortcut is a 1x1 convolution where the shape
    changes and the identity elsewhere.
    """

    channels: int
    strides: int
    bottleneck: bool
    batch_norm: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B H W c"], *, train: bool) -> Float[Array, "B h w C"]:
        """Returns the block's output after its last ReLU."""
        # (features, kernel size, strides) of each convolution of F.
        if self.bottleneck:
            out_channels = self.channels * _BOTTLENECK_EXPANSION
            plan = (
                (self.channels, 1, 1),
                (self.channels, 3, self.strides),
                (out_channels, 1, 1),
            )
        else:
            out_channels = self.channels
            plan = ((out_channels, 3, self.strides), (out_channels, 3, 1))

        def conv(features, kernel_size, strides, name):
            return layers.ConvNorm(
                features, kernel_size, strides, self.batch_norm, self.dtype, name=name
            )

        y = x
        for i, (features, kernel_size, strides) in enumerate(plan, start=1):
            y = conv(features, kernel_size, strides, f"conv{i}")(y, train=train)
            if i < len(plan):
                y = layers.relu(y)
        if x.shape != y.shape:
            x = conv(out_channels, 1, self.strides, "shortcut")(x, train=train)
        return layers.relu(x + y)


class ResNet(nn.Module):
    """A 3x3 stem, four stages of residual blocks, global mean (the embedding) and a linear head.

    In this CIFAR form the stem has stride 1 and no max pooling follows it. The embedding has
    512 * width features, or 2048 * width with bottlenecks.
    """

    stages: tuple[int, ...]
    bottleneck: bool
    num_classes: int
    width: float = 1.0
    batch_norm: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "B H W c"], *, train: bool = False
    ) -> tuple[Float[Array, "B C"], Float[Array, "B K"]]:
        """Returns (logits, embedding); the embedding is what the head sees."""
        channels = layers.scaled_width(64, self.width)
        x = layers.ConvNorm(channels, batch_norm=self.batch_norm, dtype=self.dtype, name="stem")(
            images, train=train
        )
        x = layers.relu(x)
        self.sow("intermediates", "stem_output", x)
        for i, num_blocks in enumerate(self.stages):
            for j in range(num_blocks):
                x = ResidualBlock(
                    channels=layers.scaled_width(64 * 2**i, self.width),
                    strides=2 if i > 0 and j == 0 else 1,
                    bottleneck=self.bottleneck,
                    batch_norm=self.batch_norm,
                    dtype=self.dtype,
                    name=f"stage{i + 1}_block{j + 1}",
                )(x, train=train)
            self.sow("intermediates", f"stage{i + 1}_output", x)
        embedding = layers.spatial_mean(x)
        logits = layers.head(self.num_classes, dtype=self.dtype)(embedding)
        return logits.astype(jnp.float32), embedding
