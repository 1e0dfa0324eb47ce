"""Kernels compiled ahead of time, by `precompile` and by `python -m jax_deepgemm compile`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import Primitive
from jax.interpreters import mlir

from jax_deepgemm import jit
from jax_deepgemm.cli import main
from jax_deepgemm.core.family import Family, Kernels
from jax_deepgemm.core.shapes import Call, CallShape
from jax_deepgemm.jit import CompileError, KernelSource, report
from jax_deepgemm.tools import registry
from jax_deepgemm.tools import shape_files as shapes
from jax_deepgemm.tools.precompile import compile_many, precompile, precompile_records
from tests.shared.jit_kernels import HOPPER, fill, forget, python

# --- ahead of time ---


def test_compile_many(count: list[str]) -> None:
    sources = [fill(1), KernelSource("hopper", HOPPER), fill(2), fill(1)]
    kernels = compile_many(sources, jobs=4, progress=False)
    assert [kernel.name for kernel in kernels] == ["fill", "hopper", "fill", "fill"]
    assert kernels[0] is kernels[3]
    assert kernels[0] != kernels[2]
    assert sorted(count) == ["fill", "fill", "hopper"]
    assert compile_many([]) == []


@pytest.mark.parametrize("jobs", [1, 3])
def test_compile_many_raises_the_first_error(jobs: int) -> None:
    with pytest.raises(CompileError, match="kernel bad does not compile"):
        compile_many([fill(1), KernelSource("bad", "?"), fill(2)], jobs=jobs)


@dataclass(frozen=True)
class Fills:
    """A problem of two kernels."""

    flops: int = 0


KERNELS = Kernels[Fills, None](sources=lambda p, config: [fill(132), fill(2)], plan=lambda *_: None)
FAMILY = Family("fills", Fills, {"9.0a": __name__})


def test_precompile_problems_sources_and_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "families", lambda: [FAMILY])

    def function(x: jax.Array) -> jax.Array:
        return x + 1

    shape = jax.ShapeDtypeStruct((8,), jnp.float32)
    kernels = precompile([Fills(), fill(2), (jax.jit(function), shape), (function, shape)])
    assert len(kernels) == 2
    forget()
    assert all(kernel.report.from_cache for kernel in precompile([Fills()]))


def test_precompile_sees_kernels_of_lowering_rules() -> None:
    """A function's kernels are those that its cuda lowering asks for, in whichever thread that runs."""
    primitive = Primitive("jit_test_copy")
    primitive.def_abstract_eval(lambda x: x)

    def lower(ctx: Any, x: Any) -> list[Any]:
        jit.compile_kernel(fill(7))
        return [x]

    mlir.register_lowering(primitive, lower, platform="cuda")
    shape = jax.ShapeDtypeStruct((8,), jnp.float32)
    for jobs in (1, 2):
        items = [(lambda x: primitive.bind(x), shape), (lambda x: primitive.bind(x) + 1, shape)]
        records = precompile_records(items, jobs=jobs)
        assert [source.parameters for source, _ in records] == [(("value", 7),)] * 2


def test_precompile_rejects_others() -> None:
    with pytest.raises(TypeError, match=r"got 3, need a shape"):
        precompile([3])  # type: ignore[list-item]


# --- python -m jax_deepgemm compile ---


def dense(op: str, m: int, n: int, k: int, **more: Any) -> dict[str, Any]:
    return {"op": op, "m": m, "n": n, "k": k} | more


