"""A second call of a metric, against the run of its compiled program alone.

    python -m experiments.benchmarks.calls [--json] [--width=0.25] [--only=WORD]

The metric is `estimate_geometric_complexity` with one output probe, on 64 inputs: of a linear map
from 9 numbers to 4, of an MLP from 9 to 64 to 16, and of VGG-13 on 32x32 images. Each network is
given as a plain function, as a new closure over new weights, as a `jax.tree_util.Partial` of new
weights, and as a Flax NNX module whose weights have been changed in place. The reference runs the
same compiled programs on the same arrays as the call does, and nothing else; for the small networks
it is 50 ms, and the limit is that run. Both take turns in one process, and seconds are medians.
--only keeps the rows whose name contains the word. Two minutes in all, ten with --width=1.
"""

from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl import flags
from flax import nnx

from experiments import launcher
from experiments.benchmarks import reporting
from gc_nc import metrics
from gc_nc.errors import InputError
from gc_nc.metrics import jacobian_products
from gc_nc.models import build_model

_WIDTH = flags.DEFINE_float("width", 0.25, "Of VGG-13.", lower_bound=0.01)
_ONLY = flags.DEFINE_string("only", "", "Only rows whose name contains this.")

_NUM_INPUTS, _REPETITIONS = 64, 7
_SECONDS, _GOAL = 0.05, 1.2


class _Layers(nn.Module):
    """Linear layers with tanh between them; (None, embedding), as networks of gc_nc.models."""

    features: tuple[int, ...]

    @nn.compact
    def __call__(self, x, *, train=False):
        del train
        for features in self.features[:-1]:
            x = nn.tanh(nn.Dense(features)(x))
        return None, nn.Dense(self.features[-1])(x)


def main(argv: list[str]) -> None:
    """Times the rows one after the other."""
    del argv
    width = _WIDTH.value
    networks = {
        "linear map": (_Layers((4,)), (9,)),
        "MLP": (_Layers((64, 16)), (9,)),
        f"VGG-13, width {width:g}": (build_model("vgg13", 10, width=width), (32, 32, 3)),
    }
    rows = {
        f"{network}, {form}": (model, shape, embeddings_of)
        for network, (model, shape) in networks.items()
        for form, embeddings_of in _FORMS.items()
    }
    chosen = {name: row for name, row in rows.items() if _ONLY.value in name}
    if not chosen:
        raise InputError(f"--only={_ONLY.value!r} is in none of: {'; '.join(rows)}")
    reporting.print_rows([_row(name, *row) for name, row in chosen.items()])


def _row(name, model, shape, embeddings_of) -> reporting.Row:
    inputs = jax.random.normal(jax.random.key(1), (_NUM_INPUTS, *shape))
    embeddings = embeddings_of(model, model.init(jax.random.key(0), inputs), inputs)

    def call():
        return metrics.estimate_geometric_complexity(embed_fn, inputs, jax.random.key(2))

    seconds = []
    # The first compiles, and looks whether examples mix.
    for _ in range(_REPETITIONS + 1):
        embed_fn = next(embeddings)
        ours = reporting.time_call(call)
        seconds.append((ours, reporting.time_call(_programs_of(call))))
    ours, run = map(median, zip(*seconds[1:], strict=True))
    if name.startswith("VGG"):
        return reporting.Row(name, ours, run, _GOAL)
    return reporting.Row(name, ours, _SECONDS, 1.0, limit=run)


def _programs_of(call: Callable[[], Any]) -> Callable[[], Any]:
    """The runs of compiled programs in a call, to be run again by themselves."""
    runs = []
    original = jacobian_products.compiled_blocks

    def recording(replay):
        def run(*arguments, **static):
            runs.append(partial(original(replay), *arguments, **static))
            return runs[-1]()

        return run

    jacobian_products.compiled_blocks = recording
    try:
        call()
    finally:
        jacobian_products.compiled_blocks = original
    return lambda: [run() for run in runs]


def _plain(model, variables, inputs) -> Iterator[Callable]:
    def embed(x):
        return model.apply(variables, x)[1]

    while True:
        yield embed


def _closure(model, variables, inputs) -> Iterator[Callable]:
    for new in _changing(variables):
        yield lambda x, new=new: model.apply(new, x)[1]


def _partial(model, variables, inputs) -> Iterator[Callable]:
    for new in _changing(variables):
        yield jax.tree_util.Partial(lambda v, x: model.apply(v, x)[1], new)


def _module(model, variables, inputs) -> Iterator[Callable]:
    module = _Module(model, variables)
    for new in _changing(nnx.state(module)):
        nnx.update(module, new)
        yield module.embed


class _Module(nnx.Module):
    """The Linen network with its weights as variables of NNX."""

    def __init__(self, model, variables):
        self.model = model
        self.variables = nnx.data(jax.tree.map(nnx.Param, variables))

    def embed(self, x):
        is_variable = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
        arrays = jax.tree.map(lambda v: v[...], self.variables, is_leaf=is_variable)
        return self.model.apply(arrays, x)[1]


def _changing(weights: Any) -> Iterator[Any]:
    while True:
        weights = jax.tree.map(lambda leaf: jnp.float32(0.999) * leaf, weights)
        yield jax.block_until_ready(weights)


_FORMS = {
    "a plain function": _plain,
    "closures over new weights": _closure,
    "Partials of new weights": _partial,
    "an NNX module changed in place": _module,
}


if __name__ == "__main__":
    launcher.run(main)
