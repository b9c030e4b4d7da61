"""The process-wide switches of torch that every computation of a network relies on."""

from __future__ import annotations

import os

import torch

from ict_fast.hardware import usable_cores


def configure_torch(device: torch.device, *, deterministic: bool) -> None:
    """Sets the process-wide switches of torch that a run relies on."""
    # The network's ends must be IEEE fp32: TF32 rounding makes neighbouring noise levels identical. The first
    # two are what a switch of one kind of operation, when it is turned off, takes its value from.
    torch.backends.fp32_precision = "ieee"  # type: ignore[attr-defined]
    torch.backends.cudnn.fp32_precision = "ieee"
    torch.backends.mkldnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    # A weight's gradient sums over all pixels: what cuBLAS splits it into is added in fp32, not in 16 bits.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    # torch knows of the cores, not of a container's share of their time.
    if "OMP_NUM_THREADS" not in os.environ and usable_cores() < torch.get_num_threads():
        torch.set_num_threads(usable_cores())
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # Sums that switches make (NVLink SHARP) may differ from call to call. NCCL reads this when it begins,
        # with the first gradients.
        os.environ.setdefault("NCCL_ALGO", "^NVLS,NVLSTree")
        torch.use_deterministic_algorithms(True)
        # Else every torch.empty is filled with NaN: a pass over memory before that of each norm.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
