"""python -m jax_deepgemm tune: measure all candidate configurations, and keep the best in a tuning file."""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax_deepgemm.cli.arguments import (
    MOST_CALLS,
    UsageError,
    input_file,
    input_file_or_stdin,
    names,
    output_file,
    refusing,
    seconds,
    spelt,
    whole,
)
from jax_deepgemm.cli.compile import read_shapes
from jax_deepgemm.cli.info import devices
from jax_deepgemm.core.tuning import Entry, as_fields, read
from jax_deepgemm.tools import tune
from jax_deepgemm.tools.bench import products
from jax_deepgemm.tools.bench.products import Work
from jax_deepgemm.tools.registry import read_entry
from jax_deepgemm.tools.text import table
from jax_deepgemm.tools.tune import Outcome

HEADER = ("problem", "of", "us", "best", "model us", "model's choice", "regret")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shapes",
        metavar="FILE",
        type=input_file_or_stdin,
        help="dense and grouped GEMMs, as JSON or CSV (see compile --help); - is stdin",
    )
    parser.add_argument(
        "--tables",
        type=names,
        default=[],
        metavar="NAMES",
        help="comma-separated tables of bench: fp8, m_grouped, ...",
    )
    parser.add_argument(
        "--out",
        type=output_file,
        metavar="FILE",
        help="tuning file to write (default: the one in use for this GPU)",
    )
    parser.add_argument(
        "--calls",
        type=whole(1, MOST_CALLS),
        default=12,
        metavar="N",
        help="timed calls of each candidate (default 12)",
    )
    parser.add_argument(
        "--time-limit",
        type=seconds,
        default=900.0,
        metavar="SECONDS",
        help="after which no new profiler session starts (default 900)",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list with all that was measured")
    parser.add_argument(
        "--report", type=input_file, metavar="FILE", help="print what a tuning file holds; measure nothing"
    )


def run(args: argparse.Namespace) -> int:
    """Tunes or reports; exit code 1 for candidates that could not be measured."""
    if args.report:
        return _report(args.report, args.json)
    begin = time.monotonic()
    works = _works(args)
    devices()
    with refusing():
        out = args.out or tune.file_of(tune.chip_here())
        outcomes = tune.tune(works, out=out, calls=args.calls, time_limit=args.time_limit)
    if len(outcomes) < len(works) and time.monotonic() - begin > args.time_limit:
        print(f"tune: time limit: {len(outcomes)} of up to {len(works)} problems measured", file=sys.stderr)
    found = _entries(outcomes)
    print(json.dumps([_as_json(one) for one in outcomes], indent=1) if args.json else text(found))
    failed = [(one.problem, *failure) for one in outcomes for failure in one.failed]
    for problem, what, error_text in failed:
        print(f"FAILED {problem}: {what}: {error_text}", file=sys.stderr)
    count = sum(map(len, found.values()))
    print(f"tune: {count} problems, {len(failed)} candidates failed, written to {out}", file=sys.stderr)
    return 1 if failed or not count else 0


def _works(args: argparse.Namespace) -> list[Work]:
    """What to tune.

    Raises:
      UsageError: nothing is asked for, or something that there is not.
    """
    works: list[Work] = []
    if args.shapes is not None:
        with refusing(spelt(args.shapes)):
            works += map(products.of_shape, read_shapes(args.shapes))
    known = products.tables() if args.tables else {}
    if unknown := [name for name in args.tables if name not in known]:
        raise UsageError(f"no table {', '.join(unknown)}; there are {', '.join(known)}")
    works += [products.of_row(row) for name in args.tables for row in known[name]]
    if not works:
        raise UsageError("nothing to tune; name a file with --shapes, or tables of bench with --tables")
    return works


def _entries(outcomes: list[Outcome]) -> dict[str, dict[str, Entry]]:
    found: dict[str, dict[str, Entry]] = {}
    for one in outcomes:
        if one.entry is not None:
            found.setdefault(one.device, {})[one.problem] = one.entry
    return found


def _as_json(one: Outcome) -> dict[str, Any]:
    entry = as_fields(one.entry) | {"regret": one.entry.regret} if one.entry else {}
    measured = [dataclasses.asdict(config) | {"us": us} for config, us in one.measured]
    return (
        {"device": one.device, "problem": one.problem} | entry | {"measured": measured, "failed": one.failed}
    )


def _report(path: Path, as_json: bool) -> int:
    with refusing(str(path)):
        found = {
            device: {problem: read_entry(problem, fields) for problem, fields in entries.items()}
            for device, entries in read(path).items()
        }
    rows = [
        {"device": device, "problem": problem} | as_fields(entry) | {"regret": entry.regret}
        for device, entries in found.items()
        for problem, entry in entries.items()
    ]
    print(json.dumps(rows, indent=1) if as_json else text(found))
    return 0


def text(found: Mapping[str, Mapping[str, Entry]]) -> str:
    """Returns a table of what was measured on each device, and how far the cost model is from it.

    >>> from jax_deepgemm import GemmConfig
    >>> from jax_deepgemm.core.tuning import Entry
    >>> entry = Entry(GemmConfig(64, 128, 6), 5.0, GemmConfig(128, 128, 5), 5.5, candidates=9)
    >>> print(text({"NVIDIA H200, 132 SMs": {"GemmProblem m=64 n=512 k=512": entry}}).split("\\n\\n")[-1])
    The cost model's choice is 10.0% slower than the best measured on average, 10.0% at worst:
    GemmProblem m=64 n=512 k=512 (1 problem).
    """
    return "\n\n".join(f"{device}\n{_of_device(entries)}" for device, entries in found.items())


def _of_device(entries: Mapping[str, Entry]) -> str:
    rows = [(problem, *_cells(entry)) for problem, entry in entries.items()]
    regrets = {key: entry.regret for key, entry in entries.items() if entry.regret is not None}
    if not regrets:
        return table(HEADER, rows)
    worst = max(regrets, key=regrets.__getitem__)
    return (
        f"{table(HEADER, rows)}\n\nThe cost model's choice is {statistics.mean(regrets.values()):.1%} slower "
        f"than the best measured on average, {regrets[worst]:.1%} at worst:\n"
        f"{worst} ({len(regrets)} problem{'s' if len(regrets) > 1 else ''})."
    )


def _cells(entry: Entry) -> tuple[str, ...]:
    model = "same" if entry.model == entry.config else str(entry.model)
    model_us = "failed" if entry.model_us is None else f"{entry.model_us:.1f}"
    regret = "–" if entry.regret is None else f"{entry.regret:.1%}"
    return str(entry.candidates), f"{entry.us:.1f}", str(entry.config), model_us, model, regret
