"""Makes the TFDS directory of a data set from its official archive. TensorFlow is not needed.

    python -m experiments.prepare --dataset=cifar10 --data_dir=DIR [--archive=PATH]

Downloads the archive to DIR/downloads, or reads a copy of it: the tar.gz of CIFAR, or a folder with
the four files of MNIST or Fashion-MNIST. `tfds.data_source` reads the result.
"""

import sys
import tempfile
from pathlib import Path

import tensorflow_datasets as tfds
from absl import flags, logging

from experiments import launcher
from gc_nc.data import downloads, official_archives, tfds_writer
from gc_nc.errors import InputError

_NAMES = list(official_archives.READERS)
# Not marked as required: that would hold for every program that imports this module.
_DATASET = flags.DEFINE_enum("dataset", None, _NAMES, "The data set to prepare.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder of TFDS directories to write to.")
_ARCHIVE = flags.DEFINE_string(
    "archive",
    None,
    "Copy of the official archive: CIFAR's tar.gz, or a folder of IDX files. Default: download it.",
)


def main(argv: list[str]) -> None:
    """Prepares one data set, or says that it is already there."""
    del argv
    if not _DATASET.value or not _DATA_DIR.value:
        raise InputError(f"pass --dataset (one of {', '.join(_NAMES)}) and --data_dir, a folder")
    try:
        _prepare(_DATASET.value, Path(_DATA_DIR.value).expanduser())
    except OSError as error:
        raise InputError(f"{error}: check --data_dir={_DATA_DIR.value} and --archive") from error


def _prepare(name: str, data_dir: Path) -> None:
    counts = tfds_writer.count_examples(name, data_dir)
    done = "already there" if counts else "prepared"
    if not counts:
        # Before a long download: can the result be written?
        data_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=data_dir).close()
        archive = official_archives.READERS[name](_obtain_files(name, data_dir))
        if not sys.stderr.isatty():
            tfds.disable_progress_bar()
        tfds_writer.write_dataset(name, archive, data_dir)
        counts = tfds_writer.count_examples(name, data_dir)
    sizes = ", ".join(f"{split} {count}" for split, count in counts.items())
    print(
        f"{done}: {tfds_writer.dataset_dir(name, data_dir)} ({sizes}); use it with "
        f"--config.data.source=tfds --config.data.name={name} --config.data.data_dir={data_dir}"
    )


def _obtain_files(name: str, data_dir: Path) -> dict[str, Path]:
    official = tfds_writer.official_files(name)
    if _ARCHIVE.value is None:
        # A folder each: MNIST's and Fashion-MNIST's files have the same names.
        files = {file: data_dir / "downloads" / name / file for file in official}
        for file, (url, size, sha256) in official.items():
            downloads.download(url, files[file], size=size, sha256=sha256)
        return files
    files = official_archives.locate_files(Path(_ARCHIVE.value).expanduser(), list(official))
    for file, path in files.items():
        if path.name.replace(".idx", "-idx") == file.removesuffix(".gz"):
            logging.warning("%s is unpacked, so only its format is checked, not a checksum", path)
        else:
            downloads.check_sha256(path, official[file].sha256, fix=f"get {official[file].url}")
    return files


if __name__ == "__main__":
    launcher.run(main)
