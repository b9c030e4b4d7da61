"""Where a run's figures go besides log.jsonl: TensorBoard's files, or Weights & Biases."""

from __future__ import annotations

import importlib.util
import json
import os
import threading
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ict_fast.config import Config, to_dict
from ict_fast.errors import InputError
from ict_fast.training.loss_by_sigma import sigma_edges
from ict_fast.training.run_directory import Run

TENSORBOARD = "tensorboard"
_WANDB_ID = "wandb-id"
# A trunk's arithmetic as a curve: its number of significant bits.
_SIGNIFICANT_BITS = {"fp32": 24, "tf32": 11, "fp16": 11, "bf16": 8}


class Tracker(Protocol):
    """What the monitor hands its figures to. Any method may fail; the monitor then goes on without it."""

    def figures(self, step: int, values: dict[str, float]) -> None:
        """Figures by tag."""

    def picture(self, step: int, path: Path) -> None:
        """A grid of samples, a PNG."""

    def close(self) -> None:
        """Writes what is still to be written."""


def chosen_tracker(config: Config) -> str | None:
    """The tracker that --logging.tracker means on this machine: "tensorboard", "wandb" or None.

    Raises:
        InputError: if one that was asked for is not installed.
    """
    asked = config.logging.tracker
    if asked == "none":
        return None
    if asked == "auto":
        return "tensorboard" if _is_installed("tensorboard") else None
    if not _is_installed(asked):
        raise InputError(
            f"--logging.tracker is {asked}, which is not installed; `pip install {asked}` adds it, and"
            " --logging.tracker none does without"
        )
    return asked


def open_tracker(run: Run, warn: Callable[[str], None]) -> Tracker | None:
    """The run's tracker, going on from the run's step.

    Args:
        warn: told why there is none although --logging.tracker auto has found one.
    Raises:
        InputError: if one that was asked for by name cannot be started.
    """
    chosen = chosen_tracker(run.config)
    if chosen is None:
        return None
    try:
        return TensorBoard(run) if chosen == "tensorboard" else WeightsAndBiases(run)
    except InputError:
        raise
    except Exception as error:  # a package that is half installed may raise anything
        why = " ".join(str(error).split()) or type(error).__name__
        if run.config.logging.tracker == "auto":
            warn(f"TensorBoard cannot be started ({why}); the run goes on without it")
            return None
        raise InputError(
            f"--logging.tracker {chosen} cannot be started ({why}); --logging.tracker none does without"
        ) from error


def tagged(values: dict[str, Any], config: Config) -> dict[str, float]:
    """A log line's values as curves: numbers by tag; what is absent or None has no point."""
    tags: dict[str, float] = {}
    edges = sigma_edges(config.method)
    for name, value in values.items():
        if name == "loss_by_sigma":
            for number, mean in enumerate(value):
                if mean is not None:
                    tags[f"loss_by_sigma/{number:02d}_{edges[number]:.3g}-{edges[number + 1]:.3g}"] = mean
        elif name == "precision":
            tags["precision/significant_bits"] = _SIGNIFICANT_BITS[value]
        elif isinstance(value, int | float) and name not in ("step", "time"):
            tags[name] = value
    return tags


def tagged_evaluation(result: dict[str, Any]) -> dict[str, float]:
    """The numbers that a measurement has for each number of sampling steps, by tag."""
    return {
        f"evaluation/{steps}/{name}": value
        for steps, measures in result.items()
        if steps.endswith("_step")
        for name, value in measures.items()
        if isinstance(value, int | float)
    }


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


class TensorBoard:
    """Event files in <run>/tensorboard. After a cut, what lies past the run's step is not shown any more."""

    def __init__(self, run: Run) -> None:
        from torch.utils.tensorboard import SummaryWriter

        _hear_its_thread_once()
        # What follows replaces all from this step on: TensorBoard purges what it has read of it.
        self._writer = SummaryWriter(str(run.out / TENSORBOARD), purge_step=run.step + 1)
        if run.step == 0:
            self._writer.add_text("config", f"```json\n{json.dumps(to_dict(run.config), indent=2)}\n```")

    def figures(self, step: int, values: dict[str, float]) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def picture(self, step: int, path: Path) -> None:
        with Image.open(path) as image:
            self._writer.add_image("grid", np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


def _hear_its_thread_once() -> None:
    """What ends TensorBoard's writing thread, such as a full disk, is raised by the next call to it as well:
    to be said in a line, and not in a traceback of the thread besides."""
    if getattr(threading.excepthook, "func", None) is not _unless_tensorboards:
        threading.excepthook = partial(_unless_tensorboards, threading.excepthook)


def _unless_tensorboards(tell: Callable[[Any], object], failure: threading.ExceptHookArgs) -> None:
    if not type(failure.thread).__module__.startswith("tensorboard."):
        tell(failure)


class WeightsAndBiases:
    """A run of Weights & Biases, in <run>/wandb, whose curves are drawn over our own step.

    Its own counter never goes back, so that it would drop steps that are done again after a cut. Where the
    run belongs, and whether a network is used, is for wandb's variables: WANDB_PROJECT, WANDB_MODE, ...
    """

    def __init__(self, run: Run) -> None:
        import wandb

        self._wandb = wandb
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "ict-fast"),
                dir=str(run.out),
                id=_wandb_id(run.out),
                name=os.environ.get("WANDB_NAME", run.out.name),
                resume="allow",
                config=to_dict(run.config),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except (wandb.Error, OSError) as error:
            raise InputError(
                f"Weights & Biases cannot be started ({' '.join(str(error).split())}); `wandb login`, or"
                " WANDB_MODE=offline for a run without a network"
            ) from error
        self._run.define_metric("*", step_metric="step")

    def figures(self, step: int, values: dict[str, float]) -> None:
        self._run.log({"step": step, **values})

    def picture(self, step: int, path: Path) -> None:
        self._run.log({"step": step, "grid": self._wandb.Image(str(path))})

    def close(self) -> None:
        self._run.finish()


def _wandb_id(out: Path) -> str:
    """The run's name for wandb, the same whenever it is resumed."""
    path = out / _WANDB_ID
    if not path.exists():
        path.write_text(f"{uuid.uuid4().hex[:12]}\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
