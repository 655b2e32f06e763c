"""Our numbers beside those of rhubarbwu/neural-collapse, converted as docs/definitions.md says.

Skipped without that library and torch, which nothing here needs: `pip install
git+https://github.com/rhubarbwu/neural-collapse`; compared at commit c05a0b8.
"""

import importlib

import numpy as np
import pytest

from gc_nc import metrics
from tests.rounding import assert_same_numbers

torch = pytest.importorskip("torch")
pytest.importorskip("neural_collapse")
# By name: it is not on the package index, so no extra of setup.cfg declares it.
accumulate, kernels, measure = (
    importlib.import_module(f"neural_collapse.{name}")
    for name in ("accumulate", "kernels", "measure")
)

C, K = 5, 7


def test_one_random_set():
    rng = np.random.default_rng(0)
    labels = np.r_[np.arange(C), rng.integers(0, C, 200)]
    z = (2 * rng.normal(size=(C, K))[labels] + rng.normal(size=(len(labels), K)) + 1).astype("f4")
    head = rng.normal(size=(C, K)).astype("f4")

    x, y, w = torch.tensor(z), torch.tensor(labels), torch.tensor(head)
    means = accumulate.MeanAccumulator(C, K)
    means.accumulate(x, y)
    m, centre = means.compute()
    covariance = accumulate.CovarAccumulator(C, K)
    norms = accumulate.VarNormAccumulator(C, K)
    decisions = accumulate.DecAccumulator(C, K)
    for gathered in (covariance, norms):
        gathered.accumulate(x, y, m)
    decisions.accumulate(x, y, w, m)
    within, variances = covariance.compute(), norms.compute()[0]
    lengths = measure.mean_norms(m, centre)
    energy, spread = kernels.kernel_stats(m, centre, kernels.log_kernel)
    theirs = {
        "nc1": measure.covariance_ratio(within, m, centre),
        "nc1 by svd": measure.covariance_ratio(within, m, centre, "svd"),
        "scatter_ratio": measure.covariance_ratio(within, m, centre, "quotient"),
        "variances": variances.numpy(),
        "neural_collapse": measure.variability_cdnv(variances, m),
        "equinorm": (lengths.std(unbiased=False) / lengths.mean()).item(),
        "etf_error": measure.simplex_etf_error(m, centre),
        "gnc2": (energy, spread),
        "gnc3": (measure.distance_norms(w, m, centre) ** 2).mean().item(),
        "nc4": 1 - measure.clf_ncc_agreement(decisions),
    }
    stats = metrics.init_class_statistics(C, K, scatter=True)
    stats = metrics.update_class_statistics(stats, z, labels)
    nc2 = metrics.nc2(stats)
    ours = {
        "nc1": metrics.nc1(stats),
        "nc1 by svd": metrics.nc1(stats),
        "scatter_ratio": metrics.scatter_ratio(stats),
        "variances": stats.variances,
        "neural_collapse": metrics.neural_collapse(stats),
        "equinorm": nc2.equinorm,
        "etf_error": nc2.etf_error,
        "gnc2": tuple(metrics.gnc2(stats)),
        "gnc3": metrics.gnc3(stats, head.T),
        "nc4": metrics.nc4(z @ head.T, z, stats),
    }
    # Their means are plain sums in float32.
    assert_same_numbers(ours, theirs, num_terms=2 * len(labels))
