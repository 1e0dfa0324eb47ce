"""Runs every kind of kernel once, on shapes with tails, for compute-sanitizer.

    compute-sanitizer --tool memcheck python tests/gpu/sanitize.py [PART OF A NAME]

Operands are drawn, and results checked, on the CPU, so that only kernels of this package run on the GPU.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_deepgemm as jdg
from jax_deepgemm.activation import swiglu_grad_quantize, swiglu_quantize
from jax_deepgemm.core.chip import H200
from jax_deepgemm.ops.gemm.family import GemmConfig
from jax_deepgemm.ops.gemm.problem import GemmProblem
from jax_deepgemm.ops.gemm.sm90.cost import candidates, cost
from jax_deepgemm.ops.quantize import fused

M, N, K = 520, 272, 1088  # tails in every dimension
FEW_SMS = 3  # so that persistent blocks compute several tiles
PING_PONG = GemmConfig(128, 192, 5, slabs=2, ping_pong=True)
HALVES = GemmConfig(128, 256, 4, slabs=2)
SIDE_BY_SIDE = GemmConfig(64, 128, 4, slabs=2)


def cases() -> Iterator[tuple[str, Callable[..., jax.Array], tuple[Any, ...]]]:
    """Yields (name, function, operands): every kind of configuration, then every kind of operand."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)

    a, b, c = normal(M, K), normal(N, K), jnp.ones((M, N), jnp.float32)
    few = normal(5, K)
    qa, qfew = (jdg.quantize(rows, block=(1, 128)) for rows in (a, few))
    qb, qb_rows = jdg.quantize(b, block=(128, 128)), jdg.quantize(b, block=(1, 128))
    for left, quantised, sms in ((a, qa, FEW_SMS), (few, qfew, None)):
        rows = len(left)
        for config in kinds_of_config(GemmProblem(rows, N, K)):
            yield f"fp8 m={rows} {config}", call(jdg.fp8_gemm_nt, sms, config=config), (quantised, qb)
        for config in kinds_of_config(GemmProblem(rows, N, K, "bf16", "bf16", b_scales="none")):
            yield f"bf16 m={rows} {config}", call(jdg.bf16_gemm_nt, sms, config=config), (left, b)
    yield "bf16 ping-pong", call(jdg.bf16_gemm_nt, config=PING_PONG), (a, b)
    split = GemmConfig(64, 64, 8, split_k=2)
    yield "fp8 split without swap_ab", call(jdg.fp8_gemm_nt, config=split), (qa, qb)
    yield "bf16 split without swap_ab", call(jdg.bf16_gemm_nt, config=split), (a, b)
    float32 = call(jdg.fp8_gemm_nt, out_dtype=jnp.float32)
    yield "fp8 + C", float32, (qa, qb, c)
    yield "fp8 B 1x128", call(jdg.fp8_gemm_nt), (qa, qb_rows)
    yield "fp8 B 1x128 + C", float32, (qa, qb_rows, c)
    yield "fp8 few rows + C", call(jdg.fp8_gemm_nt, None, out_dtype=jnp.float32), (qfew, qb, c[:5])
    yield "bf16 + C", call(jdg.bf16_gemm_nt, out_dtype=jnp.float32), (a, b, c)
    for cols in (128, 256):
        side = GemmConfig(64, cols, 4, slabs=2)
        yield f"bf16 nn side by side {cols}", call(jdg.bf16_gemm_nn, config=side), (a, normal(K, N))
        yield f"fp8 side by side {cols}", call(jdg.fp8_gemm_nt, config=side), (qa, qb)
    for layout in ("nn", "tn", "tt"):
        left = a if layout[0] == "n" else normal(K, M)
        right = b if layout[1] == "t" else normal(K, N)
        yield f"bf16 {layout}", call(getattr(jdg, f"bf16_gemm_{layout}")), (left, right)
    batched = jax.vmap(jdg.bf16_gemm_nt, in_axes=(0, None))
    yield "bf16 batch", batched, (normal(3, 40, K), b)
    yield from quantising(normal)


