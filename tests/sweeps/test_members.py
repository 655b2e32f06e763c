"""Which runs a sweep has, and what they are called."""

import math
import re

import numpy as np
import pytest

from gc_nc.errors import InputError
from gc_nc.runs.configuration import default_config
from gc_nc.sweeps import grid, one_at_a_time
from gc_nc.sweeps.members import make_members, read_sweep


def names(sweep, **arguments):
    return [member.name for member in make_members(default_config(), sweep, **arguments)]


def test_grid_is_the_product_and_lists_add_up():
    sweep = grid({"optimizer.learning_rate": (0.01, 0.1), "seed": range(2)}) + grid({"seed": [5]})
    assert sweep == [
        {"optimizer.learning_rate": 0.01, "seed": 0},
        {"optimizer.learning_rate": 0.01, "seed": 1},
        {"optimizer.learning_rate": 0.1, "seed": 0},
        {"optimizer.learning_rate": 0.1, "seed": 1},
        {"seed": 5},
    ]


def test_one_at_a_time_has_a_row_a_key_and_the_config_itself_once():
    sweep = one_at_a_time({"batch_size": (16, 32), "optimizer.l2": (0.0, 0.1)}, range(2))
    assert sweep == [
        *grid({"batch_size": (16, 32), "seed": range(2)}),
        *grid({"optimizer.l2": (0.0, 0.1), "seed": range(2)}),
    ]
    # Batch size 32 and no L2 are the defaults.
    assert len(make_members(default_config(), sweep)) == 6


@pytest.mark.parametrize("values", ["vgg11", 3, None])
def test_grid_of_no_list(values):
    with pytest.raises(InputError, match=re.escape(f"model.name={values!r} must be a list")):
        grid({"model.name": values})


def test_names_and_configs():
    (member,) = make_members(
        default_config(), [{"seed": 3, "optimizer.learning_rate": 4, "data.name": "c-1.0_x"}]
    )
    assert member.name == "data.name=c-1.0_x,optimizer.learning_rate=4.0,seed=3"
    assert (member.config.seed, member.config.optimizer.learning_rate) == (3, 4.0)
    assert member.config.data.name == "c-1.0_x"
    assert member.config.is_locked
    assert names([{}]) == ["base"]


