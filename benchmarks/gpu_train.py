"""Part `train` of run_gpu.py: a real run on the GPU, to see that the fast path learns.

CIFAR-10's NCSN++ (128 channels, 32x32, dropout) on scikit-learn's digits, each pixel made a block of 4x4,
with their classes; a bf16 trunk, compiled blocks, DALI or the resident loader, all eight stages of the
curriculum. Stage one needs no total: its first steps are timed, then the length is chosen that fits the time.

Means over 4x4 give back 8x8 digits, whose Fréchet distance to the real ones is the figure of the CPU's run
(results/digits-demo.json): same features, same number of samples. The project's evaluation needs packages
that a bare machine lacks, so features and distance are digits_copy.py's.
"""

from __future__ import annotations

import base64
import math
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import digits_copy
import numpy as np
import torch
from machine import absent, ceilings
from step_counts import count_config
from torch import Tensor

from ict_fast import consistency, presets
from ict_fast.config import Config, DataConfig
from ict_fast.consistency import ConsistencyModel, sample
from ict_fast.consistency.model import build_seeded_network
from ict_fast.data.loaders import Loader, make_loader
from ict_fast.data.store import Store, open_store, write_store
from ict_fast.training.step import TrainStep

BLOCK = 4
# For sampling and the distances, which come after the training.
SECONDS_FOR_THE_REST = {"cuda": 45.0, "cpu": 0.0}
CALIBRATION_STEPS = {"cuda": 12, "cpu": 2}
MOST_STEPS = {"cuda": 6000, "cpu": 40}
SAMPLES = {"cuda": 10_000, "cpu": 40}
SHOWN = {"cuda": 100, "cpu": 40}
SAMPLE_STEPS = (1, 2)


def train_config(device: torch.device) -> Config:
    """What is trained; on a CPU a tiny form that learns nothing worth looking at.

    The learning rate is between the two presets': the run is a hundredth of CIFAR-10's and its network 500
    times the digits'. It was chosen without a GPU to try it on.
    """
    digits, cifar = presets.get("digits"), presets.get("cifar10")
    network = replace(cifar.network, image_channels=1, num_classes=10, dropout=0.1)
    optimizer = replace(digits.optimizer, lr=4e-4)
    training = replace(
        digits.training, batch_size=256, total_steps=MOST_STEPS[device.type], compile="on", precision="bf16"
    )
    if device.type == "cpu":
        network = replace(network, channels=4, num_blocks=1)
        training = replace(training, batch_size=4, compile="off", precision="fp32")
        optimizer = replace(optimizer, lr=2e-3)
    return replace(
        digits,
        preset="digits-32x32",
        data=DataConfig(path="digits-32x32", flip=False),
        network=network,
        optimizer=optimizer,
        training=training,
    )


def digits_store(folder: Path, block: int = BLOCK) -> Store:
    """The digits, each pixel a block of so many by so many: 32x32 images by default."""
    digits = digits_copy.load()
    images = digits["images"].repeat(block, axis=1).repeat(block, axis=2)
    return open_store(
        write_store(
            folder,
            images,
            digits["labels"].astype(np.int64),
            source="scikit-learn load_digits",
            recipe=f"8x8 grey, each pixel a block of {block}x{block}",
            classes=[str(digit) for digit in range(10)],
        )
    )


def part_train(device: torch.device, session: Any) -> dict[str, Any]:
    """What to measure, by name."""
    return {
        "digits at 32x32, all stages": lambda: measure_training(train_config(device), device, session.share())
    }


def measure_training(config: Config, device: torch.device, budget_seconds: float) -> Iterator[dict[str, Any]]:
    """Trains, samples and evaluates; yields the record so far at the end of every stage, and at the end.

    The record: the configuration's main fields; a log line at every stage's end; images/s and MFU; distances
    of one- and two-step samples beside what they are to be read by; some samples themselves.
    """
    if absent("numpy"):
        yield {"not_measured": "needs numpy, for the store of images"}
        return
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        store = digits_store(Path(folder) / "store")
        train_step = TrainStep(config, device)
        loader, reason = make_loader(config, store, device)
        record: dict[str, Any] = {
            "preset": config.preset,
            "parameters": sum(p.numel() for p in train_step.network.parameters()),
            "batch_size": config.training.batch_size,
            "learning_rate": config.optimizer.lr,
            "dropout": config.network.dropout,
            "compiled_blocks": train_step.compiled_blocks,
            "loader": reason.partition(" from ")[0],
            "stages": [],
            "precision": config.training.precision,
        }
        with loader:
            yield from _train(train_step, loader, record, device, started, budget_seconds)
        yield record | _evaluated(train_step, store, device)


