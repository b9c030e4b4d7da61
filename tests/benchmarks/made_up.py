"""Made-up results of a GPU that does not exist: what rendering is tried on, in a folder of the test's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

GPU = "Made-up GPU"


def comparison(ours: float, copy: float, moved: float, **others: float) -> dict[str, Any]:
    """The figures of a stage, as gpu_timing.measure stores them."""
    return {
        "algorithm": "resident",
        "bytes_moved": moved,
        "minimum_bytes": moved,
        "ms": {"ict_kernels": ours, "copy": copy, "copy by a kernel": 1.01 * copy, **others},
        "gb_per_s": moved / ours / 1e6,
        "copied_bytes": moved,
        "copy_gb_per_s": moved / copy / 1e6,
        "percent_of_copy": 100 * copy / ours,
        "percent_of_minimum_copy": 100 * copy / ours,
        "times_faster_than": {name: ms / ours for name, ms in others.items()},
    }


def kernel_results() -> list[dict[str, Any]]:
    error = {"max_error": 1e-3, "torch_max_error": 2e-3, "ratio": 0.5}
    found: list[dict[str, Any]] = []
    for number in range(12):
        moved, copy = 2.0e6 * 2**number, 0.001 * 2**number
        dropout = ", dropout" if number % 3 == 0 else ""
        others = {"eager": 4 * copy, "inductor": 1.6 * copy, "inductor, raised thresholds": 1.3 * copy}
        found.append(
            {
                "name": f"group_norm_silu, cifar10, {64 * number + 64} x 32 x 32, 32 groups, bf16{dropout}",
                "stages": {
                    "forward": comparison(1.1 * copy, copy, moved, **others),
                    "backward": comparison(1.15 * copy, copy, 1.5 * moved, **others),
                },
                "errors": {"y": error},
                "failed": {},
            }
        )
    found.append(
        {
            "name": "consistency_loss, cifar10",
            "stages": {"forward": comparison(0.01, 0.009, 2.5e7, eager=0.04)},  # 4x: a miss
            "errors": {"loss": error},
            "failed": {},
        }
    )
    found.append(
        {"name": "host, calls of small tensors", "host_us": {"a norm": {"ict_kernels": 21.5, "eager": 30.25}}}
    )
    found.append({"name": "noise_images, cifar10", "not_measured": "the budget of 420 s was used up"})
    return found


def step_result(preset: str, images: int, times: dict[str, float]) -> dict[str, Any]:
    flops, peak = 4.0e11 * images, 700.0

    def one_pass(ms: float) -> dict[str, Any]:
        gpu = {"sm_mhz": 1755.0, "watts": 640.0, "limited_by": {"power cap": 0.5}, "answers": 30}
        return {"ms_all": [ms] * 10, "host_ms": ms, "behind_ms": 71.5, "device_allocations": 0, "gpu": gpu}

    variants = {
        name: {
            "ms_per_step": ms,
            "images_per_second": images / ms * 1e3,
            "tflop_per_s": flops / ms / 1e9,
            "percent_of_matrix_rate": 100 * flops / ms / 1e9 / peak,
            "peak_memory_bytes": 40 * 2**30,
            "first_step_s": 60.0,
            "passes": [one_pass(ms)],
        }
        for name, ms in times.items()
    }
    ours = times["ict-fast"]
    return {
        "name": f"step, {preset}",
        "preset": preset,
        "batch_size": images,
        "flops": flops,
        "matrix_tflop_per_s": peak,
        "variants": variants,
        "floor": {
            "share_of_flops": 1.0,
            "ms": 0.8 * ours,
            "ms_by_operation": {"convolution": 0.7 * ours, "attention": 0.1 * ours},
            "in_sequence": {"ms": 0.85 * ours, **one_pass(0.85 * ours)},
        },
        "times_the_floor": 1.25,
        "times_faster_than": {name: ms / ours for name, ms in times.items() if name != "ict-fast"},
        "left_out": {"ict-fast, max-autotune": "the 420 s of this network were used up"},
        "failed": {},
    }


def train_result() -> dict[str, Any]:
    from gpu_train import packed
    from torch import from_numpy

    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (100, 1, 8, 8), np.uint8).repeat(4, axis=2).repeat(4, axis=3)
    stages = [
        {"num_scales": 10 * 2**k + 1, "last_step": 100 * (k + 1), "loss": 10.0 * 1.5**k} for k in range(8)
    ]
    return {
        "name": "digits at 32x32, all stages",
        "parameters": 56_000_000,
        "batch_size": 256,
        "precision": "bf16",
        "compiled_blocks": 30,
        "loader": "resident loader (as asked), 1,797 images",
        "stages": stages,
        "total_steps": 800,
        "training_seconds": 200.0,
        "images_per_second": 1024.0,
        "percent_of_matrix_rate": 25.0,
        "one_step": {"frechet_distance": 3.0, "deviation_within_blocks": 0.01},
        "two_step": {"frechet_distance": 2.5, "deviation_within_blocks": 0.01},
        "reference": {"halves": 2.3, "noise": 352.6},
        "samples": packed(from_numpy(pixels)),
    }


def profile_result() -> dict[str, Any]:
    def profile(scale: float) -> dict[str, Any]:
        ms = {"convolution": 150.0, "attention": 20.0, "norm": 40.0 * scale, "elementwise": 15.0, "idle": 2.0}
        return {"wall_ms": sum(ms.values()), "ms": ms}

    profiles = {"inductor": profile(1.0), "ict-fast": profile(0.5)}
    return {"name": "profile, imagenet64", "batch_size": 128, "profiles": profiles}


def write_results(folder: Path) -> None:
    """One report of every part, of a made-up GPU."""
    from gpu_baselines import INDUCTOR, TUNED

    variants = {"ict-fast": 200.0, INDUCTOR: 230.0, TUNED: 208.0, "torch, uncompiled": 400.0}
    radam = "torch.optim.RAdam, foreach, + foreach EMA"
    copy = comparison(2.0, 1.9, 8.6e9, **{radam: 9.0}) | {"queued_ms": {"ict_kernels": 2.0, radam: 8.0}}
    called = {"ict_kernels": 2.25, radam: 8.5}
    parts: dict[str, list[dict[str, Any]]] = {
        "tests": [
            {
                "name": "tests/gpu/test_noising.py",
                "counts": {"passed": 90, "skipped": 3},
                "summary": "90 passed, 3 skipped",
                "tests": [],
            },
            {
                "name": "compute-sanitizer, memcheck",
                "counts": {"passed": 1},
                "summary": "memcheck: clean, 16 kernels",
                "kernels": [],
            },
        ],
        "kernels": kernel_results(),
        "optimizer": [
            {
                "name": "RAdamEMA, cifar10",
                "stages": {"step": copy},
                "called_from_python_ms": called,
                "failed": {},
            },
            {"name": "RAdamEMA, imagenet64", "not_measured": "the budget of 420 s was used up"},
        ],
        "step": [step_result("imagenet64", 128, variants), step_result("cifar10", 512, variants)],
        "data": [
            {
                "name": "loaders, 64x64, batch 128",
                "images_per_second_of": {"resident": 5e6, "memmap": 1e6, "dali": 2e6},
                "percent_of_link": {"memmap": 20.0, "resident": 100.0},
                "left_out": {"DataLoader, 4 workers": "made up"},
            }
        ],
        "train": [train_result()],
        "profile": [profile_result()],
        "precision": [
            {
                "name": "gradients by precision, digits",
                "batches": 24,
                "batch_size": 128,
                "stages": [
                    {
                        "num_scales": 11,
                        "precisions": {
                            "bf16": {"cosine": 0.9, "cosine_of_mean": 0.95, "norm": 0.8765, "noise": 0.1}
                        },
                    }
                ],
            }
        ],
    }
    ceilings = {"copy_gb_per_s": 3000.0, "matrix_tflop_per_s": {"bf16": 700.0, "fp32": 50.0}}
    for part, results in parts.items():
        report = {
            "part": part,
            "date": "2020-01-01T00:00:00+00:00",
            "commit": "0000000",
            "hardware": {"gpu": GPU, "driver": "0"},
            "versions": {"torch": "0", "triton": "0"},
            "ceilings": ceilings,
            "results": results,
        }
        (folder / f"{part}-Made-up-GPU-20200101-000000.json").write_text(json.dumps(report))
