"""Dense GEMMs under jit, vmap, derivatives, remat, scan, donation, export, and exact collectives."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_deepgemm as jdg
from jax_deepgemm.ops.gemm import op as ops
from tests.shared import gemm_oracle as oracle
from tests.shared import op_checks
from tests.shared.arrays import normals
from tests.shared.cases import BLOCK, LAYOUTS, ROW, Case
from tests.shared.op_checks import OpCase, Shard

BF16, F32 = jnp.bfloat16, jnp.float32
M, N, K = 16, 576, 704  # n / 4 = 144 and k / 4 = 176: shards end inside blocks of 128
ALL = ("auto", "explicit", "shard_map")


def fp8_case(m: int = M, n: int = N, k: int = K, **options: Any) -> Case:
    return Case(m, n, k, **options)


def run_fp8(
    a: Any, sa: Any, b: Any, sb: Any, *c: Any, out: str, out_sharding: Any = None, **options: Any
) -> jax.Array:
    return jdg.fp8_gemm_nt((a, sa), (b, sb), *c, out_dtype=out, out_sharding=out_sharding, **options)


def run_bf16(*arrays: Any, layout: str, out: str, out_sharding: Any = None) -> jax.Array:
    function = getattr(jdg, f"bf16_gemm_{layout}")
    return function(*arrays, out_dtype=out, out_sharding=out_sharding)


def plain_bf16(*arrays: Any, layout: str, out: str) -> jax.Array:
    a, b, *c = (x.astype(F32) for x in arrays)
    product = (a.T if layout[0] == "t" else a) @ (b.T if layout[1] == "t" else b)
    return sum(c, product).astype(out)


def fp8_shards(add: bool) -> tuple[Shard, ...]:
    def shard(a: P, b: P, out: P, *sums: str, sa: P | None = None) -> Shard:
        return Shard((a, sa or P(), b, P(), *((out,) if add else ())), out, sums)

    return (
        shard(P("x"), P(), P("x"), sa=P("x")),
        shard(P(), P("y"), P(None, "y")),
        shard(P("x"), P("y"), P("x", "y"), sa=P("x")),
        shard(P(None, "y"), P(None, "y"), P(), "all-reduce"),
        shard(P("x", "y"), P(None, "y"), P("x"), "all-reduce", sa=P("x")),
        shard(P(None, "y"), P(None, "y"), P("y"), "reduce-scatter"),
        shard(P("x", "y"), P(None, "y"), P("x", "y"), "reduce-scatter", sa=P("x")),
    )


def edge_shards() -> tuple[Shard, ...]:
    """Cuts at the edges of blocks: scales are cut with their data."""
    return (
        Shard((P(None, "y"), P(None, "y"), P(None, "y"), P(None, "y")), P(), ("all-reduce",)),
        Shard((P("x"), P("x"), P("y"), P("y")), P("x", "y"), modes=ALL),
        Shard((P(), P(), P("y"), P("y")), P(None, "y"), modes=ALL),
    )


def bf16_shards(layout: str, add: bool) -> tuple[Shard, ...]:
    def spec(rows: Any, k: Any, k_first: bool) -> P:
        return P(k, rows) if k_first else P(rows, k)

    def shard(m: Any, n: Any, k: Any, out: P, *sums: str) -> Shard:
        specs = (spec(m, k, layout[0] == "t"), spec(n, k, layout[1] == "n"))
        return Shard(specs + ((out,) if add else ()), out, sums, ALL if k is None else ("auto", "explicit"))

    return (
        shard("x", "y", None, P("x", "y")),
        shard(None, None, "y", P(), "all-reduce"),
        shard("x", None, "y", P("x", "y"), "reduce-scatter"),
    )


def fp8_op(name: str, case: Case, **fields: Any) -> OpCase:
    operands = 5 if case.accumulate else 4
    free = (None,) * (operands - 2)
    return OpCase(
        name,
        functools.partial(run_fp8, out=case.out),
        functools.partial(oracle.fp8_operands, case),
        tolerance=2**-7 if case.out == "bfloat16" else 1e-5,
        **{"nests": (((0,) * operands,), ((0, 0, *free),)), **fields},
    )


def bf16_op(layout: str, add: bool, out: str, sharded: bool = False) -> OpCase:
    case = Case(16, 24, 40, out=out, accumulate=add, layout=layout)
    params = {"layout": layout, "out": out}
    operands = 3 if add else 2
    return OpCase(
        f"bf16-{layout}-{out}" + ("-add" if add else ""),
        functools.partial(run_bf16, **params),
        functools.partial(oracle.bf16_operands, case),
        nests=(((0, None, None)[:operands],), ((None, 1, 0)[:operands], (0,) * operands)),
        shards=bf16_shards(layout, add) if sharded else (),
        plain=functools.partial(plain_bf16, **params),
        wrt=tuple(range(operands)),
        second=not sharded,
        tolerance=2**-7 if out == "bfloat16" else 1e-5,
        grad_tolerance=2**-6,
    )


CASES = [
    fp8_op(
        "fp8-block",
        fp8_case(out="float32"),
        shards=fp8_shards(False),
        nests=(
            ((0, 0, 0, 0),),
            ((0, 0, None, None),),
            ((1, 1, None, None), (0, 0, 0, 0)),
            ((0, 0, None, None), (None, None, 0, 0)),
        ),
    ),
    fp8_op("fp8-block-bf16", fp8_case(), shards=fp8_shards(False)[2:5]),
    fp8_op("fp8-block-add", fp8_case(out="float32", accumulate=True), shards=fp8_shards(True)),
    fp8_op("fp8-row", fp8_case(b_block=ROW, out="float32"), shards=fp8_shards(False)[3:]),
    fp8_op("fp8-row-add-bf16", fp8_case(b_block=ROW, accumulate=True), shards=fp8_shards(True)[3:5]),
    fp8_op("fp8-edges", fp8_case(16, 512, 1024, out="float32"), shards=edge_shards()),
    *(bf16_op(layout, False, "float32", sharded=layout == "nn") for layout in LAYOUTS),
    bf16_op("nt", True, "float32"),
    bf16_op("tn", True, "bfloat16", sharded=True),
]


@pytest.mark.parametrize("check", op_checks.checks(CASES))
def test_op(check):
    check()


def test_derivatives_are_gemms_of_other_layouts():
    """No derivative transposes an operand."""
    for layout in LAYOUTS:
        a, b = oracle.bf16_operands(Case(16, 24, 40, layout=layout))
        loss = lambda a, b: run_bf16(a, b, layout=layout, out="float32").sum()  # noqa: B023, E731
        text = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(a, b))
        assert "transpose[" not in text
        assert "dot_general" not in text
        for index in (0, 1):
            assert f"bf16_gemm_{ops.cotangent_gemm(layout, index)[0]}[" in text


def test_gradient_is_the_limit_of_differences():
    """Along a random direction, in float32, from the op alone: (f(x + h u) - f(x - h u)) / 2 h."""
    case = Case(8, 12, 16, out="float32")
    a, b = oracle.bf16_operands(case)
    u, v = oracle.bf16_operands(case, seed=1)
    loss = lambda a, b: (run_bf16(a, b, layout="nt", out="float32") ** 2).sum()  # noqa: E731
    da, db = jax.grad(loss, (0, 1))(a, b)
    predicted = float((da.astype(F32) * u).sum() + (db.astype(F32) * v).sum())
    h = 2.0**-6

    def at(s):
        return float(
            (oracle.bf16_float64(case, _wide(a) + s * h * _wide(u), _wide(b) + s * h * _wide(v)) ** 2).sum()
        )

    measured = (at(1) - at(-1)) / (2 * h)
    assert abs(predicted - measured) < 0.02 * abs(measured) + 1


def _wide(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def test_linear_transpose():
    case = Case(8, 12, 16, out="float32", accumulate=True)
    a, b, c = oracle.bf16_operands(case)
    both = jax.linear_transpose(lambda a, c: run_bf16(a, b, c, layout="nt", out="float32"), a, c)
    da, dc = both(c)
    np.testing.assert_array_equal(dc, c)
    np.testing.assert_allclose(da.astype(F32), c.astype(BF16).astype(F32) @ b.astype(F32), rtol=2e-2, atol=1)


def test_jacobians_of_both_modes_agree():
    a, b = oracle.bf16_operands(Case(3, 4, 8, out="float32"))
    run = functools.partial(run_bf16, layout="nt", out="float32")
    forward, reverse = jax.jacfwd(run)(a, b), jax.jacrev(run)(a, b)
    np.testing.assert_allclose(forward.astype(F32), reverse.astype(F32), rtol=1e-2)


@pytest.mark.parametrize("family", ["fp8", "bf16"])
def test_scan_over_stacked_weights(family):
    layers = 3
    if family == "fp8":
        case = Case(8, 256, 256)
        stack = [
            jnp.stack(x) for x in zip(*(oracle.fp8_operands(case, i)[2:] for i in range(layers)), strict=True)
        ]
        one = lambda x, b, sb: jdg.fp8_gemm_nt(jdg.quantize(x), (b, sb)) * 0.01  # noqa: E731
    else:
        stack = [jnp.stack([oracle.bf16_operands(Case(8, 256, 256), i)[1] for i in range(layers)])]
        one = lambda x, b: jdg.bf16_gemm_nt(x, b) * jnp.bfloat16(0.05)  # noqa: E731
    x = oracle.bf16_operands(Case(8, 256, 256))[0]
    one = (lambda f: lambda x, *w: f(x, *w).astype(BF16))(one)
    scanned = jax.jit(lambda x: jax.lax.scan(lambda x, w: (one(x, *w), None), x, tuple(stack))[0])(x)
    step = jax.jit(one)
    for i in range(layers):
        x = step(x, *(w[i] for w in stack))
    assert oracle.calc_diff(scanned, x) < 1e-5


@pytest.mark.parametrize("mode", ["plain", "auto", "explicit", "shard_map"])
def test_c_is_donated(mode):
    """The result takes C's buffer: the compiled program says so, and C is gone afterwards."""
    case = Case(16, 512, 256, out="float32", accumulate=True)
    specs = (P("x"), P("x"), P("y"), P("y"), P("x", "y"))
    operands = oracle.fp8_operands(case)
    want = oracle.fp8_float64(case, *operands)
    run = functools.partial(run_fp8, out="float32")
    if mode == "plain":
        placed, program = operands, jax.jit(run, donate_argnums=4).lower(*operands).compile()
    else:
        shard = Shard(specs, P("x", "y"))
        op = OpCase("donated", run, lambda seed: operands)
        program, placed = op_checks.compile_sharded(op, shard, mode, donate_argnums=4)
    assert program.memory_analysis().alias_size_in_bytes > 0
    got = program(*placed)
    assert placed[4].is_deleted()
    oracle.assert_rounded(got, want, case.k)


