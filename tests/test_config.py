"""The configuration: what it refuses and by which name, its JSON, and what counts as science."""

import ast
import dataclasses
import inspect
import json

import pytest

from ict_fast import config as config_module
from ict_fast import presets
from ict_fast.config import Config, MethodConfig, differences, from_dict, to_dict, validate
from ict_fast.errors import InputError
from ict_kernels.noise_levels import noise_level_grid

SECTIONS = ("data", "network", "method", "optimizer", "training", "logging")
# What a resumed run may change (DESIGN.md, "Rerunning"), written out a second time.
EXECUTION = {
    "training.max_skipped_steps",
    "preset",
    "data.path",
    "data.loader",
    "method.second_sigma",
    "training.micro_batch",
    "training.compile",
    "training.cuda_graph",
    "training.deterministic",
    "logging.log_every",
    "logging.grid_every",
    "logging.checkpoint_every",
    "logging.checkpoint_minutes",
    "logging.keep_checkpoints",
    "logging.snapshot_every",
    "logging.tracker",
    "logging.evaluate_every",
    "logging.evaluate_count",
    "logging.evaluate_steps",
    "logging.evaluate_reference",
    "logging.evaluate_features",
    "logging.power_ema_every",
}


def changed(name, value, base=None):
    """The configuration with one field, given as section.field, set to a value."""
    base = base or Config()
    section, field = name.split(".")
    part = dataclasses.replace(getattr(base, section), **{field: value})
    return dataclasses.replace(base, **{section: part})


def fields():
    """Every section.field, its default, in order."""
    return [
        (f"{section}.{field.name}", getattr(getattr(Config(), section), field.name))
        for section in SECTIONS
        for field in dataclasses.fields(getattr(Config(), section))
    ]


