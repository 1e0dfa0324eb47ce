"""Calls of GEMMs for compute-sanitizer: every kind of configuration, then every kind of operand."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.core.chip import H200
from jax_deepgemm.core.sanitize import FEW_SMS, Case, on_few
from jax_deepgemm.ops.gemm import api
from jax_deepgemm.ops.gemm.api import bf16_gemm_nn, bf16_gemm_nt, fp8_gemm_nt
from jax_deepgemm.ops.gemm.epilogue import Epilogue
from jax_deepgemm.ops.gemm.family import FAMILY, GemmConfig, GemmProblem
from jax_deepgemm.ops.gemm.heads import fp8_gemm_nt_skip_head_mid
from jax_deepgemm.ops.quantize.activation import Activation
from jax_deepgemm.ops.quantize.api import quantize

M, N, K = 520, 272, 1088  # tails in every dimension
PING_PONG = GemmConfig(128, 192, 5, slabs=2, ping_pong=True)
SPLIT = GemmConfig(64, 64, 8, split_k=2)


def cases() -> Iterator[Case]:
    """Yields every kind of configuration, then every kind of operand."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)

    a, b, c, few = normal(M, K), normal(N, K), jnp.ones((M, N), jnp.float32), normal(5, K)
    qa, qfew, qb, qb_rows = quantize(a), quantize(few), quantize(b, (128, 128)), quantize(b, (1, 128))
    for left, quantised, sms in ((a, qa, FEW_SMS), (few, qfew, None)):
        rows = len(left)
        for config in kinds_of_config(GemmProblem(rows, N, K)):
            yield Case(f"fp8 m={rows} {config}", on_few(fp8_gemm_nt, sms, config=config), (quantised, qb))
        for config in kinds_of_config(GemmProblem(rows, N, K, b_scales="block_32")):
            fine = quantize(left, (1, 32)), quantize(b, (32, 32))
            yield Case(f"fp8 32x32 m={rows} {config}", on_few(fp8_gemm_nt, sms, config=config), fine)
        fine = quantize(left, (1, 32)), quantize(b, (1, 32))
        yield Case(f"fp8 B 1x32 m={rows}", on_few(fp8_gemm_nt, sms), fine)
        for config in kinds_of_config(GemmProblem(rows, N, K, "bf16", "bf16", b_scales="none")):
            yield Case(f"bf16 m={rows} {config}", on_few(bf16_gemm_nt, sms, config=config), (left, b))
    yield Case("bf16 ping-pong", on_few(bf16_gemm_nt, config=PING_PONG), (a, b))
    yield Case("fp8 split without swap_ab", on_few(fp8_gemm_nt, config=SPLIT), (qa, qb))
    yield Case("bf16 split without swap_ab", on_few(bf16_gemm_nt, config=SPLIT), (a, b))
    float32 = on_few(fp8_gemm_nt, out_dtype=jnp.float32)
    yield Case("fp8 + C", float32, (qa, qb, c))
    yield Case("fp8 B 1x128", on_few(fp8_gemm_nt), (qa, qb_rows))
    yield Case("fp8 B 1x128 + C", float32, (qa, qb_rows, c))
    yield Case("fp8 few rows + C", on_few(fp8_gemm_nt, None, out_dtype=jnp.float32), (qfew, qb, c[:5]))
    yield Case("bf16 + C", on_few(bf16_gemm_nt, out_dtype=jnp.float32), (a, b, c))
    for cols in (128, 256):
        side = GemmConfig(64, cols, 4, slabs=2)
        yield Case(f"bf16 nn side by side {cols}", on_few(bf16_gemm_nn, config=side), (a, normal(K, N)))
        yield Case(f"fp8 side by side {cols}", on_few(fp8_gemm_nt, config=side), (qa, qb))
    for layout in ("nn", "tn", "tt"):
        left = a if layout[0] == "n" else normal(K, M)
        right = b if layout[1] == "t" else normal(K, N)
        yield Case(f"bf16 {layout}", on_few(getattr(api, f"bf16_gemm_{layout}")), (left, right))
    yield from _finished(qa, qb, qfew, a, b, c)
    yield Case("bf16 batch", jax.vmap(bf16_gemm_nt, in_axes=(0, None)), (normal(3, 40, K), b))


def _finished(qa: Any, qb: Any, qfew: Any, a: Any, b: Any, c: Any) -> Iterator[Case]:
    """Epilogues, and heads with holes, of the persistent kernel and of the one for few rows."""
    holes = functools.partial(fp8_gemm_nt_skip_head_mid, head_splits=(64, 64, 192))
    wide = jnp.ones((M, N - 16 + 64), jnp.bfloat16)
    sixteen_fewer = jax.tree.map(lambda x: x[: N - 16] if x.shape[0] == N else x[:2], qb)
    for rows, sms in ((qa, FEW_SMS), (qfew, None)):
        few = f"m={rows.values.shape[0]}"
        for activation in ("silu", Activation(interleaved=True)):
            epilogue = Epilogue(0.5, jnp.ones(N), activation)
            yield Case(f"fp8 {few} {activation}", on_few(fp8_gemm_nt, sms, epilogue=epilogue), (rows, qb))
        yield Case(f"fp8 {few} holes", on_few(holes, sms), (rows, sixteen_fewer))
    yield Case("fp8 holes of d", on_few(holes), (qa, sixteen_fewer, wide))
    added = on_few(bf16_gemm_nt, out_dtype=jnp.float32, epilogue=Epilogue(0.5, jnp.ones(N), "gelu"))
    yield Case("bf16 gelu + C", added, (a, b, c))
    odd = on_few(bf16_gemm_nt, epilogue=Epilogue(0.5, jnp.ones(N - 1)))
    yield Case("bf16 bias, odd n", odd, (a, b[:-1]))
    for kind, function, pair in (("fp8", fp8_gemm_nt, (qa, qb)), ("bf16", bf16_gemm_nt, (a, b))):
        run = on_few(function, epilogue=Epilogue(0.5, jnp.ones(N), "silu", out_scales=(1, 128)))
        yield Case(f"{kind} quantised", functools.partial(_scales, run), pair)


def _scales(run: Any, *operands: Any) -> jax.Array:
    """A value may be another number of FP8 where a sum is rounded otherwise."""
    found: jax.Array = run(*operands).scales
    return found


def kinds_of_config(problem: GemmProblem) -> list[GemmConfig]:
    """The cheapest configuration of each kind: kernel, rows, who shares them, cluster, blocks per SM."""
    cheapest: dict[tuple[Any, ...], GemmConfig] = {}
    for config, _ in FAMILY.ranked(problem, H200):
        kind = (config.swap_ab, config.rows, config.across, config.split_k > 1, config.blocks_per_sm)
        cheapest.setdefault(kind, config)
    return list(cheapest.values())
