"""python -m jax_deepgemm bench: measure, or report on what was measured."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

from jax_deepgemm.cli.text import Progress

SCHEMA = 1
METHOD = (
    "Device time of the kernels alone, from the CUPTI activity records of the JAX profiler; median of the "
    "calls; L2 flushed before each call by writing 8 GiB; standard normal inputs; SM clock sampled "
    "meanwhile."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, help="result file to write (default: benchmarks/results/<device>.json, or here)"
    )
    parser.add_argument("--tables", default="", help="comma-separated: fp8, fp8_wgrad, bf16 (default: all)")
    parser.add_argument("--rows", default="", help="regular expression on rows, e.g. 'm=(1|128) n=4096 '")
    parser.add_argument("--calls", type=int, default=12, help="timed calls of each function (default 12)")
    parser.add_argument("--time-limit", type=float, default=900, help="seconds after which no new row starts")
    parser.add_argument("--small", action="store_true", help="a few small problems, as without a GPU")
    parser.add_argument(
        "--report", type=Path, nargs="+", metavar="FILE", help="print tables of result files; measure nothing"
    )
    parser.add_argument(
        "--write",
        action="store_true",
        help="with --report: rewrite docs/benchmarks.md, its plot, and README.md",
    )


def run(args: argparse.Namespace) -> int:
    if args.report:
        from jax_deepgemm.bench import report

        return report.run(args.report, write=args.write)
    return measure(args)


def measure(args: argparse.Namespace) -> int:
    """Measures, writing the result file after every group of rows. Fails when a row of ours failed."""
    import jax

    from jax_deepgemm.bench import dense, machine, timing

    on_gpu = jax.default_backend() == "gpu"
    if args.calls < 1:
        print(f"bench: --calls is {args.calls}, need at least 1", file=sys.stderr)
        return 2
    if not on_gpu:
        print(
            "No GPU here: a few small problems in their float32 reference form, timed by the wall clock.",
            file=sys.stderr,
        )
    tables = dense.tables() if on_gpu and not args.small else dense.small_tables()
    wanted = [name for name in args.tables.split(",") if name] or list(tables)
    unknown = sorted(set(wanted) - set(tables))
    if unknown:
        print(f"bench: no table {', '.join(unknown)}; there are {', '.join(tables)}", file=sys.stderr)
        return 2
    problems = [row for name in wanted for row in tables[name] if re.search(args.rows, f"{row} ")]
    if not problems:
        print(f"bench: no row matches {args.rows!r}", file=sys.stderr)
        return 2

    device = jax.devices()[0]
    out = args.out or default_path(device.device_kind)
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "device": device.device_kind,
        "gpu": {"name": device.device_kind} | machine.gpu() if on_gpu else {},
        "versions": machine.versions(),
        "method": METHOD
        if on_gpu
        else "Wall clock of small problems without a GPU: a trial of the machinery, no measurement.",
        "calls": args.calls,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "rows": [],
    }
    begin = time.monotonic()
    flush = timing.flusher(timing.FLUSH_BYTES if on_gpu else 1 << 20)
    with machine.ClockLog() as clocks, Progress(len(problems), "bench") as progress:
        for row in dense.measure(problems, calls=args.calls, flush=flush, clocks=clocks if on_gpu else None):
            result["rows"].append(row)
            progress.step(f"{row['table']} {row['m']}x{row['n']}x{row['k']}")
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
        print(
            f"FAILED {row['table']} m={row['m']} n={row['n']} k={row['k']}: {row['error']}", file=sys.stderr
        )
    print(f"{len(result['rows'])} rows, {len(failed)} failed, {result['seconds']} s, written to {out}")
    return 1 if failed else 0


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
