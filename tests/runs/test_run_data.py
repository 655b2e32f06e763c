"""What is said of a run's data before it begins."""

import numpy as np
import pytest

from gc_nc.runs.configuration import default_config
from gc_nc.runs.run_data import load_run_data


@pytest.mark.parametrize(
    ("train", "test", "said"),
    [
        ((0, 1, 2), (2, 1, 0), ""),
        (
            (1, 2, 3),
            (1, 2, 3),
            "no train images of 1 of 4 classes (0); no test images of 1 of 4 classes (0)",
        ),
        ((0, 1, 2), (0, 1, 1), "no test images of 1 of 3 classes (2)"),
        ((0, 1, 0), (0, 3, 4), "no train images of 3 of 5 classes (2, 3, 4); no test images of 2"),
    ],
)
def test_classes_without_images_are_named(tmp_path, capsys, train, test, said):
    images = np.zeros((3, 4, 4), np.uint8)
    path = tmp_path / "x.npz"
    np.savez(path, x_train=images, y_train=train, x_test=images, y_test=test)
    config = default_config()
    config.data.source, config.data.name, config.data.data_dir = "npz", "mine", str(path)
    load_run_data(config)
    line = capsys.readouterr().err
    assert line.startswith(f"mine: {said}") if said else not line
    assert line.count("\n") == bool(said)
