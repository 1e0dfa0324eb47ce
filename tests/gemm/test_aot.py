"""Compiled for eight H200s on a machine without any: what XLA's GPU compiler makes of an op.

Needs jax's CUDA plugin (`jax-cuda12-plugin`, `jax-cuda12-pjrt`), ptxas (`nvidia-cuda-nvcc-cu12`), no driver.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_deepgemm
from jax_deepgemm.activation import swiglu_grad_quantize, swiglu_quantize
from jax_deepgemm.ops.quantize.fused import quantize_both
from tests.shared import op_checks, toy_ops
from tests.shared.toy_ops import BF16, BLOCK, F32

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None
    or importlib.util.find_spec("jax_deepgemm._ffi") is None,
    reason="needs jax-cuda12-plugin and the built extension",
)

TARGET = Path(__file__).parents[1] / "shared" / "data" / "h200_target_config.txtpb"
M, N, K = 128, 552, 680  # cut in 4 or 8, they end inside blocks of 16


@functools.cache
def devices() -> list[Any]:
    from jax.experimental import topologies

    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    jax.devices()
    return topologies.get_topology_desc(
        platform="cuda", target_config=TARGET.read_text(), topology="1x1x8"
    ).devices


def h200_mesh(mode: str) -> Mesh:
    axis_type = AxisType.Explicit if mode == "explicit" else AxisType.Auto
    return Mesh(np.array(devices()).reshape(2, 4), ("x", "y"), axis_types=(axis_type,) * 2)


def compile_on_h200s(
    fn: Callable[..., Any],
    types: list[tuple[Any, Any]],
    specs: tuple[P, ...],
    out: P,
    mode: str,
    **options: Any,
) -> str:
    """Optimised HLO of one device's program."""
    mesh = h200_mesh(mode)
    structs = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for (shape, dtype), spec in zip(types, specs, strict=True)
    ]
    if mode == "shard_map":
        fn = jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=out)
    elif mode == "explicit":
        fn = functools.partial(fn, out_sharding=NamedSharding(mesh.abstract_mesh, out))
    else:
        options["out_shardings"] = NamedSharding(mesh, out)
    return jax.jit(fn, **options).lower(*structs).compile().as_text()


