"""python -m jax_deepgemm compile --shapes FILE: fill the kernel cache, on a machine with or without a GPU.

FILE has one GEMM per line, as JSON objects or as CSV; empty lines and lines that start with # are skipped.

    {"op": "fp8_gemm_nt", "m": 4096, "n": 7168, "k": 2048}
    {"op": "bf16_gemm_tn", "m": 4096, "n": 7168, "k": 2048, "out_dtype": "float32", "accumulate": true}

    op,m,n,k,out_dtype,accumulate,b_block
    fp8_gemm_nt,4096,7168,2048
    bf16_gemm_tn,4096,7168,2048,float32,1
    fp8_gemm_nt,128,7168,2048,bfloat16,0,1x128

The CSV header may be left out (its order is then the one above) or name fewer fields.

| field      | default  |                                                               |
|------------|----------|---------------------------------------------------------------|
| op         |          | fp8_gemm_{nt,nn,tn,tt} or bf16_gemm_{nt,nn,tn,tt}             |
| m, n, k    |          | sizes of the product, [m, n] = [m, k] x [k, n], each >= 1     |
| out_dtype  | bfloat16 | bfloat16 or float32                                           |
| accumulate | 0        | 1: with C                                                     |
| b_block    | 128x128  | FP8 only: elements of B (n x k) per scale, 128x128 or 1x128   |
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from jax_deepgemm.cli.text import bytes_text, table

from .cache import open_cache
from .compiler import CompileError
from .precompile import precompile_records
from .report import describe
from .toolchain import CompilerNotFoundError, read_settings

_OP = re.compile(r"(fp8|bf16)_gemm_([nt])([nt])")
_BLOCKS = {"128x128": (128, 128), "1x128": (1, 128)}
_FLAGS = {"0": False, "1": True, "false": False, "true": True, "": False}


@dataclass(frozen=True)
class Shape:
    """One line of a shapes file; the module's table describes the fields."""

    op: str
    m: int
    n: int
    k: int
    out_dtype: str = "bfloat16"
    accumulate: bool = False
    b_block: str = "128x128"


FIELDS = tuple(field.name for field in fields(Shape))


def parse_shapes(text: str) -> list[Shape]:
    """Reads a shapes file; an error names the line, the rule and the way out.

    >>> parse_shapes("fp8_gemm_nt,64,128,256")
    [Shape(op='fp8_gemm_nt', m=64, n=128, k=256, out_dtype='bfloat16', accumulate=False, b_block='128x128')]
    >>> parse_shapes('{"op": "bf16_gemm_nn", "m": 1, "n": 8, "k": 8}')[0].op
    'bf16_gemm_nn'
    """
    shapes, header = [], FIELDS
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            if line.lstrip().startswith("{"):
                row = json.loads(line)
            else:
                cells = [cell.strip() for cell in next(csv.reader([line]))]
                if "op" in cells:
                    header = tuple(cells)
                    continue
                if len(cells) > len(header):
                    raise ValueError(f"{len(cells)} cells, need at most {len(header)}: {','.join(header)}")
                row = dict(zip(header, cells, strict=False))
            shapes.append(_shape(row))
        except ValueError as error:
            raise ValueError(f"line {number}: {line.strip()!r}: {error}") from None
    return shapes


def _shape(row: dict[str, Any]) -> Shape:
    if unknown := sorted(set(row) - set(FIELDS)):
        raise ValueError(f"unknown field {', '.join(unknown)}; the fields are {', '.join(FIELDS)}")
    if missing := [name for name in ("op", "m", "n", "k") if not row.get(name)]:
        raise ValueError(f"{', '.join(missing)} is missing or 0; op, m, n and k are needed, sizes at least 1")
    given = {name: str(value).strip() for name, value in row.items() if value not in ("", None)}
    if not _OP.fullmatch(given["op"]):
        raise ValueError(f"op is {given['op']!r}, need fp8_gemm_ or bf16_gemm_ with nt, nn, tn or tt")
    sizes = {}
    for name in ("m", "n", "k"):
        if not given[name].isdecimal() or int(given[name]) < 1:
            raise ValueError(f"{name} is {given[name]!r}, need a whole number, at least 1")
        sizes[name] = int(given[name])
    dtype = _one_of(given, "out_dtype", "bfloat16", ("bfloat16", "float32"))
    accumulate = _FLAGS[_one_of(given, "accumulate", "0", tuple(_FLAGS)).lower()]
    block = _one_of(given, "b_block", "128x128", tuple(_BLOCKS))
    return Shape(given["op"], **sizes, out_dtype=dtype, accumulate=accumulate, b_block=block)


