"""Plots of result files: time as a multiple of the floor, this package beside what it is compared with."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_deepgemm.tools.bench.catalog import Key, Result, key, recorded, tables
from jax_deepgemm.tools.bench.floors import COPY_RATE, roofline_us

FLOOR = f"floor: bytes at {COPY_RATE / 1e12:.1f} TB/s or operations at the peak"
ROW_INCHES = 0.16
COLUMNS = 2
DOTS_PER_INCH = 80
COLOURS = 32


def each(result: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """Draws a file for every table that is plotted and has rows, and returns their paths (or none)."""
    written = []
    for name in tables():
        panels = _panels(result, [name])
        target = folder / f"{stem}-{name}.png"
        if panels and _draw(panels, 1, result["device"], target):
            written.append(target)
    return written


def together(result: dict[str, Any], target: Path) -> bool:
    """Draws all tables into one file. Returns False without matplotlib, or without rows."""
    panels = _panels(result, list(tables()))
    return bool(panels) and _draw(panels, COLUMNS, result["device"], target)


def plotted(result: dict[str, Any]) -> bool:
    """Whether plots show any row of a result."""
    return bool(_panels(result, list(tables())))


def _panels(result: dict[str, Any], names: Sequence[str]) -> list[tuple[str, list[Result]]]:
    """Titles and rows: a panel for each type of operands that a table has."""
    known, found = tables(), dict[str, list[Result]]()
    for row in result["rows"]:
        if row["table"] in names and row["status"] == "ok" and known[row["table"]].plotted(row):
            found.setdefault(_title(row), []).append(row)
    return sorted(found.items(), key=lambda panel: names.index(panel[1][0]["table"]))


def _title(row: Result) -> str:
    one_type = tables()[row["table"]].type or "type" not in row
    return str(row["table"]) if one_type else f"{row['table']}, {row['type']}"


def series(rows: Sequence[Result], peers: Mapping[Key, Mapping[str, Any]]) -> dict[str, list[float]]:
    """Returns, by whose they are, times as multiples of the floor; nan where there is none.

    >>> row = {"table": "fp8", "m": 1, "n": 128, "k": 128, "us": 10.0, "tflops": 0, "gbytes_per_s": 2150}
    >>> series([row | {"baseline": {"us": 20.0}}], {})
    {'jax_deepgemm': [2.0], 'cuBLASLt': [4.0]}
    """
    found: dict[str, list[float]] = {}
    for index, row in enumerate(rows):
        about = tables()[row["table"]]
        floor = roofline_us(row, about.type or row.get("type", ""))
        beside = peers.get(key(row), {}).get("us"), (row.get("baseline") or {}).get("us")
        for who, us in zip(("jax_deepgemm", about.peer, about.baseline), (row["us"], *beside), strict=True):
            if us and floor:
                found.setdefault(who, [math.nan] * len(rows))[index] = us / floor
    return found


def _label(row: Result) -> str:
    """The sizes that name a row; a single group goes without saying."""
    sizes = {key: row[key] for key in tables()[row["table"]].keys if isinstance(row[key], int)}
    return " x ".join(str(size) for key, size in sizes.items() if (key, size) != ("groups", 1))


def _draw(panels: Sequence[tuple[str, list[Result]]], columns: int, device: str, target: Path) -> bool:
    try:
        import matplotlib
    except ImportError:
        print("bench: no plot, matplotlib is missing; pip install 'jax-deepgemm[bench]'", file=sys.stderr)
        return False
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    columns = min(columns, len(panels))
    lines = -(-len(panels) // columns)
    most = max(len(rows) for _, rows in panels)
    size = (columns * max(5.0, 1.2 + ROW_INCHES * most), 4.4 * lines)
    figure, grid = plt.subplots(lines, columns, figsize=size, squeeze=False)
    peers = recorded(device)
    for axis in grid.flat[len(panels) :]:
        axis.remove()
    for axis, (title, rows) in zip(grid.flat, panels, strict=False):
        _panel(axis, title, rows, peers)
    figure.tight_layout()
    target.parent.mkdir(parents=True, exist_ok=True)
    _save(figure, target)
    plt.close(figure)
    return True


def _save(figure: Any, target: Path) -> None:
    """Writes a PNG of few colours, a quarter as large as one of all."""
    from PIL import Image  # which matplotlib needs too

    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DOTS_PER_INCH)
    few = (
        Image.open(drawn)
        .convert("RGB")
        .quantize(COLOURS, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    )
    few.save(target, optimize=True)


def _panel(axis: Any, title: str, rows: Sequence[Result], peers: Mapping[Key, Mapping[str, Any]]) -> None:
    labels = list(map(_label, rows))
    for (who, multiples), style in zip(series(rows, peers).items(), ("o-", "s:", "^:"), strict=False):
        axis.plot(range(len(rows)), multiples, style, ms=3, lw=1, label=who)
    axis.axhline(1, color="black", lw=0.8, label=FLOOR)
    axis.set(title=title, ylabel="time / floor", yscale="log")
    axis.set_xticks(range(len(rows)), labels, rotation=90, fontsize=6)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.tick_params(axis="y", which="both", labelsize=7)
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=7)
