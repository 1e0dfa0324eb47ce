"""Kernels of whole warps on a CPU: their own source, a thread for each lane (native/swiglu_warp), one warp
after the other. Accesses out of bounds, and lanes that do not meet, end the program."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jax_deepgemm
from jax_deepgemm.core.launch import Launch, LaunchPlan, Scalar
from jax_deepgemm.jit import KernelSource

NATIVE = Path(__file__).parent / "native"
DEVICE_CODE = Path(jax_deepgemm.__file__).parent / "include"

_HEAD = """\
#include <cuda.h>

#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>
#include <thread>
#include <vector>

#define __global__
#define __launch_bounds__(...)

struct Bytes {
  std::string path, all;
  void* aligned;
  explicit Bytes(const std::string& from) : path(from) {
    std::ifstream file(path, std::ios::binary);
    all.assign(std::istreambuf_iterator<char>(file), {});
    if (posix_memalign(&aligned, 16, all.size())) std::abort();
    std::memcpy(aligned, all.data(), all.size());
  }
  ~Bytes() { std::free(aligned); }
  template <class T>
  operator T*() const {
    return static_cast<T*>(aligned);
  }
  void save() const {
    std::ofstream(path, std::ios::binary).write(reinterpret_cast<const char*>(aligned), all.size());
  }
};

template <class Kernel>
void launch(unsigned blocks, unsigned rows, unsigned threads, Kernel kernel) {
  blockDim.x = threads;
  for (unsigned block = 0; block < blocks * rows; ++block)
    for (unsigned warp = 0; warp < threads; warp += 32) {
      std::vector<std::thread> all;
      for (unsigned lane = 0; lane < 32; ++lane)
        all.emplace_back([=] {
          blockIdx.x = block % blocks, blockIdx.y = block / blocks, threadIdx.x = warp + lane;
          kernel();
        });
      for (std::thread& one : all) one.join();
    }
}
"""

_RUN = """\
void run{i}(const std::string& at) {{
  {buffers}
  launch({blocks}, {rows}, {threads}, [&] {{ {name}_::{name}({arguments}); }});
  {saved}
}}
"""


@dataclass(frozen=True)
class NativeCall:
    """One launch.

    Attributes:
      source: of the kernel.
      plan: of the call, of whose last step blocks of threads and integers are taken.
      operands, results: arrays, in the order of the kernel's pointers; results with what they hold before.
    """

    source: KernelSource
    plan: LaunchPlan
    operands: Sequence[np.ndarray]
    results: Sequence[np.ndarray]

    @property
    def launch(self) -> Launch:
        step = self.plan.steps[-1]
        assert isinstance(step, Launch)
        return step

    @property
    def integers(self) -> list[int]:
        return [int(param.value) for param in self.launch.params if isinstance(param, Scalar)]


def run(folder: Path, calls: Sequence[NativeCall]) -> list[list[np.ndarray]]:
    """The results of each call."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    headers = dict.fromkeys(h for call in calls for h in re.findall(r"#include.*\n", call.source.text))
    sources = {call.source.name: call.source for call in calls}
    text = _HEAD + "".join([*headers, *map(_kernel, sources.values()), *map(_call, range(len(calls)), calls)])
    text += "int main(int, char** at) {" + "".join(f" run{i}(at[1]);" for i in range(len(calls))) + " }\n"
    (folder / "kernels.cc").write_text(text)
    flags = ["-std=c++20", "-Og", "-pthread", "-fsanitize=address,undefined", "-fno-sanitize-recover"]
    include = [f"-I{NATIVE / 'swiglu_warp'}", f"-I{DEVICE_CODE}"]
    subprocess.run([compiler, *flags, *include, folder / "kernels.cc", "-o", folder / "kernels"], check=True)
    for i, call in enumerate(calls):
        for j, array in enumerate([*call.operands, *call.results]):
            array.tofile(folder / f"{i}.{j}")
    done = subprocess.run([folder / "kernels", folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [
        [_read(folder / f"{i}.{len(call.operands) + j}", one) for j, one in enumerate(call.results)]
        for i, call in enumerate(calls)
    ]


def _read(path: Path, like: Any) -> np.ndarray:
    return np.fromfile(path, np.uint8).view(like.dtype).reshape(like.shape)


def _kernel(source: KernelSource) -> str:
    text = re.sub(r"#include.*\n", "", source.text)
    return f"namespace {source.name}_ {{\n{text}}}\n"


def _call(i: int, call: NativeCall) -> str:
    count = len(call.operands) + len(call.results)
    return _RUN.format(
        i=i,
        name=call.source.name,
        blocks=call.launch.grid[0],
        rows=call.launch.grid[1],
        threads=call.launch.block,
        buffers=" ".join(f'Bytes v{j}(at + "/{i}.{j}");' for j in range(count)),
        arguments=", ".join([*(f"v{j}" for j in range(count)), *map(str, call.integers)]),
        saved=" ".join(f"v{j}.save();" for j in range(len(call.operands), count)),
    )
