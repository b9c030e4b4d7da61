"""What a log line says of a run, against independent counts."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ict_fast import presets
from ict_fast.config import Config
from ict_fast.hardware import peak_flops
from ict_fast.networks import build_network
from ict_fast.networks.cost import network_cost
from ict_fast.screen import rate
from ict_fast.training.figures import figures
from ict_fast.training.loss_by_sigma import BUCKETS, LossBySigma, bucket_means, sigma_edges
from ict_fast.training.monitor import Monitor
from ict_fast.training.run_directory import Run
from ict_fast.training.step import TrainStep
from ict_fast.training.trainer import train
from ict_fast.training.utilisation import Utilisation
from ict_kernels import sample_noise_levels

CPU = torch.device("cpu")


def test_the_buckets_are_equal_steps_of_the_logarithm_whatever_the_stage(tiny: Config) -> None:
    edges = np.array(sigma_edges(tiny.method))
    assert edges == pytest.approx(np.geomspace(0.002, 80, BUCKETS + 1))
    assert (edges[0], edges[-1]) == (0.002, 80.0)


def test_losses_are_sorted_by_the_teachers_noise_level(tiny: Config) -> None:
    """Against a loop over images, with levels on the borders and losses that are not finite."""
    edges = sigma_edges(tiny.method)
    generator = torch.Generator().manual_seed(0)
    sigma = torch.exp(torch.empty(500).uniform_(math.log(0.002), math.log(80), generator=generator))
    sigma[:BUCKETS] = torch.tensor(edges[:-1])
    loss = torch.rand(500, generator=generator)
    loss[20:24] = torch.tensor([torch.nan, torch.inf, -torch.inf, 3.0])
    sums, counts = LossBySigma(tiny.method, CPU)(loss, sigma).view(2, BUCKETS)
    expected = np.zeros((2, BUCKETS))
    for value, level in zip(loss.tolist(), sigma.tolist(), strict=True):
        bucket = max(i for i in range(BUCKETS) if level >= np.float32(edges[i]))
        if math.isfinite(value):
            expected[:, bucket] += (value, 1)
    assert counts.tolist() == expected[1].tolist()
    assert sums.tolist() == pytest.approx(expected[0].tolist(), rel=1e-5)
    means = bucket_means(torch.tensor([1.0] + [0.0] * (BUCKETS - 1) + [4.0] + [0.0] * (BUCKETS - 1)))
    assert means == [0.25] + [None] * (BUCKETS - 1)


def test_losses_whose_sum_is_not_finite_have_no_mean(tiny: Config) -> None:
    """JSON has no infinity: the log's line would end the run."""
    losses = torch.tensor([3e38, 3e38, 1.0])
    means = bucket_means(LossBySigma(tiny.method, CPU)(losses, torch.tensor([0.003, 0.003, 70.0])))
    assert means == [None] * (BUCKETS - 1) + [1.0]


def test_the_buckets_of_a_window_make_up_its_mean_loss(tiny: Config, batches: Callable[..., list]) -> None:
    train_step = TrainStep(tiny, CPU)
    for step in range(3):
        train_step(step, batches(tiny, step, 4))
    found, size = figures(train_step, 3), tiny.training.batch_size
    counts = train_step.losses.by_sigma[BUCKETS:]
    assert counts.sum() == 3 * size
    total = sum(mean * count for mean, count in zip(found["loss_by_sigma"], counts, strict=True) if count)
    assert float(total) / (3 * size) == pytest.approx(found["loss"], rel=1e-6)
    drawn = [
        sample_noise_levels(size, scales, seed=torch.tensor([0, step])).sigma
        for step, scales in enumerate((11, 11, 11))
    ]
    inner = torch.tensor(sigma_edges(tiny.method)[1:-1])
    expected = torch.bincount(torch.bucketize(torch.cat(drawn), inner, right=True), minlength=BUCKETS)
    assert counts.tolist() == expected.tolist()
    train_step.reset_losses()
    assert figures(train_step, 3)["loss_by_sigma"] == [None] * BUCKETS


def test_a_log_line_has_every_figure_and_run_json_what_they_refer_to(tiny: Config, tmp_path: Path) -> None:
    train(tiny, out=tmp_path / "run", device="cpu")
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    for line in lines:
        assert line["precision"] == "fp32"
        assert line["mfu"] is None, "the peak of a CPU is not known"
        assert 0.05 < line["memory_gb"] < 100
        assert 0 <= line["data_wait"] <= 1
        assert len(line["loss_by_sigma"]) == BUCKETS
    described = json.loads((tmp_path / "run/run.json").read_text())
    assert described["sigma_edges"] == sigma_edges(tiny.method)
    assert described["processes"] == 1
    assert described["device"] == "cpu"
    assert described["flops_per_image"] == 4 * network_cost(build_network(tiny.network)).forward_flops