def test_shapes_file() -> None:
    text = """
# a comment
fp8_gemm_nt,4096,7168,2048
bf16_gemm_tn, 1, 8, 16, float32, 1
{"op": "fp8_gemm_nn", "m": 5, "n": 6, "k": 7, "b_block": "1x128", "accumulate": true}
k,op,m,n
7,fp8_gemm_nt,5,6
"""
    wanted = [
        dense("fp8_gemm_nt", 4096, 7168, 2048),
        dense("bf16_gemm_tn", 1, 8, 16, out_dtype="float32", accumulate=True),
        dense("fp8_gemm_nn", 5, 6, 7, b_block="1x128", accumulate=True),
        dense("fp8_gemm_nt", 5, 6, 7),
    ]
    assert shapes.parse_shapes(text) == [shapes.shape_of(row) for row in wanted]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("fp4_gemm_nt,1,2,3", "op is 'fp4_gemm_nt', need one of fp8_gemm_nt, fp8_gemm_nn"),
        ("fp8_gemm_nt,1,2", "k is missing; fp8_gemm_nt needs m, n, k"),
        ("m_grouped_bf16_gemm_nt_masked,1,2,3", "groups is missing; m_grouped_bf16_gemm_nt_masked needs"),
        ("fp8_gemm_nt,1,two,3", "n is 'two', need a whole number"),
        ("fp8_gemm_nt,1,2,3,float16", "out_dtype is 'float16', need bfloat16 or float32"),
        ("fp8_gemm_nt,1,2,3,float32,maybe", "accumulate is 'maybe', need 0 or 1 or false or true"),
        ("fp8_gemm_nt,1,2,3,float32,0,64x64", "b_block is '64x64', need 128x128 or 1x128"),
        ("fp8_gemm_nt,1,2,3,float32,0,1x128,9", "8 cells, need at most 7"),
        ('{"op": "fp8_gemm_nt", "m": 1, "n": 2, "k": 3, "size": 4}', "fp8_gemm_nt has no field size"),
        ('{"op": "fp8_gemm_nt", "m": 0, "n": 2, "k": 3}', "m is '0', need a whole number from 1"),
        ('{"op": "fp8_gemm_nt", "m": 4096.5, "n": 2, "k": 3}', "m is '4096.5', need a whole number"),
        ('{"op": ["fp8_gemm_nt"]}', "need one of fp8_gemm_nt"),
        ('{"m": 1}', "op is missing; there are fp8_gemm_nt"),
        ('{"op": ', "Expecting value"),
    ],
)
def test_shapes_file_errors(line: str, message: str) -> None:
    with pytest.raises(ValueError, match="line 2: ") as error:
        shapes.parse_shapes("\n" + line)
    assert message in str(error.value)


def run_command(*arguments: str) -> int:
    return main(["compile", *arguments])


@dataclass(frozen=True)
class OneKernel(CallShape):
    """A shape whose function asks for one kernel."""

    source: KernelSource

    def calls(self) -> list[Call]:
        """A primitive whose lowering compiles it."""
        primitive = Primitive(f"jit_test_{self.source.name}")
        primitive.def_abstract_eval(lambda x: x)

        def lower(ctx: Any, x: Any) -> list[Any]:
            jit.compile_kernel(self.source)
            return [x]

        mlir.register_lowering(primitive, lower, platform="cuda")
        return [Call("one", lambda x: primitive.bind(x), (jax.ShapeDtypeStruct((8,), jnp.float32),))]


def use(monkeypatch: pytest.MonkeyPatch, source: KernelSource) -> None:
    """Lets each line of a shapes file be this kernel."""
    monkeypatch.setattr(shapes, "shape_of", lambda row: OneKernel("one", source))


def test_compile_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = KernelSource(
        "hopper", HOPPER, (("block_m", 64), ("out", jnp.dtype("float32"))), shared_memory=4096
    )
    use(monkeypatch, source)
    path = tmp_path / "shapes.csv"
    path.write_text("fp8_gemm_nt,1,2,3\nfp8_gemm_nt,1,2,4\n")
    assert run_command("--shapes", str(path), "--json", "--jobs", "1") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["name"] == "hopper"
    assert row["parameters"] == {"block_m": 64, "out": "float32"}
    assert row["registers"] > 0
    assert row["spill_bytes"] == row["local_bytes"] == row["static_shared_memory"] == 0
    assert row["dynamic_shared_memory"] == 4096
    assert row["compile_seconds"] > 0
    assert row["from_cache"] is False
    assert row["warnings"] == []
    forget()
    assert run_command("--shapes", str(path)) == 0
    out = capsys.readouterr().out
    assert "hopper" in out
    assert "disk" in out
    assert "1 kernels for 2 shapes" in out


def test_compile_command_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "shapes.csv"
    path.write_text("fp8_gemm_nt,1\n")
    assert run_command("--shapes", str(path)) == 2
    path.write_text("fp8_gemm_nt,1,2,3\n")
    use(monkeypatch, KernelSource("bad", "?"))
    assert run_command("--shapes", str(path)) == 1
    assert "kernel bad does not compile" in capsys.readouterr().err


def test_compile_command_says_that_nothing_is_kept(
    cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache_dir.write_text("a file, not a directory")
    path = tmp_path / "shapes.csv"
    path.write_text("fp8_gemm_nt,1,2,3\n")
    use(monkeypatch, fill())
    assert run_command("--shapes", str(path)) == 1
    assert f"not all kernels are kept: {cache_dir} cannot be written" in capsys.readouterr().err


def test_import_compiles_nothing() -> None:
    script = (
        "import sys, jax_deepgemm.jit as _; print('cuda.core' in sys.modules, 'cuda.bindings' in sys.modules)"
    )
    assert python(script).communicate()[0].split() == ["False", "False"]


def test_describe_is_json() -> None:
    json.dumps(report.describe(fill(), jit.compile_kernel(fill())))
