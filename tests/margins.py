"""A pytest plugin that notes how much of its tolerance each comparison of arrays used.

    GC_NC_MARGINS=FILE python -m pytest -p tests.margins ...

appends a line for each comparison that `numpy.testing.assert_allclose` made: the largest difference
as a share of what was allowed, the test, and the place. A share near 1 fails on the next processor.
Comparisons that allow more than `LARGEST_TOLERANCE` are left out: they allow for sampling, finite
differences or 8-bit numbers, which are the same everywhere, and not for rounding.
"""

import json
import os
import sys

import numpy as np

#: Relative to the largest entry.
LARGEST_TOLERANCE = 1e-3

_allclose = np.testing.assert_allclose


def share_used(actual, desired, rtol: float = 1e-7, atol: float = 0.0) -> float:
    """The largest |actual - desired| / (atol + rtol |desired|) over finite entries; 0 without.

    Also 0 where more than LARGEST_TOLERANCE of the largest |desired| is allowed.
    """
    actual, desired = np.broadcast_arrays(
        np.asarray(actual, np.float64), np.asarray(desired, np.float64)
    )
    finite = np.isfinite(actual) & np.isfinite(desired)
    difference = np.abs(actual[finite] - desired[finite])
    size = np.abs(desired)[finite]
    allowed = atol + rtol * size
    if allowed.max(initial=0.0) > LARGEST_TOLERANCE * size.max(initial=0.0) > 0:
        return 0.0
    # What is equal, as 0 and 0, uses nothing even where nothing is allowed.
    used = np.divide(
        difference, allowed, out=np.where(difference > 0, np.inf, 0.0), where=allowed > 0
    )
    return float(used.max(initial=0.0))


def _noting(actual, desired, rtol=1e-7, atol=0, *args, **options):
    frame = sys._getframe(1)
    while "/tests/" not in frame.f_code.co_filename or "rounding.py" in frame.f_code.co_filename:
        if frame.f_back is None:
            break
        frame = frame.f_back
    try:
        used = share_used(actual, desired, rtol, atol)
    except (TypeError, ValueError):
        # Not numbers of one shape: the comparison itself says what is wrong.
        used = 0.0
    line = {
        "used": used,
        "test": os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0],
        "place": f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}",
    }
    with open(os.environ["GC_NC_MARGINS"], "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return _allclose(actual, desired, rtol, atol, *args, **options)


if "GC_NC_MARGINS" in os.environ:
    np.testing.assert_allclose = _noting
