"""The configuration of a run: its defaults as a ConfigDict, and the check of its values."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from gc_nc.errors import InputError
from gc_nc.runs.settings import MAX_FLOAT, SETTINGS, TYPE_NAMES, is_number

# The largest int32, which is the integer type on the device.
_MAX_INT = 2**31 - 1


def default_config() -> ConfigDict:
    """The config of a run on the embedded digits; config files change what they need.

    `gc_nc.runs.settings.SETTINGS` says what each key means.
    """
    config = ConfigDict()
    for key, setting in SETTINGS.items():
        *groups, name = key.split(".")
        place = config
        for group in groups:
            if group not in place:
                place[group] = ConfigDict()
            place = place[group]
        place[name] = (
            config_dict.placeholder(setting.type) if setting.is_optional else setting.default
        )
    # Locked, so that a misspelt key is an error in a config file as on the command line.
    return config.lock()


def flatten(config: Mapping[str, Any] | ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Flattens a nested mapping to {"data.name": ...}, in the same order."""
    flat = {}
    for key in config:
        value = config[key]
        if isinstance(value, (Mapping, ConfigDict)):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def shown(value: Any) -> str:
    """A value as an error shows it: its `repr`, shortened."""
    try:
        text = repr(value)
    except ValueError:
        # Python refuses to print an int of more than 4300 digits.
        return "(thousands of digits)"
    return text if len(text) <= 100 else f"{text[:100]}..."


def check_config(config: ConfigDict) -> None:
    """Checks every value before any work starts.

    Raises:
      InputError: a key or value is wrong; the message names the key, its value and what is allowed.
    """
    flat = flatten(config)
    for key in flat.keys() ^ SETTINGS.keys():
        state = "missing" if key in SETTINGS else "not a known key"
        raise InputError(f"config.{key} is {state}; start from default_config()")
    for key, setting in SETTINGS.items():
        value = flat[key]
        if value is None and setting.is_optional:
            continue
        _require_type(flat, key, setting.type)
        if setting.rule is not None:
            left_out = ", or left out" if setting.is_optional else ""
            _require(flat, key, setting.rule.holds(value), f"{setting.rule.allowed}{left_out}")
    _check_steps_and_factors(flat)
    _check_class_split(flat)


def _require(flat: Mapping[str, Any], key: str, holds: bool, allowed: str) -> None:
    if not holds:
        raise InputError(f"config.{key}={shown(flat[key])} must be {allowed}")


def _require_type(flat: Mapping[str, Any], key: str, kind: type) -> None:
    value = flat[key]
    # ConfigDict checks types, but not those of a dict that replaces a group of keys.
    fits = is_number(value) if kind is float else isinstance(value, kind)
    _require(flat, key, fits and (kind is bool) == isinstance(value, bool), TYPE_NAMES[kind])
    if kind is float:
        allowed = f"a finite number of at most {MAX_FLOAT:g}"
        _require(flat, key, abs(value) <= MAX_FLOAT, allowed)
    elif kind is int:
        _require(flat, key, value <= _MAX_INT, f"at most {_MAX_INT}")


def _check_steps_and_factors(flat: Mapping[str, Any]) -> None:
    num_steps, every = flat["num_steps"], flat["gc_penalty.every_steps"]
    most = f"at most config.num_steps={num_steps}"
    _require(flat, "gc_penalty.every_steps", every <= num_steps, most)
    below = f"below config.num_steps={num_steps}"
    _require(flat, "schedule.warmup_steps", flat["schedule.warmup_steps"] < num_steps, below)
    factors, count = flat["gc_penalty.factors"], len(flat["gc_penalty.boundaries"])
    _require(
        flat,
        "gc_penalty.factors",
        all(is_number(f) and 0 <= f <= MAX_FLOAT for f in factors) and len(factors) == count,
        f"{count} numbers of at least 0, one for each of config.gc_penalty.boundaries",
    )
    _require(
        flat,
        "gc_penalty.weight",
        flat["gc_penalty.weight"] * max([1, *factors]) * every <= MAX_FLOAT,
        f"at most {MAX_FLOAT:g} after its factors and every_steps={every}",
    )


def _check_class_split(flat: Mapping[str, Any]) -> None:
    kind = flat["data.classes.split"]
    if kind != "names":
        unused = f"() with config.data.classes.split={kind!r}"
        for part in ("source", "val", "target"):
            _require(flat, f"data.classes.{part}", not flat[f"data.classes.{part}"], unused)
    else:
        needed = "names of at least 2 classes with config.data.classes.split='names'"
        enough = len(flat["data.classes.source"]) >= 2
        _require(flat, "data.classes.source", enough, needed)
    counts = flat["data.classes.counts"]
    if kind == "random":
        whole = all(
            isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= _MAX_INT for n in counts
        )
        _require(
            flat,
            "data.classes.counts",
            len(counts) in (2, 3) and whole and min(counts[0], counts[-1]) >= 2,
            "(source, target) or (source, val, target) classes, as in (6, 4)",
        )
    else:
        only = f"() with config.data.classes.split={kind!r}; counts are for 'random'"
        _require(flat, "data.classes.counts", not counts, only)
