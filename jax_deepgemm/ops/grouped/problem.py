"""What a grouped GEMM is to compute, as its kernels see it.

Group sizes are read on the device. What is static, and what a configuration is chosen for, is the expected
size of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from jax_deepgemm.ops.gemm.finish import AS_IT_IS, Finish
from jax_deepgemm.ops.gemm.problem import GemmProblem

ROWS, MASKED_ROWS, INNER, MASKED_INNER = "rows", "masked_rows", "inner", "masked_inner"
SHORT = {ROWS: "m_grouped", MASKED_ROWS: "m_masked", INNER: "k_grouped", MASKED_INNER: "k_masked"}
"""How the name of a kernel says what is grouped."""
_SEGMENT_BYTES = 16
_FEW_ROWS = 64  # of a group: about one SM reads each of its weights


@dataclass(frozen=True)
class GroupedProblem:
    """D = A B^T for each group.

    Attributes:
      grouping: "rows" (rows of A and D are grouped), "masked_rows" (one matrix A for each group, of which the
        first rows count), "inner" (k is grouped, D is [groups, m, n]) or "masked_inner".
      groups: groups of this device.
      m: rows of A and D in all ("rows"), of one group (otherwise).
      k: extent of A and B along k.
      expected: rows ("rows", "masked_rows") or k of a group that the configuration is chosen for.
      segments: entries of the device's description of groups.
      segmented: whether that description is starts | ends | groups, or just sizes.
      weights: groups of B ("masked_rows": used by group modulo this).
      zero_rows: "masked_rows": whether rows beyond those that count are stored as zeros.
      chained: "rows": whether this is a launch of a chain (core/chain.py), in which the one right before it
        gives A and its scales, and earlier ones the rest; groups are all here.
      biased: "swiglu": whether a bias of each group is added to h.
      a, b, layout, out, add_c, b_scales, gated, finish: as in GemmProblem; a bias is [groups, n].
      by_index: the operand whose rows an index names while they are loaded: "a" ("rows": row i of the product
        is row index[i] of A), "a" or "b" ("inner", BF16: k i of the product is row index[i]), or "".
    """

    grouping: str
    groups: int
    m: int
    n: int
    k: int
    expected: int
    segments: int
    segmented: bool = False
    weights: int = 1
    zero_rows: bool = False
    whole_blocks: bool = False
    a: str = "e4m3"
    b: str = "e4m3"
    layout: str = "nt"
    out: str = "bfloat16"
    add_c: bool = False
    b_scales: str = "block"
    gated: bool = False
    chained: bool = False
    biased: bool = False
    by_index: str = ""
    finish: Finish = AS_IT_IS

    @property
    def swiglu(self) -> bool:
        """Whether the kernel is the one that is fused with SwiGLU."""
        return self.gated and self.finish == AS_IT_IS

    @property
    def inner(self) -> bool:
        """Whether k is what is grouped."""
        return self.grouping in (INNER, MASKED_INNER)

    @cached_property
    def capacity(self) -> int:
        """Segments that the table in shared memory has room for: a power of two, to share kernels."""
        return max(32, 1 << (self.held - 1).bit_length())

    @property
    def held(self) -> int:
        """Segments in the table."""
        return self.segments if self.grouping == ROWS and self.segmented else self.groups

    @property
    def hit(self) -> int:
        """Groups that can have rows: in one matrix of rows, no more than it has."""
        return min(self.groups, self.m) if self.grouping == ROWS else self.groups

    @cached_property
    def gemm(self) -> GemmProblem:
        """One group of the expected size, with what the table takes of shared memory."""
        head_end_and_totals = 3
        return GemmProblem(
            m=self.m if self.inner else self.expected,
            n=self.n,
            k=self.expected if self.inner else self.k,
            a=self.a,
            b=self.b,
            layout=self.layout,
            out=self.out,
            add_c=self.add_c,
            b_scales=self.b_scales,
            table_bytes=(self.capacity + head_end_and_totals) * _SEGMENT_BYTES,
            weights=self._weights_read_once,
            gated=self.gated,
            finish=self.finish,
        )

    @property
    def _weights_read_once(self) -> int:
        """How many matrices B are read, or 0 where several groups share them or a group has many rows."""
        held = self.weights if self.grouping == MASKED_ROWS else self.groups
        uses = self.segments if self.segmented else self.groups
        once = not self.inner and self.expected <= _FEW_ROWS and uses <= 2 * held
        return min(held, self.hit) if once else 0

    @property
    def rows_bound(self) -> int:
        """Rows of tiles at most; the grid needs no more blocks than that makes tiles."""
        return self.m if self.grouping == ROWS else self.groups * self.m

    @property
    def flops(self) -> int:
        """Multiplications and additions if every row belongs to a group; how many do, only the run knows."""
        matrices = 1 if self.grouping in (ROWS, INNER) else self.groups
        return 2 * matrices * self.m * self.n * self.k

    def __str__(self) -> str:
        parts = [f"{SHORT[self.grouping]} {self.a}x{self.b} {self.layout} groups={self.groups}"]
        parts += [f"m={self.m} n={self.n} k={self.k} expected={self.expected} -> {self.out}"]
        parts += ["+C"] if self.add_c else []
        parts += ["whole blocks"] if self.whole_blocks else []
        parts += ["SwiGLU"] if self.swiglu else []
        parts += ["bias"] if self.biased else []
        parts += [f"{self.by_index} by index"] if self.by_index else []
        parts += ["chained"] if self.chained else []
        parts += [f"B scales {self.gemm.b_block}"] if self.gemm.is_fp8 else []
        parts += self.finish.words
        return " ".join(parts)
