"""The kernels of hc_prenorm_gemm on a CPU: their own source, a fiber for each thread of a block
(native/tensor_block), one block after the other. What is outside of operands and results ends the program."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from jax_deepgemm.core.family import Given
from jax_deepgemm.ops.hc_prenorm import sm90
from jax_deepgemm.ops.hc_prenorm.family import HcPrenormConfig, HcPrenormProblem
from tests.shared.native_logits import DEVICE_CODE, NATIVE, box

_HEAD = """\
#include <jax_deepgemm/hc_prenorm/hc_prenorm.cuh>
#include <jax_deepgemm/hc_prenorm/sum.cuh>
#include <fstream>
#include <launch.h>
#include <memory>
#include <string>

struct Mma {
  template <int COUNT>
  static void issue(float (&d)[COUNT], const jdg::u32 (&a)[4], jdg::u64 b, bool) {
    jdg::ptx::issue_tf32(d, a, b);
  }
};

struct Numbers {
  std::string path;
  long size;
  std::unique_ptr<char[]> all;  // of its size exactly
  Numbers(const std::string& from, long bytes) : path(from), size(bytes), all(new char[bytes]) {
    std::memset(all.get(), 0xFF, size);  // NaN
    std::ifstream(path, std::ios::binary).read(all.get(), size);
  }
  template <class T>
  T* as() const { return reinterpret_cast<T*>(all.get()); }
  void write() const { std::ofstream(path, std::ios::binary).write(all.get(), size); }
};
"""

_CASE = """\
namespace case{i} {{
{kernels}
void run(const std::string& folder) {{
  const Numbers v0(folder + "/{i}a", {a}), v1(folder + "/{i}b", {b});
  const Numbers ds(folder + "/none", {ds}), squares(folder + "/none", {squares});
  const Numbers d(folder + "/{i}d", {d}), sum(folder + "/{i}s", {s});
  const jdg::TensorMap map0 = jdg::ptx::make_map({map0}), map1 = jdg::ptx::make_map({map1});
  launch({grid}, 1, {threads}, [&] {{ {name}(map0, map1, {to}, {sizes}); }});
  {summed}
  d.write(), sum.write();
}}
}}
"""

_SUM = """\
launch({grid}, 1, {threads}, [&] {{
    {name}(ds.as<float>(), squares.as<float>(), d.as<float>(), sum.as<float>(), {mn}, {m}, {splits});
  }});"""


class Case(NamedTuple):
    """A launch: a [m, k] as bits of bfloat16, b [n, k]."""

    p: HcPrenormProblem
    c: HcPrenormConfig
    a: np.ndarray
    b: np.ndarray


def run(folder: Path, cases: Sequence[Case]) -> list[tuple[np.ndarray, np.ndarray]]:
    """d and sums of squares of each case, of which the memory was NaN before."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    names = range(len(cases))
    calls = " ".join(f"case{i}::run(at[1]);" for i in names)
    text = "\n".join([_HEAD, *map(_text, names, cases), f"int main(int, char** at) {{ {calls} }}"])
    (folder / "prenorm.cc").write_text(text)
    flags = ["-std=c++20", "-O1", "-fsanitize=address", "-fno-sanitize-recover"]
    include = [f"-I{NATIVE}", f"-I{NATIVE.parent}", f"-I{DEVICE_CODE}"]
    program = folder / "prenorm"
    subprocess.run([compiler, *flags, *include, folder / "prenorm.cc", "-o", program], check=True)
    for i, case in enumerate(cases):
        case.a.tofile(folder / f"{i}a"), case.b.tofile(folder / f"{i}b")
    done = subprocess.run([program, folder], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return [
        tuple(np.fromfile(folder / f"{i}{one}", np.float32).reshape(shape) for one, shape in _shapes(case))
        for i, case in enumerate(cases)
    ]


def _shapes(case: Case) -> list[tuple[str, tuple[int, ...]]]:
    p = case.p
    lead = (p.num_splits,) if p.num_splits else ()
    return [("d", (*lead, p.m, p.n)), ("s", (*lead, p.m))]


def _text(i: int, case: Case) -> str:
    p, c, *_ = case
    summed = sm90.is_summed(p, c)
    sources = [sm90.kernel_source(p, c), *([sm90.sum_source(c)] if summed else [])]
    outside = r"#include[^\n]*\n|^struct Mma .*?^};\n|extern \"C\" "
    kernels = "\n".join(re.sub(outside, "", source.text, flags=re.M | re.S) for source in sources)
    maps = sm90.tensor_maps(p, c, {"a": Given(0, case.a.shape), "b": Given(1, case.b.shape)})
    sizes = dict(_shapes(case))
    to = "ds.as<float>(), squares.as<float>()" if summed else "d.as<float>(), sum.as<float>()"
    return _CASE.format(
        i=i,
        kernels=kernels,
        a=case.a.nbytes,
        b=case.b.nbytes,
        ds=4 * c.splits * p.m * p.n,
        squares=4 * c.splits * p.m,
        d=4 * np.prod(sizes["d"]),
        s=4 * np.prod(sizes["s"]),
        map0=box(maps[0]),
        map1=box(maps[1]),
        grid=sm90.tiles_of(p, c) * c.splits,
        threads=sm90.threads_of(c),
        name=sources[0].name,
        to=to,
        sizes=f"{p.m}, {p.n}, {p.blocks}, {c.splits}",
        summed=_sum(p, c) if summed else "",
    )


def _sum(p: HcPrenormProblem, c: HcPrenormConfig) -> str:
    outputs = sm90.OUTPUTS // sm90.parts_of(c)
    return _SUM.format(
        grid=-(-p.m * (p.n + 1) // outputs),
        threads=sm90.OUTPUTS,
        name=sm90.sum_source(c).name,
        mn=p.m * p.n,
        m=p.m,
        splits=c.splits,
    )
