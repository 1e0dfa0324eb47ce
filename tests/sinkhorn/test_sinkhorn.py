"""Sinkhorn's matrices as ops: under every transformation, cut over devices; the kernels' source on a CPU."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jax_deepgemm import hyperconnection
from jax_deepgemm.core.chip import H200
from jax_deepgemm.jit import compile_kernel
from jax_deepgemm.ops.sinkhorn import reference, sm90
from jax_deepgemm.ops.sinkhorn.family import FAMILY, LARGEST, MOST_ITERATIONS, SinkhornProblem, beyond
from jax_deepgemm.ops.sinkhorn.op import sinkhorn_op
from tests.shared import op_checks
from tests.shared.native_logits import DEVICE_CODE, NATIVE
from tests.shared.op_checks import OpCase, Shard

FORM = {"iterations": 6, "eps": 1e-3}


def logits(seed: int, count: int = 8, n: int = 4) -> list[jax.Array]:
    return [jax.random.normal(jax.random.key(seed), (count, n, n))]


def matrices(x: jax.Array, out_sharding: Any = None) -> jax.Array:
    return sinkhorn_op("sinkhorn", True)(x, out_sharding=out_sharding, **FORM)[0]


CASE = OpCase(
    "sinkhorn",
    matrices,
    logits,
    nests=(((0,),), ((0,), (1,))),
    plain=functools.partial(reference.sinkhorn, **FORM),
    wrt=(0,),
    second=True,
    shards=(
        Shard((P("x"),), P("x"), modes=("auto", "explicit", "shard_map")),
        Shard((P("x", "y"),), P("x"), ("all-gather",), modes=("explicit",)),
    ),
)


@pytest.mark.parametrize("check", op_checks.checks([CASE]))
def test_op(check: Any) -> None:
    check()


def test_gradients_of_gradients() -> None:
    form = {"iterations": 2, "eps": 1e-3}
    (x,) = logits(0, 1, 2)

    def bent(function: Any) -> jax.Array:
        gradient = jax.grad(lambda x: jnp.sum(jnp.sin(3 * function(x))))
        return jax.jit(jax.grad(lambda x: jnp.sum(gradient(x) * jnp.cos(x))))(x)

    got = bent(lambda x: sinkhorn_op("sinkhorn", True)(x, **form)[0])
    np.testing.assert_allclose(got, bent(functools.partial(reference.sinkhorn, **form)), rtol=1e-4, atol=1e-5)


def test_what_the_kernels_do_not_take_is_plain() -> None:
    assert beyond(LARGEST, MOST_ITERATIONS) == ""
    (x,) = logits(0, 2, LARGEST + 1)
    got = hyperconnection.sinkhorn(x, iterations=MOST_ITERATIONS + 1)
    want = reference.sinkhorn(x, iterations=MOST_ITERATIONS + 1, eps=1e-6)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    words = sinkhorn_op("sinkhorn", False).without_kernel([x], iterations=33, eps=0.0)  # type: ignore[misc]
    assert "matrices have 9 rows, the kernels take 8, so XLA runs a loop" in words
    with pytest.raises(ValueError, match="there are 33 iterations, the kernels take 32"):
        FAMILY.choose(SinkhornProblem("sinkhorn", 2, 4, 33, 0.0), H200)


# The kernels ------------------------------------------------------------------------------------------------

_MAIN = """\
#include <jax_deepgemm/ptx/memory.cuh>
#include <jax_deepgemm/sinkhorn/sinkhorn.cuh>
#include <fstream>
#include <launch.h>
#include <string>
{kernels}
std::vector<float> read(const std::string& from, int count) {{
  std::vector<float> all(count);
  std::ifstream(from, std::ios::binary).read(reinterpret_cast<char*>(all.data()), 4 * count);
  return all;
}}
template <class Kernel>
void run(const std::string& to, int floats, int blocks, Kernel kernel) {{
  std::vector<float> result(floats);
  blockDim.x = {threads};
  launch(blocks, 1, {threads}, [&] {{ kernel(result.data()); }});
  std::ofstream(to, std::ios::binary).write(reinterpret_cast<char*>(result.data()), 4 * floats);
}}
int main(int, char** at) {{
  const std::string folder = std::string(at[1]) + "/";
  {calls}
}}
"""
_CALL = """\
{{
    const auto x = read(folder + "x{i}", {floats}), by = read(folder + "by{i}", {floats});
    run(folder + "m{i}", {floats}, {blocks}, [&](float* out) {{ {name}(x.data(), out, {rest}); }});
    run(folder + "g{i}", {floats}, {blocks},
        [&](float* out) {{ {gradient}(x.data(), by.data(), out, {rest}); }});
  }}"""


@pytest.mark.any_version
def test_the_kernels_themselves_on_a_cpu(tmp_path: Path) -> None:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    forms = ((70, 4, 20, 1e-6), (3, 1, 1, 0.0), (65, 3, 2, 1e-2), (2, 8, MOST_ITERATIONS, 1e-6))
    sources, calls = [], []
    for i, (count, n, iterations, eps) in enumerate(forms):
        value, gradient = (
            SinkhornProblem(kind, count, n, iterations, eps) for kind in ("sinkhorn", "sinkhorn_gradient")
        )
        both = [sm90.kernel_source(p) for p in (value, gradient)]
        sources += both
        rest = f"{count}, {sm90.steps_of(value)}, {eps:.9f}f"
        names = {"name": both[0].name, "gradient": both[1].name}
        calls.append(
            _CALL.format(i=i, floats=count * n * n, blocks=-(-count // sm90.THREADS), rest=rest, **names)
        )
        for seed, name in enumerate(("x", "by")):
            (2 * np.asarray(logits(seed, count, n)[0])).tofile(tmp_path / f"{name}{i}")
    kernels = "\n".join(re.sub(r"#include.*\n", "", source.text) for source in sources)
    (tmp_path / "main.cc").write_text(
        _MAIN.format(kernels=kernels, calls="\n  ".join(calls), threads=sm90.THREADS)
    )
    flags = ["-std=c++20", "-O1", "-fsanitize=address", "-fno-sanitize-recover"]
    command = [
        compiler,
        *flags,
        f"-I{NATIVE}",
        f"-I{NATIVE.parent}",
        f"-I{DEVICE_CODE}",
        tmp_path / "main.cc",
        "-o",
        tmp_path / "run",
    ]
    subprocess.run(command, check=True)
    subprocess.run([tmp_path / "run", tmp_path], check=True, timeout=60)
    for i, (count, n, iterations, eps) in enumerate(forms):
        x, by, m, g = (
            np.fromfile(tmp_path / f"{name}{i}", np.float32).reshape(count, n, n)
            for name in ("x", "by", "m", "g")
        )
        form = {"iterations": iterations, "eps": eps}
        np.testing.assert_allclose(m, reference.sinkhorn(x, **form), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(g, reference.pull(x, by, **form), rtol=1e-4, atol=1e-5)


@pytest.mark.any_version
@pytest.mark.parametrize("kind", ["sinkhorn", "sinkhorn_gradient"])
def test_registers(kind: str) -> None:
    for n in (1, 4, LARGEST):
        report = compile_kernel(sm90.kernel_source(SinkhornProblem(kind, 100, n, 20, 1e-6))).report
        assert (report.spill_store_bytes, report.local_bytes, report.warnings) == (0, 0, ()), n
