"""Bounds of docs/proofs.md: hand values, degenerate inputs, and populations known exactly."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gc_nc.metrics import (
    class_geometric_complexity,
    geometric_collapse,
    geometric_complexity_interval,
    init_class_statistics,
    jacobian_norms,
    nearest_mean_error_bound,
    neural_collapse,
    neural_collapse_bound,
    poincare_constant,
    update_class_statistics,
)

MAX_CLASSES = MAX_DIM = 6

# One program instead of the many small ones of eager execution.
bound_jitted = jax.jit(neural_collapse_bound)


def statistics(means, variances, counts):
    """Class statistics of a population; classes with count 0 are absent. Batch axes in front."""
    means, variances, counts = (np.asarray(a, np.float32) for a in (means, variances, counts))
    *batch, num_classes, embedding_dim = means.shape
    empty = init_class_statistics(num_classes, embedding_dim)
    empty = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (*batch, *leaf.shape)), empty)
    return empty._replace(
        counts=jnp.asarray(counts),
        mean_offsets=jnp.asarray(means),
        squared_deviations=jnp.asarray(counts * variances),
    )


def unwrapped(function):
    """The function without the type checks of tests/conftest.py, which users do not have."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


# Squared distances 1, 9 and 4; frequencies 0.5, 0.3 and 0.2; the last class is absent.
HAND = statistics([[0.0], [1], [3], [7]], [1, 2, 4, 0], [5, 3, 2, 0])
HAND_GC = np.array([2.0, 8, 3, np.nan], np.float32)


# Hand values and degenerate inputs.


def test_class_geometric_complexity_by_hand():
    gc = class_geometric_complexity(np.array([1, 3, 8, 2]), np.array([0, 0, 3, 3]), 5)
    np.testing.assert_allclose(gc, [2, np.nan, np.nan, 5, np.nan], rtol=1e-6)
    norms = np.array([1, 3, 8, 2, np.nan], np.float32)
    labels = np.array([0, 0, 3, 3, -7])
    gc = class_geometric_complexity(norms, labels, 4, weights=np.array([1, 3, 1, 0, 0]))
    np.testing.assert_allclose(gc, [2.5, np.nan, np.nan, 8], rtol=1e-6)


def test_class_geometric_complexity_of_a_million_norms():
    rng = np.random.default_rng(0)
    norms = rng.uniform(900, 1100, 10**6).astype(np.float32)
    labels = rng.integers(0, 2, norms.size)
    # One class 10^9 times below the other must not feel it.
    norms[labels == 1] *= 1e-9
    expected = [norms[labels == i].mean(dtype=np.float64) for i in range(2)]
    gc = class_geometric_complexity(norms, labels, 2)
    np.testing.assert_allclose(gc, expected, rtol=1e-6)


def test_class_geometric_complexity_jit_weights_and_gradient():
    norms, labels = np.array([1.0, 4, 6, 2, np.nan], np.float32), jnp.array([0, 0, 2, 9, 1])
    weights = jnp.array([1.0, 2, 1, 1, 0])

    def measure(norms):
        return class_geometric_complexity(norms, labels, 3, weights=weights)

    traced = jax.jit(class_geometric_complexity, static_argnums=2)
    np.testing.assert_allclose(traced(norms, labels, 3, weights=weights), [3, np.nan, 6], rtol=1e-6)
    with pytest.raises(ValueError, match=r"label 9 is outside 0\.\.2 \(num_classes=3\)"):
        measure(norms)
    labels = labels.at[3].set(2)
    np.testing.assert_allclose(measure(norms), [3, np.nan, 4], rtol=1e-6)
    gradient = jax.grad(lambda n: jnp.nansum(measure(n)))(norms)
    np.testing.assert_allclose(gradient, [1 / 3, 2 / 3, 1 / 2, 1 / 2, 0], rtol=1e-6)


