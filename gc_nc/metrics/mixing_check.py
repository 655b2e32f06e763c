"""Whether examples mix in an embedding, or it draws random numbers: looked at once a program.

Every metric of a Jacobian takes it for granted that example b's embedding depends on x_b alone.
With BatchNorm in training mode, or any other statistic across the batch, it does not: what would be
measured depends on who else is in the batch. So at the first call of a program some examples of the
first chunk are replaced, then the others, and the embeddings of those that are not must stay.
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

# Of how much the embeddings themselves differ.
_SMALLEST_CHANGE = 1e-5
_ASIDE = " (metrics.examples_may_mix() switches this check off)"
_MIX = (
    "examples mix: embed_fn gives an example another embedding when other examples of its batch"
    " change, as BatchNorm in training mode does, so what is measured is not the Jacobian of one"
    " example; put the network in evaluation mode" + _ASIDE
)
_RANDOM = (
    "embed_fn draws new random numbers each time it is called, as dropout in training mode may, so"
    " what is measured is not one function; put the network in evaluation mode" + _ASIDE
)

_may_mix = contextvars.ContextVar("examples_may_mix", default=False)


class ImpureEmbeddingWarning(UserWarning):
    """Examples mix in an `embed_fn`, or it is another function each time it is called."""


class examples_may_mix(contextlib.ContextDecorator):  # noqa: N801
    """Switches the look for examples that mix off, and what it costs.

    As in `with metrics.examples_may_mix(): metrics.geometric_complexity(embed_fn, inputs)`, or as
    the decorator of a function. To keep the check and lose the warning alone, filter
    `metrics.ImpureEmbeddingWarning`.
    """

    def __init__(self):
        """Takes no arguments."""
        # Several where a function that it decorates calls itself.
        self._before = []

    def __enter__(self):
        """Until the end of the block, in this thread or task."""
        self._before.append(_may_mix.set(True))
        return self

    def __exit__(self, *exception):
        """As it was before."""
        _may_mix.reset(self._before.pop())


def is_switched_off() -> bool:
    """Whether we are inside `examples_may_mix`."""
    return _may_mix.get()


class MixingCheck:
    """Looks at a program once for each shape of its inputs, and warns once a check of a bad one."""

    def __init__(
        self, trace_fn: Callable, program_of: Callable[[jax.Array], Hashable] = lambda inputs: None
    ):
        """For a function that JAX can trace, inputs (n, *input) -> (n, K).

        Functions of one `program_of(inputs)` share what was found; None shares it with none. That
        random numbers are drawn is the function's own, so it is not shared.
        """
        self._trace_fn, self._program_of = trace_fn, program_of
        self._findings, self._warned = {}, False

    def __call__(
        self, run: Callable[[jax.Array], jax.Array], inputs: jax.Array, embeddings: jax.Array
    ) -> None:
        """Checks `embeddings` = run(inputs), where `run` is one compiled program.

        Costs two more calls of it, at the first call with concrete arrays of this shape.
        """
        # One example has no other to mix with.
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
            # Committed to a device only if the inputs are: it would be another program otherwise.
            x = jax.device_put(x, inputs.sharding if inputs.committed else None)
            return np.asarray(run(x))

        half = _about_half(len(inputs))
        findings = (self._compare(embed, inputs, embeddings, part) for part in (half, ~half))
        return next(filter(None, findings), None)

    def _compare(self, embed, inputs, embeddings, replaced):
        """What is found where some examples are replaced."""
        try:
            after = embed(_with_others(np.asarray(inputs), replaced))
        except FloatingPointError:
            # Somebody debugs NaN, and what was made up is no input of this network.
            return None
        change = _difference(after, embeddings)[~replaced]
        tolerance = self._tolerance(embeddings, jnp.float32)
        if not _exceeds(change, tolerance, embeddings[~replaced], after[~replaced]):
            return None
        # Looked at again only now: half precision, and what the same program gives the same inputs.
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
        """(K,): a few roundings of the largest value, and a small share of its spread."""
        known = np.where(np.isfinite(embeddings), embeddings, 0).astype(np.float64)
        size, spread = np.max(np.abs(known), axis=0), np.ptp(known, axis=0)
        return 4 * float(jnp.finfo(dtype).eps) * size + _SMALLEST_CHANGE * spread


def _difference(one, other) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return np.abs(one - other)


def _exceeds(change, tolerance, one, other) -> bool:
    """Whether two arrays differ by more, or in where they are finite."""
    known = np.isfinite(one) & np.isfinite(other)
    same = known | (np.isnan(one) & np.isnan(other)) | (one == other)
    return bool(np.any(~same) or np.any((change > tolerance) & known))


def _about_half(num_examples: int) -> np.ndarray:
    """Which are replaced at first: the first, and of the others half at random.

    So that a shift by any number of rows is seen. The last is not.
    """
    half = np.random.default_rng(0).random(num_examples) < 0.5
    half[0], half[-1] = True, False
    return half


def _with_others(inputs: np.ndarray, replaced: np.ndarray) -> np.ndarray:
    """The inputs with some of them replaced.

    What replaces them is made from other rows, with the same signs and smaller, which most networks
    take; only the first of them has the largest entry of all, so that a maximum over the batch
    moves too.
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
    """What was found, once somebody has looked."""
    return []


def _outside_of_the_library() -> int:
    """The `stacklevel` of the user's own line."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and _is_ours(frame):
        level, frame = level + 1, frame.f_back
    return level


def _is_ours(frame) -> bool:
    name = frame.f_globals.get("__name__", "")
    return name.partition(".")[0] in ("gc_nc", "jaxtyping", "beartype")
