"""One program for each case of a grouped GEMM: what all its calls give, against the oracle.

`oracle` limits are against the operands as the kernel reads them (dequantised), `exact` ones against the
numbers that were quantised. What lies outside all groups is NaN in A and in its scales, always.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jax_deepgemm as jdg
from tests.shared import grouped_products as oracle
from tests.shared.gpu_programs import PIECE, difference, program, random_numbers
from tests.shared.grouped_cases import FP8, Contiguous, KGrouped, Masked

BF16, F32 = jnp.bfloat16, jnp.float32

EXACT_LIMIT = 1e-3
EXACT_FROM = 2048  # columns of D: fewer elements do not average the errors of quantising
FP8_LIMIT = {"float32": 1e-6, "bfloat16": 1e-5}
BF16_LIMIT = {"float32": 1e-8, "bfloat16": 1e-5}
POOL = 32 * 6144 * 7168 + PIECE
ROWS, COLS, BLOCK = (1, 128), (128, 1), (128, 128)


@functools.cache
def pool() -> jax.Array:
    """Standard normal numbers that every case cuts its operands from."""
    return random_numbers(POOL)


def cut(numbers: jax.Array, seed: int, *shape: int) -> jax.Array:
    start, size = 1_048_576 * seed, math.prod(shape)
    if start + size > POOL:
        numbers = jnp.concatenate([numbers] * -(-(start + size) // POOL))
    return lax.slice(numbers, (start,), (start + size,)).reshape(shape)


def poisoned(x: jax.Array, good: jax.Array) -> jax.Array:
    return jnp.where(good, x, jnp.nan)


def quantised(x: jax.Array, block: tuple[int, int], good: jax.Array) -> jdg.QuantizedArray:
    """x quantised, with NaN where not good; also the scales of blocks of which nothing is good."""
    good = jnp.broadcast_to(good, x.shape)
    q = jdg.quantize(poisoned(x, good), block)
    pad = [(0, 0)] * (x.ndim - 2) + [(0, -size % b) for size, b in zip(x.shape[-2:], block, strict=True)]
    rows, cols = q.scales.shape[-2:]
    any_good = jnp.pad(good, pad).reshape(*x.shape[:-2], rows, block[0], cols, block[1]).any((-3, -1))
    return jdg.QuantizedArray(q.values, poisoned(q.scales, any_good), block)


M_FUNCTIONS = {
    "fp8_block": jdg.m_grouped_fp8_gemm_nt_contiguous,
    "fp8_row": jdg.m_grouped_fp8_gemm_nt_contiguous,
    "bf16_nt": jdg.m_grouped_bf16_gemm_nt_contiguous,
    "bf16_nn": jdg.m_grouped_bf16_gemm_nn_contiguous,
}


def weights(w: jax.Array, operands: str) -> Any:
    """B [g, n, k] as the call wants it."""
    if operands.startswith("fp8"):
        return jdg.quantize(w, BLOCK if operands == "fp8_block" else ROWS)
    return w.mT if operands == "bf16_nn" else w


def plain(b: Any, operands: str) -> jax.Array:
    """B [g, n, k] as the kernel's numbers are."""
    if isinstance(b, jdg.QuantizedArray):
        return oracle.dequantised(b)
    return b.mT if operands == "bf16_nn" else b


def contiguous(case: Contiguous, numbers: jax.Array, at: dict[str, jax.Array]) -> dict[str, jax.Array]:
    local = case.local or case.groups
    x, w = cut(numbers, 0, case.rows, case.k), cut(numbers, 1, local, case.n, case.k)
    mine = [lax.dynamic_slice_in_dim(at[name], at["offset"][0], local) for name in ("starts", "counts")]
    good = oracle.inside(*mine, case.rows)[:, None]
    found, wants = {}, {}
    for operands, layout, out in case.calls:
        a = quantised(x, ROWS, good) if operands.startswith("fp8") else poisoned(x, good)
        b = weights(w, operands)
        described = {
            "sizes": {"group_sizes": at["sizes"]},
            "index": {"m_indices": at["index"]},
            "ends": {"ends": at["ends"], "alignment": case.alignment},
        }[layout]
        if case.local:
            described["group_offset"] = at["offset"]
        d = M_FUNCTIONS[operands](a, b, **described, out_dtype=out)
        if operands not in wants:
            read = oracle.dequantised(a) if operands.startswith("fp8") else a
            wants[operands] = oracle.m_grouped(read, plain(b, operands), *mine, case.most)
        found[f"oracle {operands} {layout} {out}"] = difference(d, wants[operands])
        found[f"outside {operands} {layout} {out}"] = jnp.abs(jnp.where(good, 0, d)).max()
    if case.calls[0][0] == FP8 and case.n >= EXACT_FROM:
        exact = oracle.m_grouped(x, w, *mine, case.most)
        found["exact"] = difference(wants[FP8], exact)
    return found