@pytest.mark.parametrize(
    ("norms", "labels", "num_classes", "match"),
    [
        (np.zeros(0), np.zeros(0, int), 2, r"shape \(0,\)"),
        (np.zeros((2, 1)), np.zeros(2, int), 2, r"shape \(2, 1\)"),
        (np.zeros(2), np.zeros(2), 2, "labels are float64"),
        (np.zeros(2), np.zeros(2, int), 0, "num_classes=0"),
        (np.zeros(1), np.array([2**32 + 1]), 2, "label 4294967297 is outside"),
    ],
)
def test_class_geometric_complexity_refuses(norms, labels, num_classes, match):
    with pytest.raises(ValueError, match=match):
        unwrapped(class_geometric_complexity)(norms, labels, num_classes)


def test_poincare_constant_by_hand():
    np.testing.assert_allclose(poincare_constant(HAND, HAND_GC), 4 / 3, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(poincare_constant)(HAND, HAND_GC), 4 / 3, rtol=1e-6)
    stats = statistics([[0.0], [1]], [0, 6], [1, 1])
    assert poincare_constant(stats, np.array([0.0, 2])) == 3
    assert poincare_constant(stats, np.array([1.0, 0])) == np.inf
    assert np.isnan(poincare_constant(stats, np.array([np.nan, 1])))
    assert np.isnan(poincare_constant(statistics([[0.0]], [0], [3]), np.array([0.0])))
    with pytest.raises(ValueError, match=r"class_gc=-1.0 must be 0 or more"):
        poincare_constant(stats, np.array([2.0, -1]))
    assert np.isnan(jax.jit(poincare_constant)(stats, np.array([2.0, -1])))
    with pytest.raises(ValueError, match=r"class_gc of shape \(3,\) for 2 classes"):
        unwrapped(poincare_constant)(stats, np.ones(3))


def test_neural_collapse_bound_by_hand():
    bound = neural_collapse_bound(HAND_GC, HAND, poincare_constant=6.0)
    # sum over j of 1 / d_ij^2 is 10/9, 5/4, 13/36; GC = 0.5 * 2 + 0.3 * 8 + 0.2 * 3 = 4.
    per_class = 6 / 6 * (2 * 10 / 9 + 8 * 5 / 4 + 3 * 13 / 36)
    paper = 6 / 6 * 4 / 0.2 * (10 / 9 + 5 / 4 + 13 / 36)
    np.testing.assert_allclose(bound.per_class, per_class, rtol=1e-6)
    np.testing.assert_allclose(bound.paper, paper, rtol=1e-6)
    traced = bound_jitted(HAND_GC, HAND, poincare_constant=6.0)
    np.testing.assert_allclose(traced, bound, rtol=1e-6)


def test_balanced_classes_give_the_paper_s_geometric_collapse():
    stats = HAND._replace(counts=jnp.array([7.0, 7, 7, 0]))
    bound = bound_jitted(HAND_GC, stats, poincare_constant=0.5)
    assert bound.paper == 0.5 * geometric_collapse(jnp.sum(HAND_GC[:3] * 7) / 21, stats)


def test_the_mean_gc_alone_does_not_bound_unequal_classes():
    # A map that is flat on the frequent class: v = (0, 1), GC_i = (0, 1), d = 1, c = 1.
    stats = statistics([[0.0], [1]], [0, 1], [9, 1])
    bound = bound_jitted(np.array([0.0, 1]), stats, poincare_constant=1.0)
    assert neural_collapse(stats) == 0.5
    assert neural_collapse(stats) > geometric_collapse(0.1, stats)
    np.testing.assert_allclose(bound, (1.0, 0.5), rtol=1e-6)


def test_the_two_forms_are_twice_to_any_number_of_times_apart():
    means = [[0.0], [1], [100]]
    stats = statistics(means, [0, 0, 0], [1, 1, 1])

    def ratio(gc):
        bound = bound_jitted(np.array(gc), stats, poincare_constant=1.0)
        return bound.paper / bound.per_class

    np.testing.assert_allclose(ratio([5.0, 5, 5]), 3, rtol=1e-5)
    np.testing.assert_allclose(ratio([5.0, 0, 0]), 2, rtol=1e-3)
    assert ratio([0.0, 0, 5]) > 9000