def another(name, value):
    """A value of the same type that is not `value`."""
    choices = {
        "data.loader": "memmap",
        "network.name": "adm",
        "network.embedding": "positional",
        "network.c_noise": "adm-openai",
        "method.curriculum": "fixed",
        "method.indices": "uniform",
        "method.weighting": "uniform",
        "method.teacher_ema_divisor": "pairs",
        "method.metric": "l1",
        "method.teacher": "ema",
        "optimizer.name": "adam",
        "training.precision": "fp32",
        "training.compile": "off",
        "optimizer.ema_decays": (0.9, 0.99),
        "optimizer.power_ema": (0.05, 0.1),
        "logging.tracker": "none",
        "logging.evaluate_reference": "other.npz",
        "logging.evaluate_features": "other.pt",
    }
    if name in choices:
        return choices[name]
    if value is None:
        return 0.5
    if isinstance(value, bool):
        return not value
    if isinstance(value, tuple):
        return (*value[:-1], value[-1] / 2 if isinstance(value[-1], float) else value[-1] + 1)
    return value + "-other" if isinstance(value, str) else value + 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("network.resolution", 0),
        ("network.resolution", 7),
        ("network.resolution", 8192),
        ("network.image_channels", 0),
        ("network.image_channels", 2),
        ("network.channels", 0),
        ("network.channels", 10**9),
        ("network.num_classes", 10**12),
        ("training.batch_size", 10**12),
        ("network.channels", 3),
        ("network.channels", 37),
        ("network.num_blocks", 0),
        ("network.num_classes", -1),
        ("network.head_channels", -1),
        ("network.head_channels", 7),
        ("network.channel_mult", ()),
        ("network.channel_mult", (1, 0)),
        ("network.attention_resolutions", (5,)),
        ("network.dropout", 1.0),
        ("network.dropout", -0.1),
        ("network.dropout", float("nan")),
        ("network.dropout_max_resolution", -1),
        ("network.embedding_scale", 0.0),
        ("network.embedding_scale", float("inf")),
        ("network.embedding_scale", 1e300),
        ("method.p_mean", float("nan")),
        ("method.p_std", 0.0),
        ("method.rho", 0.0),
        ("method.rho", float("inf")),
        ("method.rho", 1e14),
        ("method.rho", 1e20),
        ("method.p_std", 1e300),
        ("method.sigma_max", 1e300),
        ("method.sigma_min", 1e300),
        ("method.sigma_data", 1e20),
        ("method.sigma_data", 1e-300),
        ("method.huber_c", 1e20),
        ("method.huber_c", 1e-300),
        ("method.sigma_data", -0.5),
        ("method.sigma_min", 0.0),
        ("method.sigma_max", float("inf")),
        ("method.second_sigma", 80.0),
        ("method.second_sigma", 0.002),
        ("method.s0", 0),
        ("method.s1", 9),
        ("method.s1", 2**21),
        ("method.huber_c", 0.0),
        ("method.teacher_ema", 1.0),
        ("optimizer.lr", 0.0),
        ("optimizer.lr", float("nan")),
        ("optimizer.lr", 1e300),
        ("optimizer.eps", 1e300),
        ("optimizer.weight_decay", 1e300),
        ("optimizer.clip_norm", -1.0),
        ("optimizer.warmup_steps", -1),
        ("optimizer.warmup_steps", 10**6),
        ("optimizer.lr_decay", 1.5),
        ("optimizer.lr_decay", -0.1),
        ("optimizer.eps", 0.0),
        ("optimizer.betas", (0.9, 1.0)),
        ("optimizer.betas", (float("nan"), 0.999)),
        ("optimizer.weight_decay", -1.0),
        ("optimizer.ema_decay", 1.0),
        ("optimizer.ema_decays", (0.9, 1.0)),
        ("optimizer.ema_decays", (0.9, 0.9)),
        ("optimizer.power_ema", (0.05, 0.29)),
        ("optimizer.power_ema", (0.001,)),
        ("optimizer.power_ema", (0.05, 0.05)),
        ("logging.evaluate_every", -1),
        ("logging.evaluate_count", 1),
        ("logging.evaluate_count", 10**20),
        ("logging.evaluate_steps", ()),
        ("logging.evaluate_steps", (1, 99_999_999_999)),
        ("logging.evaluate_steps", (1, 0)),
        ("logging.power_ema_every", -1),
        ("training.total_steps", 0),
        ("training.total_steps", 2**32),
        ("training.batch_size", 0),
        ("training.micro_batch", -1),
        ("training.micro_batch", 7),
        ("training.seed", -1),
        ("training.seed", 2**63),
        ("training.max_skipped_steps", 0),
        ("logging.log_every", 0),
        ("logging.grid_every", -1),
        ("logging.checkpoint_every", 0),
        ("logging.checkpoint_minutes", -1.0),
        ("logging.keep_checkpoints", 1),
    ],
)
def test_a_senseless_value_is_refused_by_the_name_of_its_flag(name, value):
    with pytest.raises(InputError) as refused:
        validate(changed(name, value))
    message = str(refused.value)
    assert message.startswith(f"--{name.replace('_', '-')} is ")
    assert "; it must be " in message
    assert "\n" not in message


def test_the_message_says_the_value_and_what_would_be_right():
    with pytest.raises(InputError) as refused:
        validate(changed("training.micro_batch", 7))
    assert str(refused.value) == (
        "--training.micro-batch is 7; it must be a divisor of training.batch-size = 96"
    )


def test_a_sigma_min_above_sigma_max_is_refused():
    config = changed("method.sigma_max", 1.0, changed("method.sigma_min", 2.0))
    with pytest.raises(InputError, match=r"--method\.sigma-min is 2\.0; it must be between 0 and .* = 1\.0"):
        validate(config)


