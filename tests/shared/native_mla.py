"""The kernels of latent attention on a CPU: their own sources, a fiber for each thread of a block
(native/decode_block, native/attention_block)."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

import jax_deepgemm
from jax_deepgemm.ops.mla import sm90
from jax_deepgemm.ops.mla.family import MlaConfig
from jax_deepgemm.ops.mla.problem import ROWS, MlaProblem

NATIVE = Path(__file__).parent / "native"
DEVICE_CODE = Path(jax_deepgemm.__file__).parent / "include"
PARTS = ("q", "cache", "tables", "cu_q_lens", "kv_lens", "layer")
RESULTS = ("out", "lse", "parts", "part_stats")

_TEXT = """\
#include <jax_deepgemm/ptx/barrier.cuh>
#include <jax_deepgemm/mla/merge.cuh>
#include <jax_deepgemm/mla/mla.cuh>
#include <launch.h>
#include <numbers.h>

namespace scores {{
struct Mma {{
  template <int COUNT>
  static void issue(float (&d)[COUNT], jdg::u64 a, jdg::u64 b, bool accumulate) {{
    jdg::ptx::issue_product<{half}>(d, a, b, accumulate);
  }}
}};
}}
namespace held {{
struct Mma {{  // A in registers, B rows of 128 bytes of k
  template <int COUNT>
  static void issue(float (&d)[COUNT], const jdg::u32 (&a)[4], jdg::u64 b, bool accumulate) {{
    using namespace jdg::ptx;
    issued->push_back([&d, &a, b, accumulate] {{
      float rows[2][16];
      for (int i = 0; i < 4; ++i)
        exchange(a[i], [&](unsigned lane, jdg::u32 two) {{
          if (lane / 4 != threadIdx.x % 32 / 4) return;
          for (int e = 0; e < 2; ++e)
            rows[i % 2][lane % 4 * 2 + i / 2 * 8 + e] = number<{half}>(two >> 16 * e & 0xFFFF);
        }});
      for (int i = 0; i < COUNT; ++i) {{
        const jdg::u32 at = Operand(b).row(i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2);
        float sum = accumulate ? d[i] : 0.0f;
        for (int k = 0; k < 16; ++k) sum += rows[i / 2 % 2][k] * element<{half}>(at + k * 2);
        d[i] = sum;
      }}
    }});
  }}
}};
}}
namespace left {{
struct Mma {{
  template <int COUNT>
  static void issue(float (&d)[COUNT], const jdg::u32 (&a)[4], jdg::u64 b, bool accumulate) {{
    jdg::ptx::issue_from_registers<{half}>(d, a, b, accumulate);
  }}
}};
}}
namespace right {{
struct Mma {{  // A is rows of 128 bytes of k; B rows of k, 64 columns of a slab each
  template <int COUNT>
  static void issue(float (&d)[COUNT], jdg::u64 a, jdg::u64 b, bool accumulate) {{
    using namespace jdg::ptx;
    issued->push_back([&d, a, b, accumulate] {{
      for (int i = 0; i < COUNT; ++i) {{
        const jdg::u32 row = threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4 + i / 2 % 2 * 8;
        const jdg::u32 col = i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
        const jdg::u32 at = col / 64 * Operand(b).slab + col % 64 * 2;
        float sum = accumulate ? d[i] : 0.0f;
        for (int k = 0; k < 16; ++k)
          sum += element<{half}>(Operand(a).row(row) + k * 2) * element<{half}>(Operand(b).row(k) + at);
        d[i] = sum;
      }}
    }});
  }}
}};
}}
namespace reading {{
{reading}
}}
namespace adding {{
{adding}
}}

void attend(const std::string& folder) {{
  {buffers}
  launch({blocks}, 1, {threads}, [&] {{ reading::{reading_name}({arguments}); }});
  launch({tokens}, {columns}, 256, [&] {{ adding::{adding_name}({arguments}); }});
  out.write();
  lse.write();
}}

int main(int count, char** at) {{
  for (int i = 1; i < count; ++i) attend(at[i]);
}}
"""


def run(
    folder: Path,
    p: MlaProblem,
    c: MlaConfig,
    calls: Sequence[Mapping[str, np.ndarray]],
    teams: int,
    *,
    sanitize: bool = True,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """What the kernels of a configuration make of each call: output and logarithms, which hold NaN before.

    Args:
      folder: for source, program and numbers.
      p, c: the problem, and how it is cut.
      calls: operands by the names of PARTS; those of a sparse problem have no lengths.
      teams: of blocks of threads, which run one after the other.
      sanitize: whether accesses out of bounds end the program.
    """
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    sources = {"reading": sm90.main_source(p, c), "adding": sm90.merge_source(p, c)}
    texts = {kind: s.text[s.text.index("struct Config") :] for kind, s in sources.items()}
    texts = {kind: text.replace("= scores::", "= ::scores::") for kind, text in texts.items()}
    numbers = [
        *map(str, sm90.numbers(p)),
        f"{p.scale!r}f",
        *map(str, (sm90.part_tiles(p), sm90.most_weights(p, c), teams)),
    ]
    text = _TEXT.format(
        **texts,
        half=str(p.dtype == "f16").lower(),
        buffers="\n  ".join(f'const Numbers {name}("{name}", folder);' for name in (*PARTS, *RESULTS)),
        arguments=", ".join([*PARTS, *RESULTS, *numbers]),
        blocks=teams * c.team,
        threads=sm90.THREADS,
        tokens=p.tokens,
        columns=sm90.ceil_div(p.heads, sm90.merge_shape(p)[1]),
        reading_name=sources["reading"].name,
        adding_name=sources["adding"].name,
    )
    (folder / "mla.cc").write_text(text)
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
    subprocess.run([compiler, *flags, *include, folder / "mla.cc", "-o", folder / "mla"], check=True)
    rows = (sm90.most_weights(p, c) if p.split else 2 * teams) * ROWS * c.team
    results = {
        "out": np.full((p.tokens, p.heads, p.v_depth), np.nan, calls[0]["q"].dtype),
        "lse": np.full((p.tokens, p.heads), np.nan, np.float32),
        "parts": np.full((rows, p.v_depth), np.nan, np.float32),
        "part_stats": np.full((rows, 2), np.nan, np.float32),
    }
    folders = [folder / str(i) for i in range(len(calls))]
    for to, operands in zip(folders, calls, strict=True):
        to.mkdir()
        nothing = dict.fromkeys(PARTS, np.zeros(1, np.int32))
        for name, array in {**nothing, **operands, **results}.items():
            array.tofile(to / name)
    done = subprocess.run(
        [folder / "mla", *folders], capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr

    def read(at: Path, name: str) -> np.ndarray:
        like = results[name]
        return np.fromfile(at / name, like.dtype).reshape(like.shape)

    return [(read(at, "out"), read(at, "lse")) for at in folders]
