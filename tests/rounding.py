"""How far two programs that compute the same numbers in float32 may differ.

Equal bits are asked for only of one compiled program on one input, as of a run and its resumption.
A program that maps, shards or chunks the same computation, and any program on another processor,
adds the same terms in another order: a sum of n terms is then off by up to n * eps of the sum of
their absolute values (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section
4.2). Cancellation makes a small entry of an array as inexact as its large ones, so an error is
measured against the largest entry.

`python -m tests.on_other_processors` shows how much of these tolerances is used.
"""

import jax
import numpy as np

EPS = float(np.finfo(np.float32).eps)

#: Roundings that each term of a sum meets besides the sum: products, divisions, a transcendental.
_PER_TERM = 4

#: Terms of the sums in a test's networks and statistics, of some tens of entries each, one after
#: another: the tolerance, 6e-5, is far below what a lost example or a wrong factor changes.
NUM_TERMS = 128


def rounding(num_terms: int = NUM_TERMS) -> float:
    """The relative tolerance of a computation whose sums have so many terms in all."""
    return _PER_TERM * num_terms * EPS


def assert_same_numbers(actual, expected, num_terms: int = NUM_TERMS) -> None:
    """Asserts that two pytrees are equal but for `rounding(num_terms)` of each leaf's largest."""

    def compare(actual, expected):
        expected = np.asarray(expected)
        finite = np.abs(expected[np.isfinite(expected)])
        largest = float(finite.max()) if finite.size else 0.0
        np.testing.assert_allclose(actual, expected, rtol=0, atol=rounding(num_terms) * largest)

    jax.tree.map(compare, actual, expected)
