"""What ends a run before its time: in words to act on, and without waiting for what is lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ict_fast.config import Config
from ict_fast.data.loaders import Loader
from ict_fast.errors import DivergedError, TrainingError, is_out_of_memory
from ict_fast.training.monitor import reason
from ict_fast.training.step import TrainStep
from ict_fast.training.world import World


@contextmanager
def explained() -> Iterator[None]:
    """Inside, memory that is exhausted and files that fail end the training, and are no fault of the input.

    Raises:
        TrainingError: in place of those errors.
    """
    try:
        yield
    except BrokenPipeError:  # nobody reads the output any more
        raise
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise TrainingError(
            f"{where}{reason(error)}; the same command resumes from the last checkpoint"
        ) from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(
            f"out of memory: {reason(error)}; a smaller --training.micro-batch needs less"
        ) from error


@contextmanager
def closing(loader: Loader, world: World) -> Iterator[None]:
    """Closes the loader at the end; in a world of several not after an error.

    To close it is to wait for the device, which may wait for a process that is lost.
    """
    try:
        yield
    except BaseException:
        if world.size == 1:
            loader.close()
        raise
    loader.close()


def what_may_help(config: Config) -> str:
    """Against a training that diverges, as adaptive norms are reported to make it."""
    norms = " or --network.no-adaptive-norm" if config.network.adaptive_norm else ""
    return f"a smaller --optimizer.lr{norms}, in a new --out, may help"


def require_progress(train_step: TrainStep, step: int, config: Config) -> None:
    """Gives up after too many steps in a row without a finite gradient; begins a new window of the loss.

    Raises:
        DivergedError: see above. The weights are still those of the last good step.
    """
    in_a_row = int(train_step.skipped_in_a_row)
    train_step.reset_losses()
    if in_a_row >= config.training.max_skipped_steps:
        raise DivergedError(
            f"{in_a_row} steps in a row up to step {step:,} had no finite gradient, and changed no weight;"
            f" {what_may_help(config)}"
        )
