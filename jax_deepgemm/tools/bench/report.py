"""Tables and plots from result files: for the terminal, docs/benchmarks.md and README.md."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from jax_deepgemm.core.bench import Table
from jax_deepgemm.tools.bench import plots, timeline
from jax_deepgemm.tools.bench.catalog import (
    ROOT,
    Result,
    baseline_on,
    cells,
    control,
    header,
    key,
    recorded,
    shown,
    tables,
)
from jax_deepgemm.tools.shape_files import parse_json
from jax_deepgemm.tools.text import markdown_table, table

BEFORE = ROOT / "benchmarks" / "data" / "layers_before.json"
"""Layers as they ran before kernels or layers changed much, for pictures; a result file."""
BEGIN, END = "<!-- begin generated: {} -->", "<!-- end generated: {} -->"
COMMAND = "python -m jax_deepgemm bench --report benchmarks/results/*.json --write"
SUMMARY = ("table", "of", "rows", "against", "geometric mean", "worst", "time ratio", "worst time ratio")
HEAD = {"device": str, "gpu": dict, "versions": dict, "method": str, "started": str, "rows": list}


def load(path: Path) -> dict[str, Any]:
    """Reads a result file.

    Raises:
      ValueError: not a result file of this version.
    """
    try:
        result: dict[str, Any] = parse_json(path.read_text(encoding="utf-8"))
        _check(result)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a result file: {error}") from error
    return result


def _check(result: Any) -> None:
    if not isinstance(result, dict) or result.get("schema") != 1:
        raise ValueError(
            "not an object of schema 1; measure again with python -m jax_deepgemm bench --out FILE"
        )
    for name, kind in HEAD.items():
        if not isinstance(result.get(name), kind):
            raise ValueError(f"its {name} is {result.get(name)!r}, need a {kind.__name__}")
    for number, row in enumerate(result["rows"], 1):
        try:
            cells(tables()[row["table"]], row, {})
        except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
            raise ValueError(f"row {number} cannot be shown: {type(error).__name__}: {error}") from None


def _rows(result: dict[str, Any]) -> Iterator[tuple[str, Table, list[Result]]]:
    """The tables of which there are rows."""
    for name, about in tables().items():
        rows = [row for row in result["rows"] if row["table"] == name]
        if rows:
            yield name, shown(about, rows), rows


def _tables(result: dict[str, Any]) -> Iterable[tuple[Table, list[list[str]]]]:
    peers = recorded(result["device"])
    for _, about, rows in _rows(result):
        yield about, [cells(about, row, peers.get(key(row), {})) for row in rows]


def summary(result: dict[str, Any]) -> list[list[str]]:
    """Returns, for parts of the tables, geometric mean and worst of the speed-ups (above 1: faster).

    The last two columns say the same as our time divided by the other's (below 1: faster).
    """
    peers = recorded(result["device"])
    lines = []
    for name, about, rows in _rows(result):
        measured = [row for row in rows if row["status"] == "ok"]
        for part in dict.fromkeys(filter(None, map(about.part, measured))):
            chosen = [row for row in measured if about.part(row) == part]
            others = {
                baseline_on(about, bool(result["gpu"])): [
                    row.get("baseline", {}).get("us") for row in chosen
                ],
                about.peer: [peers.get(key(row), {}).get("us") for row in chosen],
            }
            for other, times in others.items():
                pairs = zip(times, chosen, strict=True)
                ratios = [time / row["us"] for time, row in pairs if time]
                if ratios:
                    lines.append([name, part, str(len(ratios)), other, *_mean_and_worst(ratios)])
    return lines


def _mean_and_worst(ratios: Sequence[float]) -> list[str]:
    mean, worst = statistics.geometric_mean(ratios), min(ratios)
    return [f"{mean:.2f}x", f"{worst:.2f}x", f"{1 / mean:.3f}", f"{1 / worst:.3f}"]


def text(result: dict[str, Any]) -> str:
    """Returns the tables of a result for a terminal."""
    on_gpu = bool(result["gpu"])
    parts = [f"{about.title}\n{table(header(about, on_gpu), rows)}" for about, rows in _tables(result)]
    return "\n\n".join(filter(None, [*parts, table(SUMMARY, summary(result)), control(result)]))


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
    if control(result):
        about += [control(result), ""]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    about += [f"Software: {versions}.", "", markdown_table(SUMMARY, summary(result)), ""]
    for one, rows in _tables(result):
        about += [f"### {one.title}", "", markdown_table(header(one, bool(gpu)), rows), ""]
    return "\n".join(about)


def readme(path: Path, result: dict[str, Any]) -> str:
    """Returns the short tables of README.md; "" where a result has no row of them."""
    peers = recorded(result["device"])
    found = {key(row): row for row in result["rows"]}
    lines = [
        f"{result['device']}, from [`{_relative(path)}`]({_relative(path)}); all rows are in",
        "[docs/benchmarks.md](docs/benchmarks.md). cuBLASLt is measured in the same process (its FP8 product",
        "applies no block scales). DeepGEMM's figures were recorded on the same kind of machine by the same",
        "method ([data](benchmarks/data/deepgemm_h200.json)). Above 1x: this package is faster.",
    ]
    on_gpu, shown = bool(result["gpu"]), False
    for titles, group in groupby(_readme_tables(), key=lambda named: header(named[1], on_gpu)):
        rows = [
            [name, *cells(about, found[one], peers.get(one, {}))[:-1]]
            for name, about in group
            for values in about.readme
            if (one := (name, *values)) in found
        ]
        if rows:
            lines += ["", markdown_table(["table", *titles[:-1]], rows)]
            shown = True
    return "\n".join(lines) if shown else ""


def _readme_tables() -> list[tuple[str, Table]]:
    """Tables of which README.md has rows; those with the same columns become one there."""
    return [(name, about) for name, about in tables().items() if about.readme]


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
        raise ValueError(f"the document lacks the lines {begin} and {end}")
    head, rest = document.split(begin, 1)
    return f"{head}{begin}\n{content.strip()}\n{end}{rest.split(end, 1)[1]}"


NOTHING = "No result file of a GPU is committed yet, so no speed is claimed here."


def documents(paths: Sequence[Path]) -> dict[Path, str]:
    """Returns what docs/benchmarks.md, docs/performance.md and README.md must say for these result files."""
    results = [(path, load(path)) for path in paths]
    measured = [(path, result) for path, result in results if result["gpu"]]
    page = "\n".join(_page_section(path, result) for path, result in measured) or NOTHING
    short = "\n\n".join(filter(None, (readme(path, result) for path, result in measured))) or NOTHING
    both = "\n\n".join(_recipes_section(*one) for one in measured if recipes(one[1])) or NOTHING
    targets = {
        ROOT / "docs" / "benchmarks.md": ("results", page),
        ROOT / "docs" / "performance.md": ("recipes", both),
        ROOT / "README.md": ("results", short),
    }
    return {path: replaced(path.read_text(), *content) for path, content in targets.items()}


def _recipes_section(path: Path, result: dict[str, Any]) -> str:
    head = f"{result['device']}, from `{_relative(path)}`, measured {result['started'][:10]}:"
    return f"{head}\n\n{markdown_table(RECIPES, recipes(result))}"


def _page_section(path: Path, result: dict[str, Any]) -> str:
    pictures = [f"![speed](img/{path.stem}.png)\n"] if plots.plotted(result) else []
    for target in _timelines(path, result):
        about = "What layers run, kernel by kernel, as bars in time; each bar says its name and microseconds"
        pictures.append(f"{about}:\n\n![kernels in time](img/{target.name})\n")
    heading, rest = markdown(path, result).split("\n", 1)
    return "\n".join([heading, "", "\n".join(pictures) + rest])


def _timelines(path: Path, result: dict[str, Any]) -> dict[Path, str]:
    """Pictures of a result, one for each table that keeps when kernels ran; what is recorded of before is
    drawn above it."""
    before = load(BEFORE)["rows"] if BEFORE.is_file() else []
    found = {}
    for name in tables():
        parts = [
            (title, {"rows": [row for row in rows if row["table"] == name]})
            for title, rows in (("before", before), ("now", result["rows"]))
        ]
        if timeline.rows_of(parts[1:]):
            picture = timeline.draw(timeline.rows_of(parts))
            found[ROOT / "docs" / "img" / f"{path.stem}-{name}.svg"] = picture
    return found


RECIPES = ("table", "of", "FP8 us", "BF16 us", "FP8 / BF16", "FP8 temp GB", "BF16 temp GB")


def recipes(result: dict[str, Any]) -> list[list[str]]:
    """Rows in FP8 beside the same in BF16: from the first start to the last end, where that was measured."""
    found = {key(row): row for row in result["rows"]}
    lines = []
    for name, about, rows in _rows(result):
        for row in rows:
            differs = about.in_bf16(row)
            if differs is None:
                continue
            other = found.get(key({**row, **differs})) if differs else row.get("baseline")
            if other and row["status"] == other["status"] == "ok":
                words = [row[one] if one == "what" else f"{one}={row[one]}" for one in about.keys]
                lines.append([name, " ".join(words), *_compared(row, other)])
    return lines


def _compared(row: Result, other: Result) -> list[str]:
    mine, theirs = ((one["span_us"] if "span_us" in one else one["us"]) for one in (row, other))
    held = [f"{one['temp_bytes'] / 1e9:.2f}" if "temp_bytes" in one else "–" for one in (row, other)]
    return [f"{mine:.0f}", f"{theirs:.0f}", f"{mine / theirs:.2f}", *held]


def draw_timeline(paths: Sequence[Path], rows: re.Pattern[str], target: Path) -> int:
    """Draws when the kernels of one call ran: rows of result files that keep it and whose names match.

    Raises:
      ValueError: not a result file, or no such row.
      OSError: a picture that cannot be written.
    """
    results = [(path.stem, load(path)) for path in paths]
    kept = [pair for pair in timeline.rows_of(results) if rows.search(f"{pair[0]} ")]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(timeline.draw(kept), encoding="utf-8")
    print(f"wrote {_relative(target)}")
    return 0


def run(paths: Sequence[Path], *, write: bool, plot: Path | None = None) -> int:
    """Prints the tables of result files, or writes the documents made from them.

    Plots of each family go to the folder `plot`, if any.

    Raises:
      ValueError: not a result file, or a document without a place for its tables.
      OSError: a document that cannot be read or written.
    """
    results = [(path, load(path)) for path in paths]
    for path, result in results if plot else ():
        for target in plots.each(result, plot or Path(), path.stem):
            print(f"wrote {_relative(target)}")
    if not write:
        print("\n\n".join(text(result) for _, result in results))
        return 0
    for target, content in documents(paths).items():
        target.write_text(content)
        print(f"wrote {_relative(target)}")
    for path, result in results:
        target = ROOT / "docs" / "img" / f"{path.stem}.png"
        if result["gpu"] and plots.together(result, target):
            print(f"wrote {_relative(target)}")
        for target, picture in (_timelines(path, result) if result["gpu"] else {}).items():
            target.write_text(picture, encoding="utf-8")
            print(f"wrote {_relative(target)}")
    return 0
