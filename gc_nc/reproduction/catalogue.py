"""Every figure: what it shows, which sweep it is drawn from, its scales and their cost."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from gc_nc.errors import InputError
from gc_nc.reproduction.bound_figures import error_bound_figure, neural_collapse_bounds_figure
from gc_nc.reproduction.figure_result import Context, FigureResult
from gc_nc.reproduction.flatness_figures import flatness_figure, layers_figure
from gc_nc.reproduction.sampling_figures import estimators_figure, sampling_figure
from gc_nc.reproduction.training_figures import setting_figure, terminal_phase_figure
from gc_nc.reproduction.transfer_figure import transfer_figure


class Figure(NamedTuple):
    """A figure of the paper, of its appendix (A) or of ours (E).

    Attributes:
      number: the number for --figure; the numbers of the appendix are ours.
      title: the title without network and data, which differ with the scale.
      setting: the network and the data at the paper's scale.
      claim: the claim that the figure tests, in one line.
      sweep: the name of the config in experiments/configs/figures/, without .py.
      make: draws the figure and judges its claims.
      cost: {scale: what the runs and the drawing take}, with all scales that the figure has.
    """

    number: str
    title: str
    setting: str
    claim: str
    sweep: str
    make: Callable[[Context], FigureResult]
    cost: Mapping[str, str]


_SMOKE = {"smoke": "under a minute"}
_VGG13 = {
    "paper": "50 runs, not run by us",
    "small": "32 runs, 85 min on 2 cores",
    "demo": "9 runs, 4 min on 2 cores",
    **_SMOKE,
}


def _same_runs(small: str) -> dict[str, str]:
    return {"paper": "the runs of figure 1", "small": f"the runs of figure 1; {small}", **_SMOKE}


FIGURES = {
    figure.number: figure
    for figure in (
        Figure(
            "1",
            "GC and neural collapse over training",
            "VGG-13 on CIFAR-10",
            "A higher learning rate, a smaller batch and stronger L2 lower GC, geometric collapse"
            " and NC",
            "vgg13_cifar10",
            setting_figure,
            _VGG13,
        ),
        Figure(
            "2",
            "GC from samples: examples, Jacobian entries, embedding dimensions",
            "ResNet-18 on CIFAR-100",
            "A small sample of each gives GC",
            "resnet18_cifar100",
            sampling_figure,
            {"paper": "1 run, not run by us", "small": "1 run, 10 min on 2 cores", **_SMOKE},
        ),
        Figure(
            "3",
            "The bounds on the nearest-mean error",
            "VGG-13 on CIFAR-10",
            "NC and GC bound the test error of the nearest class mean",
            "vgg13_cifar10",
            error_bound_figure,
            _same_runs("9 min"),
        ),
        Figure(
            "4",
            "Source GC, target NC and transfer",
            "ResNet-18 on CIFAR-FS",
            "Lower source GC goes with lower target NC and higher few-shot accuracy",
            "resnet18_cifar_fs",
            transfer_figure,
            {
                "paper": "50 runs, not run by us",
                "small": "28 runs to equal fit, about 8 h on 2 cores with --rows",
                **_SMOKE,
            },
        ),
        Figure(
            "5",
            "The terminal phase and test accuracy",
            "VGG-13 on CIFAR-10",
            "NC goes on falling after training accuracy 1; lower GC goes with higher test accuracy",
            "vgg13_cifar10",
            terminal_phase_figure,
            _same_runs("seconds"),
        ),
        Figure(
            "A1",
            "GC and neural collapse over training",
            "ResNet-18 on CIFAR-10",
            "As figure 1",
            "resnet18_cifar10",
            setting_figure,
            {"paper": "50 runs, not run by us", **_SMOKE},
        ),
        Figure(
            "A2",
            "GC and neural collapse over training",
            "VGG-11 on MNIST",
            "As figure 1",
            "vgg11_mnist",
            setting_figure,
            {"paper": "50 runs, not run by us", **_SMOKE},
        ),
        Figure(
            "A3",
            "GC and neural collapse over training",
            "VGG-11 on Fashion-MNIST",
            "As figure 1",
            "vgg11_fashion_mnist",
            setting_figure,
            {"paper": "50 runs, not run by us", "small": "12 runs, 16 min on 2 cores", **_SMOKE},
        ),
        Figure(
            "A4",
            "GC and neural collapse over training",
            "ResNet-50 on CIFAR-100",
            "As figure 1",
            "resnet50_cifar100",
            setting_figure,
            {"paper": "50 runs, not run by us", **_SMOKE},
        ),
        Figure(
            "A5",
            "Source GC, target NC and transfer",
            "ResNet-18 on mini-ImageNet",
            "As figure 4",
            "resnet18_mini_imagenet",
            transfer_figure,
            {"paper": "50 runs, not run by us", **_SMOKE},
        ),
        Figure(
            "A6",
            "The explicit GC penalty",
            "VGG-13 on CIFAR-10",
            "A larger GC penalty lowers GC, geometric collapse and NC",
            "vgg13_cifar10_penalty",
            setting_figure,
            {"paper": "30 runs, not run by us", "small": "12 runs, 6 min on 2 cores", **_SMOKE},
        ),
        Figure(
            "E1",
            "Error of the estimators of GC against their cost",
            "ResNet-18 on CIFAR-100",
            "Random output probes beat random dimensions and entries at equal cost",
            "resnet18_cifar100",
            estimators_figure,
            {"paper": "the run of figure 2", "small": "the run of figure 2; 3 min", **_SMOKE},
        ),
        Figure(
            "E2",
            "The paper's bound on NC against the one by class",
            "VGG-13 on CIFAR-10",
            "Both bound NC; the one by class is sharper",
            "vgg13_cifar10",
            neural_collapse_bounds_figure,
            _same_runs("seconds after figure 3"),
        ),
        Figure(
            "E3",
            "Flatness against GC and NC",
            "VGG-13 on CIFAR-10",
            "A flatter loss goes with lower GC and lower NC",
            "vgg13_cifar10",
            flatness_figure,
            _same_runs("about 5 min"),
        ),
        Figure(
            "E4",
            "GC by layer during training",
            "VGG-13 on CIFAR-10",
            "What lowers GC of the embedding lowers it in every layer",
            "vgg13_cifar10",
            layers_figure,
            _same_runs("about 5 min"),
        ),
    )
}


def find_figure(number: str, scale: str) -> Figure:
    """Finds a figure by its number and checks that it has the scale.

    Raises:
      InputError: it does not exist or lacks the scale; the message lists those that exist.
    """
    figure = FIGURES.get(number.upper())
    if figure is None:
        raise InputError(f"--figure={number} is not one of {', '.join(FIGURES)}; see --list")
    if scale not in figure.cost:
        has = ", ".join(figure.cost)
        raise InputError(f"--scale={scale}: figure {figure.number} has {has}; see --list")
    return figure


def listing() -> str:
    """The list of all figures with their claims and what each scale costs."""
    lines = []
    for figure in FIGURES.values():
        lines += [
            f"{figure.number:3} {figure.title}; paper: {figure.setting}",
            f"    claim: {figure.claim}",
            *(
                f"    {scale:6} {cost} (sweep {figure.sweep})"
                for scale, cost in figure.cost.items()
            ),
        ]
    return "\n".join(lines)
