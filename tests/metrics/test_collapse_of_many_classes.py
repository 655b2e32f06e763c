"""NC1, NC2 and the nearest mean of hundreds of classes: memory and value."""

import jax
import jax.numpy as jnp
import numpy as np

from gc_nc.metrics import init_class_statistics, nc1, nc2, nearest_class_mean
from tests.metrics.padded_statistics import statistics


def test_a_thousand_classes_need_memory_for_the_means_and_the_scatter_only():
    num_classes, dim = 1000, 2048
    shapes = jax.eval_shape(lambda: init_class_statistics(num_classes, dim, scatter=True))
    budget = 4 * (num_classes * dim + dim**2)
    for measure, factor in ((nc1, 4), (nc2, 2)):
        memory = jax.jit(measure).lower(shapes).compile().memory_analysis()
        assert memory.temp_size_in_bytes < factor * budget
    queries = jax.ShapeDtypeStruct((64, dim), jnp.float32)
    memory = jax.jit(nearest_class_mean).lower(queries, shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 3 * 4 * (num_classes * dim + 64 * dim)


def test_a_thousand_classes_of_2048_dimensions():
    num_classes, dim = 1000, 2048
    rng = np.random.default_rng(0)
    means = rng.normal(size=(num_classes, dim)).astype(np.float32)
    # Isotropic S_W = I: NC1 = sum over the k - 1 singular values s of 1 / s^2.
    stats = init_class_statistics(num_classes, dim, scatter=True)._replace(
        counts=jnp.ones(num_classes), mean_offsets=means, scatter=num_classes * jnp.eye(dim)
    )
    gram = (means - means.mean(0)).astype(np.float64)
    eigenvalues = np.linalg.eigvalsh(gram @ gram.T)[1:]
    np.testing.assert_allclose(jax.jit(nc1)(stats), np.sum(1 / eigenvalues), rtol=1e-4)


def test_many_means_on_a_line_do_not_coincide():
    means = np.arange(300) / 300
    z = np.concatenate([means - 0.01, means + 0.01])[:, None]
    stats = statistics(z, np.tile(np.arange(300), 2), 300)
    np.testing.assert_allclose(jax.jit(nc1)(stats), 1e-4 / means.var() / 300, rtol=1e-4)
