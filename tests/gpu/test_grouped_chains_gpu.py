"""Many grouped GEMMs in one program on an H200: unrolled, in loops, and replayed by command buffers.

Run: pytest -m gpu tests/gpu/test_grouped_chains_gpu.py
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_deepgemm as jdg
from jax_deepgemm.core import launch
from tests.shared.gpu_programs import chain, difference
from tests.shared.grouped_products import same

BF16, F32 = jnp.bfloat16, jnp.float32
BLOCK = (128, 128)
SIZES = np.array([70, 0, 200, 31], np.int32)
M, G = 320, len(SIZES)


def step(x: jax.Array, w: Any, sizes: jax.Array) -> jax.Array:
    y = jdg.m_grouped_fp8_gemm_nt_contiguous(jdg.quantize(x), w, sizes, out_dtype=F32)
    gram = jdg.k_grouped_bf16_gemm_tn_contiguous(x, x, sizes)
    z = jdg.m_grouped_bf16_gemm_nn_contiguous(x, gram.astype(BF16), sizes, out_dtype=F32)
    both = y + z / jnp.maximum(jnp.abs(z).max(), 1.0)
    return (both / jnp.maximum(jnp.abs(both).max(), 1.0)).astype(BF16)


@pytest.mark.parametrize("scanned", [False, True], ids=("unrolled", "scan"))
def test_many_calls_in_one_program(scanned):
    """Captured by command buffers or not, with other buffers and other group sizes: always as one by one."""
    w = jdg.quantize(jax.random.normal(jax.random.key(1), (G, 256, 256)), BLOCK)
    many, once = jax.jit(functools.partial(chain, step, steps=6, scanned=scanned)), jax.jit(step)
    for seed in range(4):
        sizes = jnp.roll(jnp.asarray(SIZES), seed)
        x = jax.random.normal(jax.random.key(seed), (M, 256), BF16)
        got = [many(x + 0, w, sizes) for _ in range(3)]
        assert all(same(got[0], other) for other in got[1:])
        assert float(difference(got[0], chain(once, x, w, sizes, steps=6))) < 1e-3


def steps_of_a_chain() -> dict[str, Callable[[jax.Array, jax.Array], jax.Array]]:
    """Name -> a function of (what the last step gave, sizes), for a chain whose numbers keep their size."""
    w = jax.random.normal(jax.random.key(1), (G, 256, 256), BF16) / 16
    rows = jax.random.normal(jax.random.key(3), (M, 256), BF16)
    q, columns = jdg.quantize(w, BLOCK), jdg.quantize(rows.T)
    mask = functools.partial(jdg.m_grouped_fp8_gemm_nt_masked, zero_rows=True)
    mask16 = functools.partial(jdg.m_grouped_bf16_gemm_nt_masked, zero_rows=True)
    return {
        "m bf16": lambda x, sizes: jdg.m_grouped_bf16_gemm_nn_contiguous(x, w, sizes),
        "m fp8": lambda x, sizes: jdg.m_grouped_fp8_gemm_nt_contiguous(jdg.quantize(x), q, sizes),
        "masked bf16": lambda x, sizes: mask16(x, w, sizes),
        "masked fp8": lambda x, sizes: mask(jdg.quantize(x), q, sizes),
        "k bf16": lambda c, sizes: jdg.k_grouped_bf16_gemm_tn_contiguous(rows, rows, sizes, c),
        "k fp8": lambda c, sizes: jdg.k_grouped_fp8_gemm_nt_contiguous(columns, columns, sizes, c),
    }


@pytest.mark.parametrize("name", ["m bf16", "m fp8", "masked bf16", "masked fp8", "k bf16", "k fp8"])
def test_command_buffers_take_other_group_sizes(name):
    """Twenty calls are captured with default flags, and replayed with sizes that only the device knows."""
    ffi, step = launch.native(), steps_of_a_chain()[name]
    many, once = jax.jit(functools.partial(chain, step, steps=20)), jax.jit(step)
    kind = name.split()[0]
    shape = {"m": (M, 256), "masked": (G, M, 256), "k": (G, 256, 256)}[kind]
    x = jax.random.normal(jax.random.key(2), shape, F32 if kind == "k" else BF16)
    every = [jnp.roll(jnp.asarray(SIZES), turn) for turn in range(3)]
    for sizes in every:
        many(x, sizes).block_until_ready()
    ffi.reset_execute_counters()
    got = [np.asarray(many(x, sizes)) for sizes in every for _ in range(10)]  # on the host: buffers stay
    assert ffi.execute_count() <= 20 * len(got) // 2, "the calls run outside command buffers"
    for index, sizes in enumerate(every):
        want = chain(once, x, sizes, steps=20)
        assert all(float(difference(d, want)) < 1e-3 for d in got[10 * index : 10 * index + 10])
        assert all(same(d, got[10 * index]) for d in got[10 * index : 10 * index + 10])
