"""What the GPU tests stand on, without a GPU: how they are dealt out, their kernels, their oracles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import ArgumentTypeError
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_deepgemm.jit import CompileError, KernelSource
from jax_deepgemm.tools.precompile import precompile_records
from tests.gpu import conftest as gpu_conftest
from tests.gpu import kernels
from tests.shared import (
    cases,
    gemm_oracle,
    gemm_products,
    gpu_programs,
    grouped_oracle,
    grouped_products,
    moe_oracle,
    shards,
)
from tests.shared.cases import ROW, Case

pytestmark = pytest.mark.any_version

ROOT = Path(__file__).parent.parent.parent
GPU = ROOT / "tests" / "gpu"
NO_SMOKE = {"test_sharding_gpu.py", "test_train_gpu.py", "test_grouped_chains_gpu.py"}
"""Several GPUs, flax, and long chains of what others show."""
LONGEST = 150
"""Seconds that a process may take: all of the tests have 480, with the kernels and what runs alone."""

# Dealing out ------------------------------------------------------------------------------------------------

names = st.builds("tests/gpu/test_{}.py::test_{}[{}]".format, *[st.integers(0, n) for n in (4, 6, 9)])


@given(st.lists(names, unique=True, max_size=80), st.integers(1, 9))
def test_every_test_is_in_one_part(tests, count):
    parts = shards.deal(tests, {"test_1.py": 5.0, "test_2.py::test_3": 0.0}, count)
    assert len(parts) == count
    assert sorted(test for part in parts for test in part) == sorted(tests)
    for part in parts:
        assert part == [test for test in tests if test in part]


def test_costly_things_are_shared():
    """A short file stays whole, a long one is dealt out by function, but not what shares its operands."""
    long = [f"tests/gpu/a.py::{name}[{i}]" for name in ("test_a", "test_b") for i in range(4)]
    short = ["tests/gpu/c.py::test_d", "tests/gpu/c.py::test_e"]
    assert shards.deal([*long, *short], {}, 3) == [long[:4], long[4:], short]
    assert shards.deal(long, {"a.py::test_b": 9.0}, 2) == [long[4:], long[:4]]
    tables = [f"tests/gpu/test_gemm_gpu.py::test_table_{name}" for name in "abcd"]
    others = [f"tests/gpu/test_gemm_gpu.py::test_{name}" for name in "abc"]
    assert shards.deal([*tables, *others], {}, 2) == [tables, others]


@pytest.fixture(scope="module")
def collected() -> list[str]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        GPU,
    ]
    env = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    found = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    return [line for line in found.stdout.splitlines() if "::" in line]


@pytest.mark.slow
def test_parts_of_the_gpu_tests_take_equally_long(collected):
    seconds = shards.recorded()
    assert {test.split("/")[-1].split("::")[0] for test in collected} == {
        path.name for path in GPU.glob("test_*.py")
    }
    for count in (1, 4, 8):
        parts = shards.deal(collected, seconds, count)
        loads = [sum(shards.seconds_of(test, seconds) for test in part) for part in parts]
        assert max(loads) <= max(1.25 * sum(loads) / count, LONGEST), loads


@pytest.mark.slow
def test_records_are_of_tests_there_are(collected):
    known = {name(test) for test in collected for name in (shards.function_of, shards.file_of)}
    assert set(shards.recorded()) <= known, "tests/gpu/seconds.json: rename or drop these lines"


@pytest.mark.parametrize("text", ["0/3", "4/3", "x/3", "3"])
def test_parts_that_cannot_be(text):
    with pytest.raises(ArgumentTypeError, match="need I/N"):
        gpu_conftest._part(text)


def test_a_process_keeps_its_part():
    dropped = []
    hook = SimpleNamespace(pytest_deselected=lambda items: dropped.extend(items))
    every = [SimpleNamespace(nodeid=f"tests/gpu/test_{i}.py::test_a") for i in range(5)]
    kept = []
    for index in (1, 2):
        items = list(every)
        config = SimpleNamespace(hook=hook, getoption=lambda *_, index=index: (index, 2))
        gpu_conftest.pytest_collection_modifyitems(config, items)
        kept += items
    assert sorted(item.nodeid for item in kept) == [item.nodeid for item in every]
    assert sorted(item.nodeid for item in dropped) == [item.nodeid for item in every]


RESULT = """<testsuites><testsuite>
<testcase classname="tests.gpu.test_a" name="test_x[1]" time="2.0" />
<testcase classname="tests.gpu.test_a" name="test_x[2]" time="4.0" />
<testcase classname="tests.gpu.test_a" name="test_y" time="1.0">{}</testcase>
</testsuite></testsuites>"""


@pytest.mark.parametrize(("inside", "code"), [("<skipped />", 0), ("<failure />", 1), ("<error />", 1)])
def test_what_processes_leave_is_summed_up(tmp_path, capsys, inside, code):
    (tmp_path / "1.xml").write_text(RESULT.format(inside))
    record = tmp_path / "seconds.json"
    assert shards.main([str(tmp_path / "1.xml"), "--record", str(record)]) == code
    assert json.loads(record.read_text()) == {"test_a.py::test_x": 3.0, "test_a.py::test_y": 1.0}
    verdict = "2 passed, 1 skipped, 0 failed" if code == 0 else "2 passed, 0 skipped, 1 failed"
    assert verdict in capsys.readouterr().out


def test_no_result_is_no_success(tmp_path):
    (tmp_path / "1.xml").write_text("<testsuites><testsuite /></testsuites>")
    assert shards.main([str(tmp_path / "1.xml")]) == 1


def test_each_family_is_in_the_smoke_tier():
    with_smoke = {path.name for path in GPU.glob("test_*.py") if "pytest.mark.smoke" in path.read_text()}
    assert {path.name for path in GPU.glob("test_*.py")} - with_smoke == NO_SMOKE


# Kernels ----------------------------------------------------------------------------------------------------


def test_files_name_their_kernels():
    """Each once; those that a call of a table is traced to are among them."""
    [quantising] = kernels.modules("fused")
    [configs] = kernels.modules("configs")
    named = list(kernels.sources([quantising, configs]))
    texts = {(source.name, source.text) for source in named}
    assert len(texts) == len(named) > 200
    x = jax.ShapeDtypeStruct(quantising.SHAPES[2], jnp.bfloat16)
    calls = [(quantising.quantize(block, "float8_e5m2"), x) for block in quantising.BLOCKS[:2]]
    needed = [source for source, _ in precompile_records([*calls, (quantising.quantize_both, x)])]
    assert len(needed) == 3
    assert {(source.name, source.text) for source in needed} <= texts


def test_a_kernel_that_does_not_compile_stops_no_other(monkeypatch):
    def compile_kernel(source: KernelSource) -> KernelSource:
        if source.name == "broken":
            raise CompileError("broken does not compile")
        return source

    monkeypatch.setattr(kernels, "compile_kernel", compile_kernel)
    fine = KernelSource("fine", "")
    error, kernel = kernels.compile_all([KernelSource("broken", ""), fine])
    assert isinstance(error, CompileError)
    assert kernel is fine


def test_numbers_of_both_pieces_differ(monkeypatch):
    monkeypatch.setattr(gpu_programs, "PIECE", 1 << 12)
    numbers = np.asarray(gpu_programs.random_numbers((1 << 12) + 1), np.float64)
    assert numbers.shape == (1 << 13,)
    assert abs(numbers.mean()) < 0.1
    assert abs(numbers.std() - 1) < 0.1
    assert abs(np.corrcoef(numbers.reshape(2, -1))[0, 1]) < 0.1


# Oracles ----------------------------------------------------------------------------------------------------

SMALL = [(1, 1, 1), (7, 129, 130), (5, 104, 256), (65, 200, 384)]


@pytest.mark.parametrize("add", [False, True], ids=("", "c"))
@pytest.mark.parametrize("b_block", [cases.BLOCK, ROW], ids=str)
def test_dense_fp8_oracle(b_block, add):
    """The GPU tests' oracle, against float64 in NumPy."""
    for shape in SMALL:
        case = Case(*shape, out="float32", accumulate=add, b_block=b_block)
        arrays = gemm_oracle.fp8_operands(case)
        got = gemm_products.fp8_exact(arrays)
        assert gemm_oracle.calc_diff(got, gemm_oracle.fp8_float64(case, *arrays)) < 1e-11


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_dense_bf16_oracle(layout):
    for shape in SMALL:
        case = Case(*shape, out="float32", accumulate=True, layout=layout)
        arrays = gemm_oracle.bf16_operands(case)
        got = gemm_products.bf16_exact(case, arrays)
        assert gemm_oracle.calc_diff(got, gemm_oracle.bf16_float64(case, *arrays)) < 1e-11


