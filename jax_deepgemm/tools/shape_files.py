"""Shapes to compile for: what a shapes file and `precompile` say of a call, without any array.

A file has a shape a line, as JSON objects or as CSV; empty lines and lines that start with # are skipped.

    {"op": "fp8_gemm_nt", "m": 4096, "n": 7168, "k": 2048}
    {"op": "bf16_gemm_tn", "m": 4096, "n": 7168, "k": 2048, "out_dtype": "float32", "accumulate": true}
    {"op": "m_grouped_fp8_gemm_nt_contiguous", "groups": 32, "m": 8192, "n": 4096, "k": 7168}
    {"op": "m_grouped_fp8_gemm_nt_masked", "groups": 32, "m": 128, "n": 4096, "k": 7168, "expected_m": 16}
    {"op": "m_grouped_fp8_gemm_nt_masked", "groups": 32, "m": 128, "n": 4096, "k": 7168, "weights": "fp4"}
    {"op": "m_grouped_bf16_gemm_nt_masked", "groups": 8, "m": 64, "n": 4096, "k": 512, "activation": "swiglu"}
    {"op": "k_grouped_fp8_gemm_nt_contiguous", "groups": 32, "m": 4096, "n": 7168, "k": 8192}
    {"op": "m_grouped_fp8_gemm_nt_gathered", "groups": 32, "tokens": 4096, "m": 8192, "n": 4096, "k": 7168}
    {"op": "k_grouped_bf16_gemm_tn_gathered", "groups": 32, "tokens": 4096, "m": 7168, "n": 4096, "k": 8192}
    {"op": "k_grouped_fp8_gemm_tn_gathered", "groups": 32, "tokens": 4096, "m": 7168, "n": 4096, "k": 8192}
    {"op": "bf16_einsum", "expr": "bhr,hdr->bhd", "batch": 128, "m": 4096, "n": 128, "k": 512}
    {"op": "fp8_linear", "m": 4096, "n": 7168, "k": 2048}
    {"op": "grouped_linear", "groups": 32, "m": 8192, "n": 4096, "k": 7168, "recipe": "bf16"}
    {"op": "ragged_dot", "groups": 32, "m": 8192, "n": 4096, "k": 7168, "gradients": false}
    {"op": "route", "tokens": 4096, "experts": 256, "top_k": 8, "score": "sigmoid", "bias": true}
    {"op": "topk", "rows": 64, "columns": 65536, "k": 2048}
    {"op": "mqa_logits", "tokens": 2048, "keys": 8192, "heads": 64}
    {"op": "paged_mqa_logits", "requests": 64, "pages": 128, "heads": 64}
    {"op": "indexer_quantize", "tokens": 4096, "heads": 64}
    {"op": "indexer_topk", "tokens": 2048, "keys": 8192, "k": 512}
    {"op": "paged_append", "tokens": 64, "heads": 32, "kv_heads": 8, "stored": "float8_e4m3fn"}
    {"op": "ragged_paged_attention", "tokens": 32, "sequences": 32, "keys": 4096, "heads": 32, "kv_heads": 8}
    {"op": "paged_mla_attention", "tokens": 128, "heads": 16, "seqs": 128}
    {"op": "sparse_mla_attention", "tokens": 128, "keys": 2048}
    {"op": "norm", "tokens": 4096, "hidden": 7168, "kind": "rms", "normed": false, "fp8": "f32"}
    {"op": "hc_prenorm_gemm", "m": 4096, "n": 24, "k": 28672}
    {"op": "moe_mlp", "tokens": 4096, "hidden": 7168, "intermediate": 2048, "experts": 32, "top_k": 8}
    {"op": "moe_mlp_decode", "tokens": 64, "hidden": 7168, "intermediate": 2048, "experts": 32, "top_k": 8}

GEMMs are compiled as they are called. Layers (fp8_linear, grouped_linear, ragged_dot, route, moe_mlp) are
compiled forward, and forward and backward, with all their kernels: those that quantise, too. Groups have any
sizes.

A JSON array of such objects, over any number of lines, is read too. CSV names its fields in a line that has
`op` among them, and again wherever they change; without one they are op,m,n,k,out_dtype,accumulate,b_block:

    fp8_gemm_nt,4096,7168,2048
    fp8_gemm_nt,128,7168,2048,bfloat16,0,1x128
    op,tokens,hidden,intermediate,experts,top_k,recipe
    moe_mlp,4096,7168,2048,32,8,fp8
    moe_mlp,4096,7168,2048,32,8,bf16
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING
from typing import Any, TypeAlias

from jax_deepgemm.core.shapes import CallShape, clipped
from jax_deepgemm.tools import registry


def kinds() -> dict[str, type[CallShape]]:
    """Returns the `Shape` of each op.

    >>> kinds()["fp8_gemm_nt"].__name__, "moe_mlp" in kinds()
    ('DenseShape', True)
    """
    return _kinds_of(registry.FOLDERS)


@functools.cache
def _kinds_of(folders: tuple[str, ...]) -> dict[str, type[CallShape]]:
    found = [kind for module in registry.parts("shapes") for kind in module.SHAPES]
    return {op: kind for kind in found for op in kind.OPS}


def shape_of(row: Mapping[str, Any], spell: Callable[[str], str] = str) -> CallShape:
    """Returns the shape that the fields of a line make.

    >>> str(shape_of({"op": "bf16_gemm_nn", "m": 1, "n": 8, "k": 8}))
    'bf16_gemm_nn m=1 n=8 k=8'

    Args:
      row: fields by name, as numbers or text; None and "" are those that are not given.
      spell: how a message writes the name of a field.

    Raises:
      ValueError: an op or a field that there is not, a value that is none of its field, or a field missing.
    """
    given = {name: str(value).strip() for name, value in row.items() if value not in ("", None)}
    op = given.pop("op", None)
    if op is None:
        raise ValueError(f"{spell('op')} is missing; there are {', '.join(kinds())}")
    if op not in kinds():
        raise ValueError(f"{spell('op')} is {clipped(op)}, need one of {', '.join(kinds())}")
    known = {one.name: one for one in dataclasses.fields(kinds()[op])[1:]}
    if unknown := [name for name in given if name not in known]:
        names = ", ".join(map(spell, known))
        raise ValueError(f"{op} has no field {', '.join(map(spell, unknown))}; its fields are {names}")
    needed = [name for name, one in known.items() if one.default is MISSING]
    if missing := [name for name in needed if name not in given]:
        names = ", ".join(map(spell, needed))
        raise ValueError(f"{', '.join(map(spell, missing))} is missing; {op} needs {names}")
    return kinds()[op](op, **{name: _value(spell(name), known[name], text) for name, text in given.items()})


def _value(name: str, about: Any, text: str) -> Any:
    try:
        return about.metadata["read"](text)
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None


def parse_shapes(text: str) -> list[CallShape]:
    """Reads a shapes file; an error names the line, the rule and the way out.

    >>> [str(shape) for shape in parse_shapes("fp8_gemm_nt,64,128,256\\n# more\\nbf16_gemm_nn,64,128,256")]
    ['fp8_gemm_nt m=64 n=128 k=256', 'bf16_gemm_nn m=64 n=128 k=256']

    Raises:
      ValueError: a line that is no shape, or none at all.
    """
    found = []
    for where, shown, read in _array(text) if text.lstrip().startswith("[") else _lines(text):
        try:
            row = read()
            found += [] if row is None else [shape_of(row)]
        except ValueError as error:
            raise ValueError(f"{where}: {clipped(shown)}: {error}") from None
    if not found:
        raise ValueError(
            'holds no shape, need at least one, such as {"op": "fp8_gemm_nt", "m": 64, "n": 512, "k": 512}'
        )
    return found


Row: TypeAlias = dict[str, Any] | None
Rows: TypeAlias = Iterator[tuple[str, str, Callable[[], Row]]]
"""Where something stands, as text, and what makes the fields of a shape of it: None if it is none."""


def _array(text: str) -> Rows:
    for number, row in enumerate(parse_json(text), 1):
        if not isinstance(row, dict):
            raise ValueError(f"item {number} of the array is {clipped(row)}, need an object")
        yield f"item {number}", json.dumps(row), functools.partial(dict, row)


def _lines(text: str) -> Rows:
    reader = _Lines()
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if stripped and not stripped.startswith("#"):
            yield f"line {number}", stripped, functools.partial(reader.row, stripped)


class _Lines:
    """Lines of JSON objects and of CSV; the fields of CSV are those that were named last."""

    header: tuple[str, ...] = ("op", "m", "n", "k", "out_dtype", "accumulate", "b_block")

    def row(self, line: str) -> Row:
        if line.startswith("["):
            raise ValueError("an array among lines, need an object a line, or the whole file as one array")
        if line.startswith("{"):
            try:
                found: dict[str, Any] = parse_json(line)
            except ValueError as error:
                raise ValueError(f"{error} (an object a line, or the whole file as one array)") from None
            return found
        cells = _cells(line)
        if "op" in cells:
            self.header = tuple(cells)
            return None
        if set(cells) <= _field_names():
            raise ValueError("names fields, but not op; name it too: each line says what to call")
        if len(cells) > len(self.header):
            raise ValueError(f"{len(cells)} cells, need at most {len(self.header)}: {','.join(self.header)}")
        return dict(zip(self.header, cells, strict=False))


def _cells(line: str) -> list[str]:
    try:
        return [cell.strip() for cell in next(csv.reader([line], strict=True), [])]
    except csv.Error as error:
        raise ValueError(f"no CSV: {error}") from None


def _field_names() -> set[str]:
    return {one.name for kind in kinds().values() for one in dataclasses.fields(kind)}


def parse_json(text: str) -> Any:
    """`json.loads`, whose errors name the line.

    >>> parse_json('{"schema": 1,\\n "rows": }')
    Traceback (most recent call last):
    ValueError: broken JSON in line 2, column 10: Expecting value

    Raises:
      ValueError: the text is no JSON.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}" if "\n" in text else f"column {error.colno}"
        raise ValueError(f"broken JSON in {where}: {error.msg}") from None
    except RecursionError:
        raise ValueError("broken JSON: nested too deeply") from None


def reference() -> str:
    """Returns a table of all ops and their fields, for `--help`."""
    parts = []
    for kind in dict.fromkeys(kinds().values()):
        rows = []
        for one in dataclasses.fields(kind)[1:]:
            default = "" if one.default in (MISSING, None) else f" (default {_spelt(one.default)})"
            rows.append(f"    {one.name:<13} {one.metadata['about']}{default}")
        about = (kind.__doc__ or "").splitlines()[0]
        parts.append("\n".join([about, *(f"  {op}" for op in kind.OPS), *rows]))
    return "\n\n".join(parts)


def _spelt(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
