"""Tables and plots from result files: for the terminal, docs/benchmarks.md and README.md."""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jax_deepgemm.bench.catalog import ROOT, TABLES, Key, Row, Table, recorded
from jax_deepgemm.cli.text import markdown_table, table

BEGIN, END = "<!-- begin generated: {} -->", "<!-- end generated: {} -->"
COMMAND = "python -m jax_deepgemm bench --report benchmarks/results/*.json --write"
SUMMARY = ("table", "of", "rows", "against", "geometric mean", "worst")
README_ROWS: tuple[tuple[Key, ...], ...] = (
    (
        ("fp8", 1, 7168, 16384),
        ("fp8", 64, 4096, 7168),
        ("fp8", 128, 7168, 2048),
        ("fp8", 4096, 4096, 7168),
        ("fp8", 4096, 7168, 2048),
        ("fp8", 8192, 7168, 16384),
        ("fp8_wgrad", 4096, 7168, 4096),
        ("bf16", 128, 4096, 7168),
        ("bf16", 4096, 4096, 7168),
    ),
    (
        ("m_grouped", "fp8", "padded", 4, 8192, 6144, 7168),
        ("m_grouped", "fp8", "padded", 32, 256, 7168, 3072),
        ("m_grouped", "fp8", "drawn", 32, 256, 7168, 3072),
        ("m_grouped", "bf16", "padded", 8, 4096, 4096, 4096),
    ),
    (
        ("masked", "fp8", 32, 192, 6144, 7168),
        ("masked", "fp8", 32, 20, 7168, 3072),
        ("k_grouped", "fp8", 4, 4096, 7168, 8192),
        ("k_grouped", "fp8", 16, 7168, 2048, 2048),
        ("k_grouped", "bf16", 8, 4096, 7168, 4096),
    ),
    (
        ("ragged_dot", "bf16", 4, 8192, 6144, 7168),
        ("ragged_dot", "bf16", 8, 4096, 4096, 4096),
        ("ragged_dot", "bf16", 32, 256, 7168, 3072),
    ),
)
"""Rows of README.md, a table of each tuple; all of one have the same columns."""


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


def _rows(result: dict[str, Any]) -> Iterator[tuple[str, Table, list[Row]]]:
    """The tables of which there are rows."""
    for name, about in TABLES.items():
        rows = [row for row in result["rows"] if row["table"] == name]
        if rows:
            yield name, about, rows


def _tables(result: dict[str, Any]) -> Iterable[tuple[Table, list[list[str]]]]:
    peers = recorded(result["device"])
    for _, about, rows in _rows(result):
        yield about, [about.cells(row, peers.get(about.key(row), {})) for row in rows]


def summary(result: dict[str, Any]) -> list[list[str]]:
    """Returns, for parts of the tables, geometric mean and worst of the speed-ups (above 1: faster)."""
    peers = recorded(result["device"])
    lines = []
    for name, about, rows in _rows(result):
        measured = [row for row in rows if row["status"] == "ok"]
        for part in dict.fromkeys(filter(None, map(about.part, measured))):
            chosen = [row for row in measured if about.part(row) == part]
            others = {
                about.baseline_on(bool(result["gpu"])): [row.get("baseline", {}).get("us") for row in chosen],
                about.peer: [peers.get(about.key(row), {}).get("us") for row in chosen],
            }
            for other, times in others.items():
                pairs = zip(times, chosen, strict=True)
                ratios = [time / row["us"] for time, row in pairs if time]
                if ratios:
                    lines.append([name, part, str(len(ratios)), other, *_mean_and_worst(ratios)])
    return lines


def _mean_and_worst(ratios: Sequence[float]) -> list[str]:
    return [f"{statistics.geometric_mean(ratios):.2f}x", f"{min(ratios):.2f}x"]


def text(result: dict[str, Any]) -> str:
    """Returns the tables of a result for a terminal."""
    on_gpu = bool(result["gpu"])
    parts = [f"{about.title}\n{table(about.header(on_gpu), rows)}" for about, rows in _tables(result)]
    return "\n\n".join([*parts, table(SUMMARY, summary(result))])


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
    about += [f"Software: {versions}.", "", markdown_table(SUMMARY, summary(result)), ""]
    for shown, rows in _tables(result):
        about += [f"### {shown.title}", "", markdown_table(shown.header(bool(gpu)), rows), ""]
    return "\n".join(about)