@pytest.mark.parametrize(("preset", "gigaflops"), [("cifar10", 42.8), ("imagenet64", 219.3)])
def test_forward_passes_cost_what_the_papers_networks_do(preset: str, gigaflops: float) -> None:
    with torch.device("meta"):
        network = build_network(presets.get(preset).network)
    assert network_cost(network).forward_flops / 1e9 == pytest.approx(gigaflops, rel=2e-3)


def test_four_forward_passes_are_a_training_step(tiny: Config, batches: Callable[..., list]) -> None:
    """Counted on a real step: the first convolution's input needs no gradient, so it is a little less."""
    network = replace(tiny.network, channels=24, channel_mult=(1, 2, 2), resolution=8, num_blocks=2)
    config = replace(tiny, network=network)
    train_step = TrainStep(config, CPU)
    with FlopCounterMode(display=False) as counter:
        train_step(0, batches(config))
    counted = counter.get_total_flops() / config.training.batch_size
    forward_flops = network_cost(train_step.network).forward_flops
    assert counted == pytest.approx(4 * forward_flops, rel=0.03)
    assert counted < 4 * forward_flops


@pytest.mark.parametrize(
    ("name", "half"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA B200", 2250e12),
        ("cpu", None),
    ],
)
def test_a_gpu_is_known_by_its_name(name: str, half: float | None) -> None:
    rates = peak_flops(name)
    assert (rates and rates.half) == half


def test_mfu_is_the_models_flops_over_the_peak_of_all_devices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-40GB")
    with torch.device("meta"):
        network = build_network(presets.get("cifar10").network)
    use = Utilisation(network, torch.device("cuda"), 8)
    assert use.mfu(5000, "bf16") == pytest.approx(5000 * 4 * 42.79e9 / (8 * 312e12), rel=1e-3)
    assert use.mfu(5000, "tf32") == pytest.approx(5000 * 4 * 42.79e9 / (8 * 156e12), rel=1e-3)
    assert use.mfu(5000, "fp32") == pytest.approx(5000 * 4 * 42.79e9 / (8 * 19.5e12), rel=1e-3)


def test_time_that_is_not_training_does_not_count_for_the_rate(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr("ict_fast.training.monitor.time.monotonic", lambda: clock[0])
    monitor = Monitor(Run(tmp_path, tiny, None))
    values = {"loss": 1.0, "num_scales": 11, "skipped": 0, "precision": "fp32", "loss_by_sigma": []}
    clock[0] += 50  # compiling
    monitor.restart_clock(1)
    clock[0] += 4
    monitor.waited_for_data(1.0)
    monitor.record(3, values)
    with monitor.paused():
        clock[0] += 1000  # a measurement
    clock[0] += 8
    monitor.record(7, values)
    first, second = (json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())
    assert first["images_per_second"] == second["images_per_second"] == 16 * 2 / 4
    assert (first["data_wait"], second["data_wait"]) == (0.25, 0)


def test_a_log_that_a_full_disk_has_cut_short_goes_on_line_by_line(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two lines meet a full disk, the first one in its middle; said once, and no other line is lost."""
    original, appended = Path.open, 0

    def open_until_full(self: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        nonlocal appended
        appended += 1
        if appended == 2:
            with original(self, mode) as file:
                file.write('{"step": 2, "lo')
        if appended in (2, 3):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(self, mode, *arguments, **options)

    monitor = Monitor(Run(tmp_path, tiny, None))
    monkeypatch.setattr(Path, "open", open_until_full)
    values = {"loss": 1.0, "num_scales": 11, "skipped": 0, "precision": "fp32", "loss_by_sigma": []}
    for step in range(1, 8):
        monitor.record(step, values)
    monkeypatch.undo()
    first, cut, *others = (tmp_path / "log.jsonl").read_text().splitlines()
    assert cut == '{"step": 2, "lo'
    assert [json.loads(line)["step"] for line in (first, *others)] == [1, 4, 5, 6, 7]
    assert capsys.readouterr().err.count("No space left on device") == 1


@pytest.mark.parametrize(("value", "said"), [(12_345.6, "12,346"), (99.4, "99.4"), (0.4273, "0.427")])
def test_a_rate_is_never_nothing(value: float, said: str) -> None:
    assert rate(value) == said
