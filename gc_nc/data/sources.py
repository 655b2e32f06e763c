"""Loads sets from digits (built in), TFDS directories, IDX, image folders or NPZ files."""

import re
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from gc_nc.data.class_splits import hold_out
from gc_nc.data.datasets import ImageDataset, flat_labels, make_dataset
from gc_nc.data.folder_census import FolderCensus
from gc_nc.data.idx import find_idx_files, read_idx
from gc_nc.data.image_folders import read_image_folder
from gc_nc.data.streamed_images import StreamedImages, take_images
from gc_nc.devices import free_device_memory, free_main_memory
from gc_nc.errors import InputError, require_extra, suggestion

# Images and labels may take this share of the free memory where they are kept; the rest is for the
# network.
_RESIDENT_SHARE = 0.5
_GIB = 2**30


def load_dataset(
    source: str,
    name: str | None = None,
    data_dir: str | None = None,
    *,
    num_classes: int | None = None,
    memory_limit_gib: float | None = None,
    streaming: bool | None = None,
    image_size: int | None = None,
    classes: Sequence[str] | None = None,
    images_per_class: int | None = None,
    holdout: float = 0.2,
    holdout_seed: int = 0,
) -> ImageDataset:
    """Loads a set into memory, or leaves its images in their files until they are used.

    Args:
      source: the kind of source: "digits", "tfds", "idx", "image_folder" or "npz".
      name: the name of a TFDS set, such as "cifar10" or "cifar10:3.0.2"; for other sources, a name
        for logs.
      data_dir: the folder of TFDS directories, of IDX files in MNIST's format or of one folder per
        class, or the path of an NPZ file.
      num_classes: the number C of classes; by default the number that the source states or one
        more than the largest label.
      memory_limit_gib: the memory that the images may take; by default half of the free memory.
      streaming: whether images are read while they are used ("tfds" and "image_folder" only); by
        default they are if they do not fit into memory.
      image_size: the height and width that the images of an image folder are resized to.
      classes: the classes of an image folder to read; None for all.
      images_per_class: the number of images that each class of an image folder must have; None
        allows any number.
      holdout: the share of each class of an image folder that becomes the test split.
      holdout_seed: the seed of the choice of that test split.

    Raises:
      InputError: the source is unknown or cannot be streamed, its data is missing, broken or of
        another version, or the set does not fit into memory.
    """
    if source not in _LOADERS:
        hint = suggestion(source, _LOADERS)
        raise InputError(f"data source {source!r} is not one of {', '.join(_LOADERS)}{hint}")
    if source == "tfds" and not name:
        raise InputError("data source 'tfds' needs a set: set --config.data.name, such as cifar10")
    if source != "digits" and not data_dir:
        raise InputError(
            f"data source {source!r} needs the path of the data: set --config.data.data_dir=..."
        )

    if streaming and source not in STREAMED_SOURCES:
        raise InputError(
            f"data source {source!r} cannot be streamed, only {' and '.join(STREAMED_SOURCES)} can;"
            " leave --config.data.streaming out"
        )

    def check_fits(num_bytes: int) -> bool:
        """Whether to keep the images in memory; raises if they must be there and do not fit."""
        if streaming:
            return False
        limit, origin = _memory_limit(memory_limit_gib)
        if num_bytes <= limit:
            return True
        if streaming is None and source in STREAMED_SOURCES:
            return False
        hint = "leave --config.data.streaming out, " if source in STREAMED_SOURCES else ""
        raise InputError(
            f"{name or source} takes {num_bytes / _GIB:.3g} GiB in memory, but only"
            f" {limit / _GIB:.3g} GiB fits ({origin}); {hint}use fewer or smaller images, or raise"
            " --config.data.memory_limit_gib"
        )

    where = name or source, Path(data_dir or "").expanduser(), num_classes, check_fits
    if source == "image_folder":
        if not image_size:
            raise InputError(
                "data source 'image_folder' needs a size: set --config.data.image_size, such as 84"
            )
        return _load_image_folder(
            *where, image_size, classes, images_per_class, holdout, holdout_seed
        )
    return _LOADERS[source](*where)


