"""Runs of the trainer in this process and in others."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forked import ForkedPython

from ict_fast.config import Config
from ict_fast.data.loaders import Batch


def flags(config: Config) -> list[str]:
    """The command-line options that turn the default preset into `config`'s fields of interest."""
    training, logging = config.training, config.logging
    return [
        *("--data.path", config.data.path, "--data.flip" if config.data.flip else "--data.no-flip"),
        *(
            "--network.channels",
            str(config.network.channels),
            "--network.dropout",
            str(config.network.dropout),
        ),
        *(
            "--training.total-steps",
            str(training.total_steps),
            "--training.batch-size",
            str(training.batch_size),
        ),
        *("--network.num-classes", str(config.network.num_classes)),
        *("--network.channel-mult", *map(str, config.network.channel_mult)),
        *("--network.attention-resolutions", *map(str, config.network.attention_resolutions)),
        *("--network.dropout-max-resolution", str(config.network.dropout_max_resolution)),
        *("--training.micro-batch", str(training.micro_batch)),
        *("--logging.log-every", str(logging.log_every), "--logging.grid-every", str(logging.grid_every)),
        *("--logging.checkpoint-every", str(logging.checkpoint_every)),
    ]


@pytest.fixture
def one_level(tiny: Config) -> Config:
    """Five blocks at one resolution, with attention and dropout: half the time of a step."""
    network = replace(tiny.network, channel_mult=(1,), attention_resolutions=(8,), dropout_max_resolution=0)
    return replace(tiny, network=network)


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Callable[..., ForkedPython | subprocess.Popen]]:
    """Starts `ict-fast train` on the CPU in a process of its own, or in those of a launcher.

    The process is forked, unless its end and the order of its sets are to be its own (`spawned`).
    """

    def start(
        config: Config, out: Path, *extra: str, spawned: bool = False, launcher: tuple[str, ...] = ()
    ) -> ForkedPython | subprocess.Popen:
        words = [*launcher, "-m", "ict_fast", "train", "--device", "cpu", "--out", str(out)]
        words += [*flags(config), *extra]
        if spawned or launcher:  # a launcher's processes look at its command line
            output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            started.append(subprocess.Popen([sys.executable, *words], **output))
        else:
            started.append(ForkedPython(words, tmp_path / f"output-{len(started)}.txt"))
        return started[-1]

    started: list[ForkedPython | subprocess.Popen] = []
    yield start
    for process in started:
        process.kill()  # which does nothing unless a test has failed


@pytest.fixture
def batches() -> Callable[..., list[Batch]]:
    """Makes the micro-batches of a step from random images: (config, step, size of a micro-batch)."""

    def make(config: Config, step: int = 0, size: int | None = None) -> list[Batch]:
        generator = torch.Generator().manual_seed(step)
        total, network = config.training.batch_size, config.network
        shape = (total, network.resolution, network.resolution, network.image_channels)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        flip = torch.randint(0, 2, (total,), dtype=torch.uint8, generator=generator)
        labels = torch.arange(total) % 10
        size = size or total
        starts = range(0, total, size)
        return [Batch(images[i : i + size], labels[i : i + size], flip[i : i + size], i) for i in starts]

    return make
