"""The program `ict-fast`: the options of each command, from words to options, from errors to exit codes.

Nothing here imports torch, so that `--help` and every complaint about the command line answer at once. tyro,
pinned because its parse-error hook is private, is imported here and nowhere else.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import select
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
from tyro import _errors as tyro_errors
from tyro.conf import Positional, arg

from ict_fast import commands, errors, presets
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
from ict_fast.errors import InputError, TrainingError, did_you_mean
from ict_fast.version import __version__

PROGRAM = "ict-fast"
DEFAULT_PRESET = "digits"
_SECTIONS = ("data", "network", "method", "optimizer", "training", "logging")
_TRUTH = {"true": True, "True": True, "false": False, "False": False}

Device = Literal["auto", "cuda", "cpu"]
Run = Annotated[Path, arg(metavar="RUN|CHECKPOINT")]
Options = TypeVar("Options")


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
        config = Config(self.preset, **{section: getattr(self, section) for section in _SECTIONS})
        if self.data_path is not None:
            preset_path, path = presets.get(self.preset).data.path, str(self.data_path)
            if config.data.path not in (preset_path, path):
                raise InputError(f"--data is {path} and --data.path is {config.data.path}; give one of them")
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=path))
        validate(config)
        return config


@dataclass(frozen=True)
class SampleOptions:
    """Make images with a trained model (its EMA weights)."""

    run: Positional[Run]
    """Folder of a run, whose newest checkpoint is taken, or of one checkpoint."""
    out: Annotated[Path | None, arg(metavar="PATH", help_behavior_hint="(default: <run>/samples.png)")] = None
    """FILE.png: a grid. A folder: one PNG per image. FILE.npz: arr_0 uint8 NHWC, arr_1 labels if any."""
    count: int = 64
    """Number of images."""
    steps: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: 1, or as --sigmas)")] = None
    """Network evaluations per image."""
    sigmas: Annotated[
        tuple[float, ...] | None, arg(metavar="SIGMA ...", help_behavior_hint="(default: the method's)")
    ] = None
    """Noise levels of the steps after the first, descending."""
    labels: Annotated[
        tuple[int, ...] | None, arg(metavar="CLASS ...", help_behavior_hint="(default: every class)")
    ] = None
    """Classes of a class-conditional model; repeated until there is one per image."""
    seed: int = 0
    """Seed of the noise."""
    device: Device = "auto"
    """auto: the GPU if the machine has one."""


@dataclass(frozen=True)
class EvaluateOptions:
    """Measure a trained model against real images; writes evaluation.json beside the checkpoint."""

    run: Positional[Run]
    """Folder of a run, whose newest checkpoint is taken, or of one checkpoint."""
    reference: Annotated[
        Path | None, arg(metavar="DATA", help_behavior_hint="(default: what the run was trained on)")
    ] = None
    """Folder of a prepared store with the real images."""
    out: Annotated[
        Path | None, arg(metavar="FILE.json", help_behavior_hint="(default: evaluation.json beside it)")
    ] = None
    """Where the result is written; the default is overwritten by the next evaluation in the same run."""
    steps: Annotated[tuple[str, ...], arg(metavar="1,2")] = ("1,2",)
    """Numbers of sampling steps to measure."""
    count: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: 10000)")] = None
    """Number of images to generate."""
    seed: int = 0
    """Seed of the noise."""
    device: Device = "auto"
    """auto: the GPU if the machine has one."""


@dataclass(frozen=True)
class PrepareOptions:
    """Turn a source of images into the store that training reads."""

    source: Positional[Literal["digits", "cifar10", "imagenet", "imagenet-npz", "edm-zip", "folder"]]
    """digits: scikit-learn's handwritten digits, 8x8; nothing is downloaded. cifar10: the python archive.
    imagenet: ILSVRC 2012's training set, its tar or the folders of its synsets. imagenet-npz: Chrabaszcz's
    batches. edm-zip: a data set of EDM or EDM2. folder: any images; a class per subfolder, if there are."""
    path: Positional[Annotated[Path | None, arg(metavar="[PATH]", help_behavior_hint="")]] = None
    """The archive or folder that holds the images. Archives are read in place."""
    out: Annotated[
        Path | None,
        arg(metavar="DIR", help_behavior_hint="(default: data/<source>, for imagenet data/imagenet64)"),
    ] = None
    """Folder to write. The same command continues what was stopped, and verifies what is finished."""
    resolution: Annotated[
        int | None, arg(metavar="N", help_behavior_hint="(imagenet: default 64; folder: required)")
    ] = None
    """Height and width in pixels."""
    crop: Annotated[
        str | None,
        arg(
            metavar="{center-crop-dhariwal,center-crop,none}",
            help_behavior_hint="(imagenet, folder: default center-crop-dhariwal)",
        ),
    ] = None
    """How an image of any size becomes a square: as ADM (halvings by BOX, then BICUBIC), as EDM (the central
    square by LANCZOS), or not at all: others are rejected."""
    channels: Annotated[int | None, arg(metavar="{1,3}", help_behavior_hint="(folder: default 3)")] = None
    """1: grey, 3: RGB."""
    processes: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: one per core)")] = None
    """Processes that read and decode."""
    max_rejected: Annotated[float | None, arg(metavar="SHARE", help_behavior_hint="(default: 0.01)")] = None
    """Largest share of unusable images. They are left out, and listed in rejected.txt."""
    download: bool = False
    """cifar10: get the archive from its authors first, into PATH (default: data); its MD5 is checked."""


@dataclass(frozen=True)
class DoctorOptions:
    """Say what this machine has and lacks. Exit code 0: it can train; 2: something essential is missing."""

    data: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: none is measured)")] = None
    """Folder of a prepared store: does any loader starve the training step on it? Takes some ten seconds."""
    preset: Annotated[
        str | None,
        arg(
            metavar=f"{{{','.join(presets.names())}}}",
            help_behavior_hint="(default: one that takes such images)",
        ),
    ] = None
    """Whose training step the loaders are measured against."""
    batch: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: the preset's)")] = None
    """Images per step."""


COMMANDS: dict[str, tuple[type, Callable[[Any], int]]] = {
    "train": (TrainOptions, commands.train),
    "sample": (SampleOptions, commands.sample),
    "evaluate": (EvaluateOptions, commands.evaluate),
    "prepare": (PrepareOptions, commands.prepare),
    "doctor": (DoctorOptions, commands.doctor),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the words after the program's name; by default those of the process.
    Returns:
        the exit code; see `ict_fast.errors`.
    """
    try:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # a terminal that knows ASCII alone
                stream.reconfigure(errors="replace")
        code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except InputError as error:
        return _complain(error, errors.EXIT_BAD_INPUT)
    except TrainingError as error:
        return _complain(error, errors.EXIT_FAILED)
    except KeyboardInterrupt:
        return _complain(TrainingError("interrupted; nothing more was saved"), errors.EXIT_SIGINT)
    except BrokenPipeError:
        if not _reader_has_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return errors.EXIT_BROKEN_PIPE
    except OSError as error:  # a folder without permission, a name too long, a full disk
        where = f"{error.filename}: " if error.filename else ""
        return _complain(InputError(f"{where}{error.strerror or error}"), errors.EXIT_BAD_INPUT)


