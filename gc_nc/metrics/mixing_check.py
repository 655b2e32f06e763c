"""Checks once per program whether examples mix in an embedding or it draws random numbers.

Every metric of a Jacobian assumes that example b's embedding depends on x_b alone. With BatchNorm
in training mode, or any other statistic across the batch, it does not: the result would depend on
the other examples in the batch. So at the first call of a program, some examples of the first chunk
are replaced, and then the others; the embeddings of those that are not replaced must not change.
"""

import contextlib
import contextvars
import functools
import sys
import warnings
from collections.abc import Callable, Hashable

import jax
import jax.numpy as jnp
import numpy as np

from gc_nc.array_types import is_known
from gc_nc.metrics.traced_functions import draws_anew

# Relative to how much the embeddings differ from each other.
_SMALLEST_CHANGE = 1e-5
_ASIDE = " (metrics.examples_may_mix() switches this check off)"
_MIX = (
    "examples mix: the embedding of an example changes when other examples of its batch change,"
    " as with BatchNorm in training mode, so what is measured is not the Jacobian of one"
    " example; put the network in evaluation mode" + _ASIDE
)
_RANDOM = (
    "embed_fn draws new random numbers each time it is called, as dropout in training mode may, so"
    " what is measured is not one function; put the network in evaluation mode" + _ASIDE
)

_may_mix = contextvars.ContextVar("examples_may_mix", default=False)


class ImpureEmbeddingWarning(UserWarning):
    """Examples mix in an `embed_fn`, or it draws new random numbers each time it is called."""


class examples_may_mix(contextlib.ContextDecorator):  # noqa: N801
    """Switches off the check for examples that mix, and saves its cost.

    Use it as in `with metrics.examples_may_mix(): metrics.geometric_complexity(embed_fn, inputs)`,
    or as the decorator of a function. To keep the check and only silence the warning, filter
    `metrics.ImpureEmbeddingWarning`.
    """

    def __init__(self):
        """Takes no arguments."""
        # A list, because a decorated function may call itself.
        self._before = []

    def __enter__(self):
        """Switches the check off until the end of the block, in this thread or task."""
        self._before.append(_may_mix.set(True))
        return self

    def __exit__(self, *exception):
        """Restores the previous state."""
        _may_mix.reset(self._before.pop())


def is_switched_off() -> bool:
    """Whether we are inside `examples_may_mix`."""
    return _may_mix.get()


