"""The choice of a loader: dali, resident or memmap. All give the same batches, at different speeds."""

from __future__ import annotations

import torch

from ict_fast.config import Config
from ict_fast.data.batches import Batch, Loader
from ict_fast.data.dali_loader import DaliLoader, dali_failure, dali_problem
from ict_fast.data.memmap_loader import MemmapLoader
from ict_fast.data.page_cache import read_ahead
from ict_fast.data.resident_loader import ResidentLoader, free_bytes, resident_bytes
from ict_fast.data.store import Store

__all__ = ["LOADERS", "Batch", "Loader", "choose_loader", "make_loader"]

LOADERS: dict[str, type[Loader]] = {
    "dali": DaliLoader,
    "resident": ResidentLoader,
    "memmap": MemmapLoader,
}

# auto gives images at most this share of the free memory: weights, their averages and, above all,
# activations come later, and a run must not fail for want of memory that a loader took for convenience.
_RESIDENT_SHARE = 1 / 4


def choose_loader(asked: str, store: Store, device: torch.device) -> tuple[str, str]:
    """The loader that `--data.loader` means on this machine.

    Args:
        asked: "auto" or a name in LOADERS, which is taken as it is.
        store: the images.
        device: where batches go.
    Returns:
        Its name and the reason, in words. auto: memmap on a CPU; on a GPU dali where it works, else resident
        if the store takes at most a quarter of the GPU's free memory, else memmap.
    """
    if asked != "auto":
        return asked, "as asked"
    if device.type == "cpu":
        return "memmap", "auto: the device is a CPU"
    problem = dali_problem() or dali_failure(device)
    if problem is None:
        return "dali", "auto: DALI is installed"
    needed, free = resident_bytes(store) / 1e9, free_bytes(device) / 1e9
    sizes = f"{needed:.3g} GB of {free:.3g} GB free on {device}"
    if needed <= _RESIDENT_SHARE * free:
        return "resident", f"auto: {problem}; the images take {sizes}"
    return "memmap", f"auto: {problem}; the images would take {sizes}, more than a quarter"


def make_loader(
    config: Config, store: Store, device: torch.device, *, rank: int = 0, world_size: int = 1
) -> tuple[Loader, str]:
    """The loader that `--data.loader` names.

    Args:
        config: its data section, batch, micro-batch and seed.
        store: the images.
        device: where batches go.
        rank, world_size: this process among all.
    Returns:
        The loader, and a line that says which it is and why.
    Raises:
        InputError: as that loader; see there.
    """
    name, why = choose_loader(config.data.loader, store, device)
    if name != "resident":
        read_ahead(store)
    loader = LOADERS[name](
        store,
        batch_size=config.training.batch_size,
        seed=config.training.seed,
        flip=config.data.flip,
        device=device,
        rank=rank,
        world_size=world_size,
        micro_batch=config.training.micro_batch,
    )
    return loader, f"{name} loader ({why}), {store.num_images:,} images from {store.path}"
