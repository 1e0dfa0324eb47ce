"""Compiled for H200s on a machine without any: scoring and choosing are launches of one command buffer."""

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

from jax_deepgemm import topk
from jax_deepgemm.indexer import indexer_quantize, mqa_logits, paged_mqa_logits
from tests.gemm.test_aot import h200_mesh
from tests.shared import op_checks

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None
    or importlib.util.find_spec("jax_deepgemm._ffi") is None,
    reason="needs jax-cuda12-plugin and the built extension",
)

BF16, F32, I32 = jnp.bfloat16, jnp.float32, jnp.int32
H, D, K, PAGE = 32, 128, 100, 64


def prefill(q: Any, k: Any, weights: Any, start: Any, end: Any) -> jax.Array:
    return topk(mqa_logits(indexer_quantize(q), indexer_quantize(k), weights, start, end), K)


def decode(q: Any, k: Any, weights: Any, slots: Any, cache: Any, lens: Any, tables: Any, *whose: Any) -> Any:
    cache = indexer_quantize(k, cache=cache, slots=slots)
    queries = indexer_quantize(q)
    queries = queries.values[:, None], queries.scales[:, None]
    indices = whose[0] if whose else None
    logits = paged_mqa_logits(queries, cache, weights[:, None], lens, tables, indices=indices)
    return topk(logits[:, 0], K), cache


PREFILL = [((512, H, D), BF16), ((2048, D), BF16), ((512, H), F32), ((512,), I32), ((512,), I32)]
DECODE = [((16, H, D), BF16), ((16, D), BF16), ((16, H), F32), ((16,), I32)]
DECODE += [((100, PAGE, D + 4), jnp.uint8), ((16,), I32), ((16, 20), I32)]
CASES = {
    "prefill": (prefill, PREFILL, 4),
    "decode": (decode, DECODE, 4),
    "decode tokens": (decode, [*DECODE[:-1], ((5, 20), I32), ((16,), I32)], 4),
}
"""Function, types, launches."""


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_one_command_buffer(name, tmp_path: Path):
    function, types, launches = CASES[name]
    mesh = h200_mesh("auto")
    args = [jax.ShapeDtypeStruct(*one, sharding=NamedSharding(mesh, P())) for one in types]
    local = jax.shard_map(function, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    given = {"donate_argnums": 4} if function is decode else {}
    compiled = jax.jit(local, **given).lower(*args).compile(compiler_options={"xla_dump_to": str(tmp_path)})
    hlo = compiled.as_text()
    assert set(re.findall(r'custom_call_target="([^"]*)"', hlo)) == {"jax_deepgemm_launch"}
    (dump,) = tmp_path.glob("*thunk_sequence_after_thunk_passes.txt")
    lines = dump.read_text().splitlines()
    assert [line.split()[1] for line in lines if re.match(r"\d+: ", line)] == ["kCommandBuffer"], lines
    captured = [line for line in lines if re.match(r" +\d+: kCustomCall", line)]
    assert len(captured) == hlo.count('custom_call_target="jax_deepgemm_launch"') == launches


def test_keys_over_devices():
    """Eight devices exchange the best of their keys, and no scores."""
    mesh = h200_mesh("auto")
    keys = P(("x", "y"))
    specs = P(), keys, P(), P(), P()
    args = [
        jax.ShapeDtypeStruct(*one, sharding=NamedSharding(mesh, spec))
        for one, spec in zip(PREFILL, specs, strict=True)
    ]
    hlo = jax.jit(prefill, out_shardings=NamedSharding(mesh, P())).lower(*args).compile().as_text()
    assert op_checks.collectives(hlo).keys() == {"all-gather"}
    assert "f32[512,256]" in hlo
    assert f"f32[512,{8 * K}]" in hlo
    assert "f32[512,2048]" not in hlo
