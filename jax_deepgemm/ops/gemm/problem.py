"""What a dense GEMM is to compute, as its kernels see it."""

from __future__ import annotations

from dataclasses import dataclass

from jax_deepgemm.ops.gemm.finish import AS_IT_IS, Finish

_SLOT_ROW_BYTES = 128  # bytes of k that kernels load at a time: 128 FP8 or 64 BF16 elements
_HALF_OF_L2 = 24 << 20  # see GemmProblem.batches_together
_FEW_ROWS, _LONG_K, _MOST_WEIGHTS = 256, 1536, 1 << 28  # see GemmProblem.b_once


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def align_up(a: int, b: int) -> int:
    return ceil_div(a, b) * b


@dataclass(frozen=True)
class GemmProblem:
    """D[m, n] = A[m, k] B[n, k]^T (+ C), `batches` times.

    Attributes:
      m, n, k: sizes: D has m rows and n columns, and k is summed over.
      a, b: element types, "e4m3", "e5m2" or "bf16".
      layout: DeepGEMM's letters; FP8 is always "nt". "nn": B is stored [k, n]; "tn": A is stored [k, m];
        "tt": both.
      out: "bfloat16" or "float32".
      add_c: whether C is added.
      b_scales: "block" (128x128), "vector" (1x128) or "none" (BF16). A's scales are 1x128. "slices":
        1x128 too, and the scales of both operands are stored by block of k, [k / 128, m] and [k / 128, n].
        "block_slices": so stored, A's 1x128 and B's 128x128, [k / 128, n / 128]. "block_32" and "vector_32":
        A's scales are 1x32, and B's 32x32 or 1x32.
      batches: products of this size in one launch (`jax.vmap`).
      batched: for each operand in the op's order, whether it has a batch dimension.
      table_bytes: shared memory that a grouped kernel's table of groups takes (ops/grouped).
      weights: how many matrices B are read in all; 0 where they are read more than once or twice.
      gated: whether B is [gate | up], and tiles have both of the same features (ops/grouped); without
        `finish` only the product's SwiGLU is written, in FP8.
      finish: what the product becomes before it is stored.
      stored: the dimensions of A, B and D as they are stored, where a batch h does not stand in front of all
        that have it ("mhk,hnk->mhn"), or where k consists of runs r ("rmk,rnk->mn"); `k` is that of one run.
      runs: how many.

    Raises nothing; `precompile` and `explain` refuse what no kernel can run.

    >>> problem = GemmProblem(m=64, n=2112, k=7168)
    >>> print(problem, problem.flops)
    e4m3xe4m3 nt m=64 n=2112 k=7168 -> bfloat16 B scales 128x128 1937768448
    """

    m: int
    n: int
    k: int
    a: str = "e4m3"
    b: str = "e4m3"
    layout: str = "nt"
    out: str = "bfloat16"
    add_c: bool = False
    b_scales: str = "block"
    batches: int = 1
    batched: tuple[bool, ...] = ()
    table_bytes: int = 0
    weights: int = 1
    gated: bool = False
    finish: Finish = AS_IT_IS
    stored: str = ""
    runs: int = 1

    @property
    def is_fp8(self) -> bool:
        """Whether the operands are FP8, with scales."""
        return self.a != "bf16"

    @property
    def slices(self) -> bool:
        """Whether scales are stored by block of k."""
        return self.b_scales in ("slices", "block_slices")

    @property
    def square_scales(self) -> bool:
        """Whether B has a scale for 128x128 elements."""
        return self.b_scales in ("block", "block_slices")

    @property
    def fine(self) -> bool:
        """Whether there is a scale for 32 of k."""
        return self.b_scales in ("block_32", "vector_32")

    @property
    def b_block(self) -> str:
        """What shares a scale of B.

        >>> GemmProblem(64, 128, 512, b_scales="block_32").b_block
        '32x32'
        """
        if self.fine:
            return "32x32" if self.b_scales == "block_32" else "1x32"
        return "128x128" if self.square_scales else "1x128"

    @property
    def block_k(self) -> int:
        """Elements of k in one slot of the ring."""
        return _SLOT_ROW_BYTES // (1 if self.is_fp8 else 2)

    @property
    def k_blocks(self) -> int:
        """Slots of the ring that k fills."""
        return self.runs * ceil_div(self.k, self.block_k)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of A or B, along k."""
        return self.runs * self.k * (1 if self.is_fp8 else 2)

    @property
    def batch_axes(self) -> tuple[int, int, int]:
        """Where the batch, or the run, stands in A, B and D, if they have it.

        >>> GemmProblem(64, 128, 512, stored="mhk,hnk->mhn").batch_axes
        (1, 0, 1)
        """
        orders = self.stored.replace("->", ",").split(",") if self.stored else ("", "", "")
        a, b, d = (max(order.find("h"), order.find("r"), 0) for order in orders)
        return a, b, d

    @property
    def batches_together(self) -> bool:
        """Whether the tiles of all batches come before the next rows, and A's lines are the first to leave
        L2: rows of A hold all of the batch, and A streams by while all of B stays in L2."""
        a, b = (self.batches * rows * self.row_bytes for rows in (self.m, self.n))
        inside = self.batches > 1 and self.batch_axes[0] == 1 and self.a_k_major
        return inside and b <= _HALF_OF_L2 and a > 2 * _HALF_OF_L2

    @property
    def a_k_major(self) -> bool:
        """Whether A is stored with k last."""
        return self.layout[0] == "n"

    @property
    def b_k_major(self) -> bool:
        """Whether B is stored with k last."""
        return self.layout[1] == "t"

    @property
    def columns(self) -> int:
        """Columns of D and C."""
        return self.finish.width(self.n)

    @property
    def out_bytes(self) -> int:
        """Bytes of an element of D."""
        return 2 if self.out == "bfloat16" else 4

    @property
    def reduces(self) -> bool:
        """Whether the product is added in L2 to C: float32 pairs, in memory that D takes over (the op aliases
        equal types)."""
        in_place = not self.batched or self.batched[-1]
        return self.add_c and self.out == "float32" and self.columns % 2 == 0 and in_place

    @property
    def b_once(self) -> bool:
        """Whether B's lines may be the first to leave L2: weights that meet few rows, and so few SMs.

        Measured on an H200: up to 16 % less time where L2 is full of dirty lines; where it is not, within
        2 %, but 2 to 3 % more at k = 1536. With shorter k it costs up to 8 %, with the largest weights up to
        3.5 %.
        """
        b = 2 if self.is_fp8 else 1
        shared = self.batches > 1 and not all(self.batched[b : b + 1])
        size = self.weights * self.batches * self.n * self.row_bytes
        return 0 < size <= _MOST_WEIGHTS and not shared and self.m <= _FEW_ROWS and self.k >= _LONG_K

    @property
    def swiglu(self) -> bool:
        """Whether the kernel is the one that is fused with SwiGLU."""
        return self.gated and self.finish == AS_IT_IS

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.batches * self.m * self.n * self.runs * self.k

    @property
    def bytes_moved(self) -> int:
        """Bytes that memory must move at least: every operand once."""
        once = (self.m + self.n) * self.row_bytes
        if self.fine:  # four bytes for 32
            once += (
                (self.m + (self.n if self.b_scales == "vector_32" else ceil_div(self.n, 32)))
                * self.row_bytes
                // 8
            )
        stored = self.n // self.finish.halves * self.out_bytes
        written = self.n // 2 if self.swiglu else stored * (2 if self.add_c else 1)
        once += self.m * written
        return self.batches * once

    def __str__(self) -> str:
        layout = self.stored or self.layout
        parts = [f"{self.a}x{self.b} {layout} m={self.m} n={self.n} k={self.k} -> {self.out}"]
        parts += ["+C"] if self.add_c else []
        parts += [f"B scales {self.b_block}"] if self.is_fp8 else []
        parts += [f"batches={self.batches}"] if self.batches > 1 else []
        parts += [f"runs={self.runs}"] if self.runs > 1 else []
        parts += self.finish.words
        return " ".join(parts)
