"""Compiled for H200s on a machine without any: all launches of a call are in the program's command buffer."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_deepgemm.indexer import indexer_topk
from tests.gemm.test_aot import h200_mesh
from tests.shared import op_checks

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None
    or importlib.util.find_spec("jax_deepgemm._ffi") is None,
    reason="needs jax-cuda12-plugin and the built extension",
)

S, N, H, D, K, CALLS = 640, 8192, 32, 128, 100, 5
E4M3, F32, I32 = jnp.float8_e4m3fn, jnp.float32, jnp.int32
TYPES = [((S, H, D), E4M3), ((N, D), E4M3), ((N,), F32), ((S, H), F32), ((S,), I32), ((S,), I32)]


def best(q: Any, keys: Any, scales: Any, *rest: Any, **options: Any) -> Any:
    return indexer_topk(q, (keys, scales), *rest, K, values=True, **options)


def arguments(specs: tuple[Any, ...]) -> list[jax.ShapeDtypeStruct]:
    mesh = h200_mesh("auto")
    return [
        jax.ShapeDtypeStruct(*one, sharding=NamedSharding(mesh, spec))
        for one, spec in zip(TYPES, specs, strict=True)
    ]


def test_a_call_is_captured(tmp_path: Path):
    scratch = 4 * N * 128

    def run(q: Any, keys: Any, scales: Any, weights: Any, *window: Any) -> Any:
        for _ in range(CALLS):
            scores, _ = best(q, keys, scales, weights, *window, scratch_bytes=scratch)
            weights = jnp.where(scores[:, :H] > 0, weights, -weights)
        return weights

    local = jax.shard_map(run, mesh=h200_mesh("auto"), in_specs=P(), out_specs=P(), check_vma=False)
    lowered = jax.jit(local).lower(*arguments((P(),) * 6))
    compiled = lowered.compile(compiler_options={"xla_dump_to": str(tmp_path)})
    hlo = compiled.as_text()
    assert hlo.count('custom_call_target="jax_deepgemm_launch"') == CALLS
    (dump,) = tmp_path.glob("*thunk_sequence_after_thunk_passes.txt")
    lines = dump.read_text().splitlines()
    assert [line.split()[1] for line in lines if re.match(r"\d+: ", line)] == ["kCommandBuffer"], lines
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * scratch < 4 * S * N // 2


def test_keys_over_devices():
    """Eight devices exchange the best of their keys."""
    keys = P(("x", "y"))
    args = arguments((P(), keys, keys, P(), P(), P()))
    whole = NamedSharding(h200_mesh("auto"), P())
    run = jax.jit(best, out_shardings=(whole, whole))
    hlo = run.lower(*args).compile().as_text()
    assert op_checks.collectives(hlo).keys() == {"all-gather"}
    assert f"f32[{S},{8 * K}]" in hlo
    assert hlo.count('custom_call_target="jax_deepgemm_launch"') == 2


def test_tokens_over_devices():
    rows = P(("x", "y"))
    args = arguments((rows, P(), P(), rows, rows, rows))
    hlo = jax.jit(best).lower(*args).compile().as_text()
    assert not op_checks.collectives(hlo)
    assert f"f32[{S // 8},{K}]" in hlo