def test_the_base_is_kept_and_not_changed():
    base = default_config()
    base.num_steps = 7
    base.data.image_size = 8
    base.lock()
    (member,) = make_members(base, [{"seed": 1, "data.image_size": None}])
    assert (member.config.num_steps, member.config.seed) == (7, 1)
    assert member.config.data.image_size is None
    assert (base.seed, base.data.image_size) == (0, 8)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"optimizer.learning_rate": 4}, {"optimizer.learning_rate": 4.0}),
        ({"seed": 1, "batch_size": 8}, {"batch_size": 8, "seed": 1}),
        ({"optimizer.learning_rate": np.float64(0.1)}, {"optimizer.learning_rate": 0.1}),
        ({"seed": np.int64(3)}, {"seed": 3}),
        ({"schedule.boundaries": [0.25, 0.5]}, {"schedule.boundaries": (0.25, np.float32(0.5))}),
        ({"optimizer.momentum": -0.0}, {"optimizer.momentum": 0.0, "seed": 0}),
        # The default is one of the values.
        ({"num_steps": 9}, {"num_steps": 9, "batch_size": 32}),
    ],
)
def test_equal_members_are_one_whatever_the_order(first, second):
    assert len(names([first, second])) == 1
    assert names([first, second]) == names([second, first])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"data.name": "a b"}, {"data.name": "a_b"}),
        ({"data.name": "a/b"}, {"data.name": "a:b"}),
        ({"data.name": "None"}, {"data.name": "none"}),
        ({"data.name": "1,seed=2"}, {"data.name": "1", "seed": 2}),
        ({"data.name": "é"}, {"data.name": "è"}),
        ({"data.name": "x" * 300}, {"data.name": "x" * 301}),
        ({"schedule.boundaries": (0.5,)}, {"schedule.boundaries": (0.5, 0.75, 0.9)}),
        ({"optimizer.learning_rate": 0.1}, {"optimizer.learning_rate": np.nextafter(0.1, 1)}),
    ],
)
def test_different_members_have_different_names_fit_for_folders(first, second):
    both = names([first, second])
    assert len(set(both)) == 2
    for name in both:
        assert re.fullmatch(r"[A-Za-z0-9._=,+-]{1,170}", name)
    assert both == [*names([first]), *names([second])]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"optimizer.lr": 1}, "'optimizer.lr' is not a key of this config; did you mean optimizer"),
        ({"optimizer": 1}, "'optimizer' is not a key"),
        ({7: 1}, "7 is not a key"),
        ({"batch_size": 4.5}, "config.batch_size=4.5 is of type float .* must be of type int"),
        ({"batch_size": True}, "config.batch_size=True is of type bool"),
        ({"optimizer.learning_rate": True}, "learning_rate=True is of type bool"),
        ({"optimizer.learning_rate": "0.1"}, "learning_rate='0.1' is of type str"),
        ({"optimizer.learning_rate": None}, "learning_rate=None is of type NoneType"),
        ({"optimizer.learning_rate": (0.1,)}, "must be of type float"),
        ({"optimizer.learning_rate": 10**400}, "too large"),
        ({"optimizer.learning_rate": math.nan}, "learning_rate=nan must be a finite number"),
        ({"optimizer.learning_rate": -1.0}, "learning_rate=-1.0 must be above 0"),
        ({"data.image_size": "8"}, "image_size='8' is of type str .* must be of type int or None"),
        ({"data.flip": 1}, "config.data.flip=1 is of type int .* must be of type bool"),
        ({"seed": np.arange(2)}, "is of type ndarray"),
        ({"model.name": "vgg12"}, "config.model.name='vgg12' must be one of"),
    ],
)
def test_a_wrong_override_is_one_line_that_names_its_place(overrides, message):
    with pytest.raises(InputError, match=r"get_sweep\(\)\[1\]: .*" + message) as error:
        names([{"seed": 1}, overrides])
    assert "\n" not in str(error.value)


def test_a_key_of_the_command_line_cannot_vary():
    with pytest.raises(InputError, match=r"the sweep varies seed, so --config.seed cannot set it"):
        names([{"seed": 1}], fixed={"seed"})
    assert names([{"seed": 1}], fixed={"num_steps"}) == ["seed=1"]


@pytest.mark.parametrize(
    ("text", "argument", "message"),
    [
        ("", "", r"has no get_sweep\(\); define it beside get_config"),
        ("def get_sweep(): return 1 / 0", "", "ZeroDivisionError: division by zero"),
        ("def get_sweep(): return []", "", r"must return overrides in a list, not \[\]"),
        ("def get_sweep(): return {'seed': 1}", "", "must return overrides in a list, not {"),
        ("def get_sweep(): return [1]", "", "must return overrides such as .* not 1"),
        ("def get_sweep(size): return []", "", "TypeError: .*'size'"),
        ("def get_sweep(:", "", "SyntaxError"),
        ("from gc_nc.sweeps import grid\ndef get_sweep(): return grid({'a': 1})", "", "^grid: a=1"),
    ],
)
def test_config_files_without_a_sweep(tmp_path, text, argument, message):
    (tmp_path / "config.py").write_text(text)
    with pytest.raises(InputError, match=message):
        read_sweep(f"{tmp_path / 'config.py'}{argument}")


def test_get_sweep_may_take_the_argument_of_get_config(tmp_path):
    (tmp_path / "with.py").write_text("def get_sweep(size): return [{'model.name': size}]")
    assert read_sweep(f"{tmp_path / 'with.py'}:vgg:11") == [{"model.name": "vgg:11"}]
    (tmp_path / "without.py").write_text("def get_sweep(): return [{'seed': 1}]")
    assert read_sweep(f"{tmp_path / 'without.py'}:small") == [{"seed": 1}]