def _memory_limit(memory_limit_gib: float | None) -> tuple[float, str]:
    if memory_limit_gib is not None:
        return memory_limit_gib * _GIB, "data.memory_limit_gib"
    return memory_limit(), f"{_RESIDENT_SHARE:.0%} of the free memory"


def memory_limit() -> float:
    """The number of bytes that a set's images may take by default, on the device and the host."""
    return _RESIDENT_SHARE * min(free_device_memory(), free_main_memory())


def _load_digits(name, path, num_classes, check_fits) -> ImageDataset:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels; a fifth of each class is the test set.

    Source: E. Alpaydin, C. Kaynak, UCI, "Optical recognition of handwritten digits" (test part).
    """
    del name, path, check_fits
    # Imported here because scikit-learn takes longer to import than the rest of this package.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    # The 17 grey levels 0..16 are spread over uint8.
    images = np.round(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels, test_size=0.2, stratify=labels, random_state=0
    )
    return make_dataset(
        "digits", (train_images, train_labels), (test_images, test_labels), num_classes
    )


def _load_tfds(name, data_dir, num_classes, check_fits) -> ImageDataset:
    """Reads a prepared TFDS directory without TensorFlow and without internet access."""
    require_extra("data", "tensorflow_datasets", "array_record")
    import tensorflow_datasets as tfds

    from gc_nc.data.tfds_reader import TfdsImages, read_labels

    if not re.fullmatch(r"\w+(:\d+\.\d+\.\d+)?", name):
        raise InputError(
            f"TFDS set {name!r} is not a name or name:version, such as cifar10 or cifar10:3.0.2;"
            " set --config.data.name"
        )
    name, _, version = name.partition(":")
    version_dir = _version_dir(name, version, data_dir)
    try:
        builder = tfds.builder_from_directory(version_dir)
    except Exception as error:
        raise InputError(
            f"{version_dir} is not a readable TFDS set ({type(error).__name__}: {error}); remove it"
            " and prepare it again"
        ) from error
    features = builder.info.features
    for feature in ("image", "label"):
        if feature not in features:
            raise InputError(
                f"{name} has features {list(features)}; 'image' and 'label' are needed"
            )
    for split in ("train", "test"):
        if split not in builder.info.splits:
            raise InputError(
                f"{name} has splits {list(builder.info.splits)}; 'train' and 'test' are needed"
            )
    shape = features["image"].shape
    if None in shape:
        raise InputError(f"{name} has images of differing sizes {shape}; one size is needed")
    label = features["label"]
    is_number = isinstance(label, tfds.features.Tensor) and label.shape in ((), (1,))
    if not is_number or not np.issubdtype(label.np_dtype, np.integer):
        raise InputError(
            f"{name} has labels as {type(label).__name__}; one class number per image is needed"
        )
    counts = {split: builder.info.splits[split].num_examples for split in ("train", "test")}
    in_memory = check_fits(sum(counts.values()) * int(np.prod(shape)))

    def read(split):
        source = TfdsImages(builder, split)
        images = source.read(np.arange(counts[split])) if in_memory else StreamedImages([source])
        return images, read_labels(builder, split)

    names = None
    # If the labels are plain integers, the classes have no names.
    if isinstance(label, tfds.features.ClassLabel):
        num_classes, names = num_classes or label.num_classes, tuple(label.names)
    return make_dataset(name, read("train"), read("test"), num_classes, names)


def _version_dir(name: str, version: str, data_dir: Path) -> Path:
    """The directory of the given version, or of the version that TFDS defines for the name."""
    import tensorflow_datasets as tfds

    root = data_dir / name
    pattern = re.compile(r"\d+\.\d+\.\d+")
    found = sorted(
        path.name
        for path in (root.iterdir() if root.is_dir() else ())
        if pattern.fullmatch(path.name) and (path / "dataset_info.json").is_file()
    )
    if not version:
        try:
            version = str(tfds.builder_cls(name).VERSION)
        except (tfds.core.registered.DatasetNotFoundError, AttributeError):
            # TFDS does not know a user's own set; if it has only one version, that one is read.
            if len(found) == 1:
                version = found[0]
    if version in found:
        return root / version
    has = f"it contains version {', '.join(found)}" if found else "it contains no version"
    if any(any(data_dir.glob(f"{depth}dataset_info.json")) for depth in ("", "*/")):
        has = f"it is part of a set; the folder around {name} is needed"
    raise InputError(
        f"no prepared {name}{':' + version if version else ''} in {data_dir} ({has}); prepare it"
        f" with: python -m experiments.prepare --dataset={name} --data_dir={data_dir}"
    )


def _load_idx(name, folder, num_classes, check_fits) -> ImageDataset:
    """Reads four files in MNIST's format, .gz or not, with images of any one size."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; it should hold the four IDX files of MNIST")
    files = find_idx_files(folder)
    arrays = {name: read_idx(path) for name, path in files.items()}
    check_fits(sum(array.nbytes for array in arrays.values()))
    train, test = (
        (arrays[f"{split}_images"], arrays[f"{split}_labels"]) for split in ("train", "test")
    )
    return make_dataset(name, train, test, num_classes)