def readme(path: Path, result: dict[str, Any]) -> str:
    """Returns the short tables of README.md."""
    peers = recorded(result["device"])
    found = {TABLES[row["table"]].key(row): row for row in result["rows"]}
    lines = [
        f"{result['device']}, from [`{_relative(path)}`]({_relative(path)}); all rows are in",
        "[docs/benchmarks.md](docs/benchmarks.md). cuBLASLt is measured in the same process (its FP8 product",
        "applies no block scales). DeepGEMM's figures were recorded on the same kind of machine by the same",
        "method ([data](benchmarks/data/deepgemm_h200.json)). Above 1x: this package is faster.",
    ]
    for keys in README_ROWS:
        chosen = [key for key in keys if key in found]
        if chosen:
            about = TABLES[chosen[0][0]]
            rows = [[key[0], *about.cells(found[key], peers.get(key, {}))[:-1]] for key in chosen]
            lines += ["", markdown_table(["table", *about.header(bool(result["gpu"]))[:-1]], rows)]
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
    """Draws TFLOP/s of the dense and of the grouped tables. Returns False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("bench: no plot, matplotlib is missing; pip install 'jax-deepgemm[bench]'", file=sys.stderr)
        return False
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "jax_deepgemm"
    import matplotlib.pyplot as plt

    colors = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    measured = {name: [r for r in rows if r["status"] == "ok"] for name, _, rows in _rows(result)}
    lines = [[name for name in names if measured.get(name)] for names in PLOTS]
    lines = [names for names in lines if names]
    width = max(map(len, lines))
    figure, grid = plt.subplots(len(lines), width, figsize=(6.5 * width, 4.2 * len(lines)), squeeze=False)
    for names, axes in zip(lines, grid, strict=True):
        for axis in axes[len(names) :]:
            axis.remove()
        for axis, name in zip(axes, names, strict=False):
            if name in DENSE:
                _plot_dense(axis, name, measured[name], colors)
            else:
                _plot_grouped(axis, name, measured[name], recorded(result["device"]), colors)
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7)
    figure.tight_layout()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, metadata={"Date": None})
    plt.close(figure)
    return True


DENSE = ("fp8", "bf16")
PLOTS = (DENSE, ("m_grouped", "masked", "k_grouped"))


def _plot_dense(axis: Any, name: str, rows: Sequence[Row], colors: Sequence[str]) -> None:
    """Over m for every B, ours and the baseline's."""
    shapes = sorted({(row["n"], row["k"]) for row in rows if row["n"] != row["k"]})
    for color, (n, k) in zip(colors, shapes, strict=False):
        chosen = sorted((row for row in rows if (row["n"], row["k"]) == (n, k)), key=lambda row: row["m"])
        sizes = [row["m"] for row in chosen]
        axis.plot(sizes, [row["tflops"] for row in chosen], "o-", color=color, ms=3, label=f"n={n} k={k}")
        base = [row["baseline"].get("tflops", math.nan) for row in chosen]
        axis.plot(sizes, base, ":", color=color, lw=1)
    axis.set(xlabel="m", ylabel="TFLOP/s", title=f"{name}: solid this package, dotted cuBLASLt")
    axis.set_xscale("log", base=2)


def _plot_grouped(
    axis: Any, name: str, rows: Sequence[Row], peers: dict[Key, Row], colors: Sequence[str]
) -> None:
    """Row by row, ours and DeepGEMM's."""
    about = TABLES[name]
    rows = [row for row in rows if row["sizes"] == "padded" or name != "m_grouped"]
    for color, kind in zip(colors, ("fp8", "bf16"), strict=False):
        chosen = [row for row in rows if row["type"] == kind]
        shapes = [f"{row['groups']} x {row['m']} x {row['n']} x {row['k']}" for row in chosen]
        axis.plot(shapes, [row["tflops"] for row in chosen], "o-", color=color, ms=3, label=kind)
        theirs = [peers.get(about.key(row), {}).get("tflops", math.nan) for row in chosen]
        axis.plot(shapes, theirs, ":", color=color, lw=1)
    title = f"{name}: solid this package, dotted DeepGEMM"
    axis.set(xlabel="groups x m x n x k", ylabel="TFLOP/s", title=title)
    axis.tick_params(axis="x", labelrotation=60, labelsize=6)


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