@pytest.mark.parametrize(("reduce_dtype", "name", "bound"), [(F32, "f32", 1e-5), (BF16, "bf16", 1e-4)])
def test_reduce_dtype_decides_what_devices_exchange(reduce_dtype, name, bound):
    case = Case(16, 128, 1024)
    mesh = op_checks.make_mesh("explicit")
    run = jax.jit(
        functools.partial(run_fp8, out="bfloat16", reduce_dtype=reduce_dtype, out_sharding=P(None, None))
    )
    operands = oracle.fp8_operands(case)
    with jax.set_mesh(mesh):
        lowered = run.lower(*(jax.device_put(x, NamedSharding(mesh, P(None, "y"))) for x in operands))
        got = run(*(jax.device_put(x, NamedSharding(mesh, P(None, "y"))) for x in operands))
    assert f"(tensor<16x128x{name}>) -> tensor<16x128x{name}>" in lowered.as_text()
    assert oracle.calc_diff(got, oracle.fp8_float64(case, *operands)) < bound


def test_summed_over_shards_rounds_once():
    """Partial sums travel in float32, C joins after the sum: the unsharded result up to float32."""
    case = Case(16, 128, 1024, out="float32", accumulate=True)
    mesh = op_checks.make_mesh("auto")
    specs = (P(None, "y"), P(), P(None, "y"), P(), P())
    placed = [
        jax.device_put(x, NamedSharding(mesh, s))
        for x, s in zip(oracle.fp8_operands(case), specs, strict=True)
    ]
    run = jax.jit(functools.partial(run_fp8, out="float32"), out_shardings=NamedSharding(mesh, P()))
    oracle.assert_rounded(run(*placed), oracle.fp8_float64(case, *placed), case.k)


