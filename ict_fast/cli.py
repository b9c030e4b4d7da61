"""The program `ict-fast`: from words to a command's options, from errors to exit codes.

Nothing here imports torch, so that `--help` and every complaint about the command line answer at once. tyro,
pinned because its parse-error hook is private, is called here alone; the commands annotate their options with
its tyro.conf.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import select
import sys
import time
import typing
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, TypeVar

import tyro
from tyro import _errors as tyro_errors

from ict_fast import errors, torchrun
from ict_fast.commands import COMMANDS
from ict_fast.commands.train import TrainOptions, default_options
from ict_fast.errors import HungError, InputError, TrainingError, did_you_mean
from ict_fast.interruption import Interrupted
from ict_fast.version import __version__

PROGRAM = "ict-fast"
_TRUTH = {"true": True, "True": True, "false": False, "False": False}

Options = TypeVar("Options")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the words after the program's name; by default those of the process.
    Returns:
        the exit code; see `ict_fast.errors`. One of several processes under torchrun that fails does not
        return: it ends at once.
    """
    try:
        code = _main(argv)
    except Exception as error:
        if not torchrun.has_others():
            raise
        sys.excepthook(type(error), error, error.__traceback__)
        time.sleep(torchrun.LEAVING_SECONDS)
        code = errors.EXIT_FAILED
    if code in (errors.EXIT_FAILED, errors.EXIT_BAD_INPUT) and torchrun.has_others():
        torchrun.leave(code)
    return code


def _main(argv: Sequence[str] | None) -> int:
    """What the person can act on becomes a line and an exit code."""
    try:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # a terminal that knows ASCII alone
                stream.reconfigure(errors="replace")
        code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        if sys.stdout is not None:  # closed before the start, as by `>&-`
            sys.stdout.flush()
        return code
    except InputError as error:
        return _give_up(error, errors.EXIT_BAD_INPUT)
    except HungError as error:  # torchrun may start all again: the process that did not come is ended too
        return _complain(error, errors.EXIT_FAILED)
    except TrainingError as error:
        return _give_up(error, errors.EXIT_FAILED)
    except Interrupted as stop:
        with suppress(OSError):
            print(f"{PROGRAM}: {errors.visible(str(stop))}", file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        return _complain(TrainingError("interrupted; nothing more was saved"), errors.EXIT_SIGINT)
    except BrokenPipeError:
        if not _reader_has_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return errors.EXIT_BROKEN_PIPE
    except (RuntimeError, MemoryError) as error:
        if not errors.is_out_of_memory(error):
            raise
        reason = str(error) or type(error).__name__
        return _give_up(TrainingError(f"out of memory: {reason}; fewer images need less"), errors.EXIT_FAILED)
    except OSError as error:  # a folder without permission, a name too long, a full disk
        where = f"{error.filename}: " if error.filename else ""
        return _give_up(InputError(f"{where}{error.strerror or error}"), errors.EXIT_BAD_INPUT)


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
    for number, word in enumerate(argv):
        if not word or (word.startswith("--") and word.endswith("=")):
            before = word.rstrip("=") or (argv[number - 1] if number else PROGRAM)
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
        rest = argv[1:]
        helps = "--help" in rest or "-h" in rest  # whatever is wrong with the rest
        names = ("out", "data", "init", "like")
        given = {name: None if helps else _last_value(rest, f"--{name}") for name in names}
        default = default_options(_preset_name(rest), **given)
    try:
        options = _parse(kind, word, argv[1:], default)
    except SystemExit:  # tyro has printed the help
        return errors.EXIT_DONE
    return command(options)


def _overview() -> str:
    firsts = {name: (kind.__doc__ or "").partition("\n")[0] for name, (kind, _) in COMMANDS.items()}
    lines = [f"{name:<14}{first.split('. ')[0].rstrip('.')}." for name, first in firsts.items()]
    return "\n".join(
        (
            f"usage: {PROGRAM} COMMAND [OPTIONS]",
            "",
            "Trains improved consistency models: images in one step.",
            "",
            *(f"  {line}" for line in lines),
            "",
            f"`{PROGRAM} COMMAND --help` lists its options; `{PROGRAM} --version` prints the version.",
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


def _preset_name(argv: list[str]) -> str | None:
    """The preset, which must be known before the rest is parsed: it sets the other options' defaults."""
    given = []
    for word, following in itertools.pairwise((*argv, "")):
        option, equals, value = word.partition("=")
        if option == "--preset":
            given.append(value if equals else following)
    if len(given) > 1:
        raise InputError(f"--preset is given {len(given)} times: {', '.join(given)}; choose one")
    if not given or given[0] in ("", "-h") or given[0].startswith("--"):
        return None  # tyro says so where the value is missing
    return given[0]


def _last_value(argv: list[str], option: str) -> str | None:
    """What the words give to an option, which must be known before the rest is parsed."""
    value = None
    for word, following in itertools.pairwise((*argv, "")):
        name, equals, attached = word.partition("=")
        if name == option:
            value = attached if equals else following
    return None if value is None or value == "" or value.startswith("--") else value


def _give_up(error: Exception, code: int) -> int:
    """Complains about what another attempt would meet again, and sees to it that torchrun makes none."""
    agent = torchrun.agent()
    if agent is None:
        return _complain(error, code)
    if torchrun.claim():
        _complain(type(error)(f"{error}; torchrun is stopped by SIGTERM, lest it try again"), code)
        torchrun.stop(agent)
    return code


def _complain(error: Exception, code: int) -> int:
    with suppress(OSError):  # the code says it too
        print(f"{PROGRAM}: error: {errors.visible(error)}", file=sys.stderr)
    return code
