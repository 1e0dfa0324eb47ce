"""The tables of results: what names their rows, which columns they have, what they are compared with."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jax_deepgemm.tools.bench import floors

ROOT = Path(__file__).resolve().parents[3]
RECORDED = ROOT / "benchmarks" / "data" / "deepgemm_h200.json"

Row = dict[str, Any]
Key = tuple[Any, ...]
RATES = ("us", "TFLOP/s", "GB/s")
BESIDE = ("{baseline} us", "{peer} us", "vs {baseline}", "vs {peer}")
BESIDE_BASELINE = ("{baseline} us", "vs {baseline}")
READ_FLUSH = ("floor us", "read flush us", "read flush floor us")


@dataclass(frozen=True)
class Table:
    """How one table is shown.

    Attributes:
      title: its heading.
      keys: the fields that name a row.
      columns: what else is shown of it, see `CELLS`.
      baseline: what was measured beside it (elsewhere than on a GPU, XLA stands for cuBLASLt).
      peer: what its recorded figures are of.
      part: the line of the summary that a row counts in; "" for none.
      small_m: whether rows of few m are also timed after another flush (columns shown where one was).
    """

    title: str
    keys: tuple[str, ...]
    columns: tuple[str, ...] = (*RATES, *BESIDE, "SM MHz")
    baseline: str = "cuBLASLt"
    peer: str = "DeepGEMM"
    part: Callable[[Row], str] = lambda row: row.get("type", "all")
    small_m: bool = False

    def shown(self, rows: Sequence[Row]) -> Table:
        """The table with the columns that only some results have."""
        if self.small_m and any("read_flush" in row for row in rows):
            return replace(self, columns=(*self.columns, *READ_FLUSH))
        return self

    def baseline_on(self, gpu: bool) -> str:
        return "XLA" if self.baseline == "cuBLASLt" and not gpu else self.baseline

    def header(self, gpu: bool) -> list[str]:
        """The titles of all columns."""
        names = {"baseline": self.baseline_on(gpu), "peer": self.peer}
        return [*self.keys, *(column.format(**names) for column in self.columns)]

    def key(self, row: Row) -> Key:
        """What names a row among all tables."""
        return (row["table"], *(row.get(key) for key in self.keys))

    def cells(self, row: Row, peer: Row) -> list[str]:
        """A row as it is shown, beside the recorded one."""
        names = [str(row[key]) for key in self.keys]
        if row["status"] != "ok":
            return [*names, row["status"], *[""] * (len(self.columns) - 1)]
        return [*names, *(CELLS[column](row, peer) for column in self.columns)]


def _number(value: float | None, form: str = "{:.1f}") -> str:
    return "–" if value is None else form.format(value)


def _ratio(other: float | None, own: float) -> str:
    return _number(other / own if other else None, "{:.2f}x")


def _beside(row: Row) -> Row:
    return row.get("baseline") or {}


def _over(own: float, other: float | None) -> float | None:
    return own / other if other else None


def _clock(figures: Row, name: str) -> str:
    return _number(figures.get("clock", {}).get(name), "{:.0f}")


CELLS: dict[str, Callable[[Row, Row], str]] = {
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
    "GEMMs us": lambda row, peer: _number(row.get("gemm_us")),
    "rest us": lambda row, peer: _number(row.get("rest_us")),
    "rest": lambda row, peer: _number(row["rest_us"] / row["us"] if "rest_us" in row else None, "{:.0%}"),
    "other us": lambda row, peer: _number(row.get("other_us")),
    "op us": lambda row, peer: _number(row["whole"]["us"]),
    "wall us": lambda row, peer: _number(row["wall_us"]),
    "wall - kernels us": lambda row, peer: _number(row.get("idle_us")),
    "floor us": lambda row, peer: _number(floors.operand_us(row, "write")),
    "read flush us": lambda row, peer: _number(row.get("read_flush", {}).get("us")),
    "read flush floor us": lambda row, peer: _number(floors.operand_us(row, "read")),
    "SM MHz": lambda row, peer: _clock(row, "sm_mhz_median"),
    "W": lambda row, peer: _clock(row, "power_w_median"),
    "{baseline} SM MHz": lambda row, peer: _clock(_beside(row), "sm_mhz_median"),
    "{baseline} W": lambda row, peer: _clock(_beside(row), "power_w_median"),
}


def _range_of_m(row: Row) -> str:
    ranges = {"m <= 256": (0, 256), "m >= 1024": (1024, math.inf)}
    return next((name for name, (low, high) in ranges.items() if low <= row["m"] <= high), "")


_MNK = ("m", "n", "k")
_GROUPED = ("type", "groups", *_MNK)
_NO_BASELINE = (*RATES, "all us", "{peer} us", "vs {peer}", "SM MHz")
TABLES = {
    "fp8": Table(
        "Dense FP8: D = A Bᵀ, A scaled 1x128, B scaled 128x128, bfloat16 result",
        _MNK,
        part=_range_of_m,
        small_m=True,
    ),
    "fp8_wgrad": Table("FP8 weight gradient: D = C + A Bᵀ, both scaled 1x128, float32 C and D", _MNK),
    "bf16": Table("Dense BF16: D = A Bᵀ, bfloat16 result", _MNK, part=_range_of_m, small_m=True),
    "m_grouped": Table(
        "M-grouped contiguous: rows of A in groups, m expected in each (padded: to multiples of 128)",
        ("type", "sizes", *_GROUPED[1:]),
        columns=_NO_BASELINE,
        part=lambda row: f"{row['type']}, {row['sizes']}",
    ),
    "masked": Table(
        "M-grouped masked: A [groups, capacity, k], m valid rows expected in each", _GROUPED, _NO_BASELINE
    ),
    "k_grouped": Table(
        "K-grouped (weight gradient): D = C + Aᵀ B of each group, k expected in each, float32 C and D",
        _GROUPED,
        _NO_BASELINE,
    ),
    "ragged_dot": Table(
        "jax_deepgemm.ragged_dot, BF16, m rows expected in each group",
        _GROUPED,
        baseline="jax.lax.ragged_dot",
        peer="tokamax",
    ),
    "quantize": Table(
        "Quantising kernels of [m, n] bfloat16, beside a copy of as many bytes",
        ("kind", "m", "n"),
        columns=("us", "GB/s", "{baseline} us", "vs {baseline}", "SM MHz"),
        baseline="copy",
        part=lambda row: row["kind"],
    ),
    "moe": Table(
        "A layer of experts, from the router's logits to the combined tokens, all kernels",
        ("recipe", "what", "tokens", "hidden", "inner", "experts", "top_k"),
        columns=("us", "TFLOP/s", "GEMMs us", "rest us", "rest", "SM MHz"),
        part=lambda row: "",
    ),
    "shapes": Table(
        "Shapes of other models; m of m_grouped: rows expected in each group",
        ("op", *_GROUPED),
        columns=(*RATES, *BESIDE_BASELINE, "SM MHz"),
        part=lambda row: f"{row['op']} {row['type']}",
    ),
    "skew": Table(
        "Groups of very different sizes beside as many rows spread evenly: one group with half of all m rows,"
        " or few rows for each of many groups; ratio of times, smaller is better",
        ("type", "case", *_GROUPED[1:]),
        columns=("us", "TFLOP/s", "GB/s", "{baseline} us", "ratio", "SM MHz"),
        baseline="even sizes",
        part=lambda row: f"{row['type']}, {row['case']}",
    ),
    "sustained": Table(
        "FP8 back to back, half a second each in turns, without flush, by the wall clock",
        _MNK,
        columns=(
            *("us", "TFLOP/s", "{baseline} us", "{baseline} TFLOP/s", "vs {baseline}"),
            *("SM MHz", "{baseline} SM MHz", "W", "{baseline} W"),
        ),
    ),
    "op": Table(
        "Whole FP8 op under jit: the GEMM alone (us), other kernels of its program (must be 0), all kernels"
        " with A quantised in the program (op), and that by the wall clock, calls queued without flush",
        _MNK,
        columns=("us", "all us", "other us", "op us", "wall us", "wall - kernels us", "SM MHz"),
    ),
}


def control(result: Row) -> str:
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


def name(row: Row) -> str:
    """A row in words.

    >>> name({"table": "fp8", "m": 1, "n": 2112, "k": 7168})
    'fp8 m=1 n=2112 k=7168'
    """
    keys = TABLES[row["table"]].keys
    return " ".join([row["table"], *(f"{key}={row[key]}" for key in keys)])


def _recorded_tables(device: str) -> dict[str, Any]:
    """Those of the file, if the device is of the kind they are from."""
    if "H200" not in device or not RECORDED.is_file():
        return {}
    found: dict[str, Any] = json.loads(RECORDED.read_text())["tables"]
    return found


def reference_us(device: str) -> float | None:
    """Returns what the control took on the machine of the recorded figures.

    >>> reference_us("cpu") is None
    True
    """
    rows = _recorded_tables(device).get("jax_today", {"rows": []})["rows"]
    about = ["m=8192 n=8192 k=8192", "fp8 dot without scales"]
    return next((float(us) for *what, us, _ in rows if what == about), None)


def recorded(device: str) -> dict[Key, Row]:
    """Returns the recorded figures by `Table.key`, if the device is of the kind they are from."""
    data = _recorded_tables(device)
    if not data:
        return {}

    def rows(source: str) -> list[Row]:
        return [dict(zip(data[source]["columns"], cells, strict=True)) for cells in data[source]["rows"]]

    found: dict[Key, Row] = {}
    for table in ("fp8", "fp8_wgrad", "bf16"):
        found |= {(table, *(row[key] for key in _MNK)): row for row in rows(table)}
    for table, source, sizes in (
        ("m_grouped", "m_grouped_contiguous", (("padded",), ("drawn",))),
        ("masked", "m_grouped_masked", ((),)),
        ("k_grouped", "k_grouped", ((),)),
    ):
        for row in rows(source):
            for kind in ("fp8", "bf16"):
                figures = {"us": row[f"{kind}_us"], "tflops": row[f"{kind}_tflops"]}
                shape = [row[key] for key in _GROUPED[1:]]
                found |= {(table, kind, *how, *shape): figures for how in sizes}
    for row in rows("ragged_dot"):
        found["ragged_dot", "bf16", *(row[key] for key in _GROUPED[1:])] = {"us": row["tokamax_us"]}
    return found