def test_neural_collapse_bound_of_degenerate_classes():
    equal = statistics([[1.0], [1]], [0, 1], [1, 1])
    for c in (1.0, np.inf):
        bound = bound_jitted(np.array([0.0, 1]), equal, poincare_constant=c)
        assert bound == (np.inf, np.inf)
    bound = bound_jitted(np.array([0.0, 0]), equal, poincare_constant=1.0)
    assert np.isnan(bound).all()
    apart = statistics([[1.0], [2]], [0, 0], [1, 1])
    assert bound_jitted(np.zeros(2), apart, poincare_constant=1.0) == (0, 0)
    for gc, c in (([np.nan, 1.0], 1.0), ([1.0, 1.0], np.nan)):
        assert np.isnan(bound_jitted(np.array(gc), apart, poincare_constant=c)).all()


@pytest.mark.parametrize(
    ("gc", "constant", "counts", "match"),
    [
        ([1.0, 1], 1.0, [1, 0], "1 of 2 classes"),
        ([1.0, 1], 1.0, [0, 0], "0 of 2 classes"),
        ([1.0, 1], -2.0, [1, 1], "poincare_constant=-2.0 must be 0 or more"),
        ([-3.0, 1], 1.0, [1, 1], "class_gc=-3.0 must be 0 or more"),
    ],
)
def test_neural_collapse_bound_refuses(gc, constant, counts, match):
    stats = statistics([[0.0], [1]], [1, 1], counts)
    with pytest.raises(ValueError, match=match):
        neural_collapse_bound(np.array(gc), stats, poincare_constant=constant)
    traced = bound_jitted(np.array(gc), stats, poincare_constant=constant)
    assert np.isnan(traced).all()


def test_gradients_are_finite_with_absent_and_collapsed_classes():
    rng = np.random.default_rng(0)
    labels = np.array([0, 0, 0, 1, 1, 1, 3, 3])
    z = rng.normal(size=(8, 3)).astype(np.float32)
    z[6:] = 1  # class 3 has v = GC = 0, class 2 no example
    norms = np.array([1.0, 2, 3, 4, 5, 6, 0, 0], np.float32)

    def error(z, norms):
        stats = update_class_statistics(init_class_statistics(4, 3), z, jnp.asarray(labels))
        gc = class_geometric_complexity(norms, jnp.asarray(labels), 4)
        constant = poincare_constant(stats, gc)
        bound = neural_collapse_bound(gc, stats, poincare_constant=constant)
        # Small, so that the cap at 1 stays out of the way.
        return sum(nearest_mean_error_bound(1e-4 * nc, 3) for nc in bound) + constant

    value, gradients = jax.jit(jax.value_and_grad(error, argnums=(0, 1)))(z, norms)
    assert value < 2
    for gradient in gradients:
        assert np.isfinite(gradient).all()
        assert np.abs(gradient).max() > 0


# Populations known exactly: Gaussian inputs, linear and sine embeddings.