class MixingCheck:
    """Checks a program once for each shape of its inputs; each instance warns at most once."""

    def __init__(
        self, trace_fn: Callable, program_of: Callable[[jax.Array], Hashable] = lambda inputs: None
    ):
        """For a function that JAX can trace, inputs (n, *input) -> (n, K).

        Functions with the same `program_of(inputs)` share the result of the check, unless that is
        None. That a function draws random numbers is not shared, since the program does not say so.
        """
        self._trace_fn, self._program_of = trace_fn, program_of
        self._findings, self._warned = {}, False

    def __call__(
        self, run: Callable[[jax.Array], jax.Array], inputs: jax.Array, embeddings: jax.Array
    ) -> None:
        """Checks `embeddings` = run(inputs), where `run` is one compiled program.

        The first call with concrete arrays of this shape costs two more calls of `run`.
        """
        # A single example cannot mix with others.
        if is_switched_off() or len(inputs) < 2 or not is_known(inputs, embeddings):
            return
        if not (inputs.is_fully_addressable and embeddings.is_fully_addressable):
            return
        shape = inputs.shape
        if shape not in self._findings:
            self._findings[shape] = self._finding(run, inputs, embeddings)
        message = self._findings[shape]
        if message and not self._warned:
            self._warned = True
            warnings.warn(message, ImpureEmbeddingWarning, stacklevel=_outside_of_the_library())

    def _finding(self, run, inputs, embeddings):
        program = self._program_of(inputs)
        found = [] if program is None else _findings_of(program)
        if not found:
            message = self._look(run, inputs, np.asarray(embeddings))
            if message == _RANDOM:
                return message
            found.append(message)
        return found[0]

    def _look(self, run, inputs, embeddings):
        shape = jax.ShapeDtypeStruct(inputs.shape, inputs.dtype)
        if draws_anew(self._trace_fn, shape):
            return _RANDOM

        def embed(x):
            # Committed to a device only if the inputs are; otherwise it would be another program.
            x = jax.device_put(x, inputs.sharding if inputs.committed else None)
            return np.asarray(run(x))

        half = _about_half(len(inputs))
        findings = (self._compare(embed, inputs, embeddings, part) for part in (half, ~half))
        return next(filter(None, findings), None)

    def _compare(self, embed, inputs, embeddings, replaced):
        """Returns the message, if any, that follows from replacing some examples."""
        try:
            after = embed(_with_others(np.asarray(inputs), replaced))
        except FloatingPointError:
            # jax_debug_nans is on, and the network cannot take the inputs that were made up here.
            return None
        change = _difference(after, embeddings)[~replaced]
        tolerance = self._tolerance(embeddings, jnp.float32)
        if not _exceeds(change, tolerance, embeddings[~replaced], after[~replaced]):
            return None
        # Only now does it matter whether the function works in half precision, and whether the same
        # program gives the same result twice.
        again = embed(np.asarray(inputs))
        shape = jax.ShapeDtypeStruct(inputs.shape, inputs.dtype)
        tolerance = self._tolerance(embeddings, jax.eval_shape(self._trace_fn, shape).dtype)
        noise = _difference(again, embeddings)
        if _exceeds(noise, tolerance, embeddings, again):
            return _RANDOM
        tolerance = tolerance + 4 * np.nan_to_num(noise[~replaced])
        mixes = _exceeds(change, tolerance, embeddings[~replaced], after[~replaced])
        return _MIX if mixes else None

    @staticmethod
    def _tolerance(embeddings, dtype):
        """Returns a few roundings of the largest value plus a small share of the spread, (K,)."""
        known = np.where(np.isfinite(embeddings), embeddings, 0).astype(np.float64)
        size, spread = np.max(np.abs(known), axis=0), np.ptp(known, axis=0)
        return 4 * float(jnp.finfo(dtype).eps) * size + _SMALLEST_CHANGE * spread


def _difference(one, other) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return np.abs(one - other)


def _exceeds(change, tolerance, one, other) -> bool:
    """Returns whether two arrays differ by more than that, or in which entries are finite."""
    known = np.isfinite(one) & np.isfinite(other)
    same = known | (np.isnan(one) & np.isnan(other)) | (one == other)
    return bool(np.any(~same) or np.any((change > tolerance) & known))


def _about_half(num_examples: int) -> np.ndarray:
    """Returns which examples are replaced first: the first one and half of the others at random.

    Random, so that a shift by any number of rows is noticed. The last example is never among them.
    """
    half = np.random.default_rng(0).random(num_examples) < 0.5
    half[0], half[-1] = True, False
    return half


def _with_others(inputs: np.ndarray, replaced: np.ndarray) -> np.ndarray:
    """Returns the inputs with some of them replaced.

    The replacements are other rows, scaled down and with the same signs, which most networks
    accept. Only the first replacement has the largest entry of all, so that a maximum over the
    batch changes too.
    """
    rows = inputs.reshape(len(inputs), -1)
    others = np.roll(rows, 1, axis=0)[:, ::-1] / 4
    first = np.argmax(replaced)
    largest, own = np.max(np.abs(rows)), np.max(np.abs(others[first]))
    with np.errstate(all="ignore"):
        others[first] = others[first] * (2 * largest / own) if own > 0 else 1 + largest
    changed = np.where(replaced[:, None], others, rows).astype(inputs.dtype)
    return changed.reshape(inputs.shape)


@functools.lru_cache(maxsize=1024)
def _findings_of(program: Hashable) -> list[str | None]:
    """Returns a list for the result of the check, which is empty until the check has run."""
    return []


def _outside_of_the_library() -> int:
    """Returns the `stacklevel` of the user's line that called the library."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and _is_ours(frame):
        level, frame = level + 1, frame.f_back
    return level


def _is_ours(frame) -> bool:
    name = frame.f_globals.get("__name__", "")
    return name.partition(".")[0] in ("gc_nc", "jaxtyping", "beartype")
