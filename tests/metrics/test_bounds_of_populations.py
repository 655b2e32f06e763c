"""The bounds on populations known exactly: Gaussian inputs, linear and sine embeddings."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gc_nc.metrics import (
    class_geometric_complexity,
    nearest_mean_error_bound,
    neural_collapse,
    neural_collapse_bound,
    poincare_constant,
    squared_jacobian_norms,
)
from tests.metrics.test_bounds import bound_jitted, of_classes, statistics

MAX_CLASSES = MAX_DIM = 6


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
        return neural_collapse(stats), *bound, poincare_constant(gc, stats)

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
    package = squared_jacobian_norms(
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
    bound = bound_jitted(of_classes(gc), stats, poincare_constant=0.25)
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
