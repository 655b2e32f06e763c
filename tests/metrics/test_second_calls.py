"""A second call of a metric outside jit compiles nothing: whoever measures in a loop pays once."""

import jax
import pytest

from tests.metrics.metric_table import METRICS, arguments, call

#: Those whose loops were once compiled anew at each call.
QUICK = ("neural_collapse", "directional_cdnv", "nearest_class_mean", "nc2", "gnc2")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in METRICS],
)
def test_a_second_call_compiles_nothing(name, compilations):
    first = jax.device_get(call(name, arguments()))
    before = len(compilations)
    again = jax.device_get(call(name, arguments()))
    assert len(compilations) == before
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(((a == b) | (a != a)).all()), first, again))
