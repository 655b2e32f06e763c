"""The members of a sweep: overrides of one config, typed, checked, named and without duplicates."""

import dataclasses
import hashlib
import inspect
import itertools
import json
import re
import runpy
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from gc_nc.errors import InputError, suggestion
from gc_nc.runs.configuration import check_config, default_config, flatten

# The longest name of a folder here; most file systems allow 255 bytes.
_MAX_NAME = 150
_HASH_DIGITS = 10


@dataclasses.dataclass(frozen=True)
class Member:
    """One run of a sweep.

    Attributes:
      name: the name of its directory and log, made from the overrides.
      overrides: {dotted key: value}, sorted, each value of its key's type.
      config: the locked config with the overrides.
    """

    name: str
    overrides: dict[str, Any]
    config: ConfigDict


def grid(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Overrides for each combination of values; values of the last key change fastest.

    `grid({"optimizer.learning_rate": (0.01, 0.1), "seed": range(3)})` has six elements. Lists of
    overrides can be joined with +.

    Raises:
      InputError: a key's values are not a collection.
    """
    for key, choices in values.items():
        if isinstance(choices, str) or not isinstance(choices, Iterable):
            raise InputError(
                f"grid: {key}={choices!r} must be a list of values, as in [{choices!r}]"
            )
    return [
        dict(zip(values, choices, strict=True)) for choices in itertools.product(*values.values())
    ]


def one_at_a_time(values: Mapping[str, Any], seeds: Iterable[int]) -> list[dict[str, Any]]:
    """Overrides that change one key at a time and leave the others as in the config, for each seed.

    For example, for the rows of a figure: `one_at_a_time({"batch_size": (8, 32), "optimizer.l2":
    (0.0, 1e-3)}, range(3))`. If several keys have the config's own value, `make_members` makes that
    a single member for each seed.

    Raises:
      InputError: as `grid`.
    """
    seeds = list(seeds)
    return [
        overrides
        for key, choices in values.items()
        for overrides in grid({key: choices, "seed": seeds})
    ]


def read_sweep(config_file: str) -> list[Mapping[Any, Any]]:
    """Returns the result of a config file's get_sweep().

    Args:
      config_file: the value of --config: FILE, or FILE:ARGUMENT if its functions take one.

    Raises:
      InputError: get_sweep does not exist, raises, or does not return a list of overrides.
    """
    path, *argument = config_file.split(":", 1)
    try:
        get_sweep = runpy.run_path(path).get("get_sweep")
        if get_sweep is None:
            raise InputError(
                f"{path} has no get_sweep(); define it beside get_config(), to return overrides"
                ' such as gc_nc.sweeps.grid({"optimizer.learning_rate": (0.01, 0.1)})'
            )
        sweep = get_sweep(*argument) if inspect.signature(get_sweep).parameters else get_sweep()
    except InputError:
        raise
    except Exception as error:
        # A config file is code and may raise anything.
        raise InputError(f"get_sweep() of {path}: {type(error).__name__}: {error}") from error
    if not isinstance(sweep, (list, tuple)) or not sweep:
        raise InputError(f"get_sweep() of {path} must return overrides in a list, not {sweep!r}")
    for overrides in sweep:
        if not isinstance(overrides, Mapping):
            raise InputError(
                f'get_sweep() of {path} must return overrides such as {{"seed": 1}},'
                f" not {overrides!r}"
            )
    return list(sweep)


def make_members(
    base: ConfigDict, sweep: Iterable[Mapping[Any, Any]], fixed: Collection[str] = ()
) -> list[Member]:
    """The runs of a sweep, with every config checked.

    Overrides that lead to the same config become one member, named by the fewest overrides.

    Args:
      base: the config that the overrides change.
      sweep: for each member, its overrides by dotted key.
      fixed: dotted keys that the command line has set, which no member may change.

    Raises:
      InputError: an override is wrong; the message names its place in the sweep, the key, the value
        and what is allowed.
    """
    members: dict[tuple, Member] = {}
    for i, overrides in enumerate(sweep):
        try:
            member = _make_member(base, overrides, fixed)
            check_config(member.config)
        except InputError as error:
            raise InputError(f"get_sweep()[{i}]: {error}") from error
        resolved = tuple(flatten(member.config).items())
        members[resolved] = min(
            member,
            members.get(resolved, member),
            key=lambda same: (len(same.overrides), same.name),
        )
    return list(members.values())


def _make_member(base: ConfigDict, overrides: Mapping[Any, Any], fixed: Collection[str]) -> Member:
    # Start from the defaults, whose optional keys know their type.
    config = default_config()
    config.update_from_flattened_dict(flatten(base))
    keys = list(flatten(config))
    for key, value in overrides.items():
        if key not in keys:
            hint = suggestion(str(key), keys, "{}") or f"; keys are {', '.join(keys)}"
            raise InputError(f"{key!r} is not a key of this config{hint}")
        if key in fixed:
            raise InputError(
                f"the sweep varies {key}, so --config.{key} cannot set it; leave one of them out"
            )
        _override(config, key, _plain(value))
    flat = flatten(config)
    typed = {key: flat[key] for key in sorted(overrides)}
    return Member(_name(typed), typed, config.lock())


def _plain(value: Any) -> Any:
    """Converts NumPy's scalars to Python's, and lists to tuples."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (list, tuple)):
        return tuple(_plain(element) for element in value)
    return value


def _override(config: ConfigDict, key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        config = config[section]
    kind = config.get_type(last)
    optional = flatten(default_config())[key] is None
    # ml_collections accepts None for any value, and True for 1.
    fitting = optional if value is None else kind is bool or not isinstance(value, bool)
    try:
        if not fitting:
            raise TypeError
        config[last] = value
    except (TypeError, ValueError, OverflowError) as error:
        takes = f"{kind.__name__} or None" if optional else kind.__name__
        raise InputError(
            f"config.{key}={value!r} is of type {type(value).__name__} or too large; it must be"
            f" of type {takes}"
        ) from error


def _name(overrides: Mapping[str, Any]) -> str:
    """ "key=value,key=value"; with a hash of the overrides if that is not a plain file name."""
    parts, exact = [], True
    for key, value in overrides.items():
        # Strings are not quoted, except for "None", which would look like another value.
        text = value if isinstance(value, str) and value != "None" else repr(value)
        safe = re.sub(r"[^A-Za-z0-9._+-]+", "_", text)
        exact &= safe == text
        parts.append(f"{key}={safe if safe == text else safe.strip('_')}")
    name = ",".join(parts) or "base"
    if exact and len(name) <= _MAX_NAME:
        return name
    digest = hashlib.sha256(json.dumps(overrides).encode()).hexdigest()[:_HASH_DIGITS]
    return f"{name[:_MAX_NAME]}-{digest}"
