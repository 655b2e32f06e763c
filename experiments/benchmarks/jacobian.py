"""Exact GC of a VGG-13 of full width compared with two ways in PyTorch.

    python -m experiments.benchmarks.jacobian [--benchmark_run=RUN] [--batches=8,64] [--json]

The images are training images of a finished run of VGG-13, or 64 synthetic ones of CIFAR-10's shape
that a new network first memorises in 40 steps. Ours is `squared_jacobian_norms` with
`skip_inactive`. The reference is the faster of a loop over rows, with one VJP of the whole batch
for each, and `torch.func.vmap(jacrev)`, with the same parameters and number of threads. The values
are compared first. The second way is timed only up to 8 images, where it is already slower. With 64
images PyTorch takes minutes for each run on two cores. The limit is the FLOPs, as XLA counts them,
of one VJP for each active unit of the example that has most, over the rate of a 2048 x 2048 matmul,
which is measured first.
"""

import sys
from pathlib import Path
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import launcher
from experiments.benchmarks import reporting
from gc_nc import metrics
from gc_nc.data.device_batches import normalize
from gc_nc.errors import InputError
from gc_nc.models import build_model, embed_fn
from gc_nc.runs.finished_run import open_run

_WORKDIR = flags.DEFINE_string(
    "benchmark_run", None, "A finished run of a VGG-13.", allow_override=True
)
_BATCHES = flags.DEFINE_list("batches", ["8", "64"], "Numbers of images.")
_REPETITIONS = flags.DEFINE_integer("repetitions", 5, "Timed runs of each side.", lower_bound=1)

_GOAL, _MOST = 0.5, 64


def main(argv: list[str]) -> None:
    """Checks that all sides agree, then times them in turn."""
    del argv
    allowed = [str(n) for n in range(1, _MOST + 1)]
    if not _BATCHES.value or set(_BATCHES.value) - set(allowed):
        raise InputError(f"--batches={','.join(_BATCHES.value)} must be numbers from 1 to {_MOST}")
    embed, network, images = _trained() if not _WORKDIR.value else _opened(Path(_WORKDIR.value))
    active = np.asarray(embed(images) > 0).sum(axis=1)
    _say(f"active units: {active.mean():.0f} of {embed(images).shape[1]}, at most {active.max()}")
    rate = reporting.matmul_flops_per_second()
    _say(f"matmul: {rate / 1e9:.3g} GFLOP/s")
    rows = []
    for batch in map(int, _BATCHES.value):
        x = images[:batch]
        sides = {"ours": lambda x=x: metrics.squared_jacobian_norms(embed, x, skip_inactive=True)}
        sides["rows"] = lambda x=x: _row_by_row(network, _to_torch(x))
        if batch <= 8:
            sides["vmap(jacrev)"] = lambda x=x: _vmap_jacrev(network, _to_torch(x))
        # The first call also compiles.
        values = {name: np.asarray(run()) for name, run in sides.items()}
        for name, value in values.items():
            np.testing.assert_allclose(value, values["ours"], rtol=1e-3, err_msg=name)
        seconds = {name: [] for name in sides}
        for _ in range(_REPETITIONS.value):
            for name, run in sides.items():
                seconds[name].append(reporting.time_call(run))
        seconds = {name: median(values) for name, values in seconds.items()}
        _say("; ".join(f"{name} {value:.3g} s" for name, value in seconds.items()))
        reference = min((name for name in seconds if name != "ours"), key=seconds.get)
        name = f"exact GC of {batch} images, against PyTorch ({reference})"
        limit = _flops(embed, x, int(active[:batch].max())) / rate
        rows.append(reporting.Row(name, seconds["ours"], seconds[reference], _GOAL, limit=limit))
    reporting.print_rows(rows)


