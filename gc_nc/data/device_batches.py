"""The order, normalisation and augmentation of batches of images."""

from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Shaped, UInt8

from gc_nc.array_types import Array
from gc_nc.data.streamed_images import StreamedImages
from gc_nc.errors import InputError
from gc_nc.random_streams import stream_generator


class Normalization(NamedTuple):
    """Model input = (pixel / 255 - mean) / std, per channel; hashable, for static arguments.

    It sets the units of geometric complexity: dividing pixels in [0, 1] by std multiplies GC by
    std^2.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Augmentation(NamedTuple):
    """Random crops after zero padding of the pixels, and left-right flips; both off by default."""

    crop_padding: int = 0
    flip: bool = False


def channel_normalization(
    images: UInt8[np.ndarray, "N H W c"] | StreamedImages,
) -> Normalization:
    """The normalization that gives each channel of these images mean 0 and standard deviation 1.

    A constant channel is only centred. Streamed images are all read, once.
    """
    levels = np.arange(256) / 255
    mean, std = [], []
    # Counting the 256 levels is exact, needs no float copy of the set, and can be done in blocks.
    streamed = isinstance(images, StreamedImages)
    blocks = images.blocks("counting pixel values") if streamed else (images,)
    for counts in sum(map(_count_levels, blocks)):
        mean.append(float(np.average(levels, weights=counts)))
        variance = float(np.average((levels - mean[-1]) ** 2, weights=counts))
        # If there is only one level, the variance is a rounding error.
        std.append(variance**0.5 if np.count_nonzero(counts) > 1 else 1.0)
    return Normalization(tuple(mean), tuple(std))


def _count_levels(images: UInt8[np.ndarray, "N H W c"]) -> Int[np.ndarray, "c 256"]:
    channels = range(images.shape[-1])
    return np.stack([np.bincount(images[..., c].ravel(), minlength=256) for c in channels])


def identity_normalization(num_channels: int) -> Normalization:
    """The normalization that only scales pixels to [0, 1]."""
    return Normalization((0.0,) * num_channels, (1.0,) * num_channels)


def normalize(
    images: Shaped[Array, "B H W c"], normalization: Normalization
) -> Float[Array, "B H W c"]:
    """Turns pixels in 0..255 into float32 model inputs."""
    mean = jnp.asarray(normalization.mean, jnp.float32)[None, None, None]
    std = jnp.asarray(normalization.std, jnp.float32)[None, None, None]
    return (images.astype(jnp.float32) / 255 - mean) / std


def augment(
    key: jax.Array, images: UInt8[Array, "B H W c"], augmentation: Augmentation
) -> UInt8[Array, "B H W c"]:
    """Crops and flips each image independently; without augmentation, returns the images.

    A key gives the same result whether or not 64 bits are enabled.
    """
    crop_key, flip_key = jax.random.split(key)
    batch, *shape = images.shape
    pad = augmentation.crop_padding
    if pad:
        padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        corners = jax.random.randint(crop_key, (batch, 2), 0, 2 * pad + 1, jnp.int32)
        corners = jnp.pad(corners, ((0, 0), (0, 1)))
        images = jax.vmap(lambda image, corner: jax.lax.dynamic_slice(image, corner, shape))(
            padded, corners
        )
    if augmentation.flip:
        flips = jax.random.bernoulli(flip_key, jnp.float32(0.5), (batch,))
        images = jnp.where(flips[:, None, None, None], images[:, :, ::-1], images)
    return images


class ExampleOrder:
    """Which examples each step sees: epochs of fresh permutations, end to end.

    A batch may span two epochs, so that every epoch visits every example exactly once for any
    batch size. The permutation of an epoch depends only on the seed and the epoch: NumPy draws it,
    so it is the same on every device.
    """

    def __init__(self, seed: int, num_examples: int, batch_size: int):
        """Raises InputError if a batch is larger than the set."""
        if batch_size > num_examples:
            raise InputError(
                f"batch_size={batch_size} is more than the {num_examples} training examples;"
                " set --config.batch_size lower"
            )
        self._seed = seed
        self._num_examples = num_examples
        self._batch_size = batch_size
        self._epoch = -1
        self._order = None
        # Near the end of an epoch, read-ahead threads ask for batches of both epochs in any order.
        self._permutation = lru_cache(maxsize=3)(self._draw_permutation)

    def _draw_permutation(self, epoch: int) -> Int[np.ndarray, "N"]:
        return stream_generator(self._seed, "order of an epoch", epoch).permutation(
            self._num_examples
        )

    def locate(self, step: int) -> tuple[Int[jax.Array, "M"], int]:
        """The (device-resident) order and the offset at which the batch of this step starts."""
        epoch, offset = divmod(step * self._batch_size, self._num_examples)
        if epoch != self._epoch:
            following = self._permutation(epoch + 1)[: self._batch_size - 1]
            order = np.concatenate([self._permutation(epoch), following])
            self._order = jnp.asarray(order, jnp.int32)
            self._epoch = epoch
        return self._order, offset

    def indices(self, step: int) -> Int[np.ndarray, "B"]:
        """The examples of one step, computed on the host; safe to call from any thread."""
        epoch, offset = divmod(step * self._batch_size, self._num_examples)
        batch = self._permutation(epoch)[offset : offset + self._batch_size]
        if missing := self._batch_size - len(batch):
            batch = np.concatenate([batch, self._permutation(epoch + 1)[:missing]])
        return batch.astype(np.int32)
