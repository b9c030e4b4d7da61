"""This package inside other people's trainers: a file for each code base; kernels/README.md has the diffs."""

from . import diffusers_cm, ect, hf_trainers, kinyugo, openai_cm
from .diffusers_cm import apply_ict_kernels_to_diffusers_cm
from .ect import apply_ict_kernels_to_ect
from .hf_trainers import apply_ict_kernels_to_hf_trainers
from .kinyugo import apply_ict_kernels_to_kinyugo
from .openai_cm import apply_ict_kernels_to_openai_cm

__all__ = [
    "apply_ict_kernels_to_diffusers_cm",
    "apply_ict_kernels_to_ect",
    "apply_ict_kernels_to_hf_trainers",
    "apply_ict_kernels_to_kinyugo",
    "apply_ict_kernels_to_openai_cm",
    "diffusers_cm",
    "ect",
    "hf_trainers",
    "kinyugo",
    "openai_cm",
]
