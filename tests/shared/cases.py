"""The shapes that dense GEMM tests run over, as data: CPU and GPU tests share them.

The (n, k) pairs are the linear layers of DeepSeek-V3 (with its tensor-parallel cuts); the edge cases are the
sizes that tiles, TMA rows of 16 bytes and scale blocks of 128 do not divide.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

LAYOUTS = ("nt", "nn", "tn", "tt")
OUT_DTYPES = ("bfloat16", "float32")
BLOCK, ROW = (128, 128), (1, 128)


@dataclass(frozen=True)
class Case:
    """One GEMM: D [m, n] = (C) + A [m, k] @ B [k, n]."""

    m: int
    n: int
    k: int
    out: str = "bfloat16"
    accumulate: bool = False
    b_block: tuple[int, int] = BLOCK
    a_dtype: str = "float8_e4m3fn"
    b_dtype: str = "float8_e4m3fn"
    layout: str = "nt"

    def __str__(self) -> str:
        parts = [f"{self.m}x{self.n}x{self.k}", self.layout, {"bfloat16": "bf16", "float32": "f32"}[self.out]]
        parts += ["c"] if self.accumulate else []
        parts += ["rowscales"] if self.b_block == ROW else []
        parts += [
            f"{d[7:11]}" for d in (self.a_dtype, self.b_dtype) if "e5m2" in d or self.a_dtype != self.b_dtype
        ]
        return "-".join(parts)


DENSE_NK = ((2112, 7168), (576, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048))
DENSE_NK_FLOAT32 = ((256, 7168), (129280, 7168))
"""Router and vocabulary projections: BF16 operands, float32 result."""
FORWARD_M = (1, 128, 4096)
BACKWARD_M = 4096


def dense_forward_fp8() -> Iterator[Case]:
    """y = x @ w.T: activations 1x128, weights 128x128."""
    yield from (Case(m, n, k) for n, k in DENSE_NK for m in FORWARD_M)


def dense_dgrad_fp8() -> Iterator[Case]:
    """dx = dy @ w: the contraction runs over n."""
    yield from (Case(BACKWARD_M, k, n) for n, k in DENSE_NK)


def dense_wgrad_fp8() -> Iterator[Case]:
    """dw = dy.T @ x: both 1x128 along tokens, accumulated in float32; and in bfloat16 with a blocked B."""
    for n, k in DENSE_NK:
        yield Case(n, k, BACKWARD_M, out="float32", accumulate=True, b_block=ROW)
        yield Case(n, k, BACKWARD_M)


def dense_forward_bf16() -> Iterator[Case]:
    for n, k in DENSE_NK:
        for m in FORWARD_M:
            yield from (Case(m, n, k, accumulate=accumulate) for accumulate in (False, True))
    yield from (Case(m, n, k, out="float32") for n, k in DENSE_NK_FLOAT32 for m in FORWARD_M)


def dense_dgrad_bf16() -> Iterator[Case]:
    yield from (Case(BACKWARD_M, k, n, layout="nn") for n, k in DENSE_NK)


def dense_wgrad_bf16() -> Iterator[Case]:
    for n, k in DENSE_NK:
        yield Case(n, k, BACKWARD_M, layout="tn", out="float32", accumulate=True)
        yield Case(n, k, BACKWARD_M, layout="tn")


EDGE_SHAPES = (
    (1, 1, 1),
    (1, 8, 192),
    (3, 5, 7),
    (7, 129, 130),
    (1, 576, 7168),
    (2, 24, 128),
    (5, 104, 256),
    (63, 136, 128),
    (65, 200, 384),
    (64, 128, 7296),
    (100, 2112, 192),
    (127, 257, 7296),
    (129, 577, 1000),
    (128, 1000, 136),
    (193, 72, 16),
    (255, 127, 127),
    (257, 384, 2047),
    (300, 248, 640),
    (513, 1031, 513),
    (4100, 2048, 128),
    (4100, 2048, 256),
    (4100, 2112, 384),
)
"""m = 1, odd sizes, n = 8 * odd, k below, at and beside multiples of 128 and of 16; many
tiles of few blocks."""

ZERO_SHAPES = ((0, 8, 128), (8, 0, 128), (8, 16, 0), (0, 0, 0), (0, 8, 0))


def edges(
    out: str = "bfloat16", accumulate: bool = False, b_block: tuple[int, int] = BLOCK
) -> Iterator[Case]:
    yield from (Case(*shape, out=out, accumulate=accumulate, b_block=b_block) for shape in EDGE_SHAPES)


FP8_PAIRS = (
    ("float8_e4m3fn", "float8_e5m2"),
    ("float8_e5m2", "float8_e4m3fn"),
    ("float8_e5m2", "float8_e5m2"),
)
