"""ict_kernels: the hot operations of improved consistency training, each defined in plain PyTorch too.

In other people's trainers: `adapters`, `GroupNormSiLU.replace_in`, `SharedDropout` and `seed_dropout`; the
guide, with a diff for each code base, is kernels/README.md of ict-fast.
"""

from . import adapters, layers
from .apex_backend import apex_report
from .backend import get_backend, set_backend
from .consistency_loss import c_in, c_out, c_skip, consistency_loss, pseudo_huber_loss
from .fir_resampling import fir_downsample, fir_upsample
from .group_norm_silu import GroupNormSiLU, group_norm_silu
from .noise_levels import NoiseLevels, noise_level_grid, noise_level_probabilities, sample_noise_levels
from .noising import noise_images
from .radam_ema import RAdamEMA
from .shared_dropout import DropoutSeed, SharedDropout, seed_dropout

__version__ = "0.1.0"

__all__ = [
    "DropoutSeed",
    "GroupNormSiLU",
    "NoiseLevels",
    "RAdamEMA",
    "SharedDropout",
    "adapters",
    "apex_report",
    "c_in",
    "c_out",
    "c_skip",
    "consistency_loss",
    "fir_downsample",
    "fir_upsample",
    "get_backend",
    "group_norm_silu",
    "layers",
    "noise_images",
    "noise_level_grid",
    "noise_level_probabilities",
    "pseudo_huber_loss",
    "sample_noise_levels",
    "seed_dropout",
    "set_backend",
]
