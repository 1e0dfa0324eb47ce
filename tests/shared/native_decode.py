"""The kernels of attention of few rows on a CPU: their own sources, a fiber for each thread of a block
(native/decode_block)."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

import jax_deepgemm
from jax_deepgemm.ops.attention.family import AttentionConfig
from jax_deepgemm.ops.attention.problem import AttentionProblem
from jax_deepgemm.ops.attention.sm90 import decode

NATIVE = Path(__file__).parent / "native"
DEVICE_CODE = Path(jax_deepgemm.__file__).parent / "include"
PARTS = ("q", "k", "v", "k_scale", "v_scale", "tables", "cu_q_lens", "kv_lens", "layer", "sinks", "slopes")
RESULTS = ("out", "lse", "parts", "part_stats")

_TEXT = """\
#include <jax_deepgemm/ptx/barrier.cuh>
#include <jax_deepgemm/attention/merge.cuh>
#include <launch.h>
#include <numbers.h>

namespace decoding {{
{decode}
}}
namespace merging {{
{merge}
}}

void attend(const std::string& folder, int shares) {{
  {buffers}
  launch(shares, 1, {threads}, [&] {{ decoding::{decode_name}({arguments}); }});
  launch({columns}, {heads}, {merge_threads}, [&] {{ merging::{merge_name}({arguments}); }});
  out.write();
  lse.write();
}}

int main(int count, char** at) {{
  for (int i = 1; i < count; i += 2) attend(at[i], std::stoi(at[i + 1]));
}}
"""


def run(
    folder: Path,
    p: AttentionProblem,
    c: AttentionConfig,
    calls: Sequence[tuple[Mapping[str, np.ndarray], int]],
    *,
    sanitize: bool = True,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """What the kernels of a configuration make of each call: output and logarithms, which hold NaN before.

    Args:
      folder: for source, program and numbers.
      p, c: the problem, and how it is cut.
      calls: operands by the names of PARTS, and by how many blocks of threads, which run one after the other.
      sanitize: whether accesses out of bounds end the program.
    """
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    sources = {"decode": decode.decode_source(p, c), "merge": decode.merge_source(p, c)}
    texts = {kind: s.text[s.text.index("struct Config") :] for kind, s in sources.items()}
    numbers = [p.tokens, p.seqs, p.table_pages, p.pages, p.layers, p.kv_heads, p.max_q_len or 2**31 - 1]
    factors = [f"{p.scale!r}f", f"{p.softcap!r}f"]
    last = [p.window, *decode.cutting(p, c)]
    text = _TEXT.format(
        **texts,
        buffers="\n  ".join(f'const Numbers {name}("{name}", folder);' for name in (*PARTS, *RESULTS)),
        arguments=", ".join([*PARTS, *RESULTS, *map(str, numbers), *factors, *map(str, last), "shares"]),
        threads=32 * c.warps,
        merge_threads=32 * decode.merge_warps(p),
        columns=(p.tokens + 1) // 2,
        heads=p.heads,
        decode_name=sources["decode"].name,
        merge_name=sources["merge"].name,
    )
    (folder / "decode.cc").write_text(text)
    flags = ["-std=c++20", "-O1", "-Wno-psabi"]
    flags += ["-fsanitize=address", "-fno-sanitize-recover"] if sanitize else []
    paths = (
        NATIVE / "decode_block",
        NATIVE / "attention_block",
        NATIVE / "tensor_block",
        NATIVE,
        DEVICE_CODE,
    )
    include = [f"-I{path}" for path in paths]
    subprocess.run([compiler, *flags, *include, folder / "decode.cc", "-o", folder / "decode"], check=True)
    folders = [folder / str(i) for i in range(len(calls))]
    for to, (operands, shares) in zip(folders, calls, strict=True):
        to.mkdir()
        for name, array in {**operands, **_results(p, c, operands["q"].dtype, shares)}.items():
            array.tofile(to / name)
    given = [str(x) for to, (_, shares) in zip(folders, calls, strict=True) for x in (to, shares)]
    done = subprocess.run(
        [folder / "decode", *given], capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr
    return [_read(to, p, operands["q"].dtype) for to, (operands, _) in zip(folders, calls, strict=True)]


def _results(p: AttentionProblem, c: AttentionConfig, kind: np.dtype, shares: int) -> dict[str, np.ndarray]:
    slots = decode.most_weights(p, c) if p.split else 2 * shares
    shapes = {
        "out": (p.tokens, p.heads, p.v_depth),
        "lse": (p.tokens, p.heads),
        "parts": (slots, decode.ROWS, p.v_depth),
        "part_stats": (slots, decode.ROWS, 2),
    }
    return {
        name: np.full(shape, np.nan, kind if name == "out" else np.float32) for name, shape in shapes.items()
    }


def _read(folder: Path, p: AttentionProblem, kind: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    out, lse = np.fromfile(folder / "out", kind), np.fromfile(folder / "lse", np.float32)
    return out.reshape(p.tokens, p.heads, p.v_depth), lse.reshape(p.tokens, p.heads)
