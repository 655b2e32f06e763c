"""Figures of how well samples estimate GC: the paper's three ways, and estimators by their cost."""

import math
from typing import NamedTuple

import jax
import numpy as np
from scipy import stats

from gc_nc import metrics
from gc_nc.drawing import COLORS, new_panels, save, set_logarithmic
from gc_nc.models import embed_fn
from gc_nc.random_streams import stream_key
from gc_nc.reproduction.claims import FAILS, HOLDS, UNDECIDED, Finding, counted_finding
from gc_nc.reproduction.figure_result import Context, FigureResult, require_runs

_RESAMPLES = 2000
_TENTH = 0.1
_WAYS = {
    "examples": "Examples",
    "jacobian_entries": "Jacobian entries an example",
    "output_dims": "Embedding dimensions an example",
}
_METHODS = (
    "output_probes",
    "deflated",
    "input_probes",
    "output_dims",
    "input_dims",
    "jacobian_entries",
)


class _Sizes(NamedTuple):
    """How much is sampled.

    Attributes:
      population: number of images from which examples are drawn.
      images: number of images whose entries and dimensions are drawn.
      estimated: number of images on whose norms the estimators are compared.
      examples: sizes of the samples of images.
      parts: numbers of entries and dimensions for each image.
      products: numbers of products of the estimators for each image.
      trials: number of trials for each sample.
    """

    population: int
    images: int
    estimated: int
    examples: tuple[int, ...]
    parts: tuple[int, ...]
    products: tuple[int, ...]
    trials: int = 20


_SMALL = _Sizes(256, 32, 64, (4, 8, 16, 32, 64), (1, 2, 4, 8, 16), (3, 6, 12, 24, 48))
_PAPER = _Sizes(
    5000, 256, 256, (4, 8, 16, 32, 64, 128, 256, 512, 1024), (1, 2, 4, 8, 16, 32), _SMALL.products
)
_SMOKE = _Sizes(24, 8, 8, (2, 6), (1, 2), (3,), trials=4)


