"""Runs every kind of kernel once, on small shapes with tails, for compute-sanitizer.

    compute-sanitizer --tool memcheck python tests/gpu/sanitize.py

Operands are drawn and checked on the CPU, so that only kernels of this package run on the GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_deepgemm as jdg

SHAPES = {"large m": (200, 272, 448), "small m": (5, 272, 1152)}


def cases() -> Iterator[tuple[str, Callable[..., jax.Array], tuple[Any, ...]]]:
    """Yields (name, function, operands on the CPU)."""
    for size, (m, n, k) in SHAPES.items():
        rng = np.random.default_rng(0)

        def normal(*shape: int, rng: np.random.Generator = rng) -> jax.Array:
            return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)

        a, b, c = normal(m, k), normal(n, k), jnp.ones((m, n), jnp.float32)
        qa = jdg.quantize(a, block=(1, 128))
        for block in ((128, 128), (1, 128)):
            qb = jdg.quantize(b, block=block)
            yield f"fp8_gemm_nt {size} B {block}", jdg.fp8_gemm_nt, (qa, qb)
            yield f"fp8_gemm_nt {size} B {block} + C", _with_float32_c(jdg.fp8_gemm_nt), (qa, qb, c)
        for layout in ("nt", "nn", "tn", "tt"):
            left = a if layout[0] == "n" else normal(k, -(-m // 8) * 8)
            right = b if layout[1] == "t" else normal(k, n)
            yield f"bf16_gemm_{layout} {size}", getattr(jdg, f"bf16_gemm_{layout}"), (left, right)
        yield f"bf16_gemm_nt {size} + C", _with_float32_c(jdg.bf16_gemm_nt), (a, b, c)


def _with_float32_c(product: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    return lambda a, b, c: product(a, b, c, out_dtype=jnp.float32)


def main() -> int:
    cpu, gpu = jax.devices("cpu")[0], jax.devices()[0]
    if gpu.platform != "gpu":
        print("sanitize: no GPU here", file=sys.stderr)
        return 2
    wrong = 0
    with jax.default_device(cpu):
        prepared = list(cases())
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