def _flops(embed, x, num_rows):
    """The FLOPs of a forward pass and of `num_rows` VJPs of it."""

    def forward(embed, x):
        return embed(x)

    def with_vjp(embed, x, cotangent):
        return jax.vjp(embed, x)[1](cotangent)

    once = jax.jit(forward).lower(embed, x).cost_analysis()["flops"]
    cotangent = jax.ShapeDtypeStruct(embed(x).shape, x.dtype)
    both = jax.jit(with_vjp).lower(embed, x, cotangent).cost_analysis()["flops"]
    return once + num_rows * (both - once)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _opened(workdir: Path):
    run = open_run(workdir)
    if run.config.model.name != "vgg13" or run.config.model.batch_norm:
        raise InputError(f"{workdir} is not a run of a VGG-13 without BatchNorm")
    variables = run.variables(run.steps[-1])
    split = run.dataset.train
    if len(split.labels) < _MOST or split.images.shape[3] != 3:
        raise InputError(f"{workdir} must be trained on at least {_MOST} images of 3 channels")
    indices = np.random.default_rng(0).permutation(len(split.labels))[:_MOST]
    images = normalize(jnp.asarray(split.images[indices]), run.normalization)
    return embed_fn(run.model, variables), _torch_copy(variables, run.config.model.width), images


def _trained():
    import optax

    from gc_nc.compilation import jit_for_device
    from gc_nc.training.step import cross_entropy

    model = build_model("vgg13", 10)
    keys = jax.random.split(jax.random.key(0), 2)
    images = jax.random.normal(keys[0], (_MOST, 32, 32, 3))
    labels = jnp.arange(_MOST) % 10
    variables = jax.jit(model.init)(keys[1], images[:1])
    optimizer = optax.sgd(0.02, momentum=0.9)

    def step(variables, state):
        def loss(variables):
            return jnp.mean(cross_entropy(model.apply(variables, images)[0], labels))

        value, gradients = jax.value_and_grad(loss)(variables)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(variables, updates), state, value

    step = jit_for_device(step, donate_argnums=(0, 1))
    state = optimizer.init(variables)
    for _ in range(40):
        variables, state, loss = step(variables, state)
    _say(f"trained to a loss of {float(loss):.3g}")
    return embed_fn(model, variables), _torch_copy(variables, 1.0), images


def _torch_copy(variables, width):
    """The embedding with the same parameters in PyTorch."""
    torch = reporting.import_torch()
    from experiments.benchmarks import torch_networks

    network = torch_networks.VGG(13, 10, width)
    layers = [layer for layer in network.features if isinstance(layer, torch.nn.Conv2d)]
    params = variables["params"]
    names = sorted(name for name in params if name.startswith("stage"))
    with torch.no_grad():
        for layer, name in zip(layers, names, strict=True):
            kernel = np.transpose(np.asarray(params[name]["conv"]["kernel"]), (3, 2, 0, 1))
            layer.weight.copy_(torch.from_numpy(kernel.copy()))
            layer.bias.copy_(torch.from_numpy(np.array(params[name]["conv"]["bias"])))
    network.requires_grad_(False)
    return network.features.to(memory_format=torch.channels_last)


def _to_torch(images):
    import torch

    channels_first = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)
    return channels_first.contiguous(memory_format=torch.channels_last)


def _row_by_row(features, x):
    import torch

    x.requires_grad_(True)
    embedding = features(x).mean((2, 3))
    total = torch.zeros(len(x))
    # Like a user of PyTorch, skip units that are 0 in the whole batch and so have no gradient.
    for unit in torch.nonzero((embedding > 0).any(dim=0)).ravel():
        (row,) = torch.autograd.grad(embedding[:, unit].sum(), x, retain_graph=True)
        total += row.square().sum((1, 2, 3))
    return total.detach()


def _vmap_jacrev(features, x):
    import torch

    def embed(image):
        return features(image[None]).mean((2, 3))[0]

    jacobians = torch.func.vmap(torch.func.jacrev(embed), chunk_size=1)(x)
    return jacobians.square().sum((1, 2, 3, 4))


if __name__ == "__main__":
    launcher.run(main)