def test_fp8_layouts_under_sharding():
    """The transposing pass in front of the op moves no data between devices."""
    case = Case(16, 512, 1024, out="float32")
    a, sa, b, sb = oracle.fp8_operands(case)
    mesh = op_checks.make_mesh("auto")
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))  # noqa: E731
    operands = put(a.T, None, "x"), put(sa.T, None, "x"), put(b.T, None, "y"), put(sb.T, None, "y")
    run = jax.jit(
        lambda a, sa, b, sb: jdg.fp8_gemm_tn((a, sa), (b, sb), out_dtype=F32),
        out_shardings=NamedSharding(mesh, P("x", "y")),
    )
    compiled = run.lower(*operands).compile()
    assert not op_checks.collectives(compiled.as_text())
    oracle.assert_rounded(compiled(*operands), oracle.fp8_float64(case, a, sa, b, sb), case.k)


def test_explicit_axes_ask_for_out_sharding():
    mesh = op_checks.make_mesh("explicit")
    case = Case(16, 128, 1024)
    with jax.set_mesh(mesh):
        a, sa, b, sb = (
            jax.device_put(x, NamedSharding(mesh, P(None, "y"))) for x in oracle.fp8_operands(case)
        )
        with pytest.raises(ValueError, match="say out_sharding"):
            run_fp8(a, sa, b, sb, out="bfloat16")
        empty = jdg.fp8_gemm_nt((a[:0], sa[:0]), (b, sb), out_sharding=P(None, None))
        assert empty.shape == (0, 128)


