"""Some images of each class: as many of each as asked for, the same ones for the same seed."""

import numpy as np
import pytest
from PIL import Image

from gc_nc.data.class_splits import ClassSplit, divide_by_class
from gc_nc.data.datasets import make_dataset
from gc_nc.data.streamed_images import StreamedImages
from gc_nc.data.subsets import limit_images_per_class
from gc_nc.errors import InputError
from gc_nc.runs.run_data import load_run_data


@pytest.fixture
def divided():
    """Five classes of 20 images that hold their own number; two of them are held."""
    labels = np.random.default_rng(0).permutation(np.arange(100) % 5)
    images = np.zeros((100, 4, 4), np.uint8)
    images[:, 0, 0] = np.arange(100)
    images[:, 1, 1] = labels
    dataset = make_dataset("x", (images[:80], labels[:80]), (images[80:], labels[80:]), 5)
    return divide_by_class(dataset, ClassSplit("random", counts=(3, 2), seed=1, holdout=0.25))


def numbers(split):
    return list(split.images[:, 0, 0, 0])


def test_as_many_of_each_class_with_their_own_labels(divided):
    limited = limit_images_per_class(divided, train=7, test=3, held=11, seed=0)
    for split, count in ((limited.source.train, 7), (limited.source.test, 3)):
        assert list(np.bincount(split.labels)) == [count] * 3
    assert list(np.bincount(limited.target.labels)) == [11] * 2
    names = limited.source.class_names
    for split in (limited.source.train, limited.source.test):
        assert [str(c) for c in split.images[:, 1, 1, 0]] == [names[i] for i in split.labels]
    assert set(numbers(limited.source.train)) <= set(numbers(divided.source.train))
    assert not set(numbers(limited.source.train)) & set(numbers(limited.source.test))


def test_none_leaves_a_part_as_it_is(divided):
    limited = limit_images_per_class(divided, train=7)
    assert limited.source.test is divided.source.test
    assert limited.target is divided.target
    assert len(limited.source.train.labels) == 21


def test_a_larger_number_includes_the_smaller_and_the_seed_decides(divided):
    few = limit_images_per_class(divided, train=5, seed=3)
    more = limit_images_per_class(divided, train=9, seed=3)
    other = limit_images_per_class(divided, train=5, seed=4)
    assert set(numbers(few.source.train)) < set(numbers(more.source.train))
    assert numbers(few.source.train) == sorted(
        numbers(few.source.train), key=numbers(divided.source.train).index
    )
    assert set(numbers(few.source.train)) != set(numbers(other.source.train))


def test_more_than_a_class_has_names_the_key_the_class_and_the_most(divided):
    with pytest.raises(
        InputError, match=r"train_images_per_class=16, but class '\d' has 15 train images; .* 15"
    ):
        limit_images_per_class(divided, train=16)
    with pytest.raises(InputError, match=r"held_images_per_class=21, .* has 20 target images"):
        limit_images_per_class(divided, held=21)


def test_of_a_set_that_can_be_streamed_only_what_is_asked_for_is_read(folder_run, monkeypatch):
    config, _ = folder_run
    config.data.train_images_per_class, config.data.test_images_per_class = 3, 2
    config.data.holdout = 0.25
    whole = load_run_data(config, None).source
    read, opened = [], Image.open
    monkeypatch.setattr(Image, "open", lambda path: read.append(path) or opened(path))
    source = load_run_data(config, None).source
    assert len(read) == 2 * (3 + 2)
    assert isinstance(source.train.images, np.ndarray)
    np.testing.assert_array_equal(source.train.images, whole.train.images)
    config.data.streaming = True
    streamed = load_run_data(config, None).source
    assert isinstance(streamed.train.images, StreamedImages)
    np.testing.assert_array_equal(streamed.train.images[:], source.train.images)
