"""Rows of the benchmark: FP8 and BF16 GEMMs of DeepSeek-V3's shapes and of other models', beside cuBLASLt.

Products of the same B share a draw, and so a profiler session.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_deepgemm.core.bench import (
    BESIDE_BASELINE,
    BESIDE_BOTH,
    CLOCK,
    RATES,
    Beside,
    Control,
    Fields,
    Row,
    Table,
    every_row,
    recorded_rows,
)
from jax_deepgemm.ops.gemm import bench_linear
from jax_deepgemm.ops.gemm.api import bf16_gemm_nt, fp8_gemm_nt
from jax_deepgemm.ops.gemm.bench_linear import CUBLASLT_ONLY, GEMM_PREFIX
from jax_deepgemm.ops.quantize.api import quantize

ROWS_OF_A = (1, 16, 64, 128, 256, 1024, 4096, 8192)
WEIGHTS = ((2112, 7168), (576, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048))
SQUARES = (4096, 8192)
OTHER_FP8 = (
    (5760, 2880, (1, 3333)),
    (12288, 4096, (64, 1000)),
    (10240, 5120, (333, 3333)),
    (5120, 7296, (1000,)),
    (6144, 16384, (4096,)),
)
OTHER_BF16 = (
    (5760, 2880, (1, 3333)),
    (12288, 4096, (64,)),
    (5120, 7296, (1000,)),
    (6144, 6144, (333, 3333)),
)
"""n, k, and numbers of rows of A, of other models than DeepSeek-V3."""
WHOLE_OPS = (
    (64, 7168, 2048),
    (128, 4096, 7168),
    (256, 2112, 7168),
    (1024, 24576, 1536),
    (4096, 4096, 7168),
    (4096, 7168, 16384),
)
SMALL_M = 64
"""Up to here weights are all that is read, and floors of reading say what is possible."""
FP8_BASELINE_ROWS = 16  # a multiple of it for A: else XLA pads at each call, or converts to BF16 below
MNK = ("m", "n", "k")


def products(kind: str, rows_of_a: Sequence[int], n: int, k: int) -> list[Row]:
    """Returns a row for each number of rows of A; B is drawn once, and A for the largest.

    >>> for row in products("bf16", (1, 64), 4096, 7168):
    ...     print(row, row.flops)
    bf16 m=1 n=4096 k=7168 58720256
    bf16 m=64 n=4096 k=7168 3758096384

    Args:
      kind: "fp8", "bf16", or "fp8_wgrad": both scaled 1x128, added to a float32 C.
    """
    draw = functools.partial(_draw, kind, max(_baseline_rows(kind, m) for m in rows_of_a), n, k)
    return [_product(kind, m, n, k, draw) for m in rows_of_a]


def _product(kind: str, m: int, n: int, k: int, draw: Callable[[], Any]) -> Row:
    bf16, adds = kind == "bf16", kind == "fp8_wgrad"
    size, result = 2 if bf16 else 1, 8 if adds else 2  # bytes of an element
    into_c = functools.partial(fp8_gemm_nt, out_dtype=jnp.float32)
    return Row(
        name=f"{kind} m={m} n={n} k={k}",
        fields={"m": m, "n": n, "k": k},
        function=into_c if adds else bf16_gemm_nt if bf16 else fp8_gemm_nt,
        draw=draw,
        flops=2 * m * n * k,
        bytes=size * (m + n) * k + result * m * n,
        operands=functools.partial(_with_rows, m),
        carry=2 if adds else None,
        baseline=Beside(
            what="cuBLASLt through jnp",
            elsewhere="XLA dot",
            function=functools.partial(_dot, jnp.float32 if adds else jnp.bfloat16),
            operands=functools.partial(_with_rows, _baseline_rows(kind, m)),
            options=CUBLASLT_ONLY,
        ),
        read_flush=m <= SMALL_M and not adds,
    )


def _baseline_rows(kind: str, m: int) -> int:
    unit = FP8_BASELINE_ROWS if kind == "fp8" else 1
    return -(-m // unit) * unit


def _draw(kind: str, m: int, n: int, k: int) -> tuple[Any, ...]:
    """A and B (standard normal) and C of ones, quantised as the kind asks."""
    key_a, key_b = jax.random.split(jax.random.key(0))
    a = jax.random.normal(key_a, (m, k), jnp.bfloat16)
    b = jax.random.normal(key_b, (n, k), jnp.bfloat16)
    if kind == "bf16":
        return a, b
    if kind == "fp8":
        return quantize(a), quantize(b, block=(128, 128))
    return quantize(a), quantize(b), jnp.ones((m, n), jnp.float32)


def _with_rows(rows: int, drawn: tuple[Any, ...]) -> tuple[Any, ...]:
    a, *others = drawn
    return (a if a.shape[0] == rows else first_rows(a, rows)), *others


@functools.partial(jax.jit, static_argnums=1)
def first_rows(operand: Any, rows: int) -> Any:
    """The first rows of A: one draw serves every m."""
    return jax.tree.map(lambda leaf: leaf[:rows], operand)


def _dot(out_dtype: Any, a: Any, b: Any, *_: Any) -> jax.Array:
    """The same product as XLA has it (on a GPU by cuBLASLt); FP8 is multiplied without scales."""
    left, right = getattr(a, "values", a), getattr(b, "values", b)
    return lax.dot_general(left, right, (((1,), (1,)), ((), ())), preferred_element_type=out_dtype)


# The tables ----------------------------------------------------------------------------------------------


def _fp8(small: bool) -> Iterator[Row]:
    if small:
        yield from products("fp8", (1, 64), 256, 512)
        return
    for n, k in WEIGHTS:
        yield from products("fp8", ROWS_OF_A, n, k)
    for size in SQUARES:
        yield from products("fp8", (size,), size, size)


def _fp8_wgrad(small: bool) -> Iterator[Row]:
    shapes = ((1, 256, 512), (64, 256, 512)) if small else tuple((n, k, 4096) for n, k in WEIGHTS)
    for m, n, k in shapes:
        yield from products("fp8_wgrad", (m,), n, k)


def _bf16(small: bool) -> Iterator[Row]:
    for n, k in ((256, 512),) if small else WEIGHTS:
        yield from products("bf16", (1, 64) if small else (1, 128, 4096), n, k)


def _other_shapes(small: bool) -> Iterator[Row]:
    tiny = ((192, 320, (33,)),)
    for kind, shapes in (("fp8", OTHER_FP8), ("bf16", OTHER_BF16)):
        for n, k, rows_of_a in tiny if small else shapes:
            for row in products(kind, rows_of_a, n, k):
                yield replace(row, fields={"op": "dense", "type": kind, "groups": 1, **row.fields})


def _sustained(small: bool) -> Iterator[Row]:
    m, n, k = (128, 256, 256) if small else (8192, 8192, 8192)
    [row] = products("fp8", (m,), n, k)
    yield replace(row, in_turns=True)


def _whole_ops(small: bool) -> Iterator[Row]:
    for m, n, k in ((64, 256, 512),) if small else WHOLE_OPS:
        [row] = products("fp8", (m,), n, k)
        yield replace(
            row,
            draw=functools.partial(_draw_whole, m, n, k),
            operands=lambda drawn: drawn[1:],
            prefix=GEMM_PREFIX,
            read_flush=False,
            whole=Beside("A quantised in the program", _quantising, lambda drawn: (drawn[0], drawn[2])),
        )


def _draw_whole(m: int, n: int, k: int) -> tuple[Any, ...]:
    """x in bfloat16, A quantised from it, and B."""
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (m, k), jnp.bfloat16)
    return x, quantize(x), quantize(jax.random.normal(keys[1], (n, k), jnp.bfloat16), block=(128, 128))


def _quantising(x: jax.Array, b: Any) -> jax.Array:
    """The op as a model has it: x in bfloat16, weights quantised before."""
    return fp8_gemm_nt(quantize(x), b)


def control(size: int) -> Row:
    """Returns a row whose baseline is cuBLASLt's FP8 product of this size.

    >>> control(8192).baseline.what
    'cuBLASLt FP8 8192^3 through jnp'
    """
    [row] = products("fp8", (size,), size, size)
    assert row.baseline is not None
    what = f"cuBLASLt FP8 {size}^3 through jnp"
    return replace(row, baseline=replace(row.baseline, what=what, elsewhere=""))


def _control_reference(tables: Mapping[str, Any]) -> float | None:
    about = ("m=8192 n=8192 k=8192", "fp8 dot without scales")
    rows = recorded_rows(tables, "jax_today") if "jax_today" in tables else []
    return next((float(row["us"]) for row in rows if (row["case"], row["op"]) == about), None)


CONTROL = Control(control(8192), _control_reference)


def _range_of_m(fields: Fields) -> str:
    ranges = {"m <= 256": (0, 256), "m >= 1024": (1024, math.inf)}
    return next((name for name, (low, high) in ranges.items() if low <= fields["m"] <= high), "")


def _read_bytes(size: int, fields: Fields) -> int | None:
    """Bytes of A and B, scales not counted, where reading them is most of the work."""
    return (fields["m"] + fields["n"]) * fields["k"] * size if fields["m"] <= SMALL_M else None


def _recorded(name: str, tables: Mapping[str, Any]) -> dict[tuple[Any, ...], Fields]:
    return {tuple(row[key] for key in MNK): row for row in recorded_rows(tables, name)}


def _table(name: str, title: str, rows: Callable[[bool], Iterator[Row]], **more: Any) -> Table:
    """A table of products beside cuBLASLt's and DeepGEMM's."""
    return Table(
        title,
        MNK,
        rows,
        columns=(*RATES, *BESIDE_BOTH, CLOCK),
        baseline="cuBLASLt",
        elsewhere="XLA",
        peer="DeepGEMM",
        recorded=functools.partial(_recorded, name),
        tuned=True,
        plotted=every_row,
        **more,
    )


OTHER_SHAPES = Table(
    "Shapes of other models; m of m_grouped: rows expected in each group",
    ("op", "type", "groups", *MNK),
    _other_shapes,
    columns=(*RATES, *BESIDE_BASELINE, CLOCK),
    baseline="cuBLASLt",
    elsewhere="XLA",
    peer="DeepGEMM",
    part=lambda fields: f"{fields['op']} {fields['type']}",
    order=3,
    tuned=True,
    plotted=every_row,
)
TABLES = {
    "fp8": _table(
        "fp8",
        "Dense FP8: D = A Bᵀ, A scaled 1x128, B scaled 128x128, bfloat16 result",
        _fp8,
        part=_range_of_m,
        type="fp8",
        reads=functools.partial(_read_bytes, 1),
        readme=(
            (1, 7168, 16384),
            (64, 4096, 7168),
            (128, 7168, 2048),
            (4096, 4096, 7168),
            (4096, 7168, 2048),
            (8192, 7168, 16384),
        ),
    ),
    "fp8_wgrad": _table(
        "fp8_wgrad",
        "FP8 weight gradient: D = C + A Bᵀ, both scaled 1x128, float32 C and D",
        _fp8_wgrad,
        type="fp8",
        readme=((4096, 7168, 4096),),
    ),
    "bf16": _table(
        "bf16",
        "Dense BF16: D = A Bᵀ, bfloat16 result",
        _bf16,
        part=_range_of_m,
        type="bf16",
        reads=functools.partial(_read_bytes, 2),
        readme=((128, 4096, 7168), (4096, 4096, 7168)),
    ),
    "shapes": OTHER_SHAPES,
    "linear": bench_linear.TABLE,
    "sustained": Table(
        "FP8 back to back, half a second each in turns, without flush, by the wall clock",
        MNK,
        _sustained,
        columns=(
            *("us", "TFLOP/s", "{baseline} us", "{baseline} TFLOP/s", "vs {baseline}"),
            *(CLOCK, "{baseline} SM MHz", "W", "{baseline} W"),
        ),
        baseline="cuBLASLt",
        elsewhere="XLA",
        peer="DeepGEMM",
        order=5,
    ),
    "op": Table(
        "Whole FP8 op under jit: the GEMM alone (us), other kernels of its program (must be 0), all kernels"
        " with A quantised in the program (op), and that by the wall clock, calls queued without flush",
        MNK,
        _whole_ops,
        columns=("us", "all us", "other us", "op us", "wall us", "wall - kernels us", CLOCK),
        baseline="cuBLASLt",
        elsewhere="XLA",
        peer="DeepGEMM",
        order=6,
    ),
}
