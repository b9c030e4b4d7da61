"""`ict-fast train`."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
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
    from_dict,
    validate,
    with_science_of,
)
from ict_fast.errors import InputError, TrainingError

DEFAULT_PRESET = "digits"
SECTIONS = ("data", "network", "method", "optimizer", "training", "logging")


@dataclass(frozen=True)
class TrainOptions:
    """Train a model. The same command again resumes, and so does --out alone; a finished run says so."""

    preset: Annotated[str, arg(metavar=f"{{{','.join(presets.names())}}}")] = DEFAULT_PRESET
    """The recipe that every other default comes from.
    Where a run is resumed its own options are the defaults, its preset included."""
    data_path: Annotated[
        Path | None, arg(name="data", metavar="DIR", help_behavior_hint="(short for --data.path)")
    ] = None
    """Folder of a prepared store."""
    out: Annotated[Path, arg(metavar="DIR", help_behavior_hint="(default: runs/<preset>)")] = Path(
        f"runs/{DEFAULT_PRESET}"
    )
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
    like: Annotated[Path | None, arg(metavar="RUN", help_behavior_hint="")] = None
    """Take the defaults of a new run, in another --out, from the options of this one instead of a preset."""
    extend: Annotated[int | None, arg(metavar="STEPS", help_behavior_hint="")] = None
    """Go on with an existing run to a new number of total steps.
    The curriculum is laid over these anew, and printed; the number of noise levels may fall at first."""
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
        # --data is then the default of --data.path.
        if self.data_path is not None and self.data.path != str(self.data_path):
            raise InputError(
                f"--data is {self.data_path} and --data.path is {self.data.path}; give one of them"
            )
        config = Config(self.preset, **{section: getattr(self, section) for section in SECTIONS})
        validate(config)
        return config


def default_options(
    preset: str | None, *, out: str | None, data: str | None, init: str | None, like: str | None = None
) -> TrainOptions:
    """The options of `train` before any is given: those of the run that is to be resumed, else the preset's.

    Args:
        preset, out, data, init, like: the options of these names, where they are given. A run that begins
            with `init` has the network of that, but for dropout; one that is to be `like` another has that
            one's options instead of the preset's. A run that is there keeps its own for how it executes, and
            its number of steps; what else differs is refused when it is opened.
    Raises:
        InputError: if there is no such preset, or it is not the run's, or there is no run to resume and no
            checkpoint at `init`, or none to be `like`.
    """
    base = presets.get(preset or DEFAULT_PRESET) if like is None else _config_of(Path(like), out, preset)
    folder = Path(out or f"runs/{base.preset}")
    config = _resumed_config(folder, init)
    if config is None:
        config = base if init is None else _with_network(base, network_of(Path(init)))
    elif preset not in (None, config.preset):
        raise InputError(
            f"--preset is {preset}, but the run in {folder} has the preset {config.preset}; without --preset"
            " it goes on, another --out starts a new run"
        )
    elif like is not None:
        asked = base if init is None else _with_network(base, config.network)
        training = dataclasses.replace(asked.training, total_steps=config.training.total_steps)
        config = with_science_of(config, dataclasses.replace(asked, training=training))
    if data is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(Path(data))))
    sections = {section: getattr(config, section) for section in SECTIONS}
    return TrainOptions(preset=config.preset, out=folder, **sections)


def _config_of(run: Path, out: str | None, preset: str | None) -> Config:
    """That of the run that a new one, in `out`, is to be like."""
    config = stored_config(run, imported=False)
    if config is None:
        raise InputError(f"--like {run}: there is no run, or it cannot be read")
    if out is None:
        raise InputError(f"--like {run}: --out must name the folder of the new run")
    if run.resolve() == Path(out).resolve():
        raise InputError(
            f"--like {run}: --out names the same run, which goes on without --like; a new one needs another"
        )
    if preset not in (None, config.preset):
        raise InputError(f"--preset is {preset}, and --like {run} a run of {config.preset}; give one of them")
    return config


def _with_network(config: Config, network: NetworkConfig) -> Config:
    """`config` with another network, but for dropout."""
    mine = config.network
    network = dataclasses.replace(
        network, dropout=mine.dropout, dropout_max_resolution=mine.dropout_max_resolution
    )
    return dataclasses.replace(config, network=network)


def network_of(path: Path) -> NetworkConfig:
    """The network of a run, a checkpoint or an imported model; nothing is verified yet.

    Raises:
        InputError: if there is none.
    """
    if (config := stored_config(path)) is not None:
        return config.network
    for name, source in (("config.json", "safetensors"), ("model_index.json", "diffusers")):
        if (path / name).exists() and not (path / "checkpoints").exists():
            raise InputError(
                f"--init {path}: looks like a model exported as {source};"
                f" `ict-fast import {source} {path} --out DIR` first, then --init DIR"
            )
    raise InputError(f"--init {path}: there is no run, checkpoint or imported model")


def _resumed_config(out: Path, init: str | None) -> Config | None:
    """The configuration of the run in a folder, which may have no checkpoint yet; None if there is no run.

    And none of one that began at random where `init` is given: its network differs, and the run says so.
    """
    begun = (out / "config.json").exists() and (init is None or (out / "init.json").exists())
    if begun or any(out.glob("checkpoints/step-*")):
        return stored_config(out, imported=False)
    return None


def stored_config(folder: Path, *, imported: bool = True) -> Config | None:
    """That of a run or a checkpoint, or of an imported model if that will do; None if none can be read."""
    newest_first = sorted(folder.glob("checkpoints/step-*/state.json"), reverse=True)
    for file in (folder / "config.json", folder / "state.json", *newest_first):
        try:
            values = json.loads(file.read_bytes())
            if file.name == "state.json":
                if "imported" in values and not imported:
                    return None
                values = values["config"]
            return from_dict(values, str(file))
        except (OSError, ValueError, KeyError, TypeError, InputError):
            continue
    return None


def run(options: TrainOptions) -> int:
    """Runs the command; returns its exit code."""
    config = options.config()
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
    arguments: dict[str, Any] = {
        name: getattr(options, name)
        for name in ("out", "device", "gpus", "processes", "resume", "extend", "init")
    }
    if options.dry_run:
        from ict_fast.training.dry_run import dry_run

        print(dry_run(config, **arguments))
        try:
            _require_place(options.out)
        except InputError as error:  # a run may be planned elsewhere
            print(f"out: not here: {error}")
        return errors.EXIT_DONE

    _require_place(options.out)
    from ict_fast.screen import say
    from ict_fast.training.trainer import train

    arguments |= {name: getattr(options, name) for name in ("max_restarts", "collective_timeout")}
    try:
        result = train(config, **arguments)
    except TrainingError as error:
        raise type(error)(f"{error} (log: {options.out / 'log.jsonl'})") from error
    if result.message and result.exit_code:
        say(result.message)  # to a terminal that may be gone
    elif result.message:
        _print_result(result.message, options.out, config)
    return result.exit_code


def _require_place(out: Path) -> None:
    if not any(out.glob("checkpoints/step-*")):  # a finished run is never written to
        results.require_weights_place(out, "--out")


def _print_result(message: str, out: Path, config: Config) -> None:
    """On standard output; a full disk there does not undo what is done."""
    from ict_fast.checkpoint import newest_state
    from ict_fast.evaluate_command import evaluate_command

    sample, report = (shlex.join(["ict-fast", word, str(out)]) for word in ("sample", "report"))
    try:
        print(message)
        print(f"then: {sample}, {evaluate_command(out, config, newest_state(out))}, {report}", flush=True)
    except BrokenPipeError:
        raise
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
