"""Class statistics and NC on the CPU compared with a loop over classes in PyTorch.

    python -m experiments.benchmarks.statistics [--json] [--num_examples=50000]

The float32 embeddings have 512 dimensions and 100 classes, and are already in memory. The reference
computes class means in a first pass and deviations from them in a second. Runs alternate in one
process; seconds are medians, and on a busy machine only the ratios are meaningful. It takes half a
minute.
"""

from statistics import median

import jax
import numpy as np
from absl import flags

from experiments import launcher
from experiments.benchmarks import reporting
from gc_nc import metrics

_NUM_EXAMPLES = flags.DEFINE_integer("num_examples", 50_000, "Rows.", lower_bound=1000)

_NUM_CLASSES, _DIM, _REPETITIONS = 100, 512, 9
_GOAL, _SCATTER_GOAL = 0.7, 1.1


def main(argv: list[str]) -> None:
    """Checks that both find the same NC, then times them."""
    del argv
    rng = np.random.default_rng(0)
    labels = rng.permutation(_NUM_EXAMPLES.value) % _NUM_CLASSES
    z = rng.standard_normal((len(labels), _DIM), dtype=np.float32)
    z += 3 * rng.standard_normal((_NUM_CLASSES, _DIM), dtype=np.float32)[labels]

    plain, with_scatter = (_reference(z, labels, scatter=scatter) for scatter in (False, True))
    comparisons = {
        "NC, one array": (_ours(z, labels), plain, _GOAL),
        "NC, batches of 1000": (_ours(z, labels, batch_size=1000), plain, _GOAL),
        "NC, batches of 5000": (_ours(z, labels, batch_size=5000), plain, _GOAL),
        "NC and scatter": (_ours(z, labels, scatter=True), with_scatter, _SCATTER_GOAL),
    }
    # The first call also compiles.
    for name, (ours, reference, _) in comparisons.items():
        np.testing.assert_allclose(ours(), reference(), rtol=1e-4, err_msg=name)
    rows = []
    for name, (ours, reference, goal) in comparisons.items():
        pairs = [
            (reporting.time_call(ours), reporting.time_call(reference)) for _ in range(_REPETITIONS)
        ]
        rows.append(reporting.Row(name, *map(median, zip(*pairs, strict=True)), goal))
    reporting.print_rows(rows)


def _ours(z, labels, *, batch_size=None, scatter=False):
    size = batch_size or len(z)
    batches = [
        jax.device_put((z[i : i + size], labels[i : i + size])) for i in range(0, len(z), size)
    ]
    update = jax.jit(metrics.update_class_statistics, donate_argnums=0)
    neural_collapse = jax.jit(metrics.neural_collapse)

    def run():
        stats = metrics.init_class_statistics(_NUM_CLASSES, _DIM, scatter=scatter)
        for batch in batches:
            stats = update(stats, *batch)
        return float(jax.block_until_ready((neural_collapse(stats), stats))[0])

    return run


def _reference(z, labels, *, scatter):
    torch = reporting.import_torch()
    z, labels = torch.from_numpy(z), torch.from_numpy(labels)

    def run():
        means = torch.stack([z[labels == c].mean(0) for c in range(_NUM_CLASSES)])
        variances, pooled = torch.zeros(_NUM_CLASSES), torch.zeros(_DIM, _DIM)
        for c in range(_NUM_CLASSES):
            deviations = z[labels == c] - means[c]
            variances[c] = (deviations**2).sum() / len(deviations)
            if scatter:
                pooled += deviations.T @ deviations
        distances = ((means[:, None] - means[None]) ** 2).sum(-1)
        cdnv = (variances[:, None] + variances[None]) / (2 * distances)
        return float(cdnv[~torch.eye(_NUM_CLASSES, dtype=torch.bool)].mean())

    return run


if __name__ == "__main__":
    launcher.run(main)
