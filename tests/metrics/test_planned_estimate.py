"""The planner: it reaches the error it was asked for, about the set it was given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gc_nc.metrics import (
    drawn_sample,
    estimate_squared_jacobian_norms,
    geometric_complexity_to_error,
    planned_estimate,
    regression_estimate,
)
from gc_nc.metrics.embedding_functions import check_embedding
from tests.rounding import assert_same_numbers

CLASSES = 4


def network(weights, x):
    first, second = weights
    return jax.nn.relu(jax.nn.relu(x @ first.T) @ second.T)


def squashed(embed, x):
    return jnp.tanh(embed(x))


def exact_norms(embed, x, squash=False):
    """float64 NumPy: J = S D_2 W_2 D_1 W_1, with the slopes S of tanh at the embedding."""
    first, second = (np.asarray(weight, np.float64) for weight in embed.args[0])
    hidden = np.asarray(x, np.float64) @ first.T
    z = np.maximum(hidden, 0) @ second.T
    slopes = (z > 0) * (1 - np.tanh(np.maximum(z, 0)) ** 2 if squash else 1)
    jacobians = (second * (hidden > 0)[:, None]) @ first * slopes[:, :, None]
    return np.sum(jacobians**2, axis=(1, 2))


@pytest.fixture(scope="module")
def problem():
    """(embed_fn, inputs, labels, exact GC)"""
    rng = np.random.default_rng(0)
    weights = (
        jnp.asarray(rng.normal(size=(32, 10)), jnp.float32),
        jnp.asarray(rng.normal(size=(24, 32)), jnp.float32),
    )
    labels = rng.integers(0, CLASSES, 6000)
    x = rng.normal(size=(6000, 10)) + 2 * rng.normal(size=(CLASSES, 10))[labels]
    x = x.astype(np.float32)
    embed = jax.tree_util.Partial(network, weights)
    return embed, x, labels, np.mean(exact_norms(embed, x))


@pytest.mark.parametrize("with_labels", [pytest.param(False, marks=pytest.mark.slow), True])
def test_reaches_the_error_and_its_intervals_cover(problem, with_labels):
    embed, x, labels, exact = problem
    covered, errors = 0, []
    for trial in range(40):
        found = geometric_complexity_to_error(
            embed,
            x,
            jax.random.key(trial),
            relative_error=0.02,
            labels=labels if with_labels else None,
        )
        assert 0 < found.set_sem <= 0.02 * found.mean
        assert 0 < found.num_examples < 6000
        covered += bool(abs(found.mean - exact) < 1.96 * found.set_sem)
        errors.append((found.mean - exact) / found.set_sem)
    # 38 of 40 expected; 34 is three standard deviations below.
    assert covered >= 34
    # Unbiased, and not far too wide: 40 z values have a mean within 4 / sqrt(40).
    assert abs(np.mean(errors)) < 4 / np.sqrt(40)
    assert np.std(errors) > 0.6


def test_covariates_and_classes_save_work(problem):
    embed, x, labels, _ = problem

    def work():
        found = [
            geometric_complexity_to_error(
                embed, x, jax.random.key(seed), relative_error=0.015, labels=labels
            )
            for seed in range(3)
        ]
        return sum(f.num_examples * (1 + f.num_probes) for f in found)

    # What a plain sample with its best number of probes would need, from estimates of all, to pass
    # with the same margin.
    estimates = [
        np.asarray(estimate_squared_jacobian_norms(embed, x, jax.random.key(seed), chunk_size=6000))
        for seed in range(2)
    ]
    within = np.mean((estimates[0] - estimates[1]) ** 2) / 2
    between = np.var(estimates[0]) - within
    target = (0.015 * planned_estimate._PASSES * np.mean(estimates[0])) ** 2 + between / 6000
    plain = 3 * min((between + within / m) / target * (1 + m) for m in range(1, 6))
    assert work() < plain


def test_a_smaller_error_than_sampling_examples_can_give(problem):
    embed, x, _, _ = problem
    x = x[:200]
    exact = np.mean(exact_norms(embed, x))
    for error in (0.005, 1e-4, 1e-9):
        found = geometric_complexity_to_error(embed, x, jax.random.key(1), relative_error=error)
        assert found.set_sem <= error * found.mean
        assert abs(float(found.mean) - exact) <= max(4 * float(found.set_sem), 1e-5 * exact)
    assert found[1:4] == (0, 200, 0)
    assert found.met


@pytest.mark.slow
def test_small_and_degenerate_sets(problem):
    embed, x, _, _ = problem
    found = geometric_complexity_to_error(embed, x[:5], jax.random.key(0))
    assert_same_numbers(found.mean, np.mean(exact_norms(embed, x[:5])))
    assert found[1:] == (0, 5, 0, 5 * 10, True)
    constant, broken = (
        geometric_complexity_to_error(
            jax.tree_util.Partial(jnp.multiply, jnp.float32(factor)), x[:100], jax.random.key(0)
        )
        for factor in (0, np.nan)
    )
    assert constant.mean == 0
    assert constant.set_sem == 0
    assert np.isnan(broken.mean)


def z_value(found, exact):
    return abs(float(found.mean) - exact) / max(float(found.set_sem), 1e-5 * exact)


@pytest.mark.parametrize("case", ["rare class", "identical", "identical but one", "rare image"])
def test_covariates_that_do_not_vary_in_the_sample(problem, case):
    """Such a covariate must not pass for the mean, which halved it."""
    embed, x, _, _ = problem
    x, labels = x[:3000], None
    if case == "rare class":
        labels = np.zeros(3000, int)
        labels[7] = 1
    elif case == "rare image":
        x = x.copy()
        x[1] *= 100
    else:
        x = np.full_like(x, 0.1)
        if case == "identical but one":
            x[5] = 1
    exact = np.mean(exact_norms(embed, x))
    for seed in range(3):
        found = geometric_complexity_to_error(
            embed, x, jax.random.key(seed), labels=labels, relative_error=0.05
        )
        assert z_value(found, exact) < 4.5


@pytest.mark.slow
@pytest.mark.parametrize("num_of_weight", [1, 60])
def test_a_set_in_which_few_examples_carry_gc(problem, num_of_weight):
    # With all or nearly all examples drawn, nothing excuses a wrong standard error.
    embed, x, _, _ = problem
    x = np.where(np.arange(1000)[:, None] < num_of_weight, x[:1000], 0)
    mostly_blank = jax.tree_util.Partial(squashed, embed)
    exact = np.mean(exact_norms(embed, x, squash=True))
    for seed in range(3):
        found = geometric_complexity_to_error(
            mostly_blank, x, jax.random.key(seed), relative_error=0.05
        )
        assert z_value(found, exact) < 4.5


@pytest.mark.slow
@pytest.mark.parametrize("num_classes", [20, 40])
def test_many_classes_do_not_fit_the_noise(problem, num_classes):
    # Up to 22 enter the fit of a pilot of 256.
    embed, x, _, _ = problem
    x, labels = x[:4000], np.arange(4000) % num_classes
    exact = np.mean(exact_norms(embed, x))
    z = [
        z_value(
            geometric_complexity_to_error(
                embed, x, jax.random.key(seed), labels=labels, relative_error=0.05
            ),
            exact,
        )
        for seed in range(12)
    ]
    # Two dozen covariates on as many examples gave a standard deviation of 2.3.
    assert np.sqrt(np.mean(np.square(z))) < 1.7


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float64, np.uint8, np.int64, bool])
def test_inputs_are_cast_up(problem, dtype):
    embed, x, _, _ = problem
    x = np.abs(x[:100] * 3).astype(dtype)
    found = [
        geometric_complexity_to_error(embed, inputs, jax.random.key(0), relative_error=0.1)
        for inputs in (x, x.astype(np.float32))
    ]
    assert found[0].mean.dtype == found[0].set_sem.dtype == jnp.float32
    assert_same_numbers(found[0][:2], found[1][:2])


@pytest.mark.parametrize("place", [0, -1])
def test_one_bad_image_does_not_hide_the_rest(problem, place):
    embed, x, _, exact = problem
    x = x.copy()
    drawn = np.asarray(jax.random.permutation(jax.random.split(jax.random.key(0))[0], len(x)))
    x[drawn[place]] = np.inf
    found = geometric_complexity_to_error(embed, x, jax.random.key(0), relative_error=0.05)
    if place == 0:
        assert np.isnan(found.mean)
    else:
        assert z_value(found, exact) < 4.5


class GivenNorms(drawn_sample.DrawnSample):
    """A sample of examples whose exact norms are known beforehand."""

    def __init__(self, norms, order):
        self.order, self._norms_of_all = order, norms
        self.full_rank, self.left, self.num_products = 1, np.inf, 0
        self._norms = np.zeros((0, 1))

    def _exact_norms(self, places):
        return self._norms_of_all[self.order[places]]


@pytest.mark.parametrize("skewed", ["norms", "residuals"])
def test_intervals_of_skewed_norms_cover(skewed):
    """The stopping rule takes away what the standard error must give back."""
    rng = np.random.default_rng(0)
    covariates = rng.normal(size=(20000, 9)) if skewed == "residuals" else np.zeros((20000, 0))
    if skewed == "residuals":
        norms, error, num_pilot = 1 + np.exp(covariates[:, 0]), 0.05, 64
    else:
        norms, error, num_pilot = np.exp(1.5 * rng.normal(size=20000)), 0.08, 256
    covariates = covariates - covariates.mean(axis=0)
    covered, errors = [], []
    for _ in range(400):
        sample = GivenNorms(norms, rng.permutation(20000))
        known = regression_estimate.Covariates(
            covariates[sample.order], np.zeros(20000, int), np.ones(1)
        )
        found = planned_estimate._draw_until(sample, known, error, num_pilot)
        errors.append(float(found.mean) / norms.mean() - 1)
        covered.append(abs(errors[-1]) * norms.mean() < 1.96 * found.set_sem)
    # 94 and 96% in 4,000 trials, and 90 and 85% where what was measured last is reported.
    assert np.mean(covered) >= 0.92
    # And the bias to 0.4 and 0.2%.
    bias, sampling = (-0.02, 0.004) if skewed == "norms" else (-0.01, 0.002)
    assert abs(np.mean(errors) - bias) < 3 * sampling


@pytest.mark.slow
def test_a_budget_ends_the_search(problem):
    embed, x, labels, _ = problem
    x, labels = x[:600], labels[:600]
    exact = np.mean(exact_norms(embed, x))
    for budget in (700, 1300):
        found = geometric_complexity_to_error(
            embed, x, jax.random.key(0), relative_error=1e-6, labels=labels, max_products=budget
        )
        assert not found.met
        assert budget / 2 < found.num_products <= budget
        assert found.set_sem > 1e-6 * found.mean
        assert z_value(found, exact) < 4.5
    found = geometric_complexity_to_error(
        embed, x[:400], jax.random.key(0), relative_error=1e-6, max_products=10 * 400 + 512
    )
    assert found[1:] == (0, 400, 0, 10 * 400 + 512, True)
    blank = jax.tree_util.Partial(jnp.multiply, jnp.float32(0))
    found = geometric_complexity_to_error(blank, x, jax.random.key(0), max_products=1000)
    assert np.isnan(found.set_sem)
    assert (found.mean, found.met) == (0, False)
    with pytest.raises(ValueError, match="max_products=100 is below the 512 of the pilot"):
        geometric_complexity_to_error(embed, x, jax.random.key(0), max_products=100)


def test_covariates_enter_as_the_sample_grows():
    rng = np.random.default_rng(0)
    labels = rng.choice(5, 4000, p=(0.05, 0.3, 0.3, 0.3, 0.05))
    order = rng.permutation(4000)
    known = regression_estimate.known_covariates(rng.normal(size=(4000, 4, 4, 3)), labels, order)
    assert known.pixels.shape == (4000, 9)
    whole = known.of_first(4000)
    np.testing.assert_allclose(whole.mean(axis=0), 0, atol=1e-12)
    # Of mean 0 over all, and so the class itself up to a constant.
    frequent = np.argmax(np.bincount(labels))
    np.testing.assert_allclose(np.ptp(whole[labels[order] == frequent, 9]), 0, atol=1e-12)
    assert [known.of_first(n).shape[1] for n in (255, 256, 4000)] == [0, 9 + 4, 9 + 4]
    many = known._replace(ranks=np.arange(4000) % 40, shares=np.full(40, 1 / 40))
    assert [many.of_first(n).shape[1] for n in (256, 399, 400, 480)] == [9, 9, 40, 48]


def _sample(embed, x):
    """With products for ever, since so many dimensions are never exact."""
    checked, _ = check_embedding(embed, x[:32])
    return drawn_sample.DrawnSample(checked, x, jax.random.key(0), 10**6, None)


def test_probes_are_unbiased_for_every_example(problem):
    embed, x, _, _ = problem
    sample = _sample(embed, x[:64])
    probes = sample.draw(64, 400)
    exact = exact_norms(embed, x[:64])[sample.order]
    z = (probes.mean(axis=1) - exact) / (probes.std(axis=1, ddof=1) / 20)
    assert np.abs(z).max() < 4.5


def test_one_probe_is_exact_where_the_jacobian_points_along_the_embedding():
    direction = jnp.arange(1.0, 9)

    def embed(x):
        return jnp.sum(x**2, axis=1)[:, None] * direction[None]

    x = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
    sample = _sample(embed, x)
    exact = 4 * np.sum(x[sample.order] ** 2, axis=1) * np.sum(direction**2)
    # rtol: float32 and a basis that is orthonormal to about 1e-6.
    np.testing.assert_allclose(sample.draw(64, 1)[:, 0], exact, rtol=1e-4)


def test_least_squares_is_that_of_the_textbook():
    rng = np.random.default_rng(0)
    a, y = rng.normal(size=(40, 3)) + 0.3, rng.normal(size=(40, 1))
    fit = regression_estimate.least_squares(y, a, exact=True)
    design = np.column_stack([np.ones(40), a])
    inverse = np.linalg.inv(design.T @ design)
    beta = inverse @ design.T @ y[:, 0]
    leverage = np.einsum("np,pq,nq->n", design, inverse, design)
    errors = (y[:, 0] - design @ beta) / (1 - leverage)
    hc3 = inverse @ (design.T * errors**2) @ design @ inverse
    np.testing.assert_allclose(fit.mean, beta[0], rtol=1e-9)
    np.testing.assert_allclose(fit.variance, 40 * hc3[0, 0], rtol=1e-9)


def test_one_product_is_exact_for_one_dimension(problem):
    embed, x, _, _ = problem

    first, second = embed.args[0]
    narrow = jax.tree_util.Partial(network, (first, second[:1]))
    found = geometric_complexity_to_error(narrow, x, jax.random.key(0), relative_error=0.05)
    assert found.num_examples < 2500
    assert found.num_probes == 0
    assert z_value(found, np.mean(exact_norms(narrow, x))) < 4.5


def test_bad_input_is_named(problem):
    embed, x, labels, _ = problem
    key = jax.random.key(0)
    for kwargs, message in (
        ({"relative_error": 0.0}, "relative_error=0.0"),
        ({"relative_error": float("nan")}, "relative_error=nan"),
        ({"num_pilot": 3}, "num_pilot=3"),
        ({"labels": labels.astype(float)}, "integers are needed"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            geometric_complexity_to_error(embed, x, key, **kwargs)
    with pytest.raises(ValueError, match="cannot be traced"):
        jax.jit(lambda x: geometric_complexity_to_error(embed, x, key).mean)(x)
    with pytest.raises(ValueError, match="cannot be traced"):
        jax.vmap(lambda key: geometric_complexity_to_error(embed, x, key).mean)(
            jax.random.split(key, 2)
        )
    with pytest.raises(ValueError, match="no example"):
        geometric_complexity_to_error(embed, x[:0], key)
