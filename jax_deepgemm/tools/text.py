"""Plain-text tables and a progress bar, for terminals and log files alike."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from typing import TextIO

_NUMBER = re.compile(r"[\d.,e+-]*\d[\d.,e+-]*( ?[a-zA-Z%/]+)?$")
_BLANK = ("", "-", "–", "failed")


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Returns an aligned table: first column to the left, numbers to the right.

    >>> print(table(["op", "us"], [["gemm", 12.5], ["quantize", 3]]))
    op          us
    --------  ----
    gemm      12.5
    quantize     3
    """
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    right = [_numeric([row[column] for row in cells[1:]]) for column in range(len(header))]
    lines = [
        "  ".join(_padded(*item) for item in zip(row, widths, right, strict=True)).rstrip() for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Returns the same table as GitHub Markdown.

    >>> print(markdown_table(["op", "us"], [["gemm", 12.5]]))
    | op | us |
    |:--|--:|
    | gemm | 12.5 |
    """
    columns = [[str(row[index]) for row in rows] for index in range(len(header))]
    rule = "|".join("--:" if _numeric(column) else ":--" for column in columns)
    body = ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(["| " + " | ".join(header) + " |", f"|{rule}|", *body])


def _numeric(cells: Sequence[str]) -> bool:
    return any(map(_NUMBER.match, cells)) and all(cell in _BLANK or _NUMBER.match(cell) for cell in cells)


def _padded(cell: str, width: int, right: bool) -> str:
    return cell.rjust(width) if right else cell.ljust(width)


def bytes_text(count: float) -> str:
    """Returns a size for people.

    >>> bytes_text(1536)
    '1.5 KiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


class Progress:
    """A bar on stderr for work of known length: drawn in place on a terminal, a line every 10 s elsewhere.

    Nothing is drawn before `quiet` seconds have passed, so short jobs stay silent.

    >>> with Progress(2, "compiling") as progress:
    ...     progress.step("gemm")
    """

    def __init__(self, total: int, label: str, *, quiet: float = 1.0, stream: TextIO | None = None) -> None:
        self.total, self.label, self.done = total, label, 0
        self._stream = stream or sys.stderr
        self._start = time.monotonic()
        self._next = self._start + quiet
        self._width = 0
        self._terminal = self._stream.isatty()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._terminal and self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._stream.flush()

    def step(self, note: str = "") -> None:
        """Counts one piece of work as done."""
        self.done += 1
        self.draw(note)

    def draw(self, note: str = "") -> None:
        """Draws the bar if it is time to; `note` says what is at work."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + (0.1 if self._terminal else 10.0)
        filled = 24 * self.done // max(self.total, 1)
        bar = "#" * filled + "." * (24 - filled)
        line = f"{self.label} [{bar}] {self.done}/{self.total} {now - self._start:.0f}s {note}".rstrip()
        if self._terminal:
            line = line[:110]
            self._stream.write("\r" + line.ljust(self._width))
            self._width = len(line)
        else:
            self._stream.write(line + "\n")
        self._stream.flush()
