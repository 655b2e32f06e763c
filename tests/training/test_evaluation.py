"""Evaluation against one pass over the whole split in float64 NumPy."""

import jax
import numpy as np
import pytest

from gc_nc.data.datasets import ImageSplit
from gc_nc.data.device_batches import Normalization
from gc_nc.metrics import geometric_complexity
from gc_nc.models import MLP, embed_fn
from gc_nc.training.evaluation import evaluate_split, gc_subset
from tests.rounding import NUM_TERMS, assert_same_numbers

MODEL = MLP((6,), 3)
RNG = np.random.default_rng(0)
SPLIT = ImageSplit(
    RNG.integers(0, 256, (23, 8, 8, 1), dtype=np.uint8), RNG.integers(0, 3, 23).astype(np.int32)
)
NORMALIZATION = Normalization((0.5,), (0.25,))
INPUTS = ((SPLIT.images / 255.0 - 0.5) / 0.25).astype(np.float32)
VARIABLES = jax.jit(MODEL.init)(jax.random.key(0), INPUTS)


def evaluate(batch_size, subset=None, gc_probes=3, seed=0):
    return evaluate_split(
        MODEL,
        VARIABLES,
        SPLIT,
        NORMALIZATION,
        np.arange(23, dtype=np.int32) if subset is None else subset,
        jax.random.key(seed),
        num_classes=3,
        batch_size=batch_size,
        gc_probes=gc_probes,
    )


@pytest.mark.parametrize(
    "batch_size", [5, *(pytest.param(size, marks=pytest.mark.slow) for size in (23, 500))]
)
def test_equals_numpy_over_the_whole_split_whatever_the_batch(batch_size):
    measured = evaluate(batch_size)
    logits, z = (np.asarray(a, np.float64) for a in jax.jit(MODEL.apply)(VARIABLES, INPUTS))
    shifted = logits - logits.max(1, keepdims=True)
    nll = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(23), SPLIT.labels]
    assert measured["accuracy"] == np.mean(logits.argmax(1) == SPLIT.labels)
    assert_same_numbers(measured["loss"], nll.mean())
    means = [z[SPLIT.labels == c].mean(0) for c in range(3)]
    variances = [z[SPLIT.labels == c].var(0).sum() for c in range(3)]
    pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
    distances = [np.sum((means[i] - means[j]) ** 2) for i, j in pairs]
    cdnv = [
        (variances[i] + variances[j]) / (2 * d) for (i, j), d in zip(pairs, distances, strict=True)
    ]
    # The squared distances of means are what is left of embeddings some ten times larger.
    terms = 10 * NUM_TERMS
    assert_same_numbers(measured["neural_collapse"], np.mean(cdnv), terms)
    assert_same_numbers(
        measured["geometric_collapse"],
        measured["geometric_complexity"] / 2 * np.sum(1 / np.array(distances)),
        terms,
    )
    np.testing.assert_allclose(measured["squared_embedding_norm"], (z**2).sum(1).mean(), rtol=1e-4)
    np.testing.assert_allclose(measured["squared_class_distance"], np.mean(distances), rtol=1e-4)
    np.testing.assert_allclose(
        measured["relative_geometric_complexity"],
        measured["geometric_complexity"] / np.mean(distances),
        rtol=1e-4,
    )


def test_gc_is_that_of_the_subset():
    subset = gc_subset(0, 23, 9)
    measured = evaluate(23, subset, gc_probes=200)
    exact = geometric_complexity(embed_fn(MODEL, VARIABLES), INPUTS[subset])
    np.testing.assert_allclose(measured["geometric_complexity"], exact, rtol=0.1)
    assert measured["geometric_complexity_sem"] > 0
    assert measured != evaluate(23, subset, gc_probes=200, seed=1)


def test_subset_is_fixed_by_the_seed():
    subset = gc_subset(0, 100, 10)
    np.testing.assert_array_equal(subset, gc_subset(0, 100, 10))
    assert len(np.unique(subset)) == 10
    assert not np.array_equal(subset, gc_subset(1, 100, 10))
    np.testing.assert_array_equal(gc_subset(0, 5, 10), np.arange(5))


def test_one_compilation_serves_all_batches_and_evaluations(compilations):
    evaluate(5)
    before = len(compilations)
    evaluate(5, seed=2)
    assert len(compilations) == before
