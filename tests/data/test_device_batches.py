"""Order, normalisation and augmentation of device-resident batches."""

from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from gc_nc.data.device_batches import (
    Augmentation,
    ExampleOrder,
    augment,
    channel_normalization,
    identity_normalization,
    normalize,
)
from gc_nc.errors import InputError
from tests.rounding import assert_same_numbers, rounding

augmented = jax.jit(augment, static_argnums=2)


@pytest.mark.parametrize("batch_size", [1, 3, 10])
def test_every_epoch_visits_every_example_once(batch_size):
    order = ExampleOrder(0, 10, batch_size)
    seen = np.concatenate([order.indices(step) for step in range(3 * 10)])[:30]
    epochs = seen.reshape(3, 10)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(10))
    assert not np.array_equal(epochs[0], epochs[1])


def test_r4_a_run_that_goes_on_sees_exactly_the_examples_not_yet_seen():
    before, after = ExampleOrder(0, 10, 2), ExampleOrder(0, 10, 2)
    seen = np.concatenate([before.indices(step) for step in range(3)])
    rest = np.concatenate([after.indices(step) for step in range(3, 5)])
    assert sorted({*seen, *rest}) == list(range(10))
    assert len(rest) == 4


def test_order_is_a_function_of_seed_and_epoch_alone():
    by_three, by_five = ExampleOrder(7, 15, 3), ExampleOrder(7, 15, 5)
    np.testing.assert_array_equal(
        np.concatenate([by_three.indices(step) for step in range(10)]),
        np.concatenate([by_five.indices(step) for step in range(6)]),
    )
    # Nor does it depend on where one starts.
    np.testing.assert_array_equal(by_three.indices(8), ExampleOrder(7, 15, 3).indices(8))
    assert not np.array_equal(by_three.indices(0), ExampleOrder(8, 15, 3).indices(0))


def test_indices_are_those_that_are_located_whatever_thread_asks_for_them():
    order = ExampleOrder(3, 10, 4)
    steps = np.random.default_rng(0).integers(0, 50, 200).tolist()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(order.indices, steps))
    for step, indices in zip(steps, found, strict=True):
        located, offset = order.locate(step)
        np.testing.assert_array_equal(indices, located[offset : offset + 4], strict=True)


def test_a_batch_larger_than_the_set_is_refused():
    with pytest.raises(InputError, match="batch_size=11 is more than the 10"):
        ExampleOrder(0, 10, 11)


def test_normalization_gives_mean_0_and_variance_1_a_channel():
    images = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 3), dtype=np.uint8)
    images[..., 1] //= 3
    images[..., 2] = 7
    normalization = channel_normalization(images)
    pixels = images.astype(np.float64) / 255
    # In float64: far inside the tolerance of float32.
    np.testing.assert_allclose(normalization.mean, pixels.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(normalization.std[:2], pixels.std((0, 1, 2))[:2], rtol=1e-12)
    # A channel without variation cannot be scaled.
    assert normalization.std[2] == 1
    inputs = np.asarray(normalize(images, normalization), np.float64)
    np.testing.assert_allclose(inputs.mean((0, 1, 2)), [0, 0, 0], atol=rounding())
    np.testing.assert_allclose(inputs.std((0, 1, 2)), [1, 1, 0], atol=rounding())


def test_identity_normalization_is_pixels_in_0_to_1():
    images = np.array([0, 51, 255], np.uint8).reshape(3, 1, 1, 1)
    inputs = normalize(images, identity_normalization(1)).ravel()
    assert_same_numbers(inputs, np.array([0, 0.2, 1]))


def test_augmentation_is_off_by_default():
    images = np.arange(48, dtype=np.uint8).reshape(3, 4, 4, 1)
    np.testing.assert_array_equal(augment(jax.random.key(0), images, Augmentation()), images)


def test_flips_are_half_of_the_images_and_nothing_else():
    images = np.tile(np.arange(16, dtype=np.uint8).reshape(1, 4, 4, 1), (200, 1, 1, 1))
    flipped = np.asarray(augmented(jax.random.key(0), images, Augmentation(flip=True)))
    is_same = (flipped == images).all((1, 2, 3))
    is_mirrored = (flipped == images[:, :, ::-1]).all((1, 2, 3))
    assert (is_same ^ is_mirrored).all()
    assert 60 < is_mirrored.sum() < 140


def test_crops_are_windows_of_the_padded_image():
    image = np.arange(1, 17, dtype=np.uint8).reshape(4, 4, 1)
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    windows = {padded[i : i + 4, j : j + 4].tobytes() for i in range(3) for j in range(3)}
    crops = augmented(jax.random.key(0), np.tile(image[None], (200, 1, 1, 1)), Augmentation(1))
    assert {np.asarray(crop).tobytes() for crop in crops} == windows


def test_the_same_is_drawn_with_64_bits_enabled():
    images = np.random.default_rng(0).integers(0, 256, (50, 4, 4, 1), dtype=np.uint8)
    expected = augmented(jax.random.key(0), images, Augmentation(1, flip=True))
    with jax.enable_x64(True):
        drawn = augmented(jax.random.key(0), images, Augmentation(1, flip=True))
    np.testing.assert_array_equal(drawn, expected)
