"""The prefill kernel of attention on a CPU: its own source, a fiber for each thread of a block
(native/attention_block)."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

import jax_deepgemm
from jax_deepgemm.core.family import Given
from jax_deepgemm.core.launch import TensorMap
from jax_deepgemm.ops.attention.problem import AttentionProblem
from jax_deepgemm.ops.attention.sm90 import prefill

NATIVE = Path(__file__).parent / "native"
DEVICE_CODE = Path(jax_deepgemm.__file__).parent / "include"
PARTS = ("q", "k", "v", "k_scale", "v_scale", "tables", "cu_q_lens", "kv_lens", "layer", "sinks", "slopes")

_TEXT = """\
#include <jax_deepgemm/ptx/barrier.cuh>  // CUDA's words, in front of all

inline int atomicAdd(int* at, int value) {{ return __atomic_fetch_add(at, value, __ATOMIC_RELAXED); }}

#include <jax_deepgemm/attention/prefill.cuh>
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
namespace values {{
struct Mma {{
  template <int COUNT>
  static void issue(float (&d)[COUNT], const jdg::u32 (&a)[4], jdg::u64 b, bool accumulate) {{
    jdg::ptx::issue_from_registers<{half}>(d, a, b, accumulate);
  }}
}};
}}
namespace rest {{
using values::Mma;
}}
{kernel}

void attend(const std::string& folder) {{
  {buffers}
  int tickets = 0;
  launch({grid}, 1, {threads}, [&] {{ {name}({arguments}); }});
  out.write();
  lse.write();
}}

int main(int count, char** at) {{
  for (int i = 1; i < count; ++i) attend(at[i]);
}}
"""


def run(
    folder: Path,
    p: AttentionProblem,
    c: prefill.PrefillConfig,
    calls: Sequence[Mapping[str, np.ndarray]],
    grid: int,
    *,
    sanitize: bool = True,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """What the kernel of a configuration makes of each call, by so many blocks: output and logarithms, which
    hold NaN before.

    Args:
      folder: for source, program and numbers.
      p, c: the problem, and how it is cut.
      calls: operands by the names of PARTS.
      grid: blocks of threads, which run one after the other.
      sanitize: whether accesses out of bounds end the program.
    """
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    given = {part: Given(i, calls[0][part].shape) for i, part in enumerate(PARTS)}
    k, v = prefill.tensor_maps(p, c, given)
    source = prefill.prefill_source(p, c)
    kernel = source.text[source.text.index("struct Config") :]
    arguments = [
        f"q.as<jdg::{p.q_dtype}>()",
        f"jdg::ptx::make_map({box('k', k)})",
        f"jdg::ptx::make_map({box('v', v)})",
    ]
    arguments += ["k_scale.as<float>()", "v_scale.as<float>()"]
    arguments += [f"{part}.as<int>()" for part in ("tables", "cu_q_lens", "kv_lens", "layer")]
    arguments += ["sinks.as<float>()", "slopes.as<float>()", f"out.as<jdg::{p.q_dtype}>()", "lse.as<float>()"]
    arguments += [
        *map(str, prefill.integers(p)),
        *(f"{x!r}f" for x in (p.scale, p.softcap)),
        str(p.window),
        "&tickets",
    ]
    text = _TEXT.format(
        half=str(p.q_dtype == "f16").lower(),
        kernel=kernel,
        grid=grid,
        threads=prefill.threads_of(c),
        buffers="\n  ".join(f'const Numbers {x}("{x}", folder);' for x in (*PARTS, "out", "lse")),
        name=source.name,
        arguments=", ".join(arguments),
    )
    (folder / "prefill.cc").write_text(text)
    flags = ["-std=c++20", "-Og", "-Wno-psabi"]
    flags += ["-fsanitize=address", "-fno-sanitize-recover"] if sanitize else []
    include = [
        f"-I{path}" for path in (NATIVE / "attention_block", NATIVE / "tensor_block", NATIVE, DEVICE_CODE)
    ]
    subprocess.run([compiler, *flags, *include, folder / "prefill.cc", "-o", folder / "prefill"], check=True)
    kind = calls[0]["q"].dtype
    results = {
        "out": np.full((p.tokens, p.heads, p.v_depth), np.nan, kind),
        "lse": np.full((p.tokens, p.heads), np.nan, np.float32),
    }
    folders = [folder / str(i) for i in range(len(calls))]
    for to, operands in zip(folders, calls, strict=True):
        to.mkdir()
        for name, array in {**operands, **results}.items():
            array.tofile(to / name)
    done = subprocess.run(
        [folder / "prefill", *folders], capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr

    def read(at: Path, name: str) -> np.ndarray:
        like = results[name]
        return np.fromfile(at / name, like.dtype).reshape(like.shape)

    return [(read(at, "out"), read(at, "lse")) for at in folders]


def box(part: str, m: TensorMap) -> str:
    """A `Box` of native/attention_block."""
    size = 1 if m.dtype == "uint8" else 2
    sizes = [(*one, 1)[:5] for one in (m.box, m.dims, (size, *m.strides))]
    numbers = ["{" + ", ".join(map(str, one)) + "}" for one in sizes]
    return f"{{{part}.as<char>(), {size}, {m.swizzle}, {', '.join(numbers)}}}"