def grouped_cases() -> Iterator[tuple[str, Callable[..., jax.Array], tuple[Any, ...]]]:
    """Every kind of grouped kernel: groups that start anywhere, an empty one, NaN outside all of them."""
    rng = np.random.default_rng(1)
    rows, n, k, groups = 300, 136, 320, 4

    def normal(*shape: int, good: int | None = None) -> jax.Array:
        drawn = rng.standard_normal(shape)
        drawn[good:] = drawn[good:] if good is None else np.nan
        return jnp.asarray(drawn, jnp.bfloat16)

    sizes = jnp.asarray([150, 0, 33, 70], jnp.int32)
    bad = {"negative": jnp.asarray([-7, 200, -1, 53], jnp.int32), "too many": 3 * sizes}
    used = int(sizes.sum())
    a, w = normal(rows, k, good=used), normal(groups, n, k)
    qa, qw, qw_rows = jdg.quantize(a), jdg.quantize(w, (128, 128)), jdg.quantize(w, (1, 128))
    fp8, bf16 = jdg.m_grouped_fp8_gemm_nt_contiguous, jdg.m_grouped_bf16_gemm_nt_contiguous
    yield "grouped fp8", call(fp8), (qa, qw, sizes)
    yield "grouped fp8 B 1x128, few rows", call(fp8, expected_m=4), (qa, qw_rows, sizes // 16)
    yield "grouped fp8 to float32", call(fp8, out_dtype=jnp.float32), (qa, qw, sizes)
    for sms in (3, 8):  # four tiles
        yield f"grouped fp8 halves, {sms} SMs", call(fp8, sms, config=HALVES), (qa, qw, sizes)
    yield "grouped fp8 two parts", call(fp8, config=GemmConfig(256, 128, 4, slabs=2)), (qa, qw, sizes)
    yield "grouped bf16 nt", call(bf16), (a, w, sizes)
    yield "grouped bf16 nt, few rows", call(bf16, expected_m=4), (a, w, sizes // 16)
    yield "grouped bf16 ping-pong", call(bf16, config=PING_PONG), (a, w, sizes)
    yield "grouped fp8 side by side", call(fp8, config=SIDE_BY_SIDE), (qa, qw, sizes)
    yield "grouped bf16 nn", call(jdg.m_grouped_bf16_gemm_nn_contiguous), (a, w.mT, sizes)
    whole = normal(rows, k)
    for name, wrong in bad.items():
        yield f"grouped fp8, {name}", call(fp8), (jdg.quantize(whole), qw, wrong)
        yield f"grouped bf16, {name}", call(bf16), (whole, w, wrong)
    index = jnp.asarray(np.repeat([2, -1, 0, 3, -1], [100, 28, 50, 77, 45]), jnp.int32)
    yield "grouped fp8, index", (lambda a, w, i: fp8(a, w, m_indices=i)), (jdg.quantize(whole), qw, index)
    ends = jnp.asarray([90, 128, 200, 300], jnp.int32)
    yield "grouped bf16, ends", (lambda a, w, e: bf16(a, w, ends=e, alignment=64)), (whole, w, ends)

    deep, mask = normal(groups, 100, k), jnp.asarray([100, 0, 3, 70], jnp.int32)
    valid = lambda d, mask: jnp.where(jnp.arange(100)[:, None] < mask[:, None, None], d, 0)  # noqa: E731
    for zero in (False, True):
        for kind, function, operands in (
            ("fp8", jdg.m_grouped_fp8_gemm_nt_masked, (jdg.quantize(deep), qw)),
            ("bf16", jdg.m_grouped_bf16_gemm_nt_masked, (deep, w)),
        ):
            run = call(function, zero_rows=zero)
            checked = lambda a, b, m, run=run, zero=zero: run(a, b, m) if zero else valid(run(a, b, m), m)  # noqa: E731
            yield f"masked {kind}{' zero_rows' * zero}", checked, (*operands, mask)
    weight_gradient = lambda w, a, m: valid(jdg.m_grouped_bf16_gemm_nt_masked(a, w, m), m).sum()  # noqa: E731
    yield "masked bf16, gradient of B", jax.grad(weight_gradient), (w, deep, mask)

    dy, c = normal(rows, n, good=used), jnp.ones((groups, k, n), jnp.float32)
    left, right = jdg.quantize(a.T), jdg.quantize(dy.T)
    for kind, function, operands in (
        ("fp8", jdg.k_grouped_fp8_gemm_nt_contiguous, (left, right)),
        ("bf16", jdg.k_grouped_bf16_gemm_tn_contiguous, (a, dy)),
    ):
        side = call(function, out_dtype=jnp.float32, config=SIDE_BY_SIDE)
        yield f"k-grouped {kind} side by side + C", side, (*operands, sizes, c)
        if kind == "fp8":
            two = call(function, out_dtype=jnp.float32, config=GemmConfig(256, 96, 4, slabs=2))
            yield "k-grouped fp8 two parts + C", two, (*operands, sizes, c)
        yield f"k-grouped {kind}", call(function, out_dtype=jnp.bfloat16), (*operands, sizes)
        yield f"k-grouped {kind} + C", call(function, out_dtype=jnp.float32), (*operands, sizes, c)
    turns = call(jdg.k_grouped_bf16_gemm_tn_contiguous, out_dtype=jnp.float32, config=PING_PONG)
    yield "k-grouped bf16 ping-pong + C", turns, (a, dy, sizes, c)
    whole_dy = normal(rows, n)
    for name, wrong in bad.items():
        yield f"k-grouped bf16, {name}", call(function), (whole, whole_dy, wrong)


def quantising(
    normal: Callable[..., jax.Array],
) -> Iterator[tuple[str, Callable[..., jax.Array], tuple[Any, ...]]]:
    """Every kind of quantising kernel; each writes all its results, one of them is compared."""
    rows, weight = jnp.int32(300), jnp.ones((M,), jnp.float32)
    for x in (normal(M, N), normal(M + 1, N + 3)):
        for block in ((1, 128), (128, 128), (128, 1)):
            yield f"quantize {block} {x.shape}", functools.partial(quantized, block), (x,)
        yield f"quantize_both {x.shape}", lambda x: fused.quantize_both(x, rows)[2], (x,)
        yield f"quantize_weight {x.shape}", lambda x: fused.quantize_weight(x)[2], (x,)
    for width in (2 * 128, N, N + 2):
        h, dact = normal(M, width), normal(M, width // 2)
        yield f"swiglu {width}", lambda h: swiglu_quantize(h, weight, rows)[3], (h,)
        yield f"swiglu_grad {width}", lambda h, d: swiglu_grad_quantize(h, weight, d, rows)[4], (h, dact)


def quantized(block: tuple[int, int], x: jax.Array) -> jax.Array:
    return jdg.quantize(x, block).values


def call(
    function: Callable[..., jax.Array], num_sms: int | None = FEW_SMS, **options: Any
) -> Callable[..., jax.Array]:
    return functools.partial(function, num_sms=num_sms, **options)


def kinds_of_config(problem: GemmProblem) -> list[GemmConfig]:
    """The cheapest configuration of each kind: kernel, rows, who shares them, cluster, blocks per SM."""
    cheapest: dict[tuple[Any, ...], GemmConfig] = {}
    for config in sorted(candidates(problem, H200), key=lambda one: cost(problem, one, H200).total):
        kind = (config.swap_ab, config.rows, config.across, config.split_k > 1, config.blocks_per_sm)
        cheapest.setdefault(kind, config)
    return list(cheapest.values())


def main() -> int:
    cpu, gpu = jax.devices("cpu")[0], jax.devices()[0]
    if gpu.platform != "gpu":
        print("sanitize: no GPU here", file=sys.stderr)
        return 2
    wanted = " ".join(sys.argv[1:])
    wrong = 0
    with jax.default_device(cpu):
        prepared = [case for case in (*cases(), *grouped_cases()) if wanted in case[0]]
    for name, function, operands in prepared:
        got = jax.jit(function)(*jax.device_put(operands, gpu))
        with jax.default_device(cpu):
            want = jax.jit(function)(*operands)
        difference = np.abs(np.asarray(got, np.float64) - np.asarray(want, np.float64)).max()
        close = bool(difference <= 0.02 * np.abs(np.asarray(want, np.float64)).max())
        wrong += not close
        print(
            f"{'ok   ' if close else 'WRONG'} {name}: {got.shape}, largest difference {difference:.3g}",
            flush=True,
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
