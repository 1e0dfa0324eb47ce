"""python -m jax_deepgemm explain: the kernels chosen for GEMMs and layers of experts, and why."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any, NamedTuple

from jax_deepgemm.cli.arguments import EXIT_CODES, UsageError, input_file_or_stdin, refusing
from jax_deepgemm.cli.compile import read_shapes
from jax_deepgemm.cli.info import devices
from jax_deepgemm.core.shapes import CallShape
from jax_deepgemm.tools.explain import ExplainedCall, chip_here, explain
from jax_deepgemm.tools.shape_files import kinds, shape_of

SCHEMA = 1
"""The version of the JSON document. Fields that are only added leave it as it is."""
EXAMPLES = """examples:
  explain --m 4096 --n 7168 --k 2048
  explain --op m_grouped_bf16_gemm_nt_masked --groups 32 --m 128 --n 4096 --k 7168 --expected-m 16
  explain --op moe_mlp --tokens 4096 --hidden 7168 --intermediate 2048 --experts 32 --top-k 8 --json
  explain --shapes shapes.csv
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        f"{EXAMPLES}\nThe flags of an op are the fields that it has in a shapes file (compile --help lists "
        f"them).\n\nops: {', '.join(kinds())}\n\n{EXIT_CODES}"
    )
    parser.add_argument("--op", metavar="OP", help="see below (default fp8_gemm_nt)")
    for name, (about, is_flag) in _fields().items():
        how: dict[str, Any] = (
            {"nargs": "?", "const": "true", "metavar": "BOOL"} if is_flag else {"metavar": "VALUE"}
        )
        parser.add_argument(_flag_of(name), help=about.replace("%", "%%"), **how)
    parser.add_argument(
        "--shapes", metavar="FILE", type=input_file_or_stdin, help="instead: all shapes of a file; - is stdin"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def _flag_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _fields() -> dict[str, tuple[str, bool]]:
    """All fields of all shapes: what is said of them first, and whether they are true or false."""
    found: dict[str, tuple[str, bool]] = {}
    for kind in dict.fromkeys(kinds().values()):
        for one in dataclasses.fields(kind)[1:]:
            found.setdefault(one.name, (one.metadata["about"], isinstance(one.default, bool)))
    return found


class Explained(NamedTuple):
    """A shape, and for each function of it a title and the calls of ops inside."""

    shape: CallShape
    functions: list[tuple[str, list[ExplainedCall]]]

    @classmethod
    def of(cls, shape: CallShape) -> Explained:
        with refusing(str(shape)):
            calls = shape.calls()
            return cls(
                shape, [(one.title, explain(one.function, *one.operands, show=False)) for one in calls]
            )

    def text(self, headings: bool) -> str:
        """For people; a single function of a single shape needs no heading."""
        several = len(self.functions) > 1
        parts = []
        for title, calls in self.functions:
            heading = [f"=== {self.shape}: {title}" if several else f"=== {self.shape}"]
            parts += [*(heading if headings or several else []), *map(str, calls)]
        return "\n\n".join(parts)


def run(args: argparse.Namespace) -> int:
    wanted = shapes_of(args)
    devices()
    explained = list(map(Explained.of, wanted))
    if args.json:
        print(json.dumps(document(explained), indent=1))
    else:
        print("\n\n".join(one.text(headings=len(explained) > 1) for one in explained))
    return 0


def shapes_of(args: argparse.Namespace) -> list[CallShape]:
    """Returns what the arguments ask for.

    Raises:
      UsageError: no shape, a wrong one, or a file and flags at once.
    """
    names = ("op", *_fields())
    row = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.shapes is not None:
        if row:
            raise UsageError(f"{', '.join(map(_flag_of, row))} and --shapes at once, need one or the other")
        return read_shapes(args.shapes)
    if empty := [name for name, value in row.items() if not value.strip()]:
        raise UsageError(f"{', '.join(map(_flag_of, empty))} is empty, need a value")
    with refusing():
        return [shape_of({"op": "fp8_gemm_nt"} | row, _flag_of)]


def document(explained: list[Explained]) -> dict[str, Any]:
    """Returns what `explain --json` prints: for each shape its functions, for each its calls of ops."""
    chip = chip_here()
    return {
        "schema": SCHEMA,
        "device": {"name": chip.name, "sms": chip.num_sms},
        "shapes": [
            {
                "shape": dataclasses.asdict(one.shape),
                "functions": [
                    {"title": title, "calls": list(map(_call, found))} for title, found in one.functions
                ],
            }
            for one in explained
        ],
    }


def _call(call: ExplainedCall) -> dict[str, Any]:
    """All fields as numbers, text and lists; "" where there is nothing to say is null."""
    fields = {one.name: getattr(call, one.name) for one in dataclasses.fields(call)}
    fields["config"] = None if call.config is None else dataclasses.asdict(call.config)
    fields["candidates"] = [
        {"config": dataclasses.asdict(config), "microseconds": round(cost.total, 3)}
        for config, cost in call.candidates
    ]
    fields["kernels"] = [dataclasses.asdict(kernel) for kernel in call.kernels]
    return {name: None if value == "" else value for name, value in fields.items()}