class Mixture(NamedTuple):
    """x ~ N(m_i, S_i) in class i with frequency p_i; f = W x + b, or its sine."""

    input_means: np.ndarray
    roots: np.ndarray  # S_i = roots roots^T
    frequencies: np.ndarray
    kernel: np.ndarray
    bias: np.ndarray
    kind: str

    def embed(self, x):
        u = x @ self.kernel.T + self.bias
        return u if self.kind == "linear" else np.sin(u)

    @property
    def poincare(self):
        return max(np.linalg.eigvalsh(root @ root.T)[-1] for root in self.roots)

    def population(self):
        """Class means (k, K), class variances (k,) and GC_i (k,), in closed form.

        u ~ N(m, s): E sin u = exp(-s/2) sin m, E sin^2 u = (1 - exp(-2s) cos 2m) / 2 and
        E cos^2 u = (1 + exp(-2s) cos 2m) / 2, from
        E exp(i t u) = exp(i t m - t^2 s / 2).
        """
        m = self.input_means @ self.kernel.T + self.bias
        s = ((self.kernel[None] @ self.roots) ** 2).sum(-1)
        squared_rows = (self.kernel**2).sum(1)
        if self.kind == "linear":
            return m, s.sum(1), np.full(len(m), squared_rows.sum())
        means, double = np.exp(-s / 2) * np.sin(m), np.exp(-2 * s) * np.cos(2 * m)
        variances = (1 - double) / 2 - means**2
        return means, variances.sum(1), ((1 + double) / 2) @ squared_rows

    def sample(self, rng, *shape):
        """(k, *shape, D) inputs, independent."""
        normal = rng.normal(size=(len(self.roots), math.prod(shape), self.roots.shape[-1]))
        x = self.input_means[:, None] + normal @ self.roots.transpose(0, 2, 1)
        return x.reshape(len(x), *shape, -1)

    def nearest_mean_error(self, rng, trials, num_shots):
        """Mean error of nearest-mean classification, and its standard error. Ties are errors."""
        queries = self.embed(self.sample(rng, trials))
        if num_shots is None:
            centres = np.broadcast_to(self.population()[0][:, None], queries.shape)
        else:
            centres = self.embed(self.sample(rng, trials, num_shots)).mean(2)
        distances = ((queries[:, None] - centres[None]) ** 2).sum(-1)
        own = np.einsum("iit->it", distances).copy()
        np.einsum("iit->it", distances)[:] = np.inf
        wrong = (distances.min(1) <= own).mean(0)
        return wrong.mean(), wrong.std(ddof=1) / math.sqrt(trials)


def random_mixture(rng, kind, shape):
    k, D, K = rng.integers(2, 7), rng.integers(2, 6), rng.integers(1, 7)
    roots = rng.normal(size=(k, D, D)) / math.sqrt(D) * 10 ** rng.uniform(-1.5, 0)
    kernel = rng.normal(size=(K, D))
    if shape == "isotropic":  # v_i = c GC_i for linear maps
        roots = np.broadcast_to(10 ** rng.uniform(-1.5, 0) * np.eye(D), (k, D, D))
    elif shape == "aligned":  # so too: every row points along the widest direction of every class
        roots = np.broadcast_to(roots[:1], (k, D, D))
        kernel = rng.normal(size=(K, 1)) * np.linalg.eigh(roots[0] @ roots[0].T)[1][:, -1]
    balanced = shape != "general" or rng.random() < 0.3
    return Mixture(
        input_means=rng.normal(size=(k, D)) * 10 ** rng.uniform(-0.5, 1),
        roots=roots,
        frequencies=np.full(k, 1 / k) if balanced else rng.dirichlet(np.ones(k)),
        kernel=kernel,
        bias=rng.uniform(-np.pi, np.pi, K),
        kind=kind,
    )


