"""The kernels of attention of few rows on a CPU: their own sources, a thread for each of a block's
(native/decode_block)."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
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
#include <fstream>
#include <iterator>
#include <string>
#include <thread>

namespace decoding {{
{decode}
}}
namespace merging {{
{merge}
}}

struct Numbers {{
  std::string path;
  long size;
  void* all;  // of its size exactly
  explicit Numbers(const std::string& name, const std::string& folder) : path(folder + "/" + name) {{
    std::ifstream file(path, std::ios::binary);
    const std::string bytes{{std::istreambuf_iterator<char>(file), {{}}}};
    size = bytes.size();
    if (posix_memalign(&all, 16, size)) std::abort();
    std::memcpy(all, bytes.data(), size);
  }}
  ~Numbers() {{ std::free(all); }}
  template <class T>
  operator T*() const {{ return static_cast<T*>(all); }}
  void write() const {{ std::ofstream(path, std::ios::binary).write(static_cast<char*>(all), size); }}
}};

template <class Kernel>
void launch(unsigned blocks, unsigned columns, int count, const Kernel& kernel) {{
  gridDim.x = blocks;
  for (unsigned block = 0; block < blocks * columns; ++block) {{
    blockIdx.x = block % blocks, blockIdx.y = block / blocks;
    std::memset(jdg::shared, 0xFF, sizeof jdg::shared);
    std::vector<Warp> all_warps(count / 32);
    std::barrier<> all_threads(count);
    warps = &all_warps, threads = &all_threads;
    std::vector<std::thread> running;
    for (int i = 0; i < count; ++i)
      running.emplace_back([&, i] {{
        threadIdx.x = i;
        kernel();
        all_threads.arrive_and_drop();
      }});
    for (std::thread& one : running) one.join();
  }}
}}

int main(int, char** at) {{
  const std::string folder = at[1];
  {buffers}
  launch({shares}, 1, {threads}, [&] {{ decoding::{decode_name}({arguments}); }});
  launch({tokens}, {heads}, {merge_threads}, [&] {{ merging::{merge_name}({arguments}); }});
  out.write();
  lse.write();
}}
"""


def run(
    folder: Path,
    p: AttentionProblem,
    c: AttentionConfig,
    operands: Mapping[str, np.ndarray],
    shares: int,
    *,
    sanitize: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """What the kernels of a configuration make of a call: output and logarithms, which hold NaN before.

    Args:
      folder: for source, program and numbers.
      p, c: the problem, and how it is cut.
      operands: by the names of PARTS.
      shares: blocks of threads, which run one after the other.
      sanitize: whether accesses out of bounds end the program.
    """
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    sources = {"decode": decode.decode_source(p, c), "merge": decode.merge_source(p, c)}
    texts = {kind: s.text[s.text.index("struct Config") :] for kind, s in sources.items()}
    numbers = [p.tokens, p.seqs, p.table_pages, p.pages, p.layers, p.kv_heads, p.max_q_len or 2**31 - 1]
    factors = [f"{p.scale!r}f", f"{p.softcap!r}f"]
    last = [p.window, decode.parts_of(p, c), 2**31 - 1, shares]
    text = _TEXT.format(
        **texts,
        buffers="\n  ".join(f'const Numbers {name}("{name}", folder);' for name in (*PARTS, *RESULTS)),
        arguments=", ".join([*PARTS, *RESULTS, *map(str, numbers), *factors, *map(str, last)]),
        shares=shares,
        threads=32 * c.warps,
        merge_threads=32 * decode.merge_warps(p),
        tokens=p.tokens,
        heads=p.heads,
        decode_name=sources["decode"].name,
        merge_name=sources["merge"].name,
    )
    (folder / "decode.cc").write_text(text)
    flags = ["-std=c++20", "-O1", "-pthread", "-Wno-psabi"]
    flags += ["-fsanitize=address", "-fno-sanitize-recover"] if sanitize else []
    paths = (NATIVE / "decode_block", NATIVE / "attention_block", NATIVE / "tensor_block", DEVICE_CODE)
    include = [f"-I{path}" for path in paths]
    subprocess.run([compiler, *flags, *include, folder / "decode.cc", "-o", folder / "decode"], check=True)
    slots = 2 * shares if not p.split else decode.most_weights(p, c)
    results = {
        "out": np.full((p.tokens, p.heads, p.v_depth), np.nan, operands["q"].dtype),
        "lse": np.full((p.tokens, p.heads), np.nan, np.float32),
        "parts": np.full((slots, decode.ROWS, p.v_depth), np.nan, np.float32),
        "part_stats": np.full((slots, decode.ROWS, 2), np.nan, np.float32),
    }
    for name, array in {**operands, **results}.items():
        array.tofile(folder / name)
    done = subprocess.run([folder / "decode", folder], capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr

    def read(name: str) -> np.ndarray:
        like = results[name]
        return np.fromfile(folder / name, like.dtype).reshape(like.shape)

    return read("out"), read("lse")
