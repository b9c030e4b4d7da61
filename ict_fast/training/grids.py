"""What a run's averaged weights draw while it goes on."""

from __future__ import annotations

from pathlib import Path

from ict_fast.consistency.model import ConsistencyModel, build_seeded_network
from ict_fast.consistency.sampling import sample
from ict_fast.data.pictures import image_grid, save_png, to_uint8
from ict_fast.errors import is_system_error
from ict_fast.training.monitor import Monitor, reason
from ict_fast.training.step import TrainStep

_GRID_IMAGES = 64


def averaged_model(train_step: TrainStep) -> ConsistencyModel:
    """The averaged weights, in a model of their own."""
    network = build_seeded_network(train_step.config).to(train_step.device)
    network.load_state_dict(train_step.ema_weights())
    return ConsistencyModel(train_step.config, network).eval().requires_grad_(False)


def save_grid(train_step: TrainStep, step: int, path: Path, monitor: Monitor) -> None:
    """One-step samples of the averaged weights, from the same noise every time."""
    try:
        path.parent.mkdir(exist_ok=True)
        save_png(image_grid(to_uint8(sample(averaged_model(train_step), _GRID_IMAGES))), path)
    except Exception as error:
        if not is_system_error(error):
            raise
        monitor.warn(f"{path} cannot be written ({reason(error)}); training goes on")
        return
    monitor.drew_grid(step, path)
