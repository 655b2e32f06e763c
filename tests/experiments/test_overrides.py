"""Overrides on the command line, from argv to a checked config: R7 and a thousand random ones."""

import ast
import contextlib
import io
import itertools
import signal
from datetime import timedelta

import pytest
from absl import flags
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from ml_collections import config_flags

from experiments import launcher
from gc_nc.errors import InputError
from gc_nc.runs.configuration import check_config, default_config, flatten
from gc_nc.runs.settings import SETTINGS

DEFAULTS = flatten(default_config())
KEYS = list(DEFAULTS)
TYPES = {key: setting.type for key, setting in SETTINGS.items()}
GROUPS = sorted({key[:i] for key in KEYS for i, letter in enumerate(key) if letter == "."})
NUMBERS = [
    *(
        "0",
        "1",
        "-1",
        "7",
        "0.5",
        "-0.5",
        "1e3",
        "1e-3",
        "1e400",
        "-1e400",
        "1e-400",
        "1_0",
        "0x10",
    ),
    *(
        "nan",
        "-nan",
        "inf",
        "-inf",
        "Infinity",
        str(10**30),
        str(-(10**30)),
        str(2**31),
        "1" * 5000,
    ),
    *("0x" + "f" * 5000, "1e", "1.2.3", "--1", "+5", " 5 ", "5L", "٣", "1+1j", "1 if 2 else 3"),
]
WORDS = [
    *(
        "",
        " ",
        "true",
        "false",
        "True",
        "None",
        "none",
        "null",
        "cifar10",
        "digits",
        "vgg11",
        "x=y",
    ),
    *("é", "猫", "\u202eabc", "\x1b[2J", "\udcff", "a\nb", "a\u2028b", "\\d", "'", '"', "%s", "{}"),
    *(
        "-",
        "--",
        "--config.seed=3",
        "lambda: 0",
        "__import__('os')",
        "names",
        "random",
        "a" * 10**4,
    ),
    *("(" * 300, "-" * 10**5 + "1", "[" * 10**4, "not " * 10**4 + "1"),
]
TUPLES = [
    *("()", "(0.5,)", "(0.2,0.4)", "(0.4,0.2)", "(0.5", "0.5,0.7", "[0.5]", "(1,2,3)", "(6, 4)"),
    *("('a', 'b')", "('a', 1)", "(nan,)", "(1e400,)", "(-1,)", "(None,)", "((0.5,),)", "(True, 3)"),
    *("{0.1, 0.5}", "{'a': 1}", "{[]: 1}", "(0x" + "f" * 5000 + ", 2)", f"({10**30}, {10**30})"),
    *("('\\d',)", "(1)(2)", "1 is 1,", "('é',)", "(0.5, 0.5)", "(b'a',)", "(...,)", "a b", "a,b"),
]
DICTS = [
    *("{}", "{'name': 3}", "{'name': {'x': 1}}", "{1: 2}", "{[]: 1}", "dict(a=1)"),
    "{'learning_rate': 'a', 'momentum': None, 'l2': ()}",
    "{'every_steps': True, 'keep': 2.5}",
]


KEY = st.sampled_from(KEYS)
VALUE = st.one_of(
    *map(st.sampled_from, (NUMBERS, WORDS, TUPLES, DICTS)),
    # What its key has by default, mostly of another key.
    st.sampled_from([str(value) for value in DEFAULTS.values()]),
    st.floats().map(repr),
    st.lists(st.floats(0, 1), max_size=4).map(lambda numbers: str(tuple(sorted(numbers)))),
    st.text(max_size=20),
)
VALUES_OF_TYPE = {
    bool: st.booleans().map(str),
    int: st.integers(0, 100).map(str),
    float: st.floats(0, 1).map(str),
    str: st.sampled_from(WORDS),
    tuple: st.sampled_from(TUPLES),
}


@st.composite
def odd_key(draw):
    """A group, a misspelt key, part of a value, or anything."""
    key = draw(KEY)
    i, letter = draw(st.integers(0, len(key) - 1)), draw(st.sampled_from("ax._-[]é"))
    before, after = key[:i], key[i + 1 :]
    near = [before + after, before + letter + key[i:], before + letter + after, key.upper()]
    others = [key.split(".")[-1], f"config.{key}", f"{key}.{key}", f"{key}[0]", "", "lock", "items"]
    group = draw(st.sampled_from(GROUPS))
    text = draw(st.text(max_size=12)).replace("=", "")
    return draw(st.sampled_from([*near, *near, *others, group, group, group, "a" * 999, text]))


@st.composite
def override(draw):
    # Of equal parts: of the alternatives of alternatives Hypothesis makes one list.
    kind = draw(st.sampled_from(["valid"] * 3 + ["any value"] * 4 + ["odd key", "apart", "bare"]))
    key = draw(odd_key() if kind == "odd key" else KEY)
    if kind == "valid":
        default = DEFAULTS[key]
        values = VALUES_OF_TYPE[TYPES[key]]
        value = draw(values if default is None else st.just(str(default)) | values)
        return [f"--config.{key}={value}"]
    if kind == "bare":
        return [draw(st.sampled_from(["--", "-", "--no"])) + f"config.{key}"]
    value = draw(VALUE)
    return [f"--config.{key}", value] if kind == "apart" else [f"--config.{key}={value}"]