def gemm_types(add: Any = None) -> list[tuple[Any, Any]]:
    blocks = [-(-size // BLOCK) for size in (K, N)]
    types = [((M, K), toy_ops.F8), ((M, blocks[0]), F32), ((N, K), toy_ops.F8), ((blocks[1], blocks[0]), F32)]
    return types if add is None else [*types, ((M, N), add)]


GEMM_CASES: list[tuple[P, P, P, tuple[str, ...]]] = [
    (P("x"), P("y"), P("x", "y"), ()),
    (P(), P(("x", "y")), P(None, ("x", "y")), ()),
    (P(None, "y"), P(None, "y"), P(), ("all-reduce",)),
    (P("x", "y"), P(None, "y"), P("x"), ("all-reduce",)),
    (P("x", "y"), P(None, "y"), P("x", "y"), ("reduce-scatter",)),
]


@pytest.mark.parametrize("mode", ["auto", "explicit"])
@pytest.mark.parametrize(("a", "b", "out", "expected"), GEMM_CASES, ids=str)
def test_collectives(a: P, b: P, out: P, expected: tuple[str, ...], mode: str) -> None:
    hlo = compile_on_h200s(toy_ops.block_gemm, gemm_types(), (a, P(), b, P()), out, mode)
    assert hlo.count('custom_call_target="jax_deepgemm_launch"') == 1
    assert op_checks.collectives(hlo) == Counter(expected)


@pytest.mark.parametrize("mode", ["auto", "explicit"])
def test_reduce_dtype_is_what_the_devices_exchange(mode: str) -> None:
    for reduce_dtype, exchanged in (("float32", "f32"), ("bfloat16", "bf16")):
        fn = functools.partial(toy_ops.block_gemm, out_dtype=BF16, reduce_dtype=reduce_dtype)
        hlo = compile_on_h200s(fn, gemm_types(), (P(None, "y"), P(), P(None, "y"), P()), P(), mode)
        (line,) = [line for line in hlo.splitlines() if re.search(r"\ball-reduce(-start)?\(", line)]
        assert re.search(rf"= {exchanged}\[", line), line


@pytest.mark.parametrize("mode", ["auto", "explicit", "shard_map"])
def test_names_are_readable(mode: str) -> None:
    specs = (P("x"), P("x"), P(), P())
    hlo = compile_on_h200s(toy_ops.block_gemm, gemm_types(), specs, P("x"), mode)
    (call,) = [line for line in hlo.splitlines() if "jax_deepgemm_launch" in line]
    (name,) = re.findall(r'op_name="([^"]*)"', call)
    assert "toy_block_gemm" in name, name


@pytest.mark.parametrize("mode", ["auto", "explicit", "shard_map"])
def test_donated_addend_is_used_in_place(mode: str) -> None:
    specs = (P("x"), P("x"), P(), P(), P("x"))
    for options, copies in (({"donate_argnums": 4}, 0), ({}, 1)):
        hlo = compile_on_h200s(toy_ops.block_gemm, gemm_types(F32), specs, P("x"), mode, **options)
        (call,) = [line for line in hlo.splitlines() if "jax_deepgemm_launch" in line]
        assert "output_to_operand_aliasing={{}: (4, {})}" in call
        assert ("input_output_alias={ {}: (4, {}, may-alias) }" in hlo) == (not copies)
        assert len(re.findall(r"= f32\[64,552\]\S* copy\(", hlo)) == copies


@pytest.mark.parametrize("mode", ["auto", "explicit"])
def test_layer_gathers_nothing(mode: str) -> None:
    """Quantise and multiply with blocks that straddle devices: one exchange of the small grid of scales."""
    types = [((M, K), BF16), ((N, K), BF16)]
    hlo = compile_on_h200s(toy_ops.linear, types, (P("x"), P("y")), P("x", "y"), mode)
    assert op_checks.collectives(hlo) == Counter({"all-reduce": 1})


def _fp8_gemm(*operands: Any, out_sharding: Any = None) -> Any:
    a, sa, b, sb = operands
    return jax_deepgemm.fp8_gemm_nt((a, sa), (b, sb), out_sharding=out_sharding)


def _fp8_linear(x: Any, w: Any, out_sharding: Any = None) -> Any:
    del out_sharding
    return jax_deepgemm.fp8_linear(x, w)


def _fp8_wgrad(x: Any, w: Any, out_sharding: Any = None) -> Any:
    return jax.grad(lambda w: jnp.sum(_fp8_linear(x, w).astype(F32) ** 2))(w)


_FP8 = [((256, 7168), toy_ops.F8), ((256, 56), F32), ((576, 7168), toy_ops.F8), ((5, 56), F32)]
_BF16 = [((256, 7168), BF16), ((576, 7168), BF16)]
_TENSOR_PARALLEL = (P("x"), P("y"), P("x", "y"))
_SPLIT_SUM = (P(None, "y"), P(None, "y"), P())
_SCATTERED_SUM = (P("x", "y"), P(None, "y"), P("x", "y"))
FAMILIES: list[tuple[str, Any, Any, tuple[P, P, P], int, tuple[str, ...]]] = [
    ("fp8", _fp8_gemm, _FP8, _TENSOR_PARALLEL, 1, ()),
    ("fp8-sum", _fp8_gemm, _FP8, _SPLIT_SUM, 1, ("all-reduce",)),
    ("fp8-scatter", _fp8_gemm, _FP8, _SCATTERED_SUM, 1, ("reduce-scatter",)),
    ("bf16", jax_deepgemm.bf16_gemm_nt, _BF16, _TENSOR_PARALLEL, 1, ()),
    ("bf16-sum", jax_deepgemm.bf16_gemm_nt, _BF16, _SPLIT_SUM, 1, ("all-reduce",)),
    ("bf16-scatter", jax_deepgemm.bf16_gemm_nt, _BF16, _SCATTERED_SUM, 1, ("reduce-scatter",)),
    ("linear", _fp8_linear, _BF16, _TENSOR_PARALLEL, 2, ("all-reduce",)),
    ("wgrad", _fp8_wgrad, _BF16, (P("x"), P("y"), P("y")), 3, ("all-reduce", "all-reduce")),
]


@pytest.mark.parametrize("mode", ["auto", "explicit"])
@pytest.mark.parametrize("row", FAMILIES, ids=lambda row: row[0])
def test_families(row: Any, mode: str) -> None:
    """The real ops with their real kernels: one launch each, and no collective that is not needed."""
    pytest.importorskip("cuda.core")
    _, fn, types, (a, b, out), launches, expected = row
    specs = (a, b) if len(types) == 2 else (a, P(), b, P())
    hlo = compile_on_h200s(fn, types, specs, out, mode)
    assert hlo.count('custom_call_target="jax_deepgemm_launch"') == launches
    assert op_checks.collectives(hlo) == Counter(expected)


def _round_trip(x: Any) -> Any:
    return jax_deepgemm.dequantize(jax_deepgemm.quantize(x, (1, 64)))  # a block without a kernel


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_rounding_to_fp8_is_not_elided(dtype: Any) -> None:
    """XLA for GPUs allows excess precision: it drops f32 -> f8 -> f32 where nothing stands in between."""
    one = jax.sharding.SingleDeviceSharding(devices()[0])
    x = jax.ShapeDtypeStruct((256, 512), dtype, sharding=one)
    hlo = jax.jit(_round_trip).lower(x).compile().as_text()
    assert re.search(r"= f8e4m3fn\[256,512\]\S* convert\(", hlo), hlo


def _expert_mlp(h: Any, weight: Any, dact: Any, rows: Any) -> list[Any]:
    forward = swiglu_quantize(h, weight, rows)
    return [*forward, *swiglu_grad_quantize(h, weight, dact, rows), *quantize_both(dact, rows)]


@pytest.mark.parametrize("mode", ["auto", "shard_map"])
def test_fused_quantisers_on_rows_of_every_device(mode: str) -> None:
    """One launch each on the device's own rows, the limit moved by a scalar, and no collective."""
    pytest.importorskip("cuda.core")
    mesh = h200_mesh(mode)
    rows = P("x")
    shapes = [((512, 256), BF16, rows), ((512,), F32, rows), ((512, 128), BF16, rows), ((1,), jnp.int32, P())]
    structs = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for shape, dtype, spec in shapes
    ]
    quantised = [rows, rows, P(None, "x"), rows]
    out = [*quantised, *quantised, rows, *quantised]
    fn, options = _expert_mlp, {"out_shardings": [NamedSharding(mesh, spec) for spec in out]}
    if mode == "shard_map":
        specs = tuple(spec for _, _, spec in shapes)
        fn, options = jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=out), {}
    hlo = jax.jit(fn, **options).lower(*structs).compile().as_text()
    assert hlo.count('custom_call_target="jax_deepgemm_launch"') == 3
    assert not op_checks.collectives(hlo)