def _load_npz(name, path, num_classes, check_fits) -> ImageDataset:
    """Reads x_train, y_train, x_test, y_test as in Keras, or images, labels, split (0: train).

    The file is read without pickle, so that a file from elsewhere cannot run code.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            check_fits(sum(member.file_size for member in archive.infolist()))
        with np.load(path, allow_pickle=False) as arrays:
            keys = set(arrays.files)

            def read(key):
                array = arrays[key]
                # NumPy returns bytes for files in the ZIP file that are not arrays.
                if not isinstance(array, np.ndarray):
                    raise InputError(f"{path}: {key} is not an array; store it with numpy.savez")
                return array

            if {"x_train", "y_train", "x_test", "y_test"} <= keys:
                train, test = ((read(f"x_{s}"), read(f"y_{s}")) for s in ("train", "test"))
            elif {"images", "labels", "split"} <= keys:
                split = flat_labels(read("split"))
                other = split[(split != 0) & (split != 1)]
                if other.size:
                    raise InputError(
                        f"{path}: split contains {other.flat[0].item()!r}; 0 (train) and 1 (test)"
                        " are needed"
                    )
                is_train = split == 0
                images, labels = read("images"), flat_labels(read("labels"))
                if not is_train.shape == labels.shape == images.shape[:1]:
                    raise InputError(
                        f"{path}: images {images.shape}, labels {labels.shape} and split"
                        f" {is_train.shape} differ in length"
                    )
                train, test = ((images[rows], labels[rows]) for rows in (is_train, ~is_train))
            else:
                raise InputError(
                    f"{path} contains {', '.join(sorted(keys))}; x_train, y_train, x_test, y_test"
                    " or images, labels, split (0 train, 1 test) are needed"
                )
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; give the path of an .npz file") from error
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is not a readable .npz of plain arrays: {error}") from error
    return make_dataset(name, train, test, num_classes)


def _load_image_folder(
    name, folder, num_classes, check_fits, image_size, classes, images_per_class, holdout, seed
) -> ImageDataset:
    censuses: list[FolderCensus] = []

    def report(census):
        if census.classes < 2:
            raise InputError(f"{census.line()}; neural collapse compares at least 2 classes")
        censuses.append(census)
        # Standard output is for results. Only one of several processes prints the line.
        if jax.process_index() == 0:
            print(census.line(), file=sys.stderr, flush=True)

    images, labels, class_names = read_image_folder(
        folder, image_size, classes, images_per_class, check_fits, report
    )
    parts = hold_out(labels, class_names, holdout, seed)
    train, test = ((take_images(images, rows), labels[rows]) for rows in parts)
    dataset = make_dataset(name, train, test, num_classes or len(class_names), class_names)
    return dataset._replace(census=censuses[0])


_LOADERS: dict[str, Callable[..., ImageDataset]] = {
    "digits": _load_digits,
    "tfds": _load_tfds,
    "idx": _load_idx,
    "image_folder": _load_image_folder,
    "npz": _load_npz,
}

#: The sources that `load_dataset` reads.
SOURCES = tuple(_LOADERS)

#: The sources whose images can be streamed.
STREAMED_SOURCES = ("tfds", "image_folder")
