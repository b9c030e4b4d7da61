"""Measures a run's averaged weights while it goes on, and knows which checkpoint is the best so far."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ict_fast.checkpoint import pointed_name
from ict_fast.config import Config
from ict_fast.consistency.model import ConsistencyModel
from ict_fast.errors import InputError
from ict_fast.screen import duration
from ict_fast.training.launch import StopRequest
from ict_fast.training.monitor import Monitor, reason
from ict_fast.training.run_directory import EVALUATIONS, REFERENCES, Run

METRIC = "frechet_distance"
"""Of the first number of steps in --logging.evaluate-steps; the lowest is the best."""


def require_features(config: Config) -> None:
    """Raises InputError if the run is to be measured, and names no features that know its images."""
    logging, network = config.logging, config.network
    digits = (network.resolution, network.image_channels) == (8, 1)
    if logging.evaluate_every and logging.evaluate_features is None and not digits:
        raise InputError(
            "--logging.evaluate-every needs --logging.evaluate-features FILE (inception-2015-12-05.pt):"
            " without it there are features for scikit-learn's digits only"
        )


def require_measurable(config: Config) -> None:
    """Raises InputError if the run is to be measured with nothing, or with files that are not there."""
    logging = config.logging
    if not logging.evaluate_every:
        return
    for option, name in (
        ("evaluate-reference", logging.evaluate_reference),
        ("evaluate-features", logging.evaluate_features),
    ):
        if name is not None and not Path(name).exists():
            raise InputError(f"--logging.{option} is {name}, which is not there")
    require_features(config)


def require_measurement(config: Config) -> None:
    """Opens what the run will be measured with, as every measurement does; the run's data are there.

    Raises:
        InputError: see `require_measurable`; or a reference or features that cannot work, or do not fit the
            run or each other.
    """
    require_measurable(config)
    if not config.logging.evaluate_every:
        return
    from ict_fast.evaluation.feature_networks import choose_network
    from ict_fast.evaluation.reference import check_reference, open_reference

    path, features = _reference(config), _features(config)
    try:
        reference = open_reference(path)
        check_reference(reference, config, allow_other_recipe=False)
        choose_network(reference, config.network.resolution, features, None)
    except InputError as error:
        raise InputError(
            f"--logging.evaluate-every: no measurement with --logging.evaluate-reference {path} and"
            f" --logging.evaluate-features {features or 'none'} could succeed: {error}"
        ) from error


def is_measured(run: Run) -> bool:
    """Whether a finished run has its last measurement, its own or by `ict-fast evaluate`; or none is due."""
    if not run.config.logging.evaluate_every or run.step in _written(run.out / EVALUATIONS):
        return True
    with suppress(OSError, ValueError, AttributeError):
        later = json.loads((run.out / "checkpoints/evaluation.json").read_text(encoding="utf-8"))
        return later.get("step") == run.step
    return False


def describe_missing(run: Run) -> str:
    """What is said after the number of steps of a run whose last measurement is not there."""
    return f"; their last measurement is missing: `{evaluate_command(run.out, run.config)}` makes it"


def evaluate_command(out: Path, config: Config) -> str:
    """The command that measures the run's newest checkpoint as the run does."""
    logging = config.logging
    words = ["ict-fast", "evaluate", str(out)]
    words += [] if logging.evaluate_reference is None else ["--reference", logging.evaluate_reference]
    words += [] if logging.evaluate_features is None else ["--features", logging.evaluate_features]
    words += ["--steps", ",".join(map(str, logging.evaluate_steps)), "--count", str(logging.evaluate_count)]
    return shlex.join(words)


def _reference(config: Config) -> Path:
    return Path(config.logging.evaluate_reference or config.data.path)


def _features(config: Config) -> Path | None:
    name = config.logging.evaluate_features
    return None if name is None else Path(name)


class _Measured(NamedTuple):
    """A measurement that is written down."""

    value: float
    """METRIC of the first number of steps."""
    kind: tuple[Any, ...]
    """What it was measured with; values compare with those of an equal one only."""


