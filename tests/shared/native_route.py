"""Routing kernels on a CPU: their own source, for threads that are the lanes of a warp (native/warp)."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jax_deepgemm
from jax_deepgemm.ops.route.family import RouteProblem
from jax_deepgemm.ops.route.sm90 import THREADS, cut_of, gradient_lanes, kernel_source

NATIVE = Path(__file__).parent / "native"
DEVICE_CODE = Path(jax_deepgemm.__file__).parent / "include"

_HEAD = """\
#include <jax_deepgemm/route/route.cuh>
#include <jax_deepgemm/route/route_gradient.cuh>
"""

_RUN = """\
void run{i}(const std::string& at) {{
  {buffers}
  launch({blocks}, {threads}, [&] {{ kernels{i}::{name}({arguments}, {tokens}, {scale}f); }});
  {saved}
}}
"""


def run(
    folder: Path, calls: Sequence[tuple[RouteProblem, Sequence[np.ndarray], Sequence[np.ndarray]]]
) -> list[list[np.ndarray]]:
    """The results of kernels.

    Args:
      folder: for source, program and numbers.
      calls: a problem, its operands, and arrays of the types of its results, with what they hold before.
    """
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    text = _HEAD + "".join(_source(i, *call) for i, call in enumerate(calls))
    text += "int main(int, char** at) {" + "".join(f" run{i}(at[1]);" for i in range(len(calls))) + " }\n"
    (folder / "route.cc").write_text(text)
    flags = ["-std=c++20", "-Og", "-pthread", "-fsanitize=address,undefined", "-fno-sanitize-recover"]
    include = [f"-I{NATIVE / 'warp'}", f"-I{DEVICE_CODE}"]
    subprocess.run([compiler, *flags, *include, folder / "route.cc", "-o", folder / "route"], check=True)
    for i, (_, operands, results) in enumerate(calls):
        for j, array in enumerate([*operands, *results]):
            array.tofile(folder / f"{i}.{j}")
    done = subprocess.run([folder / "route", folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [
        [
            np.fromfile(folder / f"{i}.{len(operands) + j}", one.dtype).reshape(one.shape)
            for j, one in enumerate(results)
        ]
        for i, (_, operands, results) in enumerate(calls)
    ]


def _source(i: int, p: RouteProblem, operands: Sequence[np.ndarray], results: Sequence[np.ndarray]) -> str:
    source = kernel_source(p)
    lanes = gradient_lanes(p) if p.kind == "route_gradient" else cut_of(p).lanes
    count = len(operands) + len(results)
    kernel = re.sub(r"#include.*\n", "", source.text)
    ours = _RUN.format(
        i=i,
        name=source.name,
        blocks=-(-p.tokens // (THREADS // lanes)),
        threads=THREADS,
        buffers=" ".join(
            f'Numbers<{_type(one)}> v{j}(at + "/{i}.{j}");' for j, one in enumerate([*operands, *results])
        ),
        arguments=", ".join(f"v{j}.data()" for j in range(count)),
        tokens=p.tokens,
        scale=float(p.router.scale),
        saved=" ".join(f"v{j}.save();" for j in range(len(operands), count)),
    )
    return f"namespace kernels{i} {{\n{kernel}}}\n{ours}"


def _type(array: Any) -> str:
    return {"float32": "float", "int32": "int", "bfloat16": "jdg::bf16"}[array.dtype.name]