@functools.cache
def mixtures():
    rng = np.random.default_rng(0)
    shapes = ["isotropic", "aligned", *["general"] * 8]
    return [random_mixture(rng, ("linear", "sine")[i % 2], shapes[i // 2 % 10]) for i in range(200)]


@functools.cache
def measured():
    """What the package says about the 200 populations: one padded batch, one program."""
    means = np.zeros((200, MAX_CLASSES, MAX_DIM))
    variances, counts, gc = np.zeros((3, 200, MAX_CLASSES))
    for index, mixture in enumerate(mixtures()):
        mu, v, g = mixture.population()
        k, K = mu.shape
        means[index, :k, :K], variances[index, :k], gc[index, :k] = mu, v, g
        counts[index, :k] = mixture.frequencies

    def measure(stats, gc, constant):
        bound = neural_collapse_bound(gc, stats, poincare_constant=constant)
        return neural_collapse(stats), *bound, poincare_constant(stats, gc)

    constants = np.array([m.poincare for m in mixtures()], np.float32)
    stats = statistics(means, variances, counts)
    results = jax.jit(jax.vmap(measure))(stats, gc.astype(np.float32), constants)
    return (constants, *(np.asarray(r, np.float64) for r in results))


def test_closed_forms_against_samples():
    mixture = mixtures()[5]
    assert mixture.kind == "sine"
    x = mixture.sample(np.random.default_rng(1), 50_000)
    z, (k, n) = mixture.embed(x), x.shape[:2]
    means, variances, gc = mixture.population()
    spread = ((z - means[:, None]) ** 2).sum(-1)
    norms = np.cos(x @ mixture.kernel.T + mixture.bias) ** 2 @ (mixture.kernel**2).sum(1)
    np.testing.assert_array_less(
        np.abs(z.mean(1) - means), 5 * z.std(1) / math.sqrt(n), err_msg="class means"
    )
    np.testing.assert_array_less(
        np.abs(spread.mean(1) - variances), 5 * spread.std(1) / math.sqrt(n), err_msg="variances"
    )
    labels = np.repeat(np.arange(k), n)
    sampled = class_geometric_complexity(norms.ravel().astype(np.float32), labels, k)
    np.testing.assert_array_less(np.abs(sampled - gc), 5 * norms.std(1) / math.sqrt(n))
    # The closed form of the norm is the package's own.
    kernel, bias = (a.astype(np.float32) for a in (mixture.kernel, mixture.bias))
    few = x[0, :20].astype(np.float32)
    package = jacobian_norms(
        lambda b: jnp.sin(jnp.matmul(b, kernel.T, precision="highest") + bias[None]), few
    )
    np.testing.assert_allclose(package, norms[0, :20], rtol=1e-4, atol=1e-4)


def test_neural_collapse_is_below_both_bounds_of_200_populations():
    constants, nc, paper, per_class, empirical = measured()
    for mixture, measured_nc in zip(mixtures(), nc, strict=True):
        mu, v, gc = mixture.population()
        assert (v <= mixture.poincare * gc * (1 + 1e-9)).all()
        squares = ((mu[:, None] - mu[None]) ** 2).sum(-1)[~np.eye(len(mu), dtype=bool)]
        cdnv = ((v[:, None] + v[None]) / 2)[~np.eye(len(mu), dtype=bool)] / squares
        np.testing.assert_allclose(measured_nc, cdnv.mean(), rtol=1e-4)
    # float32 inside; population values have no other error.
    rounding = 1 + 1e-5
    assert (nc <= per_class * rounding).all()
    assert (2 * per_class <= paper * rounding).all()
    assert (empirical <= constants * rounding).all()
    assert (nc <= per_class / constants * empirical * rounding).all()
    # Nothing smaller would do: the first form is reached, and so is half of the second.
    equal = np.array([m.kind == "linear" for m in mixtures()]) & (np.arange(200) // 2 % 10 < 2)
    np.testing.assert_allclose(nc[equal], per_class[equal], rtol=1e-4)
    np.testing.assert_allclose(empirical[equal], constants[equal], rtol=1e-4)
    assert (nc > per_class / 2).sum() >= equal.sum()
    assert (nc > paper / 2.01).any()
    # The sine populations are no mere copies of these: some come near, some stay far away.
    sine = np.array([m.kind == "sine" for m in mixtures()])
    assert (per_class / nc)[sine].min() < 1.5
    assert (per_class / nc)[sine].max() > 5


@pytest.mark.parametrize("num_shots", [1, 5, None])
def test_nearest_mean_error_is_below_its_bounds_in_200_populations(num_shots):
    _, nc, paper, per_class, _ = measured()
    rng = np.random.default_rng(2)
    informative = 0
    for mixture, *limits in zip(mixtures(), nc, per_class, paper, strict=True):
        k = len(mixture.roots)
        error, sem = mixture.nearest_mean_error(rng, 500, num_shots)
        bounds = [float(nearest_mean_error_bound(limit, k, num_shots)) for limit in limits]
        # Chebyshev is so generous for Gaussians that no allowance for sampling is needed.
        assert error + 3 * sem <= bounds[0] or bounds[0] == 1
        assert bounds[0] <= bounds[1] * (1 + 1e-5) <= bounds[2] * (1 + 2e-5)
        informative += bounds[0] < 0.5
    assert informative >= 30


def test_nearest_mean_error_of_two_isotropic_classes_in_closed_form():
    # f = 2 x, S_i = 0.5^2 I, input means 3 apart: err = Phi(-d / (2 sigma)), d = 6, sigma = 1.
    mixture = Mixture(
        input_means=np.array([[0.0, 0], [0, 3]]),
        roots=np.broadcast_to(0.5 * np.eye(2), (2, 2, 2)),
        frequencies=np.array([0.5, 0.5]),
        kernel=2 * np.eye(2),
        bias=np.zeros(2),
        kind="linear",
    )
    exact = math.erfc(3 / math.sqrt(2)) / 2
    error, sem = mixture.nearest_mean_error(np.random.default_rng(3), 100_000, None)
    assert abs(error - exact) < 4 * sem
    mu, v, gc = mixture.population()
    stats = statistics(mu, v, [1, 1])
    bound = neural_collapse_bound(gc.astype(np.float32), stats, poincare_constant=0.25)
    np.testing.assert_allclose(bound.per_class, 2 / 36, rtol=1e-6)  # tr Var / d^2: equality
    np.testing.assert_allclose(nearest_mean_error_bound(bound.per_class, 2), 8 / 36, rtol=1e-6)
    assert exact < 8 / 36


def test_nearest_mean_bound_with_exact_means_is_reached():
    # Mass p half way to the rival's mean, the rest so that the mean is 0 (Cantelli's case): d = 2.
    p = 0.01
    z = np.array([1.0, -p / (1 - p)])
    variance = p * z[0] ** 2 + (1 - p) * z[1] ** 2
    stats = statistics([[0.0], [2]], [variance, variance], [1, 1])
    bound = float(nearest_mean_error_bound(neural_collapse(stats), 2))
    assert p < bound < 1.02 * p
    assert p > bound / 2


@functools.cache
def rare_values():
    """5000 pairs of classes on a line, z with few values of which all but one are rare.

    Classes, values and probabilities (5000, 2, 3). Unlike Gaussians these come near Chebyshev.
    """
    rng = np.random.default_rng(7)
    away = rng.uniform(-3, 3, (5000, 2, 2))
    z = np.concatenate([np.zeros((5000, 2, 1)), away], 2) + np.array([[0.0], [2]])
    rare = 10 ** rng.uniform(-4, -1, (5000, 2, 2))
    return z, np.concatenate([1 - rare.sum(2, keepdims=True), rare], 2)


@pytest.mark.parametrize(("num_shots", "reached"), [(1, 3 / 48), (2, 3 / 32), (None, 0.8)])
def test_nearest_mean_error_of_rare_values_enumerated(num_shots, reached):
    z, p = rare_values()
    means = (z * p).sum(2)
    variances = ((z - means[..., None]) ** 2 * p).sum(2)
    nc = variances.mean(1) / (means[:, 0] - means[:, 1]) ** 2

    def centres(c):
        if num_shots is None:
            return means[:, c, None], np.ones((len(z), 1))
        if num_shots == 1:
            return z[:, c], p[:, c]
        pairs = (z[:, c, :, None] + z[:, c, None]) / 2, p[:, c, :, None] * p[:, c, None]
        return tuple(a.reshape(len(z), -1) for a in pairs)

    error = 0
    for own, rival in ((0, 1), (1, 0)):
        # Axes: population, query, own centre, rival's centre.
        own_at, own_p = (a[:, None, :, None] for a in centres(own))
        rival_at, rival_p = (a[:, None, None] for a in centres(rival))
        query, query_p = z[:, own, :, None, None], p[:, own, :, None, None]
        wrong = np.abs(query - rival_at) <= np.abs(query - own_at)
        error = error + (wrong * query_p * own_p * rival_p).sum((1, 2, 3)) / 2
    bound = jax.vmap(lambda nc: nearest_mean_error_bound(nc, 2, num_shots))(nc.astype(np.float32))
    bound = np.asarray(bound)
    assert (error <= bound * (1 + 1e-5)).all()
    # With exact means half the constant would be too small; with few shots the union is generous.
    ratio = (error / bound)[bound < 1]
    assert ratio.max() > reached


def test_nearest_mean_error_bound_by_hand():
    np.testing.assert_allclose(nearest_mean_error_bound(0.001, 5), 0.016, rtol=1e-6)
    np.testing.assert_allclose(nearest_mean_error_bound(0.001, 5, 1), 0.192, rtol=1e-6)
    np.testing.assert_allclose(nearest_mean_error_bound(0.001, 5, 5), 0.0896, rtol=1e-6)
    traced = jax.jit(nearest_mean_error_bound, static_argnums=(1, 2))
    for nc, expected in ((0.0, 0), (0.5, 1), (np.inf, 1), (np.nan, np.nan)):
        np.testing.assert_equal(float(nearest_mean_error_bound(nc, 2, 5)), float(expected))
        np.testing.assert_equal(float(traced(nc, 2, 5)), float(expected))
    assert np.isnan(traced(-1.0, 2, None))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((-0.1, 2), "nc=-0.1 must be 0 or more"),
        ((0.1, 1), "num_classes=1 must be at least 2"),
        ((0.1, 2, 0), "num_shots=0 must be at least 1"),
    ],
)
def test_nearest_mean_error_bound_refuses(arguments, match):
    with pytest.raises(ValueError, match=match):
        nearest_mean_error_bound(*arguments)


# Confidence intervals.


def test_intervals_by_hand():
    norms = np.array([1.0, 3, 5, 7], np.float32)  # mean 4, unbiased variance 20 / 3
    half = 1000 * math.sqrt(math.log(20) / 8)
    wide = geometric_complexity_interval(norms, value_range=1000.0, delta=0.1, method="hoeffding")
    np.testing.assert_allclose(wide, (0, 4 + half), rtol=1e-6)
    many = np.tile(norms, 250)
    half = 8 * math.sqrt(math.log(2 / 0.05) / 2000)
    np.testing.assert_allclose(
        geometric_complexity_interval(many, value_range=8.0, method="hoeffding"),
        (4 - half, 4 + half),
        rtol=1e-5,
    )
    log_term = math.log(4 / 0.05)
    half = math.sqrt(2 * 5 * 1000 / 999 * log_term / 1000) + 7 * 8 * log_term / (3 * 999)
    interval = geometric_complexity_interval(many, value_range=8.0)
    np.testing.assert_allclose(interval, (4 - half, 4 + half), rtol=1e-5)
    traced = jax.jit(lambda n, r: geometric_complexity_interval(n, value_range=r))(many, 8.0)
    np.testing.assert_allclose(traced, interval, rtol=1e-6)
    assert geometric_complexity_interval(norms, value_range=8.0) == (0, 8)
    assert geometric_complexity_interval(norms, value_range=np.inf) == (0, np.inf)
    assert geometric_complexity_interval(np.zeros(3), value_range=0.0) == (0, 0)
    # Few large norms: the variance is small against R^2 and Bernstein is the narrower.
    narrow = geometric_complexity_interval(np.tile(norms, 500), value_range=100.0)
    wide = geometric_complexity_interval(np.tile(norms, 500), value_range=100.0, method="hoeffding")
    assert narrow.upper - narrow.lower < 0.5 * (wide.upper - wide.lower)


@pytest.mark.parametrize(
    ("norms", "options", "match"),
    [
        ([1.0, 9.0], {}, r"norm=9.0 must be in 0..value_range=8.0"),
        ([1.0, -1.0], {}, "norm=-1.0 must be in"),
        ([1.0, np.nan], {}, "norm=nan must be in"),
        ([1.0, np.inf], {"value_range": np.inf}, "norm=inf must be in"),
        ([1.0, 2.0], {"value_range": -1.0}, "value_range=-1.0 must be 0 or more"),
        ([1.0, 2.0], {"value_range": np.nan}, "value_range=nan must be 0 or more"),
        ([1.0], {}, "B of 2 or more"),
        ([], {"method": "hoeffding"}, "B of 1 or more"),
        ([1.0, 2.0], {"delta": 0.0}, "delta=0.0 must be between 0 and 1"),
        ([1.0, 2.0], {"delta": 1.0}, "delta=1.0 must be between 0 and 1"),
        ([1.0, 2.0], {"method": "normal"}, "'normal' is not one of hoeffding, emp"),
    ],
)
def test_intervals_refuse(norms, options, match):
    norms = np.array(norms, np.float32)
    interval = functools.partial(geometric_complexity_interval, **{"value_range": 8.0} | options)
    with pytest.raises(ValueError, match=match):
        interval(norms)
    if "must be in" in match or "value_range=" in match:
        assert np.isnan(jax.jit(interval)(norms)).all()


@functools.partial(jax.jit, static_argnames="method")
def intervals(norms, value_range, method):
    """Intervals of many samples, (trials, n) norms with a range each, at delta = 0.05."""
    return jax.vmap(lambda n, r: geometric_complexity_interval(n, value_range=r, method=method))(
        norms, jnp.broadcast_to(value_range, norms.shape[:1])
    )


def misses(norms, value_range, true_gc, method, shrink=1.0):
    """Share of samples whose interval, shrunk around its mean, does not hold the true GC."""
    lower, upper = intervals(norms.astype(np.float32), np.float32(value_range), method)
    mean = norms.mean(1)
    return np.mean(
        (mean - shrink * (mean - lower) > true_gc * (1 + 1e-6))
        | (mean + shrink * (upper - mean) < true_gc * (1 - 1e-6))
    )


TRIALS = 2000
ALLOWED = 0.05 + 3 * math.sqrt(0.05 * 0.95 / TRIALS)


@pytest.mark.parametrize("method", ["hoeffding", "empirical_bernstein"])
def test_intervals_hold_the_gc_of_sine_features(method):
    rng = np.random.default_rng(4)
    mixture = [m for m in mixtures() if m.kind == "sine"][7]
    true_gc = mixture.frequencies @ mixture.population()[2]
    squared_rows = (mixture.kernel**2).sum(1)
    labels = rng.choice(len(mixture.roots), (TRIALS, 40), p=mixture.frequencies)
    normal = rng.normal(size=(*labels.shape, mixture.roots.shape[-1]))
    x = mixture.input_means[labels] + np.einsum("tnde,tne->tnd", mixture.roots[labels], normal)
    norms = np.cos(x @ mixture.kernel.T + mixture.bias) ** 2 @ squared_rows
    # The true GC is the one that these samples scatter around.
    assert abs(norms.mean() - true_gc) < 5 * norms.std() / math.sqrt(norms.size)
    assert misses(norms, squared_rows.sum(), true_gc, method) <= ALLOWED


@pytest.mark.parametrize("method", ["hoeffding", "empirical_bernstein"])
def test_half_an_interval_is_not_enough(method):
    # Norms 0 or 2, equally often: the largest variance in a range of 2.
    norms = 2.0 * np.random.default_rng(5).integers(0, 2, (TRIALS, 4000))
    assert misses(norms, 2.0, 1.0, method) <= ALLOWED
    assert misses(norms, 2.0, 1.0, method, shrink=0.5) > ALLOWED


@pytest.mark.parametrize("method", ["hoeffding", "empirical_bernstein"])
def test_the_largest_norm_of_the_sample_is_no_range(method):
    # One input in 80 has norm 9, the others 0: 60% of samples of 40 see none of the large norms.
    norms = 9.0 * (np.random.default_rng(6).random((TRIALS, 40)) < 1 / 80)
    assert misses(norms, 9.0, 9 / 80, method) <= ALLOWED
    assert misses(norms, norms.max(1), 9 / 80, method) > 0.5
