"""The tolerance of the tests, and the check that it suffices elsewhere, can fail."""

import json
import platform

import numpy as np
import pytest

from tests import on_other_processors
from tests.margins import share_used
from tests.rounding import EPS, NUM_TERMS, assert_same_numbers, rounding


def test_sums_in_another_order_are_the_same_numbers():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100, NUM_TERMS)).astype(np.float32)
    there = np.add.accumulate(x, axis=1)[:, -1]
    back = np.add.accumulate(x[:, ::-1], axis=1)[:, -1]
    assert not np.array_equal(there, back)
    assert_same_numbers({"sums": there}, {"sums": back})


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        (1 + 1e-4, 1.0),
        ([1.0, np.nan], [1.0, 2.0]),
        ([1.0, np.inf], [1.0, 2.0]),
        ([1e-4, 1.0], [0.0, 1.0]),
        (1e-12, 0.0),
        ([1.0], [1.0, 1.0, 2.0]),
    ],
)
def test_other_numbers_are_told_apart(actual, expected):
    with pytest.raises(AssertionError):
        assert_same_numbers(np.array(actual), np.array(expected))


def test_small_entries_are_as_inexact_as_the_largest_and_nan_and_inf_equal_themselves():
    assert_same_numbers(np.array([1e-6, 1.0]), np.array([0.0, 1.0]))
    assert_same_numbers(np.array([np.nan, -np.inf, 1]), np.array([np.nan, -np.inf, 1]))
    assert rounding() == 4 * NUM_TERMS * EPS < 1e-4


@pytest.mark.parametrize(
    ("arguments", "share"),
    [
        ((1.0001, 1, 1e-3), 0.1),
        (([1.0, np.nan], [1.0, 2.0]), 0.0),
        ((0.0, 0.0), 0.0),
        ((1e-9, 0.0, 1e-5), np.inf),
        (([1, 1e-9], [1, 0], 0, 1e-8), 0.1),
        # Sampling is allowed for, not rounding.
        ((1.05, 1.0, 0.1), 0.0),
    ],
)
def test_share_of_a_tolerance(arguments, share):
    assert share_used(*arguments) == pytest.approx(share)


def test_a_number_of_threads_or_an_instruction_set_that_cannot_be_is_named(capsys):
    for arguments, message in (
        (["--threads=0"], "--threads=0 must be whole numbers of at least 1"),
        (["--isa=SSE9"], "--isa=SSE9 must be among AVX, AVX2, AVX512"),
    ):
        with pytest.raises(SystemExit, match="2"):
            on_other_processors.main(arguments)
        assert message in capsys.readouterr().err


PLANTED = """
import numpy as np

def test_close():
    np.testing.assert_allclose(1.0, 1.0 + 1e-6, rtol=1e-5)

def test_too_close():
    np.testing.assert_allclose(1.0, 1.0 + 9e-6, rtol=1e-5)

def test_fails():
    np.testing.assert_allclose(1.0, 2.0, rtol=1e-5)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AVX2 is x86's")
def test_what_fails_or_comes_close_is_said(tmp_path, capsys):
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_planted.py").write_text(PLANTED)
    rows = tmp_path / "rows.json"
    arguments = ["--isa=AVX2", "--threads=1", f"--json={rows}", str(tests / "test_planted.py")]
    assert on_other_processors.main(arguments) == 1
    output = capsys.readouterr().out
    assert "AVX2, 1 threads: 2 passed, 1 failed, 3 comparisons" in output
    (row,) = json.loads(rows.read_text())
    assert [name.rpartition("::")[2] for name in row["failures"]] == ["test_fails"]
    assert len(row["above_a_third"]) == 2
