"""Values that are refused, each with the key, the value and what is allowed."""

import json
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from gc_nc.errors import InputError
from gc_nc.runs.configuration import check_config, default_config, flatten
from gc_nc.runs.settings import SETTINGS, settings_help, settings_table


def test_the_default_is_valid_and_goes_through_json():
    config = default_config()
    check_config(config)
    assert flatten(json.loads(json.dumps(config.to_dict()))).keys() == flatten(config).keys()


def test_misspelt_and_missing_keys_of_a_config_file():
    with pytest.raises(AttributeError, match="sead"):
        default_config().sead = 3
    config = default_config().unlock()
    config.sead = 3
    with pytest.raises(InputError, match=r"config\.sead is not a known key"):
        check_config(config)
    config = default_config().unlock()
    del config.seed
    with pytest.raises(InputError, match=r"config\.seed is missing"):
        check_config(config)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data.source", "cifar", "config.data.source='cifar' must be one of 'digits', 'tfds'"),
        ("model.name", "vgg16", "must be one of 'vgg11', 'vgg13'"),
        ("schedule.name", "linear", "must be one of 'constant', 'step', 'cosine'"),
        ("batch_size", 0, "config.batch_size=0 must be at least 1"),
        ("num_steps", -5, "config.num_steps=-5 must be at least 1"),
        ("seed", -1, "config.seed=-1 must be at least 0"),
        ("seed", 2**31, "seed=2147483648 must be at most 2147483647"),
        ("evaluation.gc_probes", 2**70, "must be at most 2147483647"),
        ("optimizer.l2", 1e39, "must be a finite number of at most 3e"),
        ("schedule.warmup_steps", 2000, "warmup_steps=2000 must be below config.num_steps=2000"),
        ("optimizer.learning_rate", float("nan"), "learning_rate=nan must be a finite number"),
        ("optimizer.learning_rate", 0.0, "learning_rate=0.0 must be above 0"),
        ("optimizer.momentum", 1.0, r"momentum=1.0 must be in \[0, 1\)"),
        ("optimizer.l2", -1e-4, "l2=-0.0001 must be at least 0"),
        ("optimizer.decoupled_decay", -0.1, "decoupled_decay=-0.1 must be at least 0"),
        ("model.width", float("inf"), "width=inf must be a finite number"),
        ("model.width", 101.0, "width=101.0 must be above 0 and at most 100"),
        ("data.num_classes", 10**7, "num_classes=10000000 must be at least 2 and at most 1000000"),
        ("model.dtype", "float16", "model.dtype='float16' must be one of 'float32', 'bfloat16'"),
        ("precision", "tf32", "precision='tf32' must be one of 'default', 'high', 'highest'"),
        ("gc_penalty.weight", -1.0, "gc_penalty.weight=-1.0 must be at least 0"),
        ("gc_penalty.method", "probes", "must be one of 'output_probes', 'input_probes', 'exact'"),
        ("gc_penalty.of", "input", "must be one of 'embedding', 'logits'"),
        ("gc_penalty.batch_fraction", 0.0, r"batch_fraction=0.0 must be in \(0, 1\]"),
        ("gc_penalty.every_steps", 0, "every_steps=0 must be at least 1"),
        ("gc_penalty.every_steps", 2001, "every_steps=2001 must be at most config.num_steps=2000"),
        ("gc_penalty.boundaries", (0.5, 0.1), "fractions of num_steps from 0 to 1, ascending"),
        ("gc_penalty.factors", (1.0,), r"factors=\(1.0,\) must be 0 numbers of at least 0"),
        ("monitor.examples", 1, "monitor.examples=1 must be at least 2"),
        ("schedule.boundaries", (0.75, 0.5), "ascending"),
        ("schedule.boundaries", ("a",), "fractions of num_steps"),
        ("schedule.boundaries", (0.5, 0.5), "ascending"),
        ("evaluation.gc_examples", 1, "gc_examples=1 must be at least 2"),
        ("evaluation.gc_probes", 0, "gc_probes=0 must be at least 1"),
        (
            "data.num_classes",
            1,
            "num_classes=1 must be at least 2 and at most 1000000, or left out",
        ),
        ("stop_after_epochs_at_full_accuracy", -1.0, "must be at least 0, or left out"),
        ("stop_at_train_loss", 0.0, "stop_at_train_loss=0.0 must be above 0, or left out"),
    ],
)
def test_bad_values_are_named(key, value, message):
    config = default_config()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(InputError, match=message):
        check_config(config)


@pytest.mark.parametrize(
    ("group", "values", "message"),
    [
        ("optimizer", {"learning_rate": "a"}, "learning_rate='a' must be a number"),
        ("optimizer", {"momentum": None}, "momentum=None must be a number"),
        ("checkpoint", {"keep": 2.5}, "keep=2.5 must be a whole number"),
        ("checkpoint", {"keep": True}, "keep=True must be a whole number"),
        ("data", {"flip": 1}, "flip=1 must be true or false"),
        ("data", {"name": 1}, "name=1 must be text"),
        ("schedule", {"boundaries": 0.5}, "boundaries=0.5 must be a tuple"),
        ("data", {"image_size": 16**5000}, r"image_size=\(thousands of digits\) must be at most 2"),
    ],
)
def test_a_group_replaced_by_one_of_other_types(group, values, message):
    config = default_config().unlock()
    config[group] = ConfigDict(config[group].to_dict() | values)
    with pytest.raises(InputError, match=rf"config\.{group}\.{message}"):
        check_config(config)


def test_a_penalty_weight_must_fit_after_its_factors():
    config = default_config()
    config.gc_penalty.weight = 1e38
    check_config(config)
    config.gc_penalty.every_steps = 10
    with pytest.raises(InputError, match=r"weight=1e\+38 must be at most 3e\+38 after its factors"):
        check_config(config)


def test_the_page_of_settings_is_made_from_the_table():
    page = (Path(__file__).parents[2] / "docs" / "settings.md").read_text("utf-8")
    assert page.endswith(settings_table())


def test_help_names_every_setting_with_its_meaning():
    text = settings_help()
    for key, setting in SETTINGS.items():
        assert f"--config.{key} (default " in text
        # Whole sentences, since they stand alone.
        assert setting.meaning.endswith("."), key