OVERRIDES = st.lists(override(), min_size=1, max_size=3).map(
    lambda overrides: list(itertools.chain(*overrides))
)


def config_stage(arguments, file="experiments/configs/digits.py"):
    """(config, stderr) of what a launcher does before it touches data; None for exit code 2."""
    argv = ["train", f"--config={file}", *arguments]
    values = flags.FlagValues()
    flag = config_flags.DEFINE_config_file("config", None, flag_values=values, sys_argv=argv)
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        try:
            try:
                launcher.parse_flags(argv, values)
                config = launcher.read_config(flag)
                check_config(config)
            except InputError as error:
                launcher.fail(str(error), launcher.EXIT_BAD_INPUT)
        except SystemExit as stop:
            if stop.code != launcher.EXIT_BAD_INPUT:
                raise
            config = None
    return config, stderr.getvalue()


# ml_collections' own, of how it reads a config file.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


@pytest.mark.parametrize(
    ("argument", "key", "expected"),
    [
        ("stop_after_epochs_at_full_accuracy=0.5", "stop_after_epochs_at_full_accuracy", 0.5),
        ("optimizer.learning_rate=1", "optimizer.learning_rate", 1.0),
        ("data.flip", "data.flip", True),
        ("data.name=3", "data.name", "3"),
        ("schedule.boundaries=()", "schedule.boundaries", ()),
    ],
)
def test_r7_values_are_taken_as_their_type(argument, key, expected):
    config, stderr = config_stage([f"--config.{argument}"])
    assert stderr == ""
    value = flatten(config)[key]
    assert (type(value), value) == (type(expected), expected)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["num_steps=1e3"], "config.num_steps='1e3' must be a whole number"),
        (["num_steps=many"], "config.num_steps='many' must be a whole number"),
        (
            ["model=3"],
            "config.model is a group of keys; set config.model.name, config.model.width,"
            " config.model.batch_norm, config.model.dtype one by one",
        ),
        (
            ["schedule.boundaries[7]=0.7"],
            "config.schedule.boundaries[7] is not a key of this config; did you mean"
            " config.schedule.boundaries?",
        ),
        (["data.flip=maybe"], "config.data.flip='maybe' must be true or false"),
        (["seed=1", "seed=x: y"], "config.seed='x: y' must be a whole number"),
        (["seed=0x" + "f" * 5000], "config.seed=(thousands of digits) must be at most 2147483647"),
        (
            ["learning_rate=1"],
            "config.learning_rate is not a key of this config; did you mean"
            " config.optimizer.learning_rate?",
        ),
        (
            ["optimizer={'learning_rate': 'a', 'momentum': 0.0, 'l2': 0.0}"],
            "config.optimizer is a group of keys; set config.optimizer.learning_rate,"
            " config.optimizer.momentum, config.optimizer.l2, config.optimizer.decoupled_decay one"
            " by one",
        ),
        (
            ["data.name", "num_steps=3"],
            "config.data.name has no value; give text as --config.data.name=VALUE",
        ),
        (
            ["schedule.boundaries=" + "-" * 10**5],
            f"config.schedule.boundaries='{'-' * 99}... is nested too deeply",
        ),
        (
            ["schedule.boundaries=(0.5, a"],
            "config.schedule.boundaries='(0.5, a' must be a tuple, as in (0.5, 0.75) or ()",
        ),
    ],
)
def test_r7_a_wrong_override_is_named_with_what_is_allowed(arguments, line):
    config, stderr = config_stage([f"--config.{argument}" for argument in arguments])
    assert config is None
    assert stderr == f"error: {line}\n"


@pytest.mark.parametrize("returned", ["None", "3", "{'seed': 1}"])
def test_a_config_file_must_return_a_config(tmp_path, returned):
    path = tmp_path / "config.py"
    path.write_text(f"def get_config():\n    return {returned}\n")
    config, stderr = config_stage([], path)
    assert config is None
    kind = type(ast.literal_eval(returned)).__name__
    assert stderr.startswith(f"error: --config: get_config() returned {kind}; return the")


@pytest.fixture
def time_limit():
    """Ends a test that hangs."""

    def hang(*_):
        raise TimeoutError("the config stage hangs")

    previous = signal.signal(signal.SIGALRM, hang)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


# The same examples at each run. A slow machine is no fault, and what is drawn is small.
@pytest.mark.slow
@settings(
    max_examples=1000,
    derandomize=True,
    database=None,
    deadline=timedelta(seconds=10),
    # What fails is short enough as it is drawn.
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(arguments=OVERRIDES)
def test_r7_random_overrides_make_a_config_or_one_line(time_limit, arguments):
    config, stderr = config_stage(arguments)
    if config is not None:
        assert stderr == ""
        return
    assert stderr.startswith("error: ")
    assert stderr.endswith("\n")
    assert stderr[:-1].isprintable(), stderr
    assert len(stderr) < 5000 + sum(map(len, arguments))
    # It names one of the keys; those that cannot be printed as they are come escaped.
    keys = [a.split("config.", 1)[1].split("=")[0] for a in arguments if "config." in a]
    named = any(key in stderr or not key.isprintable() for key in keys)
    # Or what follows a flag of true or false and is no part of it.
    stray = ("error: unexpected argument", "error: Unknown command line flag")
    assert named or stderr.startswith(stray), stderr
