"""Everything that a run has left in its folder, read with patience: what is missing or damaged is said so."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ict_fast import presets
from ict_fast.checkpoint import checkpoint_steps, newest_state, pointed_name, refuse_export
from ict_fast.config import Config, from_dict, to_dict
from ict_fast.consistency.curriculum import Extension, Stage, read_extensions, stages_trained
from ict_fast.errors import InputError
from ict_fast.evaluate_command import evaluate_command
from ict_fast.screen import is_figure

_FIGURES = (
    "loss",
    "num_scales",
    "gradient_norm",
    "images_per_second",
    "mfu",
    "data_wait",
    "memory_gb",
    "loss_scale",
    "learning_rate",
    "skipped",
    "time",
)
"""What a log line has as one number."""


@dataclass(frozen=True)
class Field:
    """One field of the configuration."""

    section: str
    name: str
    value: Any
    preset_value: Any

    @property
    def is_changed(self) -> bool:
        """Whether it is not what the preset says."""
        return self.value != self.preset_value


@dataclass
class RunRecord:
    """A run's files as values. Lists are empty and values None where a file has nothing to say."""

    path: Path
    config: Config
    fields: list[Field]
    log: list[dict[str, Any]] = field(default_factory=list)
    """Lines of log.jsonl, by rising step."""
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    """Lines of evaluations.jsonl: measured while training."""
    evaluation: dict[str, Any] | None = None
    """evaluation.json: `ict-fast evaluate`."""
    grids: list[tuple[int, Path]] = field(default_factory=list)
    """Steps and pictures, by rising step."""
    state: dict[str, Any] = field(default_factory=dict)
    """state.json of the newest checkpoint: versions, fingerprint of the data."""
    initial: dict[str, Any] = field(default_factory=dict)
    """init.json: what the weights began with, if not at random; path, step, sha256."""
    extensions: list[Extension] = field(default_factory=list)
    """Each time that `train --extend` lengthened it."""
    best: str = ""
    """Name of the best checkpoint of those that were measured while training."""
    about: dict[str, Any] = field(default_factory=dict)
    """run.json: devices, borders of the noise-level buckets."""
    missing: list[str] = field(default_factory=list)
    """What is not there, in words."""

    @property
    def step(self) -> int:
        """Steps done, as far as the log, a measurement or a checkpoint tells."""
        lines = [*self.log[-1:], *self.evaluations[-1:]]
        return max([self.state.get("step", 0), *(line["step"] for line in lines)])

    @property
    def is_imported(self) -> bool:
        """Whether it is a model that was imported, and not trained here."""
        return "imported" in self.state

    @property
    def stages(self) -> list[Stage]:
        """The curriculum's, done and to come."""
        return stages_trained(self.config.training.total_steps, self.config.method, self.extensions)

    @property
    def drawn(self) -> tuple[int, list[Stage]]:
        """Where the axes of steps end, and the stages until there: with the run, or while less than a quarter
        of it is done, with that, which would be a line at the left edge."""
        total = self.config.training.total_steps
        end = total if self.step == 0 or 4 * self.step >= total else self.step
        begun = [stage for stage in self.stages if stage.first_step < end]
        return end, [stage._replace(end_step=min(stage.end_step, end)) for stage in begun]

    @property
    def measured(self) -> dict[str, Any] | None:
        """The newest measurement; of two of one step that of `ict-fast evaluate`."""
        last = self.evaluations[-1] if self.evaluations else None
        if last is None or self.evaluation is None:
            return self.evaluation or last
        step = self.evaluation.get("step")
        return self.evaluation if not isinstance(step, int) or step >= last["step"] else last

    @property
    def best_measured(self) -> dict[str, Any] | None:
        """The measurement of the best checkpoint."""
        names = {f"step-{line['step']:08d}": line for line in self.evaluations}
        return names.get(self.best)

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one figure of the log, where it has one."""
        found = [(line["step"], line[name]) for line in self.log if line.get(name) is not None]
        return [step for step, _ in found], [float(value) for _, value in found]

    def command(self) -> str:
        """The command that repeats the run."""
        preset = self.config.preset
        words = ["ict-fast", "train", *(["--preset", preset] if preset in presets.names() else [])]
        begun = self.initial.get("path")
        if begun is not None:
            words += ["--init", str(begun)]
        for each in self.fields:
            # With --init the defaults of the network are those of another one, not the preset's.
            if each.is_changed or (begun is not None and each.section == "network"):
                option = f"--{each.section}.{each.name}".replace("_", "-")
                words += _flag(option, each.value)
        processes = self.about.get("processes")
        if isinstance(processes, int):
            on_cpu = self.about.get("device") == "cpu"
            words += ["--device", "cpu"] if on_cpu else ["--gpus", str(processes)]
            words += ["--processes", str(processes)] if on_cpu and processes > 1 else []
        return shlex.join([*words, "--out", f"{self.path.resolve().name}-again"])


def read_run(path: Path) -> RunRecord:
    """Reads a run.

    Args:
        path: the run's folder.
    Raises:
        InputError: if there is no run. Anything else that is missing or damaged is listed in the record.
    """
    if not path.is_dir():
        raise InputError(f"{path}: is not a folder; name the folder of a run")
    if not checkpoint_steps(path):
        refuse_export(path)
    missing: list[str] = []
    state = newest_state(path)
    # What only a training leaves is not missing of an imported model.
    of_training: list[str] = [] if "imported" in state else missing
    if not _is_step(state.get("step", 0)):
        missing.append("the step of the newest checkpoint: its state.json is damaged")
        state["step"] = 0
    stored = _json(path / "config.json", of_training, "the configuration") or state.get("config")
    if not isinstance(stored, dict):
        raise InputError(f"{path}: holds no run (no config.json, no checkpoint); name the folder of a run")
    config = from_dict(stored, str(path / "config.json"))
    evaluation = path / "checkpoints" / "evaluation.json"
    record = RunRecord(
        path=path,
        config=config,
        fields=_fields(config, config if "imported" in state else _preset(config, missing)),
        log=_lines(path / "log.jsonl", of_training, "curves"),
        evaluations=_lines(path / "evaluations.jsonl", missing),
        evaluation=_json(evaluation, None, "metrics"),
        grids=_grids(path / "grids", of_training),
        state=state,
        initial=_json(path / "init.json", None, "what it began with") or _initial(state),
        extensions=_extensions(state, config, missing),
        best=_pointed(path / "checkpoints" / "best"),
        about=_json(path / "run.json", None, "the devices") or {},
        missing=missing,
    )
    if record.evaluation is None and not record.evaluations:
        missing.append(
            f"metrics: the run was not measured; `{evaluate_command(path, config, state)}` does it"
        )
    return record


def _initial(state: dict[str, Any]) -> dict[str, Any]:
    """What the newest checkpoint says that the run began with."""
    initial = state.get("init")
    return initial if isinstance(initial, dict) else {}


def _extensions(state: dict[str, Any], config: Config, missing: list[str]) -> list[Extension]:
    try:
        return read_extensions(state, Path("state.json"), config.training.total_steps)
    except InputError as error:
        missing.append(str(error))
        return []


def _pointed(file: Path) -> str:
    try:
        return pointed_name(file)
    except InputError:
        return ""


def _preset(config: Config, missing: list[str]) -> Config:
    try:
        return presets.get(config.preset)
    except InputError:
        preset = presets.DIGITS  # that of `train` alone
        missing.append(
            f"the preset {config.preset!r}: changed fields are shown against those of {preset.preset}"
        )
        return preset


def _fields(config: Config, preset: Config) -> list[Field]:
    ours, theirs = to_dict(config), to_dict(preset)
    return [
        Field(section, name, value, theirs[section][name])
        for section, values in ours.items()
        if isinstance(values, dict)
        for name, value in values.items()
    ]


def _flag(option: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        section, _, name = option.rpartition(".")
        return [option if value else f"{section}.no-{name}"]
    if isinstance(value, list):
        return [option, *map(str, value)]
    return [option, str(value)]


def _json(file: Path, missing: list[str] | None, what: str) -> dict[str, Any] | None:
    """The object in a JSON file, if it is there and holds one; why not is added to `missing`."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if missing is not None:
            missing.append(f"{what}: there is no {file.name}")
        return None
    except (OSError, ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        if missing is not None:
            missing.append(f"{what}: {file.name} cannot be read")
        return None
    return value


def _is_step(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_line(line: object) -> bool:
    """Whether all figures of a log line can be used; None is one that was not finite."""
    if not isinstance(line, dict) or not _is_step(line.get("step")):
        return False
    buckets = line.get("loss_by_sigma", [])
    if not isinstance(buckets, list):
        return False
    if not all(value is None or is_figure(value) for value in (*map(line.get, _FIGURES), *buckets)):
        return False
    return line.get("time") is None or 0 <= line["time"] < 1e11  # seconds; a year of four digits


def _lines(file: Path, missing: list[str], what: str = "") -> list[dict[str, Any]]:
    """The lines of a log that are whole, a later one of a step in place of an earlier one.

    Args:
        missing: told of damage, and with `what`, which cannot be shown then, of a file without lines.
    """
    try:
        texts = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        if what:
            missing.append(f"{what}: there is no {file.name}")
        return []
    found: dict[int, dict[str, Any]] = {}
    broken = 0
    for text in texts:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if _is_line(line):
            found[line["step"]] = line
        else:
            broken += bool(text.strip())
    if what and not found:
        missing.append(f"{what}: {file.name} has no whole line")
    elif broken:
        missing.append(f"{broken} line{'s' if broken > 1 else ''} of {file.name}: damaged, and left out")
    return [found[step] for step in sorted(found)]


def _grids(folder: Path, missing: list[str]) -> list[tuple[int, Path]]:
    """The pictures that can be shown."""
    from PIL import Image

    found = []
    for picture in sorted(folder.glob("step-*.png")):
        number = picture.stem.removeprefix("step-")
        try:
            with Image.open(picture) as image:
                image.load()
        except (OSError, ValueError, SyntaxError):
            missing.append(f"{picture.name}: cannot be read as a picture")
            continue
        if number.isdecimal():
            found.append((int(number), picture))
    if not found:
        missing.append("pictures: the run has kept no grids; --logging.grid-every sets how often one is made")
    return sorted(found)
