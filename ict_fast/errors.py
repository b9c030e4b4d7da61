"""What a user sees when something goes wrong: one clear line and an exit code, never a traceback.

Exit codes: 0 done, 1 training failed or memory ran out, 2 bad input, 130 SIGINT and 143 SIGTERM after saving,
141 when the reader of the output has gone (`ict-fast ... | head`).
"""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_SIGINT = 130
EXIT_BROKEN_PIPE = 141
EXIT_SIGTERM = 143
_LONGEST_LINE = 1000


class InputError(Exception):
    """The person gave something that cannot work: what was wrong, the value seen, what would be right.

    The message is one line. The command line prints it and exits with code 2.
    """


class TrainingError(Exception):
    """Training could not go on although the input was right. One line; exit code 1."""


class DivergedError(TrainingError):
    """Weights, gradients or images are not finite: what was asked for has no better answer."""


class HungError(TrainingError):
    """A process waited for another one that did not come."""


def visible(message: object) -> str:
    r"""A message as one line that a terminal shows and does not obey, of at most about 1,000 characters.

    Names in it may come out of a file: an escape character is shown as \x1b.
    """
    text = " ".join(str(message).split())
    if len(text) > _LONGEST_LINE:
        text = f"{text[: _LONGEST_LINE - 300]} ... {text[-300:]}"  # what would be right is said at the end
    return printable(text)


def printable(text: str) -> str:
    r"""Letters as a terminal shows them: an escape character is \x1b, a new line \n."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii") for letter in text
    )


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory was not to be had, the machine's or the GPU's; told without torch."""
    # The CPU's allocator raises a plain RuntimeError.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "allocate memory" in str(error)
    )


def is_system_error(error: Exception) -> bool:
    """Whether a file failed or memory was not to be had: no fault of the input or of the code."""
    return isinstance(error, OSError) or is_out_of_memory(error)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The hint that follows an unknown name: the nearest right one, or all of them if none is near.

    Args:
        word: what was typed.
        known: the names that would have been right.
    Returns:
        `; did you mean "digits"?` or `; choose one of: a, b, c`. Never empty if `known` is not.
    """
    names = sorted(known)
    meant = "cuda" if word == "gpu" else word  # else "cpu" is the nearest
    near = difflib.get_close_matches(meant, names, n=1, cutoff=0.6)
    if near:
        return f'; did you mean "{near[0]}"?'
    return f"; choose one of: {', '.join(names)}" if names else ""


def refusal(event: Any, kinds: Mapping[str, object], argv: Sequence[str], command: str) -> str:
    """What tyro refuses, in one line: it takes the place of tyro's boxes.

    Args:
        event: a `ParseErrorEvent` of tyro 1.0.17, told apart by its class's name, so that only cli.py
            imports tyro. A kind of event that is not known here still gives a line.
        kinds: every option of the command, spelled with dashes, and its Python type.
        argv: the words that were parsed.
        command: such as `ict-fast train`.
    """
    help_command, name = f"{command} --help", type(event).__name__
    if name == "UnrecognizedArgs" and not any(token.startswith("-") for token in event.tokens):
        return f'unexpected argument "{event.tokens[0]}"; `{help_command}` lists the options'
    argument = getattr(event, "argument", None)
    option = "" if argument is None else str(argument.lowered.name_or_flags[0])
    if name in ("UnrecognizedArgs", "MissingArgs") or (name == "BadValue" and not option.startswith("-")):
        # A positional that seems to be missing is often an unknown option's fault: `sample --cuont 3 RUN`.
        for word in getattr(event, "tokens", argv):
            if word.startswith("-") and not _is_number(word) and not _is_known(word, kinds):
                return unknown_option(word, kinds, help_command)
        if name == "UnrecognizedArgs":
            return f'unexpected argument "{event.tokens[0]}"; `{help_command}` lists the options'
        missing = [given.arg for given in getattr(event, "missing_arguments", ())] or [argument]
        return f"{command} needs {' and '.join(map(_name, missing))}; see `{help_command}`"
    if argument is None:
        return f"cannot read the command line ({name}); see `{help_command}`"
    if name == "InvalidChoice":
        label = option if option.startswith("-") else command
        return f'{label} "{event.value}"{did_you_mean(event.value, event.choices)}'
    if name == "InstantiationFailure":
        return bad_value(option, _seen(option, argv), kinds.get(option))
    return missing_value(option, kinds.get(option))


def _name(argument: Any) -> str:
    """What is to be typed: an option and its value, the values of a positional argument or what it is."""
    option = str(argument.lowered.name_or_flags[0])
    value = ", ".join(argument.lowered.choices or [str(argument.lowered.metavar)])
    return f"{option} {value}" if option.startswith("-") else value


def _is_known(word: str, kinds: Mapping[str, object]) -> bool:
    option = word.partition("=")[0].replace("_", "-")
    positive = re.sub(r"(^--|\.)no-(?=[^.]*$)", r"\1", option)  # --data.no-flip, not --no-data.flip
    return option in kinds or positive in kinds or option in ("--", "--help", "-h")


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _seen(option: str, argv: Sequence[str]) -> str:
    """The words given to an option, the last time it was given."""
    seen: list[str] = []
    inside = False
    for word in argv:
        name, equals, value = word.partition("=")
        if name.replace("_", "-") == option:
            inside, seen = not equals, [value] if equals else []
        elif word.startswith("--"):
            inside = False
        elif inside:
            seen.append(word)
    return " ".join(seen)


def unknown_option(token: str, known: Iterable[str], help_command: str) -> str:
    """The message for an option that does not exist.

    A field without its section (`--lr`), or with another one's, finds its whole name (`--optimizer.lr`).

    Args:
        token: what was typed, such as `--training.totl-steps` or `--lr=1`.
        known: every option of the command, spelled with dashes.
        help_command: lists the options; named if none of them is near.
    """
    options = sorted(known)
    typed = token.partition("=")[0]
    wanted = typed.replace("_", "-")
    name = wanted.strip("-")
    fields = {option: option.lstrip("-").split(".")[-1] for option in options}
    same_field = [option for option in options if fields[option] == name.split(".")[-1]]
    part_of = sorted((option for option in options if name in fields[option].split("-")), key=len)
    near = (
        difflib.get_close_matches(wanted, same_field, n=1, cutoff=0)
        or part_of
        or difflib.get_close_matches(wanted, options, n=1, cutoff=0.6)
    )
    hint = f'did you mean "{near[0]}"?' if near else f"`{help_command}` lists them"
    return f"unknown option {typed}; {hint}"


def missing_value(option: str, kind: object) -> str:
    """The message for an option whose value is absent or incomplete; `kind` is its Python type."""
    return f"{option} needs {expected(kind)}"


def bad_value(option: str, seen: str, kind: object) -> str:
    """The message for a value that is not of the option's Python type `kind`."""
    return f"{option} {seen}: expected {expected(kind)}"


def expected(kind: object) -> str:
    """A Python type in words: `int | None` is "an integer", `tuple[float, float]` "2 numbers"."""
    members = [member for member in typing.get_args(kind) if member is not type(None)]
    if typing.get_origin(kind) is tuple:
        plural = "integers" if members[0] is int else "numbers" if members[0] is float else "values"
        return plural if members[-1] is Ellipsis else f"{len(members)} {plural}"
    if typing.get_origin(kind) is typing.Literal:
        return f"one of: {', '.join(map(str, members))}"
    if members:
        return expected(members[0])
    words = {int: "an integer", float: "a number", Path: "a path"}
    return words.get(typing.cast(type, kind), "a value")