class Evaluations:
    """The lines of evaluations.jsonl: {"step": k, "one_step": {...}, ...}, as evaluation.json has them.

    Nothing that a measurement does reaches the training, and nothing that goes wrong in it ends a run: the
    data may have moved, the memory or the disk be full. The next one is tried all the same.
    """

    def __init__(self, run: Run, monitor: Monitor, stop: StopRequest, get_on: Callable[[], None]) -> None:
        """`get_on` is called while a measurement gets on."""
        self._run, self._monitor, self._stop, self._get_on = run, monitor, stop, get_on
        self._path = run.out / EVALUATIONS
        self._write_failed = False
        self._done = _written(self._path)

    def is_due(self, step: int) -> bool:
        """Whether the averages are to be measured after so many steps."""
        every, last = self._run.config.logging.evaluate_every, self._run.config.training.total_steps
        return bool(every) and step > 0 and (step % every == 0 or step == last)

    def is_missing(self, step: int) -> bool:
        """Whether the averages were to be measured after so many steps, and are not."""
        return self.is_due(step) and step not in self._done

    def measure(self, step: int, model: Callable[[], ConsistencyModel]) -> tuple[bool, int | None]:
        """Measures and writes down, unless that is done already.

        Args:
            step: steps done.
            model: gives the model to measure.
        Returns:
            Whether the step is the best so far, and the exit code if the run was asked to stop meanwhile: a
            measurement is then abandoned, as it can be made when the run goes on.
        """
        return step not in self._done and self._measure(step, model), self._stop.exit_code

    def _measure(self, step: int, model: Callable[[], ConsistencyModel]) -> bool:
        started = time.monotonic()
        try:
            result = self._evaluate(model())
            measured = _measured(result)
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
        self._done[step] = measured
        steps = self._run.config.logging.evaluate_steps[0]
        found = f"step {step:,}: Fréchet distance {measured.value:.4g} in {steps} step"
        found += "s" if steps > 1 else ""
        before = None if best is None else self._done[best]
        if before is not None and before.kind != measured.kind:
            found += f", the first of its kind: that of step {best:,}, the best before, does not compare"
            before = None  # the best starts anew
        elif before is None or measured.value < before.value:
            found += ", the best so far"
        else:
            found += f", best {before.value:.4g} at step {best:,}"
        is_best = before is None or measured.value < before.value
        self._monitor.measured(step, result, found, f"measured in {duration(seconds)}")
        try:
            with self._path.open("a", encoding="utf-8") as file:
                # A line that a full disk cut short must not swallow this one.
                file.write(("\n" if self._write_failed else "") + line + "\n")
            self._write_failed = False
        except OSError as error:
            self._write_failed = True
            self._monitor.warn(f"{self._path} cannot be written ({reason(error)}); training goes on")
        return is_best

    def best_step(self) -> int | None:
        """Step of the checkpoint that is kept as the best one, if its measurement is known."""
        with suppress(InputError):
            step = int(pointed_name(self._run.out / "checkpoints" / "best").removeprefix("step-"))
            return step if step in self._done else None
        return None

    def _evaluate(self, model: ConsistencyModel) -> dict[str, Any]:
        from ict_fast.evaluation import evaluate  # a second of imports, for runs that measure

        config = self._run.config

        def progress(done: float, doing: str) -> None:
            if self._stop.exit_code is not None:
                raise _Stopped
            self._get_on()
            self._monitor.note(f"{doing} ({done:.0%})")

        return evaluate(
            model,
            _reference(config),
            steps=config.logging.evaluate_steps,
            count=config.logging.evaluate_count,
            features=_features(config),
            progress=progress,
            reference_cache=self._run.out / REFERENCES,
        )


class _Stopped(Exception):
    """The run is to be saved and stopped."""


def _written(path: Path) -> dict[int, _Measured]:
    """The measurements of evaluations.jsonl by their steps; of a broken file those before its fault."""
    found: dict[int, _Measured] = {}
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        for line in path.read_text(encoding="utf-8").splitlines():
            values = json.loads(line)
            found[values["step"]] = _measured(values)
    return found


def _measured(result: dict[str, Any]) -> _Measured:
    """
    Raises:
        KeyError, TypeError, ValueError: of what is no measurement.
    """
    first = [key for key in result if key.endswith("_step")][:1]
    if not first:
        raise KeyError("a number of steps")
    values, features = result[first[0]], result.get("features", {}).get("sha256")
    levels = tuple(values.get("sigmas", ())[1:])  # of an old line not known, and one step has none
    kind = (first[0], levels, result.get("count"), features, result.get("reference_fingerprint"))
    return _Measured(float(values[METRIC]), kind)
