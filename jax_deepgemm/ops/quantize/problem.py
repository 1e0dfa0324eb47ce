"""What a quantising kernel is to compute."""

from __future__ import annotations

from dataclasses import dataclass

from jax_deepgemm.ops.quantize.activation import SILU, Activation

TILE, FINE = 128, 32


@dataclass(frozen=True)
class QuantizeProblem:
    """What is quantised and how.

    Attributes:
      kind: "quantize" (x itself), "swiglu" (the activation of h) or "swiglu_grad" (the gradient of h).
      rows, cols: of the quantised matrix.
      x: dtype of what is read.
      fp8: dtype of what is written.
      block: elements per scale, (1, 128), (128, 1) or (128, 128); of x as it lies also (1, 32) or (32, 32).
      transposed: write the transposed copy too; with block (1, 128) it has scales of its own, (128, 1).
      square_t: those scales are of (128, 128).
      ue8m0: scales are powers of two.
      min_amax: what the amax of a block counts as at least; 0: as little as a normal scale allows.
      limited: an operand says from which row on x counts as zeros.
      blocks: row blocks, which a table lists, each with its own columns of the transposed copy; 0: tiles of
        128 rows from row 0 on.
      indexed: an operand says which row of x each row is.
      copied: rows of x, where another operand says which rows are copies of each: a row of x is read and
        quantised once; 0: once for each row that it is.
      weighted: "swiglu" and its gradient have a factor per row.
      activation: of "swiglu" and its gradient.
      batches: number of matrices.
      chained: it is a launch of a chain (core/chain.py), and reads what the one before gives.
    """

    kind: str
    rows: int
    cols: int
    x: str = "bfloat16"
    fp8: str = "float8_e4m3fn"
    block: tuple[int, int] = (1, TILE)
    transposed: bool = False
    ue8m0: bool = False
    min_amax: float = 0.0
    limited: bool = False
    weighted: bool = False
    activation: Activation = SILU
    batches: int = 1
    blocks: int = 0
    indexed: bool = False
    copied: int = 0
    square_t: bool = False
    chained: bool = False

    def __str__(self) -> str:
        transposed = "transposed 128x128" if self.square_t else "transposed"
        flags = {transposed: self.transposed, "ue8m0": self.ue8m0, "row limit": self.limited}
        flags |= {f"blocks={self.blocks}": self.blocks > 0, "indexed": self.indexed}
        flags |= {f"copies of {self.copied}": self.copied > 0}
        flags |= {"weights": self.weighted, f"batches={self.batches}": self.batches > 1}
        flags |= {"chained": self.chained}
        shape, block = f"{self.rows}x{self.cols}", f"{self.block[0]}x{self.block[1]}"
        kind = " ".join([self.kind, *([self.activation.tag] if self.activation.tag else [])])
        return " ".join(
            [kind, shape, block, f"{self.x} -> {self.fp8}", *(name for name, on in flags.items() if on)]
        )

    @property
    def flops(self) -> int:
        """None that count: these kernels move bytes."""
        return 0

    @property
    def fine(self) -> bool:
        """Whether blocks have 32 columns."""
        return self.block[1] == FINE

    @property
    def width(self) -> int:
        """Features of the activation's result."""
        return self.cols // self.activation.halves if self.kind == "swiglu_grad" else self.cols

    @property
    def aligned(self) -> bool:
        """Eight neighbouring numbers of a row lie in one half of h, and can be moved at once."""
        return self.width % 8 == 0

    @property
    def aligned_t(self) -> bool:
        """The same for the rows of the transposed copy."""
        return self.blocks > 0 or self.rows % 8 == 0

    @property
    def pairs(self) -> bool:
        """The gradients of gate and up are computed together."""
        apart = self.activation.gated and not self.activation.interleaved
        return self.kind == "swiglu_grad" and apart and self.width % TILE == 0 and self.x != "float32"

    @property
    def summed(self) -> int:
        """Tiles of the gradient of h, side by side, of which each gives the weights' gradient a part."""
        features = self.cols if self.activation.interleaved else self.width
        return -(-features // TILE)

    @property
    def streamed(self) -> bool:
        """A block of threads walks over row blocks, the next one's rows on their way."""
        return self.kind == "quantize" and self.blocks > 0 and self.aligned and self.x != "float32"

    @property
    def walked(self) -> bool:
        """There are as many blocks of threads as run at once, and each walks over tiles."""
        return self.pairs or self.streamed