def _train(
    step: TrainStep,
    loader: Loader,
    record: dict[str, Any],
    device: torch.device,
    started: float,
    budget_seconds: float,
) -> Iterator[dict[str, Any]]:
    begun = time.monotonic()
    step(0, loader.micro_batches(0))
    _wait(device)
    record["first_step_s"] = round(time.monotonic() - begun, 1)
    begun, calibration = time.monotonic(), CALIBRATION_STEPS[device.type]
    for k in range(1, 1 + calibration):
        step(k, loader.micro_batches(k))
    _wait(device)
    seconds_per_step = (time.monotonic() - begun) / calibration
    left = budget_seconds - (time.monotonic() - started) - SECONDS_FOR_THE_REST[device.type]
    # The first steps are the same in a run of any length from the least on: they lie in its stage one.
    total = max(16 * calibration, min(step.config.training.total_steps, int(left / seconds_per_step)))
    config = step.config = replace(step.config, training=replace(step.config.training, total_steps=total))
    record["total_steps"] = total
    stages = consistency.stages(total, config.method)
    ends = {each.first_step for each in stages[1:]} | {total}
    training_seconds, window, window_step = 0.0, time.monotonic(), 1 + calibration
    step.reset_losses()
    for k in range(1 + calibration, total):
        step(k, loader.micro_batches(k))
        if k + 1 in ends:
            _wait(device)
            elapsed = time.monotonic() - window
            training_seconds += elapsed
            record["stages"].append(
                {
                    "num_scales": consistency.num_scales(k, total, config.method),
                    "last_step": k + 1,
                    "loss": float(step.losses.sum) / max(1, int(step.losses.count)),
                    "images_per_second": (k + 1 - window_step) * config.training.batch_size / elapsed,
                    "skipped": int(step.optimizer.skipped),
                }
            )
            step.reset_losses()
            yield record
            window, window_step = time.monotonic(), k + 1
    images = (total - 1 - calibration) * config.training.batch_size
    record["training_seconds"] = round(training_seconds, 2)
    record["images_per_second"] = images / training_seconds
    flops = count_config(config, config.training.batch_size)["flops"] / config.training.batch_size
    dtype = "bf16" if device.type == "cuda" else "fp32"
    peak = ceilings(device.type)["matrix_tflop_per_s"][dtype]
    record["flops_per_image"] = flops
    record["percent_of_matrix_rate"] = 100 * record["images_per_second"] * flops / 1e12 / peak


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# ------------------------------------------------------------------------------------------------ the metrics


def _evaluated(step: TrainStep, store: Store, device: torch.device) -> dict[str, Any]:
    """Distances of the averaged weights' samples, of noise and of the two halves of the real digits."""
    network = build_seeded_network(step.config).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    network.load_state_dict(step.ema_weights())
    model = ConsistencyModel(step.config, network).eval().requires_grad_(False)
    count = SAMPLES[device.type]
    digits = torch.from_numpy(digits_copy.load()["images"]).permute(0, 3, 1, 2)
    real = digits_copy.features(digits)
    random = np.random.default_rng(4)
    labels = torch.from_numpy(store.labels[random.integers(0, store.num_images, count)])
    shown = SHOWN[device.type]
    labels[:shown] = torch.arange(shown) % 10
    found: dict[str, Any] = {}
    for steps in SAMPLE_STEPS:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):  # as it was trained
            images = sample(model, count, steps=steps, labels=labels, seed=0).cpu()
        small = to_digits(images)
        name = {1: "one_step", 2: "two_step"}[steps]
        found[name] = {
            "frechet_distance": digits_copy.frechet_distance(digits_copy.features(small), real),
            "finite": bool(images.isfinite().all()),
            "deviation_within_blocks": within_blocks(images),
        }
        if steps == 1:
            found["samples"] = packed(to_pixels(images[:shown]))
    noise = torch.from_numpy(
        np.random.default_rng(1).integers(0, 256, (count, 8, 8, 1), dtype=np.uint8)
    ).permute(0, 3, 1, 2)
    order = torch.from_numpy(np.random.default_rng(3).permutation(len(real)))
    half = len(real) // 2
    found["reference"] = {
        "halves": digits_copy.frechet_distance(real[order[:half]], real[order[half:]]),
        "noise": digits_copy.frechet_distance(digits_copy.features(noise), real),
    }
    found["samples_per_distance"] = count
    distance = found["one_step"]["frechet_distance"]
    found["summary"] = (
        f"one step: distance {distance:.3f}, {distance / found['reference']['noise']:.2%} of noise"
    )
    return found


def to_pixels(images: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8, rounded and clipped; NaN becomes 0."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).nan_to_num(0).to(torch.uint8)


def to_digits(images: Tensor) -> Tensor:
    """The 8x8 digits that 32x32 images are made of, uint8: the means of their blocks."""
    return to_pixels(torch.nn.functional.avg_pool2d(images.float(), BLOCK))


def within_blocks(images: Tensor) -> float:
    """Standard deviation of the pixels within a block, in units of [-1, 1]: 0 for real images."""
    means = torch.nn.functional.avg_pool2d(images.float(), BLOCK)
    blocks = means.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)
    return math.sqrt(float((images.float() - blocks).square().mean()))


def packed(pixels: Tensor) -> dict[str, Any]:
    """uint8 (N, C, H, W) as JSON."""
    data = base64.b64encode(zlib.compress(pixels.contiguous().numpy().tobytes(), 9)).decode()
    return {"shape": list(pixels.shape), "zlib_base64": data}


def unpacked(stored: dict[str, Any]) -> np.ndarray:
    """What `packed` stored."""
    raw = zlib.decompress(base64.b64decode(stored["zlib_base64"]))
    return np.frombuffer(raw, np.uint8).reshape(stored["shape"])
