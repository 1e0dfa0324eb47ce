"""The tables of results: what names their rows, which columns they have, what they are compared with."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RECORDED = ROOT / "benchmarks" / "data" / "deepgemm_h200.json"

Row = dict[str, Any]
Key = tuple[Any, ...]
RATES = ("us", "TFLOP/s", "GB/s")
BESIDE = ("{baseline} us", "{peer} us", "vs {baseline}", "vs {peer}")


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
    """

    title: str
    keys: tuple[str, ...]
    columns: tuple[str, ...] = (*RATES, *BESIDE, "SM MHz")
    baseline: str = "cuBLASLt"
    peer: str = "DeepGEMM"
    part: Callable[[Row], str] = lambda row: row.get("type", "all")

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


CELLS: dict[str, Callable[[Row, Row], str]] = {
    "us": lambda row, peer: f"{row['us']:.1f}",
    "TFLOP/s": lambda row, peer: f"{row['tflops']:.0f}",
    "GB/s": lambda row, peer: f"{row['gbytes_per_s']:.0f}",
    "{baseline} us": lambda row, peer: _number(row["baseline"].get("us")),
    "{peer} us": lambda row, peer: _number(peer.get("us")),
    "vs {baseline}": lambda row, peer: _ratio(row["baseline"].get("us"), row["us"]),
    "vs {peer}": lambda row, peer: _ratio(peer.get("us"), row["us"]),
    "all us": lambda row, peer: f"{row['all_us']:.1f}",
    "GEMMs us": lambda row, peer: _number(row.get("gemm_us")),
    "rest us": lambda row, peer: _number(row.get("rest_us")),
    "rest": lambda row, peer: _number(row["rest_us"] / row["us"] if "rest_us" in row else None, "{:.0%}"),
    "SM MHz": lambda row, peer: _number(row["clock"].get("sm_mhz_median"), "{:.0f}"),
}


def _range_of_m(row: Row) -> str:
    ranges = {"m <= 256": (0, 256), "m >= 1024": (1024, math.inf)}
    return next((name for name, (low, high) in ranges.items() if low <= row["m"] <= high), "")


_MNK = ("m", "n", "k")
_GROUPED = ("type", "groups", *_MNK)
_NO_BASELINE = (*RATES, "all us", "{peer} us", "vs {peer}", "SM MHz")
TABLES = {
    "fp8": Table(
        "Dense FP8: D = A Bᵀ, A scaled 1x128, B scaled 128x128, bfloat16 result", _MNK, part=_range_of_m
    ),
    "fp8_wgrad": Table(
        "FP8 weight gradient: D = C + A Bᵀ, both scaled 1x128, float32 C and D", _MNK, part=_range_of_m
    ),
    "bf16": Table("Dense BF16: D = A Bᵀ, bfloat16 result", _MNK, part=_range_of_m),
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
}


def name(row: Row) -> str:
    """A row in words.

    >>> name({"table": "fp8", "m": 1, "n": 2112, "k": 7168})
    'fp8 m=1 n=2112 k=7168'
    """
    keys = TABLES[row["table"]].keys
    return " ".join([row["table"], *(f"{key}={row[key]}" for key in keys)])


def recorded(device: str) -> dict[Key, Row]:
    """Returns the recorded figures by `Table.key`, if the device is of the kind they are from."""
    if "H200" not in device or not RECORDED.is_file():
        return {}
    data = json.loads(RECORDED.read_text())["tables"]

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