LOAD = """
import sys, numpy as np, jax
from jax import export
import jax_deepgemm
folder = sys.argv[1]
arrays = np.load(folder + "/arrays.npz")
run = export.deserialize(open(folder + "/program", "rb").read()).call
x, w, want = (arrays[name] for name in ("x", "w", "want"))
np.testing.assert_array_equal(np.asarray(run(x, w)), want)
print("same bits")
"""


def test_export_runs_in_another_process(tmp_path: Path):
    pytest.importorskip("flatbuffers")
    from jax import export

    def run(x: jax.Array, w: jax.Array) -> jax.Array:
        y = jdg.fp8_gemm_nt(jdg.quantize(x), jdg.quantize(w, BLOCK))
        return y.astype(F32) + jdg.bf16_gemm_nt(x.astype(BF16), w.astype(BF16), out_dtype=F32)

    x, w = normals(0, (6, 300), (200, 300))
    (tmp_path / "program").write_bytes(export.export(jax.jit(run))(x, w).serialize())
    np.savez(tmp_path / "arrays.npz", x=x, w=w, want=jax.jit(run)(x, w))
    flags = "--xla_backend_optimization_level=0"  # one device, and compiled as here
    env = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", LOAD, str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "same bits" in done.stdout


def test_names_reach_the_program():
    case = Case(16, 128, 256)
    text = (
        jax.jit(functools.partial(run_fp8, out="bfloat16"))
        .lower(*oracle.fp8_operands(case))
        .as_text(debug_info=True)
    )
    assert "fp8_gemm_block" in text
