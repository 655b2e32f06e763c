"""Checks the user's `embed_fn`, and traces it once for each shape of its inputs."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from gc_nc.array_types import Array, EmbedFn, as_floating, check_whole
from gc_nc.metrics.argument_checks import check_function
from gc_nc.metrics.traced_functions import (
    Program,
    outside_transformations,
    staged,
    trace,
    trace_derivative,
)

_DEFAULT_CHUNK_SIZE = 32


class Embedding:
    """An `embed_fn`, during one call of a metric.

    Its Python code runs once for each shape of the inputs, and the trace is replayed, so that all
    blocks use the same weights. Inside a transformation of the caller, the function is called
    directly.

    Attributes:
      function: the user's function.
      example: inputs of the shape that is differentiated at a time.
      dim: K, the dimension of the embedding.
    """

    def __init__(self, function: EmbedFn, example: jax.Array):
        """Traces the function.

        Raises:
          ValueError: the function fails, or does not return a real array (B, K).
        """
        self.function, self.example = function, example
        self._replays = outside_transformations()
        self._traces: dict = {}
        self._derivatives: dict = {}
        self._programs: dict = {}
        if self._replays:
            output = self._trace(example)[1]
        else:
            # A new function each time: eval_shape would remember the shape of an old state.
            output = jax.eval_shape(lambda x: _embed(function, x), example)
        self.dim = _checked_dim(output, example.shape[0])

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Returns the embeddings (n, K)."""
        if not self._replays:
            return _embed(self.function, inputs)
        traced = self._trace(inputs)[0]
        return _replayed(traced.jaxpr, traced.consts, inputs)

    def program(self, inputs: jax.Array) -> Program | None:
        """Returns what it computes from inputs of this shape; None if that cannot be compared."""
        if not self._replays:
            return None
        shape = jax.typeof(inputs)
        if shape not in self._programs:
            self._programs[shape] = Program(self._trace(inputs)[0])
        return self._programs[shape]

    def has_forward_mode(self) -> bool:
        """Returns whether it has Jacobian-vector products."""
        return self._derivative(self.example) is not None

    def replay(self, inputs: jax.Array) -> tuple["Replay", list] | None:
        """Returns what it computes from inputs of this shape, and the arrays that it closes over.

        Returns None if its derivative does not follow from these.
        """
        derivative = self._derivative(inputs) if self._replays else None
        # The rule of a jax.custom_jvp may close over arrays too, which a replay cannot replace.
        if derivative is None or derivative.consts:
            return None
        return Replay(self.program(inputs), Program(derivative)), self._trace(inputs)[0].consts

    def _derivative(self, inputs):
        shape = jax.typeof(inputs)
        if shape not in self._derivatives:
            constants, function = [], lambda constants, x: self(x)
            if self._replays:
                traced = self._trace(inputs)[0]
                constants, function = traced.consts, partial(_replayed, traced.jaxpr)
            with jax.default_matmul_precision("highest"):
                self._derivatives[shape] = trace_derivative(function, constants, inputs)
        return self._derivatives[shape]

    def _trace(self, inputs) -> tuple[ClosedJaxpr, Any]:
        shape = jax.typeof(inputs)
        if shape not in self._traces:
            # TF32 and bfloat16 passes would ruin the norms; this applies where no precision is set.
            with jax.default_matmul_precision("highest"):
                self._traces[shape] = trace(lambda x: _embed(self.function, x), inputs)
        return self._traces[shape]


class Replay(NamedTuple):
    """The operations of an `embed_fn`; equal if value and first derivative are computed equally."""

    value: Program
    derivative: Program

    def __call__(self, constants: list, inputs: jax.Array) -> jax.Array:
        """Returns the embeddings (n, K)."""
        return _replayed(self.value.jaxpr, constants, inputs)


def _replayed(jaxpr, constants, inputs):
    return jaxpr_as_fun(ClosedJaxpr(jaxpr, constants))(inputs)[0]


def check_embedding(
    embed_fn: EmbedFn | Embedding, inputs: Array, chunk_size: int | None = None
) -> tuple[Embedding, jax.Array]:
    """Returns an `Embedding` for this call, and the inputs in a differentiable dtype.

    Args:
      embed_fn: the user's function; an `Embedding` is returned as it is.
      inputs: (B, *input) inputs, at least one.
      chunk_size: number of examples at a time, as in `squared_jacobian_norms`.

    Raises:
      ValueError: there are no examples, `chunk_size` is invalid, or `embed_fn` does not return a
        real array (B, K).
    """
    check_function(embed_fn, "embed_fn", "(B, *input) -> (B, K)")
    inputs = as_floating(inputs, "inputs")
    if inputs.ndim == 0 or inputs.shape[0] == 0:
        raise ValueError(f"inputs of shape {inputs.shape} have no examples; at least 1 is needed")
    chunk = chunk_length(inputs.shape[0], chunk_size)
    if isinstance(embed_fn, Embedding):
        return embed_fn, inputs
    whole = chunk == inputs.shape[0] or staged()
    return Embedding(embed_fn, inputs if whole else inputs[np.arange(chunk)]), inputs


def chunk_length(num_examples: int, chunk_size: int | None) -> int:
    """Returns the number of examples per chunk: almost equal chunks need little padding.

    Raises:
      ValueError: `chunk_size` is below 1 or not a whole number.
    """
    if chunk_size is not None:
        chunk_size = check_whole(chunk_size, 1, "chunk_size")
    return math.ceil(num_examples / math.ceil(num_examples / (chunk_size or _DEFAULT_CHUNK_SIZE)))


def _embed(embed_fn, inputs):
    try:
        return embed_fn(inputs)
    except (TypeError, ValueError, AssertionError) as error:
        cause = next(iter(str(error).splitlines()), "")
        raise ValueError(
            f"embed_fn fails for {inputs.shape[0]} examples of shape {inputs.shape[1:]}"
            f" ({type(error).__name__}: {cause}); it must take any number of examples, or else"
            " chunk_size must be the number that it takes"
        ) from error


def _what_to_take(output, num_examples: int) -> str:
    items = output.items() if isinstance(output, dict) else ()
    if isinstance(output, (tuple, list)):
        items = enumerate(output)
    shapes = {key: getattr(value, "shape", ()) for key, value in items}
    fitting = {key: s for key, s in shapes.items() if len(s) == 2 and s[0] == num_examples}
    if not fitting:
        return "return the embedding alone, as in: lambda x: model.apply(variables, x)[1]"
    which = " or ".join(f"[{key!r}] of shape {shape}" for key, shape in fitting.items())
    return f"take the embedding among its elements {which}, as in: lambda x: embed_fn(x)[i]"


def _checked_dim(output, num_examples: int) -> int:
    shape = getattr(output, "shape", None)
    if shape is None:
        raise ValueError(
            f"embed_fn returned a {type(output).__name__}, not one array (B, K);"
            f" {_what_to_take(output, num_examples)}"
        )
    if len(shape) != 2 or shape[0] != num_examples or shape[1] == 0:
        raise ValueError(
            f"embed_fn returned shape {shape} for {num_examples} examples; (B, K) ="
            f" ({num_examples}, K) is needed, so flatten each example's features"
        )
    if not jnp.issubdtype(output.dtype, jnp.floating):
        raise ValueError(f"embed_fn returned {output.dtype}; real floating point is needed")
    return shape[1]
