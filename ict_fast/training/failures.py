"""What ends a run before its time: in words to act on, and without waiting for what is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ict_fast.config import Config
from ict_fast.data.loaders import Loader
from ict_fast.errors import DivergedError, TrainingError, is_out_of_memory
from ict_fast.training.monitor import reason
from ict_fast.training.step import TrainStep
from ict_fast.training.world import World

_FEWEST_STEPS = 100  # fp16 begins with a few that are skipped, until its loss scale is found


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


class SkippedSteps:
    """What steps without a finite gradient say of a run; looked at with each line of its log."""

    def __init__(self, train_step: TrainStep, config: Config, warn: Callable[[str], None], step: int) -> None:
        self._train_step, self._config, self._warn = train_step, config, warn
        self._since = step, int(train_step.optimizer.skipped)
        self._warned = False

    def look(self, step: int) -> None:
        """Warns once where half of the steps change nothing; begins a new window of the loss.

        Raises:
            DivergedError: after too many such steps in a row. The weights are those of the last good step.
        """
        in_a_row = int(self._train_step.skipped_in_a_row)
        self._train_step.reset_losses()
        if in_a_row >= self._config.training.max_skipped_steps:
            raise DivergedError(
                f"{in_a_row} steps in a row up to step {step:,} had no finite gradient, and changed no"
                f" weight; {what_may_help(self._config)}"
            )
        first, skipped = self._since
        if step - first < _FEWEST_STEPS or self._warned:
            return
        self._since = step, int(self._train_step.optimizer.skipped)
        if 2 * (self._since[1] - skipped) > step - first:
            self._warned = True
            self._warn(
                f"{self._since[1] - skipped:,} of the last {step - first:,} steps had no finite gradient, and"
                f" changed no weight; {what_may_help(self._config)}"
            )


def require_update(skipped: int, step: int, config: Config) -> None:
    """Raises DivergedError where none of a run's steps has changed a weight."""
    if skipped == step:
        raise DivergedError(
            f"none of the {step:,} steps had a finite gradient: the weights are those that it began with;"
            f" {what_may_help(config)}"
        )
