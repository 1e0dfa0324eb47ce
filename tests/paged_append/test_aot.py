"""Compiled for an H200 on a machine without one: a donated cache is written where it lies, alone, over
devices, and carried by a scan over layers."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_deepgemm.attention import PagedKVCache, paged_append
from tests.gemm.test_aot import h200_mesh
from tests.shared import op_checks

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None
    or importlib.util.find_spec("jax_deepgemm._ffi") is None,
    reason="needs jax-cuda12-plugin and the built extension",
)

LAYERS, PAGES, PAGE, KV_HEADS, HEADS, DEPTH, TOKENS = 4, 1024, 64, 8, 32, 128, 64
LAUNCH = 'custom_call_target="jax_deepgemm_launch"'


def arguments(*spec: Any) -> tuple[Any, ...]:
    mesh = h200_mesh("auto")

    def given(shape: tuple[int, ...], dtype: Any, *cut: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*cut)))

    pool = given((LAYERS, PAGES, KV_HEADS, PAGE, DEPTH), jnp.bfloat16, None, None, *spec)
    scale = given((LAYERS, KV_HEADS), jnp.float32, None, *spec)
    new = given((TOKENS, KV_HEADS, DEPTH), jnp.bfloat16, None, *spec)
    q = given((TOKENS, HEADS, DEPTH), jnp.bfloat16, None, *spec)
    numbers = given((TOKENS,), jnp.int32)
    return (
        PagedKVCache(pool, pool, scale, scale, True),
        new,
        new,
        q,
        numbers,
        given((DEPTH // 2,), jnp.float32),
    )


def step(cache: Any, k: Any, v: Any, q: Any, slots: Any, freq: Any, layer: Any = 1) -> Any:
    return paged_append(cache, k, v, slots, q=q, rotary=(slots, freq), layer=layer)


def layers(cache: Any, *given: Any) -> Any:
    def one(carried: Any, layer: Any) -> Any:
        cache, q = carried
        k, v, _, *rest = given
        return step(cache, k, v, q, *rest, layer=layer), None

    return jax.lax.scan(one, (cache, given[2]), jnp.arange(LAYERS))[0]


@pytest.mark.parametrize("run", [step, layers])
@pytest.mark.parametrize("spec", [(), (("x", "y"),)], ids=["one", "heads"])
def test_in_place(run: Any, spec: Any) -> None:
    given = arguments(*spec)
    compiled = jax.jit(run, donate_argnums=0).lower(*given).compile()
    hlo, share = compiled.as_text(), KV_HEADS // (8 if spec else 1)
    pool = re.escape(f"bf16[{LAYERS},{PAGES},{share},{PAGE},{DEPTH}]")
    assert hlo.count(LAUNCH) == 1
    assert not re.search(rf"= {pool}\S* (copy|copy-start|all-gather)\(", hlo)
    assert not op_checks.collectives(hlo)
    size = 2 * LAYERS * PAGES * share * PAGE * DEPTH
    assert compiled.memory_analysis().alias_size_in_bytes >= 2 * size
    assert compiled.memory_analysis().temp_size_in_bytes < size // 8
