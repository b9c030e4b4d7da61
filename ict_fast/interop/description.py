"""What an exported folder says of the model in it, as JSON values: written, and read back with suspicion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ict_fast.checkpoint import Checkpoint
from ict_fast.config import Config, from_dict, to_dict
from ict_fast.errors import InputError
from ict_fast.interop.imported import KINDS, fingerprint
from ict_fast.version import __version__

FORMAT = "ict-fast model"
_LONGEST_TEXT = 1000
_AVERAGES = {
    "sigma_rel": "the power-function average of relative width (sigma_rel)",
    "decay": "the exponential average of decay",
}
_TEXTS_OF_SOURCE = ("file", "sha256", "layout", "kind")


def describe(
    checkpoint: Checkpoint, config: Config, tensors: Mapping[str, Tensor], weights: str
) -> dict[str, Any]:
    """What an exported folder says of itself.

    Where its model comes from is what the first export said, however often it was imported and exported
    since then (`imported.origin`).

    Raises:
        InputError: see `check_state`.
    """
    check_state(checkpoint)
    initial = checkpoint.state.get("init")
    return {
        "format": FORMAT,
        "version": 1,
        "ict_fast": __version__,
        "step": checkpoint.step,
        "weights": weights,
        "average": average_of(checkpoint, weights),
        "fingerprint": fingerprint(tensors),
        "data_fingerprint": checkpoint.state.get("data_fingerprint"),
        "init": initial["path"] if initial else None,
        "imported": checkpoint.state.get("imported"),
        "config": to_dict(config),
    }


def check_state(checkpoint: Checkpoint) -> None:
    """Checks what a checkpoint, which a stranger may have written, says of where its weights come from.

    Raises:
        InputError: naming what is altered in `imported`, `init` or `reconstruction`.
    """
    file, source = checkpoint.path / "state.json", checkpoint.state.get("imported")
    if source is not None:
        _source(file, source)
        if source.get("origin") is not None:
            _origin(file, source["origin"])
    initial = checkpoint.state.get("init")
    if initial is not None:
        if not isinstance(initial, dict):
            raise InputError(f"{file}: altered, its record of --init is a {type(initial).__name__}")
        _text(file, initial, "path")
    average_of(checkpoint, "ema")


def average_of(checkpoint: Checkpoint, weights: str) -> str | None:
    """Which average these weights are, in words; None for a run's own, and for none.

    Args:
        checkpoint: of a run, or a folder that `ict-fast ema` made.
        weights: the group of its tensors.
    Raises:
        InputError: if the record of what was made is altered.
    """
    if name := weights.removeprefix("ema").removeprefix("-"):
        if weights == name:  # trained ones
            return None
        width = name.removeprefix("power-")
        return f"{_AVERAGES['decay' if width == name else 'sigma_rel']} {width}, kept beside the run's own"
    file, made = checkpoint.path / "state.json", checkpoint.state.get("reconstruction")
    if made is None:
        return None
    for name, words in _AVERAGES.items():
        if isinstance(made, dict) and isinstance(made.get(name), float):
            # Older records do not name their run.
            run = f" of the run {_text(file, made, 'run')}" if "run" in made else ""
            return f"{words} {made[name]}, made from the snapshots{run}"
    raise InputError(f"{file}: altered, its record of `ict-fast ema` names no average")


@dataclass(frozen=True)
class Description:
    """A description that was read."""

    file: Path
    config: Config
    kind: str
    """One of KINDS."""
    origin: dict[str, Any]
    """Of the first export: ict_fast, step, weights, average, data_fingerprint, init, config, and `imported`:
    file, sha256, layout and kind of what was imported before that, None for a model that was trained here."""

    def notes(self) -> list[str]:
        """For people, where the model comes from."""
        source, version = self.origin["imported"], self.origin["ict_fast"]
        if source is not None:
            return [f"the weights of {source['file']} ({source['layout']}), exported by ict-fast {version}"]
        which = f"; {self.origin['average']}" if self.origin["average"] else ""
        return [f"trained by ict-fast {version}, {self.origin['step']:,} steps{which}"]

    def check_fingerprint(self, said: Any, tensors: Mapping[str, Tensor], or_else: str = "") -> None:
        """Compares the weights with what the description says of them.

        Args:
            said: its entry `fingerprint`.
            tensors: by our names.
            or_else: what else may help.
        Raises:
            InputError: if they differ.
        """
        if said != fingerprint(tensors):
            raise InputError(
                f"{self.file.parent}: not the weights that {self.file.name} describes; get it again{or_else}"
            )


def read_description(file: Path, values: Mapping[str, Any]) -> Description:
    """Checks a description that a stranger may have written.

    Args:
        file: where it stands, for messages.
        values: JSON values.
    Raises:
        InputError: naming what is missing or altered.
    """
    if values.get("format") != FORMAT:
        raise InputError(f"{file}: not written by `ict-fast export`")
    if not isinstance(values.get("config"), dict):
        raise InputError(f"{file}: holds no configuration")
    config = from_dict(values["config"], str(file))
    source = values.get("imported")
    if source is not None and not isinstance(source, dict):
        raise InputError(f"{file}: altered, its record of an import is a {type(source).__name__}")
    kind = "consistency" if source is None else source.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise InputError(f"{file}: altered, it says kind {str(kind)[:80]!r}")
    first = source.get("origin") if source else None
    return Description(file, config, kind, _origin(file, values) if first is None else _origin(file, first))


def _origin(file: Path, values: Any) -> dict[str, Any]:
    """What a first export said, and nothing else."""
    if not isinstance(values, dict) or not isinstance(values.get("config"), dict):
        raise InputError(f"{file}: altered, what it says of the model's origin holds no configuration")
    step, source = values.get("step"), values.get("imported")
    if type(step) is not int or not 0 <= step < 2**63:
        raise InputError(f"{file}: altered, its step is no number of steps")
    return {
        "ict_fast": _text(file, values, "ict_fast"),
        "step": step,
        "weights": _text(file, values, "weights"),
        **{
            name: None if values.get(name) is None else _text(file, values, name)
            for name in ("average", "data_fingerprint", "init")
        },
        "imported": None if source is None else _source(file, source),
        "config": to_dict(from_dict(values["config"], str(file))),
    }


def _source(file: Path, source: Any) -> dict[str, str]:
    """What is recorded of an import, as far as it is passed on."""
    if not isinstance(source, dict):
        raise InputError(f"{file}: altered, its record of an import is a {type(source).__name__}")
    texts = {name: _text(file, source, name) for name in _TEXTS_OF_SOURCE}
    if texts["kind"] not in KINDS:
        raise InputError(f"{file}: altered, it says kind {texts['kind'][:80]!r}")
    return texts


def _text(file: Path, values: Mapping[str, Any], name: str) -> str:
    value = values.get(name)
    if not isinstance(value, str) or len(value) > _LONGEST_TEXT or not value.isprintable():
        raise InputError(f"{file}: altered, its {name} is no line of text")
    return value
