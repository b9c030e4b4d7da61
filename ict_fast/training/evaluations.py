"""Measures a run's averaged weights while it goes on, and knows which checkpoint is the best so far."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ict_fast.checkpoint import pointed_name
from ict_fast.config import Config
from ict_fast.consistency.model import ConsistencyModel
from ict_fast.errors import InputError
from ict_fast.screen import duration
from ict_fast.training.launch import StopRequest
from ict_fast.training.monitor import Monitor, reason
from ict_fast.training.run_directory import EVALUATIONS, Run

METRIC = "frechet_distance"
"""Of the first number of steps in --logging.evaluate-steps; the lowest is the best."""


def require_measurable(config: Config) -> None:
    """Raises InputError if no measurement of such a run can succeed."""
    logging, network = config.logging, config.network
    if not logging.evaluate_every:
        return
    for option, name in (
        ("evaluate-reference", logging.evaluate_reference),
        ("evaluate-features", logging.evaluate_features),
    ):
        if name is not None and not Path(name).exists():
            raise InputError(f"--logging.{option} is {name}, which is not there")
    if logging.evaluate_features is None and (network.resolution, network.image_channels) != (8, 1):
        raise InputError(
            "--logging.evaluate-every needs --logging.evaluate-features FILE (inception-2015-12-05.pt):"
            " without it there are features for scikit-learn's digits only"
        )


class Evaluations:
    """The lines of evaluations.jsonl: {"step": k, "one_step": {...}, ...}, as evaluation.json has them.

    Nothing that a measurement does reaches the training, and nothing that goes wrong in it ends a run: the
    data may have moved, the memory or the disk be full. The next one is tried all the same.
    """

    def __init__(self, run: Run, monitor: Monitor, stop: StopRequest, get_on: Callable[[], None]) -> None:
        """`get_on` is called while a measurement gets on."""
        self._run, self._monitor, self._stop, self._get_on = run, monitor, stop, get_on
        self._path = run.out / EVALUATIONS
        self._values: dict[int, float] = {}
        with suppress(OSError, ValueError, KeyError):
            for line in self._path.read_text(encoding="utf-8").splitlines():
                values = json.loads(line)
                self._values[values["step"]] = _first_value(values)

    def is_due(self, step: int) -> bool:
        """Whether the averages are to be measured after so many steps."""
        every, last = self._run.config.logging.evaluate_every, self._run.config.training.total_steps
        return bool(every) and step > 0 and (step % every == 0 or step == last)

    def measure(self, step: int, model: Callable[[], ConsistencyModel]) -> tuple[bool, int | None]:
        """Measures and writes down, unless that is done already.

        Args:
            step: steps done.
            model: gives the model to measure.
        Returns:
            Whether the step is the best so far, and the exit code if the run was asked to stop meanwhile: a
            measurement is then abandoned, as it can be made when the run goes on.
        """
        return step not in self._values and self._measure(step, model), self._stop.exit_code

    def _measure(self, step: int, model: Callable[[], ConsistencyModel]) -> bool:
        started = time.monotonic()
        try:
            result = self._evaluate(model())
            value = _first_value(result)
            seconds = time.monotonic() - started
            line = json.dumps({"step": step, **result, "seconds": round(seconds, 1)}, allow_nan=False)
        except _Stopped:
            return False
        except Exception as error:  # whatever it is, a run of days does not end for it
            self._monitor.warn(f"step {step:,} could not be measured ({reason(error)}); training goes on")
            return False
        finally:
            self._monitor.note("")
        best = self.best_step()
        self._values[step] = value
        steps = self._run.config.logging.evaluate_steps[0]
        found = f"step {step:,}: Fréchet distance {value:.4g} in {steps} step{'s' if steps > 1 else ''}"
        if is_best := best is None or value < self._values[best]:
            found += ", the best so far"
        else:
            found += f", best {self._values[best]:.4g} at step {best:,}"
        self._monitor.measured(step, result, found, f"measured in {duration(seconds)}")
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            self._monitor.warn(f"{self._path} cannot be written ({reason(error)}); training goes on")
        return is_best

    def best_step(self) -> int | None:
        """Step of the checkpoint that is kept as the best one, if its measurement is known."""
        with suppress(InputError):
            step = int(pointed_name(self._run.out / "checkpoints" / "best").removeprefix("step-"))
            return step if step in self._values else None
        return None

    def _evaluate(self, model: ConsistencyModel) -> dict[str, Any]:
        from ict_fast.evaluation import evaluate  # a second of imports, for runs that measure

        logging = self._run.config.logging

        def progress(done: float, doing: str) -> None:
            if self._stop.exit_code is not None:
                raise _Stopped
            self._get_on()
            self._monitor.note(f"{doing} ({done:.0%})")

        return evaluate(
            model,
            Path(logging.evaluate_reference or self._run.config.data.path),
            steps=logging.evaluate_steps,
            count=logging.evaluate_count,
            features=None if logging.evaluate_features is None else Path(logging.evaluate_features),
            progress=progress,
        )


class _Stopped(Exception):
    """The run is to be saved and stopped."""


def _first_value(result: dict[str, Any]) -> float:
    """METRIC of the first number of steps that was measured."""
    return float(next(result[key] for key in result if key.endswith("_step"))[METRIC])