def masked(case: Masked, numbers: jax.Array, at: dict[str, jax.Array]) -> dict[str, jax.Array]:
    x = cut(numbers, 0, case.groups, case.rows, case.k)
    w = cut(numbers, 1, case.groups, case.n, case.k)
    good = (jnp.arange(case.rows) < at["sizes"][:, None])[..., None]
    found, wants = {}, {}
    for operands, zero, out in case.calls:
        fp8 = operands.startswith("fp8")
        a, b = quantised(x, ROWS, good) if fp8 else poisoned(x, good), weights(w, operands)
        function = jdg.m_grouped_fp8_gemm_nt_masked if fp8 else jdg.m_grouped_bf16_gemm_nt_masked
        d = function(a, b, at["sizes"], out_dtype=out, zero_rows=bool(zero))
        if operands not in wants:
            read = oracle.dequantised(a) if fp8 else a
            wants[operands] = oracle.masked(read, plain(b, operands), at["sizes"], case.most)
        found[f"oracle {operands} {zero} {out}"] = difference(jnp.where(good, d, 0), wants[operands])
        if zero:
            found[f"outside {operands} {out}"] = jnp.abs(jnp.where(good, 0, d)).max()
    if case.calls[0][0] == FP8 and case.n >= EXACT_FROM:
        found["exact"] = difference(wants[FP8], oracle.masked(x, w, at["sizes"], case.most))
    return found


def k_grouped(case: KGrouped, numbers: jax.Array, at: dict[str, jax.Array]) -> dict[str, jax.Array]:
    dy, x = cut(numbers, 0, case.k, case.m), cut(numbers, 1, case.k, case.n)
    where = at["starts"], at["counts"], case.most
    good = oracle.inside(*where[:2], case.k)[:, None]
    found, wants = {}, {}
    for operands, add, out in case.calls:
        if operands == "fp8_nt":
            a, b = (quantised(z.T, ROWS, good.T) for z in (dy, x))
            read = [oracle.dequantised(z).T for z in (a, b)]
            function = jdg.k_grouped_fp8_gemm_nt_contiguous
        elif operands == "fp8_tn":
            a, b = (quantised(z, COLS, good) for z in (dy, x))
            read = [oracle.dequantised(z) for z in (a, b)]
            function = jdg.k_grouped_fp8_gemm_tn_contiguous
        else:
            read = a, b = [poisoned(z, good) for z in (dy, x)]
            function = jdg.k_grouped_bf16_gemm_tn_contiguous
        c = (32 * cut(numbers, 2, case.groups, case.m, case.n)).astype(out) if add else None
        d = function(a, b, at["sizes"], c, out_dtype=out)
        if operands not in wants:
            wants[operands] = oracle.k_grouped(*read, *where)
        want = wants[operands]
        if add and out == "float32":
            d = d - c
        elif add:
            want = want + c.astype(F32)
        found[f"oracle {operands} {add} {out}"] = difference(d, want)
    if case.calls[0][0] == "fp8_nt" and case.n >= EXACT_FROM:
        found["exact"] = difference(wants["fp8_nt"], oracle.k_grouped(dy, x, *where))
    return found


PROGRAMS = {Contiguous: contiguous, Masked: masked, KGrouped: k_grouped}


def where(case: Any, sizes: np.ndarray, offset: int = 0) -> dict[str, np.ndarray]:
    """What a case's program is told about its groups."""
    if isinstance(case, Masked):
        return {"sizes": sizes}
    rows = case.k if isinstance(case, KGrouped) else case.rows
    at = oracle.place(sizes, rows, getattr(case, "alignment", 1))
    return dataclasses.asdict(at) | {"offset": np.array([offset], np.int32)}


@functools.cache
def compiled(case: Any) -> Any:
    numbers = jax.ShapeDtypeStruct((POOL,), BF16)
    at = where(case, np.zeros(case.groups, np.int32))
    return program(functools.partial(PROGRAMS[type(case)], case)).lower(numbers, at).compile()


def limit(what: str) -> float:
    if not what.startswith("oracle"):
        return EXACT_LIMIT if what == "exact" else 0.0
    return (FP8_LIMIT if " fp8" in what else BF16_LIMIT)[what.split()[-1]]


def check(case: Any, patterns: dict[str, np.ndarray], offset: int = 0) -> None:
    """Runs a case with every pattern of sizes; nothing is beyond its limit, and nothing is NaN."""
    wrong = {}
    for name, sizes in patterns.items():
        found = compiled(case)(pool(), where(case, sizes, offset))
        for what, value in jax.device_get(found).items():
            if not value <= limit(what):
                wrong[f"{name}: {what}"] = float(value)
    assert not wrong, wrong
