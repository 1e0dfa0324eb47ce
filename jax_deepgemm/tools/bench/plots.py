"""Plots of result files: time as a multiple of the floor, this package beside what it is compared with."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax_deepgemm.tools.bench.catalog import TABLES, Key, Row, recorded
from jax_deepgemm.tools.bench.floors import COPY_RATE, kind, roofline_us

FAMILIES = ("fp8", "fp8_wgrad", "bf16", "m_grouped", "masked", "k_grouped", "ragged_dot", "shapes")
FLOOR = f"floor: bytes at {COPY_RATE / 1e12:.1f} TB/s or operations at the peak"
ROW_INCHES = 0.16
COLUMNS = 2


def each(result: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """Draws a file for every family of which there are rows, and returns their paths (or none)."""
    written = []
    for family in FAMILIES:
        panels = _panels(result, [family])
        target = folder / f"{stem}-{family}.svg"
        if panels and _draw(panels, 1, result["device"], target):
            written.append(target)
    return written


def together(result: dict[str, Any], target: Path) -> bool:
    """Draws all families into one file. Returns False without matplotlib, or without rows."""
    panels = _panels(result, FAMILIES)
    return bool(panels) and _draw(panels, COLUMNS, result["device"], target)


def _panels(result: dict[str, Any], families: Sequence[str]) -> list[tuple[str, list[Row]]]:
    """Titles and rows: of each family one panel for FP8 and one for BF16, of `m_grouped` the padded rows."""
    found: dict[str, list[Row]] = {}
    for row in result["rows"]:
        if row["table"] in families and row["status"] == "ok" and _is_compared(row):
            found.setdefault(_title(row), []).append(row)
    return sorted(found.items(), key=lambda panel: families.index(panel[1][0]["table"]))


def _title(row: Row) -> str:
    return row["table"] if kind(row) in row["table"] else f"{row['table']}, {kind(row)}"


def _is_compared(row: Row) -> bool:
    return row["table"] != "m_grouped" or row["sizes"] == "padded"


def series(rows: Sequence[Row], peers: dict[Key, Row]) -> dict[str, list[float]]:
    """Returns, by whose they are, times as multiples of the floor; nan where there is none.

    >>> row = {"table": "fp8", "m": 1, "n": 128, "k": 128, "us": 10.0, "tflops": 0, "gbytes_per_s": 2150}
    >>> series([row | {"baseline": {"us": 20.0}}], {})
    {'jax_deepgemm': [2.0], 'cuBLASLt': [4.0]}
    """
    found: dict[str, list[float]] = {}
    for index, row in enumerate(rows):
        about, floor = TABLES[row["table"]], roofline_us(row)
        beside = peers.get(about.key(row), {}).get("us"), (row.get("baseline") or {}).get("us")
        for who, us in zip(("jax_deepgemm", about.peer, about.baseline), (row["us"], *beside), strict=True):
            if us and floor:
                found.setdefault(who, [math.nan] * len(rows))[index] = us / floor
    return found


def _label(row: Row) -> str:
    keys = ("groups", "m", "n", "k") if row.get("groups", 1) > 1 else ("m", "n", "k")
    return " x ".join(str(row[key]) for key in keys)


def _draw(panels: Sequence[tuple[str, list[Row]]], columns: int, device: str, target: Path) -> bool:
    try:
        import matplotlib
    except ImportError:
        print("bench: no plot, matplotlib is missing; pip install 'jax-deepgemm[bench]'", file=sys.stderr)
        return False
    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "jax_deepgemm", "svg.fonttype": "none"}
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
    figure.savefig(target, metadata={"Date": None})
    plt.close(figure)
    return True


def _panel(axis: Any, title: str, rows: Sequence[Row], peers: dict[Key, Row]) -> None:
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
