"""All tables of the benchmark: those that families declare, how their rows look, and the recorded figures."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jax_deepgemm.core.bench import Control, Row, Table
from jax_deepgemm.tools import registry
from jax_deepgemm.tools.bench import floors

ROOT = Path(__file__).resolve().parents[3]
RECORDED = ROOT / "benchmarks" / "data" / "deepgemm_h200.json"

Result = dict[str, Any]
"""What a result file says of one row."""
Key = tuple[Any, ...]
READ_FLUSH = ("floor us", "read flush us", "read flush floor us")


def tables() -> dict[str, Table]:
    """Returns every table by its name, in the order in which they are shown.

    >>> list(tables())[:3]
    ['fp8', 'fp8_wgrad', 'bf16']
    """
    return _tables(tuple(registry.FOLDERS))


@functools.cache
def _tables(folders: tuple[str, ...]) -> dict[str, Table]:
    parts: dict[str, list[Table]] = {}
    for module in registry.parts("bench"):
        for name, table in module.TABLES.items():
            parts.setdefault(name, []).append(table)
    found = {name: replace(one[0], rows=functools.partial(_rows, one)) for name, one in parts.items()}
    return dict(sorted(found.items(), key=lambda pair: pair[1].order))


def _rows(parts: Sequence[Table], small: bool) -> list[Row]:
    """The rows of a table, of all families that have some."""
    return [row for part in parts for row in part.rows(small)]


def shown(table: Table, rows: Sequence[Result]) -> Table:
    """The table with the columns that only some results have."""
    if table.reads is not None and any("read_flush" in row for row in rows):
        return replace(table, columns=(*table.columns, *READ_FLUSH))
    return table


def baseline_on(table: Table, gpu: bool) -> str:
    """What the baseline is called."""
    return table.baseline if gpu else table.elsewhere or table.baseline


def header(table: Table, gpu: bool) -> list[str]:
    """The titles of all columns."""
    who = {"baseline": baseline_on(table, gpu), "peer": table.peer}
    return [*table.keys, *(column.format(**who) for column in table.columns)]


def key(row: Result) -> Key:
    """What names a row among all tables."""
    return (row["table"], *(row.get(key) for key in tables()[row["table"]].keys))


def cells(table: Table, row: Result, peer: Mapping[str, Any]) -> list[str]:
    """A row as it is shown, beside the recorded one."""
    names = [str(row[key]) for key in table.keys]
    if row["status"] != "ok":
        return [*names, row["status"], *[""] * (len(table.columns) - 1)]
    known = row | {"reads": table.reads(row) if table.reads is not None else None}
    return [*names, *(CELLS[column](known, peer) for column in table.columns)]


def _number(value: float | None, form: str = "{:.1f}") -> str:
    return "–" if value is None else form.format(value)


def _ratio(other: float | None, own: float) -> str:
    return _number(other / own if other else None, "{:.2f}x")


def _beside(row: Result) -> Result:
    return row.get("baseline") or {}


def _over(own: float | None, other: float | None) -> float | None:
    return own / other if own is not None and other else None


def _gigabytes(size: int | None) -> str:
    return _number(None if size is None else size / 1e9, "{:.2f}")


def _clock(figures: Result, name: str) -> str:
    return _number(figures.get("clock", {}).get(name), "{:.0f}")


def _floor(row: Result, flush: str) -> float | None:
    """The floor of reading what a row reads; None of a row that does more."""
    return None if row["reads"] is None else floors.read_us(row["reads"], flush)


CELLS: dict[str, Callable[[Result, Mapping[str, Any]], str]] = {
    "us": lambda row, peer: f"{row['us']:.1f}",
    "TFLOP/s": lambda row, peer: f"{row['tflops']:.0f}",
    "GB/s": lambda row, peer: f"{row['gbytes_per_s']:.0f}",
    "{baseline} us": lambda row, peer: _number(_beside(row).get("us")),
    "{peer} us": lambda row, peer: _number(peer.get("us")),
    "vs {baseline}": lambda row, peer: _ratio(_beside(row).get("us"), row["us"]),
    "vs {peer}": lambda row, peer: _ratio(peer.get("us"), row["us"]),
    "ratio": lambda row, peer: _number(_over(row["us"], _beside(row).get("us")), "{:.2f}"),
    "{baseline} TFLOP/s": lambda row, peer: _number(_beside(row).get("tflops"), "{:.0f}"),
    "all us": lambda row, peer: f"{row['all_us']:.1f}",
    "span us": lambda row, peer: _number(row.get("span_us")),
    "span / GEMMs": lambda row, peer: _number(_over(row.get("span_us"), row.get("gemm_us")), "{:.2f}"),
    "launches": lambda row, peer: _number(row.get("launches"), "{:d}"),
    "temp GB": lambda row, peer: _gigabytes(row.get("temp_bytes")),
    "{baseline} temp GB": lambda row, peer: _gigabytes(_beside(row).get("temp_bytes")),
    "GEMMs us": lambda row, peer: _number(row.get("gemm_us")),
    "rest us": lambda row, peer: _number(row.get("rest_us")),
    "rest": lambda row, peer: _number(row["rest_us"] / row["us"] if "rest_us" in row else None, "{:.0%}"),
    "other us": lambda row, peer: _number(row.get("other_us")),
    "op us": lambda row, peer: _number(row["whole"]["us"]),
    "wall us": lambda row, peer: _number(row["wall_us"]),
    "wall - kernels us": lambda row, peer: _number(row.get("idle_us")),
    "floor us": lambda row, peer: _number(row.get("floor_us", _floor(row, "write"))),
    "read flush us": lambda row, peer: _number(row.get("read_flush", {}).get("us")),
    "read flush floor us": lambda row, peer: _number(_floor(row, "read")),
    "SM MHz": lambda row, peer: _clock(row, "sm_mhz_median"),
    "W": lambda row, peer: _clock(row, "power_w_median"),
    "{baseline} SM MHz": lambda row, peer: _clock(_beside(row), "sm_mhz_median"),
    "{baseline} W": lambda row, peer: _clock(_beside(row), "power_w_median"),
}


def control(result: Result) -> str:
    """What a result says of the state of the machine, in words; "" if nothing.

    >>> control({"control": {"what": "cuBLASLt", "us": 707.0, "reference_us": 714.0}})
    'Control: cuBLASLt 707.0 us, 0.99 of 714.0 us in the reference state.'
    """
    found = result.get("control", {})
    if "us" not in found:
        return ""
    text = f"Control: {found['what']} {found['us']:.1f} us"
    reference = found.get("reference_us")
    if not reference:
        return f"{text}."
    return f"{text}, {found['us'] / reference:.2f} of {reference:.1f} us in the reference state."


def name(row: Result) -> str:
    """A row in words.

    >>> name({"table": "fp8", "m": 1, "n": 2112, "k": 7168})
    'fp8 m=1 n=2112 k=7168'
    """
    keys = tables()[row["table"]].keys
    return " ".join([row["table"], *(f"{key}={row[key]}" for key in keys)])


def _recorded_tables(device: str) -> dict[str, Any]:
    """Those of the file, if the device is of the kind they are from."""
    if "H200" not in device or not RECORDED.is_file():
        return {}
    found: dict[str, Any] = json.loads(RECORDED.read_text())["tables"]
    return found


def recorded(device: str) -> dict[Key, Mapping[str, Any]]:
    """Returns the recorded figures by `key`, if the device is of the kind they are from."""
    data = _recorded_tables(device)
    if not data:
        return {}
    return {
        (name, *values): figures
        for name, table in tables().items()
        for values, figures in table.recorded(data).items()
    }


def control_row() -> Control | None:
    """Returns the control that a family has; there is none where no family has one.

    >>> control_row().row.baseline.what
    'cuBLASLt FP8 8192^3 through jnp'
    """
    found = [module.CONTROL for module in registry.parts("bench") if hasattr(module, "CONTROL")]
    return found[0] if found else None


def reference_us(device: str) -> float | None:
    """Returns what the control took on the machine of the recorded figures.

    >>> reference_us("cpu") is None
    True
    """
    about, data = control_row(), _recorded_tables(device)
    return about.reference(data) if about and data else None
