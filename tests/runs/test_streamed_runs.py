"""A run whose images are read while it trains is the run whose images are in memory."""

from pathlib import Path

import pytest

from gc_nc.data.streamed_images import StreamedImages
from gc_nc.measurement.full_measurement import measure_run
from gc_nc.runs import loop, run_data, run_directory
from gc_nc.runs.checkpoints import StorageError
from gc_nc.runs.finished_run import open_run
from gc_nc.runs.progress import Progress
from tests.rounding import NUM_TERMS, assert_same_numbers

# Of 8 steps, one after another.
TERMS = 8 * NUM_TERMS


def without_clock(workdir):
    return [
        {name: value for name, value in record.items() if "per_sec" not in name}
        for record in run_directory.read_records(workdir)
    ]


def streamed(config):
    other = config.copy_and_resolve_references()
    with other.unlocked():
        other.data.streaming = True
    return other


def test_a_streamed_run_is_the_resident_one_also_when_it_goes_on(folder_run, monkeypatch):
    config, workdir = folder_run
    config.batch_size = 5
    places = [workdir.with_name(name) for name in ("resident", "streamed")]
    results = loop.train(config, places[0])
    config = streamed(config)

    advance, steps = Progress.advance, []

    def die(self):
        advance(self)
        steps.append(1)
        if len(steps) == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "advance", die)
        with pytest.raises(KeyboardInterrupt):
            loop.train(config, places[1])
    with monkeypatch.context() as patch:
        # A run that goes on does not read all images to normalise them.
        patch.setattr(run_data, "channel_normalization", None)
        assert_same_numbers(loop.train(config, places[1])["metrics"], results["metrics"], TERMS)
    assert_same_numbers(without_clock(places[1]), without_clock(places[0]), TERMS)
    runs = [open_run(place) for place in places]
    assert isinstance(runs[1].dataset.train.images, StreamedImages)
    assert_same_numbers(*(run.variables(8) for run in reversed(runs)), TERMS)


@pytest.mark.slow
def test_what_measures_a_streamed_run_streams_too(folder_run):
    config, workdir = folder_run
    places = [workdir.with_name(name) for name in ("resident", "streamed")]
    for place, of_place in zip(places, (config, streamed(config)), strict=True):
        loop.train(of_place, place)
    runs = [open_run(place) for place in places]
    options = {"steps": (8,), "splits": ("train",), "flatness_examples": 0}
    measured = [
        next(measure_run(run, gc_examples=6, gc_probes=1, report=lambda _: None, **options))
        for run in runs
    ]
    assert_same_numbers(*(dict(step[1]["train"].values) for step in reversed(measured)), TERMS)


@pytest.mark.slow
def test_an_image_that_breaks_meanwhile_saves_and_the_run_goes_on_once_it_is_mended(
    folder_run, monkeypatch, capsys
):
    config, workdir = folder_run
    config = streamed(config)
    config.num_steps, config.evaluation.every_steps, config.data.standardize = 30, 0, False
    # More batches than are read ahead.
    config.checkpoint.every_steps = 0
    unbroken = loop.train(config, workdir.with_name("unbroken"))
    whole = {path: path.read_bytes() for path in Path(config.data.data_dir).rglob("*.png")}
    advance = Progress.advance

    def break_images(self):
        for path in whole:
            path.write_bytes(b"no image")
        advance(self)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "advance", break_images)
        with pytest.raises(
            StorageError, match=r"not an image that can be read.* resumes from step \d+$"
        ) as error:
            loop.train(config, workdir)
    step = str(error.value).rpartition(" ")[2]
    assert (workdir / "checkpoints" / step).is_dir()
    for path, content in whole.items():
        path.write_bytes(content)
    assert loop.train(config, workdir) == unbroken
    assert f"resuming from the checkpoint of step {step}\n" in capsys.readouterr().out
    assert without_clock(workdir) == without_clock(workdir.with_name("unbroken"))
