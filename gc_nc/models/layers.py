"""The one place that decides how convolutions, pooling and normalisation are computed."""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float

from gc_nc.array_types import Array


def he_normal(key, shape, dtype=jnp.float32) -> Array:
    """Normal with variance 2 / fan_in (He et al. 2015, arXiv 1502.01852).

    It keeps the variance of activations through ReLU layers, without which a VGG of 13 layers and
    no normalisation starts with next to no signal.
    """
    # Drawn flat: XLA's CPU compiler takes 5 s for threefry over a rank-4 shape, 0.3 s over rank 1.
    flat = jax.random.normal(key, (math.prod(shape),), dtype)
    return flat.reshape(shape) * math.sqrt(2 / math.prod(shape[:-1]))


def scaled_width(channels: int, width: float) -> int:
    """Channels times the width multiplier, at least 1."""
    return max(1, round(channels * width))


class ConvNorm(nn.Module):
    """Convolution with SAME padding, then BatchNorm or a bias.

    BatchNorm has momentum 0.9 and epsilon 1e-5; with train=False it uses running statistics, so
    that examples do not mix.
    """

    features: int
    kernel_size: int = 3
    strides: int = 1
    batch_norm: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W c"], *, train: bool) -> Float[Array, "B h w C"]:
        """Returns (B, ceil(H / strides), ceil(W / strides), features)."""
        # Even strides with "SAME" pad on the right only; the published networks pad both sides.
        pad = (self.kernel_size - 1) // 2
        x = nn.Conv(
            self.features,
            (self.kernel_size, self.kernel_size),
            strides=self.strides,
            padding=pad,
            use_bias=not self.batch_norm,
            kernel_init=he_normal,
            dtype=self.dtype,
            name="conv",
        )(x)
        if self.batch_norm:
            x = nn.BatchNorm(
                use_running_average=not train,
                momentum=0.9,
                epsilon=1e-5,
                dtype=self.dtype,
                name="norm",
            )(x)
        return x


def max_pool(x: Float[Array, "B H W c"]) -> Float[Array, "B h w c"]:
    """2x2 max pooling with stride 2: (B, ceil(H / 2), ceil(W / 2), c).

    An odd border is pooled over what there is, so that a 1x1 map stays as it is. Where entries of a
    window tie, one of them gets the whole gradient.
    """
    batch, height, width, channels = x.shape
    lowest = jnp.asarray(-jnp.inf, x.dtype)
    x = jax.lax.pad(x, lowest, ((0, 0, 0), (0, height % 2, 0), (0, width % 2, 0), (0, 0, 0)))
    # Pair by pair: on the CPU the gradient of nn.max_pool, which scatters, takes a good part of a
    # whole network's Jacobian product.
    columns = x.reshape(*x.shape[:2], -1, 2, channels)
    x = _larger(columns[:, :, :, 0], columns[:, :, :, 1])
    rows = x.reshape(batch, -1, 2, *x.shape[2:])
    return _larger(rows[:, :, 0], rows[:, :, 1])


def _larger(a, b):
    """Elementwise maximum of which exactly one, a at ties, gets the gradient; NaN if one is."""
    return jnp.where((a >= b) | jnp.isnan(a), a, b)


def spatial_mean(x: Float[Array, "B H W c"]) -> Float[Array, "B c"]:
    """Global average pooling."""
    return jnp.mean(x, axis=(1, 2))


#: The classifier head: its kernel is params["head"]["kernel"], (K, C).
head = partial(nn.Dense, name="head")

relu = jax.nn.relu
