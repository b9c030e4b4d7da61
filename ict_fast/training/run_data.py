"""A run's images: there, fitting the network, and the ones that it was trained on so far."""

from __future__ import annotations

import time
from pathlib import Path

from ict_fast.config import Config
from ict_fast.data.prepare import prepare_digits
from ict_fast.data.store import Store, open_store
from ict_fast.errors import InputError
from ict_fast.locks import BusyError
from ict_fast.presets import DIGITS
from ict_fast.screen import say
from ict_fast.training.run_directory import Run

_PATIENCE = 60.0  # seconds; the digits take one
_POLL_SECONDS = 0.1


def prepare_if_bundled(config: Config) -> None:
    """Prepares the digits, which come with scikit-learn, if the run needs them and they are not there yet.

    Where other runs do it at the same time, one does, and the others wait.

    Raises:
        InputError: if they cannot be written, or the process that has begun does not end.
    """
    give_up, told = time.monotonic() + _PATIENCE, False
    while will_prepare(config):
        try:
            prepare_digits(Path(config.data.path))
        except BusyError as busy:
            if time.monotonic() > give_up:
                raise
            if not told:
                say(str(busy))
            told = True
            time.sleep(_POLL_SECONDS)


def will_prepare(config: Config) -> bool:
    """Whether `prepare_if_bundled` has something to do."""
    return config.data.path == DIGITS.data.path and not Path(config.data.path).exists()


def open_images(config: Config) -> Store:
    """The store that a configuration names.

    Raises:
        InputError: if it is not there or not whole, or its images or classes are not what the network takes.
    """
    path, network = Path(config.data.path), config.network
    store = open_store(path)
    if (store.resolution, store.image_channels) != (network.resolution, network.image_channels):
        raise InputError(
            f"{path} holds {store.resolution}x{store.resolution} images of {store.image_channels} channels;"
            f" the network takes {network.resolution}x{network.resolution} of {network.image_channels}"
            " (--network.resolution, --network.image-channels)"
        )
    if network.num_classes not in (0, store.num_classes):
        raise InputError(
            f"{path} has {store.num_classes or 'no'} classes; --network.num-classes is {network.num_classes}"
        )
    return store


def open_data(run: Run) -> Store:
    """The store that the run names.

    Raises:
        InputError: as `open_images`, and if the run was trained on other images so far.
    """
    path = Path(run.config.data.path)
    if run.checkpoint is not None and not path.exists():
        hint = " (a relative path, from the directory of the command)" * (not path.is_absolute())
        raise InputError(f"the data of {run.out}, {path}, are not here{hint}; --data names the same store")
    store = open_images(run.config)
    before = store.fingerprint if run.checkpoint is None else run.checkpoint.state.get("data_fingerprint")
    if before != store.fingerprint:
        raise InputError(
            f"{store.path} holds other images than {run.out} was trained on (fingerprint"
            f" {store.fingerprint[:12]}, before {str(before)[:12]}); --data must name the same store"
        )
    return store
