"""What the networks are compared with: convolution in NumPy and float64, and random variables."""

import jax
import numpy as np


def random_variables(model, images):
    """Every parameter and statistic drawn in (0.5, 1.5) or small: nothing is left at 0 or 1."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images))
    rng = np.random.default_rng(0)

    def draw(leaf):
        if leaf.ndim == 1:
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        return (rng.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))).astype(np.float32)

    return jax.tree.map(draw, shapes)


def convolution(x, kernel, strides=1):
    """Of (B, H, W, c) by (k, k, c, C), padded by k // 2 on both sides as torchvision has it."""
    pad, size = kernel.shape[0] // 2, kernel.shape[:2]
    x = np.pad(x.astype(np.float64), ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, size, axis=(1, 2))
    windows = windows[:, ::strides, ::strides]
    return np.einsum("bhwcij,ijcd->bhwd", windows, kernel.astype(np.float64), optimize=True)
