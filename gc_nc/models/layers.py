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

    It preserves the variance of activations through ReLU layers; otherwise a VGG of 13 layers
    without normalisation starts with almost no signal.
    """
    # Drawn flat: XLA's CPU compiler takes 5 s for threefry on a rank-4 shape and 0.3 s on rank 1.
    flat = jax.random.normal(key, (math.prod(shape),), dtype)
    return flat.reshape(shape) * math.sqrt(2 / math.prod(shape[:-1]))


def scaled_width(channels: int, width: float) -> int:
    """Channels times the width multiplier, at least 1."""
    return max(1, round(channels * width))


def convolve(x, kernel, strides, padding, **options) -> Array:
    """`jax.lax.conv_general_dilated` of (B, H, W, c) and (k, k, c, C), computed fast on a CPU too.

    Args:
      x: (B, H, W, c).
      kernel: (kh, kw, c, C).
      strides: the strides of the window.
      padding: ((top, bottom), (left, right)).
      **options: other options of `conv_general_dilated`, as `flax.linen.Conv` sets them by default.

    Returns:
      (B, h, w, C).
    """
    height, width = x.shape[1:3]
    # If the window is larger than the map, XLA's CPU backend falls back to a loop that is up to
    # thirty times slower than its convolution.
    if jax.default_backend() != "cpu" or not (height < kernel.shape[0] and width < kernel.shape[1]):
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)
    return _convolve_small_map(x, kernel, strides, padding, options["precision"])


def _convolve_small_map(x, kernel, strides, padding, precision):
    """One matmul for each output pixel, with the slice of the kernel that covers the map there."""
    batch, *size, _ = x.shape
    # The start of the slice for output pixel i is padding - stride * i, shifted to be 0 or more.
    starts, margins = [], []
    for length, taps, stride, (before, after) in zip(
        size, kernel.shape, strides, padding, strict=False
    ):
        num_out = (length + before + after - taps) // stride + 1
        first = [before - stride * i for i in range(num_out)]
        low = max(0, -first[-1])
        margins.append((low, max(0, first[0] + length - taps)))
        starts.append([start + low for start in first])
    kernel = jnp.pad(kernel, (*margins, (0, 0), (0, 0)))
    flat = x.reshape(batch, -1)
    pixels = [
        jnp.dot(
            flat,
            kernel[i : i + size[0], j : j + size[1]].reshape(flat.shape[1], -1),
            precision=precision,
        )
        for i in starts[0]
        for j in starts[1]
    ]
    return jnp.stack(pixels, axis=1).reshape(batch, len(starts[0]), len(starts[1]), -1)


def batch_norm(*, train: bool, dtype: DTypeLike, name: str) -> nn.BatchNorm:
    """BatchNorm with momentum 0.9 and epsilon 1e-5.

    With train=False it uses running statistics, so that examples do not mix.
    """
    return nn.BatchNorm(
        use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=dtype, name=name
    )


class ConvNorm(nn.Module):
    """Convolution with SAME padding, then `batch_norm` or a bias."""

    features: int
    kernel_size: int = 3
    strides: int = 1
    batch_norm: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W c"], *, train: bool) -> Float[Array, "B h w C"]:
        """Returns (B, ceil(H / strides), ceil(W / strides), features)."""
        # "SAME" with even strides pads on the right only; the published networks pad both sides.
        pad = (self.kernel_size - 1) // 2
        x = nn.Conv(
            self.features,
            (self.kernel_size, self.kernel_size),
            strides=self.strides,
            padding=pad,
            use_bias=not self.batch_norm,
            kernel_init=he_normal,
            dtype=self.dtype,
            conv_general_dilated=convolve,
            name="conv",
        )(x)
        if self.batch_norm:
            x = batch_norm(train=train, dtype=self.dtype, name="norm")(x)
        return x


def max_pool(x: Float[Array, "B H W c"]) -> Float[Array, "B h w c"]:
    """2x2 max pooling with stride 2: (B, ceil(H / 2), ceil(W / 2), c).

    A window at an odd border pools only the entries that exist, so a 1x1 map stays as it is. If
    entries of a window tie, one of them gets the whole gradient.
    """
    batch, height, width, channels = x.shape
    lowest = jnp.asarray(-jnp.inf, x.dtype)
    x = jax.lax.pad(x, lowest, ((0, 0, 0), (0, height % 2, 0), (0, width % 2, 0), (0, 0, 0)))
    # Pair by pair, because the gradient of nn.max_pool is a scatter, which on the CPU takes a good
    # part of a whole network's Jacobian product.
    columns = x.reshape(*x.shape[:2], -1, 2, channels)
    x = _larger(columns[:, :, :, 0], columns[:, :, :, 1])
    rows = x.reshape(batch, -1, 2, *x.shape[2:])
    return _larger(rows[:, :, 0], rows[:, :, 1])


def _larger(a, b):
    """Elementwise maximum; only the larger one, a at ties, gets the gradient; NaN if one is NaN."""
    return jnp.where((a >= b) | jnp.isnan(a), a, b)


def spatial_mean(x: Float[Array, "B H W c"]) -> Float[Array, "B c"]:
    """Global average pooling."""
    return jnp.mean(x, axis=(1, 2))


#: The classifier head. Its kernel is params["head"]["kernel"], (K, C).
head = partial(nn.Dense, name="head")

relu = jax.nn.relu
