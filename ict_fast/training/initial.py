"""Where a run's weights begin, if not at random: the averaged weights of another model (`train --init`).

Tensors go by name and shape. What has no counterpart of its shape keeps the weights drawn from the run's
seed, and the report says which, and why. Because of the record (`init.json`, and state.json of every
checkpoint) a run begins once, and with these weights alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ict_fast.checkpoint import Checkpoint, open_checkpoint
from ict_fast.config import Config, from_dict
from ict_fast.consistency.model import build_seeded_network
from ict_fast.durable import sha256_file
from ict_fast.errors import InputError

RECORD_NAME = "init.json"
_WEIGHTS = "ema"
_MOST_LINES = 8
_LEAST_SHARE = 0.01  # of the network's numbers; a bias always finds one of its length somewhere


@dataclass(frozen=True)
class Initial:
    """The checkpoint that a run begins with."""

    path: str
    """As it was given."""
    step: int
    sha256: str
    """Of its averaged weights."""

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return {"path": self.path, "step": self.step, "sha256": self.sha256}


@dataclass(frozen=True)
class Report:
    """What of the checkpoint a run takes over."""

    initial: Initial
    loaded: dict[str, int]
    """Tensors and how many numbers they hold."""
    total: int
    """Numbers in the run's network."""
    drawn_anew: dict[str, str]
    """Tensors of the run that found no counterpart, and why."""
    not_used: dict[str, str]
    """Tensors of the checkpoint that found none, and why."""
    notes: tuple[str, ...]
    """What differs although the tensors fit."""

    def lines(self) -> list[str]:
        """For people."""
        numbers = sum(self.loaded.values())
        count = len(self.loaded) + len(self.drawn_anew)
        lines = [
            f"init: the averaged weights of {self.initial.path}, step {self.initial.step:,}:"
            f" {len(self.loaded)} of {count} tensors, {numbers / self.total:.2%} of the numbers, into the"
            " weights and their average"
        ]
        for title, entries in (("drawn anew", self.drawn_anew), ("not used", self.not_used)):
            grouped = _grouped(entries)
            lines += [f"  {title}: {names}: {why}" for names, why in grouped[:_MOST_LINES]]
            if len(grouped) > _MOST_LINES:
                lines.append(f"  {title}: {len(grouped) - _MOST_LINES} more, see {RECORD_NAME}")
        return lines + [f"  note: {note}" for note in self.notes]

    def record(self) -> dict[str, Any]:
        """As JSON values, complete."""
        return {
            **self.initial.record(),
            "loaded": sorted(self.loaded),
            "drawn_anew": self.drawn_anew,
            "not_used": self.not_used,
            "notes": list(self.notes),
        }


def find_initial(path: Path) -> Initial:
    """The checkpoint at `path`, a run, a checkpoint or an imported model, verified.

    Raises:
        InputError: if nothing whole is there, or it has no averaged weights.
    """
    checkpoint = open_checkpoint(path)
    file = checkpoint.path / f"{_WEIGHTS}.safetensors"
    if _WEIGHTS not in checkpoint.names:
        raise InputError(f"--init {path}: {checkpoint.path} has no averaged weights, {file.name}")
    return Initial(str(path), checkpoint.step, sha256_file(file))


def recorded_initial(out: Path, checkpoint: Checkpoint | None) -> Initial | None:
    """The checkpoint that the run in `out` began with, or None if it began at random.

    Raises:
        InputError: if the record cannot be read.
    """
    file = out / RECORD_NAME
    if checkpoint is not None:
        values, origin = checkpoint.state.get("init"), checkpoint.path / "state.json"
    elif not file.exists():
        return None
    else:
        origin = file
        try:
            values = json.loads(file.read_bytes())
        except (OSError, ValueError) as error:
            raise InputError(
                f"{file} cannot be read ({error}); restore it, or choose another --out"
            ) from None
    if values is None:
        return None
    try:
        return Initial(str(values["path"]), int(values["step"]), str(values["sha256"]))
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{origin}: its record of --init is altered") from None


def settle_initial(out: Path, checkpoint: Checkpoint | None, asked: Path | None) -> Initial | None:
    """What a run begins, or began, with.

    Args:
        out: the run's directory.
        checkpoint: its newest one, None if it has no steps yet.
        asked: `--init`.
    Raises:
        InputError: if the run began with something else than what is asked for, or what it is to begin with
            is not there.
    """
    recorded = recorded_initial(out, checkpoint)
    if recorded is None:
        if checkpoint is not None and asked is not None:
            raise InputError(
                f"the run in {out} began at random, not with --init {asked}; another --out starts a new run"
            )
        return None if asked is None else find_initial(asked)
    # What was trained on, or deleted, since then is still what this run began with.
    if checkpoint is not None and (asked is None or str(asked) == recorded.path):
        return recorded
    try:
        found = find_initial(Path(recorded.path) if asked is None else asked)
    except InputError as error:
        if asked is not None:
            raise
        raise InputError(
            f"the run in {out} has no checkpoint, and cannot begin again with the weights of its --init:"
            f" {error}; restore them, or choose another --out"
        ) from None
    if found.sha256 != recorded.sha256 and (checkpoint is not None or asked is None):
        raise InputError(
            f"the run in {out} began with the weights of {recorded.path}; --init {found.path} has others;"
            " another --out starts a new run"
        )
    return recorded if checkpoint is not None else found


