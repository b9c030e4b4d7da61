"""Whether the loaders keep up with the training step: images per second of each, measured on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from ict_fast import presets
from ict_fast.config import Config
from ict_fast.data.loaders import LOADERS, Loader, choose_loader
from ict_fast.data.store import Store, open_store
from ict_fast.errors import InputError
from ict_fast.networks import build_network
from ict_fast.training.launch import configure_torch, resolve_device
from ict_fast.training.step import TrainStep

_SECONDS = 1.5  # per measurement, after the warm-up
_WARMUP_STEPS = 2
_LEAST_STEPS = 3

# The published networks (56 M parameters and more, at batches of 512 and more) are not trained on a CPU, and
# one step of theirs there would take longer than anybody waits for a table.
_MOST_PARAMETERS_ON_A_CPU = 20e6
_MOST_IMAGES_ON_A_CPU = 256

# On a GPU the rate grows with the batch until the device is full: sizes double while that gains this much.
_FIRST_SIZE_ON_A_GPU = 32
_LEAST_GAIN = 1.05


@dataclass(frozen=True)
class Rate:
    """Images per second, or why there is no such figure.

    Attributes:
        images_per_second: None if it was not measured.
        batch_size: images at a time while measuring.
        reason: why it was not measured; else empty.
    """

    images_per_second: float | None
    batch_size: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Feeding:
    """What the training step consumes and what each loader delivers.

    Attributes:
        data, preset, device: what was measured, and where, in words.
        step: the training step.
        loaders: each loader, by name.
        auto: the loader that `--data.loader auto` takes.
    """

    data: str
    preset: str
    device: str
    step: Rate
    loaders: Mapping[str, Rate]
    auto: str

    @property
    def starving(self) -> list[str]:
        """The loaders that deliver less than the step consumes; none if that was not measured."""
        consumed = self.step.images_per_second or 0.0
        rates = {name: rate.images_per_second for name, rate in self.loaders.items()}
        return [name for name, rate in rates.items() if rate is not None and rate < consumed]

    @property
    def fastest(self) -> str:
        """The loader that delivers most."""
        return max(self.loaders, key=lambda name: self.loaders[name].images_per_second or 0.0)


def measure(
    path: Path, preset: str | None, batch_size: int | None, *, progress: Callable[[float, str], None]
) -> Feeding:
    """Measures every loader on a store, and the training step of a preset; takes some ten seconds.

    Args:
        path: a prepared store.
        preset: whose step; None: the first preset whose network takes such images, if any does.
        batch_size: global batch; None: the preset's.
        progress: told the fraction done and what is being measured.
    Raises:
        InputError: if there is no such preset, its network takes other images, or the store is not whole.
    """
    named = None if preset is None else presets.get(preset)
    store, device = open_store(path), resolve_device()
    configure_torch(device, deterministic=False)
    images = f"{store.resolution}x{store.resolution} images of {store.image_channels} channels"
    taking = [config for config in map(presets.get, presets.names()) if _takes(config, store)]
    if named is not None and not _takes(named, store):
        right = ", ".join(config.preset for config in taking) or "none takes such images"
        raise InputError(f"--preset is {preset}, but {path} holds {images}; right for them: {right}")
    chosen = named or (taking[0] if taking else None)
    config = _fitted(chosen or presets.DIGITS, store, batch_size)
    auto, _ = choose_loader("auto", store, device)

    rates = {}
    for number, name in enumerate(LOADERS):
        progress(number / (len(LOADERS) + 1), f"loader {name}")
        rates[name] = loader_rate(name, config, store, device)
    progress(len(LOADERS) / (len(LOADERS) + 1), "training step")
    step = Rate(None, reason=f"no preset takes {images}")
    if chosen is not None:
        step = step_rate(config, store, device)
    data = f"{path}: {store.num_images:,} {images}"
    return Feeding(data, chosen.preset if chosen else "no preset", str(device), step, rates, auto)


def step_rate(config: Config, store: Store, device: torch.device) -> Rate:
    """What a training step consumes: forward, backward and optimizer, on images that are there already.

    On a GPU batches of growing size are tried, up to the configuration's or what the memory holds, and the
    fastest counts. On a CPU networks above 20 M parameters are not measured.

    Args:
        config: a run whose network takes the store's images and classes.
        store: the images.
        device: where to train.
    """
    batch_size = config.training.batch_size
    if device.type == "cpu":
        with torch.device("meta"):
            parameters = sum(p.numel() for p in build_network(config.network).parameters())
        if parameters > _MOST_PARAMETERS_ON_A_CPU:
            return Rate(None, reason=f"{parameters / 1e6:.0f} M parameters are for a GPU")
        sizes = [min(batch_size, _MOST_IMAGES_ON_A_CPU)]
    else:
        doublings = (_FIRST_SIZE_ON_A_GPU << doubling for doubling in range(20))
        sizes = [*(size for size in doublings if size < batch_size), batch_size]
    train_step, best = TrainStep(config, device), Rate(None, reason="no batch fits into its memory")
    for size in sizes:
        before = best.images_per_second or 0.0
        try:
            with _loader("memmap", config, store, device, size) as loader:
                batches = loader.micro_batches(0)
            rate = _images_per_second(partial(train_step, micro_batches=batches), size, device)
        except torch.OutOfMemoryError:
            break
        if rate > before:
            best = Rate(rate, size)
        if rate < _LEAST_GAIN * before:
            break
    return best


def loader_rate(name: str, config: Config, store: Store, device: torch.device) -> Rate:
    """What a loader delivers while nothing else runs.

    Args:
        name: one of LOADERS.
        config: its batch, seed and flips count.
        store: the images. Each loader begins in another epoch, so that none profits from the pages that the
            one before it has read from the disk.
        device: where the batches go.
    """
    size = config.training.batch_size
    first_step = list(LOADERS).index(name) * -(-store.num_images // size)
    try:
        with _loader(name, config, store, device, size) as loader:
            rate = _images_per_second(lambda step: loader.micro_batches(first_step + step), size, device)
    except (InputError, RuntimeError) as error:  # DALI is not installed, or fails; the store does not fit
        return Rate(None, reason=str(error).strip().partition("\n")[0])
    return Rate(rate, size)


def _takes(config: Config, store: Store) -> bool:
    network = config.network
    return (network.resolution, network.image_channels) == (store.resolution, store.image_channels)


def _fitted(config: Config, store: Store, batch_size: int | None) -> Config:
    """The preset with the store's classes, if it has classes, and the batch that was asked for."""
    classes = store.num_classes if config.network.num_classes else 0
    return replace(
        config,
        network=replace(config.network, num_classes=classes),
        training=replace(config.training, batch_size=batch_size or config.training.batch_size),
    )


def _loader(name: str, config: Config, store: Store, device: torch.device, batch_size: int) -> Loader:
    return LOADERS[name](
        store,
        batch_size=batch_size,
        seed=config.training.seed,
        flip=config.data.flip,
        device=device,
    )


def _images_per_second(run: Callable[[int], object], images: int, device: torch.device) -> float:
    """Calls run(0), run(1), ... for a while; the first calls, which fill queues and compile, do not count."""
    for step in range(_WARMUP_STEPS):
        run(step)
    _finish(device)
    started, done = time.perf_counter(), 0
    while done < _LEAST_STEPS or time.perf_counter() - started < _SECONDS:
        run(_WARMUP_STEPS + done)
        done += 1
    _finish(device)
    return done * images / (time.perf_counter() - started)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
