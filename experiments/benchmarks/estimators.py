"""Estimates of GC compared with exact GC: error by products, and the cost of 1% on a large set.

    python -m experiments.benchmarks.estimators [--json] [--benchmark_run=RUN] [--figure=PATH]
        [--layer=NAME] [--row=products|cost]

The first row and the figure are for the embedding, or for the flattened output of another layer.
The images are the training images of a finished run, or of a VGG-11 that is first trained on the
embedded digits. Smaller sets are repeated up to --num_images, since the cost of a given error
depends on their spread, which repetition does not change. The forward pass over all images is timed
on 2,048 of them, in the same chunks of 32. Runs alternate in one process; seconds are medians.
"""

import tempfile
from pathlib import Path
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import launcher
from experiments.benchmarks import estimator_figure, reporting
from experiments.configs import digits
from gc_nc import metrics
from gc_nc.compilation import jit_for_device
from gc_nc.data.device_batches import normalize
from gc_nc.errors import InputError
from gc_nc.models import build_model, embed_fn, layer_names
from gc_nc.runs import loop
from gc_nc.runs.finished_run import open_run

_WORKDIR = flags.DEFINE_string(
    "benchmark_run", None, "A finished run; by default, one on digits.", allow_override=True
)
_NUM_IMAGES = flags.DEFINE_integer("num_images", 50_000, "Size of the large set.", lower_bound=2048)
_LAYER = flags.DEFINE_string("layer", "embedding", "The layer whose Jacobian is multiplied.")
_ROW = flags.DEFINE_enum("row", None, ["products", "cost"], "The only row; by default both.")
_FIGURE = flags.DEFINE_string("figure", None, "Where to draw error against products.")

_REPETITIONS, _ERROR, _COST_GOAL, _PRODUCTS_GOAL = 5, 0.01, 0.1, 0.1
_SAMPLE, _PRODUCTS = 128, (1, 3, 6, 12, 24, 48)

# The products of these methods are independent, so an estimate from m products is the mean of m
# estimates from one. The others draw their products together and compile a program for every m.
_ONE_BY_ONE = ("output_probes", "input_probes", "jacobian_entries")


def main(argv: list[str]) -> None:
    """Measures, prints the rows and draws the figure if asked."""
    del argv
    if _ROW.value == "cost" and (_FIGURE.value or _LAYER.value != "embedding"):
        raise InputError("--row=cost is for the embedding, and not drawn; drop --figure, --layer")
    if not _WORKDIR.value:
        names = layer_names(build_model(digits.get_config().model.name, 10))
        if _LAYER.value not in names:
            raise InputError(f"--layer={_LAYER.value!r} is not one of {', '.join(names)}")
    with tempfile.TemporaryDirectory() as scratch:
        run = open_run(Path(_WORKDIR.value) if _WORKDIR.value else _train(Path(scratch) / "run"))
        variables = run.variables(run.steps[-1])
        split = run.dataset.train
    indices = np.random.default_rng(0).permutation(len(split.labels))
    rows = []
    if _ROW.value != "cost":
        embed = embed_fn(run.model, variables, _LAYER.value)
        sample = normalize(jnp.asarray(split.images[indices[:_SAMPLE]]), run.normalization)
        errors = _errors(embed, sample)
        if _FIGURE.value:
            _draw(errors, run, min(embed(sample).shape[1], sample[0].size))
        rows.append(_products_row(errors))
    if _ROW.value != "products":
        rows.append(_cost_row(embed_fn(run.model, variables), run, split, indices))
    reporting.print_rows(rows)


def _draw(errors, run, products) -> None:
    network = f"{run.config.model.name} (width {run.config.model.width:g}), {run.dataset.name}"
    layer = "" if _LAYER.value == "embedding" else f", {_LAYER.value}"
    estimator_figure.draw_errors(errors, products, Path(_FIGURE.value), network + layer)


def _train(workdir: Path) -> Path:
    config = digits.get_config()
    with config.unlocked():
        config.num_steps = 500
    loop.train(config, workdir)
    return workdir


def _errors(embed, sample) -> dict[str, dict[int, float]]:
    """{method: {products: root mean square error of an example, relative to GC}}."""
    exact = np.asarray(metrics.squared_jacobian_norms(embed, sample), np.float64)
    dims = {"output_dims": embed(sample).shape[1], "input_dims": sample[0].size}
    errors = {}
    for method in metrics.ESTIMATION_METHODS:

        def estimate(m, seed, method=method):
            key = jax.random.key(seed)
            norms = metrics.estimate_squared_jacobian_norms(
                embed, sample, key, method=method, num_probes=m
            )
            return np.asarray(norms, np.float64)

        errors[method] = {}
        if method in _ONE_BY_ONE:
            single = np.stack([estimate(1, seed) for seed in range(max(_PRODUCTS))])
        for m in (m for m in _PRODUCTS if m <= dims.get(method, m)):
            estimates = single[:m].mean(axis=0) if method in _ONE_BY_ONE else estimate(m, m)
            squares = (estimates - exact) ** 2
            errors[method][m] = float(np.sqrt(squares.mean()) / exact.mean())
    return errors


def _products_row(errors) -> reporting.Row:
    """The number of products with which output_probes has the error of output_dims with 24."""
    probes, dims = errors["output_probes"], errors["output_dims"]
    m = max(m for m in dims if m <= 24)
    # The variance of probes is proportional to 1 / m, so one constant describes them.
    constant = np.mean([error**2 * count for count, error in probes.items()])
    return reporting.Row(
        f"products of output_probes at the error of output_dims with {m}",
        float(constant / dims[m] ** 2),
        float(m),
        _PRODUCTS_GOAL,
        unit="",
    )


def _cost_row(embed, run, split, indices) -> reporting.Row:
    rows = np.resize(indices, _NUM_IMAGES.value)
    images = np.asarray(normalize(jnp.asarray(split.images), run.normalization))[rows]
    labels = split.labels[rows]
    forward = jit_for_device(lambda embed, x: embed(x))
    chunks = jnp.asarray(images[:2048]).reshape(64, 32, *images.shape[1:])

    def forward_pass():
        for chunk in chunks:
            last = forward(embed, chunk)
        last.block_until_ready()

    def planned(seed):
        return metrics.geometric_complexity_to_error(
            embed, images, jax.random.key(seed), relative_error=_ERROR, labels=labels
        )

    forward_pass()
    ours, reference = [], []
    for seed in range(_REPETITIONS):
        # The first call compiles what this plan needs.
        found = planned(seed)
        reference.append(reporting.time_call(forward_pass) * len(images) / 2048)
        ours.append(reporting.time_call(lambda seed=seed: planned(seed)))
    name = f"GC to 1%: {found.num_examples} examples, probes {found.num_probes}; forward pass"
    return reporting.Row(name, median(ours), median(reference), _COST_GOAL)


if __name__ == "__main__":
    launcher.run(main)
