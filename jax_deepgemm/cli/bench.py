"""python -m jax_deepgemm bench: measure, or report on what was measured."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jax_deepgemm import config
from jax_deepgemm.cli.text import Progress

SCHEMA = 1
TABLES = {
    "fp8": "dense",
    "fp8_wgrad": "dense",
    "bf16": "dense",
    "m_grouped": "grouped",
    "masked": "grouped",
    "k_grouped": "grouped",
    "ragged_dot": "grouped",
    "quantize": "fused",
    "moe": "moe",
    "shapes": "shapes",
    "skew": "skew",
    "sustained": "sustained",
    "op": "op",
}
"""Each table, and the module of jax_deepgemm.bench that measures it."""
METHOD = (
    "Device time of the kernels alone, from the CUPTI activity records of the JAX profiler; median of the "
    "calls; L2 flushed before each call by writing 8 GiB; standard normal inputs; SM clock sampled "
    "meanwhile."
)
TRIAL = "Wall clock of small problems without a GPU: a trial of the machinery, no measurement."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, help="result file to write (default: benchmarks/results/<device>.json, or here)"
    )
    parser.add_argument(
        "--tables", default="", help=f"comma-separated, of {', '.join(TABLES)} (default: all)"
    )
    parser.add_argument("--rows", default="", help="regular expression on rows, e.g. 'm=(1|128) n=4096 '")
    parser.add_argument("--calls", type=int, default=12, help="timed calls of each function (default 12)")
    parser.add_argument("--time-limit", type=float, default=900, help="seconds after which no new row starts")
    parser.add_argument("--small", action="store_true", help="a few small problems, as without a GPU")
    parser.add_argument(
        "--report", type=Path, nargs="+", metavar="FILE", help="print tables of result files; measure nothing"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="DIR", help="with --report: draw a plot of each family into this folder"
    )
    parser.add_argument(
        "--write",
        action="store_true",
        help="with --report: rewrite docs/benchmarks.md, its plot, and README.md",
    )


def run(args: argparse.Namespace) -> int:
    if args.report:
        from jax_deepgemm.bench import report

        return report.run(args.report, write=args.write, plot=args.plot)
    return measure(args)


def measure(args: argparse.Namespace) -> int:
    """Measures, writing the result file after every group of rows. Fails when a row of ours failed."""
    import jax

    from jax_deepgemm.bench import catalog, dense, machine, timing

    on_gpu = jax.default_backend() == "gpu"
    if args.calls < 1:
        print(f"bench: --calls is {args.calls}, need at least 1", file=sys.stderr)
        return 2
    if not on_gpu:
        print(
            "No GPU here: a few small problems in their float32 reference form, timed by the wall clock.",
            file=sys.stderr,
        )
    wanted = [name for name in args.tables.split(",") if name] or list(TABLES)
    unknown = sorted(set(wanted) - set(TABLES))
    if unknown:
        print(f"bench: no table {', '.join(unknown)}; there are {', '.join(TABLES)}", file=sys.stderr)
        return 2
    chosen = list(_choose(wanted, args.rows, small=args.small or not on_gpu))
    count = sum(len(problems) for _, problems in chosen)
    if not count:
        print(f"bench: no row matches {args.rows!r}", file=sys.stderr)
        return 2

    device = jax.devices()[0]
    out = args.out or default_path(device.device_kind)
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
        if on_gpu:
            reference = catalog.reference_us(device.device_kind)
            result["control"] = dense.control(**options) | ({"reference_us": reference} if reference else {})
        for row in (row for measure, problems in chosen for row in measure(problems, **options)):
            result["rows"].append(row)
            progress.step(catalog.name(row))
            if time.monotonic() - begin > args.time_limit:
                print(f"bench: stopped at the time limit after {len(result['rows'])} rows", file=sys.stderr)
                break
            write(out, result)
        result["clock"] = clocks.between(begin, time.monotonic()) if on_gpu else {}
    result["seconds"] = round(time.monotonic() - begin, 1)
    write(out, result)

    from jax_deepgemm.bench import report

    print(report.text(result))
    failed = [row for row in result["rows"] if row["status"] != "ok"]
    for row in failed:
        print(f"FAILED {catalog.name(row)}: {row['error']}", file=sys.stderr)
    print(f"{len(result['rows'])} rows, {len(failed)} failed, {result['seconds']} s, written to {out}")
    return 1 if failed else 0


def method(device_kind: str) -> str:
    """Returns how a GPU is measured, and whether a tuning file rather than the cost model may have chosen."""
    tuning = config.tuning_file(device_kind)
    return f"{METHOD} A tuning file was in force." if tuning and tuning.is_file() else METHOD


def _choose(wanted: Sequence[str], rows: str, small: bool) -> Iterator[tuple[Callable[..., Any], list[Any]]]:
    """Yields, for each wanted table, the function that measures it and its problems."""
    for name in wanted:
        module = importlib.import_module(f"jax_deepgemm.bench.{TABLES[name]}")
        problems = (module.small_tables() if small else module.tables())[name]
        yield module.measure, [row for row in problems if re.search(rows, f"{row} ")]


def default_path(device_kind: str) -> Path:
    """Returns where results of this device go.

    >>> default_path("NVIDIA H200").name
    'nvidia-h200.json'
    """
    name = re.sub(r"[^a-z0-9]+", "-", device_kind.lower()).strip("-") + ".json"
    folder = Path("benchmarks/results")
    return (folder if folder.is_dir() else Path()) / name


def write(path: Path, result: dict[str, Any]) -> None:
    """Writes a result file, one row a line."""
    head = {key: value for key, value in result.items() if key != "rows"}
    rows = ",\n".join("    " + json.dumps(row) for row in result["rows"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(head, indent=2)[:-2] + f',\n  "rows": [\n{rows}\n  ]\n}}\n')
