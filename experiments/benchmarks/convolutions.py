"""Which share of a matmul's rate ResNet-18's convolutions reach, for each pass.

    python -m experiments.benchmarks.convolutions

The batch has 32 float32 images of CIFAR-10's shape, compiled as the library compiles. Each pass and
a 2048 x 2048 matmul take turns. A share is the rate of a pass, FLOPs over median seconds, divided
by that of the matmul. FLOPs count whole windows, including the padding that XLA's count leaves out.
The last line is for all convolutions of a step but the first, which has 3 channels.
"""

from statistics import median

import jax

from experiments import launcher
from experiments.benchmarks.reporting import time_call
from gc_nc.compilation import jit_for_device

_BATCH, _REPETITIONS, _MATMUL = 32, 9, 2048

# (how many, kernel size, stride, channels in, channels out, height and width in)
_CONVOLUTIONS = (
    (4, 3, 1, 64, 64, 32),
    (3, 3, 1, 128, 128, 16),
    (3, 3, 1, 256, 256, 8),
    (3, 3, 1, 512, 512, 4),
    (1, 3, 2, 64, 128, 32),
    (1, 3, 2, 128, 256, 16),
    (1, 3, 2, 256, 512, 8),
    (1, 1, 2, 64, 128, 32),
    (1, 1, 2, 128, 256, 16),
    (1, 1, 2, 256, 512, 8),
)


def main(argv: list[str]) -> None:
    """Prints a line for each convolution."""
    del argv
    matrix = jax.random.normal(jax.random.key(0), (_MATMUL, _MATMUL))
    multiply = jit_for_device(lambda a, b: a @ b)
    print(f"{'convolution':36}{'forward':>10}{'input':>10}{'kernel':>10}", flush=True)
    total, limit = 0.0, 0.0
    for count, size, stride, channels, features, height in _CONVOLUTIONS:
        passes = _passes(size, stride, channels, features, height)
        runs = [*passes, lambda: multiply(matrix, matrix)]
        seconds = [[] for _ in runs]
        for run in runs:
            time_call(run)
        for _ in range(_REPETITIONS):
            for run, taken in zip(runs, seconds, strict=True):
                taken.append(time_call(run))
        *each, matmul = map(median, seconds)
        rate = 2 * _MATMUL**3 / matmul
        flops = 2 * _BATCH * (height // stride) ** 2 * size**2 * channels * features
        name = f"{size}x{size}, stride {stride}, {channels} to {features}, {height}x{height}"
        print(f"{name:36}" + "".join(f"{flops / s / rate:10.2f}" for s in each), flush=True)
        total += count * sum(each)
        limit += count * len(each) * flops / rate
    print(f"all of a step: {total:.3g} s, at the rate of the matmul {limit:.3g} s")


def _passes(size, stride, channels, features, height):
    key = jax.random.key(0)
    x = jax.random.normal(key, (_BATCH, height, height, channels))
    kernel = 0.01 * jax.random.normal(key, (size, size, channels, features))

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            ((size // 2, size // 2),) * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    cotangent = convolve(x, kernel)
    forward = jit_for_device(convolve)
    by_input = jit_for_device(lambda x, kernel, z: jax.vjp(lambda x: convolve(x, kernel), x)[1](z))
    by_kernel = jit_for_device(
        lambda x, kernel, z: jax.vjp(lambda kernel: convolve(x, kernel), kernel)[1](z)
    )
    return (
        lambda: forward(x, kernel),
        lambda: by_input(x, kernel, cotangent),
        lambda: by_kernel(x, kernel, cotangent),
    )


if __name__ == "__main__":
    launcher.run(main)
