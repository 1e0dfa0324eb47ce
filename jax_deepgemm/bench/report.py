"""Tables and plots from result files: for the terminal, docs/benchmarks.md and README.md."""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jax_deepgemm.cli.text import markdown_table, table

ROOT = Path(__file__).resolve().parents[2]
RECORDED = ROOT / "benchmarks" / "data" / "deepgemm_h200.json"
BEGIN, END = "<!-- begin generated: {} -->", "<!-- end generated: {} -->"
COMMAND = "python -m jax_deepgemm bench --report benchmarks/results/*.json --write"
TITLES = {
    "fp8": "Dense FP8: D = A Bᵀ, A scaled 1x128, B scaled 128x128, bfloat16 result",
    "fp8_wgrad": "FP8 weight gradient: D = C + A Bᵀ, both scaled 1x128, float32 C and D",
    "bf16": "Dense BF16: D = A Bᵀ, bfloat16 result",
}
COLUMNS = ("m", "n", "k", "us", "TFLOP/s", "GB/s", "{} us", "DeepGEMM us", "vs {}", "vs DeepGEMM", "SM MHz")
SUMMARY = ("table", "rows of A", "rows", "vs {}", "worst", "vs DeepGEMM", "worst")
README_ROWS = (
    ("fp8", 1, 7168, 16384),
    ("fp8", 64, 4096, 7168),
    ("fp8", 128, 7168, 2048),
    ("fp8", 4096, 4096, 7168),
    ("fp8", 4096, 7168, 2048),
    ("fp8", 8192, 7168, 16384),
    ("fp8_wgrad", 4096, 7168, 4096),
    ("bf16", 128, 4096, 7168),
    ("bf16", 4096, 4096, 7168),
)


def load(path: Path) -> dict[str, Any]:
    """Reads a result file.

    Raises:
      ValueError: not a result file of this version.
    """
    try:
        result = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"bench: {path} is not a result file: {error}") from error
    if not isinstance(result, dict) or result.get("schema") != 1 or "rows" not in result:
        raise ValueError(
            f"bench: {path} is not a result file of schema 1; measure again with python -m jax_deepgemm bench"
        )
    return result


def recorded(device: str) -> dict[tuple[str, int, int, int], dict[str, float]]:
    """Returns DeepGEMM's recorded figures by (table, m, n, k), if the device is of the kind they are from."""
    if "H200" not in device or not RECORDED.is_file():
        return {}
    data = json.loads(RECORDED.read_text())["tables"]
    rows = {}
    for name in TITLES:
        columns = data[name]["columns"]
        for cells in data[name]["rows"]:
            row = dict(zip(columns, cells, strict=True))
            rows[name, row["m"], row["n"], row["k"]] = row
    return rows


def _cells(row: dict[str, Any], peer: dict[str, float]) -> list[str]:
    shape = [str(row[key]) for key in "mnk"]
    if row["status"] != "ok":
        return [*shape, "failed", *[""] * (len(COLUMNS) - 4)]
    base = row["baseline"].get("us")
    theirs = peer.get("us")
    clock = row["clock"].get("sm_mhz_median")
    return [
        *shape,
        f"{row['us']:.1f}",
        f"{row['tflops']:.0f}",
        f"{row['gbytes_per_s']:.0f}",
        f"{base:.1f}" if base else "–",
        f"{theirs:.1f}" if theirs else "–",
        f"{base / row['us']:.2f}x" if base else "–",
        f"{theirs / row['us']:.2f}x" if theirs else "–",
        f"{clock:.0f}" if clock else "–",
    ]


def _tables(result: dict[str, Any]) -> Iterable[tuple[str, list[list[str]]]]:
    peers = recorded(result["device"])
    for name in TITLES:
        rows = [row for row in result["rows"] if row["table"] == name]
        if rows:
            yield name, [_cells(row, peers.get((name, row["m"], row["n"], row["k"]), {})) for row in rows]


def summary(result: dict[str, Any]) -> list[list[str]]:
    """Returns, per table and range of m, geometric mean and worst of the speed-ups (above 1: faster)."""
    peers = recorded(result["device"])
    lines = []
    for name in TITLES:
        for label, low, high in (("m <= 256", 0, 256), ("m >= 1024", 1024, math.inf)):
            rows = [
                row
                for row in result["rows"]
                if row["table"] == name and low <= row["m"] <= high and row["status"] == "ok"
            ]
            against = [row["baseline"]["us"] / row["us"] for row in rows if row["baseline"].get("us")]
            keys = [(name, row["m"], row["n"], row["k"]) for row in rows]
            versus = [
                peers[key]["us"] / row["us"] for key, row in zip(keys, rows, strict=True) if key in peers
            ]
            if rows:
                lines.append([name, label, str(len(rows)), *_ratios(against), *_ratios(versus)])
    return lines


def _ratios(values: Sequence[float]) -> list[str]:
    return [f"{statistics.geometric_mean(values):.2f}x", f"{min(values):.2f}x"] if values else ["–", "–"]


def header(result: dict[str, Any], columns: Sequence[str] = COLUMNS) -> list[str]:
    """Returns the columns' titles, with the baseline of this result named."""
    return [column.format("cuBLASLt" if result["gpu"] else "XLA") for column in columns]


def text(result: dict[str, Any]) -> str:
    """Returns the tables of a result for a terminal."""
    parts = [f"{TITLES[name]}\n{table(header(result), rows)}" for name, rows in _tables(result)]
    return "\n\n".join([*parts, table(header(result, SUMMARY), summary(result))])


