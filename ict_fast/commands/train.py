"""`ict-fast train`."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg

from ict_fast import errors, presets, results
from ict_fast.commands.arguments import Device, at_least
from ict_fast.config import (
    Config,
    DataConfig,
    LoggingConfig,
    MethodConfig,
    NetworkConfig,
    OptimizerConfig,
    TrainingConfig,
    validate,
)
from ict_fast.errors import InputError, TrainingError

DEFAULT_PRESET = "digits"
SECTIONS = ("data", "network", "method", "optimizer", "training", "logging")


@dataclass(frozen=True)
class TrainOptions:
    """Train a model. The same command again resumes; a finished run says so."""

    preset: Annotated[str, arg(metavar=f"{{{','.join(presets.names())}}}")] = DEFAULT_PRESET
    """The recipe that every other default comes from."""
    data_path: Annotated[
        Path | None, arg(name="data", metavar="DIR", help_behavior_hint="(short for --data.path)")
    ] = None
    """Folder of a prepared store."""
    out: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: runs/<preset>)")] = None
    """Folder of the run."""
    gpus: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: all, or the CPU)")] = None
    """Number of GPUs on this machine, a process for each."""
    processes: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 1)")] = None
    """Number of processes that share the CPU (--device cpu)."""
    device: Device = "auto"
    """auto: the GPUs if the machine has any."""
    dry_run: bool = False
    """Print the resolved configuration, the parameter count and the plan of stages, and stop."""
    resume: Literal["auto", "never", "must"] = "auto"
    """Whether to go on with a run that exists. never refuses one, must refuses its absence."""
    extend: Annotated[int | None, arg(metavar="STEPS", help_behavior_hint="")] = None
    """Go on with an existing run to a new number of total steps; prints the new curriculum."""
    max_restarts: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 3)")] = None
    """How often in a row lost processes are started again without getting any further."""
    collective_timeout: Annotated[float, arg(metavar="SECONDS")] = 600.0
    """How long a process waits for another one before the run ends and says which."""
    data: DataConfig = field(default_factory=DataConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def config(self) -> Config:
        """The configuration of the run.

        Raises:
            InputError: if it is not valid.
        """
        config = Config(self.preset, **{section: getattr(self, section) for section in SECTIONS})
        if self.data_path is not None:
            preset_path, path = presets.get(self.preset).data.path, str(self.data_path)
            if config.data.path not in (preset_path, path):
                raise InputError(f"--data is {path} and --data.path is {config.data.path}; give one of them")
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=path))
        validate(config)
        return config


def run(options: TrainOptions) -> int:
    """Runs the command; returns its exit code."""
    config = options.config()
    out = options.out if options.out is not None else Path("runs") / config.preset
    for name, number in (
        ("gpus", options.gpus),
        ("processes", options.processes),
        ("extend", options.extend),
    ):
        if number is not None:
            at_least(1, name, number)
    if options.max_restarts is not None:
        at_least(0, "max-restarts", options.max_restarts)
    if not 1 <= options.collective_timeout <= 1e6:
        raise InputError(
            f"--collective-timeout is {options.collective_timeout:g}; it must be 1 to 1,000,000 seconds"
        )
    results.require_place(out, "--out")
    arguments: dict[str, Any] = {
        name: getattr(options, name) for name in ("device", "gpus", "processes", "resume", "extend")
    }
    if options.dry_run:
        from ict_fast.training.trainer import plan

        print(plan(config, out=out, **arguments))
        return errors.EXIT_DONE

    from ict_fast.training.trainer import train

    arguments |= {name: getattr(options, name) for name in ("max_restarts", "collective_timeout")}
    try:
        result = train(config, out=out, **arguments)
    except TrainingError as error:
        raise TrainingError(f"{error} (log: {out / 'log.jsonl'})") from error
    if result.message:
        print(result.message, file=sys.stderr if result.exit_code else sys.stdout)
    return result.exit_code
