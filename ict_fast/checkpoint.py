"""Checkpoints: written whole or not at all, verified when read, never a pickle.

<run>/checkpoints/step-00001000/
    <name>.safetensors   one per group of tensors: weights, ema, optimizer, ...
    state.json           the rest of the training state
    MANIFEST.json        size and SHA-256 of each file; written last
<run>/checkpoints/latest the newest one's name, for people and scripts
<run>/checkpoints/best   that of the one with the best measurement so far, which is never deleted

A folder of the same files elsewhere, such as a snapshot of averages alone, is written and read alike.

Equal states give byte-identical files.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from ict_fast.durable import flush_directory, replace_durably, sha256_file, write_durably
from ict_fast.errors import InputError, TrainingError, did_you_mean, visible

FORMAT = "ict-fast checkpoint"
VERSION = 1
_MANIFEST, _STATE = "MANIFEST.json", "state.json"
_STEP_NAME = re.compile(r"step-(\d+)")
_SET_ASIDE = re.compile(r"\.tmp-(step-(\d+))-replaced")
_FILE_NAME = re.compile(
    r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
)  # no separator, no leading dot: it stays in its folder
_POINTERS = ("latest", "best")
_UNFINISHED = ".tmp-"
_HEADERS = 1 << 16  # bytes of JSON beside the tensors, generously, for the free-space check


class _MayBeWhole(InputError):
    """A checkpoint that cannot be judged here: to go on from an older one might lose what it holds."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint. The tensors are read on demand."""

    path: Path
    step: int
    """Optimizer steps done."""
    state: dict[str, Any]
    """state.json."""
    names: tuple[str, ...]
    """The groups of tensors that `tensors` can read."""

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """One group of tensors, on the CPU and contiguous.

        Args:
            name: weights, ema, optimizer, ...
        Raises:
            InputError: if this checkpoint has no such group, or it cannot be read.
        """
        if name.startswith("ema-") and name not in self.names:  # named by --ema without its "ema-"
            averages = [other.removeprefix("ema-") for other in self.names if other.startswith("ema-")]
            hint = did_you_mean(name.removeprefix("ema-"), averages) or "; it holds the run's own alone"
            raise InputError(f"{self.path}: has no average {name.removeprefix('ema-')}{hint}")
        if name not in self.names:
            raise InputError(f"{self.path}: has no {name}.safetensors{did_you_mean(name, self.names)}")
        file = self.path / f"{name}.safetensors"
        try:
            return safetensors.torch.load_file(file)
        except (OSError, safetensors.SafetensorError) as error:
            raise InputError(f"{file}: cannot be read: {error}") from error


def write_checkpoint(
    run: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    state: Mapping[str, Any],
    *,
    keep: int,
    snapshot_every: int = 0,
    best: bool = False,
) -> Path:
    """Writes the checkpoint of one step and deletes the oldest ones.

    At every moment, a kill or a power cut included, the whole checkpoints of other steps stay whole.

    Args:
        run: the run's directory.
        step: optimizer steps done.
        tensors: groups by name (weights, ema, optimizer), each a mapping from names to tensors of any device
            and layout. Values are kept, the memory format is not: channels_last comes back contiguous.
        state: everything else, as JSON values.
        keep: how many of the newest checkpoints to keep, at least 2.
        snapshot_every: keep those of the multiples of this step too, for ever; 0 for none. `state` has it as
            config.logging.snapshot_every: what was kept for ever then is kept whatever is asked for later.
        best: from now on this is the best one, which is kept until there is a better one.
    Returns:
        The checkpoint's directory.
    Raises:
        OSError: disk full or another failure to write; older checkpoints are untouched, nothing half is left.
        TrainingError: a tensor or a number of the state is not finite; nothing is written.
    """
    assert keep >= 2, keep
    folder = run / "checkpoints"
    if folder.exists():
        _delete_unfinished(folder)  # what a killed process left may be what fills the disk
    final = write_whole(folder / f"step-{step:08d}", step, tensors, state)
    # The checkpoint is safe: what fails from here on costs a stale pointer, or space until the next one.
    if best:
        mark_best(run, step, keep=keep, snapshot_every=snapshot_every)
    else:
        with contextlib.suppress(OSError):
            _delete_old(folder, step, keep, snapshot_every)
    with contextlib.suppress(OSError):
        replace_durably(folder / "latest", f"{final.name}\n".encode())
    return final


