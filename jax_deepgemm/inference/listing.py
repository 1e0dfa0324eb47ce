"""python -m jax_deepgemm names: DeepSpeed's names that have a function here, and their arguments."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from typing import Any

from jax_deepgemm.inference.deepspeed import deepspeed_names
from jax_deepgemm.inference.fastgen import fastgen_names

TABLES: Mapping[str, Mapping[str, Callable[..., Any]]] = {
    "deepspeed_names": deepspeed_names,
    "fastgen_names": fastgen_names,
}
TESTED = (
    "Each is tested against its formula in float64, and with an argument that it refuses (tests/inference/). "
    "What is another way than in DeepSpeed: docs/from_deepspeed.md."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--table", choices=TABLES, help="one of them; default: both")
    parser.add_argument("--json", action="store_true", help="machine-readable: arguments of each name")


def run(args: argparse.Namespace) -> int:
    found = {table: arguments(table) for table in ([args.table] if args.table else TABLES)}
    print(json.dumps(found, indent=2) if args.json else text(found))
    return 0


def arguments(table: str) -> dict[str, list[list[str]]]:
    """Positional arguments of each name, once for each release of DeepSpeed where they differ."""
    return {
        name: [order.split() for order in getattr(call, "orders")]  # noqa: B009
        for name, call in sorted(TABLES[table].items())
    }


def text(found: Mapping[str, Mapping[str, list[list[str]]]]) -> str:
    """The tables for people."""
    parts = []
    for table, names in found.items():
        lines = [f"  {name}({', '.join(order)})" for name, orders in names.items() for order in orders]
        parts.append("\n".join([f"jax_deepgemm.inference.{table}, {len(names)} names", *lines]))
    return "\n\n".join([*parts, TESTED])