def markdown(path: Path, result: dict[str, Any]) -> str:
    """Returns the tables of a result for docs/benchmarks.md."""
    gpu = result["gpu"]
    about = [
        f"## {result['device']}",
        "",
        f"From `{_relative(path)}`, measured {result['started'][:10]}. {result['method']}",
        "",
    ]
    if gpu:
        about += [
            f"Driver {gpu.get('driver_version', '?')}, power limit {gpu.get('power.limit', '?')} W.",
            "",
        ]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    about += [f"Software: {versions}.", "", markdown_table(header(result, SUMMARY), summary(result)), ""]
    for name, rows in _tables(result):
        about += [f"### {TITLES[name]}", "", markdown_table(header(result), rows), ""]
    return "\n".join(about)


def readme(path: Path, result: dict[str, Any]) -> str:
    """Returns the short table of README.md."""
    peers = recorded(result["device"])
    found = {(row["table"], row["m"], row["n"], row["k"]): row for row in result["rows"]}
    rows = [[key[0], *_cells(found[key], peers.get(key, {}))[:10]] for key in README_ROWS if key in found]
    lines = [
        f"{result['device']}, from [`{_relative(path)}`]({_relative(path)}); all rows are in",
        "[docs/benchmarks.md](docs/benchmarks.md). cuBLASLt is measured in the same process (its FP8 product",
        "applies no block scales). DeepGEMM's figures were recorded on the same kind of machine by the same",
        "method ([data](benchmarks/data/deepgemm_h200.json)). Above 1x: this package is faster.",
        "",
        markdown_table(["table", *header(result)[:10]], rows),
    ]
    return "\n".join(lines)


def _relative(path: Path) -> str:
    try:
        return path.resolve().relative_to(ROOT).as_posix()
    except ValueError:
        return path.name


def replaced(document: str, section: str, content: str) -> str:
    """Returns the document with a generated section's content exchanged.

    Raises:
      ValueError: the document has no such section.
    """
    begin, end = BEGIN.format(section), END.format(section)
    if begin not in document or end not in document:
        raise ValueError(f"bench: the document lacks the lines {begin} and {end}")
    head, rest = document.split(begin, 1)
    return f"{head}{begin}\n{content.strip()}\n{end}{rest.split(end, 1)[1]}"


NOTHING = "No result file of a GPU is committed yet, so no speed is claimed here."


def documents(paths: Sequence[Path]) -> dict[Path, str]:
    """Returns what docs/benchmarks.md and README.md must say for these result files."""
    results = [(path, load(path)) for path in paths]
    measured = [(path, result) for path, result in results if result["gpu"]]
    page = "\n".join(_page_section(path, result) for path, result in measured) or NOTHING
    short = "\n\n".join(readme(path, result) for path, result in measured) or NOTHING
    targets = {ROOT / "docs" / "benchmarks.md": page, ROOT / "README.md": short}
    return {path: replaced(path.read_text(), "results", content) for path, content in targets.items()}


def _page_section(path: Path, result: dict[str, Any]) -> str:
    plot_line = f"![speed](img/{path.stem}.svg)\n"
    heading, rest = markdown(path, result).split("\n", 1)
    return f"{heading}\n\n{plot_line}{rest}"


def plot(result: dict[str, Any], target: Path) -> bool:
    """Draws TFLOP/s over m for every B, ours and the baseline's. Returns False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("bench: no plot, matplotlib is missing; pip install 'jax-deepgemm[bench]'", file=sys.stderr)
        return False
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "jax_deepgemm"
    import matplotlib.pyplot as plt

    names = [name for name in ("fp8", "bf16") if any(row["table"] == name for row in result["rows"])]
    figure, axes = plt.subplots(1, len(names), figsize=(6.5 * len(names), 4.2), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        rows = [row for row in result["rows"] if row["table"] == name and row["status"] == "ok"]
        shapes = sorted({(row["n"], row["k"]) for row in rows if row["n"] != row["k"]})
        for color, (n, k) in zip(plt.rcParams["axes.prop_cycle"].by_key()["color"], shapes, strict=False):
            chosen = sorted((row for row in rows if (row["n"], row["k"]) == (n, k)), key=lambda row: row["m"])
            sizes = [row["m"] for row in chosen]
            axis.plot(sizes, [row["tflops"] for row in chosen], "o-", color=color, ms=3, label=f"n={n} k={k}")
            base = [row["baseline"].get("tflops", math.nan) for row in chosen]
            axis.plot(sizes, base, ":", color=color, lw=1)
        axis.set(
            xscale="log", xlabel="m", ylabel="TFLOP/s", title=f"{name}: solid this package, dotted cuBLASLt"
        )
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.tight_layout()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, metadata={"Date": None})
    plt.close(figure)
    return True


def run(paths: Sequence[Path], *, write: bool) -> int:
    """Prints the tables of result files, or writes the documents made from them."""
    try:
        results = [(path, load(path)) for path in paths]
        if not write:
            print("\n\n".join(text(result) for _, result in results))
            return 0
        for target, content in documents(paths).items():
            target.write_text(content)
            print(f"wrote {_relative(target)}")
        for path, result in results:
            target = ROOT / "docs" / "img" / f"{path.stem}.svg"
            if result["gpu"] and plot(result, target):
                print(f"wrote {_relative(target)}")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0