def mark_best(run: Path, step: int, *, keep: int, snapshot_every: int) -> None:
    """From now on the newest checkpoint is the best one; the one that was goes if it is old.

    What cannot be written costs a stale pointer, or space until the next checkpoint.

    Args:
        step: that of the checkpoint, which is there.
        run, keep, snapshot_every: see `write_checkpoint`.
    """
    folder = run / "checkpoints"
    with contextlib.suppress(OSError):
        # Before the one that was the best may be deleted.
        replace_durably(folder / "best", f"step-{step:08d}\n".encode())
        _delete_old(folder, step, keep, snapshot_every)


def make_room(run: Path, *, snapshot_every: int) -> None:
    """Deletes the checkpoints before the newest whole one, but for the best one and those kept for ever.

    What cannot be read or deleted stays.

    Args:
        run, snapshot_every: see `write_checkpoint`.
    """
    with contextlib.suppress(OSError, InputError):
        if newest := latest_checkpoint(run, lambda text: None):
            _delete_old(run / "checkpoints", newest.step, 1, snapshot_every)


def write_whole(
    final: Path, step: int, tensors: Mapping[str, Mapping[str, torch.Tensor]], state: Mapping[str, Any]
) -> Path:
    """Writes one folder of tensors and state, in place of what is there; its parents are created.

    Args, Raises: see `write_checkpoint`.
    """
    state_content = _encode_state(state)
    _refuse_non_finite(tensors)
    folder = final.parent
    is_new = not folder.exists()
    partial = folder / f"{_UNFINISHED}{final.name}"
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    size = sum(tensor.nbytes for group in tensors.values() for tensor in group.values())
    free = shutil.disk_usage(next(parent for parent in final.parents if parent.exists())).free
    if free < size + _HEADERS:
        raise OSError(
            errno.ENOSPC,
            f"a checkpoint needs {size / 1e6:.1f} MB and the disk has {free / 1e6:.1f} MB left",
            str(folder),
        )

    try:
        partial.mkdir(parents=True)
        files = {}
        for name, group in tensors.items():
            assert _FILE_NAME.fullmatch(name), name
            # Groups are encoded in memory, one at a time: safetensors' own file writer neither flushes to the
            # disk nor raises OSError.
            files[f"{name}.safetensors"] = _write(partial / f"{name}.safetensors", _encode(group))
        files[_STATE] = _write(partial / _STATE, state_content)
        manifest = {"format": FORMAT, "version": VERSION, "step": step, "files": files}
        _write(partial / _MANIFEST, json.dumps(manifest, indent=1, sort_keys=True).encode())
        flush_directory(partial)
        _put_in_place(partial, final)
        flush_directory(folder)
        flush_directory(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if is_new:  # `ict-fast import` takes an empty place only, the next time too
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    return final


def open_checkpoint(path: Path, warn: Callable[[str], None] | None = None) -> Checkpoint:
    """Opens and verifies a checkpoint for reading.

    Args:
        path: a checkpoint's directory; a run's, which means its newest whole checkpoint; or the file `best`
            or `latest` in a run's checkpoints, which means the one that it names.
        warn: told of each broken checkpoint that is passed over; by default a line on standard error.
    Raises:
        InputError: naming the file that is missing, truncated, altered, unreadable or hostile.
    """
    if not path.exists():
        raise InputError(f"{path}: does not exist; name a run or a checkpoint")
    if path.name in _POINTERS and path.is_file():
        path = path.parent / pointed_name(path)
    if not path.is_dir():
        raise InputError(f"{path}: is a file; name the directory of a run or of a checkpoint")
    if path.name == "checkpoints" and not (path / "checkpoints").exists():
        path = path.parent
    if (path / _MANIFEST).exists() or _STEP_NAME.fullmatch(path.name):
        return _open_whole(path)
    newest = latest_checkpoint(path, warn or _warn_on_standard_error)
    if newest is None:
        refuse_export(path)
        raise InputError(f"{path}: has no checkpoint; is it the directory of a run that has saved one?")
    return newest


def refuse_export(path: Path) -> None:
    """Raises InputError, with the command that imports it, if a folder without a checkpoint is an export."""
    for name, source in (("model.safetensors", "safetensors"), ("model_index.json", "diffusers")):
        if (path / name).exists():
            raise InputError(
                f"{path}: looks like a model exported as {source};"
                f" `ict-fast import {source} {path} --out DIR` makes a checkpoint of it"
            )


def pointed_name(pointer: Path) -> str:
    """The name of the checkpoint that `best` or `latest` names.

    Raises:
        InputError: if it names something else, or cannot be read.
    """
    try:
        name = pointer.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{pointer}: cannot be read: {error}") from None
    if not _STEP_NAME.fullmatch(name):
        raise InputError(f"{pointer}: altered, it names no checkpoint: {name[:80]!r}")
    return name


def latest_checkpoint(run: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint of a run.

    Args:
        run: the run's directory; it need not exist.
        warn: told of each broken checkpoint that is passed over, naming the file.
    Returns:
        None if the run has no checkpoints.
    Raises:
        InputError: if it has, and none is whole, or the newest that is not broken cannot be read, or was
            written by a newer ict-fast.
    """
    steps = step_folders(run / "checkpoints")
    reason = ""
    for step in sorted(steps, reverse=True):
        try:
            return _open_whole(steps[step])
        except _MayBeWhole as error:
            raise InputError(f"{error}; moved elsewhere, it would be passed over") from None
        except InputError as error:
            warn(f"{error}; passing over this checkpoint")
            reason = reason or str(error)
    if steps:
        raise InputError(
            f"{run / 'checkpoints'}: none of the {len(steps)} checkpoints is whole (newest: {reason});"
            f" restore one from a copy, or delete {run} to start again"
        )
    return None


def checkpoint_steps(run: Path) -> frozenset[int]:
    """The steps of a run's checkpoints, whole or not."""
    return frozenset(step_folders(run / "checkpoints"))


def newest_state(run: Path) -> dict[str, Any]:
    """state.json of a run's newest checkpoint, unverified; empty if none can be read."""
    for step in sorted(checkpoint_steps(run), reverse=True):
        with contextlib.suppress(OSError, ValueError, RecursionError):
            state = json.loads((run / "checkpoints" / f"step-{step:08d}" / "state.json").read_bytes())
            if isinstance(state, dict):
                return state
    return {}


def set_broken_aside(run: Path, step: int) -> None:
    """Takes away the checkpoints after a step, which are broken: they would count among those to keep.

    The next one that is written deletes them.

    Args:
        run: the run's directory, which is locked.
        step: that of its newest whole checkpoint.
    """
    folder = run / "checkpoints"
    for number, path in step_folders(folder).items():
        if number > step:
            aside = folder / f"{_UNFINISHED}step-{number:08d}-broken"
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(path, aside)


def _open_whole(path: Path) -> Checkpoint:
    manifest = _read_json(path / _MANIFEST)
    if manifest.get("format") != FORMAT:
        raise InputError(f"{path / _MANIFEST}: not written by ict-fast")
    if manifest.get("version") != VERSION:
        raise _MayBeWhole(
            f"{path / _MANIFEST}: format version {manifest.get('version')};"
            f" this ict-fast reads version {VERSION}"
        )
    step, files = manifest.get("step"), manifest.get("files")
    named = _STEP_NAME.fullmatch(path.name)
    if not isinstance(step, int) or step < 0 or (named and int(named[1]) != step):
        raise InputError(f"{path / _MANIFEST}: altered, it says step {step!r}")
    if not isinstance(files, dict) or _STATE not in files:
        raise InputError(f"{path / _MANIFEST}: altered, it lists no {_STATE}")
    for name, entry in files.items():
        _verify(path, name, entry)
    names = sorted(name.removesuffix(".safetensors") for name in files if name.endswith(".safetensors"))
    return Checkpoint(path=path, step=step, state=_read_json(path / _STATE), names=tuple(names))


def _verify(path: Path, name: str, entry: Any) -> None:
    if not _FILE_NAME.fullmatch(name):
        raise InputError(f"{path / _MANIFEST}: refused, it names a file outside the checkpoint: {name!r}")
    if not isinstance(entry, dict) or not isinstance(entry.get("bytes"), int):
        raise InputError(f"{path / _MANIFEST}: altered at {name}")
    file = path / name
    try:
        if not file.is_file():
            raise InputError(f"{file}: missing")
        size = file.stat().st_size
        if size < entry["bytes"]:
            raise InputError(f"{file}: truncated, {size} of {entry['bytes']} bytes")
        if size != entry["bytes"] or sha256_file(file) != entry.get("sha256"):
            raise InputError(f"{file}: altered, it is not what {_MANIFEST} describes")
    except OSError as error:
        raise _MayBeWhole(f"{file}: cannot be read: {error.strerror or error}") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{file}: missing") from None
    except OSError as error:
        raise _MayBeWhole(f"{file}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: altered, not readable as JSON") from error
    if not isinstance(value, dict):
        raise InputError(f"{file}: altered, not a JSON object")
    return value


def step_folders(folder: Path) -> dict[int, Path]:
    """The directories of a folder that are named by a step, whole or not; none if it is not there."""
    try:
        entries = list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise InputError(f"{folder}: cannot be read: {error.strerror or error}") from error
    # First what a kill left set aside, with nothing in its place.
    aside = ((_SET_ASIDE.fullmatch(entry.name), entry) for entry in entries)
    named = ((_STEP_NAME.fullmatch(entry.name), entry) for entry in entries)
    return {int(name[2]): entry for name, entry in aside if name} | {
        int(name[1]): entry for name, entry in named if name
    }


def _refuse_non_finite(tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    for group_name, group in tensors.items():
        for name, tensor in group.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise TrainingError(f"{group_name}: {name} is not finite; this state is not saved")


def _encode_state(state: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(state, indent=1, sort_keys=True, allow_nan=False).encode()
    except ValueError as error:
        raise TrainingError(f"{_STATE}: a number is not finite; this state is not saved") from error


def _encode(group: Mapping[str, torch.Tensor]) -> bytes:
    """safetensors refuses views that share memory, and other layouts; so each tensor is copied plainly."""
    plain = {}
    for name, tensor in group.items():
        plain[name] = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
    return safetensors.torch.save(plain)


def _write(file: Path, content: bytes) -> dict[str, Any]:
    write_durably(file, content)
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _put_in_place(partial: Path, final: Path) -> None:
    """Renames the finished directory. A whole, equal one that is there already stays."""
    if final.exists():
        try:
            _open_whole(final)
            equal = (final / _MANIFEST).read_bytes() == (partial / _MANIFEST).read_bytes()
        except InputError:
            equal = False
        if equal:
            shutil.rmtree(partial)
            return
        # A broken checkpoint of this step, which resuming has passed over, or one of other options. It steps
        # aside, because a rename cannot replace a directory that is not empty.
        aside = partial.with_name(f"{partial.name}-replaced")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(final, aside)
        try:
            os.replace(partial, final)
        except OSError:
            os.replace(aside, final)
            raise
        shutil.rmtree(aside, ignore_errors=True)
        return
    os.replace(partial, final)


def _delete_old(folder: Path, step: int, keep: int, snapshot_every: int) -> None:
    """Keeps the newest `keep` up to `step`. Later ones are another history's: not counted, not deleted."""
    past = {number: path for number, path in step_folders(folder).items() if number <= step}
    try:
        best = pointed_name(folder / "best") if (folder / "best").exists() else ""
    except InputError:  # any of them may be the one that is not to be deleted
        return
    for number in sorted(past, reverse=True)[keep:]:
        if past[number].name == best or _is_snapshot(past[number], number, snapshot_every):
            continue
        # Renamed first, so that a kill halfway leaves no checkpoint that looks broken.
        os.replace(past[number], folder / f"{_UNFINISHED}{past[number].name}-old")
    _delete_unfinished(folder)


def _is_snapshot(path: Path, step: int, snapshot_every: int) -> bool:
    """Whether a checkpoint is kept for ever, by what is asked for now or was when it was written."""
    if snapshot_every and step % snapshot_every == 0:
        return True
    try:
        then = _read_json(path / _STATE)["config"]["logging"]["snapshot_every"]
    except _MayBeWhole:
        return True
    except (InputError, KeyError, TypeError):
        return False
    return isinstance(then, int) and then > 0 and step % then == 0


def _delete_unfinished(folder: Path) -> None:
    for entry in folder.glob(f"{_UNFINISHED}*"):
        aside = _SET_ASIDE.fullmatch(entry.name)
        if aside and not (folder / aside[1]).exists():
            os.replace(entry, folder / aside[1])
        elif entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def _warn_on_standard_error(message: str) -> None:
    print(f"warning: {visible(message)}", file=sys.stderr)