def sampling_figure(context: Context) -> FigureResult:
    """Mean and standard deviation over trials of each way to sample, compared with exact GC."""
    require_runs(context)
    sizes = _sizes(context)
    embed, images = _network(context, sizes.population)
    context.report(f"exact GC of {len(images)} images")
    norms = np.asarray(
        metrics.squared_jacobian_norms(embed, images, skip_inactive=True), np.float64
    )
    few = images[: sizes.images]
    exact = {
        "examples": float(norms.mean()),
        "jacobian_entries": float(norms[: sizes.images].mean()),
        "output_dims": float(norms[: sizes.images].mean()),
    }
    rng = np.random.default_rng(0)
    trials: dict[str, dict[int, np.ndarray]] = {way: {} for way in _WAYS}
    for size in (s for s in sizes.examples if s <= len(norms) // 4):
        chosen = [rng.permutation(len(norms))[:size] for _ in range(sizes.trials)]
        trials["examples"][size] = np.array([norms[rows].mean() for rows in chosen])
    for way in ("jacobian_entries", "output_dims"):
        for size in sizes.parts:
            context.report(f"{sizes.trials} trials: {_WAYS[way]}, {size}")
            trials[way][size] = np.array(
                [_estimate(embed, few, way, size, trial) for trial in range(sizes.trials)]
            )
    _draw_trials(context, trials, exact)
    findings = [_unbiased(way, of_way, exact[way]) for way, of_way in trials.items()]
    findings += [_small_enough(way, of_way, exact[way]) for way, of_way in trials.items()]
    populations = {"examples": float(len(norms))}
    findings += [
        _rate(way, of_way, populations.get(way, math.inf)) for way, of_way in trials.items()
    ]
    rows = [
        [_WAYS[way], size, values.mean(), values.std(ddof=1) / exact[way]]
        for way, of_way in trials.items()
        for size, values in of_way.items()
    ]
    rows.insert(0, ["Exact", f"{len(norms)} images", exact["examples"], None])
    rows.insert(1, ["Exact", f"{len(few)} images", exact["output_dims"], None])
    caption = (
        f"GC from samples, mean and standard deviation of {sizes.trials} trials (band), against the"
        f" exact value (dotted): random subsets of {len(norms)} images; and, on {len(few)} of"
        " these, random Jacobian entries and embedding dimensions, drawn anew for each image."
    )
    columns = ["sample", "size", "mean of GC", "standard deviation / exact GC"]
    return FigureResult(caption, findings, columns, rows, [_of_network(context)])


def estimators_figure(context: Context) -> FigureResult:
    """Relative error of the estimators of GC against their cost."""
    require_runs(context)
    sizes = _sizes(context)
    embed, images = _network(context, sizes.estimated)
    context.report(f"exact GC of {len(images)} images")
    norms = np.asarray(
        metrics.squared_jacobian_norms(embed, images, skip_inactive=True), np.float64
    )
    errors: dict[str, dict[int, np.ndarray]] = {}
    for method in _METHODS:
        for products in sizes.products:
            context.report(f"{method}, {products} products")
            estimates = metrics.estimate_squared_jacobian_norms(
                embed, images, _key(0), method=method, num_probes=products
            )
            relative = np.asarray(estimates, np.float64) / norms - 1
            errors.setdefault(method, {})[products] = relative
    figure, [[ax]] = new_panels(1, 1)
    figure.set_size_inches(6.5, 4.2)
    for color, (method, of_method) in zip(COLORS, errors.items(), strict=False):
        rms = [math.sqrt(np.mean(relative**2)) for relative in of_method.values()]
        ax.plot(list(of_method), rms, "o-", color=color, ms=4, label=method)
    set_logarithmic(ax)
    set_logarithmic(ax, "x")
    ax.set(xlabel="Jacobian products an image", ylabel="Relative error of an image's norm")
    ax.legend(frameon=False, fontsize=8)
    save(figure, context.image)
    findings = [
        _cheaper("output_probes", other, errors)
        for other in ("output_dims", "input_probes", "jacobian_entries")
    ]
    most = max(sizes.products)
    findings.append(_cheaper("deflated", "output_probes", errors, only=most))
    rows = [
        [method, products, math.sqrt(np.mean(relative**2))]
        for method, of_method in errors.items()
        for products, relative in of_method.items()
    ]
    caption = (
        f"Root mean square, over {len(images)} training images, of the relative error of the"
        " estimated Jacobian norm of one image, against the number of Jacobian products. An entry"
        " of the Jacobian costs a product too."
    )
    columns = ["estimator", "products an image", "relative error"]
    return FigureResult(caption, findings, columns, rows, [_of_network(context)])


def _sizes(context: Context) -> _Sizes:
    return {"paper": _PAPER, "smoke": _SMOKE}.get(context.scale, _SMALL)


def _network(context: Context, num_images: int):
    """The embedding of the first run of the config itself, and random training images."""
    runs = context.sweep.base_runs or context.sweep.runs
    run = context.open_run(runs[0].workdir)
    return embed_fn(run.model, run.variables(run.steps[-1])), run.gc_inputs(num_images)


def _of_network(context: Context) -> str:
    run = (context.sweep.base_runs or context.sweep.runs)[0]
    config, end = run.config, run.final
    return (
        f"{config['model.name']}, width {config['model.width']:g}, {run.metadata['data']['name']},"
        f" seed {run.seed}, step {end['step']}: training accuracy {end['train/accuracy']:.4g}, test"
        f" accuracy {end['test/accuracy']:.4g}."
    )


def _key(trial: int):
    return jax.random.fold_in(stream_key(0, "trials of sampled GC"), trial)


def _estimate(embed, images, method: str, size: int, trial: int) -> float:
    return float(
        metrics.estimate_geometric_complexity(
            embed, images, _key(trial), method=method, num_probes=size
        ).mean
    )


def _draw_trials(context: Context, trials, exact) -> None:
    figure, [axes] = new_panels(1, len(trials))
    for color, ax, (way, of_way) in zip(COLORS, axes, trials.items(), strict=False):
        sizes = list(of_way)
        mean = np.array([values.mean() for values in of_way.values()])
        std = np.array([values.std(ddof=1) for values in of_way.values()])
        ax.plot(sizes, mean, "o-", color=color, ms=4)
        ax.fill_between(sizes, mean - std, mean + std, color=color, alpha=0.2, lw=0)
        ax.axhline(exact[way], color="#333333", lw=1, ls=":")
        set_logarithmic(ax, "x")
        ax.set_xticks(sizes, [str(size) for size in sizes])
        ax.minorticks_off()
        ax.set(xlabel=_WAYS[way], ylim=(0, None))
    axes[0].set_ylabel("Geometric complexity")
    save(figure, context.image)


def _unbiased(way: str, trials: dict[int, np.ndarray], exact: float) -> Finding:
    """Whether all means are as close to the exact value as chance allows."""
    t = [
        (values.mean() - exact) / (values.std(ddof=1) / math.sqrt(len(values)))
        for values in trials.values()
    ]
    limit = float(stats.t.ppf(1 - 0.025 / len(t), len(next(iter(trials.values()))) - 1))
    return counted_finding(
        f"{_WAYS[way]}: the mean of the trials shows no bias",
        int(np.sum(np.abs(t) <= limit)),
        len(t),
        f"largest |t| {max(map(abs, t)):.2f}, where chance alone gives up to {limit:.2f} in 95% (t"
        " test, Bonferroni)",
    )


def _rate(way: str, trials: dict[int, np.ndarray], population: float) -> Finding:
    """Whether the error falls as one over the square root of the sample size.

    Sampling without replacement reduces the error by sqrt((N - n) / (N - 1)), which is corrected.
    """
    sizes = np.array(list(trials))
    correction = np.sqrt((population - sizes) / (population - 1)) if population < math.inf else 1
    spread = _resampled_spread(trials) / correction
    slopes = [np.polyfit(np.log(sizes), np.log(row), 1)[0] for row in spread if row.min() > 0]
    observed = np.std(list(trials.values()), axis=1, ddof=1) / correction
    slope = float(np.polyfit(np.log(sizes), np.log(observed), 1)[0])
    low, high = _interval(slopes)
    if low <= -0.5 <= high and high < 0:
        verdict = HOLDS
    elif high < -0.5 or low > -0.5:
        verdict = FAILS
    else:
        verdict = UNDECIDED
    return Finding(
        f"{_WAYS[way]}: the error falls as one over the square root of their number",
        verdict,
        f"exponent {slope:.2f} [{low:.2f}, {high:.2f}] where -0.5 is claimed",
        {"exponent": slope, "low": low, "high": high},
    )


def _small_enough(way: str, trials: dict[int, np.ndarray], exact: float) -> Finding:
    """Whether the largest sample gives GC with a relative error below a tenth."""
    size = max(trials)
    spread = _resampled_spread({size: trials[size]})[:, 0] / exact
    relative = float(np.std(trials[size], ddof=1) / exact)
    low, high = _interval(spread)
    return Finding(
        f"{_WAYS[way]}: {size} give GC with a standard deviation below a tenth of it",
        HOLDS if high < _TENTH else FAILS if low > _TENTH else UNDECIDED,
        f"standard deviation {relative:.3f} [{low:.3f}, {high:.3f}] of GC, bootstrap over trials",
        {"size": size, "relative": relative, "low": low, "high": high},
    )


def _resampled_spread(trials: dict[int, np.ndarray]) -> np.ndarray:
    """(resamples, sizes), standard deviations of trials drawn with replacement."""
    rng = np.random.default_rng(0)
    columns = [
        values[rng.integers(0, len(values), (_RESAMPLES, len(values)))].std(axis=1, ddof=1)
        for values in trials.values()
    ]
    return np.stack(columns, axis=1)


def _interval(values) -> tuple[float, float]:
    if len(values) < _RESAMPLES // 2:
        return math.nan, math.nan
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def _cheaper(method: str, other: str, errors, only: int | None = None) -> Finding:
    """Whether a method has the smaller error at the same number of products."""
    products = [only] if only else list(errors[method])
    squares = [
        np.mean([errors[name][p] ** 2 for p in products], axis=0) for name in (method, other)
    ]
    rng = np.random.default_rng(0)
    rows = rng.integers(0, len(squares[0]), (_RESAMPLES, len(squares[0])))
    ratios = np.sqrt(squares[0][rows].mean(axis=1) / squares[1][rows].mean(axis=1))
    ratio = math.sqrt(squares[0].mean() / squares[1].mean())
    low, high = _interval(ratios)
    at = f"at {only} products" if only else "at the same number of products"
    return Finding(
        f"{method} has a smaller error than {other} {at}",
        HOLDS if high < 1 else FAILS if low > 1 else UNDECIDED,
        f"ratio of errors {ratio:.2f} [{low:.2f}, {high:.2f}], bootstrap over images",
        {"ratio": ratio, "low": low, "high": high, "num_images": len(squares[0])},
    )