_CAPTURED = """
import sys, functools
sys.path[:0] = [{root!r}]
import jax, jax.numpy as jnp
from tests.gemm import test_aot
from tests.shared import toy_ops
from jax.sharding import PartitionSpec as P
def chain(*operands):
    a, sa, b, sb = operands
    for i in range(6):
        y = toy_ops.block_gemm(a, sa, b, sb)
        a = jnp.sin(y).astype(a.dtype)
    return y
types = [((64, 64), toy_ops.F8), ((64, 4), toy_ops.F32), ((64, 64), toy_ops.F8), ((4, 4), toy_ops.F32)]
hlo = test_aot.compile_on_h200s(chain, types, (P("x"), P("x"), P(), P()), P("x"), {mode!r})
"""


@pytest.mark.parametrize("mode", ["auto", "shard_map"])
def test_calls_are_captured_in_a_command_buffer(mode: str, tmp_path: Path) -> None:
    code = _CAPTURED.format(root=str(Path(__file__).parents[2]), mode=mode)
    env = {**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={tmp_path}"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (dump,) = tmp_path.glob("*thunk_sequence_after_thunk_passes.txt")
    lines = dump.read_text().splitlines()
    top = [line for line in lines if re.match(r"\d+: ", line)]
    captured = [line for line in lines if re.match(r" +\d+: kCustomCall", line)]
    assert [line.split()[1] for line in top] == ["kCommandBuffer"], lines
    assert len(captured) == 6
