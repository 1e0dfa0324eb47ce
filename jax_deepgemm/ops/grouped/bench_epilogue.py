"""Rows of the benchmark: products with epilogues, beside the product alone and a pass of XLA's behind it.

A row without an epilogue is the product alone. The baseline of the others is the same product, its result in
bfloat16, and behind it alpha, bias, activation and, where D is in FP8, `quantize` as a program has them
without an epilogue.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_deepgemm.core.bench import BESIDE_BASELINE, CLOCK, RATES, Beside, Fields, Row, Table
from jax_deepgemm.ops.gemm.api import bf16_gemm_nt, fp8_gemm_nt
from jax_deepgemm.ops.gemm.checks import PER_ROW
from jax_deepgemm.ops.gemm.epilogue import Epilogue
from jax_deepgemm.ops.gemm.finish import Finish
from jax_deepgemm.ops.gemm.finished import finished
from jax_deepgemm.ops.grouped.api import (
    m_grouped_bf16_gemm_nt_contiguous,
    m_grouped_bf16_gemm_nt_masked,
    m_grouped_fp8_gemm_nt_contiguous,
    m_grouped_fp8_gemm_nt_masked,
)
from jax_deepgemm.ops.quantize.activation import Activation
from jax_deepgemm.ops.quantize.api import quantize

PAIRS, HALVES = Activation(interleaved=True), Activation()
NONE = "none"
EPILOGUES: dict[str, tuple[Activation | None, bool]] = {
    NONE: (None, False),
    "bias": (None, False),
    "silu": (Activation(), False),
    "silu, FP8": (Activation(), True),
    "swiglu of pairs": (PAIRS, False),
    "swiglu, FP8": (HALVES, True),
}
"""Name -> (activation, whether D is in FP8); all but the first with alpha and a bias."""
OF_EACH = ("silu", "silu, FP8")
DENSE = ((64, 7168, 2048), (4096, 7168, 2048), (4096, 4096, 7168))
GROUPED = (("contiguous", 32, 256, 4096, 7168), ("masked", 32, 20, 4096, 7168))
PRODUCTS: dict[tuple[str, str], Callable[..., Any]] = {
    ("dense", "fp8"): fp8_gemm_nt,
    ("dense", "bf16"): bf16_gemm_nt,
    ("contiguous", "fp8"): m_grouped_fp8_gemm_nt_contiguous,
    ("contiguous", "bf16"): m_grouped_bf16_gemm_nt_contiguous,
    ("masked", "fp8"): m_grouped_fp8_gemm_nt_masked,
    ("masked", "bf16"): m_grouped_bf16_gemm_nt_masked,
}
ALPHA = 0.1


@functools.partial(jax.jit, static_argnums=range(3))
def _draw(kind: str, rows: tuple[int, ...], weights: tuple[int, ...]) -> tuple[Any, Any, jax.Array]:
    """A, B and a bias for each of its rows, standard normal."""
    keys = jax.random.split(jax.random.key(0), 3)
    a, b = (jax.random.normal(key, s, jnp.bfloat16) for key, s in zip(keys, (rows, weights), strict=False))
    bias = jax.random.normal(keys[2], weights[:-1], jnp.float32)
    return (quantize(a), quantize(b, (128, 128)), bias) if kind == "fp8" else (a, b, bias)


def _fused(product: Callable[..., Any], name: str, a: Any, b: Any, bias: Any, *sizes: Any) -> Any:
    activation, quantised = EPILOGUES[name]
    how: Any = "silu" if name in OF_EACH else activation
    epilogue = None if name == NONE else Epilogue(ALPHA, bias, how, PER_ROW if quantised else None)
    return product(a, b, *sizes, epilogue=epilogue)


def _apart(op: str, product: Callable[..., Any], name: str, a: Any, b: Any, bias: Any, *sizes: Any) -> Any:
    """The product, and a pass over it."""
    activation, quantised = EPILOGUES[name]
    sums = product(a, b, *sizes).astype(jnp.float32)
    if op == "masked":
        bias = bias[:, None]
    if op == "contiguous":
        ends = jnp.cumsum(sizes[0])
        group = jnp.sum(jnp.arange(sums.shape[0])[:, None] >= ends[None], axis=1)
        bias = jnp.take(bias, group, axis=0, mode="fill", fill_value=0)
    how = Finish(True, True, activation, each=name in OF_EACH)
    d = finished(sums, how, jnp.full(1, ALPHA), bias).astype(jnp.bfloat16)
    return quantize(d) if quantised else d


def _row(op: str, kind: str, name: str, sizes: tuple[int, ...], m: int, n: int, k: int) -> Row:
    product, groups = PRODUCTS[op, kind], len(sizes)
    total = sum(sizes) if sizes else m
    if op == "masked":
        product = functools.partial(product, expected_m=m)
    rows = {"dense": (m, k), "contiguous": (total, k), "masked": (groups, max(sizes, default=0), k)}[op]
    weights = (groups, n, k) if groups else (n, k)
    constants = (np.asarray(sizes, np.int32),) if groups else ()
    width = n // 2 if name.startswith("swiglu") else n
    element, stored = 2 if kind == "bf16" else 1, 1 if EPILOGUES[name][1] else 2
    fields: Fields = {"op": op, "type": kind, "epilogue": name, "groups": groups or 1, "m": m, "n": n, "k": k}
    beside = Beside("product, then XLA", functools.partial(_apart, op, product, name), constants=constants)
    return Row(
        name=f"epilogue {kind}, {op}, {name} groups={groups or 1} m={m} n={n} k={k}",
        fields={**fields, "group_sizes": list(sizes)},
        function=functools.partial(_fused, product, name),
        draw=functools.partial(_draw, kind, rows, weights),
        flops=2 * total * n * k,
        bytes=element * (max(groups, 1) * n * k + total * k) + stored * total * width,
        constants=constants,
        baseline=None if name == NONE else beside,
    )


def _sizes(groups: int, m: int) -> tuple[int, ...]:
    """Rows of each group where every row chooses one at random."""
    drawn = np.random.default_rng(0).multinomial(groups * m, np.full(groups, 1 / groups))
    return tuple(int(size) for size in drawn)


def rows(small: bool) -> Iterator[Row]:
    """The rows of all products."""
    dense, grouped = ((8, 256, 256),), (("contiguous", 2, 8, 256, 256), ("masked", 2, 8, 256, 256))
    cases: list[tuple[Any, ...]] = [("dense", (), *shape) for shape in (dense if small else DENSE)]
    for op, groups, *shape in grouped if small else GROUPED:
        cases.append((op, _sizes(groups, shape[0]), *shape))
    for op, sizes, m, n, k in cases:
        for kind in ("fp8", "bf16"):
            yield from (_row(op, kind, name, sizes, m, n, k) for name in EPILOGUES)


TABLE = Table(
    "Products with epilogues (each has alpha and a bias), beside the same product and a pass of XLA's over"
    " its result; none: the product alone. m of groups: rows expected in each",
    ("op", "type", "epilogue", "groups", "m", "n", "k"),
    rows,
    columns=(*RATES, *BESIDE_BASELINE, CLOCK),
    baseline="product, then XLA",
    part=lambda fields: "" if fields["epilogue"] == NONE else f"{fields['op']} {fields['type']}",
    order=3,
)