def _one_of(given: dict[str, str], name: str, default: str, allowed: tuple[str, ...]) -> str:
    value = given.get(name, default)
    if value.lower() not in allowed:
        raise ValueError(f"{name} is {value!r}, need {' or '.join(filter(None, allowed))}")
    return value


def traceable(shape: Shape) -> tuple[Any, ...]:
    """(function, a, b, c) of a line, for `precompile`; operands are shapes, no memory is used."""
    import jax
    import jax.numpy as jnp

    import jax_deepgemm

    match = _OP.fullmatch(shape.op)
    assert match
    family, a_letter, b_letter = match.groups()
    k_last = (a_letter == "n", b_letter == "t")
    operands = []
    for rows, last, block in zip((shape.m, shape.n), k_last, ((1, 128), _BLOCKS[shape.b_block]), strict=True):
        stored, stored_block = ((rows, shape.k), block) if last else ((shape.k, rows), block[::-1])
        operand = jax.ShapeDtypeStruct(stored, jnp.bfloat16)
        if family == "fp8":
            operand = jax.eval_shape(functools.partial(jax_deepgemm.quantize, block=stored_block), operand)
        operands.append(operand)
    c = jax.ShapeDtypeStruct((shape.m, shape.n), shape.out_dtype) if shape.accumulate else None
    op = getattr(jax_deepgemm, shape.op)
    return (lambda a, b, c: op(a, b, c, out_dtype=jnp.dtype(shape.out_dtype)), *operands, c)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the compile command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (__doc__ or "").split("\n\n", 1)[1]
    parser.add_argument(
        "--shapes", metavar="FILE", required=True, help="GEMMs, as JSON lines or CSV; - is stdin"
    )
    parser.add_argument(
        "--arch", default="90a", choices=["90a"], help="target architecture (default: 90a, Hopper)"
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="threads (default: one per core)")
    parser.add_argument("--json", action="store_true", help="print a JSON list with one object per kernel")


def run(args: argparse.Namespace) -> int:
    """Compiles; exit code 0, 1 for a kernel that fails or is not kept, 2 for a shapes file that is wrong."""
    from jax_deepgemm.sm90.chip import H200

    try:
        text = sys.stdin.read() if args.shapes == "-" else Path(args.shapes).read_text(encoding="utf-8")
        shapes = parse_shapes(text)
    except (OSError, ValueError) as error:
        print(f"compile: {args.shapes}: {error}", file=sys.stderr)
        return 2
    try:
        records = precompile_records(map(traceable, shapes), chip=H200, jobs=args.jobs)
    except (CompileError, CompilerNotFoundError) as error:
        print(f"compile: {error}", file=sys.stderr)
        return 1
    rows = list({kernel.digest: describe(source, kernel) for source, kernel in records}.values())
    print(json.dumps(rows, indent=1) if args.json else _text(rows, len(shapes)))
    cache = open_cache(read_settings().cache_dir)
    if not cache.writable:
        print(f"compile: not all kernels are kept: {cache.root} cannot be written", file=sys.stderr)
        return 1
    return 0


def _text(rows: list[dict[str, Any]], shapes: int) -> str:
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
    return f"{table(header, lines)}\n{len(rows)} kernels for {shapes} shapes in {read_settings().cache_dir}"
