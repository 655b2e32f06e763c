"""`python -m experiments.benchmarks.convolutions` on small maps; no test looks at the clock."""

import re

import pytest

from experiments.benchmarks import convolutions


@pytest.mark.slow
def test_a_line_a_convolution_and_their_sum(capsys, monkeypatch):
    monkeypatch.setattr(convolutions, "_BATCH", 2)
    monkeypatch.setattr(convolutions, "_MATMUL", 64)
    monkeypatch.setattr(convolutions, "_REPETITIONS", 1)
    monkeypatch.setattr(convolutions, "_CONVOLUTIONS", ((2, 3, 1, 4, 4, 8), (1, 1, 2, 4, 8, 8)))
    convolutions.main([])
    _, first, second, last = capsys.readouterr().out.splitlines()
    assert first.startswith("3x3, stride 1, 4 to 4, 8x8 ")
    assert second.startswith("1x1, stride 2, 4 to 8, 8x8 ")
    for line in (first, second):
        assert len(re.findall(r"\d\.\d\d", line)) == 3
    assert re.fullmatch(r"all of a step: \S+ s, at the rate of the matmul \S+ s", last)