@pytest.mark.parametrize("exponent", [-30, -8, -5, -4, -3, -2, *range(-1, 7)])
@pytest.mark.parametrize("sigma_max", [0.0021, 1.0, 80.0, 1e6])
def test_every_grid_that_is_accepted_can_be_made(exponent, sigma_max):
    rho = 10.0**exponent
    method = MethodConfig(rho=rho, sigma_max=sigma_max, second_sigma=0.002 + (sigma_max - 0.002) / 2)
    if -1 <= exponent <= 6:
        validate(Config(method=method))
    try:
        validate(Config(method=method))
    except InputError:
        return
    noise_level_grid(method.s1 + 1, sigma_min=method.sigma_min, sigma_max=sigma_max, rho=rho)


@pytest.mark.parametrize("name", presets.names())
def test_a_configuration_survives_json(name):
    config = presets.get(name)
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(("name", "value"), fields())
def test_every_field_survives_json_with_its_type(name, value):
    config = changed(name, another(name, value))
    assert config_module._build(Config, json.loads(json.dumps(to_dict(config))), "x", "") == config


def test_a_missing_field_takes_its_default():
    assert from_dict({"training": {"seed": 3}}) == changed("training.seed", 3)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"trainning": {}}, r'run\.json: unknown field trainning; did you mean "training"\?'),
        ({"method": {"sigma_mn": 1}}, r'unknown field method\.sigma_mn; did you mean "sigma_m'),
        ({"training": {"seed": "3"}}, r"run\.json: training\.seed is '3'; it must be of type int"),
        ({"training": {"seed": True}}, r"training\.seed is True; it must be of type int"),
        ({"training": {"seed": 1.5}}, r"training\.seed is 1\.5; it must be of type int"),
        ({"data": {"flip": 1}}, r"data\.flip is 1; it must be of type bool"),
        ({"network": {"name": "adn"}}, r"network\.name is 'adn'; did you mean \"adm\""),
        ({"network": {"channel_mult": 2}}, r"network\.channel_mult is 2; it must be"),
        ({"network": {"channel_mult": ["a"]}}, r"network\.channel_mult is 'a'; it must be of type int"),
        ({"optimizer": {"betas": [0.9]}}, r"optimizer\.betas is \[0\.9\]; it must have 2 numbers"),
        ({"method": {"p_mean": 1000.0}}, r"--method\.p-mean is 1000\.0; it must be within reach"),
        ({"method": {"rho": 0.001}}, r"--method\.rho is 0\.001; it must be such that 1281 noise levels"),
        ({"network": {"dropout": 0.99999}}, r"--network\.dropout is 0\.99999"),
        ({"method": 3}, r"run\.json: method is 3; it must be an object"),
        ([], r"run\.json: the whole is \[\]; it must be an object"),
        ({"training": {"batch_size": 0}}, r"--training\.batch-size is 0"),
    ],
)
def test_a_foreign_json_is_refused_by_the_name_of_its_field(values, said):
    with pytest.raises(InputError, match=said):
        from_dict(values, "run.json")


@pytest.mark.parametrize(("name", "value"), [*fields(), ("preset", "digits")])
def test_differences_are_those_of_science_alone(name, value):
    new = another(name, value)
    ours = dataclasses.replace(Config(), preset=new) if name == "preset" else changed(name, new)
    listed = [difference[0] for difference in differences(ours, Config())]
    assert listed == ([] if name in EXECUTION else [name])


def test_a_difference_tells_both_values():
    assert differences(changed("training.seed", 1), Config()) == [("training.seed", 1, 0)]


@pytest.mark.parametrize("section", SECTIONS)
def test_every_field_has_a_help_text(section):
    kind = type(getattr(Config(), section))
    body = ast.parse(inspect.getsource(kind)).body[0].body
    described = {
        field.target.id: text.value.value
        for field, text in zip(body, [*body[1:], ast.Pass()], strict=True)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }
    assert set(described) == {field.name for field in dataclasses.fields(kind)}
    assert all(len(text) > 10 for text in described.values())
    assert kind.__doc__
