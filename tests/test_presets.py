"""The presets against METHOD's tables, written out here a second time."""

import pytest

from ict_fast import presets
from ict_fast.config import Config, differences, to_dict, validate
from ict_fast.errors import InputError

# METHOD.md, "Training recipes", CIFAR-10 column, and the definitions above it.
ICT_METHOD = {
    "method.sigma_data": 0.5,
    "method.sigma_min": 0.002,
    "method.sigma_max": 80.0,
    "method.rho": 7.0,
    "method.s0": 10,
    "method.s1": 1280,
    "method.p_mean": -1.1,
    "method.p_std": 2.0,
    "method.curriculum": "doubling",
    "method.indices": "lognormal",
    "method.weighting": "inverse-gap",
    "method.metric": "pseudo-huber",
    "method.huber_c": None,
    "method.teacher": "student",
    "network.c_noise": "log",
}
ICT_OPTIMIZER = {
    "optimizer.lr": 1e-4,
    "optimizer.betas": [0.9, 0.999],
    "optimizer.eps": 1e-8,
    "optimizer.weight_decay": 0.0,
    "optimizer.ema_warmup": False,
    "data.flip": True,
}
CIFAR10 = {
    **ICT_METHOD,
    **ICT_OPTIMIZER,
    "network.name": "ncsnpp",
    "network.resolution": 32,
    "network.image_channels": 3,
    "network.num_classes": 0,
    "network.channels": 128,
    "network.channel_mult": [2, 2, 2],
    "network.num_blocks": 4,
    "network.attention_resolutions": [16],
    "network.embedding": "fourier",
    "network.embedding_scale": 0.02,
    "network.dropout": 0.3,
    "network.dropout_max_resolution": 0,
    "training.batch_size": 1024,
    "training.total_steps": 400_000,
    "optimizer.ema_decay": 0.99993,
    "method.second_sigma": 0.821,
}
IMAGENET64 = {
    **ICT_METHOD,
    **ICT_OPTIMIZER,
    "network.name": "adm",
    "network.resolution": 64,
    "network.image_channels": 3,
    "network.num_classes": 1000,
    "network.channels": 192,
    "network.channel_mult": [1, 2, 3, 4],
    "network.num_blocks": 3,
    "network.attention_resolutions": [32, 16, 8],
    "network.head_channels": 64,
    "network.embedding": "positional",
    "network.adaptive_norm": False,
    "network.dropout": 0.2,
    "network.dropout_max_resolution": 16,
    "training.batch_size": 4096,
    "training.total_steps": 800_000,
    "optimizer.ema_decay": 0.99997,
    "method.second_sigma": 1.526,
}
# METHOD.md, "The ablation baseline", and the authors' commands: consistency_models_cifar10/launch.sh (its
# cifar10_ve_ct_adaptive.py) and consistency_models/scripts/launch.sh ("L_CT^N on ImageNet-64").
CT2023_METHOD = {
    "method.curriculum": "square-root",
    "method.s0": 2,
    "method.indices": "uniform",
    "method.weighting": "uniform",
    "method.metric": "l2",
    "method.teacher": "ema",
    "method.teacher_ema_divisor": "pairs",  # both take exp(-c / scales) before scales + 1
    "network.dropout": 0.0,
    "optimizer.name": "radam",
    "optimizer.weight_decay": 0.0,
    "optimizer.ema_warmup": False,
    "training.total_steps": 800_000,
    "data.flip": True,
}
# Small enough for the demo.
DIGITS = {
    **ICT_METHOD,
    "network.name": "ncsnpp",
    "network.resolution": 8,
    "network.image_channels": 1,
    "network.num_classes": 10,
    "network.channels": 24,
    "network.channel_mult": [1, 2],
    "network.num_blocks": 1,
    "network.attention_resolutions": [4],
    "training.batch_size": 96,
    "training.total_steps": 1200,
    "optimizer.lr": 2e-3,
    "optimizer.ema_decay": 0.999,
    "optimizer.ema_warmup": True,
    "data.flip": False,
}
TABLE = {
    "digits": DIGITS,
    "cifar10": CIFAR10,
    "cifar10-deep": {**CIFAR10, "network.num_blocks": 8},
    "imagenet64": IMAGENET64,
    "imagenet64-deep": {**IMAGENET64, "network.num_blocks": 6},
    "cifar10-ct2023": {
        **CT2023_METHOD,
        "method.s1": 150,
        "method.teacher_ema": 0.9,
        "network.name": "ncsnpp",
        "network.resolution": 32,
        "network.num_classes": 0,
        "network.channels": 128,
        "network.channel_mult": [2, 2, 2],
        "network.num_blocks": 4,
        "network.attention_resolutions": [16],
        "network.embedding_scale": 16.0,
        "network.c_noise": "log",  # jcm/models/utils.py: 0.25 * jnp.log(t)
        "optimizer.lr": 4e-4,
        "optimizer.lr_decay": 0.0,  # jcm/losses.py: RAdam has a constant rate, the warm-up is Adam's
        "optimizer.ema_decay": 0.9999,
        "training.batch_size": 512,
    },
    "imagenet64-ct2023": {
        **CT2023_METHOD,
        "method.s1": 200,
        "method.teacher_ema": 0.95,
        "network.name": "adm",
        "network.resolution": 64,
        "network.adaptive_norm": True,
        "network.num_classes": 1000,
        "network.channels": 192,
        "network.num_blocks": 3,
        "network.attention_resolutions": [32, 16, 8],
        "network.head_channels": 64,
        "network.c_noise": "adm-openai",  # karras_diffusion.py: 1000 * 0.25 * log(sigma + 1e-44)
        "optimizer.lr": 1e-4,
        "optimizer.ema_decay": 0.999943,
        "training.batch_size": 2048,
        # --sampler multistep --ts 0,106,200 --steps 201
        "method.second_sigma": pytest.approx(
            (80 ** (1 / 7) + 106 / 200 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7, rel=1e-3
        ),
    },
}


def test_the_presets_are_those_of_the_issue():
    assert set(presets.names()) == set(TABLE)


def test_the_digits_preset_departs_from_the_defaults_in_what_it_says():
    differing = {name: value for name, value, _ in differences(presets.get("digits"), Config())}
    assert differing == {"network.num_classes": 10}


@pytest.mark.parametrize("name", TABLE)
def test_a_preset_has_the_values_of_the_recipe_tables(name):
    sections = to_dict(presets.get(name))
    values = {field: sections[field.split(".")[0]][field.split(".")[1]] for field in TABLE[name]}
    assert values == TABLE[name]


@pytest.mark.parametrize("name", TABLE)
def test_a_preset_is_valid_and_knows_its_name(name):
    validate(presets.get(name))
    assert presets.get(name).preset == name


@pytest.mark.parametrize("deep", ["cifar10-deep", "imagenet64-deep"])
def test_a_deep_variant_differs_in_depth_alone(deep):
    ours, theirs = to_dict(presets.get(deep)), to_dict(presets.get(deep.removesuffix("-deep")))
    ours["preset"] = theirs["preset"]
    ours["network"]["num_blocks"] = theirs["network"]["num_blocks"]
    assert ours == theirs


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(InputError, match='no preset "imagnet64"; did you mean "imagenet64"'):
        presets.get("imagnet64")


def test_a_preset_like_none_lists_them_all():
    with pytest.raises(InputError, match=r"choose one of: cifar10, .*imagenet64-deep"):
        presets.get("zzz")