def _reader_has_gone() -> bool:
    """Whether standard output is a pipe that nobody reads any more."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):
        return False
    poll = select.poll()
    poll.register(descriptor, 0)  # errors and hang-ups are reported unasked
    return bool(poll.poll(0))


def _dispatch(argv: list[str]) -> int:
    if "" in argv:
        before = argv[argv.index("") - 1] if argv.index("") else PROGRAM
        raise InputError(f"the argument after {before} is empty; leave it out, or give it a value")
    word = argv[0] if argv else "--help"
    if word == "help" and argv[1:] and argv[1] in COMMANDS:
        argv, word = [argv[1], "--help"], argv[1]
    if word in ("--help", "-h", "help"):
        print(_overview())
        return errors.EXIT_DONE
    if word in ("--version", "-V"):
        print(f"{PROGRAM} {__version__}")
        return errors.EXIT_DONE
    if word not in COMMANDS:
        if word.startswith("-"):
            known = ("--help", "--version", *COMMANDS)
            raise InputError(f"unknown option {word} before a command{did_you_mean(word, known)}")
        raise InputError(f'unknown command "{word}"{did_you_mean(word, COMMANDS)}')
    kind, command = COMMANDS[word]
    default = None
    if kind is TrainOptions:
        preset = presets.get(_preset_name(argv[1:]))
        default = TrainOptions(
            preset=preset.preset, **{section: getattr(preset, section) for section in _SECTIONS}
        )
    try:
        options = _parse(kind, word, argv[1:], default)
    except SystemExit:  # tyro has printed the help
        return errors.EXIT_DONE
    return command(options)


def _overview() -> str:
    lines = [
        f"{name:<10}{(kind.__doc__ or '').split('. ')[0].rstrip('.')}."
        for name, (kind, _) in COMMANDS.items()
    ]
    return "\n".join(
        (
            f"usage: {PROGRAM} COMMAND [OPTIONS]",
            "",
            "Trains improved consistency models: images in one step.",
            "",
            *(f"  {line}" for line in lines),
            "",
            f"`{PROGRAM} COMMAND --help` lists the options of a command; `{PROGRAM} --version` is all else.",
            f"`{PROGRAM} train` alone trains on handwritten digits, on this machine, in a few minutes.",
        )
    )


def _parse(kind: type[Options], command: str, argv: list[str], default: Options | None) -> Options:
    """The words as an instance of `kind`; what tyro refuses becomes an InputError instead of its boxes."""
    kinds = _option_kinds(kind)
    argv = _spell_out_booleans(argv, {name for name, type_ in kinds.items() if type_ is bool})

    def refuse(event: tyro_errors.ParseErrorEvent) -> None:
        raise InputError(errors.refusal(event, kinds, argv, f"{PROGRAM} {command}"))

    with tyro_errors.on_parse_error(refuse):
        return tyro.cli(
            kind,
            prog=f"{PROGRAM} {command}",
            args=argv,
            default=tyro.MISSING_NONPROP if default is None else default,
        )


def _option_kinds(kind: type, prefix: str = "--") -> dict[str, Any]:
    """Every option of a dataclass of options, spelled with dashes, and its Python type."""
    plain, annotated = typing.get_type_hints(kind), typing.get_type_hints(kind, include_extras=True)
    kinds: dict[str, Any] = {}
    for name, type_ in plain.items():
        renamed = [note.name for note in typing.get_args(annotated[name])[1:] if getattr(note, "name", None)]
        option = prefix + (renamed[0] if renamed else name).replace("_", "-")
        if dataclasses.is_dataclass(type_):
            kinds |= _option_kinds(typing.cast(type, type_), option + ".")
        else:
            kinds[option] = type_
    return kinds


def _spell_out_booleans(argv: list[str], switches: set[str]) -> list[str]:
    """`--data.flip true`, `--data.flip=false` as the `--data.flip`, `--data.no-flip` that tyro knows."""
    words: list[str] = []
    for word in argv:
        option, _, value = word.partition("=")
        if word in _TRUTH and words and words[-1].replace("_", "-") in switches:
            option, value = words.pop(), word
        option = option.replace("_", "-")
        if option in switches and value in _TRUTH:
            section, dot, name = option[2:].rpartition(".")
            words.append(option if _TRUTH[value] else f"--{section}{dot}no-{name}")
        else:
            words.append(word)
    return words


def _preset_name(argv: list[str]) -> str:
    """The preset, which must be known before the rest is parsed: it sets the other options' defaults."""
    given = []
    for word, following in itertools.pairwise((*argv, "")):
        option, equals, value = word.partition("=")
        if option == "--preset":
            given.append(value if equals else following)
    if len(given) > 1:
        raise InputError(f"--preset is given {len(given)} times: {', '.join(given)}; choose one")
    if not given or given[0] in ("", "-h") or given[0].startswith("--"):
        return DEFAULT_PRESET  # tyro says that the value is missing
    return given[0]


def _complain(error: Exception, code: int) -> int:
    print(f"{PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code
