"""What all commands share: a parser that is short about wrong values, and the types of its arguments.

A wrong value, file or variable is one line on stderr and exit code 2, before anything is started: argparse
types raise `argparse.ArgumentTypeError`, commands raise `UsageError`. A flag that there is not, or one that
is missing, shows the usage of its command too.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jax_deepgemm.core.shapes import clipped

EXIT_CODES = """exit codes:
  0    success
  1    a check, a kernel or a measurement failed
  2    wrong arguments, files or environment variables; nothing was started
  130  interrupted
"""
MOST_CALLS = 1_000_000
MOST_SECONDS = 1e7
LONGEST_LINE = 1500


class UsageError(ValueError):
    """What a user gave cannot be used; the message is one line: what was given, the rule, the way out."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line, preceded by the usage where flags are wrong."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuses unknown flags here, so that a command shows its own usage."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unknown argument {' '.join(unknown)}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        about_a_value = message.startswith("argument ")  # so argparse has it
        usage = "" if about_a_value else self.format_usage()
        text = one_line(message.removeprefix("argument "))
        self.exit(2, f"{usage}{self.prog.split()[-1]}: {text}\n")


def one_line(message: str) -> str:
    """A message as one line of bearable length.

    >>> one_line("no\\n  such thing")
    'no such thing'
    """
    text = " ".join(message.split())
    return text if len(text) <= LONGEST_LINE else f"{text[:LONGEST_LINE]}..."


@contextlib.contextmanager
def refusing(what: str = "") -> Iterator[None]:
    """Makes the errors of a `with` block that are about what a user gave into a `UsageError`.

    >>> with refusing("shapes.csv"):
    ...     raise ValueError("line 3: m is 0")
    Traceback (most recent call last):
    jax_deepgemm.cli.arguments.UsageError: shapes.csv: line 3: m is 0
    """
    try:
        yield
    except UsageError:
        raise
    except (OSError, ValueError, OverflowError) as error:
        text = str(error)
        if isinstance(error, OSError) and error.strerror:
            what, text = what or str(error.filename), error.strerror
        raise UsageError(f"{what}: {text}" if what else text) from error


def read_text(path: str | Path) -> str:
    """Returns the content of a file, or of stdin for "-".

    Raises:
      UsageError: there is no such file, or it is no text.
    """
    with refusing(spelt(path)):
        if str(path) != "-":
            return Path(path).read_text(encoding="utf-8-sig")
        if sys.stdin is None:
            raise ValueError("it is closed")
        return sys.stdin.read()


def spelt(path: str | Path) -> str:
    """The name of what is read, for messages."""
    return "stdin" if str(path) == "-" else str(path)


def whole(least: int, most: int) -> Callable[[str], int]:
    """Returns the type of a whole number.

    >>> whole(1, 64)("0")
    Traceback (most recent call last):
    argparse.ArgumentTypeError: got '0', need a whole number from 1 to 64
    """

    def read(text: str) -> int:
        plain = re.fullmatch(r"[+-]?[0-9]{1,18}", text.strip())
        if plain is None or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(
                f"got {clipped(text)}, need a whole number from {least} to {most}"
            )
        return int(text)

    return read


def _number(text: str, rule: str, holds: Callable[[float], bool]) -> float:
    with contextlib.suppress(ValueError):
        value = float(text)
        if math.isfinite(value) and holds(value):
            return value
    raise argparse.ArgumentTypeError(f"got {clipped(text)}, need {rule}")


def seconds(text: str) -> float:
    """The type of a duration.

    >>> seconds("-1")
    Traceback (most recent call last):
    argparse.ArgumentTypeError: got '-1', need a number of seconds above 0, at most 10000000
    """
    rule = f"a number of seconds above 0, at most {MOST_SECONDS:.0f}"
    return _number(text, rule, lambda value: 0 < value <= MOST_SECONDS)


def above_zero(text: str) -> float:
    """The type of a factor."""
    return _number(text, "a number above 0", lambda value: value > 0)


def from_zero(text: str) -> float:
    """The type of a number that may be 0."""
    return _number(text, "a number, at least 0", lambda value: value >= 0)


def expression(text: str) -> re.Pattern[str]:
    """The type of a regular expression.

    >>> expression("[")
    Traceback (most recent call last):
    argparse.ArgumentTypeError: got '[', no regular expression: unterminated character set at position 0
    """
    try:
        return re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise argparse.ArgumentTypeError(f"got {clipped(text)}, no regular expression: {error}") from None


def names(text: str) -> list[str]:
    """The type of a comma-separated list.

    >>> names("fp8, bf16")
    ['fp8', 'bf16']
    """
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise argparse.ArgumentTypeError(f"got {clipped(text)}, need names, separated by commas")
    return found


def names_of(allowed: Sequence[str], what: str) -> Callable[[str], list[str]]:
    """Returns the type of a comma-separated list of known names.

    >>> names_of(("fp8", "bf16"), "table")("fp9")
    Traceback (most recent call last):
    argparse.ArgumentTypeError: no table fp9; there are fp8, bf16
    """

    def read(text: str) -> list[str]:
        if unknown := [name for name in names(text) if name not in allowed]:
            there = ", ".join(allowed)
            raise argparse.ArgumentTypeError(f"no {what} {', '.join(unknown)}; there are {there}")
        return names(text)

    return read


def input_file(text: str) -> Path:
    """The type of a file to read."""
    path = _path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder, need a file")
    if not path.exists():
        raise argparse.ArgumentTypeError(f"{text}: no such file")
    if not os.access(path, os.R_OK):
        raise argparse.ArgumentTypeError(f"{text} cannot be read: no permission")
    return path


def input_file_or_stdin(text: str) -> Path:
    """The type of a file to read, where "-" is stdin."""
    return Path(text) if text == "-" else input_file(text)


def input_folder(text: str) -> Path:
    """The type of a folder to read."""
    path = _path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: {'a file' if path.exists() else 'no such folder'}")
    return path


def output_file(text: str) -> Path:
    """The type of a file to write; folders on the way to it are made when it is."""
    path = _path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder, need a file to write")
    if path.exists() and not os.access(path, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} cannot be written: no permission")
    _check_place(text, path.parent)
    return path


def output_folder(text: str) -> Path:
    """The type of a folder to write into; it is made when it is needed."""
    path = _path(text)
    _check_place(text, path)
    return path


def _path(text: str) -> Path:
    if not text.strip():
        raise argparse.ArgumentTypeError("got an empty name, need a path")
    try:
        path = Path(text).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, RuntimeError, ValueError) as error:
        about = error.strerror if isinstance(error, OSError) else error
        raise argparse.ArgumentTypeError(f"{clipped(text)}: {about}") from None
    return path


def _check_place(text: str, folder: Path) -> None:
    """Whether a folder, or the first of its parents that there is, can be written."""
    there = next(place for place in (folder, *folder.absolute().parents) if os.path.exists(place))
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"{text} cannot be written: {there} is a file")
    if not os.access(there, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} cannot be written: no permission in {there}")
