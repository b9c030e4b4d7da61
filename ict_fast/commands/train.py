"""`ict-fast train`."""

from __future__ import annotations

import dataclasses
import json
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
    from_dict,
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
    init: Annotated[Path | None, arg(metavar="RUN|CHECKPOINT", help_behavior_hint="")] = None
    """Begin a new run with the averaged weights of another, or of an imported model, instead of at random.
    The defaults of --network.* are then its network's, but for dropout."""
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


def default_options(preset_name: str, out: str | None, init: str | None) -> TrainOptions:
    """The options of `train` before any is given: the preset's, the network's those of what it begins with.

    Args:
        preset_name: `--preset`.
        out: `--out`, if it is given: a run that began with `--init` keeps its network's options.
        init: `--init`, if it is given.
    Raises:
        InputError: if there is no such preset, or `init` names no checkpoint and there is no run to resume.
    """
    preset = presets.get(preset_name)
    sections = {section: getattr(preset, section) for section in SECTIONS}
    folder = Path("runs") / preset.preset if out is None else Path(out)
    if init is not None or (folder / "init.json").exists():
        there = _network_of_run(folder)
        if there is not None:
            sections["network"] = there
        elif init is not None:
            theirs, mine = network_of(Path(init)), preset.network
            sections["network"] = dataclasses.replace(
                theirs, dropout=mine.dropout, dropout_max_resolution=mine.dropout_max_resolution
            )
    return TrainOptions(preset=preset.preset, **sections)


def network_of(path: Path) -> NetworkConfig:
    """The network of a run or checkpoint, from its newest state that can be read; nothing is verified yet.

    Raises:
        InputError: if there is none.
    """
    if (path / "state.json").exists():
        return _stored_config(path / "state.json", ("config",)).network
    if (newest := _newest_network(path)) is not None:
        return newest
    for name, source in (("config.json", "safetensors"), ("model_index.json", "diffusers")):
        if (path / name).exists() and not (path / "checkpoints").exists():
            raise InputError(
                f"--init {path}: looks like a model exported as {source};"
                f" `ict-fast import {source} {path} --out DIR` first, then --init DIR"
            )
    raise InputError(f"--init {path}: there is no run, checkpoint or imported model")


def _network_of_run(folder: Path) -> NetworkConfig | None:
    """That of a run that began with weights, or of its checkpoints; None if there is nothing to resume."""
    if (folder / "config.json").exists() and (folder / "init.json").exists():
        return _stored_config(folder / "config.json", ()).network
    return _newest_network(folder)


def _newest_network(run: Path) -> NetworkConfig | None:
    for file in sorted(run.glob("checkpoints/step-*/state.json"), reverse=True):
        try:
            return _stored_config(file, ("config",)).network
        except InputError:
            continue
    return None


def _stored_config(file: Path, keys: tuple[str, ...]) -> Config:
    try:
        values = json.loads(file.read_bytes())
        for key in keys:
            values = values[key]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{file}: holds no configuration that can be read") from None
    return from_dict(values, str(file))


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
        name: getattr(options, name) for name in ("device", "gpus", "processes", "resume", "extend", "init")
    }
    if options.dry_run:
        from ict_fast.training.dry_run import dry_run

        print(dry_run(config, out=out, **arguments))
        return errors.EXIT_DONE

    from ict_fast.screen import say
    from ict_fast.training.trainer import train

    arguments |= {name: getattr(options, name) for name in ("max_restarts", "collective_timeout")}
    try:
        result = train(config, out=out, **arguments)
    except TrainingError as error:
        raise type(error)(f"{error} (log: {out / 'log.jsonl'})") from error
    if result.message and result.exit_code:
        say(result.message)  # to a terminal that may be gone
    elif result.message:
        print(result.message)
    return result.exit_code