def initial_weights(initial: Initial, config: Config) -> tuple[dict[str, Tensor], Report]:
    """The state dict that a run begins with, and what it is made of.

    Raises:
        InputError: if the checkpoint is not there any more or has changed, or next to nothing fits.
    """
    checkpoint = open_checkpoint(Path(initial.path))
    if sha256_file(checkpoint.path / f"{_WEIGHTS}.safetensors") != initial.sha256:
        raise InputError(f"--init {initial.path} has changed since the run was opened")
    theirs = checkpoint.tensors(_WEIGHTS)
    source = from_dict(checkpoint.state.get("config", {}), str(checkpoint.path / "state.json"))
    ours = build_seeded_network(config).state_dict()
    loaded = {
        name: tensor.numel()
        for name, tensor in ours.items()
        if name in theirs and theirs[name].shape == tensor.shape
    }
    total = sum(tensor.numel() for tensor in ours.values())
    if sum(loaded.values()) < _LEAST_SHARE * total:
        raise InputError(
            f"--init {initial.path}: {len(loaded)} of its {len(theirs)} tensors have the name and shape of"
            f" one of this network's, too few to begin with; it is a {source.network.name} of"
            f" {source.network.channels} channels"
        )
    report = Report(
        initial,
        loaded,
        total,
        {
            name: _why(name, ours, theirs, config, source)
            if name in theirs
            else "there is none of that name there"
            for name in ours
            if name not in loaded
        },
        {
            name: _why(name, ours, theirs, config, source)
            if name in ours
            else "there is none of that name here"
            for name in theirs
            if name not in loaded
        },
        tuple(_notes(config, source, checkpoint.state)),
    )
    return {name: theirs[name] if name in loaded else tensor for name, tensor in ours.items()}, report


def _why(
    name: str, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], config: Config, source: Config
) -> str:
    """Why a tensor that both have does not fit."""
    here, there = config.network, source.network
    if ".label." in name and here.num_classes != there.num_classes:
        return f"{there.num_classes} classes there, {here.num_classes} here"
    reads_image = name.startswith(("input.", "output.conv.", "encoder.1.pyramid."))
    if reads_image and here.image_channels != there.image_channels:
        return f"images of {there.image_channels} channels there, {here.image_channels} here"
    if here.adaptive_norm != there.adaptive_norm and ".embedding." in name:
        return (
            "adaptive norm there, not here" if there.adaptive_norm else "adaptive norm here, not there"
        ) + " (--network.adaptive-norm)"
    return _shapes(name, ours, theirs)


def _shapes(name: str, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> str:
    return f"shape {tuple(theirs[name].shape)} there, {tuple(ours[name].shape)} here"


def _notes(config: Config, source: Config, state: Mapping[str, Any]) -> list[str]:
    """What no shape shows."""
    here, there = config.network, source.network
    notes = []
    for field, flag in (
        ("name", "--network.name"),
        ("c_noise", "--network.c-noise"),
        ("embedding", "--network.embedding"),
        ("head_channels", "--network.head-channels"),
        ("resolution", "--network.resolution"),
    ):
        ours, theirs = getattr(here, field), getattr(there, field)
        if ours != theirs:
            notes.append(f"the weights were trained with {flag} {theirs}, this run has {ours}")
    if config.method.sigma_data != source.method.sigma_data:
        theirs, ours = source.method.sigma_data, config.method.sigma_data
        notes.append(f"the weights were trained with --method.sigma-data {theirs}, this run has {ours}")
    if config.method.identity_sigma != source.method.identity_sigma:
        notes.append(
            f"f(x, s) = x at s = {source.method.identity_sigma} there, at {config.method.identity_sigma} here"
        )
    if here.adaptive_norm and there.adaptive_norm:
        notes.append(
            "the norms are adaptive, as in these weights, with which iCT is reported to diverge;"
            " --network.no-adaptive-norm leaves that out, and draws the embeddings' projections anew"
        )
    imported = state.get("imported")
    if isinstance(imported, Mapping) and imported.get("kind") == "noise-prediction":
        notes.append("the weights predict noise, of images scaled otherwise: they are a rough start")
    return notes


def _grouped(entries: Mapping[str, str]) -> list[tuple[str, str]]:
    """Modules with the same reason in a row together: `encoder.1.blocks.0 (6 tensors)`."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, why in entries.items():
        groups.setdefault((name.rpartition(".")[0], why), []).append(name)
    by_reason: dict[str, list[str]] = {}
    for (module, why), names in groups.items():
        by_reason.setdefault(why, []).append(names[0] if len(names) == 1 else module)
    return [
        (", ".join(modules[:3]) + (f" and {len(modules) - 3} more" if len(modules) > 3 else ""), why)
        for why, modules in by_reason.items()
    ]
