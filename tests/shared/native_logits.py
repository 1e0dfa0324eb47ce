"""The kernels of logits on a CPU: their own source, a fiber for each thread of a block (tensor_block)."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import jax_deepgemm
from jax_deepgemm.core.family import Given
from jax_deepgemm.core.launch import TensorMap
from jax_deepgemm.ops.indexer import sm90
from jax_deepgemm.ops.indexer.family import IndexerConfig, LogitsProblem

NATIVE = Path(__file__).parent / "native" / "tensor_block"
DEVICE_CODE = Path(jax_deepgemm.__file__).parent / "include"
ELEMENT = {"uint8": 1, "bfloat16": 2, "float32": 4, "int32": 4, "tfloat32": 4}

_TEXT = """\
#include <jax_deepgemm/indexer/logits.cuh>
#include <launch.h>
#include <numbers.h>

struct Mma {{
  template <int COUNT>
  static void issue(float (&d)[COUNT], jdg::u64 a, jdg::u64 b, bool accumulate) {{
    jdg::ptx::issue_product<{fp8}>(d, a, b, accumulate);
  }}
}};
{kernel}

int main(int, char** at) {{
  const std::string folder = at[1];
  {buffers}
  const Numbers out("out", folder);
  launch({grid}, 1, {threads}, [&] {{ {name}({arguments}); }});
  out.write();
}}
"""


def run(
    folder: Path,
    p: LogitsProblem,
    c: IndexerConfig,
    operands: Sequence[np.ndarray],
    out: np.ndarray,
    grid: int,
) -> np.ndarray:
    """What the kernel of a configuration writes over `out`, by so many blocks.

    Args:
      folder: for source, program and numbers.
      p, c: the problem, and how it is cut.
      operands: as the kernel reads them (ops/indexer/prepare.py).
      out: what the result holds before.
      grid: blocks of threads, which run one after the other.
    """
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    cache = ("cache",) if p.joined else ("k", *["scales"] * p.is_fp8)
    parts = ("q", *cache, "weights", "start", "end", *["tables"] * (p.page > 0), *["requests"] * p.of_tokens)
    given = {part: Given(i, x.shape) for i, (part, x) in enumerate(zip(parts, operands, strict=True))}
    maps = sm90.tensor_maps(p, c, given)
    source = sm90.kernel_source(p, c)
    kernel = re.sub(r"#include.*\n", "", source.text)
    kernel = kernel[kernel.index("struct Config") :]
    arguments = [f"jdg::ptx::make_map({box(one)})" for one in maps]
    arguments += [f"v{given[part].index}.as<int>()" for part in ("start", "end")]
    kind = "float" if p.out == "float32" else "jdg::bf16"
    arguments += [f"out.as<{kind}>()", *map(str, sm90.integers(p))]
    if p.page:
        tables = given["tables"]
        arguments += [f"v{tables.index}.as<int>()", str(tables.shape[1])]
    if p.of_tokens:
        arguments.append(f"v{given['requests'].index}.as<int>()")
    text = _TEXT.format(
        fp8=str(p.is_fp8).lower(),
        kernel=kernel,
        grid=grid,
        threads=sm90.threads_of(p, c),
        buffers="\n  ".join(f'const Numbers v{i}("{i}", folder);' for i in range(len(operands))),
        name=source.name,
        arguments=", ".join(arguments),
    )
    (folder / "logits.cc").write_text(text)
    flags = ["-std=c++20", "-Og", "-fsanitize=address", "-fno-sanitize-recover"]
    include = [f"-I{NATIVE}", f"-I{NATIVE.parent}", f"-I{DEVICE_CODE}"]
    subprocess.run([compiler, *flags, *include, folder / "logits.cc", "-o", folder / "logits"], check=True)
    for i, array in enumerate(operands):
        array.tofile(folder / str(i))
    out.tofile(folder / "out")
    done = subprocess.run(
        [folder / "logits", folder], capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr
    return np.fromfile(folder / "out", out.dtype).reshape(out.shape)


def box(m: TensorMap) -> str:
    """A `Box` of native/tensor_block."""
    size, rank = ELEMENT[m.dtype], len(m.dims)
    dims, box = (*m.dims, 1, 1)[:3], (*m.box, 1, 1)[:3]
    strides = (size, *m.strides, 0, 0)[:3]
    numbers = ["{" + ", ".join(map(str, one)) + "}" for one in (dims, strides, box)]
    at = f"v{m.buffer.index}.as<char>() + {m.buffer.byte_offset}"
    return f"{{{at}, {size}, {rank}, {m.swizzle}, {', '.join(numbers)}}}"