@pytest.mark.parametrize("sizes", [(5, 0, 9, 3), (0, 0, 0, 0), (4, -2, 30, 7)], ids=str)
def test_grouped_oracles(sizes):
    m, n, k = 20, 24, 16
    a, b = grouped_oracle.random(0, m, k), grouped_oracle.random(1, len(sizes), n, k)
    at, index = grouped_products.place(sizes, m), grouped_oracle.rows_of(sizes, m)
    np.testing.assert_array_equal(at.index, index)
    where = jnp.asarray(at.starts), jnp.asarray(at.counts), m
    close = lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5)  # noqa: E731
    close(grouped_products.m_grouped(a, jnp.asarray(b), *where), grouped_oracle.m_grouped(a, b, index))
    rows = grouped_oracle.random(2, m, n)
    close(grouped_products.k_grouped(a, rows, *where), grouped_oracle.k_grouped(a, rows, index, len(sizes)))
    deep, counts = grouped_oracle.random(3, len(sizes), 8, k), np.clip(sizes, 0, 8)
    got = grouped_products.masked(jnp.asarray(deep), jnp.asarray(b), jnp.asarray(counts), 8)
    close(got, grouped_oracle.masked(deep, b, counts))


def test_dequantised():
    for block in ((1, 128), (128, 128), (128, 1)):
        values, scales = grouped_oracle.fp8(0, 3, 130, 200, block=block)
        got = grouped_products.dequantised(SimpleNamespace(values=values, scales=scales, block=block))
        np.testing.assert_array_equal(
            got, grouped_oracle.dequantized((values, scales), block).astype(np.float32)
        )


def test_experts_oracle():
    x, w13, w2 = (moe_oracle.normal(i, *shape) for i, shape in enumerate([(12, 16), (4, 16, 16), (4, 16, 8)]))
    ids = moe_oracle.random_ids(0, 12, 2, 4, dropped=0.2)
    weights = moe_oracle.normal(5, 12, 2, dtype=jnp.float32)
    got = gpu_programs.program(moe_oracle.moe_plain)(x, ids, weights, w13, w2)
    assert moe_oracle.relative(got, moe_oracle.moe_float64(x, ids, weights, w13, w2)) < 1e-6


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_difference_is_that_of_float64(scale):
    x = np.random.default_rng(0).standard_normal((40, 50)).astype(np.float32)
    y = x + np.float32(scale) * np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)
    got = float(gemm_products.difference(jnp.asarray(x), jnp.asarray(y)))
    assert got == pytest.approx(gemm_oracle.calc_diff(x, y), rel=1e-4)
