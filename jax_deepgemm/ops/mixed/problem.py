"""What a mixed-input product is to compute, as its kernels see it."""

from __future__ import annotations

from dataclasses import dataclass

from jax_deepgemm.ops.gemm.problem import ceil_div
from jax_deepgemm.ops.grouped.problem import MASKED_ROWS, ROWS, SHORT

DENSE = "dense"
FP4, FP4_BF16, NVFP4, INT8, E4M3 = "fp4", "fp4_bf16", "nvfp4", "int8", "e4m3"
SLAB_ROWS, SLAB_K, SLAB_BYTES, NVFP4_SLAB_BYTES = 64, 128, 4368, 4624
"""A slab of a prepared FP4 weight (ops/quantize/slabs.py, nvfp4_slabs.py)."""
BOX_ROWS, BOX_K = 128, 64
"""What a warpgroup multiplies at a time of a weight in bytes."""
_SEGMENT_BYTES, _HEAD_END_AND_TOTALS = 16, 3


@dataclass(frozen=True)
class MixedProblem:
    """D = A W^T, for each group if there are some.

    Attributes:
      weights_in: "fp4": W in slabs, A of e4m3 with scales of 1x128. "fp4_bf16": W in slabs, A of bfloat16.
        "nvfp4": W in slabs of NVFP4, A of bfloat16. "int8", "e4m3": W [k, n] with a scale for each of n, A of
        bfloat16.
      grouping: "dense", "rows" or "masked_rows", as in GroupedProblem.
      m: rows of A and D in all ("dense", "rows"), or of one group.
      n: rows of W, a multiple of 64 (FP4) or 16.
      k: of A; an FP4 W has it padded to whole blocks of 128.
      groups: matrices W of this device; those of A where it is masked.
      expected: rows of a group that the configuration is chosen for.
      segments: entries of the device's description of groups.
      segmented: whether that description is starts | ends | groups, or just sizes.
      weights: groups of W ("masked_rows": used by group modulo this).
      zero_rows: "masked_rows": whether rows beyond those that count are stored as zeros.
      scales: element type of W's scales where it is in bytes.
      out: "bfloat16" or "float32".

    Raises nothing; `precompile` and `explain` refuse what no kernel can run.

    >>> print(MixedProblem(m=16, n=4096, k=7168), MixedProblem(m=16, n=4096, k=7168).k_blocks)
    e4m3 x fp4 m=16 n=4096 k=7168 -> bfloat16 56
    """

    m: int
    n: int
    k: int
    weights_in: str = FP4
    grouping: str = DENSE
    groups: int = 1
    expected: int = 0
    segments: int = 1
    segmented: bool = False
    weights: int = 1
    zero_rows: bool = False
    scales: str = "float32"
    out: str = "bfloat16"

    @property
    def dense(self) -> bool:
        """Whether there are no groups."""
        return self.grouping == DENSE

    @property
    def in_slabs(self) -> bool:
        """Whether W is FP4 in slabs."""
        return self.weights_in in (FP4, FP4_BF16, NVFP4)

    @property
    def scaled_tokens(self) -> bool:
        """Whether A is e4m3, with scales."""
        return self.weights_in == FP4

    @property
    def token_bytes(self) -> int:
        """Bytes of an A's row in a slot."""
        return 256 if self.in_slabs and not self.scaled_tokens else 128

    @property
    def tokens(self) -> int:
        """Rows that one weight is expected to meet."""
        return self.m if self.dense else min(self.expected or self.m, self.m)

    @property
    def hit(self) -> int:
        """Weights that are read: those of groups that can have rows."""
        return min(self.groups, self.m) if self.grouping == ROWS else self.groups

    @property
    def height(self) -> int:
        """Rows of W that a warpgroup multiplies."""
        return SLAB_ROWS if self.in_slabs else BOX_ROWS

    @property
    def k_blocks(self) -> int:
        """Slots of the ring that k fills."""
        return ceil_div(self.k, SLAB_K if self.in_slabs else BOX_K)

    @property
    def part_bytes(self) -> int:
        """Bytes of W that a warpgroup multiplies at a time."""
        slab = NVFP4_SLAB_BYTES if self.weights_in == NVFP4 else SLAB_BYTES
        return slab if self.in_slabs else BOX_ROWS * BOX_K

    @property
    def held(self) -> int:
        """Segments in the kernel's table."""
        return self.segments if self.grouping == ROWS and self.segmented else self.groups

    @property
    def capacity(self) -> int:
        """Segments that the table has room for: a power of two, to share kernels."""
        return max(32, 1 << (self.held - 1).bit_length())

    @property
    def table_bytes(self) -> int:
        """Of shared memory, for the table of groups."""
        return 0 if self.dense else (self.capacity + _HEAD_END_AND_TOTALS) * _SEGMENT_BYTES

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that must be read."""
        return self.hit * ceil_div(self.n, self.height) * self.k_blocks * self.part_bytes

    @property
    def flops(self) -> int:
        """Multiplications and additions if every row counts."""
        return 2 * (self.groups if self.grouping == MASKED_ROWS else 1) * self.m * self.n * self.k

    def __str__(self) -> str:
        kind = "" if self.dense else f"{SHORT[self.grouping]} "
        groups = "" if self.dense else f"groups={self.groups} "
        expected = "" if self.dense else f" expected={self.tokens}"
        types = f"{'e4m3' if self.scaled_tokens else 'bf16'} x {self.weights_in.removesuffix('_bf16')}"
        return f"{kind}{types} {groups}m={self.m} n={self.n} k={self.k}{expected} -> {self.out}"
