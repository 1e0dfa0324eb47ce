"""python -m jax_deepgemm compile --shapes FILE: fill the kernel cache, on a machine with or without a GPU."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from jax_deepgemm.cli.arguments import EXIT_CODES, input_file_or_stdin, read_text, refusing, spelt, whole
from jax_deepgemm.cli.info import devices
from jax_deepgemm.core.chip import H200, chip_for
from jax_deepgemm.core.shapes import CallShape
from jax_deepgemm.jit.cache import open_cache
from jax_deepgemm.jit.report import describe
from jax_deepgemm.jit.toolchain import read_settings
from jax_deepgemm.tools import shape_files
from jax_deepgemm.tools.precompile import precompile_records
from jax_deepgemm.tools.registry import archs
from jax_deepgemm.tools.text import bytes_text, table

MOST_JOBS = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the compile command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    about = (shape_files.__doc__ or "").split("\n\n", 1)[1]
    parser.epilog = (
        f"shapes files:\n{about}\nOps and their fields:\n\n{shape_files.reference()}\n\n{EXIT_CODES}"
    )
    parser.add_argument(
        "--shapes",
        metavar="FILE",
        type=input_file_or_stdin,
        required=True,
        help="GEMMs and layers, as JSON or CSV, see below; - is stdin",
    )
    parser.add_argument(
        "--arch",
        default=H200.arch,
        choices=archs(),
        help=f"target architecture (default: {H200.arch}, Hopper)",
    )
    parser.add_argument(
        "--jobs", type=whole(1, MOST_JOBS), metavar="N", help="threads (default: one per core)"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list with one object per kernel")


def read_shapes(path: Path) -> list[CallShape]:
    """Returns what a shapes file holds; "-" is stdin.

    Raises:
      UsageError: it cannot be read, or holds something else.
    """
    text = read_text(path)
    with refusing(spelt(path)):
        return shape_files.parse_shapes(text)


def run(args: argparse.Namespace) -> int:
    """Compiles; exit code 0, or 1 where the cache cannot keep the kernels."""
    wanted = read_shapes(args.shapes)
    devices()
    with refusing(spelt(args.shapes)):
        records = precompile_records(wanted, chip=chip_for(args.arch), jobs=args.jobs)
    rows = list({kernel.digest: describe(source, kernel) for source, kernel in records}.values())
    print(json.dumps(rows, indent=1) if args.json else _text(rows, len(wanted)))
    cache = open_cache(read_settings().cache_dir)
    if not cache.writable:
        print(f"compile: not all kernels are kept: {cache.root} cannot be written", file=sys.stderr)
        return 1
    return 0


def _text(rows: list[dict[str, Any]], count: int) -> str:
    header = ("kernel", "registers", "spill", "local", "shared", "compile s", "from", "notes")
    lines = [
        (
            row["name"],
            row["registers"],
            row["spill_bytes"],
            row["local_bytes"],
            bytes_text(row["static_shared_memory"] + row["dynamic_shared_memory"]),
            f"{row['compile_seconds']:.2f}",
            "disk" if row["from_cache"] else "compiler",
            len(row["warnings"]),
        )
        for row in rows
    ]
    return f"{table(header, lines)}\n{len(rows)} kernels for {count} shapes in {read_settings().cache_dir}"
