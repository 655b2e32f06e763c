"""`python -m experiments.benchmarks.streaming` on few images; nothing here looks at the clock."""

import json

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments.benchmarks import streaming
from gc_nc.data.official_archives import Archive, Split
from gc_nc.data.tfds_writer import write_dataset
from gc_nc.errors import InputError


@pytest.fixture(autouse=True)
def _parsed_flags():
    flags.FLAGS.mark_as_parsed()


@pytest.mark.slow
def test_each_set_has_a_row_for_its_input_and_one_for_its_steps(tmp_path, monkeypatch, capsys):
    labels = np.arange(60) % 10
    images = np.random.default_rng(0).integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)
    splits = {split: Split(images, {"label": labels}) for split in ("train", "test")}
    write_dataset("cifar10", Archive(splits, {}), tmp_path)
    kinds = {"TFDS": ("mlp", None, None), "files": ("mlp", ("png", (40, 30)), 32)}
    monkeypatch.setattr(streaming, "_KINDS", kinds)
    for name, value in (("_WIDTH", 0.05), ("_BATCH_SIZE", 2), ("_REPETITIONS", 1), ("_STEPS", 3)):
        monkeypatch.setattr(streaming, name, value)
    with flagsaver.flagsaver(json=True, data_dir=str(tmp_path), sets=""):
        streaming.main([])
    captured = capsys.readouterr().out
    rows = [json.loads(line) for line in captured[captured.index("{") :].splitlines()]
    assert [row["goal"] for row in rows] == [1.0, 1.05] * 2
    for alone, steps in zip(rows[::2], rows[1::2], strict=True):
        # 1,000 images in batches of 2.
        assert alone["reference"] == pytest.approx(500 * steps["reference"])
        assert min(alone["ours"], steps["ours"], steps["reference"]) > 0


def test_what_is_missing_is_one_line(tmp_path):
    with flagsaver.flagsaver(data_dir=None), pytest.raises(InputError, match="--data_dir"):
        streaming.main([])
    with (
        flagsaver.flagsaver(data_dir=str(tmp_path), sets="ResNet"),
        pytest.raises(InputError, match="is in none of: TFDS, 32 px, VGG-13; "),
    ):
        streaming.main([])
