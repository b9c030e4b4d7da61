"""Named runs: the recipes of iCT (Song & Dhariwal, ICLR 2024), of its 2023 baseline, and a small default.

Values marked "believed" were not verified against the papers or their authors' code. Each is a flag.
"""

from __future__ import annotations

from dataclasses import replace

from ict_fast.config import (
    Config,
    DataConfig,
    LoggingConfig,
    MethodConfig,
    NetworkConfig,
    OptimizerConfig,
    TrainingConfig,
)
from ict_fast.errors import InputError, did_you_mean

# Two minutes on two CPU cores: the defaults, which are iCT's, in small, and class-conditional. Without the
# classes (--network.num-classes 0) so short a run ends at about four times the distance.
DIGITS = Config(preset="digits", network=NetworkConfig(num_classes=10))

_LARGE_RUN_LOGGING = LoggingConfig(log_every=100, grid_every=5000, checkpoint_every=5000, keep_checkpoints=3)

# iCT on CIFAR-10: its table 1, which MethodConfig's defaults are, and its text; it has no table of the rest.
# NCSN++ of Song et al. (ICLR 2021).
CIFAR10 = Config(
    preset="cifar10",
    data=DataConfig(path="data/cifar10", flip=True),
    network=NetworkConfig(
        name="ncsnpp",
        resolution=32,
        image_channels=3,
        channels=128,
        channel_mult=(2, 2, 2),
        num_blocks=4,
        attention_resolutions=(16,),
        dropout=0.3,
        embedding="fourier",
        embedding_scale=0.02,
    ),
    optimizer=OptimizerConfig(lr=1e-4, ema_decay=0.99993, ema_warmup=False),
    training=TrainingConfig(total_steps=400_000, batch_size=1024),
    logging=_LARGE_RUN_LOGGING,
)

# iCT, ImageNet 64x64 column. ADM of Dhariwal & Nichol (2021) without adaptive group norm: consistency
# training diverges with it (reported by Lu & Song, "sCM", 2024). Believed: batch, steps, EMA, dropout rate,
# c_noise.
IMAGENET64 = Config(
    preset="imagenet64",
    data=DataConfig(path="data/imagenet64", flip=True),
    network=NetworkConfig(
        name="adm",
        resolution=64,
        image_channels=3,
        num_classes=1000,
        head_channels=64,
        channels=192,
        channel_mult=(1, 2, 3, 4),
        num_blocks=3,
        attention_resolutions=(32, 16, 8),
        adaptive_norm=False,
        dropout=0.2,
        dropout_max_resolution=16,
        embedding="positional",
    ),
    method=MethodConfig(second_sigma=1.526),
    optimizer=OptimizerConfig(lr=1e-4, ema_decay=0.99997, ema_warmup=False),
    training=TrainingConfig(total_steps=800_000, batch_size=4096),
    logging=_LARGE_RUN_LOGGING,
)

# "Consistency Models" (Song, Dhariwal, Chen, Sutskever; ICML 2023): consistency training from scratch, with
# L2 in place of LPIPS. The figures are those of the authors' own commands: launch.sh of the repositories
# openai/consistency_models_cifar10 and openai/consistency_models (ImageNet). The warm-up of the rate in the
# former's configuration is read by its Adam alone. Believed: CIFAR-10's second sigma, which is iCT's.
_CT2023 = MethodConfig(
    s0=2,
    s1=150,
    curriculum="square-root",
    indices="uniform",
    weighting="uniform",
    metric="l2",
    teacher="ema",
    teacher_ema=0.9,
    teacher_ema_divisor="pairs",
)

_PRESETS = {
    preset.preset: preset
    for preset in (
        DIGITS,
        CIFAR10,
        # Twice the depth; the number of blocks is believed.
        replace(CIFAR10, preset="cifar10-deep", network=replace(CIFAR10.network, num_blocks=8)),
        IMAGENET64,
        replace(IMAGENET64, preset="imagenet64-deep", network=replace(IMAGENET64.network, num_blocks=6)),
        replace(
            CIFAR10,
            preset="cifar10-ct2023",
            network=replace(CIFAR10.network, dropout=0.0, embedding_scale=16.0),
            method=_CT2023,
            optimizer=replace(CIFAR10.optimizer, lr=4e-4, ema_decay=0.9999),
            training=replace(CIFAR10.training, total_steps=800_000, batch_size=512),
        ),
        replace(
            IMAGENET64,
            preset="imagenet64-ct2023",
            network=replace(IMAGENET64.network, adaptive_norm=True, dropout=0.0, c_noise="adm-openai"),
            # Of 0..200 from sigma_max down to sigma_min the authors take level 106 for the second step.
            method=replace(_CT2023, s1=200, teacher_ema=0.95, second_sigma=1.913),
            optimizer=replace(IMAGENET64.optimizer, ema_decay=0.999943),
            training=replace(IMAGENET64.training, batch_size=2048),
        ),
    )
}


def names() -> list[str]:
    """The presets, in the order of the documentation."""
    return list(_PRESETS)


def get(name: str) -> Config:
    """The preset of that name.

    Raises:
        InputError: if there is none; names the nearest.
    """
    if name not in _PRESETS:
        raise InputError(f'there is no preset "{name}"{did_you_mean(name, _PRESETS)}')
    return _PRESETS[name]
