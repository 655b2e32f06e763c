"""Regression estimate of a finite set's mean from a sample.

y_b = mean + beta . (a_b - mean a) + residual is fitted by least squares on the sample. The means of
the covariates a over the whole set are known, so that only the residual has a sampling error
(Cochran, Sampling Techniques, 1977, chapter 7). Standard errors are computed from residuals divided
by one minus their leverage (HC3; MacKinnon and White 1985).
"""

import math
from typing import NamedTuple

import numpy as np

# With fewer examples for each covariate, fitting it costs more than it explains.
_EXAMPLES_PER_COVARIATE = 10
# With fewer examples, skewed residuals make intervals too narrow: on 64 examples of
# y = 1 + exp(a), 95% intervals cover 85%, whatever the number of covariates.
_FEWEST_EXAMPLES = 256
# Only the most frequent classes are used, since the cost of a fit grows with their square.
_MOST_CLASSES = 100
# If an image has more channels, they are not distinguished.
_MOST_CHANNELS = 4


class RegressionEstimate(NamedTuple):
    """The regression estimate, and variances of its residuals.

    Attributes:
      mean: estimated mean over the whole set.
      variance: variance of an example's mean over its probes. Divided by n, it is the variance of
        `mean` for an infinite set.
      between: the part of `variance` that does not depend on the draw of probes; 0 if unknown.
      within: the variance of one probe; NaN if unknown.
    """

    mean: float
    variance: float
    between: float
    within: float


class Covariates(NamedTuple):
    """What is known about all N examples, in the order in which they are drawn.

    Attributes:
      pixels: (N, P) pixel statistics with mean 0; the most informative come first.
      ranks: (N,) the place of each example's class, the most frequent being 0.
      shares: (C,) the share of each class in all examples, in that order.
    """

    pixels: np.ndarray
    ranks: np.ndarray
    shares: np.ndarray

    def of_first(self, n: int) -> np.ndarray:
        """Returns as many covariates as n examples allow, (n, Q), with mean 0 over all N.

        Classes of which too few examples can be expected are treated as one class.
        """
        most = n // _EXAMPLES_PER_COVARIATE if n >= _FEWEST_EXAMPLES else 0
        pixels = self.pixels[:n, :most]
        # One class is the complement of the others.
        frequent = np.sum(n * self.shares[:-1] >= _EXAMPLES_PER_COVARIATE)
        num_classes = min(most - pixels.shape[1], frequent, _MOST_CLASSES)
        members = self.ranks[:n, None] == np.arange(num_classes)
        return np.column_stack([pixels, members - self.shares[:num_classes]])


def regress(values: np.ndarray, known: Covariates, *, exact: bool = False) -> RegressionEstimate:
    """Returns the estimate from probes of the first n of N examples and covariates of all.

    Args:
      values: (n, m) probes of each example; their mean over probes is y_b.
      known: covariates of all examples.
      exact: whether y_b is exact, that is, does not depend on probes.
    """
    fit = least_squares(values, known.of_first(len(values)), exact=exact)
    if math.isfinite(fit.variance):
        return fit
    # An example with leverage 1 has no residual to check the fit by. The plain mean avoids that.
    return least_squares(values, np.zeros((len(values), 0)), exact=exact)


def least_squares(values: np.ndarray, covariates: np.ndarray, *, exact: bool) -> RegressionEstimate:
    """Like `regress`, with the covariates (n, P) of the sample."""
    num_examples, num_probes = values.shape
    means = values.mean(axis=1)
    # Centred at the sample's means, so that a constant covariate is not taken for the intercept.
    centre = covariates.mean(axis=0)
    spread = covariates - centre
    scales = np.sqrt(np.mean(spread**2, axis=0))
    varies = scales > 1e-9 * np.max(np.abs(covariates), axis=0, initial=0)
    design = np.where(varies, spread / np.where(varies, scales, 1), 0)
    left, singular, right = np.linalg.svd(design, full_matrices=False)
    kept = singular > 1e-6 * max(singular.max(initial=0), 1e-300)
    left, singular, right = left[:, kept], singular[kept], right[kept]
    slopes = right.T @ (left.T @ means / singular)
    slopes = np.where(varies, slopes / np.where(varies, scales, 1), 0)
    mean = float(means.mean() - centre @ slopes)
    residuals = means - mean - covariates @ slopes
    # Residuals are divided by one minus the leverage (HC3): a covariate that only a few examples
    # share fits these so closely that their residuals would be too small.
    own = 1 - 1 / num_examples - np.sum(left**2, axis=1)
    # The estimate is a weighted mean of the examples. The weights differ from 1 / n if the sample's
    # mean covariates are far from those of the whole set.
    slopes_to_mean = np.where(varies, centre / np.where(varies, scales, 1), 0)
    weights = 1 / num_examples - left @ ((right @ slopes_to_mean) / singular)
    inflation = num_examples * float(np.sum(weights**2))
    with np.errstate(divide="ignore", invalid="ignore"):
        errors = weights * residuals / np.where(own > 1e-9, own, 0)
        variance = num_examples * float(np.sum(errors**2))
    variance = math.inf if math.isnan(variance) else variance
    if exact:
        within = 0.0
    elif num_probes > 1:
        within = float(np.mean(np.var(values, axis=1, ddof=1)))
    else:
        return RegressionEstimate(mean, variance, 0.0, math.nan)
    return RegressionEstimate(
        mean, variance, max(0.0, variance - inflation * within / num_probes), within
    )


def known_covariates(inputs, labels, order) -> Covariates:
    """Returns means and spreads of all pixels and of each channel, and classes, as covariates.

    Args:
      inputs: (N, ...) all examples.
      labels: (N,) integers, or None.
      order: (N,) the order in which the examples are drawn.
    """
    shape = inputs.shape[1:]
    num_channels = shape[-1] if len(shape) > 1 and shape[-1] <= _MOST_CHANNELS else 1
    # The pixels of each channel are summed by a matrix product, which is much faster than einsum.
    num_pixels = math.prod(shape) // num_channels
    channels = np.tile(np.eye(num_channels, dtype=np.float32), (num_pixels, 1)) / num_pixels
    columns = []
    with np.errstate(over="ignore", invalid="ignore"):
        # 128 examples at a time stay in the cache of a CPU.
        for first in range(0, inputs.shape[0], 128):
            rows = np.asarray(inputs[first : first + 128]).astype(np.float32, copy=False)
            rows = rows.reshape(rows.shape[0], -1)
            columns.append(np.stack([rows @ channels, rows**2 @ channels], axis=1))
        # (N, 2, channels); the values for all pixels together are appended after the channels.
        known = np.concatenate(columns).astype(np.float64)
        if num_channels > 1:
            known = np.concatenate([known, known.mean(axis=2, keepdims=True)], axis=2)
        spread = np.sqrt(np.maximum(known[:, 1] - known[:, 0] ** 2, 0))
        known = np.column_stack([known[:, :, -1], spread[:, -1], known[:, 0, :-1], spread[:, :-1]])
    # A statistic is left out if it is not finite for some example.
    known = known[:, np.isfinite(known).all(axis=0)]
    # Clipped, so that one unusual image does not change the mean much.
    known = np.clip(known, *np.quantile(known, (0.005, 0.995), axis=0))
    labels = np.zeros(len(order), int) if labels is None else labels
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    by_frequency = np.argsort(-counts, kind="stable")
    return Covariates(
        pixels=(known - known.mean(axis=0))[order],
        ranks=np.argsort(by_frequency)[classes][order],
        shares=counts[by_frequency] / len(order),
    )
