"""Examples of a large set in a random order, and their Jacobian products, each computed once.

A probe has random signs in a basis that depends on the example: c = Q s + (I - Q Q^T) v. Here s
and v are random signs, and Q is an orthonormal basis of the embedding z and of the main directions
in which embeddings vary, restricted to the units of z that are not 0. E[c c^T] = I for every Q, so
|J^T c|^2 is unbiased. Its variance is twice the sum of the squared off-diagonal entries of J J^T in
that basis (and in the complement of Q); it is small because Q is close to the main eigenvectors.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from gc_nc.array_types import as_floating
from gc_nc.metrics import jacobian_products as products
from gc_nc.metrics.jacobian_estimators import random_signs
from gc_nc.metrics.jacobians import squared_jacobian_norms

#: The number of examples that a compiled program takes at a time.
CHUNK = 32
# How many embeddings the main directions are taken from, and how many directions; the gain hardly
# changes around either value.
_DIRECTION_EXAMPLES, _NUM_DIRECTIONS = 64, 8


class DrawnSample:
    """Examples in a random order, with the results of their probes; computes only missing ones."""

    def __init__(self, embed_fn, inputs, key, full_rank, max_products):
        """`full_rank` products give the exact norm; `max_products` is a limit, or None."""
        order_key, self._probe_key = jax.random.split(key)
        self.order = np.asarray(jax.random.permutation(order_key, inputs.shape[0]))
        self.full_rank = full_rank
        #: The number of products that may still be spent.
        self.left = math.inf if max_products is None else max_products
        self.num_products = 0
        self._embed_fn, self._inputs = embed_fn, inputs
        self._compiled = products.compile_block(embed_fn)
        self._probed, self._norms = np.zeros((0, 0)), np.zeros((0, 1))
        self._directions = None

    def affords(self, num_examples: int, num_probes: int) -> bool:
        """Returns whether the budget suffices for that many probes of that many examples."""
        return self.affordable(num_examples, num_probes) == num_examples

    def affordable(self, num_examples: int, num_probes: int) -> int:
        """Returns for how many of the examples the budget suffices."""
        there, left = len(self._norms), self.left
        if num_probes < self.full_rank:
            there, num_there = self._probed.shape
            left -= there * max(0, num_probes - num_there)
        if left < 0:
            return 0
        return int(min(num_examples, there + left // num_probes))

    def draw(self, num_examples: int, num_probes: int) -> np.ndarray:
        """Returns the squares of each probe (n, m); for full rank, the exact norms (n, 1)."""
        if num_probes == self.full_rank:
            first = len(self._norms)
            if first < num_examples:
                norms = self._exact_norms(np.arange(first, num_examples))
                self._spend(len(norms) * self.full_rank)
                self._norms = np.concatenate([self._norms, norms[:, None]])
            return self._norms[:num_examples]
        if num_probes < self._probed.shape[1]:
            self._probed = self._probed[:, :num_probes]
        rows, there = self._probed.shape
        if num_probes > there:
            added = self._probes(0, rows, there, num_probes)
            self._probed = np.concatenate([self._probed, added], axis=1)
        if num_examples > rows:
            added = self._probes(rows, num_examples, 0, num_probes)
            self._probed = np.concatenate([self._probed, added])
        return self._probed[:num_examples]

    def _spend(self, num_products):
        self.num_products += num_products
        self.left -= num_products

    def _exact_norms(self, places):
        norms = squared_jacobian_norms(self._embed_fn, self._examples(places))
        return np.asarray(norms, np.float64)

    def _examples(self, places):
        return as_floating(self._inputs[self.order[places]], "inputs")

    def _chunks(self, first, last, size, auxiliary_of, block):
        """Returns a block's values for examples in the drawn order, `size` at a time."""
        values = []
        for start in range(first, last, size):
            # The last chunk is padded, so that all chunks run the same program.
            places = np.minimum(np.arange(start, start + size), last - 1)
            auxiliary = auxiliary_of(self.order[places])
            chunk = self._compiled(self._examples(places), auxiliary, 0, block=block)
            values.append(chunk[: last - start])
        return np.concatenate([np.asarray(chunk, np.float64) for chunk in values])

    def _probes(self, first, last, first_probe, last_probe):
        num_probes = last_probe - first_probe
        if first == last:
            return np.zeros((0, num_probes))
        self._spend((last - first) * num_probes)
        if self._directions is None:
            num_embedded = min(_DIRECTION_EXAMPLES, len(self.order))
            embedded = self._chunks(
                0, num_embedded, CHUNK, lambda rows: None, products.embeddings_of
            )
            self._directions = _main_directions(embedded)

        def auxiliary_of(rows):
            return _example_keys(self._probe_key, jnp.asarray(rows)), self._directions

        size = max(1, min(CHUNK, products.PRODUCTS_PER_BLOCK // num_probes))
        return self._chunks(first, last, size, auxiliary_of, _ProbeBlock(num_probes, first_probe))


@jax.jit
def _example_keys(key, rows):
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)


def _main_directions(embeddings: np.ndarray) -> jax.Array:
    """Returns the principal directions (K, q); any others give a valid, if less precise, result."""
    size = np.max(np.abs(embeddings))
    if not (np.isfinite(size) and size > 0):
        return jnp.eye(embeddings.shape[1], _NUM_DIRECTIONS, dtype=jnp.float32)
    centred = embeddings / size - np.mean(embeddings / size, axis=0)
    return jnp.asarray(
        np.linalg.svd(centred, full_matrices=False)[2][:_NUM_DIRECTIONS].T, "float32"
    )


@dataclasses.dataclass(frozen=True)
class _ProbeBlock:
    """Computes |J^T c|^2 of m probes of each example, (n, m)."""

    num_probes: int
    first_probe: int

    def __call__(self, embed_fn, inputs, auxiliary, first_row):
        del first_row
        example_keys, directions = auxiliary
        probes = self.first_probe + jnp.arange(self.num_probes, dtype=jnp.int32)

        def cotangents(embeddings):
            active = (embeddings != 0).astype(jnp.float32)[:, :, None]
            largest = jnp.max(jnp.abs(embeddings), axis=1, keepdims=True)
            z = embeddings / jnp.where(largest > 0, largest, 1)
            spanning = jnp.concatenate([z[:, :, None], directions[None] * active], axis=2)
            basis = jnp.linalg.qr(jnp.nan_to_num(spanning))[0]
            num_basis, num_units = basis.shape[2], embeddings.shape[1]
            signs = random_signs(example_keys, probes, num_units + num_basis)
            rest, inside = signs[:, :, :num_units], signs[:, :, num_units:]
            inside = inside - _dot("nkq,rnk->rnq", basis, rest)
            return rest + _dot("nkq,rnq->rnk", basis, inside)

        squares, embeddings = products.pull_back_squares(embed_fn, inputs, cotangents)
        return squares.T, embeddings


_dot = functools.partial(jnp.einsum, precision="highest")
