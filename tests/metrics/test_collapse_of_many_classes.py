"""NC1, NC2 and the nearest mean of hundreds of classes: memory and value."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gc_nc.metrics import init_class_statistics, nc1, nc2, nearest_class_mean
from tests.metrics.metric_table import jit

NUM_CLASSES, DIM = 500, 1024


@pytest.mark.slow
def test_many_classes_need_memory_for_the_means_and_the_scatter_only():
    shapes = jax.eval_shape(lambda: init_class_statistics(NUM_CLASSES, DIM, scatter=True))
    budget = 4 * (NUM_CLASSES * DIM + DIM**2)
    for measure, factor in ((nc1, 4), (nc2, 2)):
        memory = jax.jit(measure).lower(shapes).compile().memory_analysis()
        assert memory.temp_size_in_bytes < factor * budget
    queries = jax.ShapeDtypeStruct((64, DIM), jnp.float32)
    memory = jax.jit(nearest_class_mean).lower(queries, shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 3 * 4 * (NUM_CLASSES * DIM + 64 * DIM)


def test_many_classes_of_many_dimensions():
    rng = np.random.default_rng(0)
    means = rng.normal(size=(NUM_CLASSES, DIM)).astype(np.float32)
    # Isotropic S_W = I: NC1 = sum over the k - 1 singular values s of 1 / s^2.
    stats = init_class_statistics(NUM_CLASSES, DIM, scatter=True)._replace(
        counts=jnp.ones(NUM_CLASSES), mean_offsets=means, scatter=NUM_CLASSES * jnp.eye(DIM)
    )
    gram = (means - means.mean(0)).astype(np.float64)
    eigenvalues = np.linalg.eigvalsh(gram @ gram.T)[1:]
    np.testing.assert_allclose(jax.jit(nc1)(stats), np.sum(1 / eigenvalues), rtol=1e-4)


def test_many_means_on_a_line_do_not_coincide():
    means = np.arange(300, dtype=np.float32)[:, None] / 300
    stats = init_class_statistics(300, 1, scatter=True)._replace(
        counts=jnp.full(300, 2.0), mean_offsets=means, scatter=jnp.full((1, 1), 600e-4)
    )
    stats = stats._replace(squared_deviations=jnp.full(300, 2e-4))
    np.testing.assert_allclose(jit(nc1)(stats), 1e-4 / means.var() / 300, rtol=1e-4)
