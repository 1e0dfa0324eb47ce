"""python -m jax_deepgemm bench: measure, or report on what was measured."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_deepgemm import config
from jax_deepgemm.cli.arguments import (
    MOST_CALLS,
    UsageError,
    expression,
    input_file,
    names_of,
    output_file,
    output_folder,
    refusing,
    seconds,
    whole,
)
from jax_deepgemm.cli.info import devices
from jax_deepgemm.core.bench import Row
from jax_deepgemm.tools.bench import catalog, machine, report, timing
from jax_deepgemm.tools.bench.measure import measure as measure_rows
from jax_deepgemm.tools.bench.measure import measure_baseline
from jax_deepgemm.tools.text import Progress

SCHEMA = 1
METHOD = (
    "Device time of the kernels alone, overlapping ones counted once, from the CUPTI activity records of the "
    "JAX profiler; median of the calls; L2 flushed before each call by writing 8 GiB; inputs standard "
    "normal; SM clock sampled meanwhile."
)
TRIAL = "Wall clock of small problems without a GPU: a trial of the machinery, no measurement."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    tables = list(catalog.tables())
    parser.add_argument(
        "--out",
        type=output_file,
        metavar="FILE",
        help="result file to write, after each group of rows (default: none, results are only printed)",
    )
    parser.add_argument(
        "--tables",
        type=names_of(tables, "table"),
        default=[],
        metavar="NAMES",
        help=f"comma-separated, of {', '.join(tables)} (default: all)",
    )
    parser.add_argument(
        "--rows",
        type=expression,
        default=re.compile(""),
        metavar="REGEX",
        help="regular expression on rows, e.g. 'm=(1|128) n=4096 '",
    )
    parser.add_argument(
        "--calls",
        type=whole(1, MOST_CALLS),
        default=12,
        metavar="N",
        help="timed calls of each function (default 12)",
    )
    parser.add_argument(
        "--time-limit",
        type=seconds,
        default=900.0,
        metavar="SECONDS",
        help="after which no new row starts (default 900)",
    )
    parser.add_argument("--small", action="store_true", help="a few small problems, as without a GPU")
    parser.add_argument(
        "--report",
        type=input_file,
        nargs="+",
        metavar="FILE",
        help="print tables of result files; measure nothing",
    )
    parser.add_argument(
        "--plot",
        type=output_folder,
        metavar="DIR",
        help="with --report: draw a plot of each table into this folder",
    )
    parser.add_argument(
        "--timeline",
        type=output_file,
        metavar="SVG",
        help="with --report: draw when the kernels of one call ran, of rows that keep it and match --rows",
    )
    parser.add_argument(
        "--write",
        action="store_true",
        help="with --report: rewrite docs/benchmarks.md, its plot, and README.md of this source tree",
    )


def run(args: argparse.Namespace) -> int:
    for name in ("write", "plot", "timeline"):
        if getattr(args, name) and not args.report:
            raise UsageError(f"--{name} needs --report with the result files to show")
    if args.report:
        with refusing():
            if args.timeline:
                return report.draw_timeline(args.report, args.rows, args.timeline)
            return report.run(args.report, write=args.write, plot=args.plot)
    return measure(args)


def measure(args: argparse.Namespace) -> int:
    """Measures, writing the result file, if any, after every group of rows; 1 when a row of ours failed."""
    device = devices()[0]
    on_gpu = machine.on_gpu()
    chosen = _choose(args.tables, args.rows, small=args.small or not on_gpu)
    count = sum(map(len, chosen.values()))
    if not count:
        raise UsageError(f"no row matches {args.rows.pattern!r}; rows are as in 'm=(1|128) n=4096 '")
    if not on_gpu:
        print(
            "No GPU here: a few small problems in their float32 reference form, timed by the wall clock.",
            file=sys.stderr,
        )
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "device": device.device_kind,
        "gpu": {"name": device.device_kind} | machine.gpu() if on_gpu else {},
        "versions": machine.versions(),
        "method": method(device.device_kind) if on_gpu else TRIAL,
        "calls": args.calls,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "rows": [],
    }
    begin = time.monotonic()
    flush = timing.flusher(timing.FLUSH_BYTES if on_gpu else 1 << 20)
    with machine.ClockLog() as clocks, Progress(count, "bench") as progress:
        options = {"calls": args.calls, "flush": flush, "clocks": clocks if on_gpu else None}
        control = catalog.control_row()
        if on_gpu and control is not None:
            reference = catalog.reference_us(device.device_kind)
            result["control"] = measure_baseline(control.row, **options)
            result["control"] |= {"reference_us": reference} if reference else {}
        for row in _measured(chosen, options):
            result["rows"].append(row)
            progress.step(catalog.name(row))
            if time.monotonic() - begin > args.time_limit:
                print(f"bench: stopped at the time limit after {len(result['rows'])} rows", file=sys.stderr)
                break
            if args.out:
                write(args.out, result)
        result["clock"] = clocks.between(begin, time.monotonic()) if on_gpu else {}
    result["seconds"] = round(time.monotonic() - begin, 1)
    if args.out:
        write(args.out, result)
    print(report.text(result))
    failed = [row for row in result["rows"] if row["status"] != "ok"]
    for row in failed:
        print(f"FAILED {catalog.name(row)}: {row['error']}", file=sys.stderr)
    where = f"written to {args.out}" if args.out else "written to no file (--out FILE keeps them)"
    print(f"{len(result['rows'])} rows, {len(failed)} failed, {result['seconds']} s, {where}")
    return 1 if failed else 0


def method(device_kind: str) -> str:
    """Returns how a GPU is measured, and whether a tuning file rather than the cost model may have chosen."""
    tuning = config.tuning_file(device_kind)
    return f"{METHOD} A tuning file was in force." if tuning and tuning.is_file() else METHOD


def _choose(wanted: Sequence[str], rows: re.Pattern[str], small: bool) -> dict[str, list[Row]]:
    """The rows of each wanted table, all where none is named."""
    known = catalog.tables()
    return {
        name: [row for row in known[name].rows(small) if rows.search(f"{row} ")] for name in wanted or known
    }


def _measured(chosen: Mapping[str, Sequence[Row]], options: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for name, rows in chosen.items():
        for found in measure_rows(rows, **options):
            yield {"table": name} | found


def write(path: Path, result: dict[str, Any]) -> None:
    """Writes a result file, one row a line."""
    head = {key: value for key, value in result.items() if key != "rows"}
    rows = ",\n".join("    " + json.dumps(row) for row in result["rows"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(head, indent=2)[:-2] + f',\n  "rows": [\n{rows}\n  ]\n}}\n')
